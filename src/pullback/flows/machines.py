"""Looking at a machine, and removing every trace of ours from it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field

from pullback import errors, state
from pullback.flows import jobs
from pullback.flows.opening import open_machine
from pullback.machine import Machine
from pullback.model import checkpoints, urls
from pullback.model.disks import Disk
from pullback.model.snapshots import OpenSnapshot
from pullback.state import checkpoints as saved


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Which machine."""

    machine: urls.Machine
    name: str | None = None
    directories: state.Directories = field(default_factory=state.directories)


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What a machine is and can."""

    facts: Mapping[str, object]
    disks: tuple[Disk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Untracked:
    """What was removed."""

    machine: str
    #: Bitmaps removed, by target.
    bitmaps: Mapping[str, tuple[str, ...]]
    #: Checkpoints whose documents were removed.
    documents: tuple[str, ...]
    #: Dead jobs that were cleared away.
    jobs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What was found of earlier commands."""

    machine: str
    #: False: nothing listens at its socket any more, so only files could be left.
    running: bool
    #: Ids of dead jobs whose leftovers were removed.
    cleared: tuple[str, ...]
    #: Snapshots, jobs and exports that last, and were adopted.
    adopted: tuple[OpenSnapshot, ...]
    #: They were ended, as was asked for.
    ended: bool
    #: Names of disks' own exports among them.
    exports: tuple[str, ...]


def _machine(request: Request, command: str) -> AbstractAsyncContextManager[Machine]:
    return open_machine(request.machine, request.directories, command=command, name=request.name, anonymous=True)


async def info(request: Request) -> Info:
    """Capabilities and disks. What dead jobs left is cleared away first, as by every command."""
    async with _machine(request, "info") as machine:
        return Info(facts=await machine.facts(), disks=await machine.disks())


async def untrack(request: Request) -> Untracked:
    """Remove every bitmap, document, node, job, snapshot and export of ours; the next backup reads everything.

    Raises `BusyError` while somebody uses one of the bitmaps.
    """
    async with _machine(request, "untrack") as machine:
        await _end_all(machine, request.directories)
        removed: dict[str, tuple[str, ...]] = {}
        for disk in await machine.disks():
            ours = tuple(bitmap.name for bitmap in disk.bitmaps if bitmap.name.startswith(checkpoints.PREFIX))
            busy = [bitmap.name for bitmap in disk.bitmaps if bitmap.name in ours and bitmap.busy]
            if busy:
                raise errors.BusyError(what=f"bitmap {busy[0]} of {disk.target}", holder="a job or an export uses it")
            if ours:
                await machine.drop_bitmaps(disk, ours)
                removed[disk.target] = ours
        documents = saved.clear(request.directories, machine.name)
        return Untracked(machine=machine.name, bitmaps=removed, documents=documents, jobs=tuple(machine.cleared))


async def recover(request: Request, *, end: bool = False) -> Recovered:
    """Find what earlier commands left: what is dead is removed, what lasts is shown, and ended with `end`.

    A machine that is gone is no error here: then the files of its jobs are removed.
    """
    before = _recorded(request)
    try:
        async with _machine(request, "recover") as machine:
            adopted = await machine.snapshots()
            exports = tuple(served.name for served in await machine.served())
            if end:
                await _end_all(machine, request.directories)
            return Recovered(
                machine=machine.name,
                running=True,
                cleared=tuple(machine.cleared),
                adopted=adopted,
                ended=end,
                exports=exports,
            )
    except errors.UnreachableError:
        if not before:
            raise
        cleared = tuple(sorted(set(before) - set(_recorded(request))))
        name = before[cleared[0]] if cleared else next(iter(before.values()))
        return Recovered(machine=name, running=False, cleared=cleared, adopted=(), ended=end, exports=())


def _recorded(request: Request) -> Mapping[str, str]:
    """Ids of the jobs that are recorded for a socket, with their machines."""
    if not isinstance(request.machine, urls.QmpMachine):
        return {}
    found = state.jobs_of(request.directories, socket=request.machine.socket.absolute(), machine="")
    return {job.record.job: job.record.machine for job in found}


async def _end_all(machine: Machine, directories: state.Directories) -> None:
    """End everything that lasts: jobs as if they had never been, exports, snapshots."""
    with suppress(errors.NoJob):
        await jobs.abort(machine, directories)
    await machine.unserve(await machine.served())
    for snapshot in await machine.snapshots():
        await machine.close_snapshot(snapshot, take_back=False)
