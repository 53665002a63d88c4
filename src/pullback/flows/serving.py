"""Serving a restore point: each disk an NBD export, read-only, or for writing with the changes kept apart."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

from pullback import errors, state
from pullback.flows import overlaid
from pullback.flows.listening import Listener, check, listening, own_directory
from pullback.flows.repositories import Access
from pullback.flows.servants import Lent, Told, lent, started
from pullback.flows.servants import Mishap as Mishap
from pullback.flows.servants import Trouble as Trouble
from pullback.model import urls
from pullback.model.exports import Listen, ServerAddress
from pullback.model.points import Point, PointDisk
from pullback.programs import process, tls_front
from pullback.progress import Progress, Silent
from pullback.units import MiB

#: Bytes of decoded blocks that are kept, for all disks and clients together.
CACHE = 256 * MiB
#: Fewer are of no use.
LEAST_CACHE = 16 * MiB
#: Sockets between our servers: below the one that does TLS; below and above QEMU's, of the overlays.
_PLAIN, _BELOW, _OVERLAYS = "plain.sock", "point.sock", "overlays.sock"
_LOOK_SECONDS = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.Repository
    access: Access = field(default_factory=Access)
    #: An id, the start of one, `latest`, or a date.
    point: str = "latest"
    machine: str | None = None
    #: Targets; empty: all disks of the point.
    only: tuple[str, ...] = ()
    #: Where the server listens; without a wish, on a private unix socket.
    listen: Listen = field(default_factory=Listen)
    #: Where the private socket goes (`nbd.sock`); None: into a new directory below the runtime directory.
    directory: Path | None = None
    #: Where runtime files go; None: the usual place.
    directories: state.Directories | None = None
    #: Readers wait for a repository that is away; else they get an I/O error after the time-outs.
    patient: bool = False
    #: Bytes of decoded blocks to keep.
    cache: int = CACHE
    #: Clients may write; what they write is kept apart.
    writable: bool = False
    #: A directory for what they write, which stays; None: it is thrown away at the end.
    overlay: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedDisk:
    """A disk that is served."""

    target: str
    size: int
    #: The NBD name.
    export: str
    #: The unix socket; None: it is on TCP.
    socket: Path | None
    #: What an NBD client takes.
    uri: str
    writable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """A process that serves, and how to wait for its end."""

    pid: int
    #: Gives its exit status.
    wait: Callable[[], Awaitable[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A restore point that is served."""

    point: Point
    address: ServerAddress
    disks: tuple[ServedDisk, ...]
    _ends: tuple[_End, ...] = field(repr=False)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that serve."""
        return tuple(end.pid for end in self._ends)

    def disk(self, target: str) -> ServedDisk:
        """One of them; raises `UnknownDisk`."""
        self.point.disk(target)
        for disk in self.disks:
            if disk.target == target:
                return disk
        served = ", ".join(disk.target for disk in self.disks)
        raise errors.UnknownDisk(target=target, where="what is served", known=served)

    async def ended(self) -> NoReturn:
        """Wait until a server ends by itself, and raise `ProgramFailed` then."""
        waits = [asyncio.ensure_future(end.wait()) for end in self._ends]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        code = next(iter(done)).result()
        raise errors.ProgramFailed(
            program="The server of the restore point", status=f"status {code}", message="nothing is served now"
        )


@asynccontextmanager
async def serving(
    request: Request,
    progress: Progress | None = None,
    *,
    told: Told | None = None,
    early: Callable[[Point, ServerAddress], None] | None = None,
) -> AsyncIterator[Served]:
    """Serve disks of a restore point while the block runs.

    `told` hears of damaged ranges and of a repository that is away; without it, `progress.note` does.
    `early` hears of the point as soon as it is found: clients can connect then, and are answered a moment later.
    At the end clients see their connections drop, without an answer to what they asked.

    Errors: as opening a repository and finding a point, `UnknownDisk`, `VerificationFailed`,
    `ProgramMissing`, `ProgramFailed`, `BusyError`, `InsecureExport`, `DestinationExists`,
    `DestinationUnusable` (`overlay`).
    """
    check(request.listen)
    if request.overlay is not None and not request.writable:
        raise errors.UsageError(problem="An overlay is for what clients write, and they may not write")
    places = request.directories or state.directories()
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(own_directory(places, request.directory))
        listener = stack.enter_context(listening(request.listen, directory))
        found = await stack.enter_async_context(
            lent(request.repository, request.access, request.point, request.machine)
        )
        disks = found.point.chosen(request.only)
        if early is not None:
            early(found.point, listener.address)
        making = _Making(
            request=request,
            found=found,
            disks=disks,
            directory=directory,
            places=places,
            told=told or _notes(progress or Silent()),
        )
        ends = await making.servers(stack, listener)
        yield Served(
            point=found.point,
            address=listener.address,
            disks=tuple(_served(disk, listener.address, writable=request.writable) for disk in disks),
            _ends=ends,
        )


def _notes(progress: Progress) -> Told:
    return lambda trouble: progress.note(trouble.message)


def _served(disk: PointDisk, address: ServerAddress, *, writable: bool) -> ServedDisk:
    return ServedDisk(
        target=disk.target,
        size=disk.size,
        export=disk.target,
        socket=Path(address.socket) if address.socket is not None else None,
        uri=address.uri(disk.target),
        writable=writable,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Making:
    """What the servers are made of."""

    request: Request
    found: Lent
    disks: tuple[PointDisk, ...]
    #: Private.
    directory: Path
    places: state.Directories
    told: Told

    async def servers(self, stack: AsyncExitStack, listener: Listener) -> tuple[_End, ...]:
        """Ours, and those of others above it, as they are needed."""
        ends: list[_End] = []
        if self.request.listen.tls is not None:
            plain = self._inner(stack, _PLAIN)
            child = tls_front.start(self.directory / _PLAIN, listener.socket.fileno(), self.request.listen.tls)
            stack.callback(child.close)
            ends.append(_End(pid=child.pid, wait=partial(_ended, child)))
            listener = plain
        ends.append(await self._point_server(stack, listener))
        if self.request.writable:
            ends.append(await self._overlays(stack))
        return tuple(ends)

    def _inner(self, stack: AsyncExitStack, name: str) -> Listener:
        """A socket that is for servers of ours alone."""
        return stack.enter_context(listening(Listen(socket=self.directory / name), self.directory))

    async def _point_server(self, stack: AsyncExitStack, listener: Listener) -> _End:
        setup = self.found.setup(self.disks, self.directory, cache=self.request.cache, patient=self.request.patient)
        most = self.request.listen.max_connections or 0
        words: list[object] = [listener.socket.fileno(), most]
        inherited = [listener.socket.fileno()]
        if self.request.writable:
            below = self._inner(stack, _BELOW).socket.fileno()
            words, inherited = [below, most, listener.socket.fileno(), self.directory / _OVERLAYS], [*inherited, below]
        start = partial(_server, words, inherited)
        servant = await stack.enter_async_context(started(setup, start, self.told))
        return _End(pid=servant.pid, wait=servant.ended)

    async def _overlays(self, stack: AsyncExitStack) -> _End:
        child = await stack.enter_async_context(
            overlaid.served(
                self.found.point,
                self.disks,
                self.directory / _BELOW,
                self.directory / _OVERLAYS,
                chosen=self.request.overlay,
                directories=self.places,
            )
        )
        return _End(pid=child.pid, wait=partial(_ended, child))


def _server(more: Sequence[object], inherited: Sequence[int], setup: int, words: int) -> process.Child:
    argv = [sys.executable, "-m", "pullback.flows.nbd_servant", *map(str, (setup, words, *more))]
    return process.Child(argv, env=process.own_python(), pass_fds=(setup, words, *inherited))


async def _ended(child: process.Child) -> int:
    while True:
        if (code := child.returncode) is not None:
            return code
        await asyncio.sleep(_LOOK_SECONDS)
