"""The guard's own process (see `guard`): it waits, and rescues the machine if we die in a pause."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path

from pullback import errors, state
from pullback.engine import guard, keeper


def main(path: Path, parent: int) -> None:
    """Watch `parent` over standard input; rescue its machine if it dies."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):  # it may be dead already: then there is the more to do
        os.write(1, b"ready\n")
    farewell = _watch(parent)
    if farewell == guard.KEEP:
        _become_keeper(path)
    elif farewell is None:
        job = state.load_job(path)
        if job is not None:
            asyncio.run(_rescue(job))
        again = state.load_job(path)
        if again is not None and again.record.open is not None:  # it lasts, or its end must wait
            _become_keeper(path)


def _become_keeper(path: Path) -> None:
    """In a child, so that our parent need not wait for it, nor for the pipe that we share."""
    if os.fork() == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.execv(sys.executable, keeper.words(path))


def _watch(parent: int) -> bytes | None:
    """How the parent said goodbye; None if it died, or was silent and has been killed."""
    armed = False
    while True:
        ready, _, _ = select.select([0], [], [], guard.SILENCE_SECONDS if armed else None)
        if not ready:
            if os.getppid() == parent:  # still our parent, so the number was not re-used
                os.kill(parent, signal.SIGKILL)
            return None
        received = os.read(0, 4096)
        if not received:
            return None
        for farewell in (guard.QUIT, guard.KEEP):
            if farewell in received:
                return farewell
        last = received.replace(guard.BEAT, b"")[-1:]
        armed = last == guard.ARM if last else armed


async def _rescue(job: state.Job) -> None:
    """Continue the machine if we paused it, then remove what the job left."""
    from pullback.engine import recovery  # here: the guard must be ready soon, and seldom needs it

    deadline = asyncio.get_running_loop().time() + guard.RESCUE_SECONDS
    while asyncio.get_running_loop().time() < deadline:
        try:
            await recovery.recover(job)
            return
        except (errors.UnreachableError, errors.PermissionDenied, errors.CleanupIncomplete):
            return  # QEMU is gone, or the next run must try again
        except errors.PullbackError:
            await asyncio.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
