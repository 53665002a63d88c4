"""External snapshots: overlays put on disks, with their checkpoints, and committed again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pullback import errors, state
from pullback.engine.pause import uninterrupted
from pullback.machine import Machine
from pullback.model import checkpoints, overlays
from pullback.model.disks import Disk
from pullback.model.overlays import Committed, NewOverlay, Overlay
from pullback.progress import Progress, Silent
from pullback.state import overlays as made_by_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """An overlay that a user asks for."""

    #: The disk's target.
    target: str
    #: None: a name of the image's, beside it.
    path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """Overlays that were put on a machine's disks at one instant."""

    machine: str
    overlays: tuple[Overlay, ...]
    notes: tuple[str, ...]


async def create(machine: Machine, directories: state.Directories, wishes: Sequence[Wish] = ()) -> Created:
    """Put overlays on these disks (none named: on all that take part in backups) at one instant.

    Raises `UnknownDisk`, `UsageError`, `DestinationExists`, `DiskBusy`, `BusyError`, `Unsupported`.
    """
    disks = await machine.disks()
    chosen = _chosen(disks, wishes, machine.name)
    moment = datetime.now(UTC)
    parts = [NewOverlay(disk=disk, path=_path(disk, path, moment)) for disk, path in chosen]
    _refuse_twice(parts)
    made = await uninterrupted(_create(machine, directories, parts))
    notes = [
        f"{disk.target}: its checkpoints do not go on, because {chain.problem}"
        for disk, chain in ((part.disk, checkpoints.chain(part.disk.bitmaps)) for part in parts)
        if chain.problem
    ]
    return Created(machine=machine.name, overlays=made, notes=tuple(notes))


async def _create(machine: Machine, directories: state.Directories, parts: Sequence[NewOverlay]) -> tuple[Overlay, ...]:
    made = await machine.create_overlays(parts)
    for part in parts:
        await asyncio.to_thread(made_by_us.remember, directories.state, part.path)
    return made


def _chosen(disks: Sequence[Disk], wishes: Sequence[Wish], machine: str) -> list[tuple[Disk, Path | None]]:
    known = {disk.target: disk for disk in disks}
    if not wishes:
        found: list[tuple[Disk, Path | None]] = [(disk, None) for disk in disks if disk.left_out is None]
        if not found:
            raise errors.NoDisks(machine=machine)
        return found
    if len({wish.target for wish in wishes}) < len(wishes):
        raise errors.UsageError(problem="A disk is named twice")
    for wish in wishes:
        if wish.target not in known or known[wish.target].node is None:
            listed = ", ".join(disk.target for disk in disks if disk.node is not None)
            raise errors.UnknownDisk(target=wish.target, where=machine, known=listed or "none")
    return [(known[wish.target], wish.path) for wish in wishes]


def _path(disk: Disk, path: Path | None, moment: datetime) -> Path:
    if path is not None:
        return path.absolute()
    if not disk.image.startswith("/"):
        raise errors.UsageError(problem=f"The image of {disk.target} is no file ({disk.image}): name the overlay's")
    return overlays.default_path(Path(disk.image), moment)


def _refuse_twice(parts: Sequence[NewOverlay]) -> None:
    paths = [part.path for part in parts]
    for path in paths:
        if paths.count(path) > 1:
            raise errors.UsageError(problem=f"{path} is named for two disks")


async def commit(
    machine: Machine,
    directories: state.Directories,
    target: str,
    *,
    keep: bool = False,
    progress: Progress | None = None,
) -> Committed:
    """Commit a disk's top image into the one below; the file is removed if we made it, unless `keep`.

    Raises `UnknownDisk`, `UsageError` (it is no overlay), `DiskBusy`, `BusyError`, `OverlayNotCommitted`.
    """
    [(disk, _)] = _chosen(await machine.disks(), [Wish(target=target)], machine.name)
    path = Path(disk.image)
    ours = disk.image.startswith("/") and made_by_us.ours(directories.state, path)
    meter = _Meter(progress or Silent(), target)
    done = await machine.commit_overlay(disk, meter.advance)
    meter.finish()
    if not ours:
        note = f"{done.overlay} is no longer used, and stays because it was not made by `pullback overlay create`"
        return replace(done, notes=(*done.notes, note))
    if keep or done.notes:
        return done
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return replace(done, notes=(*done.notes, f"{path} could not be removed: {error.strerror}"))
    made_by_us.forget(directories.state, path)
    return replace(done, removed=True)


class _Meter:
    """Absolute progress, of which the total may grow, told as steps."""

    def __init__(self, progress: Progress, subject: str) -> None:
        self._progress = progress
        self._subject = subject
        self._done: int | None = None

    def advance(self, done: int, total: int) -> None:
        """So far."""
        if self._done is None:
            self._progress.start(self._subject, total)
            self._done = 0
        if done > self._done:
            self._progress.advance(self._subject, done - self._done)
            self._done = done

    def finish(self) -> None:
        """All of it."""
        if self._done is not None:
            self._progress.finish(self._subject)
