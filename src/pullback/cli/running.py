"""Running a command: signals become a clean end, errors become a sentence and an exit code."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

from pullback import errors
from pullback.cli import asking
from pullback.cli.output import Output
from pullback.progress import INTERRUPTION

T = TypeVar("T")
#: Threads for what blocks, made when they are needed: a few for each of 64 machines.
_THREADS = 256
_SIGNALS: dict[signal.Signals, type[errors.PullbackError]] = {
    signal.SIGINT: errors.Interrupted,
    signal.SIGTERM: errors.Terminated,
    signal.SIGHUP: errors.Terminated,
}


def run(work: Coroutine[Any, Any, T], output: Output) -> T:
    """Run `work` to its end and give its value; does not return if it fails."""
    try:
        return asyncio.run(_interruptible(work))
    except errors.PullbackError as error:
        fail(error, output)
    except OSError as error:
        # Every place that expects one translates it; what is left is still no reason for a traceback.
        if output.verbose:
            raise
        path = str(error.filename or "a file")
        fail(errors.CannotWrite(path=path, reason=error.strerror or str(error)), output)


def fail(error: errors.PullbackError, output: Output) -> NoReturn:
    """Say it and end with its exit code."""
    output.error(error)
    if output.verbose and error.__cause__ is not None:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    raise SystemExit(int(error.exit_code))


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Ctrl-C and SIGTERM cancel the work, which cleans up; then the matching error is raised.

    The handlers only schedule the cancellation, so a pause is never cut (`engine.pause`).
    """
    loop = asyncio.get_running_loop()
    # By default there are four more than processors: with `--parallel`, some would wait until others have copied.
    loop.set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="work"))
    reasons: list[BaseException] = []
    INTERRUPTION.set(reasons)
    task = asyncio.ensure_future(work)

    def cancel(reason: type[errors.PullbackError]) -> None:
        if not reasons:
            reasons.append(reason())
            asking.INTERRUPTED.set()
            task.cancel()

    for number, reason in _SIGNALS.items():
        loop.add_signal_handler(number, cancel, reason)
    try:
        return await task
    except asyncio.CancelledError as error:
        raised = reasons[0] if reasons else errors.Interrupted()
        for note in getattr(error, "__notes__", []):
            raised.add_note(note)
        raise raised from None
