"""Single files of a restore point: listed and fetched by a small machine, so that no disk's content meets the host."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from pullback import errors, state
from pullback.flows import mounting, serving
from pullback.flows.listening import own_directory
from pullback.flows.repositories import Access
from pullback.flows.threads import blocking, entered
from pullback.guest import build, reader, roots, taking, trusted, volumes
from pullback.guest.entries import LETTERS as LETTERS
from pullback.guest.entries import Entry as Entry
from pullback.guest.entries import Item, Type, Unread
from pullback.guest.reader import Reader
from pullback.guest.taking import LeftOut as LeftOut
from pullback.guest.volumes import Volume
from pullback.model import urls
from pullback.model.filepaths import FilePath
from pullback.model.points import Point
from pullback.progress import Cancel, Progress, Silent

T = TypeVar("T")
#: Entries of one directory that are listed.
MAX_ENTRIES = 1_000_000
_SUBJECT = "files"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.Repository
    #: The file or directory; None: what volumes there are.
    where: FilePath | None = None
    access: Access = field(default_factory=Access)
    #: An id, the start of one, `latest`, or a date.
    point: str = "latest"
    machine: str | None = None
    #: Targets of the disks that are looked into; empty: all.
    only: tuple[str, ...] = ()
    directories: state.Directories | None = None
    #: Where small guests are kept; None: the usual place.
    guests: Path | None = None
    #: The host's own kernel mounts the disks. Root alone can, and who made the disks can attack that kernel.
    trust: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeAt:
    """A volume, and whether its files can be read."""

    volume: Volume
    #: Why not; None: they can.
    closed: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Volumes:
    """What is on the disks of a restore point."""

    point: Point
    volumes: tuple[VolumeAt, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What is in a directory, or the one file that was named."""

    point: Point
    where: FilePath
    #: By name.
    entries: tuple[Entry, ...]
    unread: tuple[Unread, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What was fetched."""

    point: Point
    where: FilePath
    #: The file or directory that was made; "-": standard output.
    place: str
    #: It is a tar archive.
    archive: bool
    taken: taking.Taken
    notes: tuple[str, ...]
    seconds: float


# -- looking ---------------------------------------------------------------------------------


async def show(request: Request, progress: Progress | None = None) -> Volumes:
    """Disks, partitions and logical volumes of a restore point, and what is on each. Errors: as `ls`."""

    def work(machine: Reader, point: Point) -> Volumes:
        found = machine.scan()
        having = machine.having
        closed = [None if volumes.ways(one, having) and one.key else volumes.closed(one) for one in found]
        pairs = zip(found, closed, strict=True)
        return Volumes(point=point, volumes=tuple(VolumeAt(volume=one, closed=why) for one, why in pairs))

    return await _looking(request, progress or Silent(), work)


async def ls(request: Request, progress: Progress | None = None) -> Listing:
    """What is in a directory. `request.where` says which.

    Raises `UnknownVolume`, `NoRoot`, `NoSuchFile`, `VolumeUnreadable`, `FileUnreadable`; as `serving.serving`;
    `Unsupported` where no small guest can be made, `ProgramFailed` when it does not come up or ends.
    """
    where = _named(request)

    def work(machine: Reader, point: Point) -> Listing:
        at = _locate(machine, where, point)
        found: list[Entry] = []
        unread: list[Unread] = []
        with _saying(where):
            for item in machine.list(at.number, where.path):
                (found if isinstance(item, Entry) else unread).append(item)  # type: ignore[arg-type]
                if len(found) + len(unread) >= MAX_ENTRIES:
                    raise errors.FileUnreadable(path=str(where), reason=f"it has more than {MAX_ENTRIES} entries")
        found.sort(key=lambda entry: entry.name)
        return Listing(point=point, where=where, entries=tuple(found), unread=tuple(unread), notes=at.notes)

    return await _looking(request, progress or Silent(), work)


async def get(
    request: Request, to: Path | BinaryIO | None, progress: Progress | None = None, *, force: bool
) -> Fetched:
    """Fetch a file, or a directory and all below it.

    `to`: a stream takes a file's bytes, or a directory as a tar archive; so does a file named *.tar; a directory that
    is there gets the thing below its name; None: the current one. A file or directory that is there is an error;
    `force` replaces files. Raises as `ls`, and `DestinationExists`, `FilesUnreadable` when some could not be read.
    """
    where = _named(request)
    progress = progress or Silent()
    begun = time.monotonic()

    def work(machine: Reader, point: Point) -> Fetched:
        at = _locate(machine, where, point)
        with _saying(where):
            items = machine.tree(at.number, where.path)
            entry = taking.begun(items, str(where))
            progress.start(_SUBJECT, entry.size if entry.type is Type.FILE else 0)
            place, archive, taken = _take(entry, items, to, where, partial(progress.advance, _SUBJECT), force)
            progress.finish(_SUBJECT)
        seconds = time.monotonic() - begun
        return Fetched(
            point=point, where=where, place=place, archive=archive, taken=taken, notes=at.notes, seconds=seconds
        )

    return await _looking(request, progress, work)


def _named(request: Request) -> FilePath:
    if request.where is None:
        raise errors.UsageError(problem="Say which file or directory: vda1:/etc/hosts, or /etc/hosts")
    return request.where


def _take(
    entry: Entry,
    items: Iterator[Item],
    to: Path | BinaryIO | None,
    where: FilePath,
    advance: taking.Advance,
    force: bool,
) -> tuple[str, bool, taking.Taken]:
    """Put it where it shall go; gives the place's name, whether that is an archive, and what was taken."""
    if entry.type not in (Type.FILE, Type.DIRECTORY):
        raise errors.FileUnreadable(path=str(where), reason=f"it is a {entry.type}")
    if to is not None and not isinstance(to, Path):
        if entry.type is Type.FILE:
            return "-", False, taking.Taken(files=1, size=taking.pour(items, to, str(where), advance))
        return "-", True, taking.into_archive(items, entry, to, where.name, advance)
    place = _place(to, where)
    if entry.type is Type.FILE:
        return str(place), False, taking.into_file(items, entry, place, str(where), advance, force=force)
    if place.suffix == ".tar" and to is not None:
        return str(place), True, taking.into_archive_file(items, entry, place, where.name, advance, force=force)
    return str(place), False, taking.into_directory(items, entry, place, advance)


def _place(to: Path | None, where: FilePath) -> Path:
    chosen = (to or Path()).absolute()
    return chosen / os.fsdecode(where.name) if chosen.is_dir() else chosen


@contextmanager
def _saying(where: FilePath) -> Iterator[None]:
    """Errors of the reader, with the words of the user."""
    try:
        yield
    except errors.NoSuchFile as error:
        raise errors.NoSuchFile(path=_shown(where), volume=where.volume or "the guest's tree") from error
    except errors.FileUnreadable as error:
        raise errors.FileUnreadable(path=str(where), reason=error.reason) from error


def _shown(where: FilePath) -> str:
    return where.path.decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True, kw_only=True)
class _At:
    """A file system that is mounted."""

    number: int
    notes: tuple[str, ...]


def _locate(machine: Reader, where: FilePath, point: Point) -> _At:
    """Mount what the path is in."""
    known = machine.scan()
    if where.volume is None:
        return _root(machine, where, known, point)
    for volume in known:
        if volume.name == where.volume:
            mounted = machine.mount(volume, known)
            return _At(number=mounted.number, notes=(mounted.note,) if mounted.note else ())
    names = ", ".join(volume.name for volume in known)
    raise errors.UnknownVolume(volume=where.volume, point=point.id, known=names)


def _root(machine: Reader, where: FilePath, known: Sequence[Volume], point: Point) -> _At:
    """The guest's own tree; where the disks hold just one file system, that."""
    readable = [one for one in known if volumes.ways(one, machine.having) and one.key]
    if len(readable) == 1:
        mounted = machine.mount(readable[0], known)
        return _At(number=mounted.number, notes=(mounted.note,) if mounted.note else ())
    root = roots.compose(machine, known, path=_shown(where), point=point.id)
    return _At(number=root.number, notes=root.notes)


# -- the reader ------------------------------------------------------------------------------


async def _looking(request: Request, progress: Progress, work: Callable[[Reader, Point], T]) -> T:
    """Do the work in a thread, with a reader of the point's disks."""
    looking = _trusting if request.trust else _isolated
    return await looking(request, request.directories or state.directories(), progress, work)


async def _isolated(
    request: Request, directories: state.Directories, progress: Progress, work: Callable[[Reader, Point], T]
) -> T:
    """In a machine of its own."""
    small = await made_reader(request.guests, directories, progress)
    served = serving.Request(
        repository=request.repository,
        access=request.access,
        point=request.point,
        machine=request.machine,
        only=request.only,
        directories=directories,
    )
    cancel = Cancel()
    async with serving.serving(served, progress) as disks:

        def inside() -> T:
            with (
                own_directory(directories, None) as directory,
                reader.start(small, drives(disks.disks), directory, cancel) as machine,
            ):
                return work(machine, disks.point)

        return await blocking(inside, cancel=cancel, beside=disks.ended())


async def _trusting(
    request: Request, directories: state.Directories, progress: Progress, work: Callable[[Reader, Point], T]
) -> T:
    """By the host's own kernel."""
    trusted.require_root()
    cancel = Cancel()
    async with entered(own_directory(directories, None)) as directory:
        shown = mounting.Request(
            repository=request.repository,
            directory=directory / "disks",
            access=request.access,
            point=request.point,
            machine=request.machine,
            only=request.only,
            directories=directories,
        )
        async with mounting.mounting(shown, progress) as disks:
            files = {file.target: file.path for file in disks.files if file.target is not None}

            def inside() -> T:
                with trusted.start(files, directory, cancel) as machine:
                    return work(machine, disks.point)

            return await blocking(inside, cancel=cancel, beside=disks.ended())


def drives(disks: Sequence[serving.ServedDisk]) -> list[reader.Drive]:
    """Served disks, for a reader."""
    found = []
    for disk in disks:
        assert disk.socket is not None
        found.append(reader.served(disk.target, disk.size, server=disk.socket, export=disk.export))
    return found


async def made_reader(guests: Path | None, directories: state.Directories, progress: Progress) -> build.SmallGuest:
    """The reader, made first where there is none yet. Root's is used by everybody."""
    own = guests or (build.CACHE if os.geteuid() == 0 else directories.cache / "guest")
    for cache in (own, build.CACHE):
        if (found := await asyncio.to_thread(partial(build.ready, cache, recipe=build.READER))) is not None:
            return found
    progress.note(f"making the small machine that reads disks, in {own} (once; it downloads packages)")
    return await asyncio.to_thread(partial(build.guest, own, recipe=build.READER))
