"""Algebra on extents: ranges of bytes on a disk.

All functions take and give *sorted, disjoint* streams of `Extent` and work lazily, so a disk with
millions of extents costs no memory. `merge` makes such a stream out of sorted input that may
touch or overlap. Bytes everywhere; an extent of length 0 does not exist in a stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Extent(NamedTuple):
    """`length` bytes from byte `start`."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.length


class Mapped(NamedTuple):
    """An extent of which is known whether it reads as zeroes without being read."""

    start: int
    length: int
    zero: bool

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.length

    @property
    def extent(self) -> Extent:
        """The range alone."""
        return Extent(self.start, self.length)


def between(start: int, end: int) -> Extent:
    """The extent from byte `start` to before byte `end`."""
    return Extent(start, end - start)


def merge(stream: Iterable[Extent]) -> Iterator[Extent]:
    """Join what touches or overlaps; input sorted by start. Empty extents vanish."""
    start = end = -1
    for extent in stream:
        if extent.length <= 0:
            continue
        if extent.start > end:
            if end > start:
                yield between(start, end)
            start, end = extent.start, extent.end
        elif extent.end > end:
            end = extent.end
    if end > start:
        yield between(start, end)


def clip(stream: Iterable[Extent], window: Extent) -> Iterator[Extent]:
    """What of the stream lies inside `window`."""
    for extent in stream:
        start, end = max(extent.start, window.start), min(extent.end, window.end)
        if start < end:
            yield between(start, end)


def intersect(left: Iterable[Extent], right: Iterable[Extent]) -> Iterator[Extent]:
    """The bytes that are in both."""
    rights = iter(right)
    other = next(rights, None)
    for extent in left:
        while other is not None and other.end <= extent.start:
            other = next(rights, None)
        while other is not None and other.start < extent.end:
            yield between(max(extent.start, other.start), min(extent.end, other.end))
            if other.end > extent.end:
                break
            other = next(rights, None)
        if other is None:
            return


def subtract(left: Iterable[Extent], right: Iterable[Extent]) -> Iterator[Extent]:
    """The bytes of `left` that are not in `right`."""
    rights = iter(right)
    other = next(rights, None)
    for extent in left:
        start = extent.start
        while other is not None and other.end <= start:
            other = next(rights, None)
        while other is not None and other.start < extent.end:
            if other.start > start:
                yield between(start, other.start)
            start = other.end
            if other.end > extent.end:
                break
            other = next(rights, None)
        if start < extent.end:
            yield between(start, extent.end)


def union(left: Iterable[Extent], right: Iterable[Extent]) -> Iterator[Extent]:
    """The bytes that are in either."""
    return merge(_interleave(iter(left), iter(right)))


def _interleave(left: Iterator[Extent], right: Iterator[Extent]) -> Iterator[Extent]:
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        if a.start <= b.start:
            yield a
            a = next(left, None)
        else:
            yield b
            b = next(right, None)
    if a is not None:
        yield a
        yield from left
    if b is not None:
        yield b
        yield from right


def align_out(stream: Iterable[Extent], unit: int, limit: int) -> Iterator[Extent]:
    """Grow each extent to whole multiples of `unit`, but not beyond byte `limit` (the disk's end)."""
    return merge(between(extent.start // unit * unit, min(-(-extent.end // unit) * unit, limit)) for extent in stream)


def align_in(stream: Iterable[Extent], unit: int) -> Iterator[Extent]:
    """Shrink each extent to the whole multiples of `unit` inside it."""
    for extent in stream:
        start, end = -(-extent.start // unit) * unit, extent.end // unit * unit
        if start < end:
            yield between(start, end)


def split(stream: Iterable[Extent], unit: int) -> Iterator[Extent]:
    """Cut at the multiples of `unit`, so that no extent crosses one."""
    for extent in stream:
        start = extent.start
        while start < extent.end:
            end = min((start // unit + 1) * unit, extent.end)
            yield between(start, end)
            start = end


def total(stream: Iterable[Extent]) -> int:
    """Bytes in all."""
    return sum(extent.length for extent in stream)


def zeroes(stream: Iterable[Mapped]) -> Iterator[Extent]:
    """The ranges known to read as zeroes, joined."""
    return merge(mapped.extent for mapped in stream if mapped.zero)


def data(stream: Iterable[Mapped]) -> Iterator[Extent]:
    """The ranges that must be read to be known, joined."""
    return merge(mapped.extent for mapped in stream if not mapped.zero)
