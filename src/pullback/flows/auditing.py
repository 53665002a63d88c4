"""Is the hypervisor telling the truth? Blocks that it calls unchanged are read and compared.

The machine is frozen as for a backup, but no checkpoint is made. What its bitmaps do not name since a
restore point must still have the hashes that the restore point has; what differs was changed without
a trace, and an increment would have missed it.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pullback import errors, extents, repo, state
from pullback.endpoint import Endpoint
from pullback.engine import scratch
from pullback.extents import Extent
from pullback.flows import increments, jobs, planning, reading
from pullback.flows.opening import open_machine
from pullback.flows.planning import DiskPlan
from pullback.flows.repositories import Access, cancel_for, open_for
from pullback.flows.threads import blocking
from pullback.machine import Machine, Snapshot
from pullback.model import urls
from pullback.model.backups import DiskRequest, Frozen, Level, SnapshotRequest
from pullback.model.points import Point
from pullback.progress import Progress, Silent
from pullback.transfer import FileEndpoint, Piece, copy
from pullback.transfer.frozen import FrozenEndpoint
from pullback.units import GiB, KiB

#: The changes of so many bytes are held in memory at a time.
_WINDOW = 4 * GiB
#: Holes are looked at in units of this, as a backup does.
_GRAIN = 64 * KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    machine: urls.Machine
    repository: urls.Repository
    access: Access = field(default_factory=Access)
    #: `latest` is, for each disk, the last point of which the disk has the checkpoint.
    point: str = "latest"
    only: tuple[str, ...] = ()
    #: Compare only a random part: `5%`, `10G`, or a number of blocks.
    sample: str | None = None
    #: The machine's name in the repository, instead of QEMU's own.
    name: str | None = None
    scratch: Path | None = None
    directories: state.Directories = field(default_factory=state.directories)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What was found about a disk. Sizes in bytes."""

    target: str
    size: int
    #: The restore point that it was compared with; None: with none.
    point: str | None = None
    #: Why it was not compared.
    reason: str | None = None
    #: In blocks that tracking says have changed.
    changed: int = 0
    #: In blocks that were compared.
    compared: int = 0
    #: Of those: in blocks that differ.
    differing: int = 0
    #: In blocks that differ, in which holes were made: a backup looks at these whatever tracking says.
    noticed: int = 0
    #: Where it differs, merged; at most `repo.MAX_RANGES`.
    ranges: tuple[Extent, ...] = ()
    #: Ranges beyond those.
    more: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found about a machine."""

    machine: str
    disks: tuple[Compared, ...]
    seconds: float

    @property
    def lies(self) -> bool:
        """Did anything change without a trace?"""
        return any(disk.differing for disk in self.disks)


async def audit(request: Request, progress: Progress | None = None) -> Report:
    """Compare a machine with a restore point of it. The machine is left as it was.

    Raises `Unsupported` if no disk has the checkpoint of a restore point, and as a backup does.
    """
    begun = time.monotonic()
    sample = repo.Sample.parse(request.sample) if request.sample is not None else None
    async with (
        open_for(request.repository, request.access) as repository,
        open_machine(
            request.machine, request.directories, command=f"verify --against {repository.name}", name=request.name
        ) as machine,
    ):
        await jobs.require_free(machine)
        plans = await _plan(request, repository, machine)
        comparing = [plan for plan in plans if plan.parent is not None]
        if not comparing:
            reasons = "; ".join(f"{plan.disk.target}: {plan.reason}" for plan in plans)
            raise errors.Unsupported(
                what=f"comparing {machine.name}", reason=reasons, way_out="Make a backup to this repository first."
            )
        asked = _snapshot_request(request, comparing)
        work = _Audit(repository, machine.name, sample, progress or Silent())
        async with machine.snapshot(asked) as snapshot:
            found = await work.run(snapshot, comparing, asked)
        rest = [_left_out(plan) for plan in plans if plan.parent is None]
        return Report(machine=machine.name, disks=(*found, *rest), seconds=time.monotonic() - begun)


async def _plan(request: Request, repository: repo.Repository, machine: Machine) -> tuple[DiskPlan, ...]:
    """What each disk is compared with: what an increment would build upon."""
    if request.point == "latest":
        points = (await asyncio.to_thread(repository.listing, machine.name)).points
    else:
        points = (await asyncio.to_thread(partial(repository.find, request.point, machine=machine.name)),)
    chosen = planning.select(await machine.disks(), machine=machine.name, only=request.only, exclude=())
    return planning.plan(chosen, planning.Kept(points=points, owner=repository.id), Level.AUTO)


def _left_out(plan: DiskPlan) -> Compared:
    return Compared(target=plan.disk.target, size=plan.disk.size, reason=plan.reason)


def _snapshot_request(request: Request, plans: Sequence[DiskPlan]) -> SnapshotRequest:
    return SnapshotRequest(
        job=secrets.token_hex(4),
        disks=tuple(DiskRequest(disk=plan.disk, since=plan.since) for plan in plans),
        scratch=request.scratch or request.directories.scratch,
    )


class _Audit:
    """One run: what its steps share."""

    def __init__(
        self, repository: repo.Repository, machine: str, sample: repo.Sample | None, progress: Progress
    ) -> None:
        self._repository = repository
        self._machine = machine
        self._sample = sample
        self._progress = progress
        self._cancel = cancel_for(repository)

    async def run(
        self, snapshot: Snapshot, plans: Sequence[DiskPlan], request: SnapshotRequest
    ) -> tuple[Compared, ...]:
        """All disks of the snapshot, in order."""
        watched = [frozen.disk for frozen in snapshot.disks]
        done = []
        for frozen, plan in zip(snapshot.disks, plans, strict=True):
            watch = scratch.watch(request.scratch, watched) if frozen.fleecing is not None else None
            work = partial(self._disk, frozen, plan)
            done.append(await blocking(work, cancel=self._cancel, beside=watch))
        return tuple(done)

    def _disk(self, frozen: Frozen, plan: DiskPlan) -> Compared:
        """One disk, in a thread."""
        assert plan.parent is not None
        point = self._repository.point(self._machine, plan.parent.point)
        hashes = self._repository.hashes(point, plan.parent.target)
        target = plan.disk.target
        self._progress.start(target, plan.disk.size)
        with closing(FrozenEndpoint(frozen.export, name=f"the snapshot of {target}", cancel=self._cancel)) as source:
            comparison = _Comparison(source, hashes, _Chance(self._sample, hashes))
            copy(
                source,
                None,
                comparison.work(partial(self._progress.advance, target)),
                observe=comparison.look,
                advance=partial(self._progress.advance, target),
                block=min(hashes.block_size, hashes.size),
                cancel=self._cancel,
            )
            source.prove()
            noticed = self._noticed(source, point, plan, comparison.differing())
        self._progress.finish(target)
        ranges = list(extents.merge(extents.subtract(comparison.differing(), noticed)))
        return Compared(
            target=target,
            size=plan.disk.size,
            point=point.id,
            changed=comparison.changed,
            compared=comparison.compared,
            differing=extents.total(ranges),
            noticed=extents.total(noticed),
            ranges=tuple(ranges[: repo.MAX_RANGES]),
            more=max(0, len(ranges) - repo.MAX_RANGES),
        )

    def _noticed(
        self, source: FrozenEndpoint, point: Point, plan: DiskPlan, differing: Sequence[Extent]
    ) -> list[Extent]:
        assert plan.parent is not None
        if not differing:
            return []
        with reading.opened(self._repository, point, plan.parent.target, cancel=self._cancel) as before:
            eye = _Eye(source, before, plan)
            return [block for block in differing if eye.notices(block)]


class _Chance:
    """Whether a block is compared."""

    def __init__(self, sample: repo.Sample | None, hashes: repo.HashList) -> None:
        self._random = random.SystemRandom()
        self._part = 1.0
        if sample is not None and sample.percent is not None:
            self._part = sample.percent / 100
        elif sample is not None:
            wanted = sample.packs if sample.packs is not None else (sample.size or 0) / hashes.block_size
            self._part = max(1, wanted) / hashes.count

    def takes(self) -> bool:
        """The next one?"""
        return self._part >= 1 or self._random.random() < self._part


class _Comparison:
    """The blocks of one disk. `look` is called by several threads."""

    def __init__(self, source: FrozenEndpoint, hashes: repo.HashList, chance: _Chance) -> None:
        self._source = source
        self._hashes = hashes
        self._chance = chance
        self._lock = threading.Lock()
        self._differing: list[Extent] = []
        self.changed = 0
        self.compared = 0

    def work(self, passed: partial[None]) -> Iterator[Piece]:
        """The blocks that tracking calls unchanged; `passed` hears of bytes that need no reading."""
        size, block = self._hashes.size, self._hashes.block_size
        for window in increments.windows(size, block, _WINDOW):
            dirty = list(extents.align_out(self._source.dirty(window), block, size))
            changed = extents.total(dirty)
            self.changed += changed
            passed(changed)
            holes = extents.zeroes(self._source.extents(window))
            zero = set(extents.split(increments.whole_blocks(holes, block, size), block))
            for extent in extents.split(extents.subtract([window], dirty), block):
                if not self._chance.takes():
                    passed(extent.length)
                    continue
                self.compared += extent.length
                if extent in zero and self._hashes.entry(extent.start // block) == repo.zero_hash(extent.length):
                    passed(extent.length)
                else:
                    yield Piece(extent, ())

    def look(self, offset: int, buffer: bytearray, length: int) -> None:
        """A block was read."""
        with memoryview(buffer) as view:
            same = self._hashes.matches(offset // self._hashes.block_size, view[:length])
        if not same:
            with self._lock:
                self._differing.append(Extent(offset, length))

    def differing(self) -> list[Extent]:
        """Blocks that are not what they were, in order."""
        return sorted(self._differing)


class _Eye:
    """Looks closely at blocks that differ; for one thread.

    A disk that shrank and grew back shows only in its holes: no bitmap tells of that, and none need to,
    because a backup looks at new holes by itself.
    """

    def __init__(self, source: FrozenEndpoint, before: Endpoint, plan: DiskPlan) -> None:
        self._source = source
        self._before = before
        path = Path(plan.disk.hole_file or "")
        self._file = path if path.is_file() else None

    def notices(self, block: Extent) -> bool:
        """Is all that differs in the block a new hole?"""
        now, then = bytearray(block.length), bytearray(block.length)
        with self._source.channel() as here, self._before.channel() as there:
            here.read_into(block.start, now, block.length)
            there.read_into(block.start, then, block.length)
        grains = list(extents.split([block], _GRAIN))
        at = {grain: slice(grain.start - block.start, grain.end - block.start) for grain in grains}
        differing = [grain for grain in grains if now[at[grain]] != then[at[grain]]]
        holes = extents.intersect(grains, list(self._holes(block)))
        fresh = [hole for hole in holes if hole in at and any(then[at[hole]])]
        # A shrink may have cut into the grain right before a hole.
        near = extents.merge(extents.between(max(0, hole.start - _GRAIN), hole.end) for hole in fresh)
        return not extents.total(extents.subtract(differing, list(near)))

    def _holes(self, block: Extent) -> Iterator[Extent]:
        found = list(extents.zeroes(self._source.extents(block)))
        if self._file is not None:
            with FileEndpoint(self._file) as file:
                found = list(extents.union(found, list(extents.zeroes(file.extents(block)))))
        return increments.whole_blocks(found, _GRAIN, self._source.size)
