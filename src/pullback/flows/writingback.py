"""The second half of a rollback: disks are held, what is staged is written, and the journal says how far it is.

The first half of it can fail and is undone by the machine (`Machine.hold`). From the moment when the journal says
"writing", a failure leaves the disks out of everybody's reach, and the command that finishes is told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pullback import errors
from pullback.engine.pause import uninterrupted
from pullback.flows import staging
from pullback.flows.threads import blocking
from pullback.machine import Held, Machine
from pullback.model.rollbacks import After, HeldDisk, HoldRequest, Journal, JournalDisk, Phase
from pullback.progress import Cancel
from pullback.state import rollbacks
from pullback.transfer import NbdEndpoint

#: Finds what differs and stages it, while the disks are held.
Collect = Callable[[Held], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskReport:
    """What was done with a disk. Sizes in bytes."""

    target: str
    size: int
    #: What differs was known by bitmaps, and not by reading the whole disk.
    by_bitmaps: bool
    reason: str | None
    #: In chunks that were written.
    changed: int
    #: Written as data, and as zeroes.
    data: int
    zeroes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the machine."""

    after: After
    disks: tuple[DiskReport, ...]
    #: Seconds from the stop to the end.
    down: float
    notes: tuple[str, ...]


@contextmanager
def opened(held: HeldDisk, cancel: Cancel) -> Iterator[NbdEndpoint]:
    """A disk that is held, for reading and writing. Blocking."""
    contexts = [held.changes] if held.changes is not None else []
    name = f"disk {held.disk.target}"
    with NbdEndpoint(held.address, contexts=contexts, writable=True, name=name, cancel=cancel) as endpoint:
        yield endpoint


class Work:
    """Writing back the disks of one machine. Owned by the event loop's thread."""

    def __init__(
        self,
        *,
        machine: Machine,
        base: Path,
        journal: Journal,
        disks: Sequence[staging.Returning],
        pace: staging.Report,
        how: Sequence[str | None],
    ) -> None:
        """`base`: the state directory; `how`: why a disk is compared whole, None where bitmaps tell."""
        self.disks = disks
        self._machine = machine
        self._base = base
        self._journal = journal
        self._pace = pace
        self._how = how

    def forget_done(self) -> None:
        """What was written before may have been overwritten since."""
        entries = tuple(replace(entry, done=False) for entry in self._journal.disks)
        self._journal = replace(self._journal, disks=entries)

    async def run(self, request: HoldRequest, collect: Collect) -> Outcome:
        """Hold the disks, collect, write, give back. Raises `RollbackUnfinished` once something may be written."""
        begun = time.monotonic()
        async with self._machine.hold(request) as held:
            await collect(held)
            written = await self._write(held)
            await held.give_back()
            await uninterrupted(asyncio.to_thread(self._save, Phase.OVER))
            after = await held.conclude()
            down = time.monotonic() - begun
            await asyncio.to_thread(rollbacks.remove, self._base, self._journal)  # large files take their time
        notes = [f"somebody continued the machine {held.disturbed} time(s) meanwhile; it was reset again"]
        return Outcome(after=after, disks=written, down=down, notes=tuple(notes if held.disturbed else ()))

    async def _write(self, held: Held) -> tuple[DiskReport, ...]:
        if not any(1 in disk.wanted for disk in self.disks):
            return tuple(self._report(index, staging.Written(data=0, zeroes=0)) for index in range(len(self.disks)))
        # Not cut in the middle: whoever undoes what was not begun must know whether it was.
        await uninterrupted(asyncio.to_thread(self._begin, held))
        try:
            done = [await self._disk(index, held) for index in range(len(self.disks))]
            await uninterrupted(asyncio.to_thread(self._save, Phase.WRITTEN))
        except asyncio.CancelledError as error:
            error.add_note(str(self._unfinished("it was interrupted")))
            error.add_note(f"To finish it: {self._journal.command}")
            raise
        except errors.PullbackError as error:
            raise self._unfinished(str(error).rstrip(".")) from error
        return tuple(done)

    def _begin(self, held: Held) -> None:
        """The point of no return, durable when it returns."""
        entries = []
        for entry, disk, one in zip(self._journal.disks, self.disks, held.disks, strict=True):
            staging.keep(disk, entry)
            files = [found for path in one.files if (found := rollbacks.identity(path)) is not None]
            entries.append(replace(entry, files=tuple(files)))
        self._journal = replace(self._journal, qemu=held.process)
        self._save(Phase.WRITING, entries)

    def _save(self, phase: Phase, entries: Sequence[JournalDisk] | None = None) -> None:
        disks = tuple(entries) if entries is not None else self._journal.disks
        self._journal = replace(self._journal, phase=phase, disks=disks)
        rollbacks.save(self._base, self._journal)

    async def _disk(self, index: int, held: Held) -> DiskReport:
        """Write one disk, and read back what was written."""
        if self._journal.disks[index].done:
            return self._report(index, staging.Written(data=0, zeroes=0))
        work = partial(self._write_and_check, index, held.disks[index])
        written = await blocking(work, cancel=self._pace.cancel, beside=held.watch())
        entries = list(self._journal.disks)
        entries[index] = replace(entries[index], done=True)
        await uninterrupted(asyncio.to_thread(self._save, Phase.WRITING, entries))
        return self._report(index, written)

    def _write_and_check(self, index: int, held: HeldDisk) -> staging.Written:
        disk = self.disks[index]
        with opened(held, self._pace.cancel) as live:
            written = staging.write(disk, live, self._pace)
            staging.check(disk, live, self._pace)
        return written

    def _report(self, index: int, written: staging.Written) -> DiskReport:
        disk, reason = self.disks[index], self._how[index]
        return DiskReport(
            target=disk.target,
            size=disk.size,
            by_bitmaps=reason is None,
            reason=reason,
            changed=disk.bytes_of(disk.wanted),
            data=written.data,
            zeroes=written.zeroes,
        )

    def _unfinished(self, reason: str) -> errors.RollbackUnfinished:
        journal = self._journal
        return errors.RollbackUnfinished(
            machine=journal.machine, point=journal.point, reason=reason, command=journal.command
        )
