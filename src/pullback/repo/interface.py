"""What both kinds of repository offer, so that backup, restore and verify are written once.

`directory.Directory` keeps qcow2 images, `restic.Repository` writes restic's format.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from pullback.model.description import Firmware
from pullback.model.points import ImageFiles, Point, PointRef
from pullback.model.tpm import TpmState
from pullback.repo.digest import HashList
from pullback.repo.store.limit import Limiter


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """A restore point whose manifest cannot be used."""

    #: Its machine.
    machine: str
    #: Its id.
    id: str
    #: When it was made, UTC (as far as that can be known).
    created: datetime
    #: What is wrong, as a clause.
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The restore points of a machine."""

    #: Those with a sound manifest, oldest first.
    points: tuple[Point, ...]
    #: The others, oldest first.
    damaged: tuple[Damaged, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """A disk that is stored: what a `PointDisk` says of it, under the same names."""

    size: int
    parent: PointRef | None
    block_size: int
    digest: str
    stored: int
    files: ImageFiles | None


class PendingPoint(Protocol):
    """A restore point while it is written: invisible until `commit`. A context manager that undoes it."""

    def create(self, target: str, size: int, *, parent: PointRef | None = None) -> object:
        """Begin a disk of `size` bytes, an increment of `parent` if there is one.

        Nothing is begun if that fails, so that the disk can then be made whole. Raises
        `VerificationFailed` (the parent cannot be used, or has another size), `Unsupported`.
        """

    def keep_firmware(self, firmware: Firmware) -> None:
        """Store the bytes of a firmware device, whose header the point will have."""

    def keep_tpm(self, state: TpmState) -> None:
        """Store the bytes of the TPM's state, whose header the point will have; at most once."""

    def upload(self) -> None:
        """Make durable what the disks have, so that `commit` is quick."""

    def commit(self, point: Point) -> Point:
        """Make the point visible, durably, whose disks are those that were sealed; gives it with its id.

        The id of `point` is "", or what it must become. Raises `ValueError` if the point says other
        things than were sealed, and as writing to the repository does.
        """


class Writer(Protocol):
    """The right to write points of one machine."""

    def begin(self) -> AbstractContextManager[PendingPoint]:
        """A new point."""


class Repository(Protocol):
    """An open repository. Raises `VerificationFailed` for whatever in it is damaged."""

    @property
    def name(self) -> str:
        """What messages call it: the URL without secrets, or the path."""

    @property
    def id(self) -> str:
        """16 hex digits that are its own; a copy of it keeps them."""

    @property
    def longest_chain(self) -> int | None:
        """Increments that may build on one another before a whole read is due; None: no matter how many."""

    def machines(self) -> tuple[str, ...]:
        """The machines of which it keeps points, sorted."""

    def listing(self, machine: str) -> Listing:
        """The machine's points. A damaged one is told, and is no reason to fail."""

    def strays(self) -> tuple[Damaged, ...]:
        """Restore points so damaged that not even their machine can be told."""

    def point(self, machine: str, identity: str) -> Point:
        """The point with exactly that id; raises `UnknownPoint`."""

    def find(self, text: str = "latest", *, machine: str | None = None) -> Point:
        """The point that a user means: an id, the start of one, `latest`, or a date in local time.

        Raises `UnknownPoint`, `NoPoints`, `AmbiguousPoint`, and `VerificationFailed` if just the
        point that is meant is damaged.
        """

    def reading(self, point: Point) -> AbstractContextManager[None]:
        """Keep the point from being removed while the block runs."""

    def hashes(self, point: Point, target: str) -> HashList:
        """The block hashes of a disk, proven against its digest."""

    def firmware(self, point: Point) -> tuple[Firmware, ...]:
        """The firmware devices of a point with their bytes, proven by their hashes."""

    def tpm(self, point: Point) -> TpmState | None:
        """The state of a point's TPM with its bytes, proven by their hashes; None if it has none."""

    def writer(self, machine: str, *, command: str, limiter: Limiter | None = None) -> AbstractContextManager[Writer]:
        """Become a writer of the machine's points; `command` tells others what we are doing.

        `limiter` bounds what is written to it (to a `dir:` one, what is read for it).
        """
