"""The digest of a disk: SHA-256 over the SHA-256s of its fixed-size blocks, in order.

    disk      | block 0 | block 1 | … | last block (may be short) |
    hash list | 32 byte | 32 byte | … | 32 byte                   |   = the file `vda.sha256`
    digest      SHA-256 of that list                                  = SHA-256 of that file

An increment copies its parent's list and hashes only the blocks that it touches, so the digest of
an 8 TiB disk costs what changed. The list is held in memory; therefore blocks grow with the disk.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from functools import lru_cache

from pullback import errors
from pullback.extents import Extent, between
from pullback.model.points import MAX_BLOCK, MAX_BLOCKS
from pullback.units import MiB

#: Bytes of one entry of a list.
ENTRY = hashlib.sha256().digest_size

_RUN = re.compile(b"\x01+")


def block_size_for(size: int) -> int:
    """Bytes of a hash block for a disk of `size` bytes: 1 MiB up to 1 TiB, then doubled as the disk doubles.

    So a list has at most 1 Mi entries (32 MiB). Raises `Unsupported` beyond 256 TiB.
    """
    block = MiB
    while -(-size // block) > MAX_BLOCKS:
        block *= 2
    if block > MAX_BLOCK:
        raise errors.Unsupported(
            what=f"A disk of {size} bytes",
            reason="hash lists end at 256 TiB",
            way_out="Leave the disk out with --exclude.",
        )
    return block


@lru_cache(maxsize=64)
def zero_hash(length: int) -> bytes:
    """SHA-256 of `length` zero bytes."""
    state, piece = hashlib.sha256(), bytes(min(length, MiB))
    for _ in range(length // MiB):
        state.update(piece)
    state.update(piece[: length % MiB])
    return state.digest()


class HashList:
    """The hashes of a disk's blocks, some of them perhaps not known yet.

    A block's entry is *unknown* until it is set; `digest` and `encode` refuse a list with unknown
    entries, so a block that was forgotten can never pass as zeroes or as the parent's.

    Any thread may set entries; a lock guards the list.
    """

    def __init__(self, size: int, block_size: int) -> None:
        """All unknown, for a disk of `size` bytes in blocks of `block_size` bytes."""
        if size <= 0 or block_size <= 0:
            raise ValueError("a hash list needs a disk and a block size")
        self.size = size
        self.block_size = block_size
        self.count = -(-size // block_size)
        self._entries = bytearray(self.count * ENTRY)
        self._unknown = bytearray(b"\x01") * self.count
        self._lock = threading.Lock()

    @classmethod
    def from_parent(cls, parent: HashList, *, size: int, block_size: int) -> HashList:
        """A copy of the parent's list, all known; raises `ValueError` unless sizes and blocks are equal."""
        if (parent.size, parent.block_size) != (size, block_size):
            raise ValueError("the parent's hash list is of another size")
        with parent._lock:
            return cls._filled(size, block_size, parent._entries, parent._unknown)

    @classmethod
    def _filled(
        cls, size: int, block_size: int, entries: bytes | bytearray, unknown: bytes | bytearray | None = None
    ) -> HashList:
        new = cls(size, block_size)
        new._entries[:] = entries
        new._unknown[:] = bytes(new.count) if unknown is None else unknown
        return new

    @classmethod
    def decode(cls, data: bytes, *, size: int, block_size: int) -> HashList:
        """A list from its bytes, the entries in order; `ValueError` unless they are just as many as the disk needs.

        Whether it is the right list only `digest` can tell.
        """
        expected = -(-size // block_size) * ENTRY
        if len(data) != expected:
            raise ValueError(f"{len(data)} bytes instead of {expected}")
        return cls._filled(size, block_size, data)

    def block(self, index: int) -> Extent:
        """The bytes that block `index` covers (the last one may be short)."""
        start = index * self.block_size
        return between(start, min(start + self.block_size, self.size))

    def touched(self, extent: Extent) -> range:
        """Indexes of the blocks that the extent touches."""
        return range(extent.start // self.block_size, min(-(-extent.end // self.block_size), self.count))

    def entry(self, index: int) -> bytes | None:
        """The hash of a block, or None if it is unknown."""
        with self._lock:
            return None if self._unknown[index] else bytes(self._entries[index * ENTRY : (index + 1) * ENTRY])

    def set(self, index: int, digest: bytes) -> None:
        """The block's SHA-256 is `digest`."""
        if len(digest) != ENTRY or not 0 <= index < self.count:
            raise ValueError("no such entry")
        with self._lock:
            self._entries[index * ENTRY : (index + 1) * ENTRY] = digest
            self._unknown[index] = 0

    def hash(self, index: int, content: bytes | bytearray | memoryview) -> None:
        """Hash the block's content (all of it) and set its entry."""
        if len(content) != self.block(index).length:
            raise ValueError("a hash is made of a whole block")
        self.set(index, hashlib.sha256(content).digest())

    def matches(self, index: int, content: bytes | bytearray | memoryview) -> bool:
        """Is `content`, the whole block, what its entry says?"""
        return hashlib.sha256(content).digest() == self.entry(index)

    def set_zero(self, extent: Extent) -> None:
        """All of the extent reads as zeroes: set every block that lies wholly inside; others stay as they are."""
        first = -(-extent.start // self.block_size)
        end = self.count if extent.end >= self.size else extent.end // self.block_size
        if first >= end:
            return
        with self._lock:
            self._entries[first * ENTRY : end * ENTRY] = zero_hash(self.block_size) * (end - first)
            self._unknown[first:end] = bytes(end - first)
            if end == self.count:
                self._entries[-ENTRY:] = zero_hash(self.block(end - 1).length)

    def forget(self, extent: Extent) -> None:
        """Make every block that the extent touches unknown."""
        blocks = self.touched(extent)
        with self._lock:
            self._unknown[blocks.start : blocks.stop] = b"\x01" * len(blocks)

    def missing(self) -> Iterator[Extent]:
        """The ranges of unknown blocks, joined, in order: what is still to be read and hashed."""
        with self._lock:
            flags = bytes(self._unknown)
        for run in _RUN.finditer(flags):
            yield between(self.block(run.start()).start, self.block(run.end() - 1).end)

    def differing(self, other: HashList) -> Iterator[int]:
        """Indexes of the blocks whose hashes differ (both lists complete and of one shape)."""
        mine, theirs = self._complete(), other._complete()
        if (self.size, self.block_size) != (other.size, other.block_size):
            raise ValueError("lists of two sizes cannot be compared")
        for index in range(self.count):
            if mine[index * ENTRY : (index + 1) * ENTRY] != theirs[index * ENTRY : (index + 1) * ENTRY]:
                yield index

    def digest(self) -> str:
        """The disk's digest, hex. Raises `ValueError` while an entry is unknown."""
        return hashlib.sha256(self._complete()).hexdigest()

    def encode(self) -> bytes:
        """The entries in order. Raises `ValueError` while one is unknown."""
        return self._complete()

    def _complete(self) -> bytes:
        with self._lock:
            if 1 in self._unknown:
                raise ValueError("some blocks have not been hashed")
            return bytes(self._entries)
