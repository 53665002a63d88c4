"""The small guest running: started in one of its modes, listened to, ended.

    small = build.guest()
    with run.boot(small, run.Writer(), disks=[disk], directory=work) as guest:
        guest.wait_for_record(100)
        ...                             # back up through guest.qmp[0]
        guest.power_off()

A lower bound for what a backup must hold is `guest.last_record()` right before it.
"""

from __future__ import annotations

import contextlib
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from pullback import errors
from pullback.guest.build import SmallGuest
from pullback.guest.console import Console
from pullback.programs import qemu
from pullback.units import MiB

#: The power button is pressed again when nothing came of it: the guest may not have listened yet.
_PRESS_SECONDS = 3.0
#: Ready takes 2 to 3 s under software emulation on an idle machine; the rest is for a loaded one.
READY_SECONDS = 90.0
_POWER_OFF_SECONDS = 60.0
#: "quiet" because each line on the serial port costs; level 4 still shows failed I/O. The rest
#: leaves out what takes time under software emulation and has no use here.
_CMDLINE = (
    "console=ttyS0 quiet loglevel=4 nokaslr mitigations=off random.trust_cpu=on"
    " tsc=reliable no_timer_check cryptomgr.notests"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Appends numbered, durable records to a file system and keeps the disk moving."""

    name: ClassVar[str] = "writer"
    #: Id of the disk, or None for the first.
    disk: str | None = None
    #: Milliseconds between two records.
    interval: int = 20
    #: MiB of the file that is overwritten in place.
    noise: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Writes a counter to disk `a`, then to disk `b`, and so on: raw, each write waited for."""

    name: ClassVar[str] = "turns"
    #: Id of the disk that is written first.
    a: str
    #: Id of the disk that follows.
    b: str
    #: The counter to go on from (`turns.read(image).newest` of disk b).
    first: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Random raw writes of 4 to 64 KiB by several processes at a time."""

    name: ClassVar[str] = "load"
    #: Id of the disk, or None for the first. What is on it is destroyed.
    disk: str | None = None
    #: Where the range begins, in bytes (a multiple of 4096).
    start: int = 0
    #: Its length in bytes, or None for the rest of the disk.
    length: int | None = None
    #: Processes.
    jobs: int = 4
    #: Milliseconds between two writes of one process.
    pause: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Checks the file system and every record, says so, and powers off."""

    name: ClassVar[str] = "check"
    #: Id of the disk, or None for the first.
    disk: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """Does nothing (but run the guest agent)."""

    name: ClassVar[str] = "idle"


Mode = Writer | Turns | Load | Check | Idle
_DISK_FIELDS = ("disk", "a", "b")


def device(disks: Sequence[qemu.Disk], id: str) -> str:
    """The path in the guest of the disk `id`: /dev/vda, /dev/sda, /dev/nvme0n1, …

    SCSI disks are counted before SATA and IDE ones, because their driver is loaded first. Raises
    `UnknownDisk`.
    """
    if id not in [disk.id for disk in disks]:
        raise errors.UnknownDisk(target=id, where="the guest", known=", ".join(disk.id for disk in disks))
    scsi = [disk.id for disk in disks if disk.bus is qemu.Bus.SCSI]
    ata = [disk.id for disk in disks if disk.bus in (qemu.Bus.SATA, qemu.Bus.IDE)]
    nvme = [disk.id for disk in disks if disk.bus is qemu.Bus.NVME]
    virtio = [disk.id for disk in disks if disk.bus is qemu.Bus.VIRTIO]
    if id in nvme:
        return f"/dev/nvme{nvme.index(id)}n1"
    if id in virtio:
        return f"/dev/vd{string.ascii_lowercase[virtio.index(id)]}"
    return f"/dev/sd{string.ascii_lowercase[[*scsi, *ata].index(id)]}"


def cmdline(mode: Mode, disks: Sequence[qemu.Disk]) -> str:
    """The kernel's command line for `mode`: each of its values as pb.NAME=VALUE."""
    words = [_CMDLINE, f"pb.mode={mode.name}"]
    for field in fields(mode):
        value = getattr(mode, field.name)
        if field.name in _DISK_FIELDS:
            value = device(disks, value or disks[0].id)
        if value is not None:
            words.append(f"pb.{field.name}={value}")
    return " ".join(words)


class Guest:
    """A running small guest; killed with its block if it still runs then."""

    def __init__(self, machine: qemu.Machine) -> None:
        assert machine.serial is not None
        self.machine = machine
        self.qemu = qemu.start(machine)
        self.console = Console(machine.serial, lambda: self.qemu.returncode is None)

    @property
    def qmp(self) -> Sequence[Path]:
        """Its QMP sockets, all free for others."""
        return self.machine.qmp

    @property
    def agent(self) -> Path:
        """The socket of its guest agent."""
        assert self.machine.agent is not None
        return self.machine.agent

    def wait_ready(self, timeout: float = READY_SECONDS) -> None:
        """Wait until its mode has begun; raises `ProgramFailed` with its last lines."""
        self.console.wait_for_line(r"^PB-READY", timeout)

    def last_record(self) -> int:
        """The newest record that the guest had made durable by now; 0 if none."""
        return max((int(match[1]) for match in self.console.matches(r"^PB-RECORD (\d+)$")), default=0)

    def wait_for_record(self, number: int, timeout: float = READY_SECONDS) -> int:
        """Wait until record `number` is durable; gives the newest one that is."""
        self.console.wait_until(r"^PB-RECORD (\d+)$", lambda match: int(match[1]) >= number, timeout)
        return self.last_record()

    def wait_for_check(self, timeout: float = READY_SECONDS) -> int:
        """Wait for the verdict on the records found on the disk; gives the last one's number.

        Raises `ProgramFailed` with the guest's words if the disk or a record is damaged.
        """
        return int(self.console.wait_for_line(r"^PB-CHECK ok last=(\d+)$", timeout)[1])

    def io_errors(self) -> list[str]:
        """Every failed or hanging I/O that a program or the kernel told of."""
        return [match[1] for match in self.console.matches(r"^PB-IOERROR (.*)")]

    def slowest_write(self) -> float:
        """Seconds that the slowest write of mode `load` took, of those told by now (once a second)."""
        told = self.console.matches(r"^PB-LOAD .* slowest_ms=([0-9.]+)$")
        return max((float(match[1]) for match in told), default=0.0) / 1000

    def power_off(self, timeout: float = _POWER_OFF_SECONDS) -> None:
        """Press the power button and wait until the guest has unmounted its disks and QEMU has quit."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > _PRESS_SECONDS and self.qemu.returncode is None:
            self._press()
            with contextlib.suppress(errors.ProgramFailed):
                return self.wait_off(_PRESS_SECONDS)
        return self.wait_off(max(0.0, left))

    def _press(self) -> None:
        assert self.machine.hmp is not None
        with contextlib.suppress(errors.UnreachableError):  # it quit meanwhile
            qemu.hmp(self.machine.hmp, "system_powerdown")

    def wait_off(self, timeout: float = _POWER_OFF_SECONDS) -> None:
        """Wait until QEMU has quit; raises `ProgramFailed` if it did not, or not in order."""
        if status := self.qemu.wait(timeout):
            raise errors.ProgramFailed(program="qemu", status=f"exit status {status}", message=self.qemu.message())

    def kill(self) -> None:
        """The power fails: QEMU is killed at once."""
        self.qemu.kill()

    def close(self) -> None:
        """End it; twice is fine."""
        self.qemu.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def boot(
    small: SmallGuest,
    mode: Mode,
    *,
    disks: Sequence[qemu.Disk],
    directory: Path,
    name: str = "small-guest",
    monitors: int = 1,
    memory: int = 192 * MiB,
    machine_type: str | None = None,
    extra: Sequence[str] = (),
) -> Guest:
    """Start `small` in `mode`. Returns when QEMU runs; `wait_ready` waits for the guest.

    In `directory` (which must be there, path under 90 bytes) are made: qmp0.sock … (`monitors` of
    them), hmp.sock, agent.sock, console.log. Only one guest may use a directory at a time. Raises
    `ProgramFailed`, `ProgramMissing`, `UnknownDisk`.
    """
    (directory / "console.log").unlink(missing_ok=True)
    return Guest(
        qemu.Machine(
            name=name,
            disks=disks,
            memory=memory,
            type=machine_type,
            kernel=small.kernel,
            initrd=small.initrd,
            cmdline=cmdline(mode, disks),
            qmp=tuple(directory / f"qmp{number}.sock" for number in range(monitors)),
            hmp=directory / "hmp.sock",
            serial=directory / "console.log",
            agent=directory / "agent.sock",
            extra=extra,
        )
    )
