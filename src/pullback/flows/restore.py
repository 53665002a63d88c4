"""Restoring disks of a restore point, each byte proven while it is written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pullback import errors, repo, state
from pullback.endpoint import Endpoint
from pullback.flows import destinations, machinedisks, machinefiles, reading
from pullback.flows.destinations import FilePlace, NbdPlace, Output, Place
from pullback.flows.destinations import Format as Format
from pullback.flows.repositories import Access, cancel_for, open_for
from pullback.flows.repositories import reading as reading_of
from pullback.flows.threads import blocking
from pullback.model import identity, urls
from pullback.model.identity import Identity
from pullback.model.points import Point, PointDisk
from pullback.progress import Progress, Silent
from pullback.state import rollbacks
from pullback.units import format_size

#: Disks at a time.
PARALLEL = 1
#: Restore points that cannot even be dated, and are told.
_STRAYS_TOLD = 5


#: Where disks go.
To = Path | Place | Mapping[str, Place] | urls.Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.Repository
    #: A directory for `<target>.<format>`, and for what the machine was besides, if all disks are restored; or
    #: the place of the only disk; or places by target, which choose the disks too; or a machine that does not run.
    to: To
    #: With a machine: which disk of it is written for one of the point; others go to the one of the same name.
    disk_map: Mapping[str, str] = field(default_factory=dict)
    #: With a directory: disks that go elsewhere.
    elsewhere: Mapping[str, Place] = field(default_factory=dict)
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
    #: Discard first all that a block device or server holds.
    discard: bool = False
    #: With a directory: what is written there is a copy of that name, with an identity of its own.
    copy_name: str | None = None
    #: Where locks and records of machines are.
    directories: state.Directories = field(default_factory=state.directories)


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
    #: What the machine was besides: its firmware, TPM, description; `flows.machinefiles`.
    files: tuple[Path, ...] = ()
    #: Of a copy: who it is.
    identity: Identity | None = None
    #: Of a copy: the old address of each network card (None: QEMU's own), and the new one.
    macs: tuple[tuple[str | None, str], ...] = ()
    #: Sentences for people.
    notes: tuple[str, ...] = ()


async def restore(request: Request, progress: Progress | None = None) -> Report:
    """Write the disks to where they shall go.

    A file is only there once it is whole and proven. What a block device or server holds after a
    failure is undefined, and the error says so. Raises `VerificationFailed`, `DestinationDiffers`
    (`check`), `DestinationExists`, `DestinationUnusable`, `DestinationFull`, `CannotWrite`, `BusyError`.
    """
    begun = time.monotonic()
    copy = _identity(request)
    async with open_for(request.repository, request.access) as repository:
        point = await asyncio.to_thread(partial(repository.find, request.point, machine=request.machine))
        progress = progress or Silent()
        if not point.id.startswith(request.point.lower()):
            await asyncio.to_thread(_tell_strays, repository, progress)
        async with reading_of(repository, point):
            work = _Work(repository, point, request, progress)
            if isinstance(request.to, urls.QmpMachine | urls.ImagesMachine):
                done = await _to_machine(request, request.to, point, work)
                written = machinefiles.Written()
            else:
                plan = await asyncio.to_thread(_machine_files, repository, request, point, copy)
                outputs = await asyncio.to_thread(_outputs, request, point)
                done = await work.all(outputs)
                written = await asyncio.to_thread(_write_machine, plan, outputs)
    return Report(
        point=point,
        disks=tuple(done),
        seconds=time.monotonic() - begun,
        files=written.files,
        identity=copy,
        macs=written.macs,
        notes=(*work.notes, *written.notes),
    )


async def _to_machine(request: Request, url: urls.Machine, point: Point, work: _Work) -> list[Restored]:
    wanted = choose(point, request.only)
    opened = machinedisks.opened(url, request.directories, wanted, request.disk_map, force=request.force)
    async with opened as places:
        done = await work.all(places.outputs, beside=places.held.watch())
        for note in places.notes:
            work.note(note)
    return done


def _identity(request: Request) -> Identity | None:
    if request.copy_name is None:
        return None
    if not isinstance(request.to, Path) or request.only:
        raise errors.UsageError(
            problem="A copy needs a directory for what makes it another machine, and all of its disks: "
            "--as goes with --to DIR, and not with --disk"
        )
    return identity.named(request.copy_name)


def _machine_files(
    repository: repo.Repository, request: Request, point: Point, copy: Identity | None
) -> machinefiles.Plan | None:
    """What is to be written beside the disks; proven before a disk is touched. Of single disks nothing is."""
    if not isinstance(request.to, Path) or request.only:
        return None
    kept = machinefiles.load(repository, point)
    plan = machinefiles.Plan(directory=request.to, point=point, kept=kept, identity=copy, force=request.force)
    plan.check()
    return plan


def _write_machine(plan: machinefiles.Plan | None, outputs: Sequence[Output]) -> machinefiles.Written:
    return machinefiles.Written() if plan is None else machinefiles.write(plan, _placed(outputs))


def _placed(outputs: Sequence[Output]) -> tuple[machinefiles.Disk, ...]:
    return tuple(
        machinefiles.Disk(
            target=output.target,
            place=output.name,
            path=Path(output.name) if isinstance(output.place, Path) else None,
            format=output.format,
            device=output.device,
        )
        for output in outputs
    )


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
    paths = [output.place for output in found if isinstance(output.place, Path)]
    rollbacks.require_none(request.directories.state, paths, machine="")
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
        inside = {disk.target: FilePlace(path=to / f"{disk.target}.{suffix}", format=suffix) for disk in chosen}
        for target in request.elsewhere:
            if target not in inside:
                point.disk(target)
                raise errors.UsageError(problem=f"{target} has a place in --to, and --disk leaves it out")
        return inside | dict(request.elsewhere)
    assert isinstance(request.to, FilePlace | NbdPlace), "of a machine there are no places"
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
        #: What was said.
        self.notes: list[str] = []

    async def all(
        self, outputs: Sequence[Output], *, beside: Coroutine[Any, Any, None] | None = None
    ) -> list[Restored]:
        """Some at a time; the first failure stops the others. `beside` runs meanwhile, and only ends by failing."""
        room = asyncio.Semaphore(self._request.parallel)
        atonce = min(self._request.parallel, len(outputs))
        watch = asyncio.ensure_future(beside) if beside is not None else None
        tasks = [asyncio.ensure_future(self._in_turn(room, output, atonce)) for output in outputs]
        together = asyncio.gather(*tasks)
        try:
            if watch is not None:
                either: set[asyncio.Future[Any]] = {together, watch}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if watch.done():
                    await watch
            return list(await together)
        except BaseException as error:
            self._cancel.cancel(error)
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                _take_notes(error, ended)
            raise
        finally:
            if watch is not None:
                watch.cancel()

    async def _in_turn(self, room: asyncio.Semaphore, output: Output, atonce: int) -> Restored:
        async with room:
            self._cancel.check()
            return await blocking(partial(self._disk, output, atonce), cancel=self._cancel)

    def _disk(self, output: Output, atonce: int) -> Restored:
        disk = self._point.disk(output.target)
        read = 0

        def fill(endpoint: Endpoint, prepare: destinations.Prepare | None = None) -> None:
            nonlocal read
            read = reading.prove(
                self._repository,
                self._point,
                disk,
                endpoint,
                progress=self._progress,
                cancel=self._cancel,
                prepare=prepare,
                share=atonce,
                limiter=self._limiter,
            )

        check = partial(self._check, disk, output) if self._request.check else None
        done = destinations.write(output, fill, check, cancel=self._cancel, discard=self._request.discard)
        self._tell(output, done)
        return Restored(
            target=disk.target,
            place=output.name,
            format=output.format,
            size=disk.size,
            read=read,
            digest=disk.digest,
            checked=check is not None,
            behind=done.behind,
        )

    def _tell(self, output: Output, done: destinations.Written) -> None:
        notes = list(done.notes)
        if done.behind:
            what = "discarded, and are undefined" if self._request.discard else "left alone"
            notes.append(f"is larger; its last {format_size(done.behind)} were {what}")
        for note in notes:
            self.note(f"{output.target}: {output.name} {note}")

    def note(self, sentence: str) -> None:
        """Say it now, and in the report."""
        self.notes.append(sentence)
        self._progress.note(sentence)

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
