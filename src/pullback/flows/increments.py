"""What of a disk is read and what is written, block by block. Pure.

A block (1 MiB by default) is the unit of reading and hashing; what is written are the exact ranges
inside it. `dirty`, `zero` and `parent_zero` are streams of extents of one window of the disk,
which begins at a multiple of the block size:

    dirty         what the bitmaps say was written, zeroed or discarded since the parent
    zero          what reads as zeroes in the frozen disk, known without reading
    parent_zero   what reads as zeroes in the parent
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pullback import extents
from pullback.extents import Extent, between


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block to be read whole, and the ranges of it to be stored (none: it is only looked at)."""

    read: Extent
    write: tuple[Extent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The work on one window."""

    #: Blocks with data to be read.
    blocks: tuple[Block, ...]
    #: Ranges that changed and are zero now: zeroed in the image without reading.
    zero: tuple[Extent, ...]
    #: Blocks known to be all zero now, of which something changed.
    zero_blocks: tuple[Extent, ...]
    #: Other blocks in or right before which the frozen disk has holes that no bitmap accounts for, where
    #: the parent had data (a disk shrunk and grown back): read, compared with the parent's hash, and
    #: stored if it differs.
    suspects: tuple[Extent, ...] = ()


def windows(size: int, block: int, length: int) -> Iterator[Extent]:
    """The disk in windows of about `length` bytes, cut at multiples of `block`."""
    step = max(block, length // block * block)
    yield from extents.split([Extent(0, size)] if size else [], step)


def whole(data: Iterable[Extent], window: Extent, *, block: int, size: int) -> Step:
    """A whole read: every block with data; the others are zero (and stay holes in the image)."""
    blocks = tuple(_group(data, block, size))
    untouched = extents.subtract([window], (item.read for item in blocks))
    return Step(blocks=blocks, zero=(), zero_blocks=tuple(untouched))


def increment(
    dirty: Iterable[Extent],
    zero: Iterable[Extent],
    parent_zero: Iterable[Extent],
    window: Extent,
    *,
    block: int,
    size: int,
    grain: int,
) -> Step:
    """An increment of one window.

    A hole that no bitmap accounts for is looked for in whole units of `grain`, the image's cluster:
    smaller ones come from small writes into new clusters (the rest of the cluster is a hole of the
    file), and would make their blocks be read in every increment for nothing.
    """
    dirty, zero = list(dirty), list(zero)
    zero_blocks = list(whole_blocks(zero, block, size))
    holes = whole_blocks(zero, grain, size)
    hidden = list(extents.subtract(extents.subtract(holes, parent_zero), dirty))
    # A block that is all zero now needs no look: whatever differs in it becomes zero in the image.
    unread = list(extents.intersect(extents.union(dirty, hidden), zero_blocks))
    reads = list(extents.subtract(dirty, zero_blocks))
    read_blocks = list(extents.align_out(reads, block, size))
    # A disk that grows over a backing file has the rest of its last cluster zeroed by a write that no
    # bitmap sees: what lies right before a hidden hole is looked at too.
    near = [between(max(window.start, extent.start - grain), extent.end) for extent in hidden]
    looked = list(extents.align_out(near, block, size))
    # In a block that is read anyway all of it is simply stored again.
    along = extents.intersect(looked, read_blocks)
    alone = extents.subtract(extents.subtract(looked, read_blocks), zero_blocks)
    return Step(
        blocks=tuple(_group(extents.union(reads, along), block, size)),
        zero=tuple(unread),
        zero_blocks=tuple(extents.align_out(unread, block, size)),
        suspects=tuple(extents.split(alone, block)),
    )


def _group(stream: Iterable[Extent], block: int, size: int) -> Iterator[Block]:
    """Ranges gathered by the block they lie in."""
    index, gathered = -1, list[Extent]()
    for extent in extents.split(stream, block):
        if extent.start // block != index:
            if gathered:
                yield _block(index, gathered, block, size)
            index, gathered = extent.start // block, []
        gathered.append(extent)
    if gathered:
        yield _block(index, gathered, block, size)


def _block(index: int, gathered: list[Extent], block: int, size: int) -> Block:
    read = between(index * block, min((index + 1) * block, size))
    return Block(read=read, write=tuple(extents.merge(gathered)))


def whole_blocks(stream: Iterable[Extent], block: int, size: int) -> Iterator[Extent]:
    """What of each extent is whole blocks; the disk's last block may be short."""
    for extent in stream:
        start = -(-extent.start // block) * block
        end = size if extent.end == size else extent.end // block * block
        if start < end:
            yield between(start, end)
