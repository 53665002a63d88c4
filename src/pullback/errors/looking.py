"""Looking into restore points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pullback.errors.root import Exit, PullbackError


@dataclass(kw_only=True, eq=False)
class UnknownVolume(PullbackError):
    """A partition or logical volume was asked for that the restore point does not have."""

    code: ClassVar[str] = "unknown-volume"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "There is no {volume!r} in restore point {point}."
    remedy: ClassVar[str | None] = "What there is: {known}."
    volume: str
    point: str
    known: str


@dataclass(kw_only=True, eq=False)
class NoRoot(PullbackError):
    """A path without a volume was given, and no file system tells where it would be."""

    code: ClassVar[str] = "no-root"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "Where {path!r} would be is not known: {reason}."
    remedy: ClassVar[str | None] = "Say the volume too, as `pullback files {point} ls` shows it: vda1:{path}"
    path: str
    point: str
    reason: str


@dataclass(kw_only=True, eq=False)
class NoSuchFile(PullbackError):
    """A path that does not lead anywhere in that file system."""

    code: ClassVar[str] = "no-such-file"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "There is no {path!r} in {volume}."
    path: str
    volume: str = "that file system"


@dataclass(kw_only=True, eq=False)
class VolumeUnreadable(PullbackError):
    """A volume holds no file system that can be read here, or a damaged one."""

    code: ClassVar[str] = "volume-unreadable"
    sentence: ClassVar[str] = "{volume} cannot be read: {reason}."
    volume: str
    reason: str


@dataclass(kw_only=True, eq=False)
class FileUnreadable(PullbackError):
    """A file or directory of a restore point cannot be read: its file system, or the point, is damaged."""

    code: ClassVar[str] = "file-unreadable"
    sentence: ClassVar[str] = "{path!r} cannot be read: {reason}."
    remedy: ClassVar[str | None] = "Is the restore point sound? `pullback verify` tells."
    path: str
    reason: str


@dataclass(kw_only=True, eq=False)
class FilesUnreadable(PullbackError):
    """Some of the files that were fetched cannot be read; all others are there."""

    code: ClassVar[str] = "files-unreadable"
    sentence: ClassVar[str] = (
        "{count} of the files cannot be read, the first is {path!r}: {reason}. All others are there."
    )
    remedy: ClassVar[str | None] = "Is the restore point sound? `pullback verify` tells."
    count: int
    path: str
    reason: str
