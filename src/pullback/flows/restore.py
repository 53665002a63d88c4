"""Restoring disks of a restore point, each byte proven while it is written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pullback import errors, repo
from pullback.endpoint import Endpoint
from pullback.flows import destinations, reading
from pullback.flows.destinations import FilePlace, Output, Place
from pullback.flows.destinations import Format as Format
from pullback.flows.repositories import Access, cancel_for, open_for
from pullback.flows.repositories import reading as reading_of
from pullback.flows.threads import blocking
from pullback.model import urls
from pullback.model.points import Point, PointDisk
from pullback.progress import Progress, Silent
from pullback.units import format_size

#: Disks at a time.
PARALLEL = 1
#: Restore points that cannot even be dated, and are told.
_STRAYS_TOLD = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.Repository
    #: A directory for `<target>.<format>`; or the place of the only disk; or places by target, which
    #: choose the disks too.
    to: Path | Place | Mapping[str, Place]
    access: Access = field(default_factory=Access)
    #: An id, the start of one, `latest`, or a date.
    point: str = "latest"
    machine: str | None = None
    #: Targets; empty: all disks of the point.
    only: tuple[str, ...] = ()
    #: Of files whose name does not say it.
    format: Format = Format.RAW
    #: Overwrite files that are there, and block devices.
    force: bool = False
    #: Read back what was written, and compare.
    check: bool = False
    #: So many disks at a time.
    parallel: int = PARALLEL
    #: Bytes of disks a second at most; None: no limit.
    rate: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A disk that was written."""

    target: str
    #: A path, or an NBD URI.
    place: str
    format: Format
    size: int
    #: Bytes read from the repository.
    read: int
    digest: str
    #: Was it read back and compared?
    checked: bool
    #: Bytes behind the disk's end, which were left as they were.
    behind: int = 0

    @property
    def path(self) -> Path:
        """The file, or the block device."""
        return Path(self.place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a restore did."""

    point: Point
    disks: tuple[Restored, ...]
    seconds: float


async def restore(request: Request, progress: Progress | None = None) -> Report:
    """Write the disks to where they shall go.

    A file is only there once it is whole and proven. What a block device or server holds after a
    failure is undefined, and the error says so. Raises `VerificationFailed`, `DestinationDiffers`
    (`check`), `DestinationExists`, `DestinationUnusable`, `DestinationFull`, `CannotWrite`, `BusyError`.
    """
    begun = time.monotonic()
    async with open_for(request.repository, request.access) as repository:
        point = await asyncio.to_thread(partial(repository.find, request.point, machine=request.machine))
        progress = progress or Silent()
        if not point.id.startswith(request.point.lower()):
            await asyncio.to_thread(_tell_strays, repository, progress)
        outputs = await asyncio.to_thread(_outputs, request, point)
        async with reading_of(repository, point):
            done = await _Work(repository, point, request, progress).all(outputs)
    return Report(point=point, disks=tuple(done), seconds=time.monotonic() - begun)


def _tell_strays(repository: repo.Repository, progress: Progress) -> None:
    """Who asks for the latest one gets the latest that can be read: say so if another may be newer."""
    for stray in repository.strays()[:_STRAYS_TOLD]:
        progress.note(f"restore point {stray.id} may be newer, but nobody knows: {stray.problem}")


def choose(point: Point, only: tuple[str, ...]) -> tuple[PointDisk, ...]:
    """The disks of a point that are meant; raises `UnknownDisk`."""
    return tuple(point.disk(target) for target in only) if only else point.disks


# -- where the disks go ----------------------------------------------------------------------


def _outputs(request: Request, point: Point) -> list[Output]:
    """The place of each disk that is meant, as it is now."""
    places = _places(request, point)
    found = [
        destinations.output(target, point.disk(target).size, place, force=request.force, format=request.format)
        for target, place in places.items()
    ]
    destinations.refuse_twice(found)
    if isinstance(request.to, Path):
        _make_directory(request.to)
    return found


def _places(request: Request, point: Point) -> Mapping[str, Place]:
    if isinstance(request.to, Mapping):
        for target in request.to:
            point.disk(target)
        return request.to
    chosen = choose(point, request.only)
    if isinstance(request.to, Path):
        to, suffix = request.to, request.format
        return {disk.target: FilePlace(path=to / f"{disk.target}.{suffix}", format=suffix) for disk in chosen}
    if len(chosen) != 1:
        known = ", ".join(disk.target for disk in chosen)
        raise errors.UsageError(
            problem=f"{request.to} is the place of one disk, and there are {known}: say which with --disk"
        )
    return {chosen[0].target: request.to}


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(path)) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise errors.CannotWrite(path=str(path), reason="a file is in its place or above it") from error
    except OSError as error:
        raise errors.CannotWrite(path=str(path), reason=error.strerror or str(error)) from error


# -- writing ---------------------------------------------------------------------------------


class _Work:
    """The disks of one restore."""

    def __init__(self, repository: repo.Repository, point: Point, request: Request, progress: Progress) -> None:
        self._repository = repository
        self._point = point
        self._request = request
        self._progress = progress
        self._cancel = cancel_for(repository)
        self._limiter = repo.Limiter(request.rate) if request.rate else None

    async def all(self, outputs: Sequence[Output]) -> list[Restored]:
        """Some at a time; the first failure stops the others."""
        room = asyncio.Semaphore(self._request.parallel)
        atonce = min(self._request.parallel, len(outputs))
        tasks = [asyncio.ensure_future(self._in_turn(room, output, atonce)) for output in outputs]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException as error:
            self._cancel.cancel(error)
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                _take_notes(error, ended)
            raise

    async def _in_turn(self, room: asyncio.Semaphore, output: Output, atonce: int) -> Restored:
        async with room:
            self._cancel.check()
            return await blocking(partial(self._disk, output, atonce), cancel=self._cancel)

    def _disk(self, output: Output, atonce: int) -> Restored:
        disk = self._point.disk(output.target)
        read = 0

        def fill(endpoint: Endpoint, *, empty: bool) -> None:
            nonlocal read
            read = reading.prove(
                self._repository,
                self._point,
                disk,
                endpoint,
                progress=self._progress,
                cancel=self._cancel,
                empty=empty,
                share=atonce,
                limiter=self._limiter,
            )

        check = partial(self._check, disk, output) if self._request.check else None
        behind = destinations.write(output, fill, check, cancel=self._cancel)
        if behind:
            self._progress.note(
                f"{disk.target}: {output.name} is larger; its last {format_size(behind)} were left alone"
            )
        return Restored(
            target=disk.target,
            place=output.name,
            format=output.format,
            size=disk.size,
            read=read,
            digest=disk.digest,
            checked=check is not None,
            behind=behind,
        )

    def _check(self, disk: PointDisk, output: Output, endpoint: Endpoint) -> None:
        """Read it back: what is there is what the restore point holds."""
        hashes = self._repository.hashes(self._point, disk.target)

        def failed(problem: str) -> errors.DestinationDiffers:
            return errors.DestinationDiffers(place=output.name, problem=problem)

        subject = f"{disk.target} check"
        self._progress.start(subject, disk.size)
        advance = partial(self._progress.advance, subject)
        reading.compare(disk, hashes, endpoint, failed=failed, advance=advance, cancel=self._cancel)
        self._progress.finish(subject)


def _take_notes(error: BaseException, other: object) -> None:
    """What stopped disks say of their destinations is said with the error that stopped them."""
    for note in getattr(other, "__notes__", []):
        if note not in getattr(error, "__notes__", []):
            error.add_note(note)
