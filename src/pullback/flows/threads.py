"""The one place where async and threads meet: blocking work, cancelled through its token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, TypeVar

from pullback.progress import Cancel

T = TypeVar("T")


async def blocking(work: Callable[[], T], *, cancel: Cancel, beside: Coroutine[Any, Any, None] | None = None) -> T:
    """Run `work` in a thread; if we are cancelled, tell its token and wait until it has stopped.

    `beside` runs meanwhile, and only ends by failing: its error stops the work and is raised.
    """
    watch = asyncio.ensure_future(beside) if beside is not None else None
    running = asyncio.ensure_future(asyncio.to_thread(work))
    running.add_done_callback(_retrieve)
    waited = {running} if watch is None else {running, watch}
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError as error:
        cancel.cancel(error)
        await asyncio.wait({running})
        raise
    finally:
        if watch is not None and not watch.done():
            watch.cancel()
    if watch is not None and watch.done() and not watch.cancelled() and (failed := watch.exception()) is not None:
        cancel.cancel(failed)
        await asyncio.wait({running})
        raise failed
    return await running


def _retrieve(task: asyncio.Task[T]) -> None:
    """Work that we told to stop fails with the reason that we raise ourselves: asyncio shall not print it."""
    if not task.cancelled():
        task.exception()


@asynccontextmanager
async def entered(context: AbstractContextManager[T], *, hurry: Callable[[], None] | None = None) -> AsyncIterator[T]:
    """Enter a context manager that blocks, and leave it, both in threads.

    If we are cancelled meanwhile, we wait until it is entered, so that it can be left. `hurry` is called then: it
    makes that short.
    """
    entering = asyncio.ensure_future(asyncio.to_thread(context.__enter__))
    entering.add_done_callback(_retrieve)
    try:
        value = await asyncio.shield(entering)
    except asyncio.CancelledError:
        if hurry is not None:
            hurry()
        await asyncio.wait({entering})
        if entering.exception() is None:
            await asyncio.to_thread(context.__exit__, None, None, None)
        raise
    try:
        yield value
    except BaseException as error:
        await asyncio.to_thread(context.__exit__, type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(context.__exit__, None, None, None)
