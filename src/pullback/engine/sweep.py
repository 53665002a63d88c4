"""Removing what a job made in QEMU, by its names, in the one order that works.

The same code ends a good job, undoes half a failed one, and clears up after a death: it asks QEMU
what is there instead of remembering it.

    (scratch answers?) → exports → NBD server (ours, unused) → copying jobs → backup jobs → destinations,
    snapshot nodes → filters out of the devices' way → filter nodes, scratch nodes, map nodes → temporary bitmaps
    → files
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

from pullback import errors, state
from pullback.engine import destinations, disks, exports, graph, jobs, names, scratch, serving
from pullback.engine.monitor import Monitor
from pullback.programs import process

#: Given to `sweep`: a block in which the machine stands still.
Stillness = Callable[[], AbstractAsyncContextManager[object]]


@asynccontextmanager
async def as_it_is() -> AsyncIterator[None]:
    """A `Stillness` for a machine that stands still already."""
    yield


async def sweep(monitor: Monitor, job: state.Job, *, still: Stillness) -> None:
    """Remove everything of the job from QEMU, then its files. Twice is fine.

    Raises `CleanupIncomplete` if something foreign holds it, or if scratch does not answer: the
    filter stays then (the guest lives on with it), and a later run tries again.
    """
    ours = names.prefix(job.record.job)
    await _prove_scratch(job)
    await exports.remove(monitor, ours)
    await serving.stop_unused(monitor, serving.register_of(job))
    await destinations.release(monitor, job)
    await jobs.end(monitor, ours)
    for role in ("dst", "snap"):
        await _remove_nodes(monitor, job, role)
    await _take_out_filters(monitor, job, still)
    for role in names.REMOVAL:
        await _remove_nodes(monitor, job, role)
    await _remove_bitmaps(monitor, ours)
    remove_files(job)


async def require_removable(monitor: Monitor, job: state.Job) -> None:
    """Raise `CleanupIncomplete` for what hinders `sweep`, as far as that is known before anything is done."""
    await _prove_scratch(job)
    found, whole = await disks.find(monitor, has_graph=True)
    ours = names.prefix(job.record.job)
    _refuse_foreign(whole, ours, {disk.root for disk in found if disk.root})


async def _prove_scratch(job: state.Job) -> None:
    """No draining command before scratch has proved that it answers (qom-set would hang QEMU).

    Not even the end of an export: QEMU drains what was exported once its last client has left.
    """
    mine = [path for path in job.record.scratch if not path.endswith(destinations.PART)]  # `release` proves those
    for directory in {str(Path(path).parent) for path in mine}:
        if not await scratch.answers(Path(directory)):
            raise errors.CleanupIncomplete(what="the snapshot", reason=f"scratch in {directory} does not answer")


async def _remove_nodes(monitor: Monitor, job: state.Job, role: str) -> None:
    nodes = graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True}))
    ours = names.prefix(job.record.job)
    for name in sorted(nodes):
        if name.startswith(ours) and names.role(name, job.record.job) == role:
            await _remove_node(monitor, name)


async def _remove_node(monitor: Monitor, name: str) -> None:
    try:
        await monitor.execute("blockdev-del", {"node-name": name})
    except errors.RefusedError as error:
        if "Failed to find" in error.reason or "annot find" in error.reason:
            return
        raise errors.CleanupIncomplete(what=f"node {name}", reason=error.reason) from error


async def _take_out_filters(monitor: Monitor, job: state.Job, still: Stillness) -> None:
    """Give each device its own root back; a device whose root is not our filter is left alone."""
    found, whole = await disks.find(monitor, has_graph=True)
    ours = names.prefix(job.record.job)
    filtered = [disk for disk in found if disk.root is not None and disk.root.startswith(ours + "cbw")]
    _refuse_foreign(whole, ours, {disk.root for disk in filtered if disk.root})
    if not filtered:
        return
    # For a disk in an iothread the swap is only safe while the machine stands still.
    async with still() if any(disk.iothread for disk in filtered) else as_it_is():
        for disk in filtered:
            assert disk.root is not None
            below = whole.child(disk.root, "file")
            assert below is not None, "a copy-before-write node always has a file child"
            await take_out(monitor, disk.qdev, below)


def _refuse_foreign(whole: graph.Graph, ours: str, roots: set[str]) -> None:
    """Something foreign on top of our filter (an external snapshot's overlay) must go first."""
    for name in whole.nodes:
        if name.startswith(ours + "cbw") and name not in roots:
            above = [parent for parent in whole.parents(name) if not parent.startswith(ours)]
            if above:
                raise errors.CleanupIncomplete(what=f"filter {name}", reason=f"{above[0]} was put on top of it")


async def take_out(monitor: Monitor, qdev: str, below: str) -> None:
    """Put the node below our filter directly under the device again.

    Never asked for when it is there already: QEMU aborts when `drive` is set to the node that is
    the root (`bdrv_replace_child_noperm: Assertion old_bs != new_bs`, 7.2).
    """
    if (await disks.roots(monitor)).get(qdev) == below:
        return
    arguments = {"path": disks.device_path(qdev), "property": "drive", "value": below}
    try:
        await monitor.execute("qom-set", arguments)
    except errors.RefusedError as error:
        raise errors.CleanupIncomplete(what=f"the filter above {below}", reason=error.reason) from error


async def _remove_bitmaps(monitor: Monitor, ours: str) -> None:
    nodes = graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True}))
    for node in nodes.values():
        for bitmap in node.bitmaps:
            if bitmap.name.startswith(ours):
                await monitor.execute("block-dirty-bitmap-remove", {"node": node.name, "name": bitmap.name})


def remove_files(job: state.Job) -> None:
    """Remove scratch images, sockets and mount points of a job that has nothing left in QEMU."""
    for path in job.record.scratch:
        Path(path).unlink(missing_ok=True)
    for path in job.record.chosen:
        scratch.remove_chosen(Path(path))
    if not job.record.runtime:
        return
    runtime = Path(job.record.runtime)
    for entry in list(runtime.iterdir()) if runtime.is_dir() else []:
        _unmount(entry)
        entry.unlink(missing_ok=True)
    with suppress(OSError):
        runtime.rmdir()


def _unmount(path: Path) -> None:
    """A FUSE mount outlives a QEMU that was killed: every access gives ENOTCONN then."""
    if os.path.ismount(path) or _dead_mount(path):
        process.run(["umount", "-l", path], timeout=10)


def _dead_mount(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == 107  # ENOTCONN
    return False
