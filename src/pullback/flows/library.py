"""The public library: a machine, and every call on it. See docs/api.md.

    async with pullback.connect("qmp:/run/web01.sock") as machine:
        job = await machine.backup_begin({"mode": "pull"}, {"name": "monday"})
        …  # read job.exports with any NBD client
        await machine.backup_end()

While the block runs the machine is locked for us: another pullback gets `BusyError`. What a running
machine was asked for (snapshots, exports, jobs) lasts when the block is left; what was asked of
stopped images ends with it. All calls raise `PullbackError`s, and then leave nothing half done.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from pullback import errors, state
from pullback.flows import checkpoints as checkpoint_flow
from pullback.flows import events as event_flow
from pullback.flows import exports as export_flow
from pullback.flows import given, jobs
from pullback.flows import snapshots as snapshot_flow
from pullback.flows.checkpoints import Changes, Created, Deleted, Info
from pullback.flows.events import Event
from pullback.flows.exports import Access
from pullback.flows.jobs import Job, Stats
from pullback.flows.opening import open_machine
from pullback.flows.snapshots import How
from pullback.machine import Machine as Opened
from pullback.model import urls
from pullback.model.backups import Quiesce, Quiescing
from pullback.model.disks import Disk
from pullback.model.exports import Served
from pullback.model.snapshots import OpenSnapshot
from pullback.model.tree import Checkpoint, Tree
from pullback.state.history import EndedJob

P = ParamSpec("P")
T = TypeVar("T")
_ABSENT = Quiescing(wish=Quiesce.NO)
_POLL_SECONDS = 0.2
_RELIEF_SECONDS = 1.0


@asynccontextmanager
async def connect(
    uri: str, *, name: str | None = None, state_dir: Path | None = None, command: str = "a program"
) -> AsyncIterator[Machine]:
    """A machine: `qmp:/run/web01.sock`, or `images:vda=/srv/a.qcow2,vdb=/srv/b.raw`.

    `name`: instead of QEMU's own; images need one to be found again. `command`: what others are told who get
    "busy". Raises `BadUrl`, `BusyError`, `UnreachableError`, `PermissionDenied`, `MonitorBusy`,
    `NotQmp`, `ForeignManager`, `ImageUnusable`.
    """
    directories = state.directories(state_dir)
    url = urls.machine(uri)
    async with open_machine(url, directories, command=command, name=name, anonymous=True) as opened:
        machine = Machine(opened, directories, asyncio.Lock())
        async with _relieved(machine):
            yield machine


@asynccontextmanager
async def _relieved(machine: Machine) -> AsyncIterator[None]:
    """While the block runs no keeper can get at the machine, so we look after its scratch ourselves."""
    watching = asyncio.create_task(machine._relieve(), name="relieve")
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait({watching})


def _in_turn(
    call: Callable[Concatenate[Machine, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Machine, P], Coroutine[Any, Any, T]]:
    """One call at a time, also where a program makes several at once."""

    async def waiting(machine: Machine, /, *args: P.args, **options: P.kwargs) -> T:
        async with machine._turn:
            return await call(machine, *args, **options)

    return functools.update_wrapper(waiting, call)


def watch(
    uri: str,
    *,
    name: str | None = None,
    state_dir: Path | None = None,
    interval: float = 1.0,
    threshold: float = event_flow.THRESHOLD,
) -> AsyncIterator[Event]:
    """What others do on a machine: as `Machine.events`, but the machine is opened for each look only.

    A look that finds it busy gives one `busy` event. Raises `BadUrl` at once, and at the first event
    what keeps the first look from seeing the machine.
    """
    look = event_flow.observing(urls.machine(uri), state.directories(state_dir), name)
    return event_flow.follow(look, interval=interval, threshold=threshold)


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that is open. Made by `connect`."""

    _machine: Opened
    _directories: state.Directories = field(repr=False)
    _turn: asyncio.Lock = field(repr=False)

    @property
    def name(self) -> str:
        """Its identity."""
        return self._machine.name

    @property
    def version(self) -> str:
        """Its hypervisor's version, for people."""
        return self._machine.version

    @_in_turn
    async def disks(self) -> tuple[Disk, ...]:
        """All block devices, with what can be done with each."""
        return await self._machine.disks()

    @_in_turn
    async def info(self) -> dict[str, object]:
        """State, capabilities and what runs, as JSON values."""
        return dict(await self._machine.facts())

    # -- checkpoints -------------------------------------------------------------------------

    @_in_turn
    async def checkpoint_create(
        self, document: given.Checkpoint | None = None, *, quiescing: Quiescing = _ABSENT
    ) -> Created:
        """Begin to track changes from now on, on all disks that can be tracked or those that the document names.

        Raises `CheckpointExists`, `BadDocument`, `Unsupported`, `BusyError`, `QuiesceFailed`.
        """
        wish = None if document is None else given.a_checkpoint(document)
        return await checkpoint_flow.create(self._machine, self._directories, wish, quiescing=quiescing)

    @_in_turn
    async def checkpoint_list(self, *, sizes: bool = False) -> Tree:
        """All checkpoints as a tree: roots, leaves, children, descendants, topological order.

        `sizes`: with the exact bytes changed since each, on each disk.
        """
        return await checkpoint_flow.listing(self._machine, self._directories, sizes=sizes)

    @_in_turn
    async def checkpoint_info(self, name: str, *, sizes: bool = False) -> Info:
        """One checkpoint, with its document. Raises `NoCheckpoint`."""
        return await checkpoint_flow.info(self._machine, self._directories, name, sizes=sizes)

    @_in_turn
    async def checkpoint_current(self) -> Checkpoint:
        """The newest. Raises `NoCheckpoint`."""
        return await checkpoint_flow.current(self._machine, self._directories)

    @_in_turn
    async def checkpoint_parent(self, name: str) -> Checkpoint:
        """The one before. Raises `NoCheckpoint`."""
        return await checkpoint_flow.parent(self._machine, self._directories, name)

    @_in_turn
    async def checkpoint_delete(
        self, name: str, *, children: bool = False, children_only: bool = False, metadata_only: bool = False
    ) -> Deleted:
        """Delete one, merged into the one before: no other loses a change. Raises `NoCheckpoint`, `BusyError`."""
        return await checkpoint_flow.delete(
            self._machine,
            self._directories,
            name,
            children=children,
            children_only=children_only,
            metadata_only=metadata_only,
        )

    @_in_turn
    async def checkpoint_redefine(self, document: given.Checkpoint, *, validate: bool = True) -> Info:
        """Put a document back. `validate`: its bitmaps must be there and sound, else `CheckpointInconsistent`."""
        wish = given.a_checkpoint(document)
        return await checkpoint_flow.redefine(self._machine, self._directories, wish, validate=validate)

    @_in_turn
    async def changes(self, target: str, *, since: str, until: str | None = None) -> Changes:
        """The ranges of a disk that changed between two checkpoints, or since one. In bytes, whole granules.

        Raises `UnknownDisk`, `NoCheckpoint`, `CheckpointInconsistent`.
        """
        return await checkpoint_flow.changes(self._machine, self._directories, target, since, until)

    # -- snapshots ---------------------------------------------------------------------------

    @_in_turn
    async def snapshot_create(
        self,
        document: given.Snapshot | None = None,
        checkpoint: given.Checkpoint | None = None,
        *,
        how: How | None = None,
        name: str | None = None,
    ) -> OpenSnapshot:
        """Freeze disks at one instant, with a checkpoint if a document of one is given ({} for a default one).

        Raises `SnapshotExists`, `BadDocument`, `DiskBusy`, `ScratchSpace`, `ScratchUnsuitable`, `Unsupported`,
        `CheckpointExists`, `QuiesceFailed`.
        """
        return await snapshot_flow.create(
            self._machine,
            self._directories,
            None if document is None else given.a_snapshot(document),
            None if checkpoint is None else given.a_checkpoint(checkpoint),
            how=how,
            name=name,
        )

    @_in_turn
    async def snapshot_list(self) -> tuple[OpenSnapshot, ...]:
        """The snapshots that are there, oldest first (those of jobs aside)."""
        return await snapshot_flow.listing(self._machine)

    @_in_turn
    async def snapshot_info(self, name: str) -> OpenSnapshot:
        """One of them. Raises `NoSnapshot`."""
        return await snapshot_flow.find(self._machine, name)

    @_in_turn
    async def snapshot_delete(self, name: str) -> OpenSnapshot:
        """Let go of it, its exports and its scratch. Its checkpoint stays. Raises `NoSnapshot`, `CleanupIncomplete`."""
        return await snapshot_flow.delete(self._machine, name)

    # -- exports -----------------------------------------------------------------------------

    @_in_turn
    async def export_start(self, document: given.Export, *, access: Access | None = None) -> tuple[Served, ...]:
        """Serve snapshots (read-only) or disks over NBD: all that the document names, or nothing.

        Raises `BadDocument`, `NoSnapshot`, `CheckpointInconsistent`, `NbdServerBusy`, `InsecureExport`,
        `ExportExists`, `DiskBusy`, `Unsupported`.
        """
        return await export_flow.start(self._machine, given.an_export(document), access)

    @_in_turn
    async def export_list(self) -> tuple[Served, ...]:
        """What is served, those of jobs too, each with its URI."""
        return await export_flow.listing(self._machine)

    @_in_turn
    async def export_stop(self, names: Sequence[str] = ()) -> tuple[Served, ...]:
        """Stop exports (none named: all that belong to no job), also under clients. Raises `NoExport`."""
        return await export_flow.stop(self._machine, names)

    # -- backup jobs -------------------------------------------------------------------------

    @_in_turn
    async def backup_begin(
        self,
        backup: given.Backup,
        checkpoint: given.Checkpoint | None = None,
        *,
        how: How | None = None,
        access: Access | None = None,
        reuse: bool = False,
        speed: int | None = None,
    ) -> Job:
        """Begin a job, as virDomainBackupBegin does: pull (served over NBD) or push (QEMU writes destinations).

        `reuse`: targets and scratch are there already; `speed`: bytes a second for each disk of a push.
        Raises `BusyError`, `BadDocument`, `NoCheckpoint`, `CheckpointInconsistent`, and what snapshots, exports
        and destinations do.
        """
        return await jobs.begin(
            self._machine,
            self._directories,
            given.a_backup(backup),
            None if checkpoint is None else given.a_checkpoint(checkpoint),
            how=how,
            access=access,
            reuse=reuse,
            speed=speed,
        )

    @_in_turn
    async def backup_info(self) -> Job:
        """The job that is under way. Raises `NoJob`."""
        return await jobs.info(self._machine)

    @_in_turn
    async def backup_stats(self) -> Stats:
        """How far it is. Raises `NoJob`."""
        return await jobs.stats(self._machine)

    @_in_turn
    async def backup_last(self) -> EndedJob | None:
        """How the last job ended; None if there was none."""
        return jobs.last(self._machine, self._directories)

    async def backup_wait(self, *, job: str | None = None, timeout: float | None = None) -> EndedJob | None:
        """Wait for the end of a push, and end it; None after `timeout` seconds.

        `job`: no other is meant, and if the keeper was first, how it ended is told. Raises as `backup_end`, and
        `UsageError` for a pull, which never ends by itself.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            async with self._turn:
                if await jobs.is_over(self._machine, job=job):
                    return await jobs.end(self._machine, self._directories, job=job)
            if deadline is not None and time.monotonic() >= deadline:
                return None
            await asyncio.sleep(_POLL_SECONDS)

    @_in_turn
    async def backup_end(self, *, job: str | None = None) -> EndedJob:
        """End it well; its checkpoint stays. `job`: no other is meant, and it may have ended already.

        Raises `NoJob`, `BusyError` (a push that still copies), and what made a push fail (all is undone then).
        """
        return await jobs.end(self._machine, self._directories, job=job)

    @_in_turn
    async def backup_abort(self) -> EndedJob:
        """End it as if it had never been. Raises `NoJob`, `CleanupIncomplete`."""
        return await jobs.abort(self._machine, self._directories)

    @_in_turn
    async def backup_set_speed(self, speed: int | None) -> None:
        """Limit each disk of a push to so many bytes a second; None: no limit. Raises `NoJob`."""
        await jobs.set_speed(self._machine, speed)

    @_in_turn
    async def backup_pause(self) -> None:
        """Let a push rest. Raises `NoJob`."""
        await jobs.pause(self._machine)

    @_in_turn
    async def backup_resume(self) -> None:
        """Let a push go on. Raises `NoJob`."""
        await jobs.resume(self._machine)

    # -- events ------------------------------------------------------------------------------

    def events(self, *, interval: float = 1.0, threshold: float = event_flow.THRESHOLD) -> AsyncIterator[Event]:
        """What happens on the machine, looked at every `interval` seconds, until it is gone.

        The machine is ours meanwhile, so this tells what we do ourselves, and what QEMU does; `watch` tells of others.
        `threshold`: part of a disk's size; a scratch that takes more of it is told of once.
        """

        async def look() -> event_flow.Seen:
            async with self._turn:
                return await event_flow.look(self._machine, self._directories)

        return event_flow.follow(look, interval=interval, threshold=threshold)

    async def _relieve(self) -> None:
        while True:
            await asyncio.sleep(_RELIEF_SECONDS)
            with suppress(errors.PullbackError):  # it is tried again, and by the keeper
                async with self._turn:
                    await self._machine.relieve()
