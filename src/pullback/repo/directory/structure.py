"""Proving everything in an image that is not the guest's data: header, tables, what no read reaches.

The guest's data is proven by the block hashes. The rest of the file is proven by one SHA-256 over the
file's length and over all clusters that hold no data of the disk, in the order of the file. So each
bit of an image is under a hash, and this one costs only what the tables take (QEMU's
docs/interop/qcow2.rst, "Cluster mapping"):

    L1 table: offset of an L2 table, bits 9-55 | L2 entry: offset of a cluster, bits 9-55;
    bit 62: compressed, bit 0: reads as zeroes (the cluster's content is not looked at)
"""

from __future__ import annotations

import array
import hashlib
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from pullback.extents import Extent, between
from pullback.repo import files
from pullback.units import MiB

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED, _ZERO = 1 << 62, 1
_EXTENDED_ENTRIES = 16
_HEADER = struct.Struct(">20xIQIIQ")  # cluster bits, size, encryption, L1 entries, L1 offset


def digest(path: Path) -> str:
    """The hex digest of an image's structure. Raises `ValueError` if its tables lead nowhere."""
    with files.opened(path) as descriptor:
        length = os.fstat(descriptor).st_size
        found = hashlib.sha256(struct.pack(">Q", length))
        for extent in _without(_data(descriptor, length), length):
            _update(found, descriptor, extent)
        return found.hexdigest()


def _update(found: hashlib._Hash, descriptor: int, extent: Extent) -> None:
    offset = extent.start
    while offset < extent.end:
        part = os.pread(descriptor, min(MiB, extent.end - offset), offset)
        if not part:
            raise ValueError("the image was cut short")
        found.update(part)
        offset += len(part)


def _without(data: Iterator[Extent], length: int) -> Iterator[Extent]:
    """What of the file lies between the data's clusters, which may come in any order."""
    clusters: bytearray | None = None
    unit = 0
    for cluster in data:
        if clusters is None:
            unit = cluster.length
            clusters = bytearray(-(-length // unit))
        clusters[cluster.start // unit] = 1
    if clusters is None:
        yield Extent(0, length)
        return
    start = 0
    while (start := clusters.find(0, start)) >= 0:
        end = clusters.find(1, start)
        end = len(clusters) if end < 0 else end
        yield between(start * unit, min(end * unit, length))
        start = end


def _data(descriptor: int, length: int) -> Iterator[Extent]:
    """The clusters whose whole content the guest's disk shows."""
    head = os.pread(descriptor, 104, 0)
    bits, size, _, entries, table = _HEADER.unpack_from(head)
    version, features = struct.unpack_from(">I", head, 4)[0], struct.unpack_from(">Q", head, 72)[0]
    if not 9 <= bits <= 21:
        raise ValueError("the image's cluster size is impossible")
    if version >= 3 and features & _EXTENDED_ENTRIES:
        return  # not made by us: all of it is taken for structure
    cluster = 1 << bits
    per_table = cluster // 8
    if entries > -(-length // 8):
        raise ValueError("the image's first table is longer than the image")
    for number, first in enumerate(_table(descriptor, table, entries)):
        if first & _OFFSET:
            base = number * per_table
            for index, entry in enumerate(_table(descriptor, first & _OFFSET, per_table)):
                if _shows(entry) and (base + index + 1) * cluster <= size:
                    yield _inside(entry & _OFFSET, cluster, length)


def _shows(entry: int) -> bool:
    return bool(entry & _OFFSET) and not entry & (_COMPRESSED | _ZERO)


def _inside(offset: int, cluster: int, length: int) -> Extent:
    if offset % cluster or offset >= length:
        raise ValueError("a table of the image leads out of it")
    return Extent(offset, cluster)


def _table(descriptor: int, offset: int, entries: int) -> array.array[int]:
    """`entries` big-endian numbers of 64 bits."""
    data = os.pread(descriptor, entries * 8, offset)
    if len(data) < entries * 8:
        raise ValueError("a table of the image is cut off")
    table = array.array("Q", data)
    if sys.byteorder == "little":
        table.byteswap()
    return table
