"""Images of a machine that is off, open for writing: what `swap` is for a running one.

There is no guest to take them from. The recording bitmaps see what is written, and are stored with it when the
images are read-only again. If we die, so does the storage daemon, and the bitmaps are worthless, as after a
crash of a machine: the next backup says so.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from pullback import errors, machine, state
from pullback.engine import exports, imagelock, images, pause, serving, transaction
from pullback.engine.images import Image
from pullback.engine.names import Names, prefix
from pullback.engine.storage import Storage
from pullback.engine.undoing import despite
from pullback.model.disks import Disk
from pullback.model.exports import NbdAddress
from pullback.model.rollbacks import After, HeldDisk, HoldDisk, HoldRequest


def require_holdable(storage: Storage, request: HoldRequest) -> None:
    """Raise what would hinder. Raises `UsageError`, `Unsupported`, `PermissionDenied`."""
    if request.after is not None:
        raise errors.UsageError(problem="The machine is off, and stays so: --after is for one that runs")
    for wanted in request.disks:
        image = _image(storage, wanted.disk)
        if image.top.data_file is not None:
            raise errors.Unsupported(
                what=f"rolling back disk {image.target}",
                reason=f"its data lies in a file of its own, {image.top.data_file}",
                way_out="Start the machine paused (-S), and roll it back then.",
            )
        if not os.access(image.path, os.W_OK):
            raise errors.PermissionDenied(path=str(image.path))


def _image(storage: Storage, disk: Disk) -> Image:
    numbers = {images.node(index): image for index, image in enumerate(storage.images)}
    assert disk.node is not None, "every image has its node"
    return numbers[disk.node]


class OfflineHeld:
    """See `machine.Held`. Made by `held`."""

    #: Whoever held the images before is gone, and with him what kept others away from them.
    kept = ""
    process = ""
    disturbed = 0

    def __init__(
        self, storage: Storage, job: state.Job, locks: Mapping[Path, imagelock.Lock], request: HoldRequest
    ) -> None:
        self._storage = storage
        self._job = job
        self._locks = locks
        self._request = request
        self._disks: tuple[HeldDisk, ...] = ()
        self._open = AsyncExitStack()
        self._over = False

    @property
    def disks(self) -> tuple[HeldDisk, ...]:
        """Where each can be written."""
        return self._disks

    async def take(self) -> None:
        """Open the images for writing, and export them. Inside `pause.uninterrupted`."""
        require_holdable(self._storage, self._request)
        nodes = [str(wanted.disk.node) for wanted in self._request.disks]
        self._open.enter_context(self._lifted())
        await self._open.enter_async_context(self._storage.writable(nodes))
        await serving.ensure_private(self._storage.qmp, self._job)
        self._disks = tuple([await self._serve(index, one) for index, one in enumerate(self._request.disks)])

    @contextmanager
    def _lifted(self) -> Iterator[None]:
        """Our own locks against writers are not in the way of our own daemon."""
        paths = {_image(self._storage, wanted.disk).path.resolve() for wanted in self._request.disks}
        with ExitStack() as stack:
            for path in sorted(paths & set(self._locks)):
                stack.enter_context(self._locks[path].lifted())
            yield

    async def _serve(self, index: int, wanted: HoldDisk) -> HeldDisk:
        qmp, names, disk = self._storage.qmp, Names(self._request.job, index), wanted.disk
        assert disk.node is not None
        if wanted.since:
            await transaction.run(qmp, transaction.union(disk.node, names.bitmap, wanted.since))
        export = f"{prefix(self._request.job)}{disk.target}-rollback"
        bitmaps = [names.bitmap] if wanted.since else []
        await exports.add_nbd(qmp, id=names.export("roll"), node=disk.node, name=export, bitmaps=bitmaps, writable=True)
        changes = f"qemu:dirty-bitmap:{names.bitmap}" if wanted.since else None
        address = NbdAddress(socket=serving.private_socket(self._job), export=export)
        files = (_image(self._storage, disk).path,)
        return HeldDisk(disk=disk, address=address, files=files, changes=changes)

    async def watch(self) -> None:
        """Nobody continues a machine that is off."""
        await asyncio.Event().wait()

    async def give_back(self) -> None:
        """The images are read-only again, and what was written is stored, with its bitmaps."""
        await pause.uninterrupted(self._end())

    async def _end(self) -> None:
        if self._over:
            return
        self._over = True
        qmp, ours = self._storage.qmp, prefix(self._request.job)
        try:
            await exports.remove(qmp, ours)
            await serving.stop_unused(qmp, serving.register_of(self._job))
            for wanted in self._request.disks:
                assert wanted.disk.node is not None
                there = await self._storage.bitmaps(wanted.disk.node)
                names = [bitmap.name for bitmap in there if bitmap.name.startswith(ours)]
                gone = [transaction.Remove(node=wanted.disk.node, name=name) for name in names]
                await transaction.run(qmp, gone)
        finally:
            await self._open.aclose()

    async def conclude(self) -> After:
        """It stays off."""
        return After.HELD

    async def abandon(self) -> None:
        """Something failed: whatever was written so far is closed in order."""
        await self._end()


@asynccontextmanager
async def held(
    storage: Storage, job: state.Job, locks: Mapping[Path, imagelock.Lock], request: HoldRequest
) -> AsyncIterator[OfflineHeld]:
    """Images open for writing while the block runs."""
    found = OfflineHeld(storage, job, locks, request)
    try:
        await pause.uninterrupted(found.take())
        yield found
    except BaseException as error:
        await despite(error, found.abandon())
        raise
    await found.give_back()


_: type[machine.Held] = OfflineHeld  # the interface is kept, says mypy
