"""Looking at a machine, and removing every trace of ours from it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from pullback import errors, state
from pullback.flows.opening import open_machine
from pullback.machine import Machine
from pullback.model import checkpoints, urls
from pullback.model.disks import Disk
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


def _machine(request: Request, command: str) -> AbstractAsyncContextManager[Machine]:
    return open_machine(request.machine, request.directories, command=command, name=request.name, anonymous=True)


async def info(request: Request) -> Info:
    """Capabilities and disks. What dead jobs left is cleared away first, as by every command."""
    async with _machine(request, "info") as machine:
        return Info(facts=await machine.facts(), disks=await machine.disks())


async def untrack(request: Request) -> Untracked:
    """Remove every bitmap, document, node, job and export of ours; the next backup reads everything.

    Raises `BusyError` while somebody uses one of the bitmaps.
    """
    async with _machine(request, "untrack") as machine:
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
