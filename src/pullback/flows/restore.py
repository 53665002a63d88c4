"""Restoring disks of a restore point to files, each byte proven while it is written."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pullback import errors, repo, state
from pullback.endpoint import Endpoint
from pullback.flows import reading
from pullback.flows.repositories import Access, open_for
from pullback.flows.threads import blocking
from pullback.model import urls
from pullback.model.points import Point, PointDisk
from pullback.programs import qemu_img, qemu_nbd
from pullback.progress import Cancel, Progress, Silent
from pullback.transfer import FileEndpoint, NbdEndpoint


class Format(enum.StrEnum):
    """What a restored disk is written as."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.Repository
    to: Path
    access: Access = field(default_factory=Access)
    #: An id, the start of one, `latest`, or a date.
    point: str = "latest"
    machine: str | None = None
    #: Targets; empty: all disks of the point.
    only: tuple[str, ...] = ()
    format: Format = Format.RAW
    #: Overwrite files that are there.
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A disk that was written."""

    target: str
    path: Path
    size: int
    #: Bytes read from the repository.
    read: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a restore did."""

    point: Point
    disks: tuple[Restored, ...]
    seconds: float


async def restore(request: Request, progress: Progress | None = None) -> Report:
    """Write the disks to `to`/<target>.<format>, each only there once it is whole and proven.

    Raises `VerificationFailed` (nothing of that disk is left), `DestinationExists`, `DestinationFull`.
    """
    begun = time.monotonic()
    cancel = Cancel()
    async with open_for(request.repository, request.access) as repository:
        point = await asyncio.to_thread(partial(repository.find, request.point, machine=request.machine))
        outputs = _outputs(request, choose(point, request.only))
        done = []
        with repository.reading(point):
            for target, path in outputs.items():
                disk, silent = point.disk(target), progress or Silent()
                work = partial(_restore_disk, repository, point, disk, path, request.format, silent, cancel)
                done.append(await blocking(work, cancel=cancel))
    return Report(point=point, disks=tuple(done), seconds=time.monotonic() - begun)


def _outputs(request: Request, chosen: Sequence[PointDisk]) -> dict[str, Path]:
    """The files to be written, none of them there yet, their directory made."""
    outputs = {disk.target: request.to / f"{disk.target}.{request.format}" for disk in chosen}
    if not request.force:
        for path in outputs.values():
            if path.exists() or path.is_symlink():
                raise errors.DestinationExists(path=str(path))
    _make_directory(request.to)
    return outputs


def choose(point: Point, only: tuple[str, ...]) -> tuple[PointDisk, ...]:
    """The disks of a point that are meant; raises `UnknownDisk`."""
    return tuple(point.disk(target) for target in only) if only else point.disks


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(path)) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise errors.CannotWrite(path=str(path), reason="a file is in its place or above it") from error
    except OSError as error:
        raise errors.CannotWrite(path=str(path), reason=error.strerror or str(error)) from error


def _restore_disk(
    repository: repo.Repository,
    point: Point,
    disk: PointDisk,
    path: Path,
    format: Format,
    progress: Progress,
    cancel: Cancel,
) -> Restored:
    beside = path.with_name(f".{path.name}.partial")
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    try:
        with _destination(beside, disk, format, cancel) as destination:
            read = reading.prove(repository, point, disk, destination, progress=progress, cancel=cancel)
        beside.rename(path)
        state.sync_directory(path.parent)
    except errors.DestinationFull as error:
        raise errors.DestinationFull(path=str(path)) from error  # nobody knows the name of the file beside
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
    return Restored(target=disk.target, path=path, size=disk.size, read=read, digest=disk.digest)


@contextlib.contextmanager
def _destination(path: Path, disk: PointDisk, format: Format, cancel: Cancel) -> Iterator[Endpoint]:
    """A new file that reads as zeroes, durable when the block is left."""
    if format is Format.RAW:
        with FileEndpoint(path, create=disk.size) as file:
            yield file
        return
    qemu_img.create(path, disk.size)
    path.chmod(0o600)
    with (
        tempfile.TemporaryDirectory(prefix="pullback-") as directory,
        qemu_nbd.serve(path, "qcow2", socket=Path(directory) / "out.sock", writable=True) as address,
        NbdEndpoint(address, writable=True, name=str(path), cancel=cancel) as image,
    ):
        yield image
    state.sync_file(path)
