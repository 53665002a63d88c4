"""Cleaning up after a failure without hiding it."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from pullback import errors
from pullback.engine.pause import uninterrupted


async def despite(error: BaseException, cleaning: Coroutine[Any, Any, None]) -> None:
    """Run `cleaning` after `error`; what fails in it is added to the error as a note."""
    try:
        await uninterrupted(cleaning)
    except TimeoutError:
        error.add_note("Cleaning up took too long; the next run goes on with it.")
    except errors.PullbackError as second:
        error.add_note(str(second))
