"""Hardware of a restore point as a command line of QEMU, with images, networks and sockets of this host.

Everything that names something of the host is given by the caller (`Start`); everything else comes from
`model.hardware`, which is safe. What this QEMU does not know is replaced where the guest will hardly
notice (machine types by their family, screens by a plain one), else left out, and told.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pullback import errors
from pullback.model.commandline import joined
from pullback.model.description import Firmware
from pullback.model.devices import Device, Role
from pullback.model.exports import NbdAddress
from pullback.model.hardware import Hardware, LeftOut, Link, Network, families, settled
from pullback.programs import process, qemu
from pullback.units import KiB

#: Seconds that QEMU may take to list what it knows.
_LIST_SECONDS = 30.0
#: Seconds that reads wait for a server that is away before they fail: ten years, that is for ever.
PATIENCE_SECONDS = 10 * 365 * 86400
#: Where QEMU lies that is made for one architecture only (RHEL and its kin).
_ONLY = Path("/usr/libexec/qemu-kvm")
_BRIDGE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_ARCHITECTURE = re.compile(r"[a-z0-9_]{1,16}")
#: Features of a processor that only KVM gives.
_OF_KVM = re.compile(r"[+-]?(?:hv[-_]|kvm|host-|migratable|enforce|check|pmu|invtsc)")
_DEVICE_NAME = re.compile(r'^name "([^"]+)"(?:.*, alias "([^"]+)")?')
#: What ports lead to that nobody listens at.
_NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offers:
    """What a QEMU knows."""

    program: str
    machines: frozenset[str]
    devices: frozenset[str]
    #: It can lock itself in (-sandbox).
    sandbox: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the bytes of a disk are on this host."""

    target: str
    image: Path
    format: str = "qcow2"
    #: What the image is an overlay of: served over a unix socket. What the image's own header says is not asked.
    point: NbdAddress | None = None
    #: Seconds that reads wait for that server when it is away.
    patience: int = PATIENCE_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel that is started directly, chosen by the user."""

    image: Path
    initrd: Path | None = None
    #: Its command line; None: the one that the saved machine had.
    append: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a machine is given on this host. Directories of sockets and files must be there."""

    disks: Sequence[Place]
    #: "kvm" or "tcg".
    accel: str
    network: Network = field(default_factory=Network)
    #: Monitors, each a unix socket that serves one QMP client at a time.
    qmp: Sequence[Path] = ()
    #: Unix socket of the guest agent, if the machine has a channel for one.
    agent: Path | None = None
    #: File that takes what the first serial port says. A machine without a port gets one.
    console: Path | None = None
    #: Unix socket of a VNC server that shows the screen.
    vnc: Path | None = None
    #: Files with the content of flash devices, by their names.
    firmware: Mapping[str, Path] = field(default_factory=dict)
    #: A file of firmware that the user chose (-bios).
    bios: Path | None = None
    kernel: Kernel | None = None
    #: Unix socket of a TPM emulator's control channel (swtpm).
    tpm: Path | None = None
    #: Wait for `cont` before the processors run.
    paused: bool = False


# -- what this host has ----------------------------------------------------------------------


def program(hardware: Hardware) -> str:
    """The path of the QEMU that the machine needs; raises `ProgramMissing`."""
    return path_of(hardware.architecture)


def path_of(architecture: str) -> str:
    """The path of QEMU for an architecture; raises `ProgramMissing`."""
    if not _ARCHITECTURE.fullmatch(architecture):
        raise errors.ProgramMissing(program="QEMU for this architecture", package="qemu-system")
    try:
        return process.find(f"qemu-system-{architecture}")
    except errors.ProgramMissing:
        if architecture == qemu.architecture() and os.access(_ONLY, os.X_OK):
            return str(_ONLY)
        raise


def accelerator(hardware: Hardware, wish: str | None = None) -> str:
    """What runs the processors: what is wished for, else KVM where it is real, else "tcg"."""
    if wish is not None:
        return wish
    same = {hardware.architecture, qemu.architecture()} in ({"x86_64", "i386"}, {qemu.architecture()})
    return qemu.acceleration() if same else "tcg"


def offers(program: str, cache: Path | None = None) -> Offers:
    """What that QEMU knows: three short runs of it (a quarter of a second in all), remembered in `cache`."""
    if cache is None:
        return _asked(program)
    status = os.stat(program)
    identity = [program, status.st_ino, status.st_size, status.st_mtime_ns]
    path = cache / f"offers-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.json"
    if (known := _remembered(path, program)) is not None:
        return known
    found = _asked(program)
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = path.with_suffix(f".{os.getpid()}")
        values = {"machines": sorted(found.machines), "devices": sorted(found.devices), "sandbox": found.sandbox}
        beside.write_text(json.dumps(values))
        beside.rename(path)
    return found


def _remembered(path: Path, program: str) -> Offers | None:
    try:
        values = json.loads(path.read_text())
        machines, devices = frozenset(values["machines"]), frozenset(values["devices"])
        return Offers(program=program, machines=machines, devices=devices, sandbox=values["sandbox"] is True)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _asked(program: str) -> Offers:
    machines = _run(program, "-machine", "help").splitlines()
    devices = (_DEVICE_NAME.match(line) for line in _run(program, "-device", "help").splitlines())
    return Offers(
        program=program,
        machines=frozenset(line.split()[0] for line in machines[1:] if line.strip()),
        devices=frozenset(name for match in devices if match for name in match.groups() if name),
        sandbox="\n-sandbox " in _run(program, "-help"),
    )


def _run(program: str, *words: str) -> str:
    return process.run([program, *words], timeout=_LIST_SECONDS).decode("utf-8", "replace")


def flash_files(directory: Path, firmware: Sequence[Firmware]) -> dict[str, Path]:
    """Write the content of flash devices into files; what is there already (variables, changed since) stays."""
    made = {}
    for device in firmware:
        made[device.name] = path = directory / f"{device.name}.fd"
        if not path.exists():
            beside = path.with_suffix(".new")
            with open(beside, "wb", opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, 0o600)) as file:
                file.write(device.data)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(path)
    return made


def bridge(name: str) -> Network:
    """The network of a bridge of this host; raises `UsageError` for what is no name of one."""
    if not _BRIDGE_NAME.fullmatch(name) or name in (".", ".."):
        raise errors.UsageError(problem=f"{name!r} is no name of a bridge")
    return Network(link=Link.BRIDGE, bridge=name)


# -- the command line ------------------------------------------------------------------------


def argv(hardware: Hardware, start: Start, *, offers: Offers) -> tuple[list[str], tuple[LeftOut, ...]]:
    """The words that start the machine, and what of it this QEMU does not have."""
    builder = _Builder(hardware, start, offers)
    return builder.words(), tuple(builder.left)


class _Builder:
    """One command line."""

    def __init__(self, hardware: Hardware, start: Start, offers: Offers) -> None:
        self._hardware = hardware
        self._start = start
        self._offers = offers
        self._places = {place.target: number for number, place in enumerate(start.disks)}
        self.left: list[LeftOut] = []

    def _leave(self, what: str, why: str) -> None:
        self.left.append(LeftOut(what=what, why=why))

    def words(self) -> list[str]:
        """All of them."""
        devices = self._devices()
        words = [self._offers.program, "-no-user-config", "-nodefaults", "-display", "none"]
        words += self._identity()
        words += self._board()
        words += [*self._characters(devices), *self._supplies(devices)]
        for number, place in enumerate(self._start.disks):
            for node in nodes(place, number):
                words += ["-blockdev", json.dumps(node)]
        for device in devices:
            words += self._device(device)
        return words

    # -- the machine ---------------------------------------------------------------------

    def _identity(self) -> Iterator[str]:
        yield from ("-name", joined({"guest": self._hardware.name}))
        if self._hardware.uuid:
            yield from ("-uuid", self._hardware.uuid)
        if self._start.paused:
            yield "-S"
        if self._offers.sandbox:
            # A bridge is entered by a program that QEMU starts.
            spawn = "" if self._start.network.link is Link.BRIDGE else ",spawn=deny"
            yield from ("-sandbox", f"on,obsolete=deny,elevateprivileges=deny{spawn},resourcecontrol=deny")

    def _board(self) -> list[str]:
        hardware, start = self._hardware, self._start
        words = ["-machine", joined({"type": self._machine(), **dict(hardware.machine_options), **self._flash()})]
        for name in self._flash().values():
            header = next(item for item in hardware.firmware if flash_node(item.name) == name)
            words += ["-blockdev", json.dumps(_flash(name, start.firmware[header.name], writable=header.writable))]
        words += ["-accel", start.accel, "-cpu", self._cpu()]
        words += ["-m", f"{hardware.memory // KiB}k", "-smp", joined({key: str(n) for key, n in hardware.smp})]
        if hardware.rtc:
            words += ["-rtc", joined(dict(hardware.rtc))]
        if hardware.boot:
            words += ["-boot", joined(dict(hardware.boot))]
        for told in hardware.smbios:
            words += ["-smbios", joined(dict(told))]
        for driver, name, value in self._defaults():
            words += ["-global", joined({"driver": driver, "property": name, "value": value})]
        for name, text in hardware.firmware_config:
            words += ["-fw_cfg", joined({"name": name, "string": text})]
        if hardware.watchdog_action:
            words += ["-watchdog-action", hardware.watchdog_action]
        return [*words, *self._kernel()]

    def _defaults(self) -> Iterator[tuple[str, str, str]]:
        for driver, name, value in self._hardware.defaults:
            if driver.startswith("kvm-") and self._start.accel != "kvm":
                continue
            yield driver, name, value

    def _machine(self) -> str:
        wanted = self._hardware.machine
        if wanted in self._offers.machines:
            return wanted
        instead = self._hardware.family
        if instead not in self._offers.machines:
            instead = next(
                (name for name in families(self._hardware.architecture) if name in self._offers.machines), "none"
            )
        self._leave(f"machine type {wanted}", f"this QEMU does not have it; {instead} stands in")
        return instead

    def _flash(self) -> dict[str, str]:
        """Options of the machine that connect its flash devices."""
        known = [header.name for header in self._hardware.firmware if header.name in self._start.firmware]
        return {name: flash_node(name) for name in known}

    def _cpu(self) -> str:
        """The processor. What only KVM gives is left out under software emulation."""
        saved = self._hardware.cpu
        if saved is None:
            return qemu.processor(self._start.accel, self._hardware.architecture)
        if self._start.accel == "kvm":
            return saved
        model, *features = saved.split(",")
        if model == "host":
            self._leave("-cpu host", "there is no KVM here; QEMU's own processor with all it can stands in")
            model = "max"
        return ",".join([model, *(feature for feature in features if not _OF_KVM.match(feature))])

    def _kernel(self) -> Iterator[str]:
        if self._start.bios:
            yield from ("-bios", str(self._start.bios))
        if (kernel := self._start.kernel) is not None:
            yield from ("-kernel", str(kernel.image))
            if kernel.initrd is not None:
                yield from ("-initrd", str(kernel.initrd))
            if words := self._hardware.append if kernel.append is None else kernel.append:
                yield from ("-append", words)

    # -- connections ---------------------------------------------------------------------

    def _characters(self, devices: Sequence[Device]) -> Iterator[str]:
        """Monitors, the console, the agent's channel, and ports that lead nowhere."""
        start = self._start
        for number, path in enumerate(start.qmp):
            yield from ("-chardev", _socket(f"qmp{number}", path), "-mon", f"chardev=qmp{number},mode=control")
        if start.console is not None:
            yield from ("-chardev", "file," + joined({"id": "console", "path": str(start.console), "append": "on"}))
        if start.agent is not None and any(device.role is Role.AGENT for device in devices):
            yield from ("-chardev", _socket("agent", start.agent))
        for device in devices:
            if (name := device.get("chardev") or "").startswith(_NOWHERE):
                yield from ("-chardev", f"null,id={name}")

    def _supplies(self, devices: Sequence[Device]) -> Iterator[str]:
        """The screen's viewer, the TPM's emulator, random numbers, cards' networks."""
        start = self._start
        if start.vnc is not None:
            yield from ("-vnc", f"unix:{start.vnc}".replace(",", ",,"))
        if start.tpm is not None and any(device.role is Role.TPM for device in devices):
            yield from ("-chardev", "socket," + joined({"id": "tpm-control", "path": str(start.tpm)}))
            yield from ("-tpmdev", "emulator,id=tpm-emulator,chardev=tpm-control")
        for number, device in enumerate(devices):
            if device.role is Role.RNG:
                yield from ("-object", f"rng-builtin,id=random{number}")
            if device.role is Role.NIC and start.network.link is not Link.NONE:
                yield from ("-netdev", _network(start.network, f"net{number}"))

    def _devices(self) -> list[Device]:
        """Those that are made, in order, each with what it is connected to."""
        kept = [found for device in self._hardware.devices if (found := self._known(device)) is not None]
        made, moved = settled(kept)
        self.left += moved
        if self._start.console is not None and not any(device.role is Role.SERIAL for device in made):
            made += [device for device in [self._port()] if device is not None]
        roles = [device.role for device in made]
        return [
            replace(device, properties=(*device.properties, *self._connection(device, number, roles[:number])))
            for number, device in enumerate(made)
        ]

    def _known(self, device: Device) -> Device | None:
        """The device, or what stands in for it; None if it cannot be."""
        told = device.driver + (f" ({device.id})" if device.id else "")
        if device.target is not None and device.target not in self._places:
            self._leave(told, f"disk {device.target} is not taken along")
            return None
        if device.role is Role.TPM and self._start.tpm is None:
            self._leave(told, "there is no emulator for it, or no state of it in the restore point")
            return None
        if device.driver in self._offers.devices:
            return device
        if device.role is Role.DISPLAY and "VGA" in self._offers.devices:
            self._leave(told, "this QEMU does not have it; VGA stands in")
            places = tuple(item for item in device.properties if item[0] in ("id", "bus", "addr"))
            return Device(driver="VGA", role=Role.DISPLAY, properties=places)
        if device.target is not None:
            self._leave(told, "this QEMU does not have it; a virtio disk stands in")
            return Device(driver="virtio-blk-pci", role=Role.DISK, target=device.target)
        self._leave(told, "this QEMU does not have it")
        return None

    def _port(self) -> Device | None:
        """A serial port for the console of a machine without one."""
        names = {"s390x": "sclpconsole", "ppc64": "spapr-vty"}
        name = names.get(self._hardware.architecture, "isa-serial")
        on_board = name not in self._offers.devices or self._hardware.family == "virt"
        return None if on_board else Device(driver=name, role=Role.SERIAL)

    def _connection(self, device: Device, number: int, before: Sequence[Role]) -> list[tuple[str, str]]:
        start = self._start
        match device.role:
            case Role.DISK | Role.CDROM if device.target is not None:
                needs = [("serial", device.target)] if device.driver == "nvme" and not device.get("serial") else []
                return [("drive", disk_node(self._places[device.target])), *needs]
            case Role.NIC if start.network.link is not Link.NONE:
                return [("netdev", f"net{number}")]
            case Role.SERIAL:
                first = Role.SERIAL not in before and start.console is not None
                return [("chardev", "console" if first else f"{_NOWHERE}{number}")]
            case Role.AGENT:
                first = Role.AGENT not in before and start.agent is not None
                return [("chardev", "agent" if first else f"{_NOWHERE}{number}"), *_named(device)]
            case Role.RNG:
                return [("rng", f"random{number}")]
            case Role.TPM:
                return [("tpmdev", "tpm-emulator")]
        return []

    def _device(self, device: Device) -> Iterator[str]:
        values = dict(device.properties)
        yield from ("-device", ",".join([device.driver, joined(values)] if values else [device.driver]))


def _named(device: Device) -> list[tuple[str, str]]:
    return [] if device.get("name") else [("name", qemu.AGENT_PORT)]


def _socket(name: str, path: Path) -> str:
    return "socket," + joined({"id": name, "path": str(path), "server": "on", "wait": "off"})


def _network(network: Network, name: str) -> str:
    match network.link:
        case Link.BRIDGE:
            return "bridge," + joined({"id": name, "br": network.bridge or ""})
        case Link.ISOLATED:
            return f"user,id={name},restrict=on"
    return f"user,id={name}"


# -- block nodes -----------------------------------------------------------------------------


def disk_node(number: int) -> str:
    """The name of the node on top of disk `number`, in the order of `Start.disks`."""
    return f"disk-{number}"


def flash_node(name: str) -> str:
    """The name of the node of a flash device."""
    return f"flash-{name.removeprefix('pflash')}"


def nodes(place: Place, number: int) -> list[dict[str, object]]:
    """The block nodes of a disk (QAPI BlockdevOptions), lowest first."""
    top = disk_node(number)
    lower: list[dict[str, object]] = []
    if place.point is not None:
        # QEMU waits for the server: when it is away, and when it is not there yet (`open-timeout`).
        server: dict[str, object] = {
            "driver": "nbd",
            "node-name": f"{top}-server",
            "server": {"type": "unix", "path": str(place.point.socket)},
            "export": place.point.export,
            "reconnect-delay": place.patience,
            "read-only": True,
        }
        raw: dict[str, object] = {
            "driver": "raw",
            "node-name": f"{top}-point",
            "file": f"{top}-server",
            "read-only": True,
        }
        lower += [server, raw]
    file: dict[str, object] = {"driver": "file", "node-name": f"{top}-file", "filename": str(place.image)}
    file["discard"] = "unmap"
    return [*lower, file, format_node(place, number)]


def lower_nodes(place: Place, number: int) -> tuple[str, ...]:
    """Names of the nodes below the overlay, from above."""
    top = disk_node(number)
    return () if place.point is None else (f"{top}-point", f"{top}-server")


def format_node(place: Place, number: int, *, backing: str | None = None) -> dict[str, object]:
    """The node on top; `backing` is the node that it is an overlay of, if that is not the restore point any more."""
    top = disk_node(number)
    found: dict[str, object] = {
        "driver": place.format,
        "node-name": top,
        "file": f"{top}-file",
        "discard": "unmap",
    }
    if place.point is not None:
        found["backing"] = backing or f"{top}-point"
    elif place.format == "qcow2":
        found["backing"] = None
    return found


def _flash(node: str, path: Path, *, writable: bool) -> dict[str, object]:
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "raw", "node-name": node, "file": file, "read-only": not writable}
