"""QEMU itself: a machine described as a value, its command line, and its process.

The description covers what tests, the demo and rollback need: disks on any bus, with `-blockdev`
or `-drive`, in iothreads or not, monitors, a serial log and the guest agent's socket. An `idle`
machine costs no processor time: it runs, but its CPU halts at the first instruction. (`-accel
qtest` would do the same; Debian's and Ubuntu's QEMU are built without it.)
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import platform
import re
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from pullback import errors
from pullback.programs import process
from pullback.units import KiB, MiB

#: How long QEMU may take to answer on its monitor after it was started.
_START_SECONDS = 30.0
#: QEMU's own name of a host's architecture, where it differs from `uname -m`.
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
#: The guest agent's channel; qemu-ga and libvirt both expect this name.
AGENT_PORT = "org.qemu.guest_agent.0"
_PROMPT = b"(qemu) "
#: A firmware of one segment; the processor starts 16 bytes before its end.
_HALT_SIZE = 64 * KiB
_HALT_CODE = b"\xfa\xf4\xeb\xfd"  # cli; again: hlt; jmp again


class Bus(enum.Enum):
    """Where a disk is attached."""

    #: virtio-blk, one PCI function a disk.
    VIRTIO = "virtio"
    #: virtio-scsi, one controller for each iothread that is named, and one for none.
    SCSI = "scsi"
    #: AHCI.
    SATA = "sata"
    #: The two channels of the machine type `pc`: at most four disks.
    IDE = "ide"
    #: One NVMe controller a disk.
    NVME = "nvme"


class Style(enum.Enum):
    """How a disk's image is given to QEMU."""

    #: `-blockdev` with node names.
    BLOCKDEV = "blockdev"
    #: `-drive if=none`: QEMU generates the node names.
    DRIVE = "drive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk of a machine."""

    #: The device's qdev id; node names are made of it.
    id: str
    #: Its image.
    path: Path
    #: Format of the image.
    format: str = "qcow2"
    #: Where it is attached.
    bus: Bus = Bus.VIRTIO
    #: How it is given to QEMU.
    style: Style = Style.BLOCKDEV
    #: Name of the iothread it lives in (virtio, scsi), or None for the main loop.
    iothread: str | None = None
    #: Serial number shown to the guest.
    serial: str | None = None
    #: The guest may only read.
    read_only: bool = False
    #: The guest's discards reach the image.
    discard: bool = True
    #: Name of the format node (`blockdev` only), or None for "ID-format".
    node: str | None = None

    @property
    def node_name(self) -> str:
        """The format node's name under `-blockdev`."""
        return self.node or f"{self.id}-format"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine to start. Sockets and files are made where they say; their directory must be there."""

    #: QEMU's -name.
    name: str | None = None
    #: QEMU's -uuid.
    uuid: str | None = None
    #: Its disks, in the order of their slots.
    disks: Sequence[Disk] = ()
    #: Memory in bytes.
    memory: int = 192 * MiB
    #: Kernel started directly, with its initramfs and command line.
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    #: The CPU halts at once: no firmware, no kernel, no processor time (x86_64 only).
    idle: bool = False
    #: File with the firmware, or None for QEMU's own.
    firmware: Path | None = None
    #: "kvm", "tcg", or None for what `acceleration()` says.
    accel: str | None = None
    #: QEMU's -cpu, or None for the host's own under KVM and a simple one under TCG.
    cpu: str | None = None
    #: Machine type, or None for the architecture's usual one.
    type: str | None = None
    #: Monitors, each a unix socket that serves one QMP client at a time.
    qmp: Sequence[Path] = ()
    #: A monitor for people, as a unix socket.
    hmp: Path | None = None
    #: File that takes what the first serial port says.
    serial: Path | None = None
    #: Unix socket of the guest agent.
    agent: Path | None = None
    #: Wait for `cont` before the CPU runs (-S).
    paused: bool = False
    #: More words for the command line.
    extra: Sequence[str] = ()


def architecture() -> str:
    """The host's architecture, in QEMU's words."""
    name = platform.machine()
    return _ARCHITECTURES.get(name, name)


def binary() -> str:
    """The path of QEMU for the host's architecture; raises `ProgramMissing`."""
    return process.find(f"qemu-system-{architecture()}")


def acceleration() -> str:
    """Either "kvm", where it really is hardware, or "tcg".

    /dev/kvm that opens is not enough: without vmx or svm among the processor's flags it is itself
    emulated, and was measured many times slower than TCG. `-accel kvm -accel tcg` falls back only
    when KVM cannot be opened, so it does not help.
    """
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "tcg"
    return "kvm" if hardware_virtualization(architecture(), flags) else "tcg"


def hardware_virtualization(arch: str, cpuinfo: str) -> bool:
    """Does /proc/cpuinfo tell of hardware virtualization? (It is silent on that outside x86.)"""
    return arch != "x86_64" or bool(re.search(r"^flags\s*:.*\b(vmx|svm)\b", cpuinfo, re.MULTILINE))


# -- the command line ------------------------------------------------------------------------


def argv(
    machine: Machine, *, program: str, accel: str, arch: str = "x86_64", own_monitor: int | None = None
) -> list[str]:
    """The words that start `machine` with `program`.

    `own_monitor` is a descriptor: a connected socket for one more QMP monitor.
    """
    kind = machine.type or ("q35" if arch == "x86_64" else "virt")
    words = [program, "-no-user-config", "-nodefaults", "-display", "none"]
    words += ["-machine", kind, "-accel", accel, "-m", f"{max(1, machine.memory // MiB)}M"]
    words += ["-cpu", machine.cpu or processor(accel, arch)]
    words += _identity(machine)
    words += _kernel(machine)
    words += _characters(machine)
    words += _storage(machine.disks)
    if own_monitor is not None:
        words += ["-chardev", f"socket,id=starter,fd={own_monitor}", "-mon", "chardev=starter,mode=control"]
    return [*words, *machine.extra]


def processor(accel: str, arch: str) -> str:
    """The model of processor.

    rdrand, because a guest's first program that asks for random numbers waits until the kernel has
    some: 1 s without it. Not "max" on x86, whose boot takes 6 s instead of 2 under TCG (QEMU 7.2).
    """
    if accel == "kvm":
        return "host"
    return "qemu64,+rdrand,+rdseed" if arch == "x86_64" else "max"


def _identity(machine: Machine) -> Iterator[str]:
    if machine.name:
        yield from ("-name", f"guest={_comma(machine.name)}")
    if machine.uuid:
        yield from ("-uuid", machine.uuid)
    if machine.paused:
        yield "-S"


def _kernel(machine: Machine) -> Iterator[str]:
    if machine.firmware:
        yield from ("-bios", str(machine.firmware))
    if machine.kernel:
        yield from ("-kernel", str(machine.kernel))
    if machine.initrd:
        yield from ("-initrd", str(machine.initrd))
    if machine.cmdline:
        yield from ("-append", machine.cmdline)


def _characters(machine: Machine) -> Iterator[str]:
    """Monitors, serial port and agent: one chardev each."""
    for number, path in enumerate(machine.qmp):
        yield from ("-chardev", _socket(f"qmp{number}", path), "-mon", f"chardev=qmp{number},mode=control")
    if machine.hmp:
        yield from ("-chardev", _socket("hmp", machine.hmp), "-mon", "chardev=hmp,mode=readline")
    if machine.serial:
        yield from ("-chardev", f"file,id=serial0,path={_comma(machine.serial)}", "-serial", "chardev:serial0")
    if machine.agent:
        yield from ("-chardev", _socket("agent", machine.agent))
        yield from ("-device", _json(driver="virtio-serial-pci", id="ports"))
        yield from ("-device", _json(driver="virtserialport", bus="ports.0", chardev="agent", name=AGENT_PORT))


def _socket(name: str, path: Path) -> str:
    return f"socket,id={name},path={_comma(path)},server=on,wait=off"


def _storage(disks: Sequence[Disk]) -> Iterator[str]:
    for name in sorted({disk.iothread for disk in disks if disk.iothread}):
        yield from ("-object", f"iothread,id={name}")
    for disk in disks:
        yield from _image(disk)
    yield from _controllers(disks)
    slots = dict.fromkeys(Bus, 0)
    for disk in disks:
        yield from ("-device", _json(**_device(disk, slots[disk.bus])))
        slots[disk.bus] += 1


def _image(disk: Disk) -> Iterator[str]:
    discard = "unmap" if disk.discard else "ignore"
    if disk.style is Style.DRIVE:
        switches = f"discard={discard},readonly={'on' if disk.read_only else 'off'}"
        yield from ("-drive", f"file={_comma(disk.path)},if=none,id={disk.id}-drive,format={disk.format},{switches}")
        return
    common = {"discard": discard, "read-only": disk.read_only}
    file = {"driver": "file", "filename": str(disk.path), "node-name": f"{disk.id}-file", **common}
    top = {"driver": disk.format, "file": f"{disk.id}-file", "node-name": disk.node_name, **common}
    yield from ("-blockdev", _json(**file), "-blockdev", _json(**top))


def _controllers(disks: Sequence[Disk]) -> Iterator[str]:
    for iothread in dict.fromkeys(disk.iothread for disk in disks if disk.bus is Bus.SCSI):
        placed = {"iothread": iothread} if iothread else {}
        yield from ("-device", _json(driver="virtio-scsi-pci", id=_scsi(iothread), **placed))
    if any(disk.bus is Bus.SATA for disk in disks):
        yield from ("-device", _json(driver="ahci", id="controller-sata"))


def _scsi(iothread: str | None) -> str:
    return f"controller-scsi-{iothread}" if iothread else "controller-scsi"


def _device(disk: Disk, slot: int) -> dict[str, object]:
    """The properties of a disk's device; `slot` counts the disks on the same kind of bus."""
    drive = f"{disk.id}-drive" if disk.style is Style.DRIVE else disk.node_name
    properties: dict[str, object] = {"id": disk.id, "drive": drive}
    if disk.serial:
        properties["serial"] = disk.serial
    match disk.bus:
        case Bus.VIRTIO:
            placed = {"iothread": disk.iothread} if disk.iothread else {}
            return {"driver": "virtio-blk-pci", **properties, **placed}
        case Bus.SCSI:
            return {"driver": "scsi-hd", "bus": f"{_scsi(disk.iothread)}.0", "scsi-id": slot, **properties}
        case Bus.SATA:
            return {"driver": "ide-hd", "bus": f"controller-sata.{slot}", **properties}
        case Bus.IDE:
            return {"driver": "ide-hd", "bus": f"ide.{slot // 2}", "unit": slot % 2, **properties}
        case Bus.NVME:
            return {"driver": "nvme", "serial": disk.id, **properties}


def _json(**properties: object) -> str:
    return json.dumps(properties)


def _comma(value: object) -> str:
    """A comma in a value of the key=value form is doubled."""
    return str(value).replace(",", ",,")


# -- the process -----------------------------------------------------------------------------


class Qemu:
    """A QEMU that runs while the block runs; its end, however it comes, is never an error here."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._child = _launch(machine, theirs.fileno())
            try:
                self._wait_for_answer(ours)
            except BaseException:
                self._child.close()
                raise

    def _wait_for_answer(self, monitor: socket.socket) -> None:
        """Commands are answered by the main loop, which runs when all devices are made.

        Less is no sign: sockets listen and even greet (a thread of the monitors does, tried on 7.2)
        before a disk may turn out to be locked. The machine's own monitors are left alone.
        """
        monitor.setblocking(False)
        monitor.sendall(b'{"execute": "qmp_capabilities"}')
        heard = bytearray()
        self._child.wait_until(lambda: _answered(monitor, heard), what="answer of its monitor", timeout=_START_SECONDS)

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._child.returncode

    def message(self) -> str:
        """The end of what QEMU said on standard error."""
        return self._child.message()

    def wait(self, timeout: float) -> int:
        """Wait for its end; gives its status. Raises `ProgramFailed` after `timeout` seconds."""
        return self._child.wait(timeout)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send QEMU a signal; after SIGKILL its end is waited for."""
        self._child.kill(signum)
        if signum == signal.SIGKILL:
            self._child.wait(10)

    def close(self) -> None:
        """End QEMU (SIGTERM makes it quit in order, images closed); twice is fine."""
        self._child.close()

    def __enter__(self) -> Qemu:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start(machine: Machine) -> Qemu:
    """Start `machine`; returns when all its devices are made and its sockets listen.

    Raises `ProgramFailed` with QEMU's message when it ends before that, or is not there within
    30 s; `ProgramMissing`. None of its monitors has had a client then.
    """
    return Qemu(machine)


def _launch(machine: Machine, own_monitor: int) -> process.Child:
    arch, accel = architecture(), machine.accel or acceleration()
    if not machine.idle:
        words = argv(machine, program=binary(), accel=accel, arch=arch, own_monitor=own_monitor)
        return process.Child(words, pass_fds=[own_monitor])
    if arch != "x86_64":
        raise errors.Unsupported(what="An idle machine", reason="its firmware is made for x86_64")
    # QEMU reads the file at start and keeps the content, so it needs no name and leaves no trace.
    halt = os.memfd_create("halt")
    try:
        os.write(halt, halting_firmware())
        halting = replace(machine, firmware=Path(f"/proc/self/fd/{halt}"))
        words = argv(halting, program=binary(), accel=accel, own_monitor=own_monitor)
        return process.Child(words, pass_fds=[halt, own_monitor])
    finally:
        os.close(halt)


def halting_firmware() -> bytes:
    """64 KiB of which the processor executes 2 bytes: cli, hlt."""
    return bytes(_HALT_SIZE - 16) + _HALT_CODE.ljust(16, b"\0")


def _answered(monitor: socket.socket, heard: bytearray) -> bool:
    """Are there two lines, the greeting and the answer? An end of the stream shows as the child's end."""
    with contextlib.suppress(BlockingIOError, ConnectionResetError):
        heard += monitor.recv(65536)
    return heard.count(b"\n") >= 2


def hmp(path: Path, command: str, *, timeout: float = 10.0) -> str:
    """Say `command` to the people's monitor at `path`; gives what it answers.

    When QEMU ends meanwhile, that is the answer's end too. Raises `UnreachableError`,
    `OutcomeUnknown` after `timeout` seconds.
    """
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(timeout)
        try:
            monitor.connect(str(path))
            _until_prompt(monitor)
        except OSError as error:
            raise errors.UnreachableError(socket=str(path), reason=error.strerror or "no prompt") from error
        try:
            monitor.sendall(command.encode() + b"\n")
            return _answer(_until_prompt(monitor))
        except OSError as error:
            raise errors.OutcomeUnknown(command=command, reason=str(error)) from error


def _until_prompt(monitor: socket.socket) -> bytes:
    heard = bytearray()
    while not heard.endswith(_PROMPT):
        part = monitor.recv(65536)
        if not part:
            break
        heard += part
    return bytes(heard)


def _answer(heard: bytes) -> str:
    """The first line is the command as the line editor drew it."""
    _, _, answer = heard.removesuffix(_PROMPT).decode("utf-8", "replace").partition("\n")
    return answer.replace("\r\n", "\n").strip()
