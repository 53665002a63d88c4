"""The restore point's server while a machine needs it: when it dies it is started again, at the same socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pullback import errors
from pullback.flows import serving
from pullback.model.exports import ServerAddress
from pullback.model.points import Point
from pullback.progress import Progress

#: Seconds before it is started again: at first, and at most.
_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """A restore point that is served. Who connects before it is `ready` is answered then."""

    point: Point
    #: Where its disks are served, each under its target.
    socket: Path
    #: Done when it is served; has the error if that failed.
    ready: asyncio.Future[None]


@asynccontextmanager
async def supplied(request: serving.Request, progress: Progress) -> AsyncIterator[Supply]:
    """Serve while the block runs. Only the first start can fail; later ones are tried until they succeed.

    Errors: as `serving.serving`.
    """
    server = _Server(request, progress)
    running = asyncio.ensure_future(server.run())
    running.add_done_callback(server.ended)
    try:
        point, socket = await server.found
        yield Supply(point=point, socket=socket, ready=server.ready)
    finally:
        running.cancel()
        await asyncio.wait({running})
        for done in (server.found, server.ready, running):
            if done.done() and not done.cancelled():
                done.exception()  # raised already, or of no interest any more


class _Server:
    """What goes on behind `supplied`."""

    def __init__(self, request: serving.Request, progress: Progress) -> None:
        loop = asyncio.get_running_loop()
        self._request = request
        self._progress = progress
        self.found: asyncio.Future[tuple[Point, Path]] = loop.create_future()
        self.ready: asyncio.Future[None] = loop.create_future()

    def ended(self, running: asyncio.Future[None]) -> None:
        """It ended before it served at all: whoever waits for that is told."""
        if running.cancelled() or (error := running.exception()) is None:
            return
        for waited in (self.found, self.ready):
            if not waited.done():
                waited.set_exception(error)

    def _early(self, point: Point, address: ServerAddress) -> None:
        if not self.found.done():
            assert address.socket is not None
            self.found.set_result((point, Path(address.socket)))

    async def run(self) -> None:
        """Serve for ever."""
        pause, told = _PAUSE_SECONDS, ""
        while True:
            try:
                async with serving.serving(self._request, self._progress, early=self._early) as served:
                    if self.ready.done():
                        self._progress.note("the restore point is served again")
                    else:
                        self.ready.set_result(None)
                    pause, told = _PAUSE_SECONDS, ""
                    await served.ended()
            except errors.PullbackError as error:
                if not self.ready.done():
                    raise
                if str(error) != told:
                    told = str(error)
                    self._progress.note(
                        f"what the machine reads waits, until its restore point is served again: {told}"
                    )
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
