"""Snapshots that last: frozen views of disks that stay when the command, or program, that made them ends.

A pull job is such a snapshot with its exports and its document; a push job is one that QEMU itself
copies to destinations. So all three are one value, which a job record keeps as JSON.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pullback import errors
from pullback.model import checkpoints
from pullback.model.backups import Fleecing, SnapshotRequest, Window
from pullback.model.checkpoints import Mark


class Kind(enum.StrEnum):
    """Why it was made."""

    #: By itself, to be exported later.
    SNAPSHOT = "snapshot"
    #: For a backup job in pull mode.
    PULL = "pull"
    #: For a backup job in push mode.
    PUSH = "push"
    #: No snapshot at all: disks themselves are exported.
    EXPORT = "export"


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotDisk:
    """A disk in a snapshot."""

    target: str
    #: Bytes.
    size: int
    #: The disk's format node: who holds it holds the disk.
    node: str
    #: The node with the frozen view.
    view: str
    #: None: nobody writes to the disk, so it is read as it is.
    fleecing: Fleecing | None
    #: Why this engine, in words.
    reason: str
    #: It lives in an iothread.
    iothread: bool = False
    #: The image that takes old blocks; None if none does.
    scratch: str | None = None
    #: The checkpoint made in the same instant, and the bitmap that recorded before it.
    checkpoint: Mark | None = None
    frozen: str | None = None
    #: The bitmap that recorded up to the instant: the last of those that tell changes in this snapshot.
    newest: Mark | None = None
    #: A frozen copy of it as it was at the instant.
    copy: str | None = None
    #: Nonces of the checkpoints that were there before the instant. Steps and names are used again, these are not.
    older: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSnapshot:
    """A snapshot that lasts."""

    name: str
    #: Eight hex digits.
    job: str
    kind: Kind
    machine: str
    #: UTC.
    moment: datetime
    window: Window
    disks: tuple[SnapshotDisk, ...]
    #: It is deleted when this process ends (`<pid>:<start time>`); None: it lasts until it is deleted, or QEMU ends.
    owner: str | None = None
    #: Of a job: the effective `domainbackup` document as JSON.
    document: Mapping[str, object] | None = None
    #: Of a push: what `engine.push` needs to go on with it.
    push: Mapping[str, object] | None = None

    def disk(self, target: str) -> SnapshotDisk | None:
        """The disk of that target."""
        return next((disk for disk in self.disks if disk.target == target), None)

    @property
    def checkpoint(self) -> str | None:
        """Name of the checkpoint that was made with it."""
        return next((disk.checkpoint.name for disk in self.disks if disk.checkpoint), None)

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return {
            **asdict(self),
            "moment": self.moment.isoformat(),
            "disks": [_disk_dict(disk) for disk in self.disks],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A lasting snapshot to be made."""

    name: str
    kind: Kind
    request: SnapshotRequest
    #: See `OpenSnapshot`.
    owner: str | None = None
    document: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportWish:
    """An export to be made."""

    #: The NBD name.
    name: str
    target: str
    #: None: the disk itself.
    snapshot: OpenSnapshot | None = None
    writable: bool = False
    #: Name of an exported bitmap -> the checkpoint since which it tells the changes.
    bitmaps: Mapping[str, str] = field(default_factory=dict)


def _disk_dict(disk: SnapshotDisk) -> dict[str, object]:
    return {
        **asdict(disk),
        "checkpoint": disk.checkpoint and disk.checkpoint.bitmap,
        "newest": disk.newest and disk.newest.bitmap,
    }


def from_dict(values: object) -> OpenSnapshot:
    """The value that `to_dict` gave. Raises `ValueError` for anything else."""
    try:
        return _parsed(values)
    except (KeyError, TypeError, AttributeError, OverflowError, errors.UsageError) as error:
        raise ValueError(f"no snapshot's record: {error}") from error


def _parsed(values: object) -> OpenSnapshot:
    record = _mapping(values)
    return OpenSnapshot(
        name=checkpoints.check_name(_text(record["name"])),
        job=_text(record["job"]),
        kind=Kind(_text(record["kind"])),
        machine=_text(record["machine"]),
        moment=datetime.fromisoformat(_text(record["moment"])).astimezone(UTC),
        window=_window(_mapping(record["window"])),
        disks=tuple(_disk(_mapping(item)) for item in _list(record["disks"])),
        owner=_optional(record["owner"]),
        document=None if record["document"] is None else _mapping(record["document"]),
        push=None if record["push"] is None else _mapping(record["push"]),
    )


def _disk(record: Mapping[str, object]) -> SnapshotDisk:
    fleecing, size = _optional(record["fleecing"]), record["size"]
    if not isinstance(size, int) or size < 0:
        raise ValueError("a size is none")
    scratch = _optional(record["scratch"])
    if scratch is not None and not Path(scratch).is_absolute():
        raise ValueError("scratch is no absolute path")
    return SnapshotDisk(
        target=_text(record["target"]),
        size=size,
        node=_text(record["node"]),
        view=_text(record["view"]),
        fleecing=Fleecing(fleecing) if fleecing else None,
        reason=_text(record["reason"]),
        iothread=record["iothread"] is True,
        scratch=scratch,
        checkpoint=_mark(record["checkpoint"]),
        frozen=_optional(record["frozen"]),
        newest=_mark(record["newest"]),
        copy=_optional(record["copy"]),
        older=tuple(_text(nonce) for nonce in _list(record["older"])),
    )


def _mark(value: object) -> Mark | None:
    if value is None:
        return None
    mark = checkpoints.parse(_text(value))
    if mark is None:
        raise ValueError(f"{value!r} is no bitmap of ours")
    return mark


def _window(record: Mapping[str, object]) -> Window:
    seconds, frozen_seconds, frozen = record["seconds"], record["frozen_seconds"], record["frozen"]
    if not (isinstance(seconds, int | float) and isinstance(frozen_seconds, int | float) and isinstance(frozen, int)):
        raise ValueError("the window's times are none")
    return Window(
        seconds=float(seconds),
        was_paused=record["was_paused"] is True,
        frozen=frozen,
        frozen_seconds=float(frozen_seconds),
        frozen_note=_optional(record["frozen_note"]),
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{value!r} is no text")
    value.encode()  # raises a ValueError for half a character
    return value


def _optional(value: object) -> str | None:
    return None if value is None else _text(value)


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError("no list")
    return value
