"""The names by which users call machines and repositories.

A machine that is off is named by its images:

    images:vda=/srv/web01/a.qcow2,vdb=raw:/srv/web01/b.raw

A comma in a path is doubled. `qcow2:` or `raw:` before a path says its format; without it, the
format is found out. (A relative path that begins so is written `./raw:…`.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pullback import errors
from pullback.model import disks
from pullback.model.documents import rules

_MACHINE_EXAMPLE = (
    "Name a QEMU process by its QMP socket, qmp:/run/web01.sock, or a machine that is off by its images, "
    "images:vda=/srv/a.qcow2,vdb=/srv/b.raw"
)
_REPOSITORY_EXAMPLE = "Name a directory: dir:/srv/backup"


@dataclass(frozen=True, slots=True, kw_only=True)
class QmpMachine:
    """A QEMU process, by its QMP socket."""

    socket: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A disk of a machine that is off."""

    target: str
    #: Absolute; a file or a block device.
    path: Path
    #: qcow2 or raw, as the user says; None: to be found out.
    format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesMachine:
    """A machine that is off, by its images: at least one, each target once."""

    images: tuple[Image, ...]


_ADDRESS = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<host>[^:\[\]]+))(?::(?P<port>[0-9]{1,6}))?", re.ASCII)
_MAX_PORT = 65535
Machine = QmpMachine | ImagesMachine
#: Formats that an image can have.
FORMATS = ("qcow2", "raw")


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryRepository:
    """A plain directory of qcow2 images."""

    path: Path


def machine(url: str) -> Machine:
    """`qmp:/path/to.sock` or `images:TARGET=PATH,…` to a value; `BadUrl` otherwise."""
    scheme, colon, rest = url.partition(":")
    if colon and scheme == "images":
        return ImagesMachine(images=_images(url, rest))
    if colon and scheme == "qmp" and rest:
        return QmpMachine(socket=Path(rest).absolute())
    named = colon and scheme == "qmp"
    raise _bad_machine(
        url, "the socket's path is missing" if named else "it begins neither with 'qmp:' nor with 'images:'"
    )


def _bad_machine(url: str, problem: str) -> errors.BadUrl:
    return errors.BadUrl(url=url, kind="machine", problem=problem, example=_MACHINE_EXAMPLE)


def _images(url: str, rest: str) -> tuple[Image, ...]:
    if "\0" in rest:
        raise _bad_machine(url, "no path holds a zero byte")
    # So a zero byte can stand for the doubled comma meanwhile.
    found = tuple(_image(url, part.replace("\0", ",")) for part in rest.replace(",,", "\0").split(","))
    targets = [image.target for image in found]
    for target in targets:
        if targets.count(target) > 1:
            raise _bad_machine(url, f"there are two disks {target}")
    return found


def _image(url: str, part: str) -> Image:
    target, equals, path = part.partition("=")
    if not equals:
        raise _bad_machine(url, f"{part!r} is not TARGET=PATH (a comma in a path is doubled)")
    if disks.bus_of(target) is None:
        raise _bad_machine(url, f"{target!r} is no disk's name (vda, sda, nvme0n1 …)")
    format, colon, after = path.partition(":")
    given = format if colon and format in FORMATS else None
    place = after if given else path
    if not place:
        raise _bad_machine(url, f"the path of {target} is missing")
    return Image(target=target, path=Path(place).absolute(), format=given)


def repository(url: str) -> DirectoryRepository:
    """`dir:/path` to a value; `BadUrl` otherwise."""
    scheme, colon, rest = url.partition(":")
    if colon and scheme == "dir" and rest:
        return DirectoryRepository(path=Path(rest).absolute())
    problem = "the directory's path is missing" if colon and scheme == "dir" else "it does not begin with 'dir:'"
    raise errors.BadUrl(url=url, kind="repository", problem=problem, example=_REPOSITORY_EXAMPLE)


def unix_socket(url: str) -> Path:
    """`unix:/path` to a path; `BadUrl` otherwise."""
    scheme, _, rest = url.partition(":")
    if scheme == "unix" and rest:
        return Path(rest).absolute()
    raise errors.BadUrl(
        url=url,
        kind="server",
        problem="it is no unix socket",
        example="Name it by its socket: unix:/run/web01-nbd.sock",
    )


def address(text: str) -> tuple[str, int | None]:
    """`HOST`, `HOST:PORT`, `[IPv6]` or `[IPv6]:PORT` to listen on; no port, or 0, is None: a free one. `BadUrl`."""
    match = _ADDRESS.fullmatch(text)
    host = match and (match["bracketed"] or match["host"])
    port = int(match["port"] or 0) if match else 0
    wrong = rules.host(host) if host else "is neither HOST nor HOST:PORT"
    problem = f"it {wrong}" if wrong else None
    if problem is None and port > _MAX_PORT:
        problem = f"the highest port is {_MAX_PORT}"
    if problem is not None or not host:
        example = "Name it like 192.0.2.1:10809, [2001:db8::1]:10809, or localhost for a free port there"
        raise errors.BadUrl(url=text, kind="place to listen", problem=str(problem), example=example)
    return host, port or None
