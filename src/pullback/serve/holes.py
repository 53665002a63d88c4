"""Which blocks of a disk are zero: its hash list as runs, for block status and for what is loaded ahead."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator

from pullback.extents import Extent, Mapped, between
from pullback.repo import HashList, zero_hash

_ENTRY = 32


class Holes:
    """Runs of zero blocks and of others, in turn. Never changes."""

    def __init__(self, hashes: HashList) -> None:
        """Looks at every hash: 0.15 s for a million blocks."""
        self._size = hashes.size
        self._block = hashes.block_size
        self._count = hashes.count
        #: Where a run begins, in blocks, …
        self._starts = array("Q")
        #: … and whether the first run is of zeroes.
        self._first_zero = False
        self._fill(hashes)

    def _fill(self, hashes: HashList) -> None:
        entries = hashes.encode()
        zero = zero_hash(hashes.block_size)
        last = self._count - 1
        before: bool | None = None
        for index in range(self._count):
            if index == last:
                zero = zero_hash(hashes.block(last).length)
            now = entries.startswith(zero, index * _ENTRY)
            if now is not before:
                self._starts.append(index)
                if before is None:
                    self._first_zero = now
                before = now

    def zero(self, index: int) -> bool:
        """Is the block all zeroes?"""
        return self._is_zero(self._run(index))

    def next_data(self, index: int) -> int:
        """The first block from `index` on that is not zero; the count of blocks if there is none."""
        if index >= self._count:
            return self._count
        run = self._run(index)
        return self._end(run) if self._is_zero(run) else index

    def map(self, window: Extent) -> Iterator[Mapped]:
        """The runs in `window`, in bytes, without gaps."""
        run = self._run(window.start // self._block)
        start = window.start
        while start < window.end:
            end = min(self._end(run) * self._block, self._size, window.end)
            yield Mapped(*between(start, end), zero=self._is_zero(run))
            start, run = end, run + 1

    def _run(self, index: int) -> int:
        return bisect_right(self._starts, index) - 1

    def _is_zero(self, run: int) -> bool:
        return (run % 2 == 0) == self._first_zero

    def _end(self, run: int) -> int:
        return self._starts[run + 1] if run + 1 < len(self._starts) else self._count
