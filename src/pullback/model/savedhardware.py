"""What a restore point says of a machine, as hardware that can be made anew: by an allow-list. Pure.

The command line in a manifest is hostile input. Nothing of it is passed on that is not understood: each
option, driver, property and value stands on a list here or in `model.devices`, and is written anew. What
names something of a host (files, sockets, descriptors, programs, devices) is never taken. Reading never
fails: what is not taken is told.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pullback.model import commandline, devices
from pullback.model.commandline import Option, pairs, properties, scalar, words
from pullback.model.description import CUT, MASK, Description, FirmwareHeader, Kind
from pullback.model.devices import DRIVERS, Device, Role
from pullback.model.disks import PREFIXES
from pullback.model.hardware import (
    MAX_CPUS,
    QEMU_MEMORY,
    Hardware,
    LeftOut,
    disks,
    families,
    family,
    mac_of,
    settled,
    standard,
)
from pullback.model.points import PointDisk
from pullback.model.texts import showable
from pullback.units import GiB, MiB

#: Bytes of memory that a saved machine may ask for.
_MAX_MEMORY = 64 * 1024 * GiB
#: Devices of one machine that are made; QEMU's limits are lower in practice.
_MAX_DEVICES = 1024
#: Characters of what was left out that are told.
_TOLD = 120
#: QEMU's own name of a host's architecture, where it differs from `uname -m`.
_HOSTS = {"amd64": "x86_64", "arm64": "aarch64"}
_PROGRAM = re.compile(r"qemu-system-([a-z0-9_]{1,16})")
_MACHINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CPU = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}(?:,[+-]?[A-Za-z0-9._-]{1,48}(?:=[A-Za-z0-9._ -]{0,64})?){0,512}")
_WORD = re.compile(r"[A-Za-z0-9_.:+-]{1,64}")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_SIZE = re.compile(r"(\d{1,18})([bkmgtBKMGT]?)")
_UNITS = {"b": 1, "k": 1024, "m": MiB, "": MiB, "g": GiB, "t": 1024 * GiB}
#: Options of the machine itself (-machine) that are the guest's, and mean nothing on the host.
_MACHINE_OPTIONS = frozenset(
    words(
        "usb vmport smm hpet acpi graphics i8042 pic pit sata smbus gic-version virtualization secure its highmem ras "
        "mte max-ram-below-4g fd-bootchk smbios-entry-point-type loadparm aes-key-wrap dea-key-wrap x-oem-id "
        "x-oem-table-id cap-htm cap-vsx cap-dfp cap-cfpc cap-sbbc cap-ibs cap-hpt-max-page-size cap-nested-hv "
        "cap-large-decr cap-ccf-assist cap-fwnmi ic-mode resize-hpt"
    )
)
#: (driver, property) of -global: what libvirt and people set.
_GLOBALS = frozenset(
    {
        ("ICH9-LPC", "disable_s3"),
        ("ICH9-LPC", "disable_s4"),
        ("ICH9-LPC", "noreboot"),
        ("ICH9-LPC", "acpi-pci-hotplug-with-bridge-support"),
        ("PIIX4_PM", "disable_s3"),
        ("PIIX4_PM", "disable_s4"),
        ("PIIX4_PM", "acpi-root-pci-hotplug"),
        ("PIIX4_PM", "acpi-pci-hotplug-with-bridge-support"),
        ("kvm-pit", "lost_tick_policy"),
        ("mc146818rtc", "lost_tick_policy"),
        ("cfi.pflash01", "secure"),
        ("cfi.pflash02", "secure"),
        ("q35-pcihost", "pci-hole64-size"),
        ("i440FX-pcihost", "pci-hole64-size"),
        ("mch", "extended-tseg-mbytes"),
        ("VGA", "vgamem_mb"),
        ("qxl-vga", "vgamem_mb"),
    }
)
_SMP = ("cpus", "maxcpus", "drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")
_RTC = {"base": re.compile(r"utc|localtime"), "clock": re.compile(r"host|rt|vm"), "driftfix": re.compile(r"slew|none")}
_BOOT = {
    "order": re.compile(r"[a-p]{1,16}"),
    "once": re.compile(r"[a-p]{1,16}"),
    "menu": re.compile(r"on|off"),
    "strict": re.compile(r"on|off"),
}
#: Keys of -smbios whose values are texts for the guest; `file` and `path` are not among them.
_SMBIOS = frozenset(
    words(
        "vendor version date release uefi vm manufacturer product serial uuid sku family asset location sock_pfx part "
        "max-speed current-speed processor-id processor-family loc_pfx bank speed value internal_reference "
        "external_reference connector_type port_type"
    )
)
_CONFIG_NAME = re.compile(r"opt/[A-Za-z0-9._/-]{1,48}")
_SMBIOS_TYPE = re.compile(r"0|1|2|3|4|8|11|17")
_SMBIOS_TEXT = re.compile(r"[^\x00-\x1f\x7f-\x9f]{0,512}")
_SCREENS = {
    "std": "VGA",
    "cirrus": "cirrus-vga",
    "vmware": "vmware-svga",
    "qxl": "qxl-vga",
    "virtio": "virtio-vga",
}
_CARDS = {"virtio": "virtio-net-pci", "virtio-net": "virtio-net-pci"}

#: Options that are wholly the old host's: where it kept things, how it watched, how it was fast.
_OF_HOST = frozenset(
    words(
        "S D d L accel add-fd audiodev async-teardown blockdev chardev chroot compat daemonize debugcon display "
        "dfilter enable-fips enable-kvm gdb k kvm machine-path mem-path mem-prealloc mon monitor msg netdev "
        "no-fd-bootchk no-user-config nodefaults nodefconfig nographic no-shutdown no-reboot object only-migratable "
        "overcommit parallel pidfile qmp qmp-pretty realtime run-with runas sandbox sdl seed spice teardown trace "
        "user vnc xen-attach incoming action alt-grab ctrl-grab full-screen show-cursor no-quit curses portrait "
        "no-frame enable-sync-profile s readconfig-path writeconfig"
    )
)
#: Switches that became options of the machine (QEMU 8, 9).
_SWITCHES = {"no-hpet": "hpet", "no-acpi": "acpi"}
_DRIVES = {"hda": 0, "hdb": 1, "hdc": 2, "hdd": 3}


def read(
    description: Description | None,
    disks: Sequence[PointDisk],
    firmware: Sequence[FirmwareHeader] = (),
    *,
    name: str,
) -> Hardware:
    """The machine of a restore point. A machine that was off, or is not described, gets standard devices."""
    targets = [disk.target for disk in disks]
    if description is None or description.kind is not Kind.QEMU or not description.argv:
        return _undescribed(description, targets, firmware, name)
    return _Reader(description, disks, firmware, name).hardware()


def _undescribed(
    description: Description | None, targets: Sequence[str], firmware: Sequence[FirmwareHeader], name: str
) -> Hardware:
    off = description is not None and description.kind is Kind.IMAGES
    why = "the machine was off when it was backed up" if off else "the restore point does not tell"
    unknown = LeftOut(what="all devices but disks", why=f"{why} what it was made of; standard ones stand in")
    made = standard(name, targets, architecture=_host())
    taken, left = _flash(firmware)
    return replace(made, firmware=taken, left_out=(unknown, *left))


def _host() -> str:
    name = platform.machine()
    return _HOSTS.get(name, name)


def _flash(firmware: Sequence[FirmwareHeader]) -> tuple[tuple[FirmwareHeader, ...], list[LeftOut]]:
    """The flash devices that a machine can have: two."""
    known = ("pflash0", "pflash1")
    taken = tuple(header for header in firmware if header.name in known)
    return taken, [
        LeftOut(what=f"firmware device {header.name}", why="machines are made with two")
        for header in firmware
        if header.name not in known
    ]


@dataclass(slots=True)
class _Slot:
    """A device for a disk, as the command line has it."""

    device: Device
    #: The id of what it was connected to.
    drive: str | None
    #: The image, once that is known.
    source: str | None = None


@dataclass(slots=True)
class _Found:
    """What was gathered while the options are gone through."""

    machine: str | None = None
    machine_options: dict[str, str] = field(default_factory=dict)
    cpu: str | None = None
    memory: int = QEMU_MEMORY
    smp: tuple[tuple[str, int], ...] = (("cpus", 1),)
    uuid: str | None = None
    rtc: dict[str, str] = field(default_factory=dict)
    boot: dict[str, str] = field(default_factory=dict)
    smbios: list[tuple[tuple[str, str], ...]] = field(default_factory=list)
    defaults: list[tuple[str, str, str]] = field(default_factory=list)
    firmware_config: list[tuple[str, str]] = field(default_factory=list)
    watchdog_action: str | None = None
    append: str | None = None
    had_kernel: bool = False
    #: In order; disks as slots.
    devices: list[Device | _Slot] = field(default_factory=list)
    #: Image by node or drive.
    files: dict[str, str] = field(default_factory=dict)
    #: Node under a node.
    below: dict[str, str] = field(default_factory=dict)
    #: `-drive`s that make their own device: (interface, drive's properties).
    drives: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    left: list[LeftOut] = field(default_factory=list)
    #: Options that decide whether QEMU adds a device by itself.
    screen: bool = False
    network: bool = False
    no_defaults: bool = False


class _Reader:
    """One command line, read once."""

    def __init__(
        self, description: Description, disks: Sequence[PointDisk], firmware: Sequence[FirmwareHeader], name: str
    ) -> None:
        self._description = description
        self._disks = disks
        self._name = name
        self._found = _Found()
        self._architecture = _architecture(description)
        self._firmware, left = _flash(firmware)
        self._found.left += left

    def hardware(self) -> Hardware:
        """All of it."""
        found = self._found
        options = list(commandline.options(self._description.argv))
        found.no_defaults = any(option.name == "nodefaults" for option in options)
        found.machine = self._saved_type()
        for option in options:
            self._option(option)
        self._drives()
        self._defaults()
        made = self._matched()
        return Hardware(
            architecture=self._architecture,
            name=self._name,
            uuid=found.uuid or self._described_uuid(),
            machine=found.machine or families(self._architecture)[0],
            machine_options=tuple(found.machine_options.items()),
            cpu=found.cpu,
            memory=found.memory,
            smp=found.smp,
            rtc=tuple(found.rtc.items()),
            boot=tuple(found.boot.items()),
            smbios=tuple(found.smbios),
            defaults=tuple(found.defaults),
            firmware_config=tuple(found.firmware_config),
            watchdog_action=found.watchdog_action,
            devices=tuple(made),
            firmware=self._firmware,
            append=found.append,
            had_kernel=found.had_kernel,
            left_out=tuple(found.left),
        )

    def _saved_type(self) -> str | None:
        text = self._description.machine_type
        return text if text is not None and _MACHINE.fullmatch(text) else None

    def _described_uuid(self) -> str | None:
        text = self._description.uuid
        return text if text is not None and _UUID.fullmatch(text) else None

    # -- what is told --------------------------------------------------------------------

    def _leave(self, what: object, why: str, *, of_host: bool = False) -> None:
        text = showable(str(what))
        shown = text if len(text) <= _TOLD else text[: _TOLD - 1] + CUT
        self._found.left.append(LeftOut(what=shown, why=why, of_host=of_host))

    # -- options -------------------------------------------------------------------------

    def _option(self, option: Option) -> None:
        value = option.value
        if option.name in _SWITCHES:
            self._found.machine_options[_SWITCHES[option.name]] = "off"
        elif option.name == "usb":
            self._found.machine_options["usb"] = "on"
        elif option.name in ("kernel", "initrd", "dtb"):
            self._found.had_kernel = True
            self._leave(option, "it is a file of the host that it ran on")
        elif value is None:
            self._leave(option, *self._unknown(option.name), of_host=option.name in _OF_HOST)
        elif (read := self._readers().get(option.name)) is not None:
            read(option, value)
        else:
            self._leave(option, *self._unknown(option.name), of_host=option.name in _OF_HOST)

    def _unknown(self, name: str) -> tuple[str]:
        if name in _OF_HOST:
            return ("it is of the host that it ran on",)
        if name == "readconfig":
            return ("it is a file of the host that it ran on, which may describe more devices",)
        return ("this option is not on our list",)

    def _readers(self) -> Mapping[str, Callable[[Option, str], None]]:
        return {
            "machine": self._machine,
            "M": self._machine,
            "cpu": self._cpu,
            "m": self._memory,
            "smp": self._smp,
            "name": lambda option, value: None,
            "uuid": self._uuid,
            "rtc": self._rtc,
            "boot": self._boot,
            "smbios": self._smbios,
            "global": self._global,
            "fw_cfg": self._firmware_config,
            "append": self._append,
            "watchdog-action": self._watchdog_action,
            "watchdog": self._watchdog,
            "device": self._device,
            "usbdevice": self._usb_device,
            "vga": self._screen,
            "serial": self._serial,
            "virtioconsole": self._serial,
            "nic": self._nic,
            "net": self._net,
            "netdev": self._netdev,
            "blockdev": self._blockdev,
            "drive": self._drive,
            "hda": self._disk_file,
            "hdb": self._disk_file,
            "hdc": self._disk_file,
            "hdd": self._disk_file,
            "cdrom": self._cdrom_file,
            "object": self._object,
            "pflash": self._pflash,
            "bios": self._bios,
            "tpmdev": lambda option, value: None,
        }

    def _machine(self, option: Option, value: str) -> None:
        given = pairs(value, "type")
        kind = given.pop("type", None)
        if kind is not None and self._found.machine is None and _MACHINE.fullmatch(kind):
            self._found.machine = kind
        for key, text in given.items():
            if key in _MACHINE_OPTIONS and _WORD.fullmatch(text):
                self._found.machine_options[key] = text
            elif key in ("memory-encryption", "confidential-guest-support"):
                self._leave(f"-machine {key}={text}", "encrypted memory is the host's to give")
            else:
                self._leave(f"-machine {key}={text}", "it is of the host that it ran on", of_host=True)

    def _cpu(self, option: Option, value: str) -> None:
        if _CPU.fullmatch(value):
            self._found.cpu = value
        else:
            self._leave(option, "it has a form that is not allowed")

    def _memory(self, option: Option, value: str) -> None:
        given = pairs(value, "size")
        match = _SIZE.fullmatch(given.get("size", ""))
        size = int(match[1]) * _UNITS[match[2].lower()] if match else 0
        if MiB <= size <= _MAX_MEMORY:
            self._found.memory = size
        else:
            self._leave(option, "it is no size that is allowed")

    def _smp(self, option: Option, value: str) -> None:
        given = {key: text for key, text in pairs(value, "cpus").items() if key in _SMP}
        numbers = {
            key: int(text) for key, text in given.items() if text.isascii() and text.isdecimal() and len(text) < 6
        }
        if len(numbers) != len(given) or not all(0 < number <= MAX_CPUS for number in numbers.values()):
            self._leave(option, "it is no number of processors that is allowed")
            return
        self._found.smp = tuple(_processors(numbers).items())

    def _uuid(self, option: Option, value: str) -> None:
        if _UUID.fullmatch(value):
            self._found.uuid = value
        else:
            self._leave(option, "it is no UUID")

    def _rtc(self, option: Option, value: str) -> None:
        self._some(option, pairs(value), _RTC, self._found.rtc)

    def _boot(self, option: Option, value: str) -> None:
        self._some(option, pairs(value, "order"), _BOOT, self._found.boot)

    def _some(
        self, option: Option, given: Mapping[str, str], known: Mapping[str, re.Pattern[str]], taken: dict[str, str]
    ) -> None:
        """Take what is known and well formed."""
        for key, text in given.items():
            if key in known and known[key].fullmatch(text):
                taken[key] = text
            else:
                self._leave(f"-{option.name} {key}={text}", "it is not on our list")

    def _smbios(self, option: Option, value: str) -> None:
        given = pairs(value)
        kind = given.pop("type", "")
        taken = {key: text for key, text in given.items() if key in _SMBIOS and _is_smbios(text)}
        if not _SMBIOS_TYPE.fullmatch(kind) or len(taken) != len(given):
            self._leave(option, "it names a file, hides a secret, or is not on our list")
        else:
            self._found.smbios.append((("type", kind), *taken.items()))

    def _global(self, option: Option, value: str) -> None:
        given = pairs(value, "")
        driver, name, text = given.get("driver", ""), given.get("property", ""), given.get("value", "")
        if not driver:
            driver, _, rest = value.partition(".")
            if value.startswith("cfi.pflash"):  # the one driver here with a point in its name
                driver, rest = value[:12], value[13:]
            name, _, text = rest.partition("=")
        if (driver, name) in _GLOBALS and _WORD.fullmatch(text):
            self._found.defaults.append((driver, name, text))
        else:
            self._leave(option, "it is not on our list")

    def _firmware_config(self, option: Option, value: str) -> None:
        given = pairs(value, "name")
        name, text = given.get("name", ""), given.get("string")
        if (
            re.fullmatch(r"opt/[A-Za-z0-9._/-]{1,48}", name)
            and text
            and text != MASK
            and set(given) == {"name", "string"}
        ):
            self._found.firmware_config.append((name, text))
        else:
            self._leave(option, "it names a file, hides a secret, or is not on our list")

    def _append(self, option: Option, value: str) -> None:
        self._found.append = value

    def _watchdog_action(self, option: Option, value: str) -> None:
        if value in ("reset", "shutdown", "poweroff", "pause", "none", "inject-nmi", "debug"):
            self._found.watchdog_action = value
        else:
            self._leave(option, "it is not on our list")

    def _watchdog(self, option: Option, value: str) -> None:
        self._add(option, {"driver": value})

    # -- devices -------------------------------------------------------------------------

    def _device(self, option: Option, value: str) -> None:
        self._add(option, properties(value, "driver"))

    def _usb_device(self, option: Option, value: str) -> None:
        known = {"tablet": "usb-tablet", "mouse": "usb-mouse", "keyboard": "usb-kbd"}
        if value in known:
            self._found.machine_options["usb"] = "on"
            self._add(option, {"driver": known[value]})
        else:
            self._leave(option, "this device is not on our list")

    def _add(self, option: Option, given: Mapping[str, object]) -> None:
        saved = scalar(given.get("driver")) or ""
        name = devices.STAND_INS.get(saved, saved)
        driver = DRIVERS.get(name)
        identity = scalar(given.get("id"))
        told = f"-device {saved}" + (f" ({identity})" if identity else "") if saved else option
        if driver is None or (driver.role is Role.AGENT and given.get("name") != "org.qemu.guest_agent.0"):
            self._leave(told, devices.reason(name))
            return
        if len(self._found.devices) >= _MAX_DEVICES:
            self._leave(told, "there are too many devices")
            return
        self._make(told, name, driver, given)

    def _make(self, told: object, name: str, driver: devices.Driver, given: Mapping[str, object]) -> None:
        values = {key: scalar(value) for key, value in given.items() if key in driver.properties}
        taken = {key: text for key, text in values.items() if text is not None and devices.allowed_value(key, text)}
        for key in sorted(set(given) - set(taken) - {"driver", *_CONNECTIONS}):
            self._leave(f"{told}: {key}={scalar(given[key])}", "it is not on our list")
        if name == "vmgenid":
            taken["guid"] = "auto"  # the guest is to see that it is not where it was
        if driver.role is Role.DISPLAY:
            self._found.screen = True
        # An NVMe controller has a disk itself, or namespaces (nvme-ns) on its bus.
        role = Role.PLAIN if name == "nvme" and "drive" not in given else driver.role
        made = Device(driver=name, role=role, properties=tuple(taken.items()))
        if role in (Role.DISK, Role.CDROM):
            self._found.devices.append(_Slot(made, scalar(given.get("drive"))))
        else:
            self._found.devices.append(made)

    def _screen(self, option: Option, value: str) -> None:
        self._found.screen = True
        if value in _SCREENS:
            self._found.devices.append(Device(driver=_SCREENS[value], role=Role.DISPLAY))
        elif value != "none":
            self._leave(option, "this screen is not on our list")

    def _serial(self, option: Option, value: str) -> None:
        """A port of the machine; where it led to is the host's."""
        if value == "none":
            return
        driver = {"s390x": "sclpconsole", "ppc64": "spapr-vty"}.get(self._architecture, "isa-serial")
        if option.name == "serial" and self._architecture in ("x86_64", "i386", "s390x", "ppc64"):
            self._found.devices.append(Device(driver=driver, role=Role.SERIAL))

    def _nic(self, option: Option, value: str) -> None:
        self._found.network = True
        given = pairs(value, "type")
        if given.get("type") != "none":
            self._card(option, given.get("model"), given.get("mac"))

    def _net(self, option: Option, value: str) -> None:
        self._found.network = True
        given = pairs(value, "type")
        if given.get("type") == "nic":
            self._card(option, given.get("model"), given.get("macaddr"))

    def _netdev(self, option: Option, value: str) -> None:
        self._found.network = True
        self._leave(option, "it is of the host that it ran on", of_host=True)

    def _card(self, option: Option, model: str | None, mac: str | None) -> None:
        usual = "e1000e" if family(self._found.machine or "", self._architecture) == "q35" else "e1000"
        if self._architecture not in ("x86_64", "i386"):
            usual = "virtio-net-pci"
        driver = _CARDS.get(model or usual, model or usual)
        self._add(option, {"driver": driver, "mac": mac or mac_of(self._name)})

    def _object(self, option: Option, value: str) -> None:
        kind = scalar(properties(value, "qom-type").get("qom-type")) or ""
        if kind == "iothread":
            self._leave(option, "disks are served from QEMU's main loop", of_host=True)
        elif kind in ("sev-guest", "sev-snp-guest", "tdx-guest", "pef-guest", "s390-pv-guest"):
            self._leave(option, "encrypted memory is the host's to give")
        else:
            self._leave(option, "it is of the host that it ran on", of_host=True)

    def _bios(self, option: Option, value: str) -> None:
        self._leave(option, "its firmware was a file of the host that it ran on; QEMU's own stands in")

    def _pflash(self, option: Option, value: str) -> None:
        self._flash_left(option)

    def _flash_left(self, option: Option) -> None:
        if not self._firmware:
            self._leave(option, "the restore point does not have the content of its firmware device")

    # -- images --------------------------------------------------------------------------

    def _blockdev(self, option: Option, value: str) -> None:
        """Only remembered: which image a disk was tells which disk it is."""
        given = properties(value)
        node = scalar(given.get("node-name"))
        inner: object = given
        for _ in range(8):
            if not isinstance(inner, Mapping):
                break
            name = scalar(inner.get("filename"))
            if node and name:
                self._found.files[node] = name
                return
            inner = inner.get("file")
        if node and isinstance(inner, str):
            self._found.below[node] = inner

    def _drive(self, option: Option, value: str) -> None:
        given = pairs(value, "file")
        interface = given.get("if", "")
        if interface == "none":
            if given.get("id") and given.get("file"):
                self._found.files[given["id"]] = given["file"]
        elif interface == "pflash":
            self._flash_left(option)
        else:
            self._found.drives.append((interface, given))

    def _disk_file(self, option: Option, value: str) -> None:
        self._found.drives.append(("", {"file": value, "index": str(_DRIVES[option.name])}))

    def _cdrom_file(self, option: Option, value: str) -> None:
        self._found.drives.append(("", {"file": value, "index": "2", "media": "cdrom"}))

    def _drives(self) -> None:
        """Disks whose devices QEMU makes itself (`-drive if=virtio`)."""
        kind = family(self._found.machine or "", self._architecture)
        usual = "ide" if self._architecture in ("x86_64", "i386") else "virtio"
        counted: dict[str, int] = {}
        for interface, given in self._found.drives:
            interface = interface or usual
            index = given.get("index", "")
            number = (
                int(index) if index.isascii() and index.isdecimal() and len(index) < 4 else counted.get(interface, 0)
            )
            counted[interface] = number + 1
            made = _implied(interface, kind, number, cdrom=given.get("media") == "cdrom")
            if made is None:
                self._leave(f"-drive if={interface}", "this kind of drive is not on our list")
            else:
                serial = given.get("serial", "")
                if serial and devices.allowed_value("serial", serial):
                    made = replace(made, properties=(*made.properties, ("serial", serial)))
                self._found.devices.append(_Slot(made, None, given.get("file")))

    def _defaults(self) -> None:
        """What QEMU adds of itself where nothing forbids it (-nodefaults)."""
        found = self._found
        if found.no_defaults:
            return
        pc = self._architecture in ("x86_64", "i386")
        if not found.screen and pc:
            found.devices.append(Device(driver="VGA", role=Role.DISPLAY))
        made = [device for device in found.devices if isinstance(device, Device)]
        if not any(device.role is Role.SERIAL for device in made) and pc:
            found.devices.append(Device(driver="isa-serial", role=Role.SERIAL))
        if not found.network and not any(device.role is Role.NIC for device in made):
            self._card(Option(name="nic"), None, "52:54:00:12:34:56")

    # -- disks of the restore point ------------------------------------------------------

    def _matched(self) -> list[Device]:
        """The devices, those for disks with the disk of the restore point that each is."""
        slots = [item for item in self._found.devices if isinstance(item, _Slot)]
        for slot in slots:
            slot.source = slot.source or self._image(slot.drive)
        chosen: dict[int, str] = {}
        rest = list(self._disks)
        for fits in (_same_id, _same_image, _same_bus):
            for disk in list(rest):
                free = (index for index, slot in enumerate(slots) if index not in chosen and fits(slot, disk))
                if (index := next(free, None)) is not None:
                    chosen[index] = disk.target
                    rest.remove(disk)
        made = self._in_order(slots, chosen)
        for disk in rest:
            self._leave(f"the device of {disk.target}", "no device of the command line is it; a standard one stands in")
        kind = family(self._found.machine or "", self._architecture)
        bus = "ccw" if self._architecture == "s390x" else "pci"
        taken = sum(device.driver in ("ahci", "ich9-ahci") for device in made)
        made += disks([disk.target for disk in rest], family=kind, bus=bus, start=taken + _FAR)
        placed, moved = settled(made)
        self._found.left += moved
        return placed

    def _image(self, drive: str | None) -> str | None:
        """The image behind a node or drive."""
        for _ in range(16):
            if drive is None:
                return None
            if drive in self._found.files:
                return self._found.files[drive]
            drive = self._found.below.get(drive)
        return None

    def _in_order(self, slots: Sequence[_Slot], chosen: Mapping[int, str]) -> list[Device]:
        made: list[Device] = []
        targets = {id(slot): chosen.get(index) for index, slot in enumerate(slots)}
        for item in self._found.devices:
            if isinstance(item, Device):
                made.append(item)
            elif (target := targets[id(item)]) is not None:
                made.append(replace(item.device, target=target))
            elif item.device.role is Role.CDROM:
                made.append(item.device)
            else:
                told = f"-device {item.device.driver}" + (f" ({item.device.id})" if item.device.id else "")
                self._leave(told, "the restore point does not have that disk")
        return made


#: Controllers of ours have numbers that no saved machine uses.
_FAR = 90
#: What devices are connected to, which is ours to say.
_CONNECTIONS = frozenset(
    {"drive", "netdev", "vlan", "chardev", "rng", "iothread", "memdev", "tpmdev", "display", "audiodev"}
)


def _architecture(description: Description) -> str:
    """From the program's name; that of a `kvm` or `qemu-kvm` is the host's."""
    for text in (description.program, description.argv[0] if description.argv else None):
        match = _PROGRAM.fullmatch((text or "").rpartition("/")[2])
        if match is not None:
            return match[1]
    return _host()


def _number(text: str) -> int | None:
    """A small number."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else None


def _processors(numbers: Mapping[str, int]) -> dict[str, int]:
    """As -smp takes it: all numbers if they agree, else how many alone."""
    product = 1
    for key in _SMP[2:]:
        product *= numbers.get(key, 1)
    total = numbers.get("maxcpus", numbers.get("cpus", product))
    cpus = numbers.get("cpus", total)
    given = [key for key in numbers if key in _SMP[2:]]
    sound = cpus <= total and (not given or product == total)
    return {"cpus": cpus, **{key: numbers[key] for key in _SMP[1:] if key in numbers}} if sound else {"cpus": cpus}


def _is_smbios(text: str) -> bool:
    return MASK not in text and bool(_SMBIOS_TEXT.fullmatch(text))


def _implied(interface: str, family: str, index: int, *, cdrom: bool) -> Device | None:
    """The device that QEMU makes for a `-drive` (blockdev.c, hw/ide, softmmu/vl.c)."""
    role = Role.CDROM if cdrom else Role.DISK
    if interface == "virtio":
        return Device(driver="virtio-blk-pci", role=Role.DISK)
    if interface == "ide":
        driver = "ide-cd" if cdrom else "ide-hd"
        place = {"bus": f"ide.{index}"} if family == "q35" else {"bus": f"ide.{index // 2}", "unit": str(index % 2)}
        return Device(driver=driver, role=role, properties=tuple(place.items()))
    if interface == "scsi":
        return Device(driver="scsi-cd" if cdrom else "scsi-hd", role=role)
    return None


def _same_id(slot: _Slot, disk: PointDisk) -> bool:
    """By the device's id: QEMU tells it as `ID`, or as a path with it."""
    known = slot.device.id
    if known is None or disk.qdev is None:
        return False
    return known in (disk.qdev, disk.qdev.removeprefix("/machine/peripheral/").split("/")[0])


def _same_image(slot: _Slot, disk: PointDisk) -> bool:
    return slot.source is not None and slot.source == disk.source


def _same_bus(slot: _Slot, disk: PointDisk) -> bool:
    """By what disks on such a bus are called."""
    if slot.device.role is Role.CDROM:
        return False
    starts = sorted({prefix for prefix in PREFIXES.values() if disk.target.startswith(prefix)}, key=len)
    return bool(starts) and starts[-1] in devices.prefixes(slot.device)
