"""Devices of a machine that may be made anew from a saved command line: the allow-list. Pure.

A driver that is not here is left out, and so is a property that is not. No property here names a file,
a descriptor, a program, a socket or another object of the host: what a device is connected to (an image,
a network) is said when it is started, by us. Values must look like numbers, switches, names or addresses.

The names are those of QEMU's `-device help` and `-device DRIVER,help`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace


class Role(enum.StrEnum):
    """What a device is there for, and so what it is connected to."""

    #: Nothing on this host: controllers, bridges, watchdogs, keyboards.
    PLAIN = "plain"
    #: A disk of the restore point.
    DISK = "disk"
    #: A drive for discs that is empty.
    CDROM = "cdrom"
    #: A network card.
    NIC = "nic"
    #: A serial port.
    SERIAL = "serial"
    #: The guest agent's channel.
    AGENT = "agent"
    #: Random numbers.
    RNG = "rng"
    #: A screen.
    DISPLAY = "display"
    #: A trusted platform module.
    TPM = "tpm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device of a machine."""

    driver: str
    role: Role = Role.PLAIN
    #: Its properties as the short form has them, what it is connected to aside.
    properties: tuple[tuple[str, str], ...] = ()
    #: The disk of the restore point that it is (`Role.DISK`).
    target: str | None = None

    def get(self, name: str) -> str | None:
        """A property, None if it is not set."""
        return next((value for key, value in self.properties if key == name), None)

    def having(self, name: str, value: str) -> Device:
        """The same with a property set."""
        return replace(self, properties=(*((key, old) for key, old in self.properties if key != name), (name, value)))

    @property
    def id(self) -> str | None:
        """QEMU's id of it."""
        return self.get("id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """What is allowed of a driver."""

    role: Role
    properties: frozenset[str]


_PLACE = "id bus addr multifunction"
_VIRTIO = (
    f"{_PLACE} disable-legacy disable-modern ioeventfd event_idx indirect_desc packed ats iommu_platform any_layout "
    "notify_on_empty queue_reset page-per-vq modern-pio-notify use-started use-disabled-flag vectors class devno"
)
_DISK = (
    "bootindex serial logical_block_size physical_block_size min_io_size opt_io_size discard_granularity write-cache "
    "account-invalid account-failed"
)
_SCSI_DISK = (
    f"{_PLACE} {_DISK} bus channel scsi-id lun wwn port_wwn port_index ver vendor product device_id removable dpofua "
    "rotation_rate max_unmap_size max_io_size scsi_version quirk_mode_page_apple_vendor"
)
_NIC = (
    "bootindex mac host_mtu mq rx_queue_size tx_queue_size csum guest_csum gso guest_tso4 guest_tso6 guest_ecn "
    "guest_ufo guest_announce host_tso4 host_tso6 host_ecn host_ufo mrg_rxbuf status ctrl_vq ctrl_rx ctrl_vlan "
    "ctrl_rx_extra ctrl_mac_addr ctrl_guest_offloads tx x-txtimer x-txburst speed duplex rss hash mitigation "
    "autonegotiation extra_mac_registers subsys_ven subsys rombar"
)
_BRIDGE = (
    f"{_PLACE} port chassis chassis_nr slot hotplug shpc msi io-reserve mem-reserve pref64-reserve bus-reserve x-speed "
    "x-width power_controller_present"
)
_USB = f"{_PLACE} masterbus firstport p2 p3 slots streams intrs msi msix maxframes num-ports"
_ON_USB = "id bus port usb_version ports"
_SCREEN = (
    f"{_PLACE} vgamem_mb ram_size ram_size_mb vram_size vram_size_mb vram64_size_mb max_outputs xres yres xmax ymax "
    "edid vgamem max_hostmem mmio qemu-extended-regs big-endian-framebuffer refresh_rate"
)

_ALLOWED: Mapping[tuple[Role, str], str] = {
    (Role.PLAIN, _BRIDGE): "pcie-root-port ioh3420 pci-bridge pcie-pci-bridge i82801b11-bridge x3130-upstream "
    "xio3130-downstream",
    (Role.PLAIN, f"{_VIRTIO} num_queues cmd_per_lun max_sectors virtqueue_size seg_max_adjust hotplug param_change"): (
        "virtio-scsi-pci virtio-scsi-pci-transitional virtio-scsi-pci-non-transitional virtio-scsi-device "
        "virtio-scsi-ccw"
    ),
    (Role.PLAIN, f"{_PLACE} sas_address mptsas1068 max_sge max_cmds use_jbod use_msi use_msix nqn speed"): (
        "lsi lsi53c895a lsi53c810 megasas megasas-gen2 mptsas1068 pvscsi am53c974 dc390 ahci ich9-ahci piix3-ide "
        "piix4-ide isa-ide nvme-subsys sysbus-ahci spapr-vscsi"
    ),
    (Role.PLAIN, f"{_VIRTIO} max_ports emergency-write"): "virtio-serial virtio-serial-pci virtio-serial-device "
    "virtio-serial-ccw virtio-serial-pci-transitional virtio-serial-pci-non-transitional",
    (Role.PLAIN, _USB): "qemu-xhci nec-usb-xhci usb-ehci ich9-usb-ehci1 ich9-usb-ehci2 ich9-usb-uhci1 ich9-usb-uhci2 "
    "ich9-usb-uhci3 ich9-usb-uhci4 ich9-usb-uhci5 ich9-usb-uhci6 piix3-usb-uhci piix4-usb-uhci pci-ohci",
    (Role.PLAIN, _ON_USB): "usb-tablet usb-mouse usb-kbd usb-hub usb-wacom-tablet usb-uas",
    (Role.PLAIN, _VIRTIO): "virtio-keyboard-pci virtio-mouse-pci virtio-tablet-pci virtio-keyboard-ccw "
    "virtio-mouse-ccw virtio-tablet-ccw",
    (Role.PLAIN, f"{_VIRTIO} deflate-on-oom free-page-hint free-page-reporting page-poison"): (
        "virtio-balloon virtio-balloon-pci virtio-balloon-device virtio-balloon-ccw "
        "virtio-balloon-pci-transitional virtio-balloon-pci-non-transitional"
    ),
    (Role.PLAIN, f"{_PLACE} guid iobase ioport events iommu"): "i6300esb ib700 diag288 pvpanic pvpanic-pci vmcoreinfo "
    "vmgenid sga",
    (Role.DISK, f"{_VIRTIO} {_DISK} num-queues queue-size seg-max-adjust config-wce discard write-zeroes "
     "request-merging max-discard-sectors max-write-zeroes-sectors cyls heads secs"): (
        "virtio-blk virtio-blk-pci virtio-blk-pci-transitional virtio-blk-pci-non-transitional virtio-blk-device "
        "virtio-blk-ccw"
    ),
    (Role.DISK, _SCSI_DISK): "scsi-hd scsi-disk",
    (Role.DISK, f"id bus unit {_DISK} ver wwn model rotation_rate cyls heads secs bios-chs-trans"): "ide-hd ide-drive",
    (Role.DISK, f"{_PLACE} {_DISK} max_ioqpairs msix_qsize num_queues aerl mdts vsl max_hw_ioq mqes "
     "use-intel-id legacy-cmb subsys cntlid"): "nvme",
    (Role.DISK, f"id bus {_DISK} nsid uuid eui64 eui64-default nguid detached shared zoned"): "nvme-ns",
    (Role.DISK, f"{_ON_USB} {_DISK} removable"): "usb-storage usb-bot",
    (Role.CDROM, f"{_SCSI_DISK}"): "scsi-cd",
    (Role.CDROM, f"id bus unit {_DISK} ver wwn model"): "ide-cd",
    (Role.NIC, f"{_VIRTIO} {_NIC}"): "virtio-net virtio-net-pci virtio-net-pci-transitional "
    "virtio-net-pci-non-transitional virtio-net-device virtio-net-ccw",
    (Role.NIC, f"{_PLACE} {_NIC}"): "e1000 e1000-82540em e1000-82544gc e1000-82545em e1000e igb rtl8139 ne2k_pci pcnet "
    "tulip i82550 i82551 i82557a i82557b i82557c i82558a i82558b i82559a i82559b i82559c i82559er i82562 i82801 "
    "vmxnet3 spapr-vlan",
    (Role.NIC, f"{_ON_USB} mac bootindex"): "usb-net",
    (Role.NIC, "id mac iobase irq bootindex"): "ne2k_isa",
    (Role.SERIAL, f"{_PLACE} index iobase irq nr reg prog_if"): "isa-serial pci-serial virtconsole sclpconsole "
    "spapr-vty",
    (Role.AGENT, "id bus nr name"): "virtserialport",
    (Role.RNG, f"{_VIRTIO} max-bytes period"): "virtio-rng virtio-rng-pci virtio-rng-device virtio-rng-ccw "
    "virtio-rng-pci-transitional virtio-rng-pci-non-transitional",
    (Role.DISPLAY, _SCREEN): "VGA secondary-vga cirrus-vga isa-vga isa-cirrus-vga qxl-vga qxl vmware-svga "
    "bochs-display ramfb ati-vga",
    (Role.DISPLAY, f"{_VIRTIO} {_SCREEN}"): "virtio-vga virtio-gpu virtio-gpu-pci virtio-gpu-device virtio-gpu-ccw",
    (Role.TPM, "id ppi reg"): "tpm-crb tpm-tis tpm-tis-device tpm-spapr",
}  # fmt: skip

DRIVERS: Mapping[str, Driver] = {
    name: Driver(role=role, properties=frozenset(words.split()))
    for (role, words), names in _ALLOWED.items()
    for name in names.split()
}

#: What another driver stands in for: the same hardware for the guest, without the host's part in it.
STAND_INS: Mapping[str, str] = {
    # The disk was the host's own; here it is the restore point's.
    "scsi-block": "scsi-hd",
    "scsi-generic": "scsi-hd",
    "vhost-user-blk-pci": "virtio-blk-pci",
    "vhost-user-blk": "virtio-blk-pci",
    "vhost-vdpa-device-pci": "virtio-blk-pci",
    # Drawing by the host's graphics card.
    "virtio-vga-gl": "virtio-vga",
    "virtio-gpu-gl-pci": "virtio-gpu-pci",
    "vhost-user-vga": "virtio-vga",
    "vhost-user-gpu-pci": "virtio-gpu-pci",
}

# Why drivers are left out, by how they begin; the first that fits.
_REASONS = (
    ("vfio-", "it is a device of the host"),
    ("pci-assign", "it is a device of the host"),
    ("kvm-pci-assign", "it is a device of the host"),
    ("usb-host", "it is a device of the host"),
    ("usb-redir", "it is a device of whoever watches the machine"),
    ("ccid-", "it is a device of the host"),
    ("smartcard", "it is a device of the host"),
    ("virtio-9p", "it shows directories of the host"),
    ("vhost-user-fs", "it shows directories of the host"),
    ("usb-mtp", "it shows directories of the host"),
    ("vhost-vsock", "it talks to programs of the host"),
    ("vhost-", "it is served by a program of the host"),
    ("ivshmem", "it shares memory with other machines"),
    ("loader", "it loads a file of the host"),
    ("guest-loader", "it loads a file of the host"),
    ("virtserialport", "it is a channel to a program of the host"),
    ("floppy", "restore points hold no floppies"),
    ("isa-fdc", "restore points hold no floppies"),
    ("isa-parallel", "it is a printer's port"),
    ("pc-dimm", "memory that is plugged in is not made anew"),
    ("nvdimm", "memory that is plugged in is not made anew"),
    ("virtio-mem", "memory that is plugged in is not made anew"),
    ("virtio-pmem", "memory that is plugged in is not made anew"),
    ("intel-hda", "sound is left out"),
    ("ich9-intel-hda", "sound is left out"),
    ("hda-", "sound is left out"),
    ("virtio-sound", "sound is left out"),
    ("AC97", "sound is left out"),
    ("ES1370", "sound is left out"),
    ("usb-audio", "sound is left out"),
)


def reason(driver: str) -> str:
    """Why a driver is left out."""
    return next((why for start, why in _REASONS if driver.startswith(start)), "this device is not on our list")


#: An id that QEMU takes (util/id.c, id_wellformed) and that is not ours.
_ID = re.compile(r"(?!pullback)[A-Za-z][A-Za-z0-9._-]{0,63}")
#: A number, a size, a switch, a name, an address: 0x1f, 4M, on, auto, pci.1, 52:54:00:12:34:56, 02.0.
_PLAIN = re.compile(r"[A-Za-z0-9_.:+-]{1,64}")
#: What the guest reads as a text: letters, digits, and what stands between words.
_TEXT = re.compile(r"[A-Za-z0-9_.:+/#()@ -]{0,128}")
_MAC = re.compile(r"[0-9A-Fa-f]{1,2}(?:[:-][0-9A-Fa-f]{1,2}){5}")
_TEXTS = frozenset({"serial", "ver", "vendor", "product", "model", "name", "device_id", "nqn"})
_CHECKS: Mapping[str, re.Pattern[str]] = {"id": _ID, "mac": _MAC}


def allowed_value(name: str, value: str) -> bool:
    """May a property have that value?"""
    return bool(_CHECKS.get(name, _TEXT if name in _TEXTS else _PLAIN).fullmatch(value))


def prefixes(device: Device) -> frozenset[str]:
    """The first letters of the targets that such a disk can have (`model.disks.PREFIXES`)."""
    if device.driver.startswith("virtio-blk"):
        return frozenset({"vd"})
    if device.driver.startswith("nvme"):
        return frozenset({"nvme"})
    if device.driver.startswith("ide-"):
        return frozenset({"hd", "sd"})
    return frozenset({"sd"})
