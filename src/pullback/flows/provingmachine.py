"""A machine that is booted only to be looked at: no network, disks that are thrown away, limits on what it may take."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pullback import errors, state
from pullback.engine import monitor, replies
from pullback.engine.monitor import Monitor
from pullback.flows import bootmachine, serving
from pullback.flows.bootmachine import Wishes
from pullback.flows.listening import own_directory
from pullback.flows.threads import entered
from pullback.guest.listening import Listener
from pullback.model import pictures
from pullback.model.description import Firmware
from pullback.model.devices import Role
from pullback.model.exports import NbdAddress
from pullback.model.hardware import Hardware
from pullback.model.points import Point, PointDisk
from pullback.programs import launching, process, qemu_img
from pullback.programs.launching import Place, Start
from pullback.units import GiB, KiB, MiB, format_size

#: Seconds until QEMU answers: it opens the disks before.
_START_SECONDS = 120.0
_POLL_SECONDS = 0.02
_LOOK_SECONDS = 0.25
#: Left free where the overlays are, in bytes: guests that live may be on the same file system.
LEAST_FREE = 1 * GiB
#: Of the host's free memory, what a machine gets at most, unless the user says how much.
_SHARE = 0.5
_LEAST_MEMORY = 64 * MiB
#: Resets that are no reason for doubt: a first start after a change may need one or two.
MAX_RESETS = 3
_MACHINE_EVENTS = ("RESET", "GUEST_PANICKED", "GUEST_CRASHLOADED", "STOP", "BLOCK_IO_ERROR")
#: It gets what others leave: machines that matter run on this host.
_NICE = "10"


class Ended(Exception):
    """The machine is no use any more; the reason is the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a proof may take."""

    #: From the start of the machine, in seconds.
    seconds: float = 600.0
    #: Processor time of the machine, in seconds; None: no limit.
    cpu: float | None = None


def fitting(point: Point, disks: Sequence[PointDisk], wishes: Wishes) -> tuple[Hardware, list[str]]:
    """The point's hardware, no larger than this host has room for; and what was made smaller."""
    found = bootmachine.hardware(point, disks, wishes, None)
    notes = []
    here = os.cpu_count() or 1
    if wishes.cpus is None and found.cpus > here:
        notes.append(f"{here} processors in place of {found.cpus}")
        found = found.with_cpus(here)
    room = _room_in_memory()
    if wishes.memory is None and room is not None and found.memory > room:
        notes.append(f"{format_size(room)} of memory in place of {format_size(found.memory)}")
        found = replace(found, memory=room)
    return found, notes


def _room_in_memory() -> int | None:
    """Half of what programs can have without pushing others out (proc(5), /proc/meminfo); None: not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * KiB for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    return max(_LEAST_MEMORY, int(free * _SHARE) // MiB * MiB)


class Machine:
    """A machine that runs. Made by `started`."""

    def __init__(self, child: process.Child, qmp: Monitor, console: Listener, directory: Path, room: _Room) -> None:
        self._child = child
        self._qmp = qmp
        self.console = console
        self._directory = directory
        self._room = room
        self._begun = time.monotonic()
        self._events: asyncio.Queue[str] = asyncio.Queue()
        self.resets = 0

    @property
    def agent(self) -> Path:
        """The socket of its guest agent."""
        return self._directory / "agent"

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._begun

    @property
    def running(self) -> bool:
        """Is QEMU there?"""
        return self._child.returncode is None

    def cpu(self) -> float:
        """Processor time so far, in seconds (proc(5), /proc/PID/stat, fields 14 and 15)."""
        with suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def written(self) -> int:
        """Bytes that its overlays take."""
        return self._room.written()

    async def read(self) -> int:
        """Bytes that it read from its disks."""
        total = 0
        for record in replies.objects(await self._qmp.execute("query-blockstats"), "query-blockstats"):
            stats = record.get("stats")
            value = stats.get("rd_bytes") if isinstance(stats, Mapping) and record.get("qdev") else 0
            total += value if isinstance(value, int) and value >= 0 else 0
        return total

    async def watch(self, limits: Limits) -> None:
        """Look after it until it must end; raises `Ended` with the reason then."""
        async with self._qmp.listening(*_MACHINE_EVENTS) as events:
            hearing = asyncio.ensure_future(self._hear(events))
            try:
                while not hearing.done():
                    self._look(limits)
                    await asyncio.wait({hearing}, timeout=_LOOK_SECONDS)
                hearing.result()
            finally:
                hearing.cancel()

    def _look(self, limits: Limits) -> None:
        if (code := self._child.returncode) is not None:
            said = "" if code == 0 else f", {self._child.message()}"
            raise Ended(f"the machine switched itself off{said}" if code == 0 else f"QEMU ended with {code}{said}")
        if self.seconds > limits.seconds:
            raise Ended(f"not within {limits.seconds:g} s")
        if limits.cpu is not None and self.cpu() > limits.cpu:
            raise Ended(f"not within {limits.cpu:g} s of processor time")
        if (free := self._room.free()) < LEAST_FREE:
            raise Ended(f"it wrote until only {format_size(free)} were free for its overlays")

    async def _hear(self, events: AsyncIterator[Mapping[str, object]]) -> None:
        async for event in events:
            match event.get("event"):
                case "RESET":
                    self.resets += 1
                    if self.resets > MAX_RESETS:
                        raise Ended("it starts anew again and again")
                case "GUEST_PANICKED":
                    raise Ended("the guest's kernel panicked")
                case "STOP":
                    raise Ended("QEMU stopped it")

    async def picture(self) -> bytes:
        """What its screen shows, as PNG. Raises a `PullbackError`, `OSError` or `ValueError` if there is no picture."""
        path = self._directory / "screen"
        try:
            await self._qmp.execute("screendump", {"filename": str(path), "format": "png"})
        except errors.RefusedError as error:
            if "format" not in error.reason and "PNG" not in error.reason:
                raise
            await self._qmp.execute("screendump", {"filename": str(path)})
        with path.open("rb") as file:
            data = file.read(pictures.MAX_BYTES)
        return data if pictures.is_png(data) else await asyncio.to_thread(partial(pictures.png, data))


class _Room:
    """The overlays, which have no names any more, and what is free beside them."""

    def __init__(self, directory: Path, images: Sequence[Path]) -> None:
        self._directory = directory
        self._open = [os.open(image, os.O_RDONLY | os.O_CLOEXEC) for image in images]

    def written(self) -> int:
        """Bytes that they take."""
        return sum(os.fstat(one).st_blocks * 512 for one in self._open)

    def free(self) -> int:
        """Bytes free on their file system."""
        return shutil.disk_usage(self._directory).free

    def close(self) -> None:
        """Let them go; once."""
        for one in self._open:
            os.close(one)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a machine is started with."""

    hardware: Hardware
    wishes: Wishes
    disks: Sequence[serving.ServedDisk]
    firmware: Sequence[Firmware]
    directories: state.Directories
    #: Directory of the overlays.
    scratch: Path


@asynccontextmanager
async def started(setup: Setup) -> AsyncIterator[tuple[Machine, tuple[str, ...], str]]:
    """The machine runs while the block does; also given: what of its hardware is not made anew, and what runs it.

    Raises `ProgramFailed` when QEMU does not come up, `ScratchSpace`, `ProgramMissing`.
    """
    async with AsyncExitStack() as stack:
        directory = await stack.enter_async_context(entered(own_directory(setup.directories, None)))
        scratch = await _scratch(stack, setup)
        console = await stack.enter_async_context(entered(Listener(directory / "console")))
        images = await asyncio.to_thread(partial(_overlays, scratch, setup.disks))
        program = launching.program(setup.hardware)
        offers = await asyncio.to_thread(partial(launching.offers, program))
        start = _start(setup, directory, images)
        words, left = launching.argv(setup.hardware, start, offers=offers)
        # From this thread, which lives as long as we do: the child dies with the thread that started it.
        child = process.Child(["nice", "-n", _NICE, *words])
        stack.push_async_callback(asyncio.to_thread, child.close)
        stack.callback(child.kill)
        qmp = await stack.enter_async_context(_answering(child, directory / "qmp"))
        room = _Room(scratch, images)
        stack.callback(room.close)
        for image in images:
            image.unlink()
        told = tuple(str(item) for item in (*setup.hardware.left_out, *left) if not item.of_host)
        yield Machine(child, qmp, console, directory, room), told, start.accel


async def _scratch(stack: AsyncExitStack, setup: Setup) -> Path:
    """A private directory for overlays, which need room."""
    where = replace(setup.directories, runtime=setup.scratch)
    directory = await stack.enter_async_context(entered(own_directory(where, None)))
    free = shutil.disk_usage(directory).free
    if free < 2 * LEAST_FREE:
        raise errors.ScratchSpace(path=str(setup.scratch), free=format_size(free), needed=format_size(2 * LEAST_FREE))
    return directory


def _overlays(scratch: Path, disks: Sequence[serving.ServedDisk]) -> list[Path]:
    made = []
    for number, disk in enumerate(disks):
        made.append(scratch / f"overlay{number}")
        qemu_img.create(made[-1], disk.size)
    return made


def _start(setup: Setup, directory: Path, images: Sequence[Path]) -> Start:
    places = []
    for disk, image in zip(setup.disks, images, strict=True):
        assert disk.socket is not None
        point = NbdAddress(socket=disk.socket, export=disk.export)
        places.append(Place(target=disk.target, image=image, point=point, patience=0))
    return Start(
        disks=places,
        accel=launching.accelerator(setup.hardware, setup.wishes.accel),
        network=setup.wishes.network,
        qmp=(directory / "qmp",),
        agent=directory / "agent",
        console=directory / "console",
        firmware=launching.flash_files(directory, setup.firmware),
        bios=setup.wishes.bios,
        kernel=setup.wishes.kernel,
    )


@asynccontextmanager
async def _answering(child: process.Child, socket: Path) -> AsyncIterator[Monitor]:
    """Its monitor, as soon as that answers."""
    deadline = time.monotonic() + _START_SECONDS
    async with AsyncExitStack() as stack:
        while True:
            if (code := child.returncode) is not None:
                raise errors.ProgramFailed(program=child.name, status=f"exit status {code}", message=child.message())
            if time.monotonic() > deadline:
                raise errors.ProgramFailed(
                    program=child.name, status=f"no answer within {_START_SECONDS:g} s", message=child.message()
                )
            try:
                found = await stack.enter_async_context(monitor.connect(socket))
                break
            except (errors.UnreachableError, errors.MonitorBusy):
                await asyncio.sleep(_POLL_SECONDS)
        yield found


def has_screen(hardware: Hardware) -> bool:
    """Has it a display device?"""
    return bool(hardware.of(Role.DISPLAY))
