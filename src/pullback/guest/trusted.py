"""The reader's program on the host, for those who trust a disk: the host's own kernel mounts it, read-only.

Its mounts are in a mount namespace of its own, and the loop devices let go of their files when the last one uses them:
so nothing is left, however this ends. Logical volumes are not put together here, because a group of a guest may be
called as one of the host's.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from pullback import errors
from pullback.guest import wire
from pullback.guest.reader import Reader
from pullback.programs import process
from pullback.progress import Cancel

_READY_SECONDS = 30.0
_LOOP_SECONDS = 30.0
_SECTOR = 512
_MOST_PARTITIONS = 64
_PARTITION = re.compile(r"^ *(\d{1,5}) +(\d{1,18}) +(\d{1,18})$", re.MULTILINE)
_PROGRAM = 'require shift; open(my $port, "+<&=", shift) or die; serve($port, map { [split(/=/)] } @ARGV);'


def require_root() -> None:
    """Refuse what only root can do. Raises `Unsupported`."""
    if os.geteuid() != 0:
        raise errors.Unsupported(
            what="Mounting disks on this host",
            reason="only root can",
            way_out="Leave --trust out: then nobody need be root.",
        )


@contextlib.contextmanager
def start(disks: Mapping[str, Path], directory: Path, cancel: Cancel) -> Iterator[Reader]:
    """A reader of image files (target to path) while the block runs; `directory` is private.

    Raises `ProgramFailed` where there are no loop devices, `ProgramMissing`.
    """
    place = directory / "m"
    place.mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        names = [f"{number}={name}" for number, path in enumerate(disks.values()) for name in _devices(stack, path)]
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        source = importlib.resources.files("pullback.guest") / "reader/read.pl"
        with theirs, importlib.resources.as_file(source) as text:
            child = stack.enter_context(_program(text, theirs.fileno(), names, place))

        def alive() -> None:
            cancel.check()
            if child.returncode is not None:
                raise errors.ProgramFailed(program="the reading process", status="it ended", message=child.message())

        reader = Reader(wire.Channel(ours, alive=alive), list(disks), None)
        reader.greet(_READY_SECONDS)
        yield reader


def _program(text: Path, port: int, names: list[str], place: Path) -> process.Child:
    words = ["unshare", "--mount", "--propagation", "private", process.find("perl"), "-e", _PROGRAM, str(text)]
    environment = process.environment(None) | {"PB_PLACE": str(place)}
    return process.Child([*words, str(port), *names], env=environment, pass_fds=[port])


def _devices(stack: contextlib.ExitStack, path: Path) -> Iterator[str]:
    """Loop devices of a disk, by their names, and of its partitions: NAME=NUMBER.

    Partitions have devices of their own, because not every kernel looks for them on loop devices.
    """
    yield stack.enter_context(_loop(path))
    for number, start, size in _partitions(path):
        yield f"{stack.enter_context(_loop(path, start=start, size=size))}={number}"


def _partitions(path: Path) -> list[tuple[int, int, int]]:
    """Number, first byte and bytes of each (partx, which reads the table itself); none where there is no table."""
    words: list[str | Path] = ["partx", "--raw", "--noheadings", "--output", "NR,START,SECTORS", path]
    try:
        told = process.run(words, timeout=_LOOP_SECONDS).decode("ascii", "replace")
    except errors.ProgramFailed:
        return []
    found = [(int(match[1]), int(match[2]), int(match[3])) for match in _PARTITION.finditer(told)]
    used = [one for one in found if one[0] and one[2]][:_MOST_PARTITIONS]
    return [(number, start * _SECTOR, sectors * _SECTOR) for number, start, sectors in used]


@contextlib.contextmanager
def _loop(path: Path, *, start: int = 0, size: int | None = None) -> Iterator[str]:
    """A loop device of a file or a part of it, read-only; gives its name."""
    options = ["--find", "--show", "--read-only", "--offset", str(start)]
    options += ["--sizelimit", str(size)] if size is not None else []
    device = process.run(["losetup", *options, path], timeout=_LOOP_SECONDS).decode().strip()
    held = None
    try:
        held = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        # Held by us, it is only marked: it goes with the last who uses it, even if that is because we were killed.
        process.run(["losetup", "--detach", device], timeout=_LOOP_SECONDS)
    try:
        yield device.removeprefix("/dev/")
    finally:
        os.close(held)
