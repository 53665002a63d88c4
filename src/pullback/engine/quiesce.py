"""Quiescing: the guest's file systems frozen around the cut, and thawed whatever happens.

    freeze ─▶ stop, transaction, filter, cont ─▶ thaw

A frozen guest hangs for ever if nobody thaws it. So the job's record says that we froze it, durably,
before the agent is asked, the guard is armed, and who finds the record thaws: we, the guard after
our death, or the next run. A freeze that timed out may still happen, so it is thawed too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pullback import errors, state
from pullback.engine import guestagent, pause
from pullback.engine.guard import Guard
from pullback.engine.guestagent import AgentFailed, AgentRefused
from pullback.engine.monitor import Monitor
from pullback.model.backups import Quiesce, Quiescing

_RETRY_SECONDS = 1.0


@dataclass(slots=True)
class Quiet:
    """How quiescing went."""

    #: File systems that were frozen; 0 if none was.
    count: int = 0
    #: Seconds from the answer of freeze to that of thaw.
    seconds: float = 0.0
    #: What the user should know, or None.
    note: str | None = None


class Quiescer:
    """Freezes and thaws one machine for one job."""

    def __init__(self, monitor: Monitor, job: state.Job, guard: Guard, wish: Quiescing) -> None:
        self._monitor = monitor
        self._job = job
        self._guard = guard
        self._wish = wish
        self._late: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[Quiet]:
        """The guest's file systems are frozen while the block runs, as far as the user's wish goes.

        Raises `QuiesceFailed` where it is required and cannot be had; nothing is frozen then.
        """
        quiet = Quiet()
        socket = await self._socket(quiet)
        if socket is None:
            yield quiet
            return
        await self._guard.start()
        self._job.record.frozen_agent = str(socket)
        self._job.save()
        self._guard.arm()
        try:
            await self._freeze(socket, quiet)
            begun = time.monotonic()
            yield quiet
        finally:
            await self._thaw(socket, quiet)
            self._guard.disarm()
        quiet.seconds = time.monotonic() - begun if quiet.count else 0.0

    async def _socket(self, quiet: Quiet) -> Path | None:
        """The agent to ask, or None and a note; `QuiesceFailed` if that is not good enough."""
        wish = self._wish.wish
        if wish is Quiesce.NO:
            return None
        socket = self._wish.agent or await guestagent.find(self._monitor)
        reason = None
        if socket is None:
            reason = "the machine has no guest agent that runs"
        elif await pause.run_state(self._monitor) != "running":
            reason = "a machine that stands still cannot freeze its file systems"
        if reason is None:
            return socket
        if wish is Quiesce.REQUIRE:
            raise errors.QuiesceFailed(reason=reason)
        if wish is Quiesce.TRY:
            quiet.note = f"file systems were not frozen, because {reason}"
        return None

    async def _freeze(self, socket: Path, quiet: Quiet) -> None:
        """Ask for it. Refused means that nothing is frozen, so no thaw is owed; otherwise one is."""
        try:
            quiet.count = await guestagent.freeze(socket, self._wish.mount_points)
            if quiet.count == 0:  # what an agent says of a mount point that it does not know
                raise AgentRefused("the guest agent froze no file system")
        except AgentFailed as error:
            if isinstance(error, AgentRefused):
                _forget(self._job)
            if self._wish.wish is Quiesce.REQUIRE:
                raise errors.QuiesceFailed(reason=str(error)) from error
            quiet.note = f"file systems were not frozen, because {error}"

    async def _thaw(self, socket: Path, quiet: Quiet) -> None:
        """Thaw, also what could not be frozen: it may be frozen later. If that fails, go on trying meanwhile."""
        if not self._job.record.frozen_agent:
            return
        try:
            await guestagent.thaw(socket)
        except AgentFailed as error:
            quiet.note = f"the guest may still be frozen: {error}; it is tried again"
            self._late = asyncio.create_task(_patiently(socket, self._job), name="late-thaw")
            return
        _forget(self._job)

    async def end(self) -> None:
        """The job ends: one last try, if a thaw is still owed."""
        if self._late is not None:
            self._late.cancel()
            await asyncio.wait({self._late})
        await thaw_if_ours(self._job)


async def _patiently(socket: Path, job: state.Job) -> None:
    while True:
        await asyncio.sleep(_RETRY_SECONDS)
        try:
            await guestagent.thaw(socket)
        except AgentFailed:
            continue
        _forget(job)
        return


def _forget(job: state.Job) -> None:
    """No thaw is owed. A record that still says so on disk costs one more thaw, and must not stop cleaning up."""
    job.record.frozen_agent = ""
    with suppress(errors.CannotWrite):
        job.save()


async def thaw_if_ours(job: state.Job) -> None:
    """Thaw a guest that the record says we froze; a guest that does not answer is left to the next run's try."""
    if not job.record.frozen_agent:
        return
    try:
        await guestagent.thaw(Path(job.record.frozen_agent))
    except AgentFailed:
        return
    _forget(job)
