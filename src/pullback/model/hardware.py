"""A machine as it can be made anew on any host: values. Pure.

What a restore point says of a machine becomes such a value by an allow-list (`model.savedhardware`); a
command line is made of it again by `programs.launching`, with images, networks and sockets of ours. So no
word of a manifest reaches this host's files, devices or programs.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from pullback.model.description import FirmwareHeader
from pullback.model.devices import Device, Role
from pullback.units import GiB, MiB

#: Where nothing is known of a machine.
DEFAULT_MEMORY = 2 * GiB
DEFAULT_CPUS = 2
#: Processors that a saved machine may ask for; QEMU's machine types end at 4096 and before.
MAX_CPUS = 4096
#: QEMU's own default (-m), where the command line says nothing.
QEMU_MEMORY = 128 * MiB
#: Ports of one AHCI controller.
_AHCI_PORTS = 6
#: What QEMU and libvirt give to machines: locally administered.
_MAC_START = "52:54:00"
#: Machine types that stand for a family, by architecture: the default first.
_FAMILIES = {
    "x86_64": ("q35", "pc", "microvm", "isapc"),
    "i386": ("q35", "pc", "microvm", "isapc"),
    "aarch64": ("virt",),
    "arm": ("virt",),
    "riscv64": ("virt",),
    "riscv32": ("virt",),
    "loongarch64": ("virt",),
    "ppc64": ("pseries", "powernv"),
    "s390x": ("s390-ccw-virtio",),
}
#: Versions of a type, as families: pc-q35-7.2 and pc-q35-rhel9.2.0 are q35.
_FAMILY_STARTS = (
    ("pc-q35-", "q35"),
    ("pc-i440fx-", "pc"),
    ("pc-", "pc"),
    ("rhel", "pc"),
    ("ubuntu-q35", "q35"),
    ("ubuntu", "pc"),
    ("virt-", "virt"),
    ("pseries-", "pseries"),
    ("powernv", "powernv"),
    ("s390-ccw-virtio-", "s390-ccw-virtio"),
    ("microvm", "microvm"),
)


class Link(StrEnum):
    """What network cards are connected to."""

    #: Nothing: cards without a wire.
    NONE = "none"
    #: Addresses and names, but no way out: to nobody but QEMU itself.
    ISOLATED = "isolated"
    #: Through this host, as its own programs reach the world. Nobody reaches the machine.
    USER = "user"
    #: A bridge of this host: the machine is in its network as any other.
    BRIDGE = "bridge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What the network cards of a started machine are connected to."""

    link: Link = Link.NONE
    #: The bridge's name on this host.
    bridge: str | None = None

    def __str__(self) -> str:
        return str(self.link) if self.bridge is None else f"{self.link}={self.bridge}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Something of a saved machine that is not made anew."""

    #: What it was, in the words of the command line.
    what: str
    #: Why, as a clause.
    why: str
    #: It was the old host's (sockets, logs, images) and has its counterpart on this one: no loss.
    of_host: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A machine without its disks' contents, and without anything of a host."""

    #: QEMU's word for it: x86_64.
    architecture: str
    name: str
    uuid: str | None = None
    #: The machine type, as it was saved: pc-q35-7.2.
    machine: str
    machine_options: tuple[tuple[str, str], ...] = ()
    #: Model and features, as -cpu takes them; None: what is usual here.
    cpu: str | None = None
    #: Bytes.
    memory: int = DEFAULT_MEMORY
    #: As -smp takes it: cpus, sockets, cores …
    smp: tuple[tuple[str, int], ...] = (("cpus", DEFAULT_CPUS),)
    rtc: tuple[tuple[str, str], ...] = ()
    boot: tuple[tuple[str, str], ...] = ()
    #: What firmware tells of the maker and the like: one mapping for each -smbios.
    smbios: tuple[tuple[tuple[str, str], ...], ...] = ()
    #: (driver, property, value) of -global.
    defaults: tuple[tuple[str, str, str], ...] = ()
    #: (name, text) of -fw_cfg.
    firmware_config: tuple[tuple[str, str], ...] = ()
    watchdog_action: str | None = None
    #: In the order in which they are made.
    devices: tuple[Device, ...] = ()
    #: Flash memory with firmware and variables, whose bytes the restore point has.
    firmware: tuple[FirmwareHeader, ...] = ()
    #: The kernel's command line, if a kernel was started directly. Only of use with a kernel that the user names.
    append: str | None = None
    #: A kernel was started directly: the disks alone may not be able to start.
    had_kernel: bool = False
    left_out: tuple[LeftOut, ...] = ()

    def of(self, role: Role) -> tuple[Device, ...]:
        """The devices with that role."""
        return tuple(device for device in self.devices if device.role is role)

    @property
    def targets(self) -> tuple[str, ...]:
        """Its disks."""
        return tuple(device.target for device in self.devices if device.target is not None)

    @property
    def has_agent(self) -> bool:
        """Is there a channel for the guest agent?"""
        return bool(self.of(Role.AGENT))

    @property
    def has_tpm(self) -> bool:
        """Had it a trusted platform module?"""
        return bool(self.of(Role.TPM))

    @property
    def cpus(self) -> int:
        """Processors."""
        return dict(self.smp).get("cpus", 1)

    @property
    def family(self) -> str:
        """Its machine type without a version: q35, pc, virt …"""
        return family(self.machine, self.architecture)

    def with_cpus(self, cpus: int) -> Hardware:
        """The same with so many processors."""
        return replace(self, smp=(("cpus", cpus),))

    def as_copy(self, name: str) -> Hardware:
        """A copy that may run beside the original: another name, uuid, and addresses of network cards."""
        devices = tuple(
            device.having("mac", new_mac()) if device.role is Role.NIC else device for device in self.devices
        )
        return replace(self, name=name, uuid=str(uuid.uuid4()), devices=devices)

    def plain(self) -> Hardware:
        """Devices that every QEMU has in place of the saved ones; memory, processors, firmware and addresses stay."""
        macs = [device.get("mac") for device in self.of(Role.NIC)]
        kept = [item for item in self.left_out if item.of_host]
        gone = LeftOut(what="the saved devices", why="plain hardware was asked for")
        chosen = standard(
            self.name,
            self.targets,
            architecture=self.architecture,
            macs=[mac or mac_of(f"{self.name} {number}") for number, mac in enumerate(macs)],
            machine=self.family,
        )
        flags = tuple((key, value) for key, value in self.machine_options if key == "smm")
        secure = tuple(item for item in self.defaults if item[0].startswith("cfi.pflash"))
        return replace(
            chosen,
            uuid=self.uuid,
            memory=self.memory,
            smp=(("cpus", self.cpus),),
            rtc=self.rtc,
            smbios=self.smbios,
            machine_options=flags,
            defaults=secure,
            firmware=self.firmware,
            append=self.append,
            had_kernel=self.had_kernel,
            devices=(*chosen.devices, *self.of(Role.TPM)),
            left_out=(*kept, gone),
        )


def new_mac() -> str:
    """A random address for a network card."""
    return ":".join([_MAC_START, *(f"{byte:02x}" for byte in secrets.token_bytes(3))])


def mac_of(text: str) -> str:
    """The same address for the same text."""
    return ":".join([_MAC_START, *(f"{byte:02x}" for byte in hashlib.sha256(text.encode()).digest()[:3])])


def families(architecture: str) -> tuple[str, ...]:
    """Machine types of an architecture that stand for many, the usual one first."""
    return _FAMILIES.get(architecture, ("virt",))


def family(machine: str, architecture: str) -> str:
    """A machine type without its version; the architecture's usual one for a type that we do not know."""
    known = families(architecture)
    if machine in known:
        return machine
    found = next((name for start, name in _FAMILY_STARTS if machine.startswith(start)), None)
    return found if found in known else known[0]


#: A bus that is there without any device of ours.
_BUILT_IN = re.compile(
    r"(?:pcie?|isa|ide|scsi|sata|usb-bus|virtio-serial-bus|virtio-bus|virtual-css|main-system-bus)[.\d]*"
)
#: Where a device sits on its bus.
_PLACE = frozenset({"bus", "addr", "port", "unit", "scsi-id", "lun", "channel"})


def settled(devices: Sequence[Device]) -> tuple[list[Device], list[LeftOut]]:
    """Each on a bus that will be there: what sat on a device that is not there goes where there is room."""
    there = {device.id for device in devices if device.id}
    made: list[Device] = []
    moved: list[LeftOut] = []
    for device in devices:
        bus = device.get("bus")
        if bus is None or {bus, bus.rpartition(".")[0]} & there or _BUILT_IN.fullmatch(bus):
            made.append(device)
            continue
        moved.append(LeftOut(what=f"{device.driver} on {bus}", why="that bus is not there; it sits elsewhere"))
        made.append(replace(device, properties=tuple(item for item in device.properties if item[0] not in _PLACE)))
    return made, moved


# -- a machine of which nothing is known -----------------------------------------------------


def standard(
    name: str,
    targets: Sequence[str],
    *,
    architecture: str,
    macs: Sequence[str] | None = None,
    machine: str | None = None,
) -> Hardware:
    """A machine of devices that every QEMU has, for the disks that are called so.

    `macs`: an address for each network card; None: one card, whose address follows from the name.
    """
    ide = any(target.startswith("hd") for target in targets)
    kind = machine or ("pc" if ide and architecture in ("x86_64", "i386") else families(architecture)[0])
    bus = "ccw" if architecture == "s390x" else "pci"
    cards = [mac_of(name)] if macs is None else list(macs)
    devices = [
        *disks(targets, family=kind, bus=bus),
        *(Device(driver=f"virtio-net-{bus}", role=Role.NIC, properties=(("mac", mac),)) for mac in cards),
        Device(driver=f"virtio-serial-{bus}", properties=(("id", "ports"),)),
        Device(
            driver="virtserialport",
            role=Role.AGENT,
            properties=(("id", "agent"), ("bus", "ports.0")),
        ),
        Device(driver=f"virtio-rng-{bus}", role=Role.RNG),
    ]
    if architecture in ("x86_64", "i386"):
        devices += [Device(driver="VGA", role=Role.DISPLAY), Device(driver="isa-serial", role=Role.SERIAL)]
    return Hardware(architecture=architecture, name=name, machine=kind, devices=tuple(devices))


def disks(targets: Sequence[str], *, family: str, bus: str = "pci", start: int = 0) -> list[Device]:
    """Devices for disks, chosen by what the disks are called. SATA for `sd`: any guest has a driver for it.

    `start`: the number of the first controller.
    """
    serial = [target for target in targets if target.startswith("sd")]
    made: list[Device] = []
    for number in range(start, start + -(-len(serial) // _AHCI_PORTS)):
        made.append(Device(driver="ahci", properties=(("id", f"sata{number}"),)))
    parallel = 0
    for target in targets:
        if target in serial:
            controller, port = divmod(serial.index(target), _AHCI_PORTS)
            made.append(_disk("ide-hd", target, bus=f"sata{start + controller}.{port}"))
        elif target.startswith("nvme"):
            made.append(_disk("nvme", target, serial=target))
        elif target.startswith("hd") and family == "pc" and parallel < 4:
            made.append(_disk("ide-hd", target, bus=f"ide.{parallel // 2}", unit=str(parallel % 2)))
            parallel += 1
        else:
            made.append(_disk(f"virtio-blk-{bus}", target))
    return made


def _disk(driver: str, target: str, **properties: str) -> Device:
    return Device(driver=driver, role=Role.DISK, properties=tuple(properties.items()), target=target)
