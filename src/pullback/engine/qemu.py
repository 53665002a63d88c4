"""A QEMU process as a machine, by its QMP socket."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path

from pullback import errors, machine, state
from pullback.engine import (
    capabilities,
    description,
    destinations,
    disks,
    ending,
    fleece,
    graph,
    interrupted,
    jobs,
    keeper,
    monitor,
    opened,
    overlay,
    pause,
    push,
    pushing,
    recovery,
    replies,
    scratch,
    serving,
    swap,
    tpm,
    tracking,
    transaction,
)
from pullback.engine import exports as block_exports
from pullback.engine import sweep as sweeping
from pullback.engine.guard import Guard, guarding
from pullback.engine.quiesce import Quiescer
from pullback.engine.undoing import despite
from pullback.model import checkpoints
from pullback.model import pushing as pushed_values
from pullback.model.backups import Frozen, Quiescing, SnapshotRequest, Window
from pullback.model.description import Description, Firmware
from pullback.model.disks import Disk
from pullback.model.exports import Listen, Served, ServerAddress
from pullback.model.overlays import Advance, Committed, NewOverlay, Overlay
from pullback.model.pushing import Pushed, PushProgress, PushRequest
from pullback.model.rollbacks import HoldRequest, Journal, Phase
from pullback.model.snapshots import ExportWish, Kind, OpenSnapshot, Wanted
from pullback.model.tpm import TpmState
from pullback.model.tracking import Begun, ChangeMap, Doomed, NewBitmap, Union
from pullback.state import history, rollbacks
from pullback.state.serving import Register

_NO_UUID = "00000000-0000-0000-0000-000000000000"
#: How long cleaning up may take before we give the terminal back (SIGTERM: 10 s in all).
_CLEAN_SECONDS = 9.0
#: A destination that hangs is given up first.
_CLEAN_PUSH_SECONDS = 30.0


@asynccontextmanager
async def connect(
    socket: Path,
    directories: state.Directories,
    *,
    command: str,
    name: str | None = None,
    anonymous: bool = False,
    finishing: bool = False,
) -> AsyncIterator[QemuMachine]:
    """The machine behind a QMP socket, locked for us, with what dead jobs left in it removed.

    `name` is used instead of QEMU's own; `anonymous` lets a machine without any pass; `finishing` one whose
    disks are half rolled back.

    Raises `BusyError` if another pullback works on it, the monitor's errors, `MachineUnnamed`,
    `ForeignManager`, `RollbackPending`.
    """
    socket = socket.absolute()
    with ExitStack() as locks:
        # By socket first: a second client would hang on it without a greeting.
        title = f"the machine at {socket}"
        locks.enter_context(state.lock(directories, f"socket {socket.resolve()}", command=command, title=title))
        async with _connected(socket, directories) as qmp:
            await refuse_foreign(qmp)
            identity = name or await identity_of(qmp, socket if anonymous else None)
            locks.enter_context(state.lock(directories, f"machine {identity}", command=command, title=identity))
            found = QemuMachine(qmp, directories, identity, command)
            found.interrupted = await interrupted.of_qemu(qmp, directories, identity, finishing=finishing)
            serving.forget_dead(Register(directories.state, identity))
            found.cleared = await _recover(qmp, directories, identity, _unfinished(found.interrupted))
            found.can = await capabilities.discover(qmp, directories.cache)
            yield found


@asynccontextmanager
async def _connected(socket: Path, directories: state.Directories) -> AsyncIterator[monitor.Monitor]:
    """The monitor. If nothing listens there any more, QEMU died: what its jobs left is only files."""
    async with AsyncExitStack() as stack:
        try:
            qmp = await stack.enter_async_context(monitor.connect(socket))
        except errors.UnreachableError:
            for job in state.jobs_of(directories, socket=socket, machine=""):
                recovery.forget(job)
            raise
        yield qmp


async def refuse_foreign(qmp: monitor.Monitor) -> None:
    """Raise `ForeignManager` if libvirt manages this QEMU."""
    nodes = replies.objects(await qmp.execute("query-named-block-nodes", {"flat": True}), "nodes")
    if any(replies.optional_text(node, "node-name").startswith("libvirt-") for node in nodes):
        raise errors.ForeignManager(socket=str(qmp.socket), manager="libvirt")


async def identity_of(qmp: monitor.Monitor, instead: Path | None) -> str:
    """QEMU's -name, else its -uuid, else its socket where that is good enough."""
    given = replies.optional_text(replies.mapping(await qmp.execute("query-name"), "query-name"), "name")
    if given:
        return given
    uuid = replies.optional_text(replies.mapping(await qmp.execute("query-uuid"), "query-uuid"), "UUID")
    if uuid not in ("", _NO_UUID):
        return uuid
    if instead is None:
        raise errors.MachineUnnamed(socket=str(qmp.socket))
    return str(instead)


def _unfinished(journal: Journal | None) -> Journal | None:
    """One that has only to give the disks back is cleared away like any other dead job."""
    return journal if journal is not None and journal.phase is Phase.WRITING else None


async def _recover(
    qmp: monitor.Monitor, directories: state.Directories, identity: str, pending: Journal | None
) -> list[str]:
    """Remove what dead jobs left in this QEMU and on disk; gives their ids. That of `pending` is left alone."""
    found = state.jobs_of(directories, socket=qmp.socket, machine=identity)
    there = await recovery.strays(qmp)
    # A machine of the same name that runs elsewhere keeps what is its own.
    found = [job for job in found if job.record.job in there or not recovery.elsewhere(job, qmp)]
    left = [job for job in found if not opened.lasting(job, qmp.process) or opened.is_empty(job, there)]
    known = {job.record.job for job in found}
    for stray in there:
        if stray not in known:  # its record was lost: the names alone must do
            left.append(
                state.begin_job(directories, job=stray, socket=qmp.socket, machine=identity, command="recovery")
            )
    if pending is not None:  # only the rollback itself goes on with that
        left = [job for job in left if job.record.job != pending.job or job.record.qemu not in ("", qmp.process)]
    cleared = [job.record.job for job in left if await _cleared(qmp, job)]
    await serving.stop_unused(qmp, Register(directories.state, identity))
    for job in state.jobs_of(directories, socket=qmp.socket, machine=identity):
        if job.record.job in known and opened.needs_keeper(job):
            await keeper.ensure(job.path)
    rollbacks.sweep(directories.state)
    return cleared


async def _cleared(qmp: monitor.Monitor, job: state.Job) -> bool:
    """Clear a dead job away. The end of what lasted may have to wait: its keeper tries again."""
    if opened.lasting(job, qmp.process):  # exports that somebody else has ended
        job.record.ends = state.KEEP
    try:
        await recovery.clear(qmp, job)
    except errors.CleanupIncomplete:
        if not (job.record.ends and job.record.open):
            raise
        return False
    return True


class QemuMachine:
    """See `machine.Machine`. Made by `connect`."""

    def __init__(self, qmp: monitor.Monitor, directories: state.Directories, name: str, command: str) -> None:
        self._qmp = qmp
        self._directories = directories
        self._name = name
        self._command = command
        self.can: capabilities.Capabilities
        #: Ids of dead jobs that were cleared away when we connected.
        self.cleared: list[str] = []
        #: The rollback of its disks that is to be finished.
        self.interrupted: Journal | None = None

    @property
    def name(self) -> str:
        """Its identity."""
        return self._name

    @property
    def version(self) -> str:
        """QEMU's version."""
        return f"QEMU {self.can.version}"

    async def disks(self) -> tuple[Disk, ...]:
        """All block devices, as they are now."""
        found, _ = await disks.find(self._qmp, has_graph=self.can.graph)
        return found

    async def describe(self) -> Description:
        """How QEMU was started."""
        return await description.describe(self._qmp, self.can.version)

    async def alive(self) -> bool:
        """Does the monitor still answer?"""
        try:
            await self._qmp.execute("query-status", timeout=2.0)
        except errors.OutcomeUnknown:
            return False
        return True

    async def facts(self) -> Mapping[str, object]:
        """Capabilities, run state, jobs and exports, as JSON values."""
        can = asdict(self.can)
        return {
            "machine": self.name,
            "socket": str(self._qmp.socket),
            "status": await pause.run_state(self._qmp),
            "qemu": can.pop("version"),
            "capabilities": can,
            "jobs": await jobs.types(self._qmp),
            "exports": await block_exports.listed(self._qmp) if self.can.exports else [],
            "cleared": self.cleared,
        }

    @asynccontextmanager
    async def snapshot(self, request: SnapshotRequest) -> AsyncIterator[QemuSnapshot]:
        """Freeze disks while the block runs."""
        self._require(request)
        scratch.check(request.scratch, [part.disk for part in request.disks])
        job = self._begin(request.job)
        async with recovery.guarded(job) as watcher:
            made = QemuSnapshot(self._context(job, watcher, request))
            try:
                await pause.uninterrupted(made.freeze())
                yield made
            except BaseException as error:
                await despite(error, made.abandon())
                raise
            await pause.uninterrupted(made.end())

    @asynccontextmanager
    async def push(self, request: PushRequest) -> AsyncIterator[pushing.Push]:
        """Let QEMU copy disks to destinations; undone if the block is left before it is concluded."""
        scratch.check(request.scratch, [part.disk for part in request.parts])
        job = self._begin(request.job)
        async with (
            recovery.guarded(job) as watcher,
            pushing.of_machine(self._context(job, watcher, request.snapshot), request) as found,
        ):
            yield found

    def _context(self, job: state.Job, watcher: Guard, request: SnapshotRequest) -> fleece.Context:
        return fleece.Context(
            monitor=self._qmp,
            capabilities=self.can,
            job=job,
            guard=watcher,
            quiescer=Quiescer(self._qmp, job, watcher, request.quiescing),
            request=request,
        )

    async def open_snapshot(self, wanted: Wanted) -> OpenSnapshot:
        """Freeze disks, until `close_snapshot`."""
        self._require(wanted.request)
        scratch.check(wanted.request.scratch, [part.disk for part in wanted.request.disks])
        job = self._begin_lasting(wanted.request)
        async with recovery.guarded(job) as watcher:
            made = QemuSnapshot(self._context(job, watcher, wanted.request))
            try:
                found = await pause.uninterrupted(made.last(wanted, self.name))
            except BaseException as error:
                await despite(error, made.abandon())
                raise
            watcher.keep()
        return found

    async def snapshots(self) -> tuple[OpenSnapshot, ...]:
        """The snapshots that last, oldest first."""
        found = [opened.parsed(job) for job in self._lasting()]
        return tuple(sorted((one for one in found if one), key=lambda one: one.moment))

    def _lasting(self) -> list[state.Job]:
        jobs_there = state.jobs_of(self._directories, socket=self._qmp.socket, machine=self.name)
        return [job for job in jobs_there if opened.lasting(job, self._qmp.process)]

    async def close_snapshot(self, snapshot: OpenSnapshot, *, take_back: bool) -> None:
        """Let go of a lasting snapshot and its exports; with `take_back` of its checkpoint too."""
        await self._close(snapshot, undo=take_back or snapshot.push is not None, why=ending.ABORTED)

    async def _close(self, snapshot: OpenSnapshot, *, undo: bool, why: str) -> None:
        """First what may hinder it, then the decision, durably; from then on it only goes on."""
        job = self._job_of(snapshot)
        if job is None:
            return
        await sweeping.require_removable(self._qmp, job)
        if snapshot.push is not None:
            # A server that hangs does not hinder: its connection can be cut.
            to = [disk.destination for disk in pushed_values.pushed(snapshot.push).disks]
            await destinations.require_answer(one for one in to if one.kind is not pushed_values.Kind.NBD)
        ending.decide(job, snapshot, undo=undo, why=why)
        async with opened.stillness(self._qmp, job) as still:
            await pause.uninterrupted(ending.go_on(self._qmp, job, still))
        job.remove()

    def _job_of(self, snapshot: OpenSnapshot) -> state.Job | None:
        """Its record, also while it is being made."""
        found = state.jobs_of(self._directories, socket=self._qmp.socket, machine=self.name)
        return next((job for job in found if job.record.job == snapshot.job and opened.parsed(job)), None)

    async def annotate(self, snapshot: OpenSnapshot) -> None:
        """Keep a changed description of a lasting snapshot. A pull job is whole with this."""
        job = self._job_of(snapshot)
        if job is not None:
            ending.stays(job, snapshot)

    async def fail_snapshot(self, snapshot: OpenSnapshot, reason: str) -> None:
        """Let go of a snapshot that cannot stay. A job's checkpoint is taken back, one made alone is kept."""
        await self._close(snapshot, undo=snapshot.kind is not Kind.SNAPSHOT, why=reason)

    async def relieve(self) -> None:
        """Let go of snapshots that must not stay."""
        for snapshot in await self.snapshots():
            if (reason := opened.trouble(snapshot)) is not None and await opened.unanswering(snapshot) is None:
                await self.fail_snapshot(snapshot, reason)

    async def begin_push(self, wanted: Wanted, request: PushRequest) -> OpenSnapshot:
        """Freeze disks and let QEMU copy them, until `conclude_push` or `close_snapshot`."""
        scratch.check(request.scratch, [part.disk for part in request.parts])
        job = self._begin_lasting(request.snapshot)
        async with recovery.guarded(job) as watcher:
            context = self._context(job, watcher, request.snapshot)
            described: list[Pushed] = []
            try:
                found = await pause.uninterrupted(self._push(context, wanted, request, described))
            except BaseException as error:
                await despite(error, self._undo_push(context, described))
                raise
            watcher.keep()
        return found

    async def _push(
        self, context: fleece.Context, wanted: Wanted, request: PushRequest, described: list[Pushed]
    ) -> OpenSnapshot:
        described.append(await push.prepare(context, request))
        begun, cut = await push.begin(context, request, described[-1])
        described.append(begun)
        found = replace(opened.describe(context, cut, wanted, self.name), push=begun.document())
        await context.quiescer.end()
        ending.stays(context.job, found)
        return found

    async def _undo_push(self, context: fleece.Context, described: Sequence[Pushed]) -> None:
        async with asyncio.timeout(_CLEAN_PUSH_SECONDS):
            await context.quiescer.end()
            ending.given_up(context.job)
            begun = described[-1] if described else None
            still = fleece.stillness(context)
            await push.cancel(self._qmp, context.job, begun, still)
            await ending.go_on(self._qmp, context.job, still)  # what the cut had made before it failed
            context.job.remove()

    async def push_progress(self, snapshot: OpenSnapshot) -> tuple[PushProgress, ...]:
        """How far each disk of a push is."""
        return await push.progress(self._qmp, pushed_values.pushed(snapshot.push or {}))

    async def limit_push(self, snapshot: OpenSnapshot, speed: int | None) -> None:
        """Bytes a second for each disk from now on; None: as fast as it goes."""
        await push.set_speed(self._qmp, pushed_values.pushed(snapshot.push or {}), speed)

    async def pause_push(self, snapshot: OpenSnapshot, *, paused: bool) -> None:
        """Let a push rest, or go on."""
        step = push.pause if paused else push.resume
        await step(self._qmp, pushed_values.pushed(snapshot.push or {}))

    async def conclude_push(self, snapshot: OpenSnapshot) -> None:
        """All is copied: make backups of it. `BusyError` while it is not; of a failure all is undone."""
        job = self._job_of(snapshot)
        if job is None:
            return
        begun = pushed_values.pushed(snapshot.push or {})
        async with opened.stillness(self._qmp, job) as still:
            try:
                await pause.uninterrupted(push.conclude(self._qmp, job, begun, still))
            except (errors.BusyError, errors.CleanupIncomplete, errors.OutcomeUnknown):
                raise
            except errors.PullbackError as error:
                if push.is_concluded(job):  # the backups are made; the rest goes with the next connection
                    ending.decide(job, snapshot, undo=False)
                    return
                ending.decide(job, snapshot, undo=True, why=str(error))
                await pause.uninterrupted(ending.go_on(self._qmp, job, still))
                job.remove()
                raise
        job.remove()

    async def settle_push(self, snapshot: OpenSnapshot) -> None:
        """For the keeper: if nothing is left to wait for, conclude it, and write down how it ended."""
        found = await self.push_progress(snapshot)
        if not push.over(found):
            return
        failure: str | None = None
        try:
            await self.conclude_push(snapshot)
        except (errors.CleanupIncomplete, errors.OutcomeUnknown):
            raise
        except errors.PullbackError as error:
            failure = str(error)
        disks_done = {one.target: {"done": one.done, "total": one.total} for one in found}
        history.save(self._directories.state, self.name, opened.ended(snapshot, error=failure, disks=disks_done))

    async def require_holdable(self, request: HoldRequest) -> None:
        """Raise what `hold` would, as far as it can be known."""
        self._require_exports("a rollback")
        await swap.require_holdable(self._qmp, request, has_graph=self.can.graph)

    @asynccontextmanager
    async def hold(self, request: HoldRequest) -> AsyncIterator[swap.QemuHeld]:
        """Take disks from the guest, and export them for writing; goes on with what that job has done already."""
        self._require_exports("a rollback")
        found = state.jobs_of(self._directories, socket=self._qmp.socket, machine=self.name)
        before = [job for job in found if (job.record.job, job.record.qemu) == (request.job, self._qmp.process)]
        job = before[0] if before else self._begin(request.job)
        async with guarding(job) if before else recovery.guarded(job) as watcher:
            try:
                async with swap.held(self._qmp, job, watcher, request) as held:
                    yield held
            except BaseException:
                if not self._qmp.process_lives():
                    recovery.forget(job)
                raise

    async def serve(self, wishes: Sequence[ExportWish], listen: Listen) -> tuple[Served, ...]:
        """Export snapshots and disks: all of them, or none."""
        self._require_exports("an export")
        there = await self.disks()
        for wish in wishes:
            disk = disks.named(there, wish.target, self.name)
            opened.require_exportable(self.can, wish.target, iothread=disk.iothread is not None)
        register = Register(self._directories.state, self.name)
        job = self._begin(secrets.token_hex(4))
        done: list[Served] = []
        try:
            ending.begun(job, ())
            address = await serving.ensure(self._qmp, register, listen, private=serving.private_socket(job))
            for wish in wishes:
                done.append(await self._serve_one(wish, job, register, address))
            if any(served.job == job.record.job for served in done):
                ending.stays(job, opened.exports_only(job))
        except BaseException as error:
            await despite(error, self._unserve_made(job))
            raise
        if job.record.ends:
            recovery.forget(job)
        return tuple(done)

    async def _serve_one(self, wish: ExportWish, job: state.Job, register: Register, address: ServerAddress) -> Served:
        owner = wish.snapshot.job if wish.snapshot is not None else job.record.job
        job.record.exports.append(await opened.free_id(self._qmp, owner))
        job.save()
        id = job.record.exports[-1]
        if wish.snapshot is not None:
            return await opened.serve_view(self._qmp, register, wish, address, id=id)
        disk = disks.named(await self.disks(), wish.target, self.name)
        assert disk.node is not None
        # Never our own filter: an export of it would hold it when its snapshot has gone.
        root = disk.root or disk.node
        node = disk.node if wish.writable or root.startswith(graph.OURS) else root
        return await opened.serve_disk(self._qmp, register, wish, address, job=job.record.job, node=node, id=id)

    async def _unserve_made(self, job: state.Job) -> None:
        async with asyncio.timeout(_CLEAN_SECONDS):
            await ending.go_on(self._qmp, job, sweeping.as_it_is)
            job.remove()

    async def served(self) -> tuple[Served, ...]:
        """What we export for others."""
        if not self.can.exports:
            return ()
        found = await serving.current(self._qmp, Register(self._directories.state, self.name))
        return found.exports if found else ()

    async def unserve(self, exported: Sequence[Served]) -> None:
        """Stop exports, also under clients; the server too, if they were its last."""
        ended = {served.job for served in exported}
        await pause.uninterrupted(self._unserve(exported, [job for job in self._lasting() if job.record.job in ended]))

    async def _unserve(self, exported: Sequence[Served], ended: Sequence[state.Job]) -> None:
        for served in exported:
            await block_exports.remove_one(self._qmp, served.id)
        await serving.stop_unused(self._qmp, Register(self._directories.state, self.name))
        left = {served.job for served in await self.served()}
        for job in ended:
            snapshot = opened.parsed(job)
            if job.record.job not in left and (snapshot is None or snapshot.kind is Kind.EXPORT):
                recovery.forget(job)

    def _require(self, request: SnapshotRequest) -> None:
        self._require_exports("a backup")
        if request.nbd_server is not None:
            _require_private(request.nbd_server)

    def _require_exports(self, what: str) -> None:
        if not self.can.exports:
            raise errors.Unsupported(what=what, reason=f"QEMU {self.can.version} is older than 5.2")

    async def drop_bitmaps(self, disk: Disk, names: Sequence[str]) -> None:
        """Remove bitmaps that are worthless."""
        assert disk.node is not None
        for name in names:
            await self._qmp.execute("block-dirty-bitmap-remove", {"node": disk.node, "name": name})

    async def delete_checkpoints(self, disk: Disk, nonces: Sequence[str]) -> None:
        """Delete checkpoints of a disk, each in a transaction that merges it into its older neighbour."""
        for nonce in nonces:
            now = next((found for found in await self.disks() if found.qdev == disk.qdev), None)
            if now is None or now.node is None:
                return
            merge = checkpoints.chain(now.bitmaps).deletion(nonce)
            if merge is not None:
                await transaction.run(self._qmp, transaction.deletion(now.node, merge))

    async def create_checkpoint(self, parts: Sequence[NewBitmap], quiescing: Quiescing) -> Begun:
        """Make a checkpoint on several disks at one instant."""
        return await pause.uninterrupted(self._create(parts, quiescing))

    async def _create(self, parts: Sequence[NewBitmap], quiescing: Quiescing) -> Begun:
        async with tracking.quiet(self._qmp, quiescing, lambda: self._begin(secrets.token_hex(4))) as quiet:
            moment = await tracking.create(self._qmp, parts)
        window = Window(frozen=quiet.count, frozen_seconds=quiet.seconds, frozen_note=quiet.note)
        return Begun(moment=moment, window=window)

    async def take_back_checkpoint(self, parts: Sequence[NewBitmap]) -> None:
        """Undo `create_checkpoint`, as far as it was done."""
        await pause.uninterrupted(tracking.take_back(self._qmp, parts))

    async def delete_checkpoint(self, parts: Sequence[Doomed]) -> None:
        """Delete a checkpoint on several disks in one transaction."""
        await pause.uninterrupted(tracking.delete(self._qmp, parts))

    async def dirty_sizes(self, unions: Sequence[Union]) -> tuple[int, ...]:
        """Bytes marked in each union of bitmaps."""
        return await pause.uninterrupted(tracking.sizes(self._qmp, secrets.token_hex(4), unions))

    @asynccontextmanager
    async def change_map(self, union: Union) -> AsyncIterator[ChangeMap]:
        """The ranges marked in a union of bitmaps, over NBD."""
        self._require_exports("telling what changed")
        job = self._begin(secrets.token_hex(4))
        end = partial(recovery.forget, job)
        async with recovery.guarded(job), tracking.served(self._qmp, job, union, name=job.record.job, end=end) as found:
            yield found

    async def create_overlays(self, parts: Sequence[NewOverlay]) -> tuple[Overlay, ...]:
        """Put new overlays on disks at one instant, with their checkpoints."""
        return await pause.uninterrupted(overlay.create(self._qmp, parts, has_graph=self.can.graph))

    async def commit_overlay(self, disk: Disk, advance: Advance) -> Committed:
        """Commit a disk's top image into the one below, with its checkpoints."""
        job = self._begin(secrets.token_hex(4))
        async with recovery.guarded(job):
            try:
                done = await overlay.commit(self._qmp, job.record.job, disk, advance, has_graph=self.can.graph)
            except BaseException as error:
                # Of a QEMU that does not answer nobody knows what is left: the record stays for the next run.
                if not isinstance(error, errors.OutcomeUnknown) or not self._qmp.process_lives():
                    recovery.forget(job)
                raise
            recovery.forget(job)
            return done

    def _begin_lasting(self, request: SnapshotRequest) -> state.Job:
        job = self._begin(request.job)
        try:
            ending.begun(job, [part.checkpoint for part in request.disks])
        except BaseException:
            recovery.forget(job)
            raise
        return job

    def _begin(self, job: str) -> state.Job:
        return state.begin_job(
            self._directories,
            job=job,
            socket=self._qmp.socket,
            machine=self.name,
            command=self._command,
            qemu=self._qmp.process,
        )


def _require_private(socket: Path) -> None:
    """A shared NBD server shows the frozen disks to whoever may connect to it."""
    if not socket.is_socket():
        raise errors.UsageError(problem=f"{socket} is no socket of an NBD server")
    others = socket.stat().st_mode & 0o022 and socket.parent.stat().st_mode & 0o011
    if others:
        raise errors.UsageError(problem=f"The NBD server at {socket} is open to other users")


class QemuSnapshot:
    """See `machine.Snapshot`."""

    def __init__(self, context: fleece.Context) -> None:
        self._context = context
        self._disks: tuple[Frozen, ...] = ()
        self._cut: fleece.Cut | None = None
        self._tpm: tuple[TpmState | None, tuple[str, ...]] = None, ()
        self._kept = False
        self._closed = False

    @property
    def disks(self) -> tuple[Frozen, ...]:
        """Where each can be read."""
        return self._disks

    @property
    def window(self) -> Window:
        """How long the machine stood still."""
        return self._cut.window if self._cut else Window()

    @property
    def moment(self) -> datetime:
        """The instant, UTC."""
        assert self._cut is not None, "frozen before it is given out"
        return self._cut.moment

    async def firmware(self) -> tuple[tuple[Firmware, ...], tuple[str, ...]]:
        """The content of the firmware devices."""
        context = self._context
        if not context.capabilities.exports:
            return (), ()
        found, _ = await disks.find(context.monitor, has_graph=context.capabilities.graph)
        return await description.firmware(context.monitor, context.job, found, server=context.request.nbd_server)

    async def tpm(self) -> tuple[TpmState | None, tuple[str, ...]]:
        """The state that the TPM had at the instant."""
        return self._tpm

    def keep(self) -> None:
        """The backup is safe."""
        self._kept = True

    async def freeze(self) -> None:
        """Make the snapshot."""
        seen = await tpm.before(self._context.monitor)
        self._cut = await fleece.freeze(self._context)
        self._tpm = await tpm.after(seen)
        self._disks = await fleece.publish(self._context, self._cut)

    async def last(self, wanted: Wanted, machine: str) -> OpenSnapshot:
        """Make it, to stay when we are gone."""
        self._cut = await fleece.freeze(self._context)
        found = opened.describe(self._context, self._cut, wanted, machine)
        await self._context.quiescer.end()
        if wanted.kind is Kind.PULL:  # it is whole when it is served
            opened.remember(self._context.job, found)
        else:
            ending.stays(self._context.job, found)
        return found

    async def close(self) -> None:
        """Let go of the frozen view now."""
        await pause.uninterrupted(self._sweep())

    async def _sweep(self) -> None:
        if not self._closed:
            still = fleece.stillness(self._context)
            await sweeping.sweep(self._context.monitor, self._context.job, still=still)
            self._closed = True

    async def end(self) -> None:
        """The block was left in good order."""
        await self._context.quiescer.end()
        await self._sweep()
        if not self._kept:
            await self._take_back()
        self._forget()

    async def abandon(self) -> None:
        """Something failed: nothing stays, and what the new checkpoints recorded is merged back."""
        try:
            async with asyncio.timeout(_CLEAN_SECONDS):
                await self._context.quiescer.end()
                if self._context.request.lasting:
                    ending.given_up(self._context.job)
                    await ending.go_on(self._context.monitor, self._context.job, fleece.stillness(self._context))
                    self._closed = True
                await self._sweep()
                if self._cut is not None and not (self._kept or self._context.request.lasting):
                    await self._take_back()
                self._forget()
        except errors.OutcomeUnknown:
            if not self._context.monitor.process_lives():
                recovery.forget(self._context.job)  # QEMU died, and all that was in it
            raise

    def _forget(self) -> None:
        """Nothing is left, so the record goes; unless a thaw is still owed, which the next run tries again."""
        if not self._context.job.record.frozen_agent:
            self._context.job.remove()

    async def _take_back(self) -> None:
        await fleece.take_back(self._context.monitor, self._context.request)


_: type[machine.Machine] = QemuMachine  # the interface is kept, says mypy
