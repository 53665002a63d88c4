"""Overlays as values: images put on top of a disk's image, with its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pullback.model.disks import Disk

#: Told how far a commit is: bytes done, bytes in all.
Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewOverlay:
    """One disk's part of an external snapshot."""

    disk: Disk
    #: The overlay's file, which is made.
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """An overlay that was made."""

    target: str
    path: str
    #: The image below, which is only read from now on.
    backing: str
    #: Checkpoints that go on in the overlay, oldest first.
    checkpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """An overlay whose data went into the image below, which is the disk's image again."""

    target: str
    overlay: str
    image: str
    #: Checkpoints that go on in the image, oldest first.
    checkpoints: tuple[str, ...]
    #: The overlay's file was removed.
    removed: bool
    #: Sentences that the user should read.
    notes: tuple[str, ...] = ()


def default_path(image: Path, moment: datetime) -> Path:
    """Beside the image: `vda.qcow2` has `vda.overlay-20261124T070250Z.qcow2`, and so has an overlay of it."""
    stem = image.name.removesuffix(image.suffix) if image.suffix in (".qcow2", ".raw", ".img") else image.name
    stem = stem.partition(".overlay-")[0]
    return image.with_name(f"{stem}.overlay-{moment.astimezone(UTC):%Y%m%dT%H%M%SZ}.qcow2")
