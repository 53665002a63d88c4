"""Staying with what lasts: it is made, shown, kept until somebody asks for its end, and ended well.

What is asked of stopped images lasts only as long as our connection to them, so their commands stay.
Those of a running machine stay if that is wanted, without a connection meanwhile, so that other
commands can use the machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from pullback import errors, state
from pullback.engine.monitor import process_lives
from pullback.flows import exports, jobs, snapshots
from pullback.flows.checkpoints import forget_taken_back
from pullback.flows.jobs import Job
from pullback.flows.opening import Work, on_machine, open_machine
from pullback.machine import Machine
from pullback.model import urls
from pullback.model.documents.backup import Mode
from pullback.model.exports import Served
from pullback.model.snapshots import OpenSnapshot
from pullback.state import history
from pullback.state.serving import Register

T = TypeVar("T")
_LOOK_SECONDS = 0.3
#: So often is a machine opened to ask how far a push is.
_ASK_SECONDS = 1.0
#: So long is another command waited for before the end fails as busy.
_BUSY_SECONDS = 8.0
#: So long may it take from a job's end to the record of it.
_RECORD_SECONDS = 2.0
_ENDED = "it was ended by another command, or its machine has ended"


@dataclass(frozen=True, slots=True)
class Thing(Generic[T]):
    """What a command makes and stays with."""

    begin: Work[T]
    #: End it well; what has ended meanwhile is no error.
    end: Callable[[Machine, state.Directories, T], Awaitable[None]]
    #: None while it is there; else why it is over ("": well). Asked without the machine.
    over: Callable[[T], str | None]
    #: Take it back, as if it had never been.
    undo: Callable[[Machine, state.Directories, T], Awaitable[None]]
    #: Has it come to its good end, so that `end` is due? An interruption before that undoes it, and goes on.
    #: None: it never ends by itself, and an interruption is its good end.
    done: Callable[[Machine], Awaitable[bool]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """The machine, and who works on it."""

    url: urls.Machine
    directories: state.Directories
    command: str
    name: str | None = None
    anonymous: bool = True

    @property
    def off(self) -> bool:
        """Do things last only as long as our connection?"""
        return isinstance(self.url, urls.ImagesMachine)

    async def do(self, work: Work[T], *, command: str | None = None) -> T:
        """One piece of work."""
        command = command or self.command
        return await on_machine(
            self.url, self.directories, work, command=command, name=self.name, anonymous=self.anonymous
        )


async def make(at: At, thing: Thing[T], *, told: Callable[[T], None], wait: bool) -> str:
    """Make it and tell of it. With `wait`, or if the machine is off, stay until a cancellation, and end it then.

    Gives why it was over before that; "" if it ended as it should. A cancellation that ended it well is used up.
    """
    return await _held(at, thing, told) if at.off else await _watched(at, thing, told, wait=wait)


async def _held(at: At, thing: Thing[T], told: Callable[[T], None]) -> str:
    """With the images in our hands all the time."""
    async with open_machine(
        at.url, at.directories, command=at.command, name=at.name, anonymous=at.anonymous
    ) as machine:
        made = await thing.begin(machine, at.directories)
        reason = ""
        try:
            told(made)
            reason = await _end_of(thing, made, machine)
        except asyncio.CancelledError:
            if thing.done is not None:
                await thing.undo(machine, at.directories, made)
                raise
            _use_up()
        await thing.end(machine, at.directories, made)
    return reason


async def _end_of(thing: Thing[T], made: T, machine: Machine) -> str:
    while True:
        if not await machine.alive():
            raise errors.ProgramFailed(program="The storage daemon", status="gone", message="nothing is served now")
        if (reason := thing.over(made)) is not None:
            return reason
        if thing.done is not None and await thing.done(machine):
            return ""
        await asyncio.sleep(_LOOK_SECONDS)


async def _watched(at: At, thing: Thing[T], told: Callable[[T], None], *, wait: bool) -> str:
    """Without a connection meanwhile."""
    made: list[T] = []

    async def begin(machine: Machine, directories: state.Directories) -> None:
        made.append(await thing.begin(machine, directories))

    async def end(machine: Machine, directories: state.Directories) -> None:
        await thing.end(machine, directories, made[0])

    async def undo(machine: Machine, directories: state.Directories) -> None:
        await thing.undo(machine, directories, made[0])

    try:
        await at.do(begin)
        told(made[0])
        reason = await _end_of_running(at, thing, made[0]) if wait else ""
    except asyncio.CancelledError:
        if not made:
            raise
        if thing.done is not None or not wait:
            await _patiently(at, undo)
            raise
        _use_up()
        reason = None
    if reason is None:
        await _patiently(at, end)
    return reason or ""


async def _end_of_running(at: At, thing: Thing[T], made: T) -> str | None:
    """None: it is to be ended now; else it has ended."""

    async def ask(machine: Machine, _: state.Directories) -> bool:
        return thing.done is not None and await thing.done(machine)

    asked = time.monotonic()
    while (reason := thing.over(made)) is None:
        if thing.done is not None and time.monotonic() - asked > _ASK_SECONDS:
            # As a keeper: others wait for us instead of finding it busy.
            with suppress(errors.BusyError, errors.MonitorBusy, errors.NoJob, errors.UnreachableError):
                if await at.do(ask, command=state.KEEPER):
                    return None
            asked = time.monotonic()
        await asyncio.sleep(_LOOK_SECONDS)
    return reason


async def _patiently(at: At, work: Work[None]) -> None:
    """End it, also if another command is at work just now."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return await at.do(work)
        except (errors.BusyError, errors.MonitorBusy):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_LOOK_SECONDS)


def _use_up() -> None:
    """The cancellation has done what it was for."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


# -- the things ------------------------------------------------------------------------------


def a_snapshot(at: At, begin: Work[OpenSnapshot]) -> Thing[OpenSnapshot]:
    """A snapshot alone: ended, it is deleted."""

    async def end(machine: Machine, _: state.Directories, made: OpenSnapshot) -> None:
        with suppress(errors.NoSnapshot):
            await snapshots.delete(machine, made.name)

    async def undo(machine: Machine, places: state.Directories, made: OpenSnapshot) -> None:
        await machine.close_snapshot(made, take_back=True)
        forget_taken_back(places, machine.name, made)

    def over(made: OpenSnapshot) -> str | None:
        return _orphaned(made.owner) if at.off else _gone(at, made.job)

    return Thing(begin=begin, end=end, over=over, undo=undo)


def some_exports(at: At, begin: Work[tuple[Served, ...]]) -> Thing[tuple[Served, ...]]:
    """Exports: ended, they are stopped."""
    machines: list[str] = []

    async def started(machine: Machine, places: state.Directories) -> tuple[Served, ...]:
        machines.append(machine.name)
        return await begin(machine, places)

    async def end(machine: Machine, _: state.Directories, made: tuple[Served, ...]) -> None:
        ids = {served.id for served in made}
        there = [served.name for served in await exports.listing(machine) if served.id in ids]
        if there:
            await exports.stop(machine, there)

    def over(made: tuple[Served, ...]) -> str | None:
        known = Register(at.directories.state, machines[0]).load()
        if known is None or not process_lives(known.qemu):
            return _ENDED
        left = {served.id for served in known.exports}
        return None if any(served.id in left for served in made) else _ENDED

    return Thing(begin=started, end=end, over=over, undo=end)


def a_job(at: At, begin: Work[Job], mode: Mode, owner: str | None = None) -> Thing[Job]:
    """A backup job. A pull that is interrupted was read, and is ended; a push is undone."""

    async def end(machine: Machine, places: state.Directories, made: Job) -> None:
        if await _is_running(machine, made):
            await jobs.end(machine, places)

    async def undo(machine: Machine, places: state.Directories, made: Job) -> None:
        if await _is_running(machine, made):
            await jobs.abort(machine, places)

    async def done(machine: Machine) -> bool:
        return (await jobs.stats(machine)).finished

    gone_since: list[float] = []

    def over(made: Job) -> str | None:
        if at.off:
            return _orphaned(owner)
        reason = _gone(at, made.job)
        if reason is None:
            return None
        ended = history.load(at.directories.state, made.machine)
        if ended is not None and ended.job == made.job:
            return ended.error or ""
        gone_since.append(time.monotonic())  # how it ended is written down last
        return reason if gone_since[-1] - gone_since[0] > _RECORD_SECONDS else None

    return Thing(begin=begin, end=end, over=over, undo=undo, done=done if mode is Mode.PUSH else None)


async def _is_running(machine: Machine, made: Job) -> bool:
    return any(one.job == made.job for one in await machine.snapshots())


def _gone(at: At, job: str) -> str | None:
    """Its record goes when it does, and the keeper sees to that."""
    return None if (at.directories.state / "jobs" / f"{job}.json").exists() else _ENDED


def _orphaned(owner: str | None) -> str | None:
    """Nobody else watches what is made of stopped images."""
    return None if owner is None or process_lives(owner) else "the process that it belonged to has ended"
