"""A rollback cannot begin, or has begun and is not through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pullback.errors.root import Exit, PullbackError


@dataclass(kw_only=True, eq=False)
class DisksDiffer(PullbackError):
    """The machine's disks are not those of the restore point, so they cannot be rolled back in place."""

    code: ClassVar[str] = "disks-differ"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "{machine} cannot be rolled back to {point} in place: {problem}."
    remedy: ClassVar[str | None] = "{way_out}"
    machine: str
    point: str
    problem: str
    way_out: str = "`pullback restore` writes the restore point to new images."


@dataclass(kw_only=True, eq=False)
class StagingSpace(PullbackError):
    """Too little room for the chunks that a rollback keeps locally before it writes."""

    code: ClassVar[str] = "staging-space"
    sentence: ClassVar[str] = "{path} has {free} free; what is to be written back takes {needed} there."
    remedy: ClassVar[str | None] = "Make room, or name another directory with --staging. No disk was touched."
    path: str
    free: str
    needed: str


@dataclass(kw_only=True, eq=False)
class RollbackPending(PullbackError):
    """A rollback has written a part of these disks; until it is finished nobody may use them."""

    code: ClassVar[str] = "rollback-pending"
    exit_code: ClassVar[Exit] = Exit.BUSY
    sentence: ClassVar[str] = (
        "The disks of {machine} are half rolled back to {point}: that was interrupted, and must be finished first."
    )
    remedy: ClassVar[str | None] = "Run it again: {command}"
    machine: str
    point: str
    command: str


@dataclass(kw_only=True, eq=False)
class RollbackUnfinished(PullbackError):
    """A rollback failed after it had begun to write."""

    code: ClassVar[str] = "rollback-unfinished"
    sentence: ClassVar[str] = "The disks of {machine} are half rolled back to {point}: {reason}."
    remedy: ClassVar[str | None] = (
        "The machine is held; do not start it by other means. Mend that, and run it again: {command}"
    )
    machine: str
    point: str
    reason: str
    command: str


@dataclass(kw_only=True, eq=False)
class JournalDamaged(PullbackError):
    """What was written down about a rollback cannot be read, so nobody knows which disks it is about."""

    code: ClassVar[str] = "journal-damaged"
    exit_code: ClassVar[Exit] = Exit.VERIFICATION
    sentence: ClassVar[str] = "The journal {path} of a rollback cannot be used: {problem}."
    remedy: ClassVar[str | None] = (
        "Some machine's disks may be half rolled back. Restore those whole, then remove the journal's directory."
    )
    path: str
    problem: str
