"""Rollbacks that were interrupted: found by the files that a machine has open, whatever it is called now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pullback import state
from pullback.engine import images, replies
from pullback.engine.monitor import Monitor
from pullback.model.rollbacks import Journal
from pullback.state import rollbacks


async def of_qemu(monitor: Monitor, directories: state.Directories, machine: str, *, finishing: bool) -> Journal | None:
    """The rollback of the disks of this QEMU that is to be finished. Raises `RollbackPending` unless `finishing`."""
    return _find(directories, await files(monitor), machine, finishing=finishing)


def of_images(
    found: Iterable[images.Image], directories: state.Directories, machine: str, *, finishing: bool
) -> Journal | None:
    """The same of a machine that is off."""
    layers = [layer for image in found for layer in image.layers]
    paths = [path for layer in layers for path in (layer.path, layer.data_file) if path is not None]
    return _find(directories, paths, machine, finishing=finishing)


def _find(directories: state.Directories, paths: Iterable[Path], machine: str, *, finishing: bool) -> Journal | None:
    if finishing:
        return rollbacks.concerning(directories.state, paths, machine)
    rollbacks.require_none(directories.state, paths, machine)
    return None


async def files(monitor: Monitor) -> list[Path]:
    """All files that QEMU has as block nodes, as they are called from here."""
    reply = replies.objects(await monitor.execute("query-named-block-nodes", {"flat": True}), "nodes")
    names = {replies.optional_text(node, "file") for node in reply}
    return sorted(path for name in names for path in of_name(name, monitor.peer))


def of_name(name: str, process: int | None) -> Iterator[Path]:
    """The file that a node of a process has under this name; nothing for what is no file (json:, nbd://)."""
    if not name or ":" in name.split("/")[0]:
        return
    yield Path(name) if name.startswith("/") else Path(f"/proc/{process}/cwd") / name
