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

This is our end of the pipe; the guard's own is `rescue`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from pullback import errors, state

#: A second without a beat inside a pause: we are stopped, or hang. With the rescue under two seconds.
SILENCE_SECONDS = 1.0
_BEAT_SECONDS = 0.2
_START_SECONDS = 20.0
ARM, BEAT, DISARM, QUIT = b"A", b".", b"D", b"Q"
_PROCESS = "pullback.engine.rescue"


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
        self._send(ARM)
        self._beats = asyncio.create_task(self._beat(), name="guard-beat")

    def disarm(self) -> None:
        """The machine runs again, or stands still by somebody else's will."""
        if self._beats is not None:
            self._beats.cancel()
            self._beats = None
        self._send(DISARM)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            self._send(BEAT)

    def _send(self, message: bytes) -> None:
        pipe = self._process.stdin
        if pipe is None or pipe.is_closing() or self._process.returncode is not None:
            raise errors.CannotWrite(path="the guard's pipe", reason="the guard process ended")
        pipe.write(message)


@asynccontextmanager
async def guarding(job: state.Job) -> AsyncIterator[Guard]:
    """A guard over `job` while the block runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", _PROCESS, str(job.path), str(os.getpid()),
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
                guard._send(QUIT)
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
