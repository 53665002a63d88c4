"""A machine's command line for where it was restored to: new paths, and for a copy a new identity.

It is for people. What is changed is what is surely meant: a path that a disk had, word for word; the flash
memory by its number; the TPM's socket; name, uuid and network addresses of a copy; sockets and logs of a
copy, which the original has open. All else stays as it was, and what a copy would share with its original
is told. The command line comes from a manifest, which is hostile: nothing here is run, and nothing raises.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from pullback.model import commandline
from pullback.model.commandline import Option
from pullback.model.description import CUT, MASK
from pullback.model.identity import Identity
from pullback.model.rewriting import Properties

#: Keys that a block node has whatever its format is (QAPI block-core.json, BlockdevOptions).
_ANY_FORMAT = frozenset(
    ("driver", "node-name", "file", "discard", "cache", "read-only", "auto-read-only", "force-share", "detect-zeroes")
)
_DISK_OPTIONS = frozenset(("hda", "hdb", "hdc", "hdd"))
_CARDS = re.compile(r"(?:virtio-net|e1000|rtl8139|vmxnet3|pcnet|ne2k_|i82\d{3}|igb|tulip|usb-net|spapr-vlan|lan9118)")
#: What only a machine that is moved while it runs is started with.
_OF_MOVING = frozenset(("incoming", "loadvm"))
#: Options of a copy that may stand in the original's way, and what to look at.
_SHARED = (
    (re.compile(r"-vnc (?!none|unix:)"), "the port of the screen"),
    (re.compile(r"-spice .*port="), "the port of the screen"),
    (re.compile(r"hostfwd="), "a forwarded port"),
    (re.compile(r"ifname="), "the host's network device"),
    (re.compile(r"(?:tcp|telnet|udp|websocket):|-chardev (?:socket|udp),.*port="), "a port"),
    (re.compile(r"-(?:s|gdb .*)$"), "the port of the debugger"),
    (re.compile(r"vfio|usb-host|host-device"), "a device of the host"),
    (re.compile(r"mem-path="), "a file of memory"),
    (re.compile(r"-(?:fsdev|virtfs) "), "a shared directory"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A disk, and where it is now."""

    target: str
    #: Its path as the old command line has it; None if that is not known.
    source: str | None
    #: A file or block device; None: somewhere that has no path.
    path: str | None
    format: str
    device: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the parts of a machine are now."""

    disks: Sequence[Moved] = ()
    #: Files of flash memory, by name: pflash0, pflash1.
    firmware: Mapping[str, str]
    #: The socket of a swtpm on the restored state.
    tpm: str | None = None
    #: Where the sockets and logs of a copy go.
    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """A command line for the new place."""

    words: tuple[str, ...]
    #: Network cards that got a new address: the old one (None: QEMU's own) and the new one.
    macs: tuple[tuple[str | None, str], ...]
    #: Sentences about what was not filled in, or has to be looked at.
    notes: tuple[str, ...]


def rebuild(argv: Sequence[str], places: Places, identity: Identity | None) -> Rebuilt:
    """The words of `argv` for `places`; for a copy with its `identity`."""
    if not argv:
        return Rebuilt(words=(), macs=(), notes=("How the machine was started is not known.",))
    work = _Work(list(commandline.options(argv)), places, identity)
    work.moving()
    work.disks()
    work.firmware()
    work.tpm()
    work.generation()
    if identity is not None:
        work.identify(identity)
        work.own_sockets()
        work.shared()
    notes = [*work.notes]
    if CUT in argv[-1]:
        notes.append("It was too long to be kept whole.")
    if any(MASK in word for word in argv):
        notes.append(f"{MASK} stands for a secret that was not kept.")
    return Rebuilt(words=(argv[0], *work.words()), macs=tuple(work.macs), notes=tuple(notes))


class _Work:
    """The options while they are changed, in place."""

    def __init__(self, options: list[Option], places: Places, identity: Identity | None) -> None:
        self._options = options
        self._places = places
        self._identity = identity
        self.macs: list[tuple[str | None, str]] = []
        self.notes: list[str] = []

    def words(self) -> list[str]:
        """They, as words."""
        return [word for option in self._options for word in (f"-{option.name}", option.value) if word is not None]

    def _each(self, *names: str) -> list[tuple[int, Properties]]:
        found = enumerate(self._options)
        return [(at, Properties(one.name, one.value)) for at, one in found if one.name in names and one.value]

    def _set(self, at: int, value: Properties | str) -> None:
        self._options[at] = replace(self._options[at], value=str(value))

    def moving(self) -> None:
        """Nobody sends the memory of a machine that begins anew."""
        for name in sorted({option.name for option in self._options} & _OF_MOVING):
            self.notes.append(f"-{name} is left out: the machine begins anew.")
        self._options = [option for option in self._options if option.name not in _OF_MOVING]

    # -- images ------------------------------------------------------------------------------

    def disks(self) -> None:
        """The disks' new paths and formats."""
        for disk in self._places.disks:
            if disk.path is None:
                self.notes.append(f"{disk.target} has no path here: say yourself where it is.")
            elif not (disk.source and self._place(disk.source, disk.path, disk.format, device=disk.device)):
                self.notes.append(f"{disk.target} was not found in it: {disk.path} ({disk.format}) is that disk now.")

    def _place(self, old: str, new: str, format: str, *, device: bool = False) -> bool:
        placed = [self._place_drive(at, value, old, new, format) for at, value in self._each("drive")]
        placed += [self._place_node(at, value, old, new, format, device) for at, value in self._each("blockdev")]
        for at, option in enumerate(self._options):
            if option.name in _DISK_OPTIONS and option.value == old:
                self._set(at, new)
                placed.append(True)
        return any(placed)

    def _place_drive(self, at: int, value: Properties, old: str, new: str, format: str) -> bool:
        if value.get("if") == "pflash":
            return False
        key = next((key for key in ("file", "file.filename") if value.get(key) == old), None)
        if key is None:
            return False
        value.put(key, new)
        value.put("driver" if value.get("driver") else "format", format)
        self._set(at, value)
        return True

    def _place_node(self, at: int, value: Properties, old: str, new: str, format: str, device: bool) -> bool:
        driver = "host_device" if device else "file"
        if value.get("filename") == old:
            value.put("filename", new)
            value.put("driver", driver)
            self._set(at, value)
            self._reformat(value.get("node-name"), format)
            return True
        if value.get("file.filename") != old:
            return False
        value.put("file.filename", new)
        value.put("file.driver", driver)
        _format(value, format)
        self._set(at, value)
        return True

    def _reformat(self, node: str | None, format: str) -> None:
        """The format of what lies upon a node."""
        for at, value in self._each("blockdev"):
            if node is not None and value.get("file") == node:
                _format(value, format)
                self._set(at, value)

    def firmware(self) -> None:
        """The flash memory's new files, which hold what the machine sees: raw."""
        left = dict(self._places.firmware)
        unit = 0
        for at, value in self._each("drive", "pflash"):
            short = self._options[at].name == "pflash"
            if not short and value.get("if") != "pflash":
                continue
            number = value.get("unit") or str(unit)
            unit = int(number) + 1 if number.isdecimal() and len(number) < 4 else unit + 1
            path = left.pop(f"pflash{number}", None)
            if path is not None and short:
                self._set(at, path)
            elif path is not None:
                value.put("file", path)
                value.put("format", "raw")
                self._set(at, value)
        for _, machine in self._each("machine", "M"):
            for name in sorted(left):
                if (node := machine.get(name)) and self._place_flash(node, left[name]):
                    del left[name]
        self.notes += [f"{name} was not found in it: {path} is its content." for name, path in sorted(left.items())]

    def _place_flash(self, node: str, path: str) -> bool:
        nodes = {name: (at, value) for at, value in self._each("blockdev") if (name := value.get("node-name"))}
        top = nodes.get(node)
        for _ in range(len(nodes)):  # a chain cannot be longer
            if top is None:
                return False
            at, value = top
            old = value.get("filename") or value.get("file.filename")
            if old is not None:
                return self._place_node(at, value, old, path, "raw", device=False)
            top = nodes.get(value.get("file") or "")
        return False

    # -- the TPM, and what shows that it is another machine ----------------------------------

    def tpm(self) -> None:
        """The socket of the TPM's emulator."""
        wanted = {value.get("chardev") for _, value in self._each("tpmdev") if value.get("type") == "emulator"}
        for at, value in self._each("chardev"):
            if self._places.tpm is not None and value.get("id") in wanted and value.get("path"):
                value.put("path", self._places.tpm)
                self._set(at, value)

    def generation(self) -> None:
        """A guest that asks for it is told that it was restored (QEMU docs/specs/vmgenid.rst)."""
        fresh = self._identity.generation if self._identity is not None else "auto"
        for at, value in self._each("device"):
            if value.get("driver") == "vmgenid":
                value.put("guid", fresh)
                self._set(at, value)

    def identify(self, identity: Identity) -> None:
        """Name, uuid and network addresses of a copy."""
        self._name(identity.name)
        self._uuid(identity.uuid)
        for at, value in self._each("device", "nic", "net"):
            name = self._options[at].name
            driver = value.get("driver") if name == "device" else value.get("type")
            if name == "device" and not _CARDS.match(driver or ""):
                continue
            if driver in (None, "none") or (name == "net" and driver != "nic"):
                continue
            self._address(at, value, "macaddr" if name == "net" else "mac", identity.mac)

    def _name(self, name: str) -> None:
        named = self._each("name")
        for at, value in named:
            value.put("guest", name)
            self._set(at, value)
        if not named:
            self._options.insert(0, Option(name="name", value=f"guest={name.replace(',', ',,')}"))

    def _uuid(self, uuid: str) -> None:
        there = [at for at, option in enumerate(self._options) if option.name == "uuid"]
        for at in there:
            self._set(at, uuid)
        if not there:
            self._options.insert(1, Option(name="uuid", value=uuid))
        for at, value in self._each("smbios"):
            if value.get("uuid") is not None:
                value.put("uuid", uuid)
                self._set(at, value)

    def _address(self, at: int, value: Properties, key: str, new: Callable[[], str]) -> None:
        key = "macaddr" if value.get("macaddr") is not None else key
        fresh = new()
        self.macs.append((value.get(key), fresh))
        value.put(key, fresh)
        self._set(at, value)

    # -- what the original has open ----------------------------------------------------------

    def own_sockets(self) -> None:
        """Sockets where a copy listens, and files that it writes, go into its own directory."""
        taken: set[str] = set()
        for at, option in enumerate(self._options):
            if option.name in ("pidfile", "D") and option.value:
                self._set(at, self._own(option.value, taken))
            elif option.name in ("qmp", "qmp-pretty", "monitor", "serial", "parallel", "vnc") and option.value:
                scheme, _, rest = option.value.partition(":")
                path, comma, more = rest.partition(",")
                if path and scheme in ("unix", "file"):
                    self._set(at, f"{scheme}:{self._own(path, taken)}{comma}{more}")
        for at, value in self._each("chardev"):
            old, kind = value.get("path"), value.get("backend")
            if old and ((kind == "socket" and value.is_on("server")) or kind in ("file", "pipe")):
                value.put("path", self._own(old, taken))
                self._set(at, value)

    def _own(self, old: str, taken: set[str]) -> str:
        name = PurePosixPath(old).name or "socket"
        fresh = name
        for number in range(1, len(self._options) + 1):
            if fresh not in taken:
                break
            fresh = f"{number}-{name}"
        taken.add(fresh)
        return f"{self._places.directory}/{fresh}"

    def shared(self) -> None:
        """What the original may have, and can be had once."""
        for option in self._options:
            text = str(option)
            for pattern, what in _SHARED:
                if pattern.search(text):
                    self.notes.append(f"Look at {what}, which the original may have too: {shlex.quote(text)}")
                    break


def _format(value: Properties, format: str) -> None:
    """Another format has none of the old one's own keys."""
    if value.get("driver") != format:
        value.keep(_ANY_FORMAT)
        value.put("driver", format)


def text(program: str | None, words: Sequence[str]) -> str:
    """The command for people, or a shell: an option a line."""
    lines = [shlex.quote(program or words[0])]
    for option in commandline.options(words):
        lines.append(shell([word for word in (f"-{option.name}", option.value) if word is not None]))
    return " \\\n    ".join(lines) + "\n"


def shell(words: Sequence[str]) -> str:
    """Words for a shell."""
    return " ".join(map(shlex.quote, words))
