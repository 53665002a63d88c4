"""A restore point while it is written: invisible until all of it is durable.

    .partial-<time>-<token>/     images are made here and filled by whoever copies
        seal(vda), seal(vdb)     each image and its hash list: checked, synced
        commit(point)            manifest synced, directory synced ── rename ── parent synced
    <point id>/                  visible

A crash before the rename leaves a `.partial-` directory, which the machine's next writer removes;
after it, the point is whole.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from pullback import errors
from pullback.model import points, texts
from pullback.model.description import Firmware
from pullback.model.points import ImageFiles, Point, PointDisk, PointRef
from pullback.model.tpm import TpmState
from pullback.programs import qemu_img
from pullback.repo import files
from pullback.repo.digest import HashList, block_size_for
from pullback.repo.directory import chain, layout, locks, qcow2, structure
from pullback.repo.interface import Sealed
from pullback.repo.store.limit import Limiter


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An image that was made and is to be filled."""

    #: Bytes of the guest's disk.
    size: int
    #: What the image is backed by, or None.
    parent: PointRef | None
    #: The parent's chain, top first; empty without a parent.
    below: tuple[chain.Link, ...]


class Writer:
    """The right to write points of one machine; others wait, or rather are told that it is busy."""

    def __init__(self, directory: Path, machine: str, limiter: Limiter | None = None) -> None:
        """`directory` is the machine's, and is locked by the caller."""
        self.machine = machine
        self._directory = directory
        self._limiter = limiter

    def begin(self) -> PendingPoint:
        """A new point, to be used as a context manager."""
        return PendingPoint(self._directory, self.machine, self._limiter)

    def remove(self, point: str) -> None:
        """Remove a point that no other is backed by.

        Raises `UnknownPoint`; `BusyError` while somebody reads it; `UsageError` if another point
        needs it, or a damaged one might.
        """
        place = self._directory / point
        if points.id_moment(point) is None or not files.is_directory(place):
            raise errors.UnknownPoint(point=point, repository=str(self._directory.parent))
        self._refuse_if_needed(point)
        hidden = self._directory / f"{layout.PARTIAL}{point}"
        with files.writing(place):
            with _against_readers(place / layout.MANIFEST):
                os.rename(place, hidden)
            files.sync(self._directory)
            files.remove_tree(hidden)

    def _refuse_if_needed(self, point: str) -> None:
        others = [other for other in layout.point_ids(self._directory) if other != point]
        for other in others:
            try:
                disks = layout.read_point(self._directory, other).disks
            except errors.VerificationFailed as error:
                raise errors.UsageError(problem=f"Restore point {other} is damaged, and may need {point}") from error
            if any(disk.parent is not None and disk.parent.point == point for disk in disks):
                raise errors.UsageError(problem=f"Restore point {other} needs {point}")


@contextlib.contextmanager
def _against_readers(manifest: Path) -> Iterator[None]:
    """Hold a point against readers; one without a manifest cannot have any."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            stack.enter_context(locks.remover(manifest))
        yield


@contextlib.contextmanager
def writer(root: Path, machine: str, *, command: str, limiter: Limiter | None = None) -> Iterator[Writer]:
    """Become the machine's writer in the repository at `root`; clears away what a killed one left.

    Raises `BusyError` if there is one, `PermissionDenied`, `DestinationFull`, `CannotWrite`.
    """
    directory = root / layout.encoded(machine)
    with files.writing(directory):
        _make_directory(directory)
    what = f"{machine} in {root}"
    with locks.writer(directory / layout.LOCK, what=what, command=command):
        with files.writing(directory):
            for name in files.names(directory):
                if name.startswith(layout.PARTIAL):
                    files.remove_tree(directory / name)
        yield Writer(directory, machine, limiter)


def _make_directory(directory: Path) -> None:
    if not files.is_directory(directory):
        directory.mkdir(mode=0o700, exist_ok=True)
        files.sync(directory.parent)
    if not files.is_directory(directory):
        raise errors.CannotWrite(path=str(directory), reason="a symbolic link stands there")


class PendingPoint:
    """A point being written; leaving the block without `commit` removes it.

    Different disks may be worked on by different threads.
    """

    def __init__(self, directory: Path, machine: str, limiter: Limiter | None = None) -> None:
        """`directory` is the machine's."""
        self.machine = machine
        #: Whoever fills its disks keeps to it.
        self.limiter = limiter
        #: The random part of the point's id.
        self.token = secrets.token_hex(4)
        self._parent = directory
        self._path = directory / f"{layout.PARTIAL}{points.new_id(datetime.now(UTC), self.token)}"
        self._lock = threading.Lock()
        self._started: dict[str, Started] = {}
        self._sealed: dict[str, Sealed] = {}

    def __enter__(self) -> PendingPoint:
        with files.writing(self._path):
            self._path.mkdir(mode=0o700)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was not committed; twice is fine. What cannot be removed, the next writer removes."""
        with contextlib.suppress(OSError):
            files.remove_tree(self._path)

    def id_at(self, created: datetime) -> str:
        """The id that this point has if it was made at `created` (aware)."""
        return points.new_id(created, self.token)

    def create(self, target: str, size: int, *, parent: PointRef | None = None) -> Path:
        """Make the image of a disk of `size` bytes, to be filled; gives its path.

        With a `parent`, whose chain is checked first, the image is backed by it. Nothing is made if
        that fails, so the disk can then be made whole. Raises `VerificationFailed` (the parent
        cannot be used, or has another size), `Unsupported` (the chain would be too long),
        `DestinationFull`, `CannotWrite`.
        """
        if not texts.is_target(target) or target in self._started:
            raise ValueError(f"{target!r} cannot be a new disk of this point")
        below = () if parent is None else self._chain(parent, size)
        backing = layout.backing_name(below[0].point.id, below[0].disk.image.image) if below else None
        path = self.image(target)
        with files.writing(path):
            qemu_img.create(path, size, backing=backing)
            path.chmod(0o600)
        with self._lock:
            self._started[target] = Started(size=size, parent=parent, below=below)
        return path

    def _chain(self, parent: PointRef, size: int) -> tuple[chain.Link, ...]:
        point = layout.read_point(self._parent, parent.point)
        links = chain.follow(self._parent, point, parent.target)
        chain.hash_list(self._parent, point, parent.target)  # found damaged only later, the image would stand already
        if links[0].disk.size != size:
            raise errors.VerificationFailed(point=parent.point, problem=f"{parent.target} has another size there")
        if len(links) >= chain.MAX_DEPTH:
            raise errors.Unsupported(
                what="Another increment",
                reason=f"the chain has {len(links)} images already",
                way_out="Read the disk whole once: --level full.",
            )
        return links

    def image(self, target: str) -> Path:
        """The path of a disk's image, until `commit`."""
        return self._path / layout.image_name(target)

    def graph(self, target: str) -> dict[str, object]:
        """QEMU's block graph of the image for writing, its parents below it read-only; probes nothing."""
        below = self._started[target].below
        return {
            "driver": "qcow2",
            "discard": "unmap",
            "file": {"driver": "file", "filename": str(self.image(target)), "discard": "unmap"},
            "backing": chain.graph(below) if below else None,
        }

    def new_hashes(self, target: str) -> HashList:
        """The disk's hash list to begin with: the parent's, or one in which nothing is known.

        Raises `VerificationFailed` if the parent's is damaged.
        """
        started = self._started[target]
        block = block_size_for(started.size)
        if not started.below:
            return HashList(started.size, block)
        parent = chain.hash_list(self._parent, started.below[0].point, started.below[0].disk.target)
        return HashList.from_parent(parent, size=started.size, block_size=block)

    def seal(self, target: str, hashes: HashList) -> Sealed:
        """The image is filled and closed: check it, write its hash list, make both durable.

        Raises `VerificationFailed` if the image is not a sound one of the right size and backing
        file, `ValueError` if the list is incomplete or of another size, `DestinationFull`,
        `CannotWrite`.
        """
        started, image = self._started[target], self.image(target)
        if hashes.size != started.size:
            raise ValueError(f"the hash list of {target} is of another size")
        self._check(target, started)
        with files.writing(image):
            files.sync(image)
            files.write_new(self._path / layout.hashes_name(target), hashes.encode())
            stored = files.allocated(image)
        with files.judging(self._path.name, layout.image_name(target)):
            proof = structure.digest(image)
        sealed = Sealed(
            size=started.size,
            parent=started.parent,
            block_size=hashes.block_size,
            digest=hashes.digest(),
            stored=stored,
            files=ImageFiles(image=layout.image_name(target), hashes=layout.hashes_name(target), structure=proof),
        )
        with self._lock:
            self._sealed[target] = sealed
        return sealed

    def _check(self, target: str, started: Started) -> None:
        below = started.below
        backing = layout.backing_name(below[0].point.id, below[0].disk.image.image) if below else None
        with files.judging(self._path.name, layout.image_name(target)):
            header = qcow2.read(self.image(target))
            if (header.size, header.backing) != (started.size, backing):
                raise ValueError("the image changed its size or backing file while it was written")

    def keep_firmware(self, firmware: Firmware) -> None:
        """Store the bytes of a firmware device, durably."""
        path = self._path / layout.firmware_name(firmware.name)
        with files.writing(path):
            files.write_new(path, firmware.data)

    def keep_tpm(self, state: TpmState) -> None:
        """Store the bytes of the TPM's state, durably."""
        for file in state.files:
            path = self._path / layout.tpm_name(file.name)
            with files.writing(path):
                files.write_new(path, file.data)

    def upload(self) -> None:
        """See `interface.PendingPoint.upload`: `seal` did it."""

    def commit(self, point: Point) -> Point:
        """Make the point visible, durably; gives it as it will be read back.

        Its id is "" or `id_at(created)`, its disks those that were sealed, and say the same of
        them. Raises `ValueError` if not, `VerificationFailed` if its manifest could not be read
        back, `DestinationFull`, `CannotWrite`.
        """
        self._agree(point)
        point = replace(point, id=self.id_at(point.created))
        manifest = points.encode(point)
        final = self._parent / point.id
        with files.writing(final):
            files.write_new(self._path / layout.MANIFEST, manifest)
            files.sync(self._path)
            os.rename(self._path, final)
            files.sync(self._parent)
        return points.decode(manifest, name=point.id)

    def _agree(self, point: Point) -> None:
        if point.machine != self.machine or point.id not in ("", self.id_at(point.created)):
            raise ValueError("the point has another machine or id")
        if {disk.target for disk in point.disks} != set(self._started) or set(self._sealed) != set(self._started):
            raise ValueError("the point's disks are not those that were made and sealed")
        for disk in point.disks:
            if _sealed_part(disk) != self._sealed[disk.target]:
                raise ValueError(f"the point says other things of {disk.target} than were sealed")


def _sealed_part(disk: PointDisk) -> Sealed:
    return Sealed(
        size=disk.size,
        parent=disk.parent,
        block_size=disk.block_size,
        digest=disk.digest,
        stored=disk.stored,
        files=disk.files,
    )
