"""Backing up a machine to a repository of either kind.

    plan ─▶ disks begun ─▶ freeze + checkpoint ─▶ copy and hash ─▶ let go of the snapshot
         ─▶ commit (durable, then visible) ─▶ keep the checkpoint ─▶ release the older one

Whatever fails before the commit is undone: no restore point, the checkpoint merged back, nothing
in QEMU. After the commit only the release can fail, and the next backup does it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pullback import errors, extents, repo, state, units
from pullback.endpoint import Endpoint
from pullback.engine import scratch
from pullback.engine.pause import uninterrupted
from pullback.extents import Extent
from pullback.flows import filling, increments, jobs, planning
from pullback.flows.opening import open_machine
from pullback.flows.planning import DiskPlan
from pullback.flows.repositories import Access, open_for, opened
from pullback.flows.threads import blocking, entered
from pullback.machine import Machine, Snapshot
from pullback.model import urls
from pullback.model.backups import Fleecing, Frozen, Level, Quiescing, SnapshotRequest
from pullback.model.description import FirmwareHeader
from pullback.model.points import Mode, Point, PointDisk
from pullback.model.tpm import TpmHeader
from pullback.progress import Cancel, Progress, Silent
from pullback.transfer import Piece, Zero, copy
from pullback.transfer.copier import Work
from pullback.transfer.file import FileEndpoint
from pullback.transfer.frozen import FrozenEndpoint
from pullback.version import __version__

#: The allocation and the changes of so many bytes are held in memory at a time.
WINDOW = 4 * units.GiB
#: Zeroes are stored as holes in units of this, the cluster of the repository's images.
GRAIN = 64 * units.KiB
#: Damaged things of a sort that are told one by one.
_DAMAGE_TOLD = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    machine: urls.Machine
    repository: urls.Repository
    access: Access = field(default_factory=Access)
    level: Level = Level.AUTO
    #: Targets to take; empty: all that take part by default.
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    #: The machine's name in the repository, instead of QEMU's own.
    name: str | None = None
    #: Directory for scratch images; None: the default one.
    scratch: Path | None = None
    fleecing: Fleecing | None = None
    #: Share this running NBD server of QEMU's.
    nbd_server: Path | None = None
    quiescing: Quiescing = field(default_factory=Quiescing)
    #: The user's words for the restore point.
    tags: tuple[str, ...] = ()
    #: Bytes a second at most: sent to a repository in restic's format, read for a `dir:` one. None: no limit.
    rate: int | None = None
    directories: state.Directories = field(default_factory=state.directories)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a backup did."""

    point: Point
    #: Seconds that the machine stood still.
    pause: float
    was_paused: bool
    #: File systems of the guest that were frozen for the instant, and for how many seconds.
    frozen: int
    frozen_seconds: float
    #: Seconds in all.
    seconds: float
    plans: tuple[DiskPlan, ...]
    #: Sentences that the user should read: reasons for whole reads, engines, leftovers.
    notes: tuple[str, ...]
    #: Targets of disks whose chain should have continued and did not.
    broken: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a backup would do (`--dry-run`)."""

    machine: str
    plans: tuple[DiskPlan, ...]
    #: Upper bound of the bytes to read, by target.
    expected: Mapping[str, int]
    left_out: Mapping[str, str]


async def preview(request: Request) -> Preview:
    """Decide everything and do nothing (what dead jobs left is removed, as by every command)."""
    async with _machine(request, "backup --dry-run") as machine:
        disks = await machine.disks()
        chosen = planning.select(disks, machine=machine.name, only=request.only, exclude=request.exclude)
        kept = await asyncio.to_thread(_kept, request, machine.name)
        plans = planning.plan(chosen, kept, request.level)
        return Preview(
            machine=machine.name,
            plans=plans,
            expected={plan.disk.target: _expected(plan) for plan in plans},
            left_out={disk.target: disk.left_out for disk in disks if disk.left_out and disk not in chosen},
        )


def _kept(request: Request, machine: str) -> planning.Kept:
    try:
        with opened(request.repository, request.access) as repository:
            return _of(repository, repository.listing(machine))
    except errors.NoRepository:
        if isinstance(request.repository, urls.DirectoryRepository):
            return planning.Kept()  # a backup would make it
        raise


def _of(repository: repo.Repository, listing: repo.Listing) -> planning.Kept:
    return planning.Kept(points=listing.points, owner=repository.id, longest=repository.longest_chain)


def _expected(plan: DiskPlan) -> int:
    if plan.whole:
        return plan.disk.size
    counted = sum(bitmap.count for bitmap in plan.disk.bitmaps if bitmap.name in plan.since)
    return min(counted, plan.disk.size)


def _machine(request: Request, command: str) -> contextlib.AbstractAsyncContextManager[Machine]:
    return open_machine(request.machine, request.directories, command=command, name=request.name)


async def backup(request: Request, progress: Progress | None = None) -> Report:
    """Make a restore point. Raises `PullbackError`s; then nothing was kept."""
    async with (
        open_for(request.repository, request.access, writing=True) as repository,
        _machine(request, f"backup to {repository.name}") as machine,
    ):
        return await back_up(request, repository, machine, progress)


async def back_up(
    request: Request, repository: repo.Repository, machine: Machine, progress: Progress | None = None
) -> Report:
    """The same for a repository and a machine that are open already."""
    begun = time.monotonic()
    await jobs.require_free(machine)
    limiter = repo.Limiter(request.rate) if request.rate else None
    hurry = partial(filling.hurry, repository)
    async with entered(_writing(repository, machine.name, limiter), hurry=hurry) as pending:
        work = _Backup(request, machine, repository, pending, progress or Silent(), begun)
        return await work.run()


@contextlib.contextmanager
def _writing(repository: repo.Repository, machine: str, limiter: repo.Limiter | None) -> Iterator[repo.Pending]:
    """A pending restore point of the machine; what is not committed when the block ends is undone."""
    with (
        repository.writer(machine, command="pullback backup", limiter=limiter) as writer,
        writer.begin() as pending,
    ):
        yield pending


class _Backup:
    """One backup on its way: the values that its steps share. Owned by the event loop's thread."""

    def __init__(
        self,
        request: Request,
        machine: Machine,
        repository: repo.Repository,
        pending: repo.Pending,
        progress: Progress,
        begun: float,
    ) -> None:
        self._request = request
        self._machine = machine
        self._repository = repository
        self._pending = pending
        self._progress = progress
        self._begun = begun
        self._cancel = Cancel()
        self._notes: list[str] = []

    async def run(self) -> Report:
        """All steps, in order."""
        plans = await self._plan()
        snapshot_request = self._snapshot_request(plans)
        async with self._machine.snapshot(snapshot_request) as snapshot:
            # At once: it is not frozen with the disks.
            firmware = await self._firmware(snapshot)
            tpm = await self._tpm(snapshot)
            disks = await self._copy_all(snapshot, plans, snapshot_request)
            await snapshot.close()
            await blocking(self._pending.upload, cancel=self._cancel)
            point = await uninterrupted(self._commit(snapshot, disks, firmware, tpm))
            await self._release(point)
        await blocking(partial(filling.tidy, self._repository), cancel=self._cancel)
        return self._report(point, snapshot, plans)

    # -- before ------------------------------------------------------------------------------

    async def _plan(self) -> tuple[DiskPlan, ...]:
        request, machine = self._request, self._machine
        chosen = planning.select(
            await machine.disks(), machine=machine.name, only=request.only, exclude=request.exclude
        )
        listing = await asyncio.to_thread(self._repository.listing, machine.name)
        await self._tell_damage(listing)
        plans = planning.plan(chosen, _of(self._repository, listing), request.level)
        plans = tuple(map(with_sight, plans))
        plans = tuple([await asyncio.to_thread(self._begin_disk, plan) for plan in plans])
        for plan in plans:
            if plan.wrecks:
                await machine.drop_bitmaps(plan.disk, plan.wrecks)
                self._note(f"{plan.disk.target}: removed {len(plan.wrecks)} worthless bitmap(s)")
            if plan.reason:
                self._note(f"{plan.disk.target}: {'read whole, because ' if plan.whole else ''}{plan.reason}")
        return plans

    async def _tell_damage(self, listing: repo.Listing) -> None:
        """What of the repository cannot be used."""
        strays = await asyncio.to_thread(self._repository.strays)
        damaged = [f"restore point {bad.id} is damaged: {bad.problem}" for bad in (*listing.damaged, *strays)]
        self._notes += _first_few(damaged, "restore points are damaged")
        for problem in _first_few(filling.problems(self._repository), "files of the repository cannot be used"):
            self._note(problem)

    def _begin_disk(self, plan: DiskPlan) -> DiskPlan:
        """The disk in the new point, an increment of its parent; an unusable parent means that it is read whole."""
        disk = plan.disk
        try:
            self._pending.create(disk.target, disk.size, parent=plan.parent)
        except (errors.VerificationFailed, errors.Unsupported) as error:
            if plan.parent is None:
                raise
            self._pending.create(disk.target, disk.size)
            return plan.read_whole(str(error).rstrip("."))
        lacked = filling.lacked(self._pending, disk.target)
        if lacked:
            again = f"{units.format_size(lacked)} that the repository has lost are read again"
            return replace(plan, reason="; ".join(filter(None, (plan.reason, again))))
        return plan

    def _note(self, sentence: str) -> None:
        self._notes.append(sentence)
        self._progress.note(sentence)

    def _snapshot_request(self, plans: Sequence[DiskPlan]) -> SnapshotRequest:
        name = planning.checkpoint_name(self._repository.id, datetime.now(UTC))
        return SnapshotRequest(
            job=secrets.token_hex(4),
            disks=tuple(plan.request(name) for plan in plans),
            scratch=self._request.scratch or self._request.directories.scratch,
            fleecing=self._request.fleecing,
            nbd_server=self._request.nbd_server,
            quiescing=self._request.quiescing,
        )

    # -- the data ----------------------------------------------------------------------------

    async def _copy_all(
        self, snapshot: Snapshot, plans: Sequence[DiskPlan], request: SnapshotRequest
    ) -> tuple[PointDisk, ...]:
        if snapshot.window.frozen_note:
            self._note(snapshot.window.frozen_note)
        watched = [frozen.disk for frozen in snapshot.disks]
        for frozen in snapshot.disks:
            if frozen.fleecing is Fleecing.CLASSIC:
                self._note(f"{frozen.disk.target}: classic engine, because {frozen.reason}")
        done = []
        for frozen, plan in zip(snapshot.disks, plans, strict=True):
            work = partial(self._copy, frozen, plan)
            # Only what is frozen while somebody writes takes scratch.
            watch = scratch.watch(request.scratch, watched) if frozen.fleecing is not None else None
            try:
                done.append(await blocking(work, cancel=self._cancel, beside=watch))
            except (errors.EndpointFailed, errors.EndpointTimeout) as error:
                raise await self._explain(error, frozen, request.job) from error
        return tuple(done)

    async def _explain(self, error: errors.PullbackError, frozen: Frozen, job: str) -> errors.PullbackError:
        """A failed read of the snapshot: is the machine gone, or the snapshot broken?"""
        if frozen.fleecing is None:
            return error  # neither can be: the image itself is read
        if not await self._machine.alive():
            return errors.MachineGone(machine=self._machine.name, reason=str(error).rstrip("."))
        if isinstance(error, errors.EndpointFailed) and _is_refused_read(error, frozen):
            reason = "an old block could not be copied to scratch in time (full, failing or too slow)"
            return errors.SnapshotBroken(target=frozen.disk.target, reason=reason)
        with contextlib.suppress(errors.PullbackError):
            if not await self._exported(job):
                error.add_note("Somebody else ended the export or the NBD server through which the disk was read.")
        return error

    async def _exported(self, job: str) -> bool:
        """Is what the disks are read through still there?"""
        exports = (await self._machine.facts())["exports"]
        return isinstance(exports, list) and any(job in str(export.get("id")) for export in exports)

    def _copy(self, frozen: Frozen, plan: DiskPlan) -> PointDisk:
        """One disk, in a thread."""
        target = frozen.disk.target
        with (
            FrozenEndpoint(frozen.export, name=_source_name(frozen), cancel=self._cancel) as source,
            filling.opened(self._pending, target, cancel=self._cancel) as filled,
        ):
            read = _Copying(source, filled, plan, frozen, self._progress, self._cancel).run()
        sealed = filled.seal()
        self._progress.finish(target)
        return self._point_disk(plan, frozen, sealed, read)

    def _point_disk(self, plan: DiskPlan, frozen: Frozen, sealed: repo.Sealed, read: int) -> PointDisk:
        disk = plan.disk
        return PointDisk(
            target=disk.target,
            qdev=disk.qdev or None,
            serial=disk.serial or None,
            source=disk.image or None,
            source_format=disk.format or None,
            size=disk.size,
            mode=Mode.FULL if plan.whole else Mode.INCREMENTAL,
            reason=plan.reason if plan.whole else None,
            parent=plan.parent,
            mark=frozen.checkpoint,
            block_size=sealed.block_size,
            digest=sealed.digest,
            stored=sealed.stored,
            read=read,
            files=sealed.files,
        )

    # -- after -------------------------------------------------------------------------------

    async def _firmware(self, snapshot: Snapshot) -> tuple[FirmwareHeader, ...]:
        """Keep the content of the firmware devices."""
        found, notes = await snapshot.firmware()
        for note in notes:
            self._note(note)
        for one in found:
            await asyncio.to_thread(self._pending.keep_firmware, one)
        return tuple(one.header for one in found)

    async def _tpm(self, snapshot: Snapshot) -> TpmHeader | None:
        """Keep the state of the TPM."""
        found, notes = await snapshot.tpm()
        for note in notes:
            self._note(note)
        if found is not None:
            await asyncio.to_thread(self._pending.keep_tpm, found)
        return found.header if found is not None else None

    async def _commit(
        self,
        snapshot: Snapshot,
        disks: tuple[PointDisk, ...],
        firmware: tuple[FirmwareHeader, ...],
        tpm: TpmHeader | None,
    ) -> Point:
        """The restore point becomes visible, and from then on its checkpoint is needed."""
        name = next((disk.mark.name for disk in disks if disk.mark), None)
        point = Point(
            id="",  # known once it is written
            machine=self._machine.name,
            created=snapshot.moment,
            level=self._request.level,
            pullback=__version__,
            qemu=self._machine.version.removeprefix("QEMU "),
            engine=", ".join(sorted({frozen.fleecing or "offline" for frozen in snapshot.disks})),
            pause=snapshot.window.seconds,
            checkpoint=name,
            disks=disks,
            notes=tuple(self._notes),
            host=socket.gethostname(),
            seconds=time.monotonic() - self._begun,
            tags=self._request.tags,
            description=await self._machine.describe(),
            firmware=firmware,
            tpm=tpm,
        )
        committed = await asyncio.to_thread(self._pending.commit, point)
        snapshot.keep()
        return committed

    async def _release(self, point: Point) -> None:
        """Merge away the checkpoints of this repository that no point needs any more."""
        marks = {disk.target: disk.mark for disk in point.disks}
        try:
            for disk in await self._machine.disks():
                # One that takes no checkpoint now (a read-only file) keeps those that it has.
                if disk.target in marks and disk.node is not None and disk.untrackable is None:
                    owned = planning.to_release(planning.chain_of(disk), self._repository.id, marks[disk.target])
                    await self._machine.delete_checkpoints(disk, owned)
        except (errors.RefusedError, errors.BusyError, errors.CheckpointsNotStored) as error:
            self._note(f"an older checkpoint stays for now: {error}")

    def _report(self, point: Point, snapshot: Snapshot, plans: tuple[DiskPlan, ...]) -> Report:
        return Report(
            point=point,
            pause=snapshot.window.seconds,
            was_paused=snapshot.window.was_paused,
            frozen=snapshot.window.frozen,
            frozen_seconds=snapshot.window.frozen_seconds,
            seconds=time.monotonic() - self._begun,
            plans=plans,
            notes=tuple(self._notes),
            broken=tuple(plan.disk.target for plan in plans if plan.broken),
        )


def _first_few(sentences: Sequence[str], what: str) -> Sequence[str]:
    """Some of many sentences, and how many more there are: a restore point has room for so many notes only."""
    more = len(sentences) - _DAMAGE_TOLD
    return sentences if more <= 0 else [*sentences[:_DAMAGE_TOLD], f"{more} more {what}"]


def with_sight(plan: DiskPlan) -> DiskPlan:
    """A raw disk that shrank and grew back shows only in the holes of its file: who cannot look reads it whole.

    QEMU may tell of data there still: it remembers what it saw before (7.2, its block status cache), and of
    a raw data file of a qcow2 it tells no holes at all. A block device and an NBD disk cannot be shrunk by
    their QEMU.
    """
    disk = plan.disk
    if plan.whole or disk.hole_file is None or disk.hole_file.startswith("nbd"):
        return plan
    path = Path(disk.hole_file)
    if path.is_block_device() or (path.is_file() and os.access(path, os.R_OK)):
        return plan
    return replace(plan, parent=None, since=(), reason="holes in its file cannot be looked at from here")


def _grains(holes: list[Extent], size: int) -> Iterator[Extent]:
    """The holes in whole grains; at the end of the disk also less.

    Other small ones come from small writes, and would be looked at each time for nothing.
    """
    for hole in holes:
        start = hole.start if hole.end == size else -(-hole.start // GRAIN) * GRAIN
        end = size if hole.end == size else hole.end // GRAIN * GRAIN
        if start < end:
            yield extents.between(start, end)


def _unnoticed(
    step: increments.Step, hidden: Iterator[Extent], window: Extent, *, block: int, size: int
) -> increments.Step:
    """Blocks with holes that only the file shows are read and compared too."""
    seen = extents.union(extents.union((item.read for item in step.blocks), step.zero_blocks), step.suspects)
    # A shrink may have cut into the grain right before.
    near = extents.merge(extents.between(max(window.start, hole.start - GRAIN), hole.end) for hole in hidden)
    looked = extents.align_out(near, block, size)
    more = tuple(extents.split(extents.subtract(looked, list(seen)), block))
    return replace(step, suspects=tuple(sorted((*step.suspects, *more))))


def _is_refused_read(error: errors.EndpointFailed, frozen: Frozen) -> bool:
    """A snapshot that broke answers everything so: EINVAL over NBD, EACCES through FUSE (tried, 7.2)."""
    source = error.endpoint.startswith(_source_name(frozen)) or error.endpoint == str(frozen.export.data)
    return source and error.errno in {errno.EINVAL, errno.EACCES}


def _source_name(frozen: Frozen) -> str:
    return f"the snapshot of {frozen.disk.target}"


def _passed(window: Extent, step: increments.Step) -> int:
    """Bytes of a window that the copier will not advance over."""
    return window.length - extents.total(step.zero) - sum(block.read.length for block in step.blocks)


class _Copying:
    """The copy of one disk. Its callbacks come from the copier's threads; the filling takes care of itself."""

    def __init__(
        self,
        source: FrozenEndpoint,
        filled: filling.Filling,
        plan: DiskPlan,
        frozen: Frozen,
        progress: Progress,
        cancel: Cancel,
    ) -> None:
        self._source = source
        self._filled = filled
        self._plan = plan
        self._block = filled.hashes.block_size
        self._unit = frozen.export.trim_unit
        self._progress = progress
        self._cancel = cancel
        self._suspects: list[Extent] = []
        self._trims = contextlib.ExitStack()
        self._trimmer = self._trims.enter_context(source.channel()) if self._unit else None
        #: Guards the trimmer, which the filling's threads may use even after the copy has ended.
        self._trimming = threading.Lock()
        self._over = self._trimmer is None

    def run(self) -> int:
        """Copy everything that is needed; gives the bytes read from the machine."""
        target, size = self._plan.disk.target, self._plan.disk.size
        self._progress.start(target, size)
        if self._trimmer:
            self._filled.when_durable(self._settled)
        with self._trims:
            self._trims.callback(self._end_trims)
            if self._plan.whole:
                self._source.expect_much()
            first = copy(
                self._source,
                self._filled.destination,
                self._work(),
                observe=self._filled.observe,
                settled=self._settled if self._trimmer else None,
                advance=partial(self._progress.advance, target),
                skip_zeroes=self._plan.whole,
                block=min(self._block, max(size, 1)),
                cancel=self._cancel,
            )
            looked = self._resolve_suspects()
            self._source.prove()
            return first.read + looked

    def _work(self) -> Iterator[Work]:
        for window in increments.windows(self._plan.disk.size, self._block, WINDOW):
            step = self._step(window)
            for zero_block in step.zero_blocks:
                self._filled.zeroed(zero_block)
            self._suspects += step.suspects
            self._release(window, step)
            # Progress is the way through the disk: what need not be read is passed at once.
            self._progress.advance(self._plan.disk.target, _passed(window, step))
            yield from (Zero(extent) for extent in step.zero)
            yield from (Piece(block.read, block.write) for block in step.blocks)

    def _step(self, window: Extent) -> increments.Step:
        size = self._plan.disk.size
        allocation = list(self._source.extents(window))
        if self._plan.whole:
            return increments.whole(extents.data(allocation), window, block=self._block, size=size)
        dirty = list(extents.union(self._source.dirty(window), self._filled.lacking(window)))
        parent_zero = list(self._filled.parent_zeroes(window))
        step = increments.increment(
            dirty,
            extents.zeroes(allocation),
            parent_zero,
            window,
            block=self._block,
            size=size,
            grain=min(self._plan.disk.cluster, GRAIN),
        )
        path = Path(self._plan.disk.hole_file or "")
        if not path.is_file():
            return step
        with FileEndpoint(path) as file:
            holes = list(extents.zeroes(file.extents(window)))
        hidden = extents.subtract(extents.subtract(_grains(holes, size), parent_zero), dirty)
        return _unnoticed(step, hidden, window, block=self._block, size=size)

    def _release(self, window: Extent, step: increments.Step) -> None:
        """What of the window will never be read need not be kept in scratch."""
        if self._trimmer is not None:
            needed = extents.union((block.read for block in step.blocks), step.suspects)
            self._trim(extents.subtract([window], needed))

    def _settled(self, ranges: Sequence[Extent]) -> None:
        """What is durable in the image need not be kept in scratch."""
        self._trim(ranges)

    def _trim(self, ranges: Iterator[Extent] | Sequence[Extent]) -> None:
        assert self._trimmer is not None
        assert self._unit is not None
        spared = extents.subtract(ranges, [self._source.spared])
        with self._trimming:
            for extent in () if self._over else extents.align_in(spared, self._unit):
                self._trimmer.trim(extent.start, extent.length)

    def _end_trims(self) -> None:
        with self._trimming:
            self._over = True

    def _resolve_suspects(self) -> int:
        """Blocks with holes that no bitmap accounts for: those that really differ from the parent are stored."""
        if not self._suspects:
            return 0
        hashes = self._filled.hashes
        before = [hashes.entry(block.start // self._block) for block in self._suspects]
        looked = self._again(None, [Piece(block, ()) for block in self._suspects])
        if self._filled.destination is None:
            return looked  # what differs was stored when it was read
        changed = [
            Piece(block, (block,))
            for block, entry in zip(self._suspects, before, strict=True)
            if hashes.entry(block.start // self._block) != entry
        ]
        return looked + self._again(self._filled.destination, changed)

    def _again(self, destination: Endpoint | None, pieces: Sequence[Piece]) -> int:
        observe = self._filled.observe
        result = copy(self._source, destination, pieces, observe=observe, block=self._block, cancel=self._cancel)
        return result.read
