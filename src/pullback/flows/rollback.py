"""Rolling a machine's own disks back to a restore point, where they are.

    point found, disks compared by name and size ─▶ safety point (a backup like any other)
      ─▶ what differs by hashes is staged locally, while the machine runs
      ─▶ machine stopped and reset, disks out of its reach ─▶ what was written since: found, staged
      ─▶ journal: "writing" ─▶ written, flushed, read back ─▶ journal: "written"
      ─▶ disks given back ─▶ the machine runs, is held, or ends

Up to "writing" whatever fails is undone, and a machine that ran runs again, from its beginning. From then on
only the same command may touch the disks; what is staged is all that it needs to finish.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pullback import errors, repo, state
from pullback.engine.graph import OURS
from pullback.flows import backup as backup_flow
from pullback.flows import increments, jobs, planning, rollbackplan, staging, writingback
from pullback.flows.backup import WINDOW
from pullback.flows.opening import open_machine
from pullback.flows.repositories import Access, cancel_for, open_for
from pullback.flows.repositories import reading as reading_of
from pullback.flows.rollbackplan import Plan
from pullback.flows.threads import blocking
from pullback.flows.writingback import DiskReport
from pullback.machine import Held, Machine
from pullback.model import rollbacks as values
from pullback.model import urls
from pullback.model.backups import Level
from pullback.model.disks import Disk
from pullback.model.points import Point
from pullback.model.rollbacks import After, HoldDisk, HoldRequest, Journal, JournalDisk, Phase
from pullback.model.tracking import ChangeMap, Union
from pullback.progress import Cancel, Progress, Silent
from pullback.state import rollbacks
from pullback.transfer import NbdEndpoint
from pullback.units import MiB

_LATEST = "latest"
#: If more than this was written since the newest point, it is staged before the machine is stopped too.
_STAGE_AHEAD = 128 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    machine: urls.Machine
    repository: urls.Repository
    access: Access = field(default_factory=Access)
    #: An id, the start of one, `latest` (the newest that was not made right before a rollback), or a date.
    point: str = _LATEST
    #: Targets; empty: all disks of the machine, which must be those of the point.
    only: tuple[str, ...] = ()
    #: The machine's name in the repository, instead of QEMU's own.
    name: str | None = None
    #: What becomes of the machine; None: it runs if it ran.
    after: After | None = None
    #: Make a restore point first.
    safety: bool = True
    #: Directory for what is to be written; None: the state directory.
    staging: Path | None = None
    #: Directory for scratch images of the safety point.
    scratch: Path | None = None
    #: Bytes a second at most, of what is fetched, and of what is written; None: no limit.
    rate: int | None = None
    directories: state.Directories = field(default_factory=state.directories)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rollback did."""

    machine: str
    #: Id of the restore point.
    point: str
    #: When that was made; None if its repository was not asked (a rollback that was finished).
    created: datetime | None
    #: The restore point that was made first.
    safety: Point | None
    #: It had been interrupted, and was finished now.
    finished: bool
    after: After
    disks: tuple[DiskReport, ...]
    #: Seconds from the stop to the end.
    down: float
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPreview:
    """What would be written to a disk. Sizes in bytes."""

    target: str
    size: int
    by_bitmaps: bool
    reason: str | None
    #: In chunks that would be written, at most.
    bytes: int
    #: Of those: in chunks that were written since the newest restore point; they may be as they shall be.
    since: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a rollback would do (`--dry-run`)."""

    machine: str
    point: Point
    disks: tuple[DiskPreview, ...]


async def rollback(request: Request, progress: Progress | None = None) -> Report:
    """Roll back, or finish what was interrupted.

    Raises `DisksDiffer`, `StagingSpace`, `Unsupported`, `BusyError`, and what a backup and a restore do, with the
    disks as they were; `RollbackUnfinished` when they are not; `RollbackPending` if another one must be finished.
    """
    begun = time.monotonic()
    progress = progress or Silent()
    async with _opened(request, f"rollback to {request.point}") as machine:
        journal = machine.interrupted
        if journal is not None and _is_meant(journal, request, machine):
            return await _finish(request, machine, journal, progress, begun)
        async with open_for(request.repository, request.access) as repository:
            return await _Rollback(request, machine, repository, progress, begun).run()


async def preview(request: Request) -> Preview:
    """Decide everything and do nothing. Of a rollback that was interrupted, `RollbackPending` is raised."""
    async with (
        open_machine(request.machine, request.directories, command="rollback --dry-run", name=request.name) as machine,
        open_for(request.repository, request.access) as repository,
    ):
        work = _Rollback(request, machine, repository, Silent(), time.monotonic())
        return await work.preview()


@asynccontextmanager
async def _opened(request: Request, command: str) -> AsyncIterator[Machine]:
    async with open_machine(
        request.machine, request.directories, command=command, name=request.name, finishing=True
    ) as machine:
        yield machine


async def abandon(request: Request) -> Journal:
    """Forget a rollback that was interrupted; its disks stay as they are. Raises `UsageError` if there is none."""
    async with _opened(request, "rollback --abandon") as machine:
        journal = machine.interrupted
        if journal is None or journal.phase is not Phase.WRITING:
            raise errors.UsageError(problem=f"No rollback of {machine.name} was interrupted")
        held = f"{OURS}{journal.job}-hold"
        if any(disk.root is not None and disk.root.startswith(held) for disk in await machine.disks()):
            raise errors.Unsupported(
                what="forgetting the rollback",
                reason="this QEMU still has the disks, and would run on them",
                way_out=f"End it first (`quit` on its monitor). Or finish: {journal.command}",
            )
        await asyncio.to_thread(rollbacks.remove, request.directories.state, journal)
        return journal


def _is_meant(journal: Journal, request: Request, machine: Machine) -> bool:
    """Is it the rollback that is asked for? Then it is finished, or was just now, when the machine was opened."""
    meant = request.point == journal.asked or journal.point.startswith(request.point.lower())
    if journal.phase is not Phase.WRITING:  # if it was through before that, the guest may have written since
        return meant and journal.job in machine.cleared
    if not meant:
        raise rollbacks.pending(journal)
    return True


def command_for(machine: urls.Machine, name: str | None, point: str, repository: urls.Repository) -> str:
    """The command that finishes a rollback."""
    if isinstance(machine, urls.QmpMachine):
        what = f"qmp:{machine.socket}"
    else:
        images = (
            f"{image.target}={f'{image.format}:' if image.format else ''}{str(image.path).replace(',', ',,')}"
            for image in machine.images
        )
        what = f"images:{','.join(images)}"
    named = f" --name {name}" if name else ""
    return f"pullback rollback {what}{named} {point[:12] if len(point) == 64 else point} -r {repository.url}"


class _Rollback:
    """One rollback on its way: what its steps share."""

    def __init__(
        self, request: Request, machine: Machine, repository: repo.Repository, progress: Progress, begun: float
    ) -> None:
        self._request = request
        self._machine = machine
        self._repository = repository
        self._progress = progress
        self._begun = begun
        self._notes: list[str] = []
        self._job = secrets.token_hex(4)
        self._cancel = cancel_for(repository)
        limiter = repo.Limiter(request.rate) if request.rate else None
        self._pace = staging.Report(progress=progress, cancel=self._cancel, limiter=limiter)

    async def run(self) -> Report:
        """All steps, in order."""
        point, plans = await self._decide()
        await self._machine.require_holdable(self._hold_request(plans))
        safety = await self._make_safe(plans) if self._request.safety else None
        if safety is not None:
            plans = await self._plan(point)
        newest = [plan.newest for plan in plans if plan.newest is not None]
        base = self._request.directories.state
        async with reading_of(self._repository, *{one.id: one for one in (point, *newest)}.values()):
            with rollbacks.living(base, self._job) as place:
                journal = self._journal(point, plans, place)
                try:
                    report = await self._staged(journal, point, plans)
                finally:
                    if not rollbacks.is_writing(base, self._job):
                        rollbacks.remove(base, journal)
        return Report(
            machine=self._machine.name,
            point=point.id,
            created=point.created,
            safety=safety,
            finished=False,
            after=report.after,
            disks=report.disks,
            down=report.down,
            seconds=time.monotonic() - self._begun,
            notes=tuple(self._notes),
        )

    def _note(self, sentence: str) -> None:
        self._notes.append(sentence)
        self._progress.note(sentence)

    # -- deciding ----------------------------------------------------------------------------

    async def _decide(self) -> tuple[Point, tuple[Plan, ...]]:
        await _require_free(self._machine)
        point = await asyncio.to_thread(_find, self._repository, self._request.point, self._machine.name)
        return point, await self._plan(point)

    async def _plan(self, point: Point) -> tuple[Plan, ...]:
        name = self._machine.name
        chosen = rollbackplan.choose(await self._machine.disks(), point, machine=name, only=self._request.only)
        listing = await asyncio.to_thread(self._repository.listing, name)
        kept = planning.Kept(points=listing.points, owner=self._repository.id)
        increments = [backup_flow.with_sight(one) for one in planning.plan(chosen, kept, Level.AUTO)]
        return rollbackplan.plan(increments, point, kept, machine=name)

    def _hold_request(self, plans: Sequence[Plan]) -> HoldRequest:
        wanted = tuple(HoldDisk(disk=plan.disk, since=plan.since) for plan in plans)
        return HoldRequest(job=self._job, disks=wanted, after=self._request.after)

    async def preview(self) -> Preview:
        """What would be written."""
        point, plans = await self._decide()
        await self._machine.require_holdable(self._hold_request(plans))
        async with reading_of(self._repository, point):
            disks = [await self._preview(point, plan) for plan in plans]
        return Preview(machine=self._machine.name, point=point, disks=tuple(disks))

    async def _preview(self, point: Point, plan: Plan) -> DiskPreview:
        disk = await self._returning(point, plan, Path("/nonexistent"))
        if not plan.by_bitmaps:
            disk.want(range(disk.hashes.count))
        written = await self._written_since(plan, disk) if plan.since else bytearray(disk.hashes.count)
        disk.want(index for index in range(disk.hashes.count) if written[index])
        return DiskPreview(
            target=disk.target,
            size=disk.size,
            by_bitmaps=plan.by_bitmaps,
            reason=plan.reason,
            bytes=disk.bytes_of(disk.wanted),
            since=disk.bytes_of(written),
        )

    # -- before the machine is stopped -------------------------------------------------------

    async def _make_safe(self, plans: Sequence[Plan]) -> Point:
        """A restore point of the machine as it is: all disks that a backup takes, and those that are rolled back."""
        request = self._request
        disks = await self._machine.disks()
        ours = {plan.disk.target for plan in plans}
        left_out = any(disk.left_out for disk in disks if disk.target in ours)
        taken = tuple(disk.target for disk in disks if disk.target in ours or (disk.node and not disk.left_out))
        wish = backup_flow.Request(
            machine=request.machine,
            repository=request.repository,
            access=request.access,
            only=taken if left_out else (),
            name=request.name,
            scratch=request.scratch,
            tags=(values.SAFETY_TAG,),
            rate=request.rate,
            directories=request.directories,
        )
        report = await backup_flow.back_up(wish, self._repository, self._machine, self._progress)
        self._notes += report.notes
        self._note(f"the machine as it is now: restore point {report.point.id}")
        return report.point

    def _journal(self, point: Point, plans: Sequence[Plan], place: Path) -> Journal:
        """What is written down first: where the files are that are made from now on."""
        room = state.private(self._request.staging) if self._request.staging is not None else place
        disks = tuple(
            JournalDisk(
                target=plan.disk.target,
                qdev=plan.disk.qdev,
                size=plan.wanted.size,
                block_size=plan.wanted.block_size,
                digest=plan.wanted.digest,
                files=(),
                staged=str(room.absolute() / f"pullback-{self._job}-stage{index}"),
                hashes=str(place / f"hashes{index}"),
                wanted=str(place / f"wanted{index}"),
            )
            for index, plan in enumerate(plans)
        )
        request = self._request
        journal = Journal(
            job=self._job,
            machine=self._machine.name,
            phase=Phase.STAGING,
            point=point.id,
            asked=request.point,
            repository=self._repository.name,
            began=datetime.now(UTC).isoformat(),
            command=command_for(request.machine, request.name, point.id, request.repository),
            disks=disks,
        )
        rollbacks.save(self._request.directories.state, journal)
        return journal

    async def _returning(self, point: Point, plan: Plan, place: Path) -> staging.Returning:
        """A disk with what is known of it: the chunks that its newest point has otherwise."""
        return await asyncio.to_thread(self._compared, point, plan, place)

    def _compared(self, point: Point, plan: Plan, place: Path) -> staging.Returning:
        target = plan.disk.target
        disk = staging.Returning(target=target, hashes=self._repository.hashes(point, target), place=place)
        if plan.newest is not None and plan.newest.id != point.id:
            staging.by_ids(disk, self._repository.hashes(plan.newest, target))
        return disk

    async def _written_since(self, plan: Plan, disk: staging.Returning) -> bytearray:
        """Which chunks were written since the newest point, as far as that is known now."""
        async with self._machine.change_map(Union(disk=plan.disk, bitmaps=plan.since)) as found:
            return await blocking(partial(_changes, found, disk, self._cancel), cancel=self._cancel)

    async def _staged(self, journal: Journal, point: Point, plans: Sequence[Plan]) -> writingback.Outcome:
        disks = [
            await self._returning(point, plan, Path(entry.staged))
            for plan, entry in zip(plans, journal.disks, strict=True)
        ]
        for plan, disk in zip(plans, disks, strict=True):
            if plan.reason is not None:
                self._note(f"{disk.target}: compared whole, because {plan.reason}")
            await self._stage_ahead(point, plan, disk)
        work = writingback.Work(
            machine=self._machine,
            base=self._request.directories.state,
            journal=journal,
            disks=disks,
            pace=self._pace,
            how=[plan.reason if not plan.by_bitmaps else None for plan in plans],
        )
        collect = partial(self._collect, point, plans, disks)
        outcome = await work.run(self._hold_request(plans), collect)
        self._notes += outcome.notes
        return outcome

    async def _stage_ahead(self, point: Point, plan: Plan, disk: staging.Returning) -> None:
        """Fetch while the machine runs what is known to differ."""
        written = sum(bitmap.count for bitmap in plan.disk.bitmaps if bitmap.name in plan.since)
        if plan.since and written > _STAGE_AHEAD:
            flags = await self._written_since(plan, disk)
            disk.want(index for index in range(disk.hashes.count) if flags[index])
        await blocking(partial(self._fetch, point, disk, first=True), cancel=self._cancel)

    def _fetch(self, point: Point, disk: staging.Returning, *, first: bool) -> None:
        staging.require_room(disk.place.parent, disk.bytes_of(disk.lacking()))
        if first:
            staging.prepare(disk)
        staging.stage(disk, self._repository, point, disk.target, self._pace)

    # -- while it stands still ---------------------------------------------------------------

    async def _collect(
        self, point: Point, plans: Sequence[Plan], disks: Sequence[staging.Returning], held: Held
    ) -> None:
        """Find what else differs, and stage it."""
        for index, (plan, disk) in enumerate(zip(plans, disks, strict=True)):
            work = partial(self._complete, point, plan, disk, held, index)
            await blocking(work, cancel=self._cancel, beside=held.watch())

    def _complete(self, point: Point, plan: Plan, disk: staging.Returning, held: Held, index: int) -> None:
        with writingback.opened(held.disks[index], self._cancel) as live:
            if plan.newest is None:
                staging.by_reading(disk, live, self._pace)
            else:
                context = held.disks[index].changes
                assert context is not None, "asked for, because there are bitmaps"
                known = staging.Tracking(
                    context=context,
                    newest=self._repository.hashes(plan.newest, disk.target),
                    cluster=plan.disk.cluster,
                    hole_file=plan.disk.hole_file,
                )
                staging.by_bitmaps(disk, live, known, self._pace)
        self._fetch(point, disk, first=False)


async def _require_free(machine: Machine) -> None:
    """Nothing of ours that lasts may hold a disk. Raises `BusyError`."""
    await jobs.require_free(machine)
    for snapshot in await machine.snapshots():
        holder = f"the {snapshot.kind} {snapshot.name} (`pullback recover` shows it, `pullback recover --end` ends it)"
        raise errors.BusyError(what=machine.name, holder=holder)


def _find(repository: repo.Repository, text: str, machine: str) -> Point:
    """The restore point that is meant. The latest is never one that was made right before a rollback."""
    found = repository.find(text, machine=machine)
    if text.lower() != _LATEST or values.SAFETY_TAG not in found.tags:
        return found
    others = [point for point in repository.listing(machine).points if values.SAFETY_TAG not in point.tags]
    if not others:
        raise errors.NoPoints(path=repository.name, of_machine=f" of {machine} but those made before rollbacks")
    return others[-1]


def _changes(found: ChangeMap, disk: staging.Returning, cancel: Cancel) -> bytearray:
    """Which chunks a map of changes names."""
    flags = bytearray(disk.hashes.count)
    with NbdEndpoint(found.address, contexts=[found.context], cancel=cancel) as endpoint:
        for window in increments.windows(disk.size, disk.block, WINDOW):
            cancel.check()
            for extent in endpoint.dirty(found.context, window):
                for index in disk.hashes.touched(extent):
                    flags[index] = 1
    return flags


# -- finishing -------------------------------------------------------------------------------


async def _finish(request: Request, machine: Machine, journal: Journal, progress: Progress, begun: float) -> Report:
    """Go on with a rollback that was interrupted when it had begun to write."""
    base = request.directories.state
    if journal.phase is Phase.WRITTEN:  # the disks were given back when the machine was opened
        outcome = writingback.Outcome(after=await _state(machine), disks=(), down=0.0, notes=())
    else:
        progress.note(f"the rollback to {journal.point} that was interrupted is finished")
        with rollbacks.living(base, journal.job):
            outcome = await _Finishing(request, machine, journal, progress).run()
    return Report(
        machine=machine.name,
        point=journal.point,
        created=None,
        safety=None,
        finished=True,
        after=outcome.after,
        disks=outcome.disks,
        down=outcome.down,
        seconds=time.monotonic() - begun,
        notes=tuple(outcome.notes),
    )


async def _state(machine: Machine) -> After:
    return After.RUN if (await machine.facts())["status"] == "running" else After.HELD


class _Finishing:
    """The end of an interrupted rollback. The repository is asked only for what is not staged."""

    def __init__(self, request: Request, machine: Machine, journal: Journal, progress: Progress) -> None:
        self._request = request
        self._machine = machine
        self._journal = journal
        self._cancel = Cancel()
        limiter = repo.Limiter(request.rate) if request.rate else None
        self._pace = staging.Report(progress=progress, cancel=self._cancel, limiter=limiter)

    async def run(self) -> writingback.Outcome:
        """Take the disks again, write what is missing, and give them back."""
        journal, base = self._journal, self._request.directories.state
        found = {disk.target: disk for disk in await self._machine.disks()}
        held = tuple(HoldDisk(disk=_same_disk(entry, found, journal)) for entry in journal.disks)
        place = str(rollbacks.directory(base, journal.job))
        disks = [await asyncio.to_thread(staging.again, entry, place) for entry in journal.disks]
        work = writingback.Work(
            machine=self._machine,
            base=base,
            journal=journal,
            disks=disks,
            pace=self._pace,
            how=["a rollback was interrupted"] * len(disks),
        )
        request = HoldRequest(job=journal.job, disks=held, after=self._request.after)
        return await work.run(request, partial(self._collect, work))

    async def _collect(self, work: writingback.Work, held: Held) -> None:
        """If anybody could write to the disks since, what is staged may not be all that differs."""
        if held.kept and held.kept == self._journal.qemu:
            return
        work.forget_done()
        for index, disk in enumerate(work.disks):
            read = partial(self._compare, disk, held, index)
            await blocking(read, cancel=self._cancel, beside=held.watch())
        if any(1 in disk.lacking() for disk in work.disks):
            async with open_for(self._request.repository, self._request.access) as repository:
                point = await asyncio.to_thread(repository.point, self._journal.machine, self._journal.point)
                async with reading_of(repository, point):
                    for disk in work.disks:
                        fetch = partial(_fetch, disk, repository, point, self._pace)
                        await blocking(fetch, cancel=self._cancel, beside=held.watch())

    def _compare(self, disk: staging.Returning, held: Held, index: int) -> None:
        with writingback.opened(held.disks[index], self._cancel) as live:
            staging.by_reading(disk, live, self._pace)


def _fetch(disk: staging.Returning, repository: repo.Repository, point: Point, pace: staging.Report) -> None:
    staging.require_room(disk.place.parent, disk.bytes_of(disk.lacking()))
    staging.stage(disk, repository, point, disk.target, pace)


def _same_disk(entry: JournalDisk, found: Mapping[str, Disk], journal: Journal) -> Disk:
    """The machine's disk that was half rolled back. Raises `DisksDiffer`."""
    disk = found.get(entry.target)
    identity = rollbacks.identity(Path(disk.image)) if disk is not None and disk.image.startswith("/") else None
    other = identity is not None and entry.files and not any(rollbacks.same(one, identity) for one in entry.files)
    if disk is None or disk.size != entry.size or other:
        where = entry.files[0].path if entry.files else "its image"
        raise errors.DisksDiffer(
            machine=journal.machine,
            point=journal.point,
            problem=f"its disk {entry.target}, {where}, is half rolled back, and not the {entry.target} that is here",
            way_out="Name the same images by the same targets as then.",
        )
    return disk
