"""Pack files ("Pack Format").

    sealed blob | … | sealed header | length of the sealed header (32 bits, little-endian)

    header = for each blob: type (1) | sealed length (4) | [plain length (4)] | id (32)
    type:    0 data, 1 tree, without plain length; 2 data, 3 tree, compressed, with it

A pack's name is its SHA-256, so whoever holds a copy can check it without the key.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from dataclasses import dataclass

from pullback import errors
from pullback.repo.restic import crypto
from pullback.repo.restic.blobs import EncodedBlob
from pullback.repo.restic.types import OVERHEAD, Blob, Buffer, Entry
from pullback.units import MiB

#: Bytes of the number at the end of a pack.
TRAILER = 4
#: Bytes of a header: as much as restic accepts.
MAX_HEADER = 16 * MiB
#: Bytes that a compressed blob takes in the header, and the others less.
MAX_HEADER_ENTRY = 41

_COMPRESSED = 2
_PLAIN = struct.Struct("<BI32s")
_PACKED = struct.Struct("<BII32s")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Pack:
    """A finished pack."""

    #: SHA-256 of `data`.
    id: bytes
    #: All of the file; in the memory that the builder was given.
    data: memoryview
    #: What is in it, by offset.
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.id.hex()


class PackBuilder:
    """A pack in the making, with blobs of one kind ("in version 2, they must be stored in separate files").

    For one thread at a time; but places that were reserved may be filled by several.
    """

    def __init__(self, key: crypto.Key, kind: Blob, memory: mmap.mmap | None = None) -> None:
        """An empty one; `key` seals the header. All of the file will lie in `memory`, which is not copied.

        Without `memory` it takes what it needs; then no place may be held while another one is reserved.
        """
        self.kind = kind
        self._key = key
        self._memory = bytearray() if memory is None else memory
        self._entries: list[Entry] = []
        self._offset = 0
        self._header = bytearray()

    @property
    def count(self) -> int:
        """Blobs in it."""
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes that the file would have if it were finished now."""
        return self._offset + len(self._header) + OVERHEAD + TRAILER

    def fits(self, length: int) -> bool:
        """Is there room for another sealed blob of so many bytes?"""
        return isinstance(self._memory, bytearray) or self.size + length + MAX_HEADER_ENTRY <= len(self._memory)

    def add(self, blob: EncodedBlob) -> Entry:
        """Append a blob. Raises `ValueError` if it is of the other kind, or there is no room."""
        if blob.kind is not self.kind:
            raise ValueError("a pack has blobs of one kind")
        with self.reserve(blob.id, len(blob.sealed), blob.raw_length) as place:
            place[:] = blob.sealed
        return self._entries[-1]

    def reserve(self, id: bytes, length: int, raw_length: int) -> memoryview:
        """The place of the next blob, of `length` bytes, for the caller to fill before `finish`.

        Raises `ValueError` if there is no room, or the header would be too long.
        """
        if len(self._header) + MAX_HEADER_ENTRY + OVERHEAD > MAX_HEADER:
            raise ValueError("a pack's header has at most 16 MiB")
        place = self._append(length)
        if raw_length:
            self._header += _PACKED.pack(self.kind + _COMPRESSED, length, raw_length, id)
        else:
            self._header += _PLAIN.pack(self.kind, length, id)
        self._entries.append(Entry(id, self.kind, self._offset - length, length, raw_length))
        return place

    def finish(self) -> Pack:
        """The pack. Raises `ValueError` if it is empty; the builder is of no use after that."""
        if not self._entries:
            raise ValueError("a pack has at least one blob")
        length = len(self._header) + OVERHEAD
        with self._append(length) as place:
            crypto.seal_into(self._key, self._header, place)
        with self._append(TRAILER) as place:
            place[:] = _LENGTH.pack(length)
        data = memoryview(self._memory)[: self._offset].toreadonly()
        return Pack(hashlib.sha256(data).digest(), data, tuple(self._entries))

    def _append(self, length: int) -> memoryview:
        end = self._offset + length
        if end > len(self._memory):
            if not isinstance(self._memory, bytearray):
                raise ValueError("no room for it")
            self._memory += bytes(end - len(self._memory))
        place = memoryview(self._memory)[self._offset : end]
        self._offset = end
        return place


def header_place(tail: Buffer, size: int, where: str) -> tuple[int, int]:
    """Offset and length of the sealed header of a pack of `size` bytes, from its last bytes (at least 4).

    Raises `RepositoryDamaged` if there can be none.
    """
    if len(tail) < TRAILER or size < TRAILER:
        raise _damaged(where, "it is too short for a pack")
    [length] = _LENGTH.unpack(bytes(memoryview(tail)[-TRAILER:]))
    if not OVERHEAD < length <= min(MAX_HEADER, size - TRAILER):
        raise _damaged(where, f"a header of {length} bytes does not fit in")
    return size - TRAILER - length, length


def parse_header(key: crypto.Key, sealed: Buffer, size: int, where: str) -> list[Entry]:
    """The blobs of a pack of `size` bytes, from its sealed header, by offset.

    Raises `RepositoryDamaged` unless they fill the file up to the header exactly.
    """
    header = crypto.unseal(key, sealed, where)
    end = size - TRAILER - len(sealed)
    entries: list[Entry] = []
    position = offset = 0
    while position < len(header):
        entry, position = _entry(header, position, offset, where)
        offset += entry.length
        if offset > end:
            break
        entries.append(entry)
    if offset != end:
        raise _damaged(where, "the lengths in its header do not add up to its own")
    return entries


def parse_pack(key: crypto.Key, data: Buffer, where: str) -> list[Entry]:
    """The blobs of a pack whose file is `data`, by offset. Raises `RepositoryDamaged`."""
    offset, length = header_place(data, len(data), where)
    return parse_header(key, memoryview(data)[offset : offset + length], len(data), where)


def _entry(header: bytes, position: int, offset: int, where: str) -> tuple[Entry, int]:
    kind = header[position]
    packed = bool(kind & _COMPRESSED)
    form = _PACKED if packed else _PLAIN
    if kind > Blob.TREE + _COMPRESSED:
        raise _damaged(where, f"its header has a blob of the unknown type {kind}")
    if position + form.size > len(header):
        raise _damaged(where, "its header is cut off")
    _, length, *raw, id = form.unpack_from(header, position)
    raw_length = raw[0] if packed else 0
    if length < OVERHEAD or (packed and not raw_length):
        raise _damaged(where, "its header has a blob of an impossible length")
    return Entry(id, Blob(kind & ~_COMPRESSED), offset, length, raw_length), position + form.size


def _damaged(where: str, problem: str) -> errors.RepositoryDamaged:
    return errors.RepositoryDamaged(file=where, problem=problem)
