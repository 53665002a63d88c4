"""A `dir:` repository: a plain directory of qcow2 images that `qemu-img` alone can read.

Its layout is in `layout`, how points are written in `pending`, how they are read in `chain`.
Reading needs nothing but the right to read; writing is one writer per machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from pullback import errors
from pullback.model import points, tpm
from pullback.model.description import Firmware, FirmwareHeader, with_data
from pullback.model.points import Point
from pullback.model.tpm import TpmFileHeader, TpmState
from pullback.repo import files, selection
from pullback.repo.digest import HashList
from pullback.repo.directory import chain, layout, locks, pending
from pullback.repo.interface import Damaged, Listing
from pullback.repo.store.limit import Limiter
from pullback.units import KiB

#: The format of the directory that this Pullback writes, and the highest that it reads.
FORMAT = 1
_KIND = "pullback-directory"
_MARKER_LIMIT = 4 * KiB
_REPOSITORY_ID = re.compile(r"[0-9a-f]{16}")
# A new file system's own directory, which makes a directory no less empty.
_NOTHING = frozenset({"lost+found"})


class Directory:
    """An open repository. Holds nothing by itself; `writer` and `reading` do, while their block runs."""

    def __init__(self, path: Path, identity: str) -> None:
        #: Where it lies, absolute.
        self.path = path
        #: What messages call it.
        self.name = str(path)
        #: QEMU opens 64 images in 0.13 s, 128 in 0.9 s, 256 in 7 s (measured on 7.2.22), and every read of
        #: an old block looks through all of them.
        self.longest_chain: int | None = 60
        #: 16 hex digits, made once; a copy of the directory keeps it.
        self.id = identity

    # -- looking -----------------------------------------------------------------------------

    def machines(self) -> tuple[str, ...]:
        """The machines that have a directory here, sorted."""
        names = [layout.machine_name(name) for name in files.names(self.path) if files.is_directory(self.path / name)]
        return tuple(sorted(name for name in names if name is not None))

    def listing(self, machine: str) -> Listing:
        """The machine's points. A damaged one is told, and is no reason to fail."""
        sound: list[Point] = []
        damaged: list[Damaged] = []
        for name in layout.point_ids(self._machine(machine)):
            try:
                sound.append(layout.read_point(self._machine(machine), name))
            except (errors.VerificationFailed, errors.RepositoryTooNew) as error:
                if files.is_directory(self._machine(machine) / name):  # it may have been removed just now
                    damaged.append(_damaged(machine, name, error))
        return Listing(points=tuple(sorted(sound, key=lambda point: (point.created, point.id))), damaged=tuple(damaged))

    def strays(self) -> tuple[Damaged, ...]:
        """None: each point lies in its machine's directory."""
        return ()

    def point(self, machine: str, identity: str) -> Point:
        """The point with exactly that id; raises `UnknownPoint`, `VerificationFailed`."""
        directory = self._machine(machine)
        if points.id_moment(identity) is None or not files.is_directory(directory / identity):
            raise errors.UnknownPoint(point=identity, repository=str(self.path))
        return layout.read_point(directory, identity)

    def find(self, text: str = selection.LATEST, *, machine: str | None = None) -> Point:
        """The point that a user means: an id, the start of one, `latest`, or a date in local time.

        A date ("2026-11-24" is the end of that day, "2026-11-24 06:00", "2026-11-24T06:00:18")
        means the last point not after it. Raises `UnknownPoint`, `NoPoints`, `AmbiguousPoint`, and
        `VerificationFailed` if just the point that is meant is damaged.
        """
        machines = self.machines() if machine is None else (machine,)
        candidates = [candidate for name in machines for candidate in self._candidates(name)]
        chosen = selection.choose(candidates, text, machine=machine, repository=str(self.path))
        return self.point(chosen.machine, chosen.id)

    def _candidates(self, machine: str) -> list[selection.Candidate]:
        listing = self.listing(machine)
        every: list[Point | Damaged] = [*listing.points, *listing.damaged]
        return [selection.Candidate(machine=machine, id=found.id, created=found.created) for found in every]

    def dependents(self, point: Point) -> tuple[Point, ...]:
        """The machine's points with a disk that is backed by this one (directly), oldest first."""
        return tuple(
            other
            for other in self.listing(point.machine).points
            if any(disk.parent is not None and disk.parent.point == point.id for disk in other.disks)
        )

    # -- reading -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self, point: Point) -> Iterator[None]:
        """Keep the point from being removed while the block runs (its parents cannot be, because of it).

        Writes nothing, and goes on without the lock where it cannot be had. Raises `BusyError` if
        the point is just being removed, `VerificationFailed` if its manifest is gone.
        """
        with contextlib.ExitStack() as stack:
            with files.judging(point.id, layout.MANIFEST):
                stack.enter_context(locks.reader(self._machine(point.machine) / point.id / layout.MANIFEST))
            yield

    def chain(self, point: Point, target: str) -> tuple[chain.Link, ...]:
        """The images of a disk, top first, checked (see `chain.follow`), their structure proven."""
        links = chain.follow(self._machine(point.machine), point, target)
        chain.prove_structure(point.id, links)
        return links

    def hashes(self, point: Point, target: str) -> HashList:
        """The block hashes of a disk; raises `VerificationFailed` if they are not those of the manifest."""
        return chain.hash_list(self._machine(point.machine), point, target)

    def firmware(self, point: Point) -> tuple[Firmware, ...]:
        """The firmware devices of a point with their bytes; raises `VerificationFailed`."""
        return tuple(self._firmware(point, header) for header in point.firmware)

    def _firmware(self, point: Point, header: FirmwareHeader) -> Firmware:
        name = layout.firmware_name(header.name)
        with files.judging(point.id, name):
            return with_data(header, files.read(self._machine(point.machine) / point.id / name, limit=header.size))

    def tpm(self, point: Point) -> TpmState | None:
        """The state of a point's TPM with its bytes; raises `VerificationFailed`."""
        if point.tpm is None:
            return None

        def load(header: TpmFileHeader) -> bytes:
            name = layout.tpm_name(header.name)
            with files.judging(point.id, name):
                return files.read(self._machine(point.machine) / point.id / name, limit=header.size)

        with files.judging(point.id, "the TPM's state"):
            return tpm.with_data(point.tpm, load)

    # -- writing -----------------------------------------------------------------------------

    def writer(
        self, machine: str, *, command: str, limiter: Limiter | None = None
    ) -> contextlib.AbstractContextManager[pending.Writer]:
        """Become the machine's only writer; `command` tells others what we are doing. See `pending.writer`."""
        return pending.writer(self.path, machine, command=command, limiter=limiter)

    def _machine(self, machine: str) -> Path:
        return self.path / layout.encoded(machine)


def _damaged(machine: str, name: str, error: errors.VerificationFailed | errors.RepositoryTooNew) -> Damaged:
    created = points.id_moment(name)
    assert created is not None  # `point_ids` gives ids only
    problem = error.problem if isinstance(error, errors.VerificationFailed) else f"it has format {error.found}"
    return Damaged(machine=machine, id=name, created=created, problem=problem)


# -- opening ---------------------------------------------------------------------------------


def open_directory(path: Path) -> Directory:
    """Open the repository at `path`, to read or to write.

    Raises `NoRepository` if nothing or an empty directory is there, `NotARepository`,
    `RepositoryTooNew`, `PermissionDenied`.
    """
    path = path.absolute()
    if not _content(path):
        raise errors.NoRepository(path=str(path))
    return Directory(path, _identity(path))


def create_or_open(path: Path) -> Directory:
    """Open the repository at `path`; make one (mode 0700) if there is nothing, or an empty directory.

    The directory above must be there: a backup to a file system that is not mounted shall fail.
    Raises as `open_directory` does, and `DestinationFull`, `CannotWrite`.
    """
    path = path.absolute()
    if not _content(path):
        with files.writing(path):
            _initialise(path)
    return Directory(path, _identity(path))


def _content(path: Path) -> list[str]:
    """The names in the directory that matter; raises `NotARepository` if it is no directory."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise errors.NotARepository(path=str(path), problem="it is no directory") from error
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(path)) from error
    except OSError as error:
        raise errors.NotARepository(path=str(path), problem=error.strerror or "it cannot be read") from error
    return [name for name in names if name not in _NOTHING and not name.startswith(f".{layout.MARKER}.")]


def _initialise(path: Path) -> None:
    """Make directory and marker; if somebody else does the same at this moment, theirs counts."""
    if not path.parent.is_dir():
        reason = f"there is no directory {path.parent} (is its file system mounted?)"
        raise errors.CannotWrite(path=str(path), reason=reason)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
        files.sync(path.parent)
    marker = {"format": FORMAT, "kind": _KIND, "id": secrets.token_hex(8)}
    beside = path / f".{layout.MARKER}.{secrets.token_hex(4)}"
    try:
        files.write_new(beside, json.dumps(marker).encode() + b"\n")
        with contextlib.suppress(FileExistsError):
            _publish(beside, path / layout.MARKER)
    finally:
        beside.unlink(missing_ok=True)
    files.sync(path)


def _publish(beside: Path, marker: Path) -> None:
    """Give the file its name unless that is taken."""
    try:
        os.link(beside, marker)
    except FileExistsError:
        raise
    except OSError:  # no hard links there (FAT, many FUSE file systems)
        if not marker.exists():
            os.rename(beside, marker)


def _identity(path: Path) -> str:
    """The repository's id from its marker."""
    try:
        marker = json.loads(files.read(path / layout.MARKER, limit=_MARKER_LIMIT))
        return _judge(path, marker)
    except FileNotFoundError as error:
        raise errors.NotARepository(path=str(path), problem=f"there is no {layout.MARKER}") from error
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(path / layout.MARKER)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise errors.NotARepository(path=str(path), problem=f"its {layout.MARKER} cannot be used") from error


def _judge(path: Path, marker: object) -> str:
    if not isinstance(marker, dict) or marker.get("kind") != _KIND:
        raise ValueError("of another kind")
    found, identity = marker.get("format"), marker.get("id")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError("no format")
    if found > FORMAT:
        raise errors.RepositoryTooNew(path=str(path), found=found, known=FORMAT)
    if not isinstance(identity, str) or not _REPOSITORY_ID.fullmatch(identity):
        raise ValueError("no id")
    return identity
