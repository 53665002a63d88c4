"""What a client will ask for next: blocks are loaded ahead of those who read in order.

A disk may have several such readers at a time (`nbdcopy` reads with four connections, each a range of its
own), and their requests come out of order, because many are under way. Pure; used under its owner's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: Readers that are remembered.
_STREAMS = 8


@dataclass(slots=True)
class _Stream:
    """One who reads in order."""

    #: The last block that was asked for.
    last: int
    #: The first block that was not loaded ahead.
    edge: int
    #: So many blocks are loaded ahead.
    depth: int = 0


class Ahead:
    """The readers of one disk."""

    def __init__(self, count: int, deepest: int, next_data: Callable[[int], int]) -> None:
        """Of a disk of `count` blocks, of which at most `deepest` are loaded ahead of each reader.

        `next_data`: the first block from the given one on that is not zero; holes are no gaps.
        """
        self._count = count
        self._deepest = deepest
        self._next_data = next_data
        #: The one that read last comes last.
        self._streams: list[_Stream] = []

    def asked(self, block: int) -> range:
        """A client asks for `block`: what to load ahead now."""
        stream = self._stream_of(block)
        if stream is None:
            self._streams = [*self._streams[-_STREAMS + 1 :], _Stream(block, block + 1)]
            return range(0)
        if block > stream.last:
            stream.last = block
            stream.depth = min(max(2, 2 * stream.depth), self._deepest)
        start = max(stream.edge, block + 1)
        end = min(stream.last + 1 + stream.depth, self._count)
        if end - start < stream.depth // 4 + 1 and end < self._count:
            return range(0)  # a few at a time: they come with one request
        stream.edge = max(stream.edge, end)
        return range(start, max(start, end))

    def _stream_of(self, block: int) -> _Stream | None:
        for number in reversed(range(len(self._streams))):
            stream = self._streams[number]
            if stream.last - self._deepest <= block <= stream.edge or self._next_data(stream.edge) == block:
                self._streams.append(self._streams.pop(number))
                return stream
        return None
