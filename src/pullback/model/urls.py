"""The names by which users call machines and repositories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pullback import errors

_MACHINE_EXAMPLE = "Name a QEMU process by its QMP socket: qmp:/run/web01.sock"
_REPOSITORY_EXAMPLE = "Name a directory: dir:/srv/backup"


@dataclass(frozen=True, slots=True, kw_only=True)
class QmpMachine:
    """A QEMU process, by its QMP socket."""

    socket: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryRepository:
    """A plain directory of qcow2 images."""

    path: Path


def machine(url: str) -> QmpMachine:
    """`qmp:/path/to.sock` to a value; `BadUrl` otherwise."""
    scheme, colon, rest = url.partition(":")
    if colon and scheme == "qmp" and rest:
        return QmpMachine(socket=Path(rest).absolute())
    problem = "the socket's path is missing" if colon and scheme == "qmp" else "it does not begin with 'qmp:'"
    raise errors.BadUrl(url=url, kind="machine", problem=problem, example=_MACHINE_EXAMPLE)


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
