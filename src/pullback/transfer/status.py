"""From block-status replies to extents: the pure heart of asking an NBD server what a disk holds.

A reply to NBD_CMD_BLOCK_STATUS describes, for one metadata context, the bytes from the offset
asked for, by (length, flags) pairs in order. It may cover less than was asked, its last extent
may reach beyond what was asked, and neighbours may repeat the same flags (NBD protocol,
"Metadata querying"). So the next question starts where the reply ended, not where ours did:

    asked      |----------------|
    reply      |--a--|-b-|                       shorter
    asked                |------------|
    reply                |-b-|-----c------|      the last one longer, b continues
    given      |--a--|---b---|----c---|          merged, clipped to the window

Replies are hostile input: a reply that makes no progress or tells of bytes that the disk does
not have raises `BadReply`, so the walk always ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pullback import errors
from pullback.extents import Extent, Mapped, between, merge

#: One reply: pairs of (length in bytes, flags).
Reply = Iterable[tuple[int, int]]
#: Asks the server about `length` bytes from `offset`.
Ask = Callable[[int, int], Reply]
#: An extent and the flags which the context gives it.
Status = tuple[Extent, int]

#: The context that tells what reads as zeroes.
ALLOCATION = "base:allocation"
#: base:allocation, bit 1: the range reads as zeroes. Bit 0 (a hole) alone promises nothing about
#: the content, so it is not looked at.
ZERO = 2
#: qemu:dirty-bitmap:…, bit 0: written since the bitmap began.
DIRTY = 1
#: Most bytes that one question covers: 32 bits on the wire without extended headers, and a
#: multiple of every block size.
MAX_QUESTION = 2**32 - 64 * 1024


def walk(ask: Ask, window: Extent, *, size: int, who: str, longest: int = MAX_QUESTION) -> Iterator[Status]:
    """The status of each byte of `window`: sorted, without gaps, neighbours differ in flags.

    `size` is that of the disk in bytes; a window beyond it is clipped. `longest`: bytes that one
    question may cover. Lazy: one reply is held at a time. Raises `BadReply` naming `who` if the
    server answers what the protocol forbids.
    """
    inside = between(window.start, min(window.end, size))
    return _joined(_clipped(ask, inside, longest, size, who))


def _clipped(ask: Ask, window: Extent, longest: int, size: int, who: str) -> Iterator[Status]:
    offset = asked = window.start
    while offset < window.end:
        for length, flags in ask(offset, min(window.end - offset, longest)):
            _check(offset, length, flags, size, who)
            if offset < window.end:
                yield between(offset, min(offset + length, window.end)), flags
            offset += length
        if offset == asked:
            raise errors.BadReply(who=who, problem=f"an empty block status at offset {offset}")
        asked = offset


def _check(offset: int, length: int, flags: int, size: int, who: str) -> None:
    if length <= 0 or offset + length > size or flags < 0:
        raise errors.BadReply(
            who=who, problem=f"block status {flags} for {length} bytes at offset {offset} of a disk of {size} bytes"
        )


def _joined(stream: Iterable[Status]) -> Iterator[Status]:
    last, kind = Extent(0, 0), 0
    for extent, flags in stream:
        if last.length and flags == kind:
            last = between(last.start, extent.end)
            continue
        if last.length:
            yield last, kind
        last, kind = extent, flags
    if last.length:
        yield last, kind


def mapped(stream: Iterable[Status]) -> Iterator[Mapped]:
    """The allocation that base:allocation tells: without gaps if `stream` has none, neighbours differ."""
    for extent, zero in _joined((extent, flags & ZERO) for extent, flags in stream):
        yield Mapped(extent.start, extent.length, bool(zero))


def dirty(stream: Iterable[Status]) -> Iterator[Extent]:
    """The changed ranges that a dirty-bitmap context tells; bits other than `DIRTY` are not looked at."""
    return merge(extent for extent, flags in stream if flags & DIRTY)
