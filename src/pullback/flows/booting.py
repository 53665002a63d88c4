"""Instant restore: a machine starts from a restore point at once, while its disks are filled behind it.

    repository ─► server of the restore point ─► QEMU: an overlay for each disk, to which the guest writes
                                                  ▲
                         we have it read ahead ───┘   when an overlay holds all, nothing lies below it any more

The machine does not depend on us. When we die, or the repository is away, what it reads of the restore point
waits, and what it writes is safe in its overlays; the same command again goes on. See `state.boots` for what
lies where.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pullback import errors, repo, state
from pullback.engine import monitor
from pullback.flows import bootmachine, serving
from pullback.flows.bootfilling import Filler
from pullback.flows.bootmachine import Plan, Presence
from pullback.flows.bootmachine import Wishes as Wishes
from pullback.flows.bootserver import Supply, supplied
from pullback.flows.repositories import Access
from pullback.flows.threads import entered
from pullback.model import urls
from pullback.model.devices import Role
from pullback.model.hardware import Hardware, LeftOut, Link, Network
from pullback.model.points import Point
from pullback.model.texts import showable
from pullback.programs import launching, qemu, storage_daemon
from pullback.programs.launching import Kernel as Kernel
from pullback.progress import Progress, Silent
from pullback.state.boots import Berth, Boot

#: How often we look whether the machine is there.
_LOOK_SECONDS = 0.5
#: Seconds after something went wrong beside a running machine, before it is tried again: at first, at most.
_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE = 5.0
_OFF = "off"
#: Seconds: a guest boots meanwhile, and its reads do not wait behind ours.
FILL_AFTER = 10.0
_ID = re.compile(r"[0-9a-f]{8,64}|[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")


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
    #: The directory in which its disks are from now on.
    to: Path
    wishes: Wishes = field(default_factory=Wishes)
    #: Start QEMU; else the command is only told, and whoever wants starts it.
    start: bool = True
    #: Seconds that the machine has for itself after its start, before its disks are filled.
    fill_after: float = FILL_AFTER
    #: Bytes of the disks a second that are filled at most; None: no limit.
    rate: int | None = None
    directories: state.Directories | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A machine that runs, or can be started."""

    point: Point
    name: str
    #: The QEMU process; None: it is started by somebody else.
    pid: int | None
    #: It was running already when we came.
    resumed: bool
    #: Its monitor, for `pullback` and others.
    monitor: Path
    #: The guest agent's socket, and that of a VNC server, if it has them.
    agent: Path | None
    screen: Path | None
    console: Path
    #: The command that starts it.
    script: Path
    words: tuple[str, ...]
    images: dict[str, Path]
    left_out: tuple[LeftOut, ...]
    accel: str
    network: str
    #: From the beginning of the command, in seconds.
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A disk at the end."""

    target: str
    path: Path
    size: int
    #: Bytes of the restore point that are not zero.
    data: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of it: the disks are whole."""

    started: Started
    disks: tuple[Filled, ...]
    #: The machine still runs.
    runs: bool
    seconds: float


#: Hears of the machine as soon as it runs.
Told = Callable[[Started], None]


async def boot(request: Request, progress: Progress | None = None, *, told: Told | None = None) -> Report:
    """Start a machine from a restore point, and fill its disks; returns when they need it no more.

    Called again with the same `to`, it goes on where an earlier call was interrupted: a machine that runs is
    left alone, one that ended is started again.

    Raises `DestinationUnusable`, `BusyError` (another call works there), `NotEnoughMemory`, `ProgramFailed` (QEMU
    does not start), `VerificationFailed` (damaged ranges; only when the machine has ended, which gets I/O errors
    for just them), and as `serving.serving`. Until the machine runs nothing is left of a failure.
    """
    if request.wishes.accel not in (None, "kvm", "tcg"):
        raise errors.UsageError(problem=f"{request.wishes.accel!r} is no way to run processors; there are kvm and tcg")
    directories = request.directories or state.directories()
    berth = Berth(request.to.absolute(), directories.runtime)
    what = f"boot {berth.directory}"
    async with entered(state.lock(directories, what, command="boot", title=str(berth.directory))):
        work = _Work(request, directories, berth, progress or Silent(), told or (lambda started: None))
        return await work.done()


def network(text: str) -> Network:
    """What a user calls a network: none, isolated, user, bridge=NAME. Raises `UsageError`."""
    kind, equals, name = text.partition("=")
    if kind == Link.BRIDGE and equals:
        return launching.bridge(name)
    if equals or kind not in (Link.NONE, Link.ISOLATED, Link.USER):
        raise errors.UsageError(problem=f"{text!r} is no network; there are none, isolated, user and bridge=NAME")
    return Network(link=Link(kind))


class _Work:
    """One call."""

    def __init__(
        self, request: Request, directories: state.Directories, berth: Berth, progress: Progress, told: Told
    ) -> None:
        self._begun = time.monotonic()
        self._request = request
        self._directories = directories
        self._berth = berth
        self._progress = progress
        self._told = told
        self._presence = Presence(berth)
        #: What is removed if the machine does not come to run; None: nothing, somebody may rely on it.
        self._removable: tuple[str, ...] | None = None

    async def done(self) -> Report:
        """All of it."""
        known = self._berth.load()
        if known is not None:
            self._same(known)
            self._presence = Presence(self._berth, known.qemu)
        offers = asyncio.ensure_future(self._offers())
        made = not self._berth.directory.exists()
        async with AsyncExitStack() as stack:
            stack.callback(offers.cancel)
            try:
                bootmachine.prepare(self._berth)
                supply = await stack.enter_async_context(supplied(self._serving(known), self._progress))
                boot, plan = await self._made(supply, known, offers)
                started = await self._started(supply, boot, plan)
            except BaseException:
                await stack.aclose()
                await asyncio.to_thread(self._undo, made and known is None)
                raise
            self._told(started)
            try:
                report = await self._filled(plan, started)
            except asyncio.CancelledError as error:
                error.add_note(self._left_running(started))
                raise
        bootmachine.settle(self._berth, runs=report.runs)
        return report

    def _same(self, known: Boot) -> None:
        """What was begun here is gone on with."""
        wish = self._request.point
        if _ID.fullmatch(wish) and not known.point.startswith(wish):
            raise errors.UsageError(
                problem=f"{self._berth.directory} holds a machine that was booted from restore point {known.point}"
            )
        self._progress.note(f"going on with restore point {known.point}, from which {known.name} was booted here")

    def _serving(self, known: Boot | None) -> serving.Request:
        request = self._request
        return serving.Request(
            repository=request.repository,
            access=request.access,
            point=known.point if known else request.point,
            machine=request.machine,
            only=known.targets if known else request.only,
            directory=self._berth.served,
            directories=self._directories,
            patient=True,
        )

    async def _offers(self) -> launching.Offers | None:
        """What the QEMU of this host has: asked for while the repository is opened."""
        with suppress(errors.ProgramMissing):
            program = launching.path_of(qemu.architecture())
            return await asyncio.to_thread(launching.offers, program, self._directories.cache)
        return None

    def _undo(self, made: bool) -> None:
        if self._removable is not None:
            bootmachine.remove(self._berth, self._removable)
        if made:
            bootmachine.leave(self._berth)

    # -- making it -----------------------------------------------------------------------

    async def _made(
        self, supply: Supply, known: Boot | None, offers: asyncio.Future[launching.Offers | None]
    ) -> tuple[Boot, Plan]:
        request, point, berth = self._request, supply.point, self._berth
        disks = point.chosen(known.targets if known else request.only)
        found = bootmachine.hardware(point, disks, request.wishes, known)
        if request.wishes.memory is None and self._presence.pid() is None:
            bootmachine.require_memory(found)
        program = launching.program(found)
        offered = await offers
        if offered is None or offered.program != program:
            offered = await asyncio.to_thread(launching.offers, program, self._directories.cache)
        boot = known or self._begin(point, found, [disk.target for disk in disks])
        kept = await asyncio.to_thread(bootmachine.kept, request.repository, request.access, point)
        await bootmachine.overlays(berth, disks, supply.socket)
        plan = await asyncio.to_thread(
            partial(bootmachine.plan, found, request.wishes, berth, offered, kept=kept, served=supply.socket)
        )
        bootmachine.write_script(berth, plan.words, tpm=plan.tpm)
        return boot, plan

    def _begin(self, point: Point, found: Hardware, targets: Sequence[str]) -> Boot:
        """Nothing of the kind is there: write down what is going to be made."""
        bootmachine.refuse_existing(self._berth, targets)
        self._removable = tuple(targets)
        boot = Boot(
            point=point.id,
            repository=showable(self._request.repository.url),
            targets=tuple(targets),
            name=found.name,
            uuid=found.uuid,
            macs=bootmachine.macs(found),
        )
        self._berth.save(boot)
        return boot

    async def _started(self, supply: Supply, boot: Boot, plan: Plan) -> Started:
        berth = self._berth
        pid = await asyncio.to_thread(self._presence.pid)
        resumed = pid is not None
        if pid is None and self._request.start:
            token = await _both(bootmachine.start(berth, plan), supply.ready)
            self._removable = None
            berth.save(replace(boot, qemu=token))
            self._presence = Presence(berth, token)
            pid = self._presence.pid()
        await supply.ready
        self._removable = None
        return Started(
            point=supply.point,
            name=plan.hardware.name,
            pid=pid,
            resumed=resumed,
            monitor=berth.monitor,
            agent=berth.agent if plan.hardware.has_agent else None,
            screen=berth.screen if plan.hardware.of(Role.DISPLAY) else None,
            console=berth.console,
            script=berth.script,
            words=plan.words,
            images={place.target: place.image for place in plan.places},
            left_out=plan.left_out,
            accel=launching.accelerator(plan.hardware, self._request.wishes.accel),
            network=str(self._request.wishes.network),
            seconds=time.monotonic() - self._begun,
        )

    def _left_running(self, started: Started) -> str:
        again = f"until `pullback boot` is run again with --to {self._berth.directory}"
        if self._presence.pid() is None:
            return f"the disks of {started.name} are not whole, and cannot be used {again}"
        return f"{started.name} was left running; what it reads of its restore point waits {again}"

    # -- filling it ----------------------------------------------------------------------

    async def _filled(self, plan: Plan, started: Started) -> Report:
        filler = Filler(
            plan.places,
            machine=started.name,
            directories=self._directories,
            progress=self._progress,
            limiter=repo.Limiter(self._request.rate) if self._request.rate else None,
        )
        if not started.resumed:
            await self._leave_alone(started)
        await self._until_filled(filler, started)
        if filler.lost:
            await self._until_ended(filler, started)
        runs = await asyncio.to_thread(self._presence.pid) is not None
        bootmachine.write_script(self._berth, plan.alone, tpm=plan.tpm)
        self._berth.forget()
        return Report(
            started=started,
            disks=tuple(
                Filled(
                    target=place.target,
                    path=place.image,
                    size=started.point.disk(place.target).size,
                    data=filler.data.get(place.target, 0),
                )
                for place in plan.places
            ),
            runs=runs,
            seconds=time.monotonic() - self._begun,
        )

    async def _leave_alone(self, started: Started) -> None:
        """The machine has its restore point for itself while it boots."""
        until = time.monotonic() + self._request.fill_after
        while (left := until - time.monotonic()) > 0 and started.pid is not None:
            await asyncio.sleep(min(left, _LOOK_SECONDS))
            if await asyncio.to_thread(self._presence.pid) is None:
                return

    async def _until_filled(self, filler: Filler, started: Started) -> None:
        """In the machine as long as it runs, then without it. Beside a running machine no failure is final."""
        pause, told, seen = _PAUSE_SECONDS, "", started.pid is not None
        while True:
            there = await asyncio.to_thread(self._presence.pid) is not None
            if not there and not seen:
                await asyncio.sleep(_LOOK_SECONDS)  # somebody will start it
                continue
            if not there and told != _OFF:
                told = _OFF
                self._progress.note(f"{started.name} has ended; its disks are filled all the same")
            seen = True
            try:
                async with self._opened(filler, there) as qmp:
                    return await filler.fill(qmp)
            except errors.PullbackError as error:
                if not there and not _locked(error):
                    raise
                if await asyncio.to_thread(self._presence.pid) is not None and str(error) != told:
                    told = str(error)
                    self._progress.note(f"filling was interrupted, and is tried again: {told}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    @asynccontextmanager
    async def _opened(self, filler: Filler, there: bool) -> AsyncIterator[monitor.Monitor]:
        """The machine's monitor, or that of a storage daemon that has its disks open."""
        if there:
            async with monitor.connect(self._berth.own_monitor) as qmp:
                yield qmp
            return
        with storage_daemon.start(self._berth.runtime / "daemon.sock") as daemon:
            await asyncio.to_thread(daemon.wait_ready)
            async with monitor.connect(daemon.qmp) as qmp:
                for node in filler.nodes():
                    await qmp.execute("blockdev-add", node)
                yield qmp
                await qmp.execute("quit")
            await asyncio.to_thread(daemon.wait, storage_daemon.START_SECONDS)

    async def _until_ended(self, filler: Filler, started: Started) -> None:
        """Damaged ranges: the machine gets errors for them, and needs us as long as it runs."""
        lost = "; ".join(map(str, filler.lost.values()))
        self._progress.note(f"{lost}: {started.name} gets I/O errors there, and needs this command as long as it runs")
        while await asyncio.to_thread(self._presence.pid) is not None:  # noqa: ASYNC110 - another's child: we must look
            await asyncio.sleep(_LOOK_SECONDS)
        raise errors.VerificationFailed(point=started.point.id, problem=lost)


async def _both(starting: Coroutine[Any, Any, str], ready: asyncio.Future[None]) -> str:
    """The machine's start, which needs the restore point's server: whichever fails ends both."""
    start = asyncio.ensure_future(starting)
    try:
        return (await asyncio.gather(start, ready))[0]
    finally:
        start.cancel()
        await asyncio.wait({start})


def _locked(error: errors.PullbackError) -> bool:
    """Has somebody else the images open: the machine, started by hand a moment ago?"""
    return isinstance(error, errors.RefusedError) and "lock" in error.reason
