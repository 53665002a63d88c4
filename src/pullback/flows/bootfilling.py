"""Filling the disks of a machine that was booted, until it needs its restore point no more.

    each disk:  export its overlay ─► have it read ahead all that is not zero ─► prove that it holds all
                ─► flush ─► nothing lies below it any more

It goes on wherever it was interrupted: what an overlay holds already is asked for again, and costs nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from pullback import errors, extents, repo, state
from pullback.engine import scratch
from pullback.engine.monitor import Monitor
from pullback.engine.populating import Populating
from pullback.extents import Extent
from pullback.flows.threads import blocking
from pullback.model.exports import NbdAddress
from pullback.programs import launching
from pullback.programs.launching import Place
from pullback.progress import Cancel, Progress
from pullback.transfer import NbdEndpoint, ahead
from pullback.units import format_size

#: Seconds between attempts to take the restore point away from below a disk that another job holds.
_BUSY_SECONDS = 2.0
#: Rounds over a disk until it must hold all.
_ROUNDS = 3
_EXPORT = "boot-fill-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Ranges of a disk that the repository cannot give."""

    target: str
    ranges: tuple[Extent, ...]

    def __str__(self) -> str:
        first = self.ranges[0]
        size = format_size(extents.total(self.ranges))
        return f"{size} of {self.target} (the first at offset {first.start}) are damaged in the repository"


class Gauge:
    """How far the disks are, over all attempts: what is asked for again is not counted again."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._most: dict[str, int] = {}
        self._now: dict[str, int] = {}

    def begin(self, target: str, total: int) -> None:
        """An attempt at a disk begins."""
        if target not in self._most:
            self._progress.start(target, total)
            self._most[target] = 0
        self._now[target] = 0

    def advance(self, target: str, length: int) -> None:
        """More of it."""
        self._now[target] += length
        more = self._now[target] - self._most[target]
        if more > 0:
            self._most[target] += more
            self._progress.advance(target, more)

    def finish(self, target: str) -> None:
        """It is whole."""
        if target not in self._most:
            self._progress.start(target, 0)
        self._progress.finish(target)


class Filler:
    """The disks of one machine."""

    def __init__(
        self,
        places: Sequence[Place],
        *,
        machine: str,
        directories: state.Directories,
        progress: Progress,
        limiter: repo.Limiter | None,
    ) -> None:
        self._places = places
        self._machine = machine
        self._directories = directories
        self._progress = progress
        self._gauge = Gauge(progress)
        self._limiter = limiter
        #: Disks that are whole.
        self.filled: set[str] = set()
        #: Bytes that were asked for, by disk.
        self.data: dict[str, int] = {}
        self.lost: dict[str, Lost] = {}

    def nodes(self) -> list[dict[str, object]]:
        """Block nodes of all disks that are not whole yet, lowest first, as the machine has them."""
        return [
            node
            for number, place in enumerate(self._places)
            if place.target not in self.filled
            for node in launching.nodes(place, number)
        ]

    async def fill(self, monitor: Monitor) -> None:
        """All disks, one after the other, in the QEMU (or storage daemon) that has them open.

        Afterwards each disk is `filled` or `lost`. Raises what goes wrong on the way; then call it again.
        """
        populating = Populating(monitor, self._directories, self._machine)
        for number, place in enumerate(self._places):
            if place.target in self.filled or place.target in self.lost:
                continue
            if not await populating.independent(launching.disk_node(number)):
                await self._disk(populating, place, number)
            else:
                self._done(place.target)

    async def _disk(self, populating: Populating, place: Place, number: int) -> None:
        id = f"{_EXPORT}{number}"
        overlay = await populating.expose(launching.disk_node(number), id)
        cancel = Cancel()
        try:
            lost = await blocking(partial(self._read, place, overlay, cancel), cancel=cancel)
        finally:
            await populating.withdraw(id)
        if lost:
            self.lost[place.target] = Lost(target=place.target, ranges=lost)
            return
        await self._detach(populating, place, number)
        self._done(place.target)

    def _done(self, target: str) -> None:
        self.filled.add(target)
        self._gauge.finish(target)

    async def _detach(self, populating: Populating, place: Place, number: int) -> None:
        """A job of somebody else on the disk (a backup) is waited for."""
        top = launching.format_node(place, number, backing=f"{launching.disk_node(number)}-nothing")
        told = False
        while True:
            try:
                return await populating.detach(top, below=launching.lower_nodes(place, number))
            except errors.RefusedError as error:
                if not told:
                    told = True
                    self._progress.note(f"{place.target} is filled; another job still holds it ({error.reason})")
            await asyncio.sleep(_BUSY_SECONDS)

    # -- in a thread ---------------------------------------------------------------------

    def _read(self, place: Place, overlay: NbdAddress, cancel: Cancel) -> tuple[Extent, ...]:
        """Have the overlay hold everything; gives what cannot be had."""
        assert place.point is not None
        opened = partial(NbdEndpoint, timeout=launching.PATIENCE_SECONDS, cancel=cancel)
        with opened(place.point) as source, opened(overlay, contexts=[ahead.DEPTH]) as own:
            total = extents.total(_data(source))
            self.data[place.target] = total
            self._gauge.begin(place.target, total)
            self._room(place, total)
            filling = ahead.Filling(
                own,
                cancel=cancel,
                advance=partial(self._gauge.advance, place.target),
                throttle=partial(self._throttle, cancel),
                full=self._full(place),
            )
            lost = filling.fill(_data(source))
            for _ in range(_ROUNDS):
                missing = extents.subtract(ahead.lacking(own, _data(source)), iter(lost))
                if next(missing, None) is None:
                    break
                lost = filling.fill(extents.subtract(ahead.lacking(own, _data(source)), iter(lost)))
            else:
                raise errors.EndpointFailed(
                    operation="filling", endpoint=place.target, offset=0, reason="QEMU does not keep what it reads"
                )
            with own.channel() as channel:
                channel.flush()
        return lost

    def _throttle(self, cancel: Cancel, length: int) -> None:
        if self._limiter is not None and not self._limiter.take(length, cancel.event):
            cancel.check()

    def _full(self, place: Place) -> Callable[[], None]:
        told: list[bool] = []

        def tell() -> None:
            if not told:
                told.append(True)
                self._progress.note(f"there is no room left at {place.image.parent}; filling waits for some")

        return tell

    def _room(self, place: Place, needed: int) -> None:
        free = scratch.free_bytes(place.image.parent)
        if free < needed:
            self._progress.note(
                f"{place.target} has {format_size(needed)} of data, and only {format_size(free)} are free at "
                f"{place.image.parent}"
            )


def _data(source: NbdEndpoint) -> Iterator[Extent]:
    """What of a served disk is not known to be zero."""
    return extents.data(source.extents(Extent(0, source.size)))
