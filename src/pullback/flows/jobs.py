"""Backup jobs as `virDomainBackupBegin` knows them: begun with two documents, looked at, ended or aborted.

    begin   documents checked ─▶ snapshot and checkpoint at one instant ─▶ pull: exports   push: QEMU copies
    end     pull: exports and snapshot go, the checkpoint stays            push: destinations get their names
    abort   everything goes, what the checkpoint recorded is merged back

A machine has one job at a time. The job of a running machine lasts when we are gone: any later
command, or program, finds it again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pullback import errors, state
from pullback.engine import opened
from pullback.engine.undoing import despite
from pullback.flows import checkpoints as checkpoint_flow
from pullback.flows import exports, planning, snapshots
from pullback.flows.exports import Access
from pullback.flows.snapshots import How
from pullback.machine import Machine
from pullback.model import checkpoints, pushing
from pullback.model.backups import Fleecing, Scratch, SnapshotRequest
from pullback.model.disks import Disk
from pullback.model.documents import backup as documents
from pullback.model.documents.backup import BackupDisk, BackupDocument, Mode, Server, Transport
from pullback.model.documents.checkpoint import CheckpointDocument
from pullback.model.documents.machine import Moment
from pullback.model.documents.storage import Format, StoreType
from pullback.model.exports import Listen, Served
from pullback.model.snapshots import ExportWish, Kind, OpenSnapshot, SnapshotDisk, Wanted
from pullback.state import history
from pullback.state.history import EndedJob

_PACE = "In a pull the client decides how fast it reads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A backup job that is under way."""

    job: str
    machine: str
    mode: Mode
    #: UTC.
    moment: datetime
    #: Seconds that the machine stood still for it, and that its file systems were frozen.
    pause: float
    frozen_seconds: float
    #: The document with nothing left open: names of exports and bitmaps, addresses, files.
    document: BackupDocument
    #: The checkpoint that was made with it.
    checkpoint: str | None
    #: Of a pull.
    exports: tuple[Served, ...]
    #: How each disk is frozen and why, by target.
    engines: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStats:
    """How far a job is with a disk."""

    target: str
    #: running, paused, pending, concluded, failed; of a pull: serving.
    status: str
    #: Push: bytes copied, and to be copied. Pull: bytes that scratch takes, and the disk's size.
    done: int
    total: int
    #: Push: the limit in bytes a second; None: there is none.
    speed: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """How far a job is."""

    job: str
    mode: Mode
    #: Seconds since its instant.
    seconds: float
    disks: tuple[DiskStats, ...]

    @property
    def finished(self) -> bool:
        """Has a push nothing left to do (well or badly)?"""
        return all(disk.status == "concluded" for disk in self.disks) or any(
            disk.status == "failed" for disk in self.disks
        )


# -- begin -----------------------------------------------------------------------------------


async def begin(
    machine: Machine,
    directories: state.Directories,
    document: BackupDocument,
    checkpoint: CheckpointDocument | None = None,
    *,
    how: How | None = None,
    access: Access | None = None,
    reuse: bool = False,
    speed: int | None = None,
) -> Job:
    """Begin a job. `reuse`: files of targets and scratch are there already (libvirt: REUSE_EXTERNAL);
    `speed`: bytes a second for each disk of a push.

    Raises `BusyError` (a job runs already), `BadDocument`, `NoCheckpoint`, `CheckpointInconsistent`
    (a disk must be read whole), and what snapshots, exports and destinations do. Then nothing stays.
    """
    if speed is not None and document.mode is Mode.PULL:
        raise errors.UsageError(problem=_PACE)
    how, access = how or How(), access or Access()
    await require_free(machine)
    disks = await machine.disks()
    prepared = await _prepared(machine, directories, checkpoint, disks, _chosen(machine, document, disks))
    served: tuple[Served, ...] = ()
    try:
        whole = _effective(machine, document, disks, prepared, directories, how)
        request = snapshots.request_for(
            [_disk(disks, part.name) for part in whole.taking_part],
            prepared.parts if prepared else (),
            _scratches(whole, document, reuse=reuse),
            directories,
            how,
        )
        if whole.mode is Mode.PUSH:
            made = await _push(machine, whole, request, how, reuse=reuse, speed=speed)
        else:
            made, served = await _pull(machine, whole, request, how, access, prepared)
    except BaseException:
        if prepared:
            prepared.abort()
        raise
    if prepared:
        prepared.commit()
    return _job(machine, made, served)  # nothing is awaited any more: who is cancelled later has the job


async def require_free(machine: Machine) -> None:
    """Raise `BusyError` if a backup job is under way."""
    running = await _running(machine)
    if running is not None:
        since = running.moment.strftime("%Y-%m-%dT%H:%M:%SZ")
        raise errors.BusyError(
            what=machine.name, holder=f"the {running.kind} job {running.job}, since {since} (`pullback job info`)"
        )


async def _running(machine: Machine) -> OpenSnapshot | None:
    return next((one for one in await machine.snapshots() if one.kind in (Kind.PULL, Kind.PUSH)), None)


def _chosen(machine: Machine, document: BackupDocument, disks: Sequence[Disk]) -> set[str]:
    """Targets that take part: those named, or all that can be read by default."""
    if document.disks:
        return {part.name for part in document.taking_part}
    return {disk.target for disk in planning.select(disks, machine=machine.name, only=(), exclude=())}


async def _prepared(
    machine: Machine,
    directories: state.Directories,
    checkpoint: CheckpointDocument | None,
    disks: Sequence[Disk],
    chosen: set[str],
) -> checkpoint_flow.Prepared | None:
    if checkpoint is None:
        return None
    wish = snapshots.within(checkpoint, disks, chosen)
    return await checkpoint_flow.prepare(machine, directories, wish, disks=disks)


def _effective(
    machine: Machine,
    document: BackupDocument,
    disks: Sequence[Disk],
    prepared: checkpoint_flow.Prepared | None,
    directories: state.Directories,
    how: How,
) -> BackupDocument:
    """The document with nothing left open but the address, and every checkpoint that it names usable."""
    pull = document.mode is Mode.PULL
    if pull and document.server is None:
        document = replace(document, server=Server(transport=Transport.UNIX))
    listed = checkpoint_flow.machine_disks(disks)
    if not document.disks:  # those that cannot be read by default take no part
        chosen = _chosen(machine, document, disks)
        listed = [disk if disk.target in chosen else replace(disk, read_only=True) for disk in listed]
    moment = Moment(seconds=int(time.time()), checkpoint=prepared.saved.name if prepared else None)
    directory = str(how.scratch or directories.scratch) if pull else None
    whole = documents.effective(document, listed, moment, directory=directory, autoport=True)
    for part in whole.taking_part:
        _require_plain(part)
        if part.incremental is not None:
            _require_usable(machine, _disk(disks, part.name), part.incremental)
    return whole


def _require_plain(part: BackupDisk) -> None:
    """What we cannot do is refused: an image that is to be encrypted must not hold plain data."""
    where = part.store
    if where is None:
        return
    if where.encryption is not None:
        way_out = "Name a block device that is encrypted itself (dm-crypt), or leave the encryption out."
        raise errors.Unsupported(
            what=f"encryption of {where.path or where.uri}", reason="none is made", way_out=way_out
        )
    if any(label.labels for label in where.seclabels):
        way_out = "Leave the label out: what is made belongs to QEMU's user, with mode 0600."
        raise errors.Unsupported(what=f"a label on {where.path or where.uri}", reason="none is set", way_out=way_out)


def _require_usable(machine: Machine, disk: Disk, checkpoint: str) -> None:
    chain = checkpoints.chain(disk.bitmaps)
    if chain.problem:
        raise errors.CheckpointInconsistent(checkpoint=checkpoint, target=disk.target, problem=chain.problem)
    if not any(link.mark.name == checkpoint for link in chain.links):
        problem = "it is not on the disk"
        raise errors.CheckpointInconsistent(checkpoint=checkpoint, target=disk.target, problem=problem)


def _disk(disks: Sequence[Disk], target: str) -> Disk:
    return next(disk for disk in disks if disk.target == target)


def _scratches(whole: BackupDocument, given: BackupDocument, *, reuse: bool) -> Mapping[str, Scratch]:
    """Places for old blocks that the document names itself."""
    named = {disk.name for disk in given.disks if disk.scratch is not None}
    return {
        disk.name: Scratch(path=Path(str(disk.scratch.path)), block=disk.type is StoreType.BLOCK, reuse=reuse)
        for disk in whole.taking_part
        if disk.scratch is not None and disk.name in named
    }


# -- pull ------------------------------------------------------------------------------------


async def _pull(
    machine: Machine,
    whole: BackupDocument,
    request: SnapshotRequest,
    how: How,
    access: Access,
    prepared: checkpoint_flow.Prepared | None,
) -> tuple[OpenSnapshot, tuple[Served, ...]]:
    name = prepared.saved.name if prepared else f"pull-{request.job}"
    wanted = Wanted(name=name, kind=Kind.PULL, request=request, owner=how.owner_token, document=_plain(whole))
    made = await machine.open_snapshot(wanted)
    try:
        wishes = [_wish(part, made) for part in whole.taking_part]
        served = await machine.serve(wishes, _listen(whole.server, access))
        made = replace(made, document=_plain(_addressed(whole, made, served)))
        await machine.annotate(made)
    except BaseException as error:
        await despite(error, machine.close_snapshot(made, take_back=True))
        raise
    return made, served


def _plain(document: BackupDocument) -> Mapping[str, object]:
    return documents.to_dict(document)


def _wish(part: BackupDisk, snapshot: OpenSnapshot) -> ExportWish:
    assert part.exportname is not None, "an effective document names its exports"
    bitmaps = {part.exportbitmap: part.incremental} if part.exportbitmap and part.incremental else {}
    return ExportWish(name=part.exportname, target=part.name, snapshot=snapshot, bitmaps=bitmaps)


def _listen(server: Server | None, access: Access) -> Listen:
    assert server is not None, "an effective pull has a server"
    if server.transport is Transport.FD:
        raise errors.Unsupported(
            what="transport fd", reason="a monitor's connection that is opened anew for each command passes no socket",
            way_out="Name a unix socket or a port.",
        )  # fmt: skip
    if server.transport is Transport.UNIX:
        return exports.unix(server.socket, wanted=server.tls, access=access)
    return exports.tcp(server.name, server.port, wanted=server.tls, access=access)


def _addressed(whole: BackupDocument, made: OpenSnapshot, served: Sequence[Served]) -> BackupDocument:
    """The document with the address that there is, and the scratch images that there are."""
    assert whole.server is not None
    address = served[0].address
    server = replace(whole.server, socket=address.socket, port=address.port)
    disks = tuple(_with_scratch(part, made) for part in whole.disks)
    return replace(whole, server=server, disks=disks)


def _with_scratch(part: BackupDisk, made: OpenSnapshot) -> BackupDisk:
    frozen = made.disk(part.name)
    if frozen is None or frozen.scratch is None or part.scratch is None:
        return part
    if part.type is StoreType.BLOCK:
        return replace(part, scratch=replace(part.scratch, dev=frozen.scratch))
    return replace(part, scratch=replace(part.scratch, file=frozen.scratch))


# -- push ------------------------------------------------------------------------------------


async def _push(
    machine: Machine,
    whole: BackupDocument,
    request: SnapshotRequest,
    how: How,
    *,
    reuse: bool,
    speed: int | None,
) -> OpenSnapshot:
    by_target = {part.name: part for part in whole.taking_part}
    push = pushing.PushRequest(
        job=request.job,
        parts=tuple(
            pushing.PushPart(
                disk=part.disk,
                destination=_destination(by_target[part.disk.target], reuse=reuse),
                since=_since(part.disk, by_target[part.disk.target].incremental),
                checkpoint=part.checkpoint,
                freeze=part.freeze,
            )
            for part in request.disks
        ),
        scratch=request.scratch,
        fleecing=request.fleecing,
        speed=speed,
        quiescing=request.quiescing,
    )
    name = f"push-{request.job}"
    wanted = Wanted(
        name=name, kind=Kind.PUSH, request=request, owner=how.owner_token, document=documents.to_dict(whole)
    )
    return await machine.begin_push(wanted, push)


def _since(disk: Disk, checkpoint: str | None) -> tuple[str, ...]:
    if checkpoint is None:
        return ()
    links = checkpoints.chain(disk.bitmaps).links
    names = [link.mark.name for link in links]
    return tuple(link.mark.bitmap for link in links[names.index(checkpoint) :])


def _destination(part: BackupDisk, *, reuse: bool) -> pushing.Destination:
    assert part.target is not None, "an effective push has targets"
    if part.driver not in (Format.QCOW2, Format.RAW, None):
        raise errors.Unsupported(
            what=f"a push in format {part.driver}",
            reason="only qcow2 and raw can be written",
            way_out="Name one of them.",
        )
    format = pushing.Format(part.driver or Format.QCOW2)
    if part.target.uri is not None:
        return pushing.Destination.nbd(part.target.uri, format=format, reuse=reuse)
    path = Path(str(part.target.path))
    if part.type is StoreType.BLOCK:
        return pushing.Destination.block(path, format=format, reuse=reuse)
    return pushing.Destination.file(path, format=format, reuse=reuse)


# -- afterwards ------------------------------------------------------------------------------


async def find(machine: Machine) -> OpenSnapshot:
    """The job that is under way. Raises `NoJob`."""
    running = await _running(machine)
    if running is None:
        raise errors.NoJob(machine=machine.name)
    return running


async def info(machine: Machine) -> Job:
    """The job that is under way. Raises `NoJob`."""
    running = await find(machine)
    return _job(machine, running, await machine.served())


def _job(machine: Machine, snapshot: OpenSnapshot, served: Sequence[Served]) -> Job:
    return Job(
        job=snapshot.job,
        machine=machine.name,
        mode=Mode(snapshot.kind),
        moment=snapshot.moment,
        pause=snapshot.window.seconds,
        frozen_seconds=snapshot.window.frozen_seconds,
        document=documents.from_dict(dict(snapshot.document or {})),
        checkpoint=snapshot.checkpoint,
        exports=tuple(one for one in served if one.job == snapshot.job),
        engines={disk.target: f"{disk.fleecing or 'none'}: {disk.reason}" for disk in snapshot.disks},
    )


async def stats(machine: Machine) -> Stats:
    """How far the job is. Raises `NoJob`."""
    return await _stats(machine, await find(machine))


async def _stats(machine: Machine, snapshot: OpenSnapshot) -> Stats:
    if snapshot.kind is Kind.PUSH:
        found = tuple(
            DiskStats(target=p.target, status=p.status, done=p.done, total=p.total, speed=p.speed, error=p.error)
            for p in await machine.push_progress(snapshot)
        )
    else:
        found = tuple(
            DiskStats(target=disk.target, status="serving", done=_occupied(disk), total=disk.size)
            for disk in snapshot.disks
        )
    seconds = (datetime.now(UTC) - snapshot.moment).total_seconds()
    return Stats(job=snapshot.job, mode=Mode(snapshot.kind), seconds=seconds, disks=found)


def _occupied(disk: SnapshotDisk) -> int:
    """Bytes that old blocks take. A classic scratch has its space reserved behind its end, which is not counted."""
    try:
        status = os.stat(disk.scratch or "")
    except OSError:
        return 0
    return status.st_size if disk.fleecing is Fleecing.CLASSIC else status.st_blocks * 512


def last(machine: Machine, directories: state.Directories) -> EndedJob | None:
    """How the last job of the machine ended; None if there was none."""
    return history.load(directories.state, machine.name)


async def is_over(machine: Machine, *, job: str | None = None) -> bool:
    """Has a push nothing left to do, or has that `job` ended? Raises `NoJob`, and `UsageError` for a pull."""
    running = await _running(machine)
    if running is None or job not in (None, running.job):
        if job is None:
            raise errors.NoJob(machine=machine.name)
        return True
    return (await _stats(machine, await _a_push(machine))).finished


async def end(machine: Machine, directories: state.Directories, *, job: str | None = None) -> EndedJob:
    """End the job well: its checkpoint stays.

    `job`: no other is meant, and it may have ended already (a push does by itself); how it did is given then.
    Raises `NoJob`; of a push `BusyError` while it still copies, and what made it fail (all is undone then).
    """
    running = await find(machine) if job is None else await _running(machine)
    if running is None or job not in (None, running.job):
        ended = last(machine, directories)
        if ended is None or ended.job != job:
            raise errors.NoJob(machine=machine.name)
        return ended
    final = await _stats(machine, running)
    if running.kind is Kind.PUSH:
        try:
            await machine.conclude_push(running)
        except (errors.BusyError, errors.CleanupIncomplete, errors.OutcomeUnknown):
            raise  # it is there as before, or goes on where it stopped
        except errors.PullbackError as error:
            checkpoint_flow.forget_taken_back(directories, machine.name, running)
            _remember(machine, directories, running, final, error=str(error))
            raise
    else:
        await machine.close_snapshot(running, take_back=False)
    return _remember(machine, directories, running, final, error=None)


async def abort(machine: Machine, directories: state.Directories) -> EndedJob:
    """End the job as if it had never been: destinations go, and the checkpoint is merged back. Raises `NoJob`."""
    running = await find(machine)
    final = await _stats(machine, running)
    await machine.close_snapshot(running, take_back=True)
    checkpoint_flow.forget_taken_back(directories, machine.name, running)
    return _remember(machine, directories, running, final, error="it was aborted")


def _remember(
    machine: Machine, directories: state.Directories, running: OpenSnapshot, final: Stats, *, error: str | None
) -> EndedJob:
    disks = {disk.target: {"done": disk.done, "total": disk.total} for disk in final.disks}
    ended = opened.ended(running, error=error, disks=disks)
    history.save(directories.state, machine.name, ended)
    return ended


async def set_speed(machine: Machine, speed: int | None) -> None:
    """Limit each disk of a push to so many bytes a second (None: no limit), while it runs."""
    await machine.limit_push(await _a_push(machine), speed)


async def pause(machine: Machine) -> None:
    """Let a push rest. The guest goes on, and scratch grows."""
    await machine.pause_push(await _a_push(machine), paused=True)


async def resume(machine: Machine) -> None:
    """Let a push go on."""
    await machine.pause_push(await _a_push(machine), paused=False)


async def _a_push(machine: Machine) -> OpenSnapshot:
    running = await find(machine)
    if running.kind is not Kind.PUSH:
        raise errors.UsageError(problem="The job is a pull: its client decides how fast it reads, and when it ends")
    return running
