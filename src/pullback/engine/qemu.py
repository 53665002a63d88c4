"""A QEMU process as a machine, by its QMP socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from pullback import errors, machine, state
from pullback.engine import (
    capabilities,
    disks,
    fleece,
    guard,
    jobs,
    monitor,
    pause,
    recovery,
    replies,
    scratch,
    transaction,
)
from pullback.engine import exports as block_exports
from pullback.engine import sweep as sweeping
from pullback.engine.quiesce import Quiescer
from pullback.engine.undoing import despite
from pullback.model import checkpoints
from pullback.model.backups import Frozen, SnapshotRequest, Window
from pullback.model.disks import Disk

_NO_UUID = "00000000-0000-0000-0000-000000000000"
#: How long cleaning up may take before we give the terminal back (SIGTERM: 10 s in all).
_CLEAN_SECONDS = 9.0


@asynccontextmanager
async def connect(
    socket: Path, directories: state.Directories, *, command: str, name: str | None = None, anonymous: bool = False
) -> AsyncIterator[QemuMachine]:
    """The machine behind a QMP socket, locked for us, with what dead jobs left in it removed.

    `name` is used instead of QEMU's own; `anonymous` lets a machine without any pass.

    Raises `BusyError` if another pullback works on it, the monitor's errors, `MachineUnnamed`,
    `ForeignManager`.
    """
    socket = socket.absolute()
    with ExitStack() as locks:
        # By socket first: a second client would hang on it without a greeting.
        title = f"the machine at {socket}"
        locks.enter_context(state.lock(directories, f"socket {socket.resolve()}", command=command, title=title))
        async with _connected(socket, directories) as qmp:
            await _refuse_foreign(qmp)
            identity = name or await _identity(qmp, socket if anonymous else None)
            locks.enter_context(state.lock(directories, f"machine {identity}", command=command, title=identity))
            found = QemuMachine(qmp, directories, identity, command)
            found.cleared = await _recover(qmp, directories, identity)
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


async def _refuse_foreign(qmp: monitor.Monitor) -> None:
    nodes = replies.objects(await qmp.execute("query-named-block-nodes", {"flat": True}), "nodes")
    if any(replies.optional_text(node, "node-name").startswith("libvirt-") for node in nodes):
        raise errors.ForeignManager(socket=str(qmp.socket), manager="libvirt")


async def _identity(qmp: monitor.Monitor, instead: Path | None) -> str:
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


async def _recover(qmp: monitor.Monitor, directories: state.Directories, identity: str) -> list[str]:
    """Remove what dead jobs left in this QEMU and on disk; gives their ids."""
    left = state.jobs_of(directories, socket=qmp.socket, machine=identity)
    known = {job.record.job for job in left}
    for stray in await recovery.strays(qmp):
        if stray not in known:  # its record was lost: the names alone must do
            left.append(
                state.begin_job(directories, job=stray, socket=qmp.socket, machine=identity, command="recovery")
            )
    for job in left:
        await recovery.clear(qmp, job)
    return [job.record.job for job in left]


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
        job = state.begin_job(
            self._directories,
            job=request.job,
            socket=self._qmp.socket,
            machine=self.name,
            command=self._command,
            qemu=self._qmp.process,
        )
        async with _guarded(job) as watcher:
            context = fleece.Context(
                monitor=self._qmp,
                capabilities=self.can,
                job=job,
                guard=watcher,
                quiescer=Quiescer(self._qmp, job, watcher, request.quiescing),
                request=request,
            )
            made = QemuSnapshot(context)
            try:
                await pause.uninterrupted(made.freeze())
                yield made
            except BaseException as error:
                await despite(error, made.abandon())
                raise
            await pause.uninterrupted(made.end())

    def _require(self, request: SnapshotRequest) -> None:
        if not self.can.exports:
            raise errors.Unsupported(what="a backup", reason=f"QEMU {self.can.version} is older than 5.2")
        if request.nbd_server is not None:
            _require_private(request.nbd_server)

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


@asynccontextmanager
async def _guarded(job: state.Job) -> AsyncIterator[guard.Guard]:
    """A guard over the job while the block runs. Without one nothing was begun, so nothing is recorded."""
    async with AsyncExitStack() as stack:
        try:
            watcher = await stack.enter_async_context(guard.guarding(job))
        except BaseException:
            recovery.forget(job)
            raise
        yield watcher


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

    def keep(self) -> None:
        """The backup is safe."""
        self._kept = True

    async def freeze(self) -> None:
        """Make the snapshot."""
        self._cut = await fleece.freeze(self._context)
        self._disks = await fleece.publish(self._context, self._cut)

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
                await self._sweep()
                if self._cut is not None and not self._kept:
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
