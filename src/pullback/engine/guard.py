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
    b"K" (all stays for now) ──────────▶ becomes the `keeper`
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
_END_SECONDS = 5.0
#: So long does a guard try to rescue.
RESCUE_SECONDS = 60.0
ARM, BEAT, DISARM, QUIT, KEEP = b"A", b".", b"D", b"Q", b"K"
_PROCESS = "pullback.engine.rescue"


class Guard:
    """Our end of the pipe. Made by `guarding`."""

    def __init__(self, job: state.Job) -> None:
        self._job = job
        self._process: asyncio.subprocess.Process | None = None
        self._beats: asyncio.Task[None] | None = None
        #: Dangerous moments that are open: a pause may lie inside a freeze.
        self._armed = 0
        self._farewell = QUIT
        self._getting_ready: asyncio.Task[None] | None = None

    def keep(self) -> None:
        """The job lasts when we are gone: at the end the guard becomes its keeper."""
        self._farewell = KEEP

    async def start(self) -> None:
        """Have one that is ready: nothing may be paused without one (somebody may have killed it)."""
        if self._process is not None and self._process.returncode is not None:
            await _end(self._process, _END_SECONDS)
            self._process = None
        if self._process is None:
            await self.launch()
        assert self._getting_ready is not None
        await asyncio.shield(self._getting_ready)

    async def launch(self) -> None:
        """Start the process. It need not be ready for anything but a pause: until then it hears of our death later."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", _PROCESS, str(self._job.path), str(os.getpid()),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._getting_ready = asyncio.create_task(_ready(self._process), name="guard-ready")

    def arm(self) -> None:
        """A pause or freeze begins: from now on silence counts as death. May be nested."""
        if self._armed == 0:
            self._send(ARM)
            self._beats = asyncio.create_task(self._beat(), name="guard-beat")
        self._armed += 1

    def disarm(self) -> None:
        """The machine runs again, or stands still by somebody else's will."""
        self._armed = max(0, self._armed - 1)
        if self._armed:
            return
        if self._beats is not None:
            self._beats.cancel()
            self._beats = None
        with suppress(errors.CannotWrite):  # a guard that died needs not be told
            self._send(DISARM)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            self._send(BEAT)

    def _send(self, message: bytes) -> None:
        process = self._process
        if process is None or process.stdin is None or process.stdin.is_closing() or process.returncode is not None:
            raise errors.CannotWrite(path="the guard's pipe", reason="the guard process ended")
        process.stdin.write(message)

    async def end(self) -> None:
        """Send it home. If the machine still stands still by our doing, it tries to continue it first."""
        self._armed = 0
        self.disarm()
        if self._process is None:
            return
        if self._getting_ready is not None:
            self._getting_ready.cancel()
            await asyncio.gather(self._getting_ready, return_exceptions=True)
        if self._job.record.paused_by_us:  # the pipe just ends, and the guard acts in our place
            await _end(self._process, RESCUE_SECONDS)
            return
        with suppress(errors.CannotWrite):
            self._send(self._farewell)
        await _end(self._process, _END_SECONDS)


@asynccontextmanager
async def guarding(job: state.Job) -> AsyncIterator[Guard]:
    """A guard over `job` while the block runs."""
    guard = Guard(job)
    try:
        await guard.launch()
        yield guard
    finally:
        await guard.end()


async def _ready(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_SECONDS):
            line = await process.stdout.readline()
    except TimeoutError:
        line = b""
    if line != b"ready\n":
        raise errors.ProgramFailed(program="the guard process", status="no start", message="it did not get ready")


async def _end(process: asyncio.subprocess.Process, seconds: float) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(seconds):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
