"""The header of a qcow2 image, read by ourselves (QEMU's docs/interop/qcow2.rst).

Before any QEMU program may open an image from a repository we must know that it leads to no other
file: before the fix of CVE-2024-4467 `qemu-img info` alone opened an external data file named inside
the image, were it a `json:` description of anything. So this reads the bytes, without QEMU.

    0 magic "QFI\\xfb" | 4 version | 8 backing name's offset | 16 its length | 20 cluster bits
    24 virtual size | 32 encryption | … | 72 incompatible features | … | 100 header length
    then extensions: type (4), length (4), data, padded to 8; type 0 ends them
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from pullback.repo import files
from pullback.units import KiB

#: Bytes from the start of an image that are looked at: header, extensions and backing name, which
#: QEMU writes one behind the other.
HEAD = 64 * KiB

_FIXED = struct.Struct(">4sIQIIQI")
_MAGIC = b"QFI\xfb"
_VERSION2_LENGTH = 72
_VERSION3_LENGTH = 104
_MAX_NAME = 1023
_BACKING_FORMAT = 0xE2792ACA
_DATA_FILE = 0x44415441
_DIRTY, _CORRUPT, _EXTERNAL = 1, 2, 4
# Compression type (3) and extended L2 entries (4) change how clusters are read, not which file.
_HARMLESS = 8 | 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What an image says of itself, as far as it can lead astray."""

    #: Bytes of the guest's disk.
    size: int
    #: Name of the backing file, or None.
    backing: str | None
    #: Its format, or None.
    backing_format: str | None


def read(path: Path) -> Header:
    """The header of an image. Raises `ValueError` as `parse` does, `OSError` as `files.opened` does."""
    with files.opened(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        return parse(file.read(HEAD))


def parse(head: bytes) -> Header:
    """The header in the first bytes of an image (at least `HEAD` of them, or all there are).

    Raises `ValueError` with the reason for whatever is not a plain, sound image: another format,
    damaged, encrypted, marked corrupt or not closed, with an external data file or with a feature
    that is unknown here.
    """
    try:
        magic, version, name_offset, name_length, cluster_bits, size, crypt = _FIXED.unpack_from(head)
        if magic != _MAGIC or version not in (2, 3):
            raise ValueError("not a qcow2 image")
        start = _VERSION2_LENGTH if version == 2 else _features(head)
        if crypt:
            raise ValueError("the image is encrypted")
        if not 9 <= cluster_bits <= 21:
            raise ValueError("the image's cluster size is impossible")
        name = _name(head, name_offset, name_length)
        end = name_offset if name is not None else min(1 << cluster_bits, len(head))
        return Header(size=size, backing=name, backing_format=_extensions(head, start, end))
    except struct.error as error:
        raise ValueError("the image's header is cut off") from error


def _features(head: bytes) -> int:
    """Judge the features of a version 3 header; gives its length."""
    (features,) = struct.unpack_from(">Q", head, 72)
    (length,) = struct.unpack_from(">I", head, 100)
    if features & _CORRUPT:
        raise ValueError("the image is marked corrupt")
    if features & _EXTERNAL:
        raise ValueError("the image keeps its data in another file")
    if features & _DIRTY:
        raise ValueError("the image was not closed")
    if features & ~_HARMLESS:
        raise ValueError("the image uses an unknown feature")
    if length < _VERSION3_LENGTH:
        raise ValueError("the image's header is too short")
    return int(length)


def _name(head: bytes, offset: int, length: int) -> str | None:
    if offset == 0:
        return None
    if not 1 <= length <= _MAX_NAME or offset + length > len(head):
        raise ValueError("the name of the backing file lies outside of the header")
    return head[offset : offset + length].decode("utf-8", "backslashreplace")


def _extensions(head: bytes, offset: int, end: int) -> str | None:
    """Walk the header extensions up to `end`; gives the backing format."""
    found = None
    while offset + 8 <= end:
        kind, length = struct.unpack_from(">II", head, offset)
        offset += 8
        if kind == 0:
            break
        if length > end - offset:
            raise ValueError("an extension of the image's header is cut off")
        if kind == _DATA_FILE:
            raise ValueError("the image names an external data file")
        if kind == _BACKING_FORMAT:
            found = head[offset : offset + length].decode("utf-8", "backslashreplace")
        offset += (length + 7) & ~7
    return found
