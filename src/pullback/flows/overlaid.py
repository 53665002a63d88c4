"""Writable copies of a restore point: what clients write lies in images of ours, the point itself never changes.

    DIR/overlay.json       which restore point the images are of; written and synced before the first image
    DIR/<target>.qcow2     what was written

The images are temporary, or in a directory that the user names: then the next `serve` with the same point goes
on with them. Temporary ones have no name any more as soon as they are open, so nothing is left whatever happens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from pullback import errors, state
from pullback.flows.listening import fresh_directory, locked
from pullback.flows.threads import entered
from pullback.model.exports import NbdAddress
from pullback.model.points import Point, PointDisk
from pullback.programs import overlay_server, process, qemu_img

_RECORD = "overlay.json"
_FORMAT = 1
_MOST = 1 << 20


@contextmanager
def images(
    point: Point,
    disks: Sequence[PointDisk],
    below: Path,
    *,
    chosen: Path | None,
    directories: state.Directories,
) -> Iterator[dict[str, Path]]:
    """Images of these disks by target, in the chosen directory or in one that goes with the block.

    `below`: the socket of the server of the restore point, which their headers name.
    Raises `DestinationUnusable` if the chosen one has those of another point, `BusyError`.
    """
    with ExitStack() as stack:
        if chosen is None:
            directory = stack.enter_context(fresh_directory(directories, directories.scratch))
        else:
            directory = state.private(chosen)
            stack.enter_context(locked(directory))
            _claim(directory, point, disks)
        found = {disk.target: directory / f"{disk.target}.qcow2" for disk in disks}
        for disk in disks:
            if not found[disk.target].exists():
                backing = NbdAddress(socket=below, export=disk.target).uri
                _create(found[disk.target], disk.size, backing)
        yield found


def _create(path: Path, size: int, backing: str) -> None:
    """Beside first: an image that is there is whole."""
    beside = path.with_suffix(".new")
    qemu_img.create_overlay(beside, size, backing=backing, format="raw")
    state.sync_file(beside)
    beside.rename(path)
    state.sync_directory(path.parent)


def _claim(directory: Path, point: Point, disks: Sequence[PointDisk]) -> None:
    """The directory is of this point: it is written down, or it was."""
    path = directory / _RECORD
    ours = {disk.target: disk.digest for disk in disks}
    try:
        known = _load(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unusable(directory, disks, f"its {_RECORD} cannot be used") from error
    if known is None and any(directory.glob("*.qcow2")):
        raise _unusable(directory, disks, "it has images, but no record of which restore point they are of")
    for disk in disks:
        if known is not None and known.get(disk.target, disk.digest) != disk.digest:
            raise _unusable(directory, [disk], "its overlay is of another restore point")
    state.write_durably(path, {"format": _FORMAT, "point": point.id, "disks": (known or {}) | ours})


def _load(path: Path) -> dict[str, str] | None:
    """The digests of the disks that the images are of, by target; None if there is no record."""
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MOST))
    except FileNotFoundError:
        return None
    disks = values["disks"]
    if values["format"] != _FORMAT or not all(isinstance(text, str) for text in disks.values()):
        raise ValueError("of another version")
    return dict(disks)


def _unusable(directory: Path, disks: Sequence[PointDisk], reason: str) -> errors.DestinationUnusable:
    return errors.DestinationUnusable(
        place=str(directory), target=disks[0].target, reason=reason, way_out="Name another directory with --overlay."
    )


@asynccontextmanager
async def served(
    point: Point,
    disks: Sequence[PointDisk],
    below: Path,
    above: Path,
    *,
    chosen: Path | None,
    directories: state.Directories,
) -> AsyncIterator[process.Child]:
    """QEMU's server of the overlays at the socket `above`, over that of the restore point at `below`."""
    async with AsyncExitStack() as stack:
        making = images(point, disks, below, chosen=chosen, directories=directories)
        found = await stack.enter_async_context(entered(making))
        overlays = [
            overlay_server.Overlay(export=target, below=NbdAddress(socket=below, export=target), image=image)
            for target, image in found.items()
        ]
        child = await stack.enter_async_context(entered(overlay_server.serve(overlays, above)))
        if chosen is None:
            for image in found.values():
                await asyncio.to_thread(image.unlink)
        yield child
