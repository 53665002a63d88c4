"""What was frozen, tracked or stored is not what it should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pullback.errors.root import Exit, PullbackError

# -- the snapshot ----------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class SnapshotBroken(PullbackError):
    """The frozen view died (scratch failed) so that the guest could go on."""

    code: ClassVar[str] = "snapshot-broken"
    sentence: ClassVar[str] = (
        "The snapshot of disk {target} broke: {reason}. The guest was not hurt, the backup is void."
    )
    remedy: ClassVar[str | None] = "Run the backup again; give scratch more room or a faster place with --scratch."
    target: str
    reason: str


@dataclass(kw_only=True, eq=False)
class PushFailed(PullbackError):
    """The hypervisor could not copy a disk to its destination; all of the push is undone."""

    code: ClassVar[str] = "push-failed"
    sentence: ClassVar[str] = "Disk {target} could not be copied to {place}: {reason}."
    remedy: ClassVar[str | None] = "Nothing was kept of this attempt, and no checkpoint was lost. Run it again."
    target: str
    place: str
    reason: str


@dataclass(kw_only=True, eq=False)
class MachineGone(PullbackError):
    """QEMU ended, or its monitor was lost, in the middle of a job."""

    code: ClassVar[str] = "machine-gone"
    sentence: ClassVar[str] = "The machine {machine} went away: {reason}."
    remedy: ClassVar[str | None] = "Start it and run the command again."
    machine: str
    reason: str


@dataclass(kw_only=True, eq=False)
class CheckpointsNotStored(PullbackError):
    """Changed checkpoints could not be written into their image."""

    code: ClassVar[str] = "checkpoints-not-stored"
    sentence: ClassVar[str] = "The checkpoints of {path} could not be stored in it: {reason}."
    remedy: ClassVar[str | None] = (
        "No restore point is hurt. If they are lost, the next backup says so, and reads the disk whole."
    )
    path: str
    reason: str


@dataclass(kw_only=True, eq=False)
class OverlayNotCommitted(PullbackError):
    """An overlay is still on top of its disk; of what was copied into the image below, nothing is seen."""

    code: ClassVar[str] = "overlay-not-committed"
    sentence: ClassVar[str] = "The overlay {overlay} was not committed into {base}: {reason}."
    remedy: ClassVar[str | None] = "The machine runs on it as before. Try again when that is mended."
    overlay: str
    base: str
    reason: str


@dataclass(kw_only=True, eq=False)
class CleanupIncomplete(PullbackError):
    """Something of ours is still in QEMU, because removing it now would be dangerous or is refused."""

    code: ClassVar[str] = "cleanup-incomplete"
    sentence: ClassVar[str] = "Left in QEMU for now: {what}, because {reason}."
    remedy: ClassVar[str | None] = "The next run, or `pullback untrack MACHINE`, tries again."
    what: str
    reason: str


# -- checkpoints -----------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class NoCheckpoint(PullbackError):
    """No checkpoint of the machine has that name."""

    code: ClassVar[str] = "no-checkpoint"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "There is no checkpoint {checkpoint!r} of {machine}."
    remedy: ClassVar[str | None] = "`pullback checkpoint list` shows what is there."
    checkpoint: str
    machine: str


@dataclass(kw_only=True, eq=False)
class CheckpointExists(PullbackError):
    """A checkpoint of that name is there already."""

    code: ClassVar[str] = "checkpoint-exists"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "There is a checkpoint {checkpoint!r} of {machine} already."
    remedy: ClassVar[str | None] = "Choose another name, or delete that one first."
    checkpoint: str
    machine: str


@dataclass(kw_only=True, eq=False)
class CheckpointInconsistent(PullbackError):
    """A checkpoint is of no use on a disk: its bitmap there is missing, or cannot be trusted."""

    code: ClassVar[str] = "checkpoint-inconsistent"
    sentence: ClassVar[str] = "Checkpoint {checkpoint} cannot be used on disk {target}: {problem}."
    remedy: ClassVar[str | None] = "Read that disk whole, and delete the checkpoint."
    checkpoint: str
    target: str
    problem: str


# -- verification ----------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class VerificationFailed(PullbackError):
    """What is stored is not what was backed up."""

    code: ClassVar[str] = "verification-failed"
    exit_code: ClassVar[Exit] = Exit.VERIFICATION
    sentence: ClassVar[str] = "Restore point {point} is damaged: {problem}."
    remedy: ClassVar[str | None] = (
        "Do not use it. Which points are sound: `pullback verify --all`. Start afresh: `pullback backup --level full`."
    )
    point: str
    problem: str


@dataclass(kw_only=True, eq=False)
class RepositoryChanged(PullbackError):
    """Somebody removed from the repository, under our lock, what a new restore point was to rely on."""

    code: ClassVar[str] = "repository-changed"
    sentence: ClassVar[str] = "Data that this backup relies on was removed from the repository {repository} meanwhile."
    remedy: ClassVar[str | None] = (
        "Nothing was kept of this attempt, and no checkpoint was lost: run it again. "
        "`restic unlock --remove-all` is not for repositories that are in use."
    )
    repository: str


@dataclass(kw_only=True, eq=False)
class ObjectMissing(PullbackError):
    """A file of the repository is not there."""

    code: ClassVar[str] = "object-missing"
    exit_code: ClassVar[Exit] = Exit.VERIFICATION
    sentence: ClassVar[str] = "The repository {store} has no {name}."
    remedy: ClassVar[str | None] = "Which restore points are sound: `pullback verify --all`."
    store: str
    name: str


@dataclass(kw_only=True, eq=False)
class ObjectDamaged(PullbackError):
    """A file of the repository has not the size that it must have."""

    code: ClassVar[str] = "object-damaged"
    exit_code: ClassVar[Exit] = Exit.VERIFICATION
    sentence: ClassVar[str] = "{name} in the repository {store} is damaged: {problem}."
    remedy: ClassVar[str | None] = "Which restore points are sound: `pullback verify --all`."
    store: str
    name: str
    problem: str


@dataclass(kw_only=True, eq=False)
class RepositoryDamaged(PullbackError):
    """What a repository's file holds is not what was written; `file` is its place, such as "index/1f2e3d4c…"."""

    code: ClassVar[str] = "repository-damaged"
    exit_code: ClassVar[Exit] = Exit.VERIFICATION
    sentence: ClassVar[str] = "The repository's file {file} is damaged: {problem}."
    remedy: ClassVar[str | None] = "`pullback verify --read-data` tells which restore points it touches."
    file: str
    problem: str


@dataclass(kw_only=True, eq=False)
class DestinationDiffers(PullbackError):
    """What was restored does not read back as it was written."""

    code: ClassVar[str] = "destination-differs"
    exit_code: ClassVar[Exit] = Exit.VERIFICATION
    sentence: ClassVar[str] = "{place} does not give back what was written to it: {problem}."
    remedy: ClassVar[str | None] = "The restore point is sound: restore it to another place, and look after that one."
    place: str
    problem: str
