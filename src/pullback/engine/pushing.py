"""A push that lives as long as a block of ours: begun when it is entered, undone when it is left unconcluded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pullback import errors, state
from pullback.engine import destinations, fleece, jobs, pause, push, recovery, scratch, transaction
from pullback.engine.monitor import Monitor
from pullback.engine.names import Names, prefix
from pullback.engine.storage import Storage
from pullback.engine.undoing import despite
from pullback.model.backups import Window
from pullback.model.pushing import Pushed, PushProgress, PushRequest

#: Giving up a destination that hangs, and removing the rest.
_CLEAN_SECONDS = 30.0
_WATCH_SECONDS = 0.5

Step = Callable[[Pushed], Awaitable[None]]


class Push:
    """A push under way. Made by `of_machine` and `of_images`."""

    def __init__(self, monitor: Monitor, begun: Pushed, window: Window, watched: Callable[[], None], end: Step) -> None:
        self._monitor = monitor
        self._begun = begun
        self._window = window
        self._watched = watched
        self._end = end
        self.concluded = False

    @property
    def description(self) -> Pushed:
        """What it is."""
        return self._begun

    @property
    def moment(self) -> datetime:
        """The instant, UTC."""
        assert self._begun.moment is not None, "begun before it is given out"
        return self._begun.moment

    @property
    def window(self) -> Window:
        """How long the machine stood still."""
        return self._window

    async def progress(self) -> tuple[PushProgress, ...]:
        """How far each disk is."""
        return await push.progress(self._monitor, self._begun)

    async def set_speed(self, speed: int | None, target: str | None = None) -> None:
        """Bytes per second from now on, for each disk or one."""
        await push.set_speed(self._monitor, self._begun, speed, target)

    async def pause(self, target: str | None = None) -> None:
        """Copy nothing until `resume`."""
        await push.pause(self._monitor, self._begun, target)

    async def resume(self, target: str | None = None) -> None:
        """Go on."""
        await push.resume(self._monitor, self._begun, target)

    async def wait(self, seconds: float) -> tuple[PushProgress, ...]:
        """Until all is copied, something failed, or the time is over. Raises `ScratchSpace`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            self._watched()
            found = await push.wait(self._monitor, self._begun, min(_WATCH_SECONDS, max(0, deadline - loop.time())))
            if push.over(found) or loop.time() >= deadline:
                return found

    async def conclude(self) -> None:
        """All is copied: make backups of it (see `push.conclude`)."""
        await pause.uninterrupted(_awaited(self._end(self._begun)))
        self.concluded = True


async def _awaited(work: Awaitable[Any]) -> None:
    await work


@asynccontextmanager
async def of_machine(context: fleece.Context, request: PushRequest) -> AsyncIterator[Push]:
    """Of a QEMU process, on a job whose record is there already, under its guard."""
    monitor, job, still = context.monitor, context.job, fleece.stillness(context)
    described: list[Pushed] = []

    async def begin() -> tuple[Pushed, fleece.Cut]:
        described.append(await push.prepare(context, request))
        begun, cut = await push.begin(context, request, described[0])
        described.append(begun)
        return begun, cut

    async def undo() -> None:
        async with asyncio.timeout(_CLEAN_SECONDS):
            await context.quiescer.end()
            await push.cancel(monitor, job, described[-1] if described else None, still)
            job.remove()

    def watch() -> None:
        scratch.room(request.scratch, scratch.needed([part.disk for part in request.parts]))

    try:
        begun, cut = await pause.uninterrupted(begin())
        found = Push(monitor, begun, cut.window, watch, lambda pushed: push.conclude(monitor, job, pushed, still))
        yield found
        if not found.concluded:
            await pause.uninterrupted(undo())
    except BaseException as error:
        await despite(error, undo())
        if not monitor.process_lives():
            recovery.forget(job)
        raise
    if found.concluded:
        await context.quiescer.end()
        job.remove()


@asynccontextmanager
async def of_images(storage: Storage, job: state.Job, request: PushRequest) -> AsyncIterator[Push]:
    """Of a machine that is off: nobody writes, so the disks' own nodes are copied."""
    offline = OfflinePush(storage, job, request)
    try:
        begun = await pause.uninterrupted(offline.begin())
        found = Push(storage.qmp, begun, Window(), lambda: None, offline.conclude)
        yield found
        if not found.concluded:
            await pause.uninterrupted(offline.undo())
    except BaseException as error:
        await despite(error, offline.undo())
        raise


class OfflinePush:
    """The steps on images in a storage daemon of ours."""

    def __init__(self, storage: Storage, job: state.Job, request: PushRequest) -> None:
        self._storage = storage
        self._job = job
        # All names carry the job of the record: what is to be removed is known by it.
        self._request = replace(request, job=job.record.job)
        self._described: Pushed | None = None

    async def begin(self) -> Pushed:
        """Make destinations and checkpoints, and begin to copy."""
        qmp = self._storage.qmp
        used = [str(layer.path) for image in self._storage.images for layer in image.layers]
        state.private(self._request.scratch)  # for what describes raw destinations
        made = await push.make(qmp, self._job, self._request, used, longest=None)
        begun = Pushed(job=made.job, disks=made.disks, moment=datetime.now(UTC))
        self._described = begun
        actions: list[transaction.Action] = []
        nodes = []
        for index, part in enumerate(self._request.parts):
            node = begun.disks[index].node
            if part.checkpoint is not None:
                actions += transaction.checkpoint(node, part.checkpoint, part.freeze, transient=part.disk.transient)
            if part.since:
                actions += transaction.union(node, Names(begun.job, index).bitmap, part.since)
            if part.checkpoint is not None or part.since:
                nodes.append(node)
        if actions:
            async with self._storage.writable(nodes):
                await transaction.run(qmp, actions)
        for disk in begun.disks:
            await push.start(qmp, begun, disk, disk.node, speed=self._request.speed)
        return begun

    async def conclude(self, pushed: Pushed) -> None:
        """All is copied: make backups of it."""
        found = await push.progress(self._storage.qmp, pushed)
        if not push.over(found):
            raise errors.BusyError(what="the push", holder="it is still copying")
        push.require_copied(pushed, found)
        await push.finish(self._storage.qmp, self._job, pushed)
        await self._sweep(pushed)

    async def _sweep(self, pushed: Pushed) -> None:
        qmp, ours = self._storage.qmp, prefix(self._request.job)
        await destinations.release(qmp, self._job)
        await jobs.end(qmp, ours)
        await destinations.remove_nodes(qmp, ours)
        gone: list[transaction.Action] = []
        for disk in pushed.disks:
            name = Names(pushed.job, disk.index).bitmap
            if name in {bitmap.name for bitmap in await self._storage.bitmaps(disk.node)}:
                gone.append(transaction.Remove(node=disk.node, name=name))
        await transaction.run(qmp, gone)
        for path in self._job.record.scratch:
            Path(path).unlink(missing_ok=True)
        self._job.record.scratch = []
        self._job.save()

    async def undo(self) -> None:
        """As if nothing had been."""
        async with asyncio.timeout(_CLEAN_SECONDS):
            pushed = self._described or Pushed(job=self._request.job, disks=())
            await self._sweep(pushed)
            await self._take_back(pushed)

    async def _take_back(self, pushed: Pushed) -> None:
        actions = await push.given_back(self._storage.qmp, pushed)
        if actions:
            async with self._storage.writable({action.node for action in actions}):
                await transaction.run(self._storage.qmp, actions)
