"""Making a machine out of a restore point: its hardware on this host, its overlays, its process."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pullback import errors, state
from pullback.engine import monitor
from pullback.flows.repositories import Access, opened
from pullback.model import savedhardware, urls
from pullback.model.description import Firmware
from pullback.model.devices import Role
from pullback.model.exports import NbdAddress
from pullback.model.hardware import Hardware, LeftOut, Network
from pullback.model.points import Point, PointDisk
from pullback.model.tpm import TpmState
from pullback.programs import launching, qemu_img, swtpm
from pullback.programs.detached import Detached
from pullback.programs.launching import Kernel, Offers, Place, Start
from pullback.state.boots import Berth, Boot
from pullback.units import format_size

#: Seconds until QEMU answers; it opens the disks before, which asks the restore point's server.
_START_SECONDS = 120.0
_POLL_SECONDS = 0.01
#: Of the host's free memory: so much is not given to machines of which nobody said how much they need.
_SPARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user wants otherwise than the restore point has it. The same for every start of the machine."""

    network: Network = field(default_factory=Network)
    #: "kvm" or "tcg"; None: what works here.
    accel: str | None = None
    #: Bytes.
    memory: int | None = None
    cpus: int | None = None
    #: A new name makes it a copy: another uuid, other addresses.
    name: str | None = None
    #: Devices that every QEMU has, in place of the saved ones.
    plain: bool = False
    kernel: Kernel | None = None
    #: A file with firmware (-bios).
    bios: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A machine that can be started."""

    hardware: Hardware
    words: tuple[str, ...]
    #: The words that start it when its disks are whole.
    alone: tuple[str, ...]
    #: The words that start its TPM's emulator before; none: it has no TPM.
    tpm: tuple[str, ...]
    places: tuple[Place, ...]
    #: What of the saved machine is not made anew.
    left_out: tuple[LeftOut, ...]


# -- its hardware ----------------------------------------------------------------------------


def hardware(point: Point, disks: Sequence[PointDisk], wishes: Wishes, known: Boot | None) -> Hardware:
    """The point's hardware as it is wished for. `known`: the identity that it was given before."""
    found = savedhardware.read(point.description, disks, point.firmware, name=point.machine)
    if wishes.plain:
        found = found.plain()
    if known is not None:
        found = _as_before(found, known)
    elif wishes.name is not None:
        found = found.as_copy(wishes.name)
    if wishes.memory is not None:
        found = replace(found, memory=wishes.memory)
    return found if wishes.cpus is None else found.with_cpus(wishes.cpus)


def _as_before(found: Hardware, known: Boot) -> Hardware:
    macs = iter(known.macs)
    devices = tuple(
        device.having("mac", mac) if device.role is Role.NIC and (mac := next(macs, None)) else device
        for device in found.devices
    )
    return replace(found, name=known.name, uuid=known.uuid, devices=devices)


def macs(found: Hardware) -> tuple[str, ...]:
    """The addresses of its network cards."""
    return tuple((device.get("mac") or "").lower().replace("-", ":") for device in found.of(Role.NIC))


def require_memory(found: Hardware) -> None:
    """The restore point decides how much memory the machine gets: not more than this host has to give."""
    free = _free_memory()
    if free is not None and found.memory > free * _SPARE:
        raise errors.NotEnoughMemory(machine=found.name, wanted=format_size(found.memory), free=format_size(free))


def _free_memory() -> int | None:
    """Bytes that programs can have without pushing others out (proc(5), /proc/meminfo, MemAvailable)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What the restore point has of the machine beside its disks."""

    firmware: tuple[Firmware, ...] = ()
    tpm: TpmState | None = None


def plan(found: Hardware, wishes: Wishes, berth: Berth, offers: Offers, *, kept: Kept, served: Path) -> Plan:
    """The command line. `served`: the socket of the restore point's server."""
    places = tuple(_place(berth, target, served) for target in sorted(found.targets))
    tpm = _tpm(found, berth, kept.tpm)
    start = Start(
        disks=places,
        accel=launching.accelerator(found, wishes.accel),
        network=wishes.network,
        qmp=(berth.own_monitor, berth.monitor),
        agent=berth.agent,
        console=berth.console,
        vnc=berth.screen if found.of(Role.DISPLAY) else None,
        firmware=_flash(berth, kept.firmware),
        tpm=berth.tpm_control if tpm else None,
        bios=wishes.bios,
        kernel=wishes.kernel,
    )
    words, left = launching.argv(found, start, offers=offers)
    whole = replace(start, disks=[replace(place, point=None) for place in places])
    alone, _ = launching.argv(found, whole, offers=offers)
    return Plan(
        hardware=found,
        words=tuple(words),
        alone=tuple(alone),
        tpm=tuple(tpm),
        places=places,
        left_out=(*found.left_out, *left),
    )


def _flash(berth: Berth, firmware: Sequence[Firmware]) -> dict[str, Path]:
    if not firmware:
        return {}
    state.private(berth.firmware)
    return launching.flash_files(berth.firmware, firmware)


def _tpm(found: Hardware, berth: Berth, saved: TpmState | None) -> list[str]:
    """How its TPM's emulator is started; nothing if it cannot be. An encrypted state has its key elsewhere."""
    if not found.has_tpm or saved is None or saved.encrypted or not swtpm.installed():
        return []
    state.private(berth.tpm)
    swtpm.put(berth.tpm, saved)
    return swtpm.argv(berth.tpm, saved, control=berth.tpm_control, log=berth.tpm_log)


def _place(berth: Berth, target: str, served: Path) -> Place:
    """The overlay; one that is whole stands alone."""
    image = berth.image(target)
    whole = image.exists() and qemu_img.info(image, format="qcow2").backing is None
    return Place(target=target, image=image, point=None if whole else NbdAddress(socket=served, export=target))


def kept(place: urls.Repository, access: Access, point: Point) -> Kept:
    """The content of the point's flash devices and TPM. Blocking; opens the repository only if there are any."""
    if not point.firmware and point.tpm is None:
        return Kept()
    with opened(place, access) as repository:
        return Kept(firmware=repository.firmware(point), tpm=repository.tpm(point))


# -- its place -------------------------------------------------------------------------------


def prepare(berth: Berth) -> None:
    """Its directories. Raises `CannotWrite`, `PermissionDenied`."""
    state.private(berth.directory)
    mode = berth.directory.stat()
    if mode.st_mode & 0o022 or mode.st_uid not in (os.geteuid(), 0):
        raise errors.CannotWrite(path=str(berth.directory), reason="other users can write in that directory")
    state.private(berth.runtime)
    state.private(berth.served)


def refuse_existing(berth: Berth, targets: Sequence[str]) -> None:
    """Nobody's files are overwritten: raises `DestinationUnusable`."""
    for target in targets:
        for path in (berth.image(target), berth.script, berth.firmware, berth.tpm):
            if path.exists() or path.is_symlink():
                raise errors.DestinationUnusable(
                    place=str(path),
                    target=target,
                    reason="it exists already",
                    way_out="Name another directory with --to.",
                )


def remove(berth: Berth, targets: Sequence[str]) -> None:
    """Remove what was made for a machine that never ran."""
    files = [berth.image(target) for target in targets]
    for path in (*files, berth.script, berth.log, berth.console, berth.tpm_log, berth.record):
        path.unlink(missing_ok=True)
        path.with_suffix(".new").unlink(missing_ok=True)
    for directory in (berth.firmware, berth.tpm):
        shutil.rmtree(directory, ignore_errors=True)


def leave(berth: Berth) -> None:
    """Remove the directories that `prepare` made, if nobody needs them."""
    settle(berth, runs=False)
    with suppress(OSError):
        berth.directory.rmdir()


def settle(berth: Berth, *, runs: bool) -> None:
    """Remove the directory of the server that is over; all sockets, if the machine does not use them."""
    shutil.rmtree(berth.served if runs else berth.runtime, ignore_errors=True)


async def overlays(berth: Berth, disks: Sequence[PointDisk], served: Path) -> None:
    """Make those that are not there; that takes no longer for a larger disk."""
    made = [asyncio.to_thread(_overlay, berth.image(disk.target), disk, served) for disk in disks]
    await asyncio.gather(*made)


def _overlay(image: Path, disk: PointDisk, served: Path) -> None:
    if image.exists():
        return
    beside = image.with_suffix(".new")
    beside.unlink(missing_ok=True)
    below = NbdAddress(socket=served, export=disk.target).uri
    qemu_img.create_overlay(beside, disk.size, backing=below, format="raw")
    beside.chmod(0o600)
    beside.rename(image)


def write_script(berth: Berth, words: Sequence[str], *, tpm: Sequence[str] = ()) -> None:
    """The command that starts the machine, for people."""
    lines = [
        "#!/bin/sh",
        "# Starts the machine whose disks are here. Made by `pullback boot`.",
        f"mkdir -p -m 0700 {shlex.quote(str(berth.runtime))}",
        *([" ".join(map(shlex.quote, [*tpm, "--daemon"]))] if tpm else []),
        " \\\n  ".join(["exec", *map(shlex.quote, words)]),
    ]
    beside = berth.script.with_suffix(".new")
    beside.write_text("\n".join(lines) + "\n")
    beside.chmod(0o700)
    beside.rename(berth.script)


# -- its process -----------------------------------------------------------------------------


class Presence:
    """Is the machine there? Blocking.

    While its process is known its monitor is not asked: a connection beside ours would stay in the queue of
    that socket, which has room for one.
    """

    def __init__(self, berth: Berth, token: str = "") -> None:
        """`token`: its process, as `<pid>:<start time>`, if it is known."""
        self._berth = berth
        self._token = token

    def pid(self) -> int | None:
        """Its process id; None: it is not there. One that was started by hand is found too."""
        if not monitor.process_lives(self._token):
            self._token = monitor.process_token(monitor.listener(self._berth.own_monitor))
        return int(self._token.partition(":")[0]) if self._token else None


async def start(berth: Berth, plan: Plan) -> str:
    """Start QEMU, which lives on when we end; gives its process as `<pid>:<start time>` when it answers.

    Raises `ProgramFailed` if it does not come so far.
    """
    for socket in (*berth.sockets, berth.tpm_control):
        socket.unlink(missing_ok=True)
    processes: list[Detached] = []
    try:
        if plan.tpm:
            processes.append(await asyncio.to_thread(partial(Detached, plan.tpm, log=berth.tpm_log)))
            await _listens(berth.tpm_control, processes[0])
        processes.append(await asyncio.to_thread(partial(Detached, plan.words, log=berth.log)))
        await _answer(berth, processes[-1])
    except BaseException:
        for process in processes:
            process.kill()
        raise
    return monitor.process_token(processes[-1].pid)


async def _listens(socket: Path, process: Detached) -> None:
    deadline = asyncio.get_running_loop().time() + _START_SECONDS
    while not socket.is_socket():
        if process.ended or asyncio.get_running_loop().time() > deadline:
            raise process.failure("it does not listen")
        await asyncio.sleep(_POLL_SECONDS)


async def _answer(berth: Berth, process: Detached) -> None:
    """It answers when all its devices are made."""
    deadline = asyncio.get_running_loop().time() + _START_SECONDS
    while True:
        if process.ended:
            raise process.failure("it ended")
        if asyncio.get_running_loop().time() > deadline:
            raise process.failure(f"no answer within {_START_SECONDS:g} s")
        try:
            async with monitor.connect(berth.own_monitor):
                return
        except (errors.UnreachableError, errors.MonitorBusy):
            await asyncio.sleep(_POLL_SECONDS)
