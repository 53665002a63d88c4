"""Pausing a machine, and letting go of it whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pullback import errors, state
from pullback.engine import replies
from pullback.engine.guard import Guard
from pullback.engine.monitor import Monitor

T = TypeVar("T")

#: States in which no virtual CPU runs and nobody but the user continues it (QAPI RunState).
_STANDING = {"paused", "prelaunch", "io-error", "shutdown", "guest-panicked", "watchdog", "internal-error", "debug"}
_RUNNING = "running"
#: A machine that moves belongs to the migration.
_MOVING = {"inmigrate", "postmigrate", "finish-migrate", "save-vm", "restore-vm", "colo"}
#: A machine that flushes slow disks may take long to stop; beyond this we let it go.
_STOP_SECONDS = 10.0
_CONTINUE_ATTEMPTS, _CONTINUE_SECONDS = 5, 0.1


@dataclass(slots=True)
class Pause:
    """A pause as it happened."""

    #: The machine stood still before we came.
    was_paused: bool
    #: Seconds from sending `stop` to the answer to `cont`.
    seconds: float = 0.0
    #: When it began (time.monotonic).
    begun: float = field(default_factory=time.monotonic)


async def run_state(monitor: Monitor) -> str:
    """QAPI RunState of the machine."""
    return replies.text(replies.mapping(await monitor.execute("query-status"), "query-status"), "status", "status")


async def can_pause(monitor: Monitor) -> bool:
    """Can the machine be held still without changing what it is? Raises `BusyError` if it migrates."""
    status = await run_state(monitor)
    if status in _MOVING:
        raise errors.BusyError(what="the machine", holder=f"it is being migrated, saved or loaded ({status})")
    return status == _RUNNING or status in _STANDING


@asynccontextmanager
async def paused(monitor: Monitor, job: state.Job, guard: Guard) -> AsyncIterator[Pause]:
    """The machine stands still while the block runs; a machine that stood still is left so.

    The record says so, durably, before `stop` is sent, and the guard is armed. To be used inside
    `uninterrupted`, so that no cancellation cuts between stop and cont.
    """
    if await run_state(monitor) != _RUNNING:
        yield Pause(was_paused=True)
        return
    await guard.start()
    job.record.paused_by_us = True
    job.save()
    pause = Pause(was_paused=False)
    try:
        guard.arm()
        await _stop(monitor)
        yield pause
    except BaseException as error:
        try:
            await _end(monitor, job, guard, pause)
        except errors.PullbackError as second:
            error.add_note(str(second))  # the first one says more
        raise
    await _end(monitor, job, guard, pause)


async def _end(monitor: Monitor, job: state.Job, guard: Guard, pause: Pause) -> None:
    """Continue the machine, and forget that we paused it."""
    await _release(monitor)
    pause.seconds = time.monotonic() - pause.begun
    guard.disarm()
    job.record.paused_by_us = False
    job.save()


async def _stop(monitor: Monitor) -> None:
    await monitor.execute("stop", timeout=_STOP_SECONDS)
    status = await run_state(monitor)
    if status != "paused":
        raise errors.RefusedError(command="stop", reason=f"the machine is {status} instead of paused")


async def _release(monitor: Monitor) -> None:
    """Continue the machine; if that cannot be done on this connection, make room for the guard's."""
    try:
        await _continue(monitor)
    except BaseException:
        monitor.close_now()
        raise


async def _continue(monitor: Monitor) -> None:
    """Continue, if the machine is still as `stop` left it. What refuses it may pass (a lock on an image)."""
    for attempt in range(1, _CONTINUE_ATTEMPTS + 1):
        try:
            if await run_state(monitor) == "paused":
                await monitor.execute("cont")
            return
        except errors.RefusedError:
            if attempt == _CONTINUE_ATTEMPTS:
                raise
            await asyncio.sleep(_CONTINUE_SECONDS)


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end even if we are cancelled meanwhile; then the cancellation goes on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is not None:
            task.exception()
        raise


async def resume_if_ours(monitor: Monitor, job: state.Job) -> bool:
    """After a death inside a pause: continue the machine if the record says that we paused it."""
    if not job.record.paused_by_us:
        return False
    same = job.record.qemu in ("", monitor.process)
    resumed = same and await run_state(monitor) == "paused"
    if resumed:
        await monitor.execute("cont")
    job.record.paused_by_us = False
    job.save()
    return resumed
