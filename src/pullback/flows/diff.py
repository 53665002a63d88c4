"""What differs between two restore points, disk by disk.

Chunks with the same hash are the same. Of chunks that differ, both are read to tell the ranges
that really do, unless `quick` is asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from pullback import errors, extents, repo
from pullback.endpoint import Endpoint
from pullback.extents import Extent, between
from pullback.flows import reading
from pullback.flows.repositories import Access, cancel_for, open_for
from pullback.flows.threads import blocking
from pullback.model import urls
from pullback.model.points import Point, PointDisk
from pullback.progress import Cancel, Progress, Silent
from pullback.units import KiB

#: Bytes of the finest range that is told.
GRAIN = 4 * KiB
#: Ranges of one disk that are told.
MAX_RANGES = 100_000
_WORKERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.Repository
    access: Access = field(default_factory=Access)
    old: str
    new: str = "latest"
    machine: str | None = None
    only: tuple[str, ...] = ()
    #: By hashes alone: whole chunks.
    quick: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskDiff:
    """What differs of a disk. Sizes in bytes."""

    target: str
    #: None: it is not in the old point, or not in the new one.
    old_size: int | None
    new_size: int | None
    #: In ranges that differ, of the part that both have.
    changed: int = 0
    #: Sorted, merged; at most `MAX_RANGES`.
    ranges: tuple[Extent, ...] = ()
    #: Ranges beyond those.
    more: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What differs."""

    old: Point
    new: Point
    disks: tuple[DiskDiff, ...]
    #: Bytes that ranges are made of.
    grain: int
    seconds: float


async def diff(request: Request, progress: Progress | None = None) -> Report:
    """Compare two points. Raises `UnknownPoint`, `UnknownDisk`, `VerificationFailed`."""
    begun = time.monotonic()
    async with open_for(request.repository, request.access) as repository:
        find = partial(repository.find, machine=request.machine)
        old = await asyncio.to_thread(find, request.old)
        new = await asyncio.to_thread(partial(repository.find, machine=old.machine), request.new)
        cancel = cancel_for(repository)
        work = partial(_diff, repository, (old, new), request, progress or Silent(), cancel)
        disks = await blocking(work, cancel=cancel)
    # Of a quick comparison the chunk is the grain; disks of one point may have chunks of several sizes.
    grain = max(disk.block_size for disk in (*old.disks, *new.disks)) if request.quick else GRAIN
    return Report(old=old, new=new, disks=disks, grain=grain, seconds=time.monotonic() - begun)


def _diff(
    repository: repo.Repository, points: tuple[Point, Point], request: Request, progress: Progress, cancel: Cancel
) -> tuple[DiskDiff, ...]:
    old, new = ({disk.target: disk for disk in point.disks} for point in points)
    targets = sorted(old.keys() | new.keys())
    if request.only:
        for target in request.only:
            if target not in targets:
                raise errors.UnknownDisk(target=target, where="either point", known=", ".join(targets))
        targets = [target for target in targets if target in request.only]
    with repository.reading(points[0]), repository.reading(points[1]):
        work = _Work(repository, points, progress, cancel, quick=request.quick)
        return tuple(work.disk(target, old.get(target), new.get(target)) for target in targets)


class _Work:
    """The comparison of two points."""

    def __init__(
        self,
        repository: repo.Repository,
        points: tuple[Point, Point],
        progress: Progress,
        cancel: Cancel,
        *,
        quick: bool,
    ) -> None:
        self._repository = repository
        self._points = points
        self._progress = progress
        self._cancel = cancel
        self._quick = quick

    def disk(self, target: str, old: PointDisk | None, new: PointDisk | None) -> DiskDiff:
        """One disk."""
        sizes = (old.size if old else None, new.size if new else None)
        if old is None or new is None:
            return DiskDiff(target=target, old_size=sizes[0], new_size=sizes[1])
        if old.size == new.size and old.block_size == new.block_size and old.digest == new.digest:
            return DiskDiff(target=target, old_size=sizes[0], new_size=sizes[1])
        chunks = self._chunks(old, new)
        self._progress.start(target, extents.total(chunks))
        ranges = extents.merge(chunks) if self._quick else extents.merge(self._finer(target, chunks))
        kept: list[Extent] = []
        total = more = 0
        for extent in ranges:
            total += extent.length
            if len(kept) < MAX_RANGES:
                kept.append(extent)
            else:
                more += 1
        self._progress.finish(target)
        return DiskDiff(
            target=target, old_size=sizes[0], new_size=sizes[1], changed=total, ranges=tuple(kept), more=more
        )

    def _chunks(self, old: PointDisk, new: PointDisk) -> list[Extent]:
        """Chunks of the part that both disks have, whose hashes differ (or cannot be compared)."""
        common = min(old.size, new.size)
        if old.block_size != new.block_size:
            return list(extents.split([Extent(0, common)], max(old.block_size, new.block_size)))
        before = self._repository.hashes(self._points[0], old.target)
        after = self._repository.hashes(self._points[1], new.target)
        found = []
        for index in before.touched(Extent(0, common)):
            # The last chunk of one disk may be longer than that of the other: their hashes tell nothing then.
            if before.block(index) != after.block(index) or before.entry(index) != after.entry(index):
                block = before.block(index)
                found.append(between(block.start, min(block.end, common)))
        return found

    def _finer(self, target: str, chunks: list[Extent]) -> Iterator[Extent]:
        """The ranges in these chunks that really differ, in order."""
        with ExitStack() as stack:
            ends = [
                stack.enter_context(reading.opened(self._repository, point, target, cancel=self._cancel))
                for point in self._points
            ]
            channels = min(_WORKERS, *(end.channels for end in ends))
            pool = stack.enter_context(ThreadPoolExecutor(channels, thread_name_prefix="diff"))
            for chunk, found in _in_order(pool, partial(self._compare, ends), chunks, ahead=2 * channels):
                self._cancel.check()
                self._progress.advance(target, chunk.length)
                yield from found

    def _compare(self, ends: list[Endpoint], chunk: Extent) -> list[Extent]:
        buffers = []
        for point, end in zip(self._points, ends, strict=True):
            buffer = bytearray(chunk.length)
            with _judging(point), end.channel() as channel:
                channel.read_into(chunk.start, buffer, chunk.length)
            buffers.append(buffer)
        return list(extents.merge(_differing(buffers[0], buffers[1], chunk.start)))


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Extent], list[Extent]], chunks: Iterable[Extent], *, ahead: int
) -> Iterator[tuple[Extent, list[Extent]]]:
    """Each chunk with what `work` makes of it, in order, with at most `ahead` of them begun."""
    begun: deque[tuple[Extent, Future[list[Extent]]]] = deque()
    for chunk in chunks:
        begun.append((chunk, pool.submit(work, chunk)))
        if len(begun) > ahead:
            done, future = begun.popleft()
            yield done, future.result()
    for done, future in begun:
        yield done, future.result()


def _differing(old: bytearray, new: bytearray, start: int) -> Iterator[Extent]:
    with memoryview(old) as before, memoryview(new) as after:
        for at in range(0, len(old), GRAIN):
            if before[at : at + GRAIN] != after[at : at + GRAIN]:
                yield between(start + at, start + min(at + GRAIN, len(old)))


@contextmanager
def _judging(point: Point) -> Iterator[None]:
    try:
        yield
    except errors.EndpointFailed as error:
        problem = f"it cannot be read at offset {error.offset} ({error.reason})"
        raise errors.VerificationFailed(point=point.id, problem=problem) from error
