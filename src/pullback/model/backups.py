"""What a backup asks of a machine, and what the machine gives: values between the rooms."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

from pullback.model.checkpoints import Mark
from pullback.model.disks import Disk
from pullback.model.exports import Export


class Fleecing(enum.StrEnum):
    """How a disk is frozen."""

    #: copy-before-write above the disk, inserted in a short pause; a failing copy breaks the snapshot.
    FILTER = "filter"
    #: blockdev-backup sync=none inside the transaction; a failing copy can hurt the guest before QEMU 10.1.
    CLASSIC = "classic"


class Level(enum.StrEnum):
    """What a user asks for."""

    #: Changes only, where the chain allows it.
    AUTO = "auto"
    #: Everything.
    FULL = "full"


class Quiesce(enum.StrEnum):
    """Whether the guest's file systems are frozen for the instant of the snapshot."""

    #: They are not.
    NO = "no"
    #: If there is an agent and it does; that it did not is a note.
    TRY = "try"
    #: Or there is no backup.
    REQUIRE = "require"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiescing:
    """How to freeze the guest's file systems."""

    #: None: try where QEMU shows an agent that runs, and say nothing where it does not.
    wish: Quiesce | None = None
    #: The agent's unix socket; None: as QEMU tells.
    agent: Path | None = None
    #: Mount points in the guest; none: all file systems.
    mount_points: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """A place for a disk's old blocks that the user chose."""

    #: A file that is made and removed again, or a block device.
    path: Path
    #: A block device: it is formatted.
    block: bool = False
    #: The qcow2 image is there already, empty and of the right size, and is left there.
    reuse: bool = False

    @property
    def ours(self) -> bool:
        """Is it a file that we make and remove?"""
        return not (self.block or self.reuse)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRequest:
    """One disk's part of a snapshot."""

    disk: Disk
    #: Bitmaps whose union is to be exported as what changed; empty for a whole read.
    since: tuple[str, ...] = ()
    #: The checkpoint to be made in the same instant; None if the disk cannot be tracked.
    checkpoint: Mark | None = None
    #: The bitmap that records until then, to be frozen.
    freeze: str | None = None
    #: None: a file in the snapshot's directory.
    scratch: Scratch | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRequest:
    """Freeze these disks at one instant."""

    #: Eight hex digits; every name that we make in QEMU carries it.
    job: str
    disks: tuple[DiskRequest, ...]
    #: Directory for scratch images.
    scratch: Path
    #: The engine the user wants, or None for the better one that works.
    fleecing: Fleecing | None = None
    #: A running NBD server of the user's that we may share, by its unix socket.
    nbd_server: Path | None = None
    quiescing: Quiescing = field(default_factory=Quiescing)
    #: It stays when we are gone, and other programs read it.
    lasting: bool = False
    #: Nobody reads it from outside: a job in the hypervisor copies it (`model.pushing`).
    pushed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """A disk in a snapshot: where its frozen content can be read."""

    disk: Disk
    export: Export
    #: None: nobody writes to the disk, so it is read as it is.
    fleecing: Fleecing | None
    #: Why this engine, in words.
    reason: str
    checkpoint: Mark | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How long the machine stood still for the snapshot."""

    #: Seconds from `stop` to `cont` as we saw them; 0 without a pause.
    seconds: float = 0.0
    #: The machine was paused already, and was left so.
    was_paused: bool = False
    #: Seconds that the flush right before took (a forecast of the pause).
    flush_seconds: float = 0.0
    #: File systems of the guest that were frozen for it.
    frozen: int = 0
    #: Seconds for which they were.
    frozen_seconds: float = 0.0
    #: What went otherwise than wished in freezing them, or None.
    frozen_note: str | None = None
