"""The images of a machine that is off, opened in a storage daemon of ours.

    read-only ──(some milliseconds)──▶ writable: bitmaps are changed ──▶ read-only: stored, synced, proved

An image stays locked against other writers all the time, and is writable only while its bitmaps are
changed. `blockdev-reopen` to read-only makes QEMU store the bitmaps and answers with an error if that
fails (block/qcow2.c, qcow2_reopen_prepare), so a checkpoint lies safely in its image *before* a
byte is copied, and our death later, even by SIGKILL, costs nothing. Only a death in those
milliseconds leaves bitmaps marked as in use; the next run finds that, as after a crash of a machine.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

from pullback import errors
from pullback.engine import graph, imagelock, images, monitor, pause
from pullback.engine.images import Image
from pullback.engine.undoing import despite
from pullback.model import checkpoints, disks
from pullback.model.disks import Bitmap, Disk
from pullback.programs import qemu_img, storage_daemon
from pullback.units import KiB, MiB

#: Opening, closing and syncing an image wait for the host's disks.
_OPEN_SECONDS = 120.0
_QUIT_SECONDS = 30.0
#: A repair reads all of an image's tables.
_REPAIR_SECONDS = 3600.0
#: Bytes that a bitmap takes in an image besides its bits (its table, and the last cluster), and that are kept free.
_BITMAP_ROOM = 256 * KiB
_SPARE_ROOM = MiB


class Storage:
    """See the module. Made by `opened`."""

    def __init__(self, qmp: monitor.Monitor, found: Sequence[Image]) -> None:
        self.qmp = qmp
        self.images = tuple(found)
        #: Nodes that are open for writing.
        self._writable: set[str] = set()
        #: Numbers of images that were not closed cleanly; looking at them does not change them.
        self._unrepaired = {index for index, image in enumerate(self.images) if image.dirty}

    async def open(self) -> None:
        """Open all images. Raises `BusyError` for one that somebody else has open for writing."""
        for index, image in enumerate(self.images):
            for path, options in images.blockdevs(image, index):
                await self._add(path, options)

    async def _add(self, path: Path, options: dict[str, object], *, timeout: float = _OPEN_SECONDS) -> None:
        try:
            await self.qmp.execute("blockdev-add", options, timeout=timeout)
        except errors.RefusedError as error:
            if _is_locked(error):
                raise imagelock.in_use(path) from error
            raise errors.ImageUnusable(path=str(path), reason=f"QEMU says: {error.reason}") from error

    async def bitmaps(self, node: str) -> tuple[Bitmap, ...]:
        """The bitmaps of a node, as they are now; none if it could not be opened again for a repair."""
        found = (await self._nodes()).get(node)
        return found.bitmaps if found is not None else ()

    async def _nodes(self) -> dict[str, graph.Node]:
        return graph.parse_nodes(await self.qmp.execute("query-named-block-nodes", {"flat": True}))

    async def disks(self) -> tuple[Disk, ...]:
        """The images as disks of a machine."""
        nodes = await self._nodes()
        whole = graph.Graph(nodes=nodes, children=dict(self._children()), jobs={})
        return tuple(_disk(image, nodes[images.node(index)], whole) for index, image in enumerate(self.images))

    def _children(self) -> Iterable[tuple[tuple[str, str], str]]:
        for index, image in enumerate(self.images):
            for depth in range(1, len(image.layers)):
                yield (images.backing_node(index, depth - 1), "backing"), images.backing_node(index, depth)

    @asynccontextmanager
    async def writable(self, nodes: Iterable[str]) -> AsyncIterator[None]:
        """In the block the bitmaps of these nodes can be changed; when it is left, they are stored and proved.

        To be used inside `pause.uninterrupted`. Raises `CheckpointsNotStored`.
        """
        wanted = set(nodes)
        chosen = [index for index in range(len(self.images)) if images.node(index) in wanted]
        try:
            for index in chosen:
                await self._make_writable(index)
            yield
        except BaseException as error:
            await despite(error, self._settle(chosen))
            raise
        await self._settle(chosen)

    async def _settle(self, chosen: Sequence[int]) -> None:
        """Read-only again, each as far as it can be; then the first failure is raised."""
        failed: list[errors.PullbackError] = []
        for index in chosen:
            path = str(self.images[index].path)
            try:
                await self._reopen(index, read_only=True)
                await self._prove(index)
            except errors.RefusedError as error:
                failed.append(errors.CheckpointsNotStored(path=path, reason=error.reason))
            except errors.PullbackError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    async def _make_writable(self, index: int) -> None:
        if index in self._unrepaired:
            await self._repair(index)
        else:
            await self._reopen(index, read_only=False)

    async def _repair(self, index: int) -> None:
        """Open an image anew: QEMU repairs one that was not closed cleanly when it opens it for writing, and only then.

        Reopened for writing it would not be repaired, and be written to by wrong reference counts.
        """
        image = self.images[index]
        for options in reversed(images.top(image, index, read_only=True)):
            await self.qmp.execute("blockdev-del", {"node-name": options["node-name"]})
        for options in images.top(image, index, read_only=False):
            await self._add(image.path, options, timeout=_REPAIR_SECONDS)
        self._writable.add(images.node(index))
        self._unrepaired.discard(index)

    async def _reopen(self, index: int, *, read_only: bool) -> None:
        node = images.node(index)
        if read_only == (node not in self._writable):
            return
        # Before the answer: if it never comes, the image may be writable.
        self._writable.add(node)
        options = {"options": images.top(self.images[index], index, read_only=read_only)}
        try:
            await self.qmp.execute("blockdev-reopen", options, timeout=_OPEN_SECONDS)
        except errors.RefusedError as error:
            if not read_only:
                self._writable.discard(node)
            if _is_locked(error):  # somebody reads it, and lets nobody write meanwhile
                raise imagelock.in_use(self.images[index].path) from error
            if error.error_class == "CommandNotFound":
                raise errors.Unsupported(
                    what="storing checkpoints in stopped images", reason="qemu-storage-daemon is older than 6.1"
                ) from error
            raise
        if read_only:
            self._writable.discard(node)

    async def _prove(self, index: int) -> None:
        if self.images[index].top.format != "qcow2":  # written by an export; it keeps no bitmaps
            return
        wanted = await self.bitmaps(images.node(index))
        await asyncio.to_thread(_prove, self.images[index].path, wanted)

    async def prove(self, node: str, path: Path) -> None:
        """The bitmaps of a node that is only read now lie in its file. Raises `CheckpointsNotStored`."""
        await asyncio.to_thread(_prove, path, await self.bitmaps(node))

    async def unstored(self) -> errors.CheckpointsNotStored | None:
        """After the daemon's end: what became of images that could not be made read-only before?"""
        for index, image in enumerate(self.images):
            kept = image.top.format == "qcow2" and images.node(index) in self._writable
            if kept and (problem := await asyncio.to_thread(_wrecked, image.path)):
                return errors.CheckpointsNotStored(path=str(image.path), reason=problem)
        return None


def _is_locked(error: errors.RefusedError) -> bool:
    return "Failed to get" in error.reason and "lock" in error.reason


def _wrecked(path: Path) -> str | None:
    """Why the bitmaps in a file are worthless, or None if they are not."""
    try:
        stored = qemu_img.info(path, format="qcow2").bitmaps
    except errors.ProgramFailed as error:
        return error.message
    return "they are left marked as in use" if any(bitmap.in_use for bitmap in stored) else None


def _prove(path: Path, wanted: Sequence[Bitmap]) -> None:
    """What lies in the file are these bitmaps, closed well."""
    stored = qemu_img.info(path, format="qcow2").bitmaps
    good = {(bitmap.name, bitmap.recording) for bitmap in stored if not bitmap.in_use}
    for bitmap in wanted:
        lasting = bitmap.persistent and not bitmap.inconsistent
        if lasting and (bitmap.name, bitmap.recording) not in good:
            raise errors.CheckpointsNotStored(path=str(path), reason=f"bitmap {bitmap.name} is not there afterwards")


def _disk(image: Image, node: graph.Node, whole: graph.Graph) -> Disk:
    bus = disks.bus_of(image.target)
    assert bus is not None, "no other target is parsed"
    found = graph.with_medium(
        Disk(target=image.target, bus=bus, qdev=""), node.name, node, read_only=False, graph=whole
    )
    untrackable = found.untrackable or _untrackable(found, image, node)
    return replace(found, image=str(image.path), untrackable=untrackable, transient=False)


def _untrackable(disk: Disk, image: Image, node: graph.Node) -> str | None:
    if disk.transient:  # no QEMU runs that could keep them in memory
        return disks.unstorable(disk.format)
    if image.corrupt:
        return "QEMU marked it as corrupt (qemu-img check)"
    if not image.writable:
        return "its file cannot be written to, so it takes no checkpoint"
    if not _has_room(image.path, node):
        return "its file system is full, so no checkpoint can be stored"
    return None


def _has_room(path: Path, node: graph.Node) -> bool:
    """Can the bitmaps be stored again, and one more? QEMU writes them anew before it frees the old ones.

    Found out before the image is opened for writing, because bitmaps that cannot be stored are lost.
    A block device's room cannot be known.
    """
    if path.is_block_device():
        return True
    bits = node.size // checkpoints.GRANULARITY // 8
    wanted = (len(node.bitmaps) + 1) * (bits + _BITMAP_ROOM) + _SPARE_ROOM
    status = os.statvfs(path)
    free = status.f_bfree if os.geteuid() == 0 else status.f_bavail
    return free * status.f_frsize >= wanted


@asynccontextmanager
async def opened(found: Sequence[Image], runtime: Path) -> AsyncIterator[Storage]:
    """The images, open in a daemon of ours while the block runs; `runtime` is a private directory.

    Raises `BusyError` naming an image that is in use elsewhere, `ImageUnusable`, `ProgramFailed`;
    at the end `CheckpointsNotStored`, if bitmaps could not be stored when they should have been.
    """
    with storage_daemon.start(runtime / "qmp.sock") as daemon:  # entered here: it dies with this thread
        await asyncio.to_thread(daemon.wait_ready)
        async with monitor.connect(daemon.qmp) as qmp:
            storage = Storage(qmp, found)
            try:
                await storage.open()
                yield storage
            except BaseException as error:
                await pause.uninterrupted(_quit(qmp, daemon))
                if (lost := await storage.unstored()) is not None:
                    error.add_note(str(lost))
                raise
            await pause.uninterrupted(_quit(qmp, daemon))
            if (lost := await storage.unstored()) is not None:
                raise lost


async def _quit(qmp: monitor.Monitor, daemon: storage_daemon.StorageDaemon) -> None:
    """The daemon closes all images. What does not end by itself is ended when its block is left."""
    with suppress(errors.PullbackError):
        await qmp.execute("quit", timeout=_QUIT_SECONDS)
    with suppress(errors.ProgramFailed):
        await asyncio.to_thread(daemon.wait, _QUIT_SECONDS)
