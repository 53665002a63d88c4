"""Which parts of a disk are known to read as zeroes, finer than its chunks.

An increment looks at every hole of the disk that no bitmap accounts for (a disk shrunk and grown
back has such). With the chunks alone, each hole inside a chunk with data would be looked at again
in every increment. This map, a sixteenth of a chunk fine, tells those that were holes before.

It only saves work: a part that it does not know is looked at. So it is kept in the local cache and
not in the repository. But what it calls zero must be zero.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

from pullback.extents import Extent, between

#: Parts of a chunk.
PARTS = 16

_RUN = re.compile(b"\x01+")


class ZeroMap:
    """One flag for each part of each chunk. Different chunks may be noted by different threads."""

    def __init__(self, size: int, chunk: int) -> None:
        """Nothing known of a disk of `size` bytes in chunks of `chunk` bytes."""
        self.size = size
        self.chunk = chunk
        self.part = max(1, chunk // PARTS)
        self._flags = bytearray(-(-size // self.part))
        self._nothing = bytes(self.part)

    def observe(self, offset: int, buffer: bytearray, length: int) -> None:
        """The chunk at `offset` is `buffer[:length]` now."""
        first = offset // self.part
        for number in range(-(-length // self.part)):
            start = number * self.part
            there = min(self.part, length - start)
            nothing = self._nothing if there == self.part else self._nothing[:there]
            self._flags[first + number] = buffer.startswith(nothing, start)

    def zeroed(self, extent: Extent) -> None:
        """These whole chunks are zero now."""
        first, end = extent.start // self.part, -(-extent.end // self.part)
        self._flags[first:end] = b"\x01" * (end - first)

    def zeroes(self, window: Extent) -> Iterator[Extent]:
        """The known zeroes of `window`, which begins at a chunk."""
        first = window.start // self.part
        flags = bytes(self._flags[first : -(-window.end // self.part)])
        for run in _RUN.finditer(flags):
            start = (first + run.start()) * self.part
            yield between(start, min((first + run.end()) * self.part, window.end, self.size))

    def encode(self) -> bytes:
        """Compressed bytes; holes come in runs, so a TiB takes some kilobytes."""
        return zlib.compress(bytes(self._flags), 1)

    @classmethod
    def decode(cls, data: bytes, *, size: int, chunk: int) -> ZeroMap:
        """From its bytes; `ValueError` if they are not those of a disk of that size."""
        new = cls(size, chunk)
        unpacking = zlib.decompressobj()
        try:
            flags = unpacking.decompress(data, len(new._flags) + 1)
        except zlib.error as error:
            raise ValueError("no map of zeroes") from error
        if len(flags) != len(new._flags) or flags.strip(b"\x00\x01"):
            raise ValueError("no map of zeroes of this disk")
        new._flags[:] = flags
        return new
