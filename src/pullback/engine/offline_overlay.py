"""Overlays put on the images of a machine that is off, with their checkpoints stored in them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path

from pullback import errors
from pullback.engine import overlay, transaction
from pullback.engine.storage import Storage
from pullback.engine.undoing import despite
from pullback.model.overlays import NewOverlay, Overlay


async def create(storage: Storage, parts: Sequence[NewOverlay]) -> tuple[Overlay, ...]:
    """New overlays, with copies of the images' checkpoints; all of them, or none.

    To be used inside `pause.uninterrupted`. Raises `DestinationExists`, `CannotWrite`, `CheckpointsNotStored`.
    """
    files: list[Path] = []
    try:
        for part in parts:
            overlay.require_stackable(part.disk)
            await asyncio.to_thread(overlay.make_file, part.path, part.disk, None)
            files.append(part.path)
            await _carry(storage, part)
    except BaseException as error:
        await despite(error, _remove(files))
        raise
    return tuple(overlay.told(part.disk, part.path) for part in parts)


async def _remove(files: Sequence[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)


async def _carry(storage: Storage, part: NewOverlay) -> None:
    """Open the overlay for as long as it takes to store the checkpoints."""
    node = f"overlay-{secrets.token_hex(6)}"
    actions = overlay.carry(part.disk, node)
    if not actions:
        return
    for options in _nodes(part, node, read_only=False):
        await storage.qmp.execute("blockdev-add", options)
    await transaction.run(storage.qmp, actions)
    try:
        # Unlike closing it, this answers with an error if the bitmaps could not be stored.
        await storage.qmp.execute("blockdev-reopen", {"options": _nodes(part, node, read_only=True)})
        await storage.prove(node, part.path)
    except errors.RefusedError as error:
        raise errors.CheckpointsNotStored(path=str(part.path), reason=error.reason) from error
    finally:
        for options in reversed(_nodes(part, node, read_only=True)):
            await storage.qmp.execute("blockdev-del", {"node-name": options["node-name"]})


def _nodes(part: NewOverlay, node: str, *, read_only: bool) -> list[dict[str, object]]:
    file = {"driver": "file", "node-name": f"{node}-file", "filename": str(part.path), "read-only": read_only}
    top = {"driver": "qcow2", "node-name": node, "file": f"{node}-file", "backing": part.disk.node}
    return [file, {**top, "read-only": read_only}]


def refuse_commit(target: str) -> errors.Unsupported:
    """Why an overlay of a machine that is off is not committed.

    QEMU joins data and bitmaps at one instant only in a job of a running disk. `qemu-img commit` is
    no risk: the image's own newest bitmap records what it writes.
    """
    return errors.Unsupported(
        what=f"committing the overlay of disk {target}",
        reason="the machine is off, and data and checkpoints go down together only while it runs",
        way_out="Start the machine, or use `qemu-img commit`: the next backup finds what it changed.",
    )
