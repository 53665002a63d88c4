"""Processes that serve a restore point: started, listened to, ended with us."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket as sockets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path

from pullback import errors, repo
from pullback.extents import Extent
from pullback.flows.repositories import Access, open_for
from pullback.flows.repositories import reading as reading_of
from pullback.model import urls
from pullback.model.points import Point, PointDisk
from pullback.programs import process
from pullback.serve import words
from pullback.units import format_size

#: Seconds until a servant must be ready: it may have to fetch the index of a large repository first.
START_SECONDS = 600.0
#: Descriptors that are inherited have numbers from here on, clear of the one that a listening socket must have.
_FIRST_DESCRIPTOR = 10


class Mishap(StrEnum):
    """What can happen while a restore point is served."""

    #: A range cannot be read: I/O errors there.
    DAMAGED = "damaged"
    #: The repository cannot be reached.
    AWAY = "away"
    #: It can be reached again.
    BACK = "back"
    #: The repository's server makes us wait.
    NOTICE = "notice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Something that happened while a restore point was served."""

    kind: Mishap
    #: The disk, if it is of one.
    target: str | None = None
    extent: Extent | None = None
    #: Why, as a clause.
    reason: str = ""
    #: A sentence for people.
    message: str
    #: UTC.
    at: datetime


#: Is told of troubles, in the event loop's thread.
Told = Callable[[Trouble], None]
#: Starts the program with these two descriptors, of the setup and of the words.
Start = Callable[[int, int], process.Child]


#: Ends the program.
End = Callable[[process.Child], Awaitable[None]]


class Servant:
    """A running process that serves. See `started`."""

    def __init__(self, child: process.Child, reader: asyncio.StreamReader, told: Told) -> None:
        self._child = child
        self._reader = reader
        self._told = told
        self._listening: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    async def ready(self) -> None:
        """Wait until it serves. Raises what kept it from that."""
        while line := await self._line():
            values = words.word(line)
            if values.get("word") == "ready":
                self._listening = asyncio.ensure_future(self._listen())
                return
            if values.get("word") == "failed":
                raise words.failure(values, self._child.name)
            self._hear(values)
        raise await self._death("at its start")

    async def ended(self) -> int:
        """Wait until it ends by itself; gives its exit status."""
        assert self._listening is not None
        await asyncio.shield(self._listening)
        return await asyncio.to_thread(self._child.wait, process.GRACE_SECONDS)

    async def _listen(self) -> None:
        while line := await self._line():
            self._hear(words.word(line))

    async def _line(self) -> bytes:
        """The next line; empty when the process is gone."""
        with suppress(ValueError, OSError):  # too long, or reset
            return await self._reader.readline()
        return b""

    def _hear(self, values: dict[str, object]) -> None:
        trouble = _trouble(values)
        if trouble is not None:
            self._told(trouble)

    async def _death(self, when: str) -> errors.PullbackError:
        code = await asyncio.to_thread(self._child.wait, process.GRACE_SECONDS)
        return errors.ProgramFailed(program=self._child.name, status=f"status {code} {when}", message=self.message())

    def message(self) -> str:
        """What it said on standard error, at its start."""
        return self._child.message()

    async def stop_listening(self) -> None:
        """Nobody is told any more."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})


@asynccontextmanager
async def started(setup: words.Setup, start: Start, told: Told, *, end: End | None = None) -> AsyncIterator[Servant]:
    """A servant that is ready, until the block ends; then it is killed at once, for it writes nothing.

    `end` ends it in another way. It dies with our process, however that ends. Raises what kept it from serving.
    """
    ours, theirs = sockets.socketpair()
    with ours:
        with theirs, _inherited(setup.to_file()) as file, _inherited(os.dup(theirs.fileno())) as channel:
            child = start(file, channel)
        try:
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=words.MAX_LINE)
            servant = Servant(child, reader, told)
            try:
                await asyncio.wait_for(servant.ready(), START_SECONDS)
                yield servant
            finally:
                if end is not None:
                    await end(child)
                child.kill()
                await servant.stop_listening()
                writer.close()
        except TimeoutError as error:
            raise errors.ProgramFailed(
                program=child.name, status=f"not ready within {START_SECONDS:g} s", message=child.message()
            ) from error
        finally:
            child.kill()
            await asyncio.to_thread(child.close)


@contextmanager
def _inherited(descriptor: int) -> Iterator[int]:
    """The same under a number that a child can have it under; the given one is closed."""
    try:
        high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR)
    finally:
        os.close(descriptor)
    try:
        yield high
    finally:
        os.close(high)


# -- what it is given ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """A restore point that nobody removes, in a repository that a servant can open."""

    point: Point
    repository: repo.Repository
    place: urls.Repository
    access: Access

    def setup(self, disks: Sequence[PointDisk], directory: Path, *, cache: int, patient: bool) -> words.Setup:
        """What a servant must know to read these disks. `directory` is private."""
        restic = isinstance(self.repository, repo.ResticRepository)
        return words.Setup(
            repository=self.place.url,
            machine=self.point.machine,
            point=self.point.id,
            targets=tuple(disk.target for disk in disks),
            lent=repo.lending.lend(self.repository) if isinstance(self.repository, repo.ResticRepository) else {},
            environ=_without_passwords(self.access.environ) if restic else {},
            caches=str(self.access.caches),
            directory=str(directory),
            cache=cache,
            patient=patient,
        )


def _without_passwords(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if "PASSWORD" not in name}


@asynccontextmanager
async def lent(place: urls.Repository, access: Access, text: str, machine: str | None = None) -> AsyncIterator[Lent]:
    """A restore point to be served, kept from being removed while the block runs."""
    async with AsyncExitStack() as stack:
        repository = await stack.enter_async_context(open_for(place, access))
        point = await asyncio.to_thread(partial(repository.find, text, machine=machine))
        await stack.enter_async_context(reading_of(repository, point))
        if isinstance(repository, repo.ResticRepository):
            stack.callback(repository.store.hurry)  # who ends does not wait for a server that is away
        yield Lent(point=point, repository=repository, place=place, access=access)


# -- what it says ----------------------------------------------------------------------------


def _trouble(values: dict[str, object]) -> Trouble | None:
    """What a word tells; None for one that is not known."""
    try:
        kind = Mishap(str(values.get("word")))
    except ValueError:
        return None
    at = datetime.now(UTC)
    if kind is Mishap.DAMAGED:
        return _damage(values, at)
    if kind is Mishap.BACK:
        return Trouble(kind=kind, message="The repository is back; reads go on.", at=at)
    if kind is Mishap.NOTICE:
        return Trouble(kind=kind, message=str(values.get("sentence", "")), at=at)
    reason = str(values.get("reason", "")).rstrip(".")
    end = "reads wait until it is back" if values.get("waiting") else "reads fail until it is back"
    return Trouble(kind=kind, reason=reason, message=f"{reason}; {end}.", at=at)


def _damage(values: dict[str, object], at: datetime) -> Trouble | None:
    start, length, target = values.get("start"), values.get("length"), values.get("target")
    if not isinstance(start, int) or not isinstance(length, int) or not isinstance(target, str):
        return None
    reason = str(values.get("reason", ""))
    message = (
        f"disk {target}: the {format_size(length)} at offset {start} cannot be read: {reason}. "
        "Who reads there gets an I/O error."
    )
    return Trouble(
        kind=Mishap.DAMAGED, target=target, extent=Extent(start, length), reason=reason, message=message, at=at
    )
