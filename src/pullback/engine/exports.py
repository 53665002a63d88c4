"""QEMU's exports: over NBD, and FUSE. Sources: QAPI block-export.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pullback import errors
from pullback.engine import replies
from pullback.engine.monitor import Monitor

_GONE_SECONDS = 10.0


async def add_nbd(
    monitor: Monitor, *, id: str, node: str, name: str, bitmaps: Sequence[object] = (), writable: bool = False
) -> None:
    """Export a node over NBD. `bitmaps`: names, or {node, name} pairs (QEMU ≥ 7.1)."""
    arguments: dict[str, object] = {"type": "nbd", "id": id, "node-name": node, "name": name, "writable": writable}
    if bitmaps:
        arguments["bitmaps"] = list(bitmaps)
    await monitor.execute("block-export-add", arguments)


async def add_fuse(monitor: Monitor, *, id: str, node: str, mountpoint: Path) -> None:
    """Export a node as a file, mounted over the (existing, regular) file `mountpoint`; read-only."""
    mountpoint.touch(mode=0o600)
    arguments = {"type": "fuse", "id": id, "node-name": node, "mountpoint": str(mountpoint), "writable": False}
    await monitor.execute("block-export-add", arguments)


async def listed(monitor: Monitor) -> list[dict[str, str]]:
    """All exports: id, type, node-name."""
    return [
        {
            "id": replies.text(record, "id", "export"),
            "type": replies.text(record, "type", "export"),
            "node-name": replies.optional_text(record, "node-name"),
        }
        for record in replies.objects(await monitor.execute("query-block-exports"), "query-block-exports")
    ]


async def remove(monitor: Monitor, prefix: str) -> None:
    """Remove all exports whose id begins with `prefix`, also under clients, and wait until they are gone."""
    await _remove(monitor, lambda id: id.startswith(prefix))


async def remove_one(monitor: Monitor, id: str) -> None:
    """The same of the one with that id, if it is there."""
    await _remove(monitor, lambda other: other == id)


async def _remove(monitor: Monitor, meant: Callable[[str], bool]) -> None:
    for export in await listed(monitor):
        if meant(export["id"]):
            await _delete(monitor, export["id"])

    async def gone() -> bool:
        return not any(meant(export["id"]) for export in await listed(monitor))

    await monitor.poll(gone, what="block-export-del", timeout=_GONE_SECONDS)


async def _delete(monitor: Monitor, id: str) -> None:
    try:
        await monitor.execute("block-export-del", {"id": id, "mode": "hard"})
    except errors.RefusedError as error:
        if error.error_class != "GenericError" or "shut" not in error.reason:  # shutting down already
            raise
