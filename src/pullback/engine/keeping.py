"""The keeper's own process (see `keeper`): it looks, and lets go of what must not stay."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from pullback import errors, state
from pullback.engine import ending, keeper, opened, qemu, recovery
from pullback.engine.monitor import process_lives
from pullback.model.snapshots import Kind, OpenSnapshot

_LOOK_SECONDS = 0.5
#: So often is scratch asked for an answer, and a push for its end.
_ASK_SECONDS = 2.0


async def _watch(path: Path, directories: state.Directories) -> None:
    """Until the job is over."""
    asked = 0.0
    hung: str | None = None
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        job = state.load_job(path)
        snapshot = None if job is None else opened.parsed(job)
        if job is None or snapshot is None:
            return
        if not process_lives(job.record.qemu):
            await _patiently(partial(_forget, job, directories))
            return
        reason = opened.trouble(snapshot)
        if loop.time() - asked > _ASK_SECONDS or reason is not None or job.record.ends:
            asked = loop.time()
            silent = await opened.unanswering(snapshot)
            hung = hung or silent  # it may be broken, so it goes when scratch answers again
            if silent is None:
                with suppress(errors.PullbackError):
                    await _act(job, snapshot, hung or reason, directories)


async def _act(job: state.Job, snapshot: OpenSnapshot, reason: str | None, directories: state.Directories) -> None:
    """What is to be done now, if anything is. Connecting alone goes on with what was cut short."""
    if reason is None and not job.record.ends and snapshot.kind is not Kind.PUSH:
        return
    socket, name = Path(job.record.socket), job.record.machine
    async with qemu.connect(socket, directories, command=state.KEEPER, name=name) as machine:
        if reason is not None:
            await machine.fail_snapshot(snapshot, reason)
        elif snapshot.kind is Kind.PUSH:
            await machine.settle_push(snapshot)


async def _patiently(work: Callable[[], None]) -> None:
    """Do it when the machine's lock is free."""
    while True:
        try:
            work()
            return
        except errors.BusyError:
            await asyncio.sleep(_LOOK_SECONDS)


def _forget(job: state.Job, directories: state.Directories) -> None:
    machine = job.record.machine
    with state.lock(directories, f"machine {machine}", command=state.KEEPER, title=machine):
        again = state.load_job(job.path)
        if again is not None and again.record.qemu == job.record.qemu:
            recovery.forget(again)


def main(record: Path) -> None:
    """Watch until the job is over. Signals of the user's terminal do not end it. One keeper a job."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the guard that we were ignored it
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    _close_streams()
    os.chdir("/")
    job = state.load_job(record)
    if job is None:
        return
    with open(keeper.lock_path(record), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        asyncio.run(_watch(record, ending.places(job)))
    if not record.exists():  # it was removed while we began
        keeper.lock_path(record).unlink(missing_ok=True)


def _close_streams() -> None:
    """Nobody reads what we say, and a pipe held open would keep its reader waiting."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
