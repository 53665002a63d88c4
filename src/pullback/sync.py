"""The public library without asyncio: the same calls on the same code, run in an event loop in a thread.

with pullback.sync.connect("qmp:/run/web01.sock") as machine:
    job = machine.backup_begin({"mode": "pull"})
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pullback.flows import given, library
from pullback.flows.checkpoints import Changes, Created, Deleted, Info
from pullback.flows.events import THRESHOLD, Event
from pullback.flows.exports import Access
from pullback.flows.jobs import Job, Stats
from pullback.flows.snapshots import How
from pullback.model.backups import Quiesce, Quiescing
from pullback.model.disks import Disk
from pullback.model.exports import Served
from pullback.model.snapshots import OpenSnapshot
from pullback.model.tree import Checkpoint, Tree
from pullback.state.history import EndedJob

T = TypeVar("T")
_ABSENT = Quiescing(wish=Quiesce.NO)


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pullback", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it there, and wait. Ctrl-C meanwhile cancels it; it is waited for until it has cleaned up."""
        told: concurrent.futures.Future[T] = concurrent.futures.Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(partial(_tell, told))

        self._loop.call_soon_threadsafe(begin)
        try:
            return told.result()
        except KeyboardInterrupt:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            _settled(told)
            raise

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _tell(told: concurrent.futures.Future[T], task: asyncio.Task[T]) -> None:
    """What became of a task, for the thread that waits."""
    if task.cancelled():
        told.set_exception(asyncio.CancelledError())
    elif (error := task.exception()) is not None:
        told.set_exception(error)
    else:
        told.set_result(task.result())


def _settled(told: concurrent.futures.Future[Any]) -> None:
    """Wait for its end; a second Ctrl-C does not cut the cleaning short, which has deadlines of its own."""
    while not told.done():
        with suppress(KeyboardInterrupt):
            concurrent.futures.wait([told])


@contextmanager
def connect(
    uri: str, *, name: str | None = None, state_dir: Path | None = None, command: str = "a program"
) -> Iterator[Machine]:
    """As `pullback.connect`."""
    loop = _Loop()
    try:
        opening = library.connect(uri, name=name, state_dir=state_dir, command=command)
        opened = loop.run(opening.__aenter__())
        try:
            yield Machine(loop, opened)
        except BaseException as error:
            if not loop.run(opening.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            loop.run(opening.__aexit__(None, None, None))
    finally:
        loop.close()


def watch(
    uri: str,
    *,
    name: str | None = None,
    state_dir: Path | None = None,
    interval: float = 1.0,
    threshold: float = THRESHOLD,
) -> Generator[Event, None, None]:
    """As `pullback.watch`; closing it ends the watching."""
    loop = _Loop()
    try:
        stream = library.watch(uri, name=name, state_dir=state_dir, interval=interval, threshold=threshold)
        yield from _events(loop, stream)
    finally:
        loop.close()


class Machine:
    """A machine that is open: `pullback.Machine`, call by call. Made by `connect`."""

    def __init__(self, loop: _Loop, machine: library.Machine) -> None:
        self._loop = loop
        self._machine = machine

    @property
    def name(self) -> str:
        """Its identity."""
        return self._machine.name

    @property
    def version(self) -> str:
        """Its hypervisor's version, for people."""
        return self._machine.version

    def disks(self) -> tuple[Disk, ...]:
        """See the asynchronous call."""
        return self._loop.run(self._machine.disks())

    def info(self) -> dict[str, object]:
        """See the asynchronous call."""
        return self._loop.run(self._machine.info())

    def checkpoint_create(self, document: given.Checkpoint | None = None, *, quiescing: Quiescing = _ABSENT) -> Created:
        """See the asynchronous call."""
        return self._loop.run(self._machine.checkpoint_create(document, quiescing=quiescing))

    def checkpoint_list(self, *, sizes: bool = False) -> Tree:
        """See the asynchronous call."""
        return self._loop.run(self._machine.checkpoint_list(sizes=sizes))

    def checkpoint_info(self, name: str, *, sizes: bool = False) -> Info:
        """See the asynchronous call."""
        return self._loop.run(self._machine.checkpoint_info(name, sizes=sizes))

    def checkpoint_current(self) -> Checkpoint:
        """See the asynchronous call."""
        return self._loop.run(self._machine.checkpoint_current())

    def checkpoint_parent(self, name: str) -> Checkpoint:
        """See the asynchronous call."""
        return self._loop.run(self._machine.checkpoint_parent(name))

    def checkpoint_delete(
        self, name: str, *, children: bool = False, children_only: bool = False, metadata_only: bool = False
    ) -> Deleted:
        """See the asynchronous call."""
        return self._loop.run(
            self._machine.checkpoint_delete(
                name, children=children, children_only=children_only, metadata_only=metadata_only
            )
        )

    def checkpoint_redefine(self, document: given.Checkpoint, *, validate: bool = True) -> Info:
        """See the asynchronous call."""
        return self._loop.run(self._machine.checkpoint_redefine(document, validate=validate))

    def changes(self, target: str, *, since: str, until: str | None = None) -> Changes:
        """See the asynchronous call."""
        return self._loop.run(self._machine.changes(target, since=since, until=until))

    def snapshot_create(
        self,
        document: given.Snapshot | None = None,
        checkpoint: given.Checkpoint | None = None,
        *,
        how: How | None = None,
        name: str | None = None,
    ) -> OpenSnapshot:
        """See the asynchronous call."""
        return self._loop.run(self._machine.snapshot_create(document, checkpoint, how=how, name=name))

    def snapshot_list(self) -> tuple[OpenSnapshot, ...]:
        """See the asynchronous call."""
        return self._loop.run(self._machine.snapshot_list())

    def snapshot_info(self, name: str) -> OpenSnapshot:
        """See the asynchronous call."""
        return self._loop.run(self._machine.snapshot_info(name))

    def snapshot_delete(self, name: str) -> OpenSnapshot:
        """See the asynchronous call."""
        return self._loop.run(self._machine.snapshot_delete(name))

    def export_start(self, document: given.Export, *, access: Access | None = None) -> tuple[Served, ...]:
        """See the asynchronous call."""
        return self._loop.run(self._machine.export_start(document, access=access))

    def export_list(self) -> tuple[Served, ...]:
        """See the asynchronous call."""
        return self._loop.run(self._machine.export_list())

    def export_stop(self, names: Sequence[str] = ()) -> tuple[Served, ...]:
        """See the asynchronous call."""
        return self._loop.run(self._machine.export_stop(names))

    def backup_begin(
        self,
        backup: given.Backup,
        checkpoint: given.Checkpoint | None = None,
        *,
        how: How | None = None,
        access: Access | None = None,
        reuse: bool = False,
        speed: int | None = None,
    ) -> Job:
        """See the asynchronous call."""
        return self._loop.run(
            self._machine.backup_begin(backup, checkpoint, how=how, access=access, reuse=reuse, speed=speed)
        )

    def backup_info(self) -> Job:
        """See the asynchronous call."""
        return self._loop.run(self._machine.backup_info())

    def backup_stats(self) -> Stats:
        """See the asynchronous call."""
        return self._loop.run(self._machine.backup_stats())

    def backup_last(self) -> EndedJob | None:
        """See the asynchronous call."""
        return self._loop.run(self._machine.backup_last())

    def backup_wait(self, *, job: str | None = None, timeout: float | None = None) -> EndedJob | None:
        """See the asynchronous call."""
        return self._loop.run(self._machine.backup_wait(job=job, timeout=timeout))

    def backup_end(self, *, job: str | None = None) -> EndedJob:
        """See the asynchronous call."""
        return self._loop.run(self._machine.backup_end(job=job))

    def backup_abort(self) -> EndedJob:
        """See the asynchronous call."""
        return self._loop.run(self._machine.backup_abort())

    def backup_set_speed(self, speed: int | None) -> None:
        """See the asynchronous call."""
        self._loop.run(self._machine.backup_set_speed(speed))

    def backup_pause(self) -> None:
        """See the asynchronous call."""
        self._loop.run(self._machine.backup_pause())

    def backup_resume(self) -> None:
        """See the asynchronous call."""
        self._loop.run(self._machine.backup_resume())

    def events(self, *, interval: float = 1.0, threshold: float = THRESHOLD) -> Iterator[Event]:
        """See the asynchronous call."""
        yield from _events(self._loop, self._machine.events(interval=interval, threshold=threshold))


def _events(loop: _Loop, stream: AsyncIterator[Event]) -> Iterator[Event]:
    try:
        while (event := loop.run(_next(stream))) is not None:
            yield event
    finally:
        loop.run(_closed(stream))


async def _closed(stream: AsyncIterator[Event]) -> None:
    if isinstance(stream, AsyncGenerator):
        await stream.aclose()


async def _next(stream: AsyncIterator[Event]) -> Event | None:
    return await anext(stream, None)
