"""The guard: a process of its own that undoes what our sudden death would leave.

While a machine is paused by us, dying would leave it standing still for ever. So before the pause
a guard is started, which lives in its own session, ignores signals and holds a pipe to us. When
the pipe ends, or we fall silent for a second inside a pause (stopped, or hanging; it kills us
then, because the monitor serves one client), it connects to the monitor and continues the
machine, if and only if the job's record says that we paused it and the machine is `paused`. Then
it removes what else the job left in QEMU.

    us                                   guard
    start ─────────────────────────────▶ ready
    b"A" (a pause begins)  ────────────▶ armed: now a beat is due every second
    b"." b"." b"." … ──────────────────▶
    b"D" (running again)  ─────────────▶ disarmed
    b"Q" (all is removed) ─────────────▶ ends
    end of file without b"Q" ──────────▶ rescue
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from pullback import errors, state

#: A second without a beat inside a pause: we are stopped, or hang. With the rescue under two seconds.
SILENCE_SECONDS = 1.0
_BEAT_SECONDS = 0.2
_START_SECONDS = 20.0
_RESCUE_SECONDS = 60.0
_ARM, _BEAT, _DISARM, _QUIT = b"A", b".", b"D", b"Q"


class Guard:
    """Our end of the pipe. Made by `guarding`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._beats: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """The guard's process id."""
        return self._process.pid

    def arm(self) -> None:
        """A pause begins: from now on silence counts as death."""
        self._send(_ARM)
        self._beats = asyncio.create_task(self._beat(), name="guard-beat")

    def disarm(self) -> None:
        """The machine runs again, or stands still by somebody else's will."""
        if self._beats is not None:
            self._beats.cancel()
            self._beats = None
        self._send(_DISARM)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            self._send(_BEAT)

    def _send(self, message: bytes) -> None:
        pipe = self._process.stdin
        if pipe is None or pipe.is_closing() or self._process.returncode is not None:
            raise errors.CannotWrite(path="the guard's pipe", reason="the guard process ended")
        pipe.write(message)


@asynccontextmanager
async def guarding(job: state.Job) -> AsyncIterator[Guard]:
    """A guard over `job` while the block runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, str(job.path), str(os.getpid()),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    guard = Guard(process)
    try:
        await _ready(process)
        yield guard
    finally:
        with suppress(errors.CannotWrite):
            guard.disarm()
            if not job.record.paused_by_us:  # else the pipe just ends, and the guard tries in our place
                guard._send(_QUIT)
        await _end(process)


async def _ready(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_SECONDS):
            line = await process.stdout.readline()
    except TimeoutError:
        line = b""
    if line != b"ready\n":
        raise errors.ProgramFailed(program="the guard process", status="no start", message="it did not get ready")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(5):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


# -- the guard's own process -----------------------------------------------------------------


def main(path: Path, parent: int) -> None:
    """Watch `parent` over standard input; rescue its machine if it dies."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if not _watch(parent):
        job = state.load_job(path)
        if job is not None:
            asyncio.run(_rescue(job))


def _watch(parent: int) -> bool:
    """True if the parent said goodbye; False if it died, or was silent and has been killed."""
    armed = False
    while True:
        ready, _, _ = select.select([0], [], [], SILENCE_SECONDS if armed else None)
        if not ready:
            if os.getppid() == parent:  # still our parent, so the number was not re-used
                os.kill(parent, signal.SIGKILL)
            return False
        received = os.read(0, 4096)
        if not received:
            return False
        if _QUIT in received:
            return True
        last = received.replace(_BEAT, b"")[-1:]
        armed = last == _ARM if last else armed


async def _rescue(job: state.Job) -> None:
    """Continue the machine if we paused it, then remove what the job left."""
    from pullback.engine import recovery  # here: the guard must be ready soon, and seldom needs it

    deadline = asyncio.get_running_loop().time() + _RESCUE_SECONDS
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
