"""The reader: a small machine that looks into disks, because their content is hostile to any kernel that mounts it.

It gets the disks through throw-away overlays (so journals are replayed, and nothing reaches what is below), has no
network and no other device than one port to us. QEMU runs in its seccomp sandbox. What it answers is checked by
`wire`, `volumes` and `entries`.

    with reader.start(small, drives, directory, cancel) as machine:
        found = machine.scan()
        number = machine.mount(found[1], found).number
        for item in machine.tree(number, b"/etc"): …
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pullback import errors
from pullback.guest import entries, volumes, wire
from pullback.guest.build import SmallGuest
from pullback.guest.listening import Listener
from pullback.model.texts import showable
from pullback.programs import qemu, qemu_img
from pullback.progress import Cancel
from pullback.units import GiB, MiB, format_size

#: Disks of one reader: 8 slots with 8 functions each. (With 100 its kernel did not come up; tried, QEMU 7.2.)
MAX_DISKS = 64
#: Ready takes 2 to 3 s under software emulation on an idle machine; the rest is for a loaded one.
READY_SECONDS = 120.0
#: How long nothing may come. A mount replays a journal of 2 GiB at most; a read may wait for a server far away.
SILENCE_SECONDS = 180.0
#: How long a check of one file system may take without a word: it reads all that is no data of files.
CHECK_SECONDS = 3600.0
#: A reader that checks needs more: e2fsck keeps bitmaps of the whole file system.
MEMORY, CHECK_MEMORY = 512 * MiB, 1536 * MiB
#: What a reader may write: replayed journals (2 GiB at most each, where XFS has its largest log).
_WRITTEN_LIMIT = 4 * GiB
_PORT = "pullback.reader"
_FIRST_SLOT, _FUNCTIONS = 4, 8
#: "panic" because a kernel that a disk has brought down shall end QEMU at once.
_CMDLINE = (
    "console=ttyS0 quiet loglevel=1 panic=-1 nokaslr mitigations=off random.trust_cpu=on"
    " tsc=reliable no_timer_check cryptomgr.notests"
)
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_SHOWN = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """A disk for the reader."""

    #: Its name for users.
    target: str
    #: Its bytes.
    size: int
    #: QEMU's options (BlockdevOptions) of where it is, opened for reading alone.
    node: Mapping[str, object]


def served(target: str, size: int, *, server: Path, export: str) -> Drive:
    """A disk that an NBD server on a unix socket has."""
    node = {"driver": "nbd", "server": {"type": "unix", "path": str(server)}, "export": export}
    return Drive(target=target, size=size, node=node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounted:
    """A file system of the reader."""

    #: By which it is asked for.
    number: int
    #: Why its journal was not replayed, or None.
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a check of a file system said."""

    #: Of the program that checked; 0 is good.
    status: int
    #: The begin of what it said; hostile.
    said: str

    @property
    def good(self) -> bool:
        """Is nothing wrong?"""
        return self.status == 0


class Reader:
    """A conversation with a reader, wherever it runs. For one thread."""

    def __init__(self, channel: wire.Channel, targets: Sequence[str], having: frozenset[str] | None) -> None:
        """`targets` are the disks' names by number; `having`: see `volumes.ways`."""
        self._channel = channel
        self._targets = targets
        #: Drivers and programs that it has; None: whatever the host has.
        self.having = having

    @property
    def received(self) -> int:
        """Bytes that came from it."""
        return self._channel.received

    def greet(self, seconds: float) -> None:
        """Wait until it is there."""
        hello = self._channel.frame(seconds)
        if hello.kind != "." or hello.fields(2) != [b"pullback-reader", b"1"]:
            raise wire.bad("another greeting than that of this version")

    def scan(self) -> tuple[volumes.Volume, ...]:
        """Everything on the disks."""
        found: list[volumes.Volume] = []
        for frame in self._channel.ask("scan", seconds=SILENCE_SECONDS):
            if frame.kind == "V":
                found.append(volumes.parse(frame, self._targets))
            if len(found) > volumes.MAX_VOLUMES:
                raise wire.bad(f"more than {volumes.MAX_VOLUMES} volumes")
        return tuple(found)

    def mount(
        self,
        volume: volumes.Volume,
        known: Sequence[volumes.Volume],
        *,
        below: tuple[int, str] | None = None,
        options: str = "",
    ) -> Mounted:
        """Mount a volume for reading; `known` are all. `below`: at a path in another one, with whose number it is read.

        Raises `VolumeUnreadable`.
        """
        ways = volumes.ways(volume, self.having, together=known)
        if not ways or volume.key is None:
            raise errors.VolumeUnreadable(volume=volume.name, reason=volumes.closed(volume))
        under, path = below or ("", "")
        said: list[str] = []
        for way in ways:
            words = ",".join(text for text in (way.options, options) if text)
            try:
                [number] = self._last("mount", volume.key, way.type, words, under, path).fields(1)
            except wire.Refused as refused:
                said.append(refused.text)
                continue
            note = (
                f"the journal of {volume.name} was not replayed ({said[0]})" if said and way.type != "ntfs-3g" else None
            )
            return Mounted(number=wire.integer(number), note=note)
        raise errors.VolumeUnreadable(volume=volume.name, reason=said[0])

    def unmount(self, mounted: Mounted) -> None:
        """Unmount it."""
        self._last("unmount", mounted.number)

    def check(self, volume: volumes.Volume) -> Checked:
        """Check a file system of `volumes.CHECKS`, which is not mounted. Raises `wire.Refused` if nothing can."""
        assert volume.key is not None
        said = bytearray()
        for frame in self._channel.ask(
            "check", volume.key, volumes.CHECKS[volume.content or ""], seconds=CHECK_SECONDS
        ):
            if frame.kind == "D" and len(said) < wire.MAX_FRAME:
                said += frame.data
            if frame.kind == ".":
                [status] = frame.fields(1)
        return Checked(status=wire.integer(status, high=1 << 16), said=said.decode("utf-8", "replace"))

    def list(self, number: int, path: bytes) -> Iterator[entries.Entry | entries.Unread]:
        """What is in a directory, or the one thing that is there, by paths. Raises `NoSuchFile`, `FileUnreadable`."""
        for frame in self._answers(path, "list", number, path):
            item = entries.parse(frame, root=True)
            if isinstance(item, entries.Entry | entries.Unread):
                yield item
            else:
                raise wire.bad(f"a frame of kind {frame.kind!r} in a listing")

    def tree(self, number: int, path: bytes, *, follow: bool = True) -> Iterator[entries.Item]:
        """One thing and all that it holds, as `entries.files` promises; the first entry's name is a path, or ".".

        `follow`: if it is a link, what it leads to.
        """
        return entries.files(self._items(number, path, follow))

    def _items(self, number: int, path: bytes, follow: bool) -> Iterator[entries.Item]:
        first = True
        for frame in self._answers(path, "tree", number, path, int(follow)):
            yield entries.parse(frame, root=first)
            first = False

    def _answers(self, path: bytes, verb: str, *words: bytes | int) -> Iterator[wire.Frame]:
        try:
            yield from (
                frame for frame in self._channel.ask(verb, *words, seconds=SILENCE_SECONDS) if frame.kind != "."
            )
        except wire.Refused as refused:
            if refused.number in (errno.ENOENT, errno.ENOTDIR):
                raise errors.NoSuchFile(path=wire.shown(path)) from refused
            raise errors.FileUnreadable(path=wire.shown(path), reason=refused.text) from refused

    def _last(self, verb: str, *words: str | bytes | int) -> wire.Frame:
        *_, last = self._channel.ask(verb, *words, seconds=SILENCE_SECONDS)
        return last


# -- the machine -----------------------------------------------------------------------------


@contextlib.contextmanager
def start(
    small: SmallGuest, drives: Sequence[Drive], directory: Path, cancel: Cancel, *, memory: int = MEMORY
) -> Iterator[Reader]:
    """A reader of `drives` while the block runs.

    `directory` is private, empty, and has a short path; overlays lie in it, without a name as soon as QEMU runs. Raises
    `ProgramFailed` when QEMU or the reader does not come up, `ProgramMissing`, `Unsupported`.
    """
    if len(drives) > MAX_DISKS:
        raise errors.Unsupported(
            what="Looking into so many disks at once",
            reason=f"there are {len(drives)}, and {MAX_DISKS} are possible",
            way_out="Choose some with --disk.",
        )
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(Listener(directory / "console"))
        overlays = [_overlay(drive, directory / f"overlay{number}") for number, drive in enumerate(drives)]
        machine = _machine(small, drives, directory, overlays, memory)
        running = stack.enter_context(qemu.start(machine))
        watch = stack.enter_context(_Watch(running, console, overlays, cancel))
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.connect(str(directory / "port"))
        channel = wire.Channel(connection, alive=watch.look)
        having = small.drivers | small.programs
        reader = Reader(channel, [drive.target for drive in drives], having)
        reader.greet(READY_SECONDS)
        yield reader


def _overlay(drive: Drive, path: Path) -> Path:
    qemu_img.create(path, drive.size)
    return path


def _machine(
    small: SmallGuest, drives: Sequence[Drive], directory: Path, overlays: Sequence[Path], memory: int
) -> qemu.Machine:
    words = ["-no-reboot", "-sandbox", _SANDBOX, "-device", _json(driver="virtio-serial-pci", id="ports", addr="3")]
    words += ["-chardev", f"socket,id=port,path={str(directory / 'port').replace(',', ',,')},server=on,wait=off"]
    words += ["-device", _json(driver="virtserialport", bus="ports.0", chardev="port", name=_PORT)]
    for number, (drive, overlay) in enumerate(zip(drives, overlays, strict=True)):
        words += _words_of(drive, number, overlay)
    return qemu.Machine(
        kernel=small.kernel,
        initrd=small.initrd,
        cmdline=_CMDLINE,
        memory=memory,
        serial=directory / "console",
        extra=words,
    )


def _words_of(drive: Drive, number: int, overlay: Path) -> list[str]:
    below = {"node-name": f"below{number}", "read-only": True, **drive.node}
    file = {"driver": "file", "filename": str(overlay)}
    top = {
        "driver": "qcow2",
        "node-name": f"disk{number}",
        "file": file,
        "backing": {"driver": "raw", "read-only": True, "file": below["node-name"]},
    }
    slot, function = _FIRST_SLOT + number // _FUNCTIONS, number % _FUNCTIONS
    device = {
        "driver": "virtio-blk-pci",
        "drive": top["node-name"],
        "serial": f"pb{number}",
        "addr": f"{slot:x}.{function}",
        "multifunction": function == 0,
    }
    return ["-blockdev", json.dumps(below), "-blockdev", json.dumps(top), "-device", json.dumps(device)]


def _json(**properties: object) -> str:
    return json.dumps(properties)


class _Watch:
    """What ends a wait: an end of QEMU, a call to stop, an overlay that grows too much."""

    def __init__(self, running: qemu.Qemu, console: Listener, overlays: Sequence[Path], cancel: Cancel) -> None:
        self._running = running
        self._console = console
        self._cancel = cancel
        self._overlays = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in overlays]
        for path in overlays:
            path.unlink()
        self._looked = time.monotonic()

    def look(self) -> None:
        """Raise what there is to raise."""
        self._cancel.check()
        if self._running.returncode is not None:
            said = self._console.text().strip()[-_SHOWN:] or self._running.message()
            raise errors.ProgramFailed(program="the reader", status="it ended", message=showable(said))
        if time.monotonic() - self._looked > 1:
            self._looked = time.monotonic()
            written = sum(os.fstat(overlay).st_blocks * 512 for overlay in self._overlays)
            if written > _WRITTEN_LIMIT:
                problem = f"it wrote {format_size(written)}, which no journal explains"
                raise errors.ProgramFailed(program="the reader", status="stopped", message=problem)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *error: object) -> None:
        for overlay in self._overlays:
            os.close(overlay)
