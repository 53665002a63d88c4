"""What checkpoints alone ask of a machine, and what it gives: values between the rooms."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pullback.model.backups import Window
from pullback.model.checkpoints import Mark
from pullback.model.disks import Disk
from pullback.model.exports import NbdAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBitmap:
    """One disk's part of a new checkpoint."""

    disk: Disk
    mark: Mark
    #: The bitmap that records until then, to be frozen.
    freeze: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Doomed:
    """One disk's part of the deletion of a checkpoint."""

    disk: Disk
    #: The checkpoint's nonce on that disk.
    nonce: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Union:
    """Bitmaps of one disk that are to be looked at as one."""

    disk: Disk
    bitmaps: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A checkpoint that was made."""

    #: The instant, UTC.
    moment: datetime
    #: How the guest's file systems were frozen for it; nothing had to stand still.
    window: Window


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeMap:
    """Where the ranges of a union are told, over NBD: an export without data."""

    address: NbdAddress
    #: The metadata context there: `qemu:dirty-bitmap:NAME`.
    context: str
    #: Bytes of the disk.
    size: int
