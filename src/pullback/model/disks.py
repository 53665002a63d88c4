"""A machine's disks as values, and the rule that gives each its target."""

from __future__ import annotations

import enum
import string
from collections.abc import Iterable
from dataclasses import dataclass


class Bus(enum.StrEnum):
    """How a disk is attached; decides the letters of its target."""

    VIRTIO = "virtio"
    SCSI = "scsi"
    SATA = "sata"
    IDE = "ide"
    USB = "usb"
    NVME = "nvme"
    FLOPPY = "floppy"
    SD = "sd"
    FIRMWARE = "firmware"
    OTHER = "other"


#: The first letters of a target, by bus: what a Linux guest, and libvirt, would call such a disk.
PREFIXES = {
    Bus.VIRTIO: "vd",
    Bus.SCSI: "sd",
    Bus.SATA: "sd",
    Bus.IDE: "hd",
    Bus.USB: "sd",
    Bus.NVME: "nvme",
    Bus.FLOPPY: "fd",
    Bus.SD: "mmcblk",
    Bus.FIRMWARE: "pflash",
    Bus.OTHER: "disk",
}
_NUMBERED = {Bus.NVME, Bus.SD, Bus.FIRMWARE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitmap:
    """A dirty bitmap as QEMU shows it (QAPI BlockDirtyInfo)."""

    name: str
    #: Bytes that one bit stands for.
    granularity: int
    #: Bytes marked dirty.
    count: int
    #: Notices new writes.
    recording: bool = True
    #: In use by a job or an export: cannot be changed now.
    busy: bool = False
    #: Stored in the image when it is closed.
    persistent: bool = False
    #: Was in use when the machine died: worthless, can only be removed.
    inconsistent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A block device of a machine and what lies under it."""

    #: The name we and the user give it: vda, sda, nvme0n1 …
    target: str
    bus: Bus
    #: QEMU's `qdev`: the device's id or QOM path, the handle for `qom-set … drive`.
    qdev: str
    #: The device's serial number, "" if it has none.
    serial: str = ""
    #: The node on top, directly under the device; None without a medium.
    root: str | None = None
    #: The format node that holds the bitmaps (below filters such as throttle).
    node: str | None = None
    #: Driver of that node: qcow2, raw …
    format: str = ""
    #: File name of the image, as QEMU has it.
    image: str = ""
    #: Bytes.
    size: int = 0
    #: Bytes of the format's cluster: holes of the disk are whole clusters.
    cluster: int = 65536
    read_only: bool = False
    removable: bool = False
    #: The iothread it lives in, or None for the main loop.
    iothread: str | None = None
    #: Named bitmaps on `node`.
    bitmaps: tuple[Bitmap, ...] = ()
    #: Names of our bitmaps that lie in backing images of this disk, where they are of no use.
    buried: tuple[str, ...] = ()
    #: Why changes on it cannot be tracked, or None if they can.
    untrackable: str | None = None
    #: Its format holds no bitmaps: changes are tracked in QEMU's memory, until that QEMU ends.
    transient: bool = False
    #: The file whose holes are the disk's, where QEMU does not tell all of them; None: it does.
    hole_file: str | None = None
    #: Why it is left out unless named, or None if it takes part.
    left_out: str | None = None

    @property
    def unlasting(self) -> str | None:
        """Why a checkpoint on it would not outlive this QEMU, or None if it would."""
        return self.untrackable or (unstorable(self.format) if self.transient else None)


def unstorable(format: str) -> str:
    """Why a disk of that format keeps no bitmaps when its machine ends."""
    if format == "qcow2":
        return "its qcow2 version 2 cannot hold bitmaps (qemu-img amend -o compat=1.1)"
    return f"its format {format} cannot hold bitmaps"


def targets(devices: Iterable[tuple[Bus, str]]) -> list[str]:
    """The target of each device, given (bus, id) in QEMU's own order (`query-block`).

    The rule: a device whose id already *is* a target of its bus (`vdb`, `sda`, `nvme1n1`) has
    that target. Every other one takes the first free letter, or number, of its bus, in order.
    A device keeps its letter also while it has no medium.
    """
    listed = list(devices)
    taken = {name for bus, name in listed if _is_target(bus, name)}
    given = []
    for bus, name in listed:
        target = name if name in taken and _is_target(bus, name) and name not in given else _free(bus, taken)
        taken.add(target)
        given.append(target)
    return given


def bus_of(target: str) -> Bus | None:
    """The bus whose disks are called so (`sd…`: SCSI), or None if the rule gives no such target."""
    return next((bus for bus in Bus if _is_target(bus, target)), None)


def _free(bus: Bus, taken: set[str]) -> str:
    number = 0
    while (target := _spell(bus, number)) in taken:
        number += 1
    return target


def _spell(bus: Bus, number: int) -> str:
    prefix = PREFIXES[bus]
    if bus is Bus.NVME:
        return f"{prefix}{number}n1"
    return f"{prefix}{number}" if bus in _NUMBERED else prefix + _letters(number)


def _letters(number: int) -> str:
    """0 → a, 25 → z, 26 → aa: as Linux counts disks."""
    text = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        text = string.ascii_lowercase[digit] + text
    return text


def _is_target(bus: Bus, name: str) -> bool:
    prefix = PREFIXES[bus]
    rest = name.removeprefix(prefix)
    if rest == name or not rest:
        return False
    if bus is Bus.NVME:
        return rest.endswith("n1") and rest[:-2].isdecimal()
    return rest.isdecimal() if bus in _NUMBERED else len(rest) <= 3 and all(c in string.ascii_lowercase for c in rest)
