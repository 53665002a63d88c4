"""Where things lie in a repository directory, and what may be called so.

    REPO/pullback.json                            what this directory is
    REPO/<machine, percent-encoded>/.lock         held by the machine's writer
    REPO/<machine>/.partial-<…>/                  a point being written, or being removed
    REPO/<machine>/<point id>/manifest.json       see `model.points`
                             /vda.qcow2           see `chain`
                             /vda.sha256          see `digest`
                             /pflash1.firmware    bytes of a firmware device
                             /tpm2-00.permall.tpm bytes of a file of the TPM's state

Names that begin with a dot are never points or machines, so a listing needs no list of exceptions.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote

from pullback import errors
from pullback.model import points, texts
from pullback.model.points import Point
from pullback.repo import files

#: The file that marks a repository directory.
MARKER = "pullback.json"
MANIFEST = "manifest.json"
LOCK = ".lock"
PARTIAL = ".partial-"

_NAME_MAX = 255  # bytes of a file name on every Linux file system in use (NAME_MAX)


def machine_name(directory: str) -> str | None:
    """The machine whose directory is called so, or None if it is no machine's directory."""
    name = unquote(directory) if directory.isascii() else ""
    try:
        return name if name and encoded(name) == directory else None
    except errors.UsageError:
        return None


def encoded(machine: str) -> str:
    """The directory name of a machine: percent-encoded UTF-8, a dot in front encoded too.

    Raises `UsageError` if the machine's name is empty, too long, or not to be shown.
    """
    if not machine or not texts.is_showable(machine):
        raise errors.UsageError(problem=f"{machine!r} cannot name a machine in a repository")
    name = quote(machine, safe="")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > _NAME_MAX:
        raise errors.UsageError(problem=f"The machine's name {machine!r} is too long for a directory")
    return name


def image_name(target: str) -> str:
    """The image of the disk `target`."""
    return f"{target}.qcow2"


def hashes_name(target: str) -> str:
    """The hash list of the disk `target`."""
    return f"{target}.sha256"


def backing_name(point: str, image: str) -> str:
    """How an increment names the image that it is backed by: relative, so the directory can move."""
    return f"../{point}/{image}"


def firmware_name(target: str) -> str:
    """The bytes of the firmware device `target`."""
    return f"{target}.firmware"


def tpm_name(name: str) -> str:
    """The bytes of the file `name` of the TPM's state."""
    return f"{name}.tpm"


def point_ids(machine: Path) -> list[str]:
    """Ids of the points in a machine's directory, oldest first. What is no point is passed over."""
    if not files.is_directory(machine):
        return []
    return [name for name in files.names(machine) if points.id_moment(name) and files.is_directory(machine / name)]


def read_point(machine: Path, point: str) -> Point:
    """The point `point` in the directory of a machine.

    Raises `VerificationFailed` if it is missing, damaged or not the one that its place says,
    `RepositoryTooNew`, `PermissionDenied`.
    """
    if not files.is_directory(machine / point):
        raise errors.VerificationFailed(point=point, problem="it is not there")
    with files.judging(point, MANIFEST):
        data = files.read(machine / point / MANIFEST, limit=points.MAX_MANIFEST)
    found = points.decode(data, name=point)
    if found.id != point or found.machine != machine_name(machine.name):
        raise errors.VerificationFailed(point=point, problem=f"its manifest is that of {found.machine} {found.id}")
    return found
