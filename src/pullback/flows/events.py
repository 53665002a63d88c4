"""What happens on a machine, as a stream of events: jobs, snapshots, exports, checkpoints.

QEMU's own events reach only who is connected, and a monitor serves one client. So the machine is
looked at in turns, and what differs from the look before is told. That hears of everything, whoever
did it, a turn later at most; what begins and ends between two looks is not heard of.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from pullback import errors, state
from pullback.flows import checkpoints as checkpoint_flow
from pullback.flows import jobs, snapshots
from pullback.flows.jobs import Job, Stats
from pullback.flows.opening import on_machine
from pullback.machine import Machine
from pullback.model import urls
from pullback.state.history import EndedJob

#: A pull whose scratch takes more of a disk than this is told of once (as libvirt's block threshold).
THRESHOLD = 0.5


class Kind(enum.StrEnum):
    """What happened."""

    JOB_STARTED = "job-started"
    JOB_PROGRESS = "job-progress"
    #: A disk's scratch is larger than the threshold.
    JOB_THRESHOLD = "job-threshold"
    JOB_COMPLETED = "job-completed"
    JOB_FAILED = "job-failed"
    SNAPSHOT_CREATED = "snapshot-created"
    SNAPSHOT_DELETED = "snapshot-deleted"
    EXPORT_STARTED = "export-started"
    EXPORT_STOPPED = "export-stopped"
    CHECKPOINT_CREATED = "checkpoint-created"
    CHECKPOINT_DELETED = "checkpoint-deleted"
    #: Another command works on the machine, so nothing can be seen.
    BUSY = "busy"
    #: It does not answer any more. The last event.
    MACHINE_GONE = "machine-gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened."""

    kind: Kind
    #: When it was seen, UTC.
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    #: What it happened to: a job, a snapshot's, export's or checkpoint's name.
    subject: str
    #: More of it, as JSON values.
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A machine as it was seen."""

    job: Job | None = None
    stats: Stats | None = None
    ended: EndedJob | None = None
    snapshots: frozenset[str] = frozenset()
    #: Name -> URI.
    exports: Mapping[str, str] = field(default_factory=dict)
    checkpoints: frozenset[str] = frozenset()
    #: The machine's name; "" if nothing could be seen.
    machine: str = ""
    #: Who works on it, if that hindered us.
    busy: str | None = None


Look = Callable[[], Awaitable[Seen]]


async def look(machine: Machine, directories: state.Directories) -> Seen:
    """Look at an open machine."""
    try:
        job: Job | None = await jobs.info(machine)
        stats: Stats | None = await jobs.stats(machine)
    except errors.NoJob:
        job = stats = None
    tree = await checkpoint_flow.listing(machine, directories)
    return Seen(
        machine=machine.name,
        job=job,
        stats=stats,
        ended=jobs.last(machine, directories),
        snapshots=frozenset(one.name for one in await snapshots.listing(machine)),
        exports={served.name: served.uri for served in await machine.served()},
        checkpoints=frozenset(checkpoint.name for checkpoint in tree.checkpoints),
    )


def observing(url: urls.Machine, directories: state.Directories, name: str | None = None) -> Look:
    """Looks that hold neither the machine's lock nor its monitor in between: each opens it anew.

    As a keeper does, so who comes meanwhile waits for us instead of finding the machine busy.
    """

    async def again() -> Seen:
        try:
            return await on_machine(url, directories, look, command=state.KEEPER, name=name, anonymous=True)
        except errors.BusyError as error:
            return Seen(busy=error.holder)
        except errors.MonitorBusy:
            return Seen(busy="another client of its monitor")

    return again


async def running(look_again: Look, *, interval: float = 1.0, job: str | None = None) -> AsyncIterator[Seen]:
    """Looks at the job that is under way, as long as it is; the last one, after its end, has another job or none.

    Raises `NoJob` if none is under way at the first look, or if `job` is given, and neither is nor was the last.
    """
    begun = False
    while True:
        now = await look_again()
        if now.busy is None:
            there = now.job.job if now.job else None
            wanted = job or there
            known = {there, now.ended.job if now.ended else None}
            if wanted is None or not (begun or wanted in known):
                raise errors.NoJob(machine=now.machine)
            job, begun = wanted, True
            yield now
            if there != job:
                return
        await asyncio.sleep(interval)


async def follow(look_again: Look, *, interval: float = 1.0, threshold: float = THRESHOLD) -> AsyncIterator[Event]:
    """Events until the machine is gone, or the caller ends. What is there already is told as if it began now.

    Raises what keeps the first look from seeing the machine.
    """
    before: Seen | None = None
    told: set[tuple[str, str]] = set()
    while True:
        try:
            now = await look_again()
        except (errors.UnreachableError, errors.OutcomeUnknown, errors.NotQmp) as error:
            if before is None:  # it never was there
                raise
            yield Event(kind=Kind.MACHINE_GONE, subject="machine", facts={"reason": str(error)})
            return
        before = before or Seen()
        if now.busy is not None:
            if now.busy != before.busy:
                yield Event(kind=Kind.BUSY, subject="machine", facts={"holder": now.busy})
            before = replace(before, busy=now.busy)
        else:
            for event in differences(before, now, threshold=threshold, told=told):
                yield event
            before = now
        await asyncio.sleep(interval)


def differences(before: Seen, now: Seen, *, threshold: float, told: set[tuple[str, str]]) -> list[Event]:
    """What happened between two looks. Pure, but for `told`: the thresholds that were told of already."""
    found = [
        *_gone(Kind.EXPORT_STOPPED, before.exports, now.exports),
        *_gone(Kind.SNAPSHOT_DELETED, before.snapshots, now.snapshots),
        *_job(before, now),
        *_new(Kind.CHECKPOINT_CREATED, before.checkpoints, now.checkpoints),
        *_gone(Kind.CHECKPOINT_DELETED, before.checkpoints, now.checkpoints),
        *_new(Kind.SNAPSHOT_CREATED, before.snapshots, now.snapshots),
    ]
    started = [name for name in now.exports if name not in before.exports]
    found += [Event(kind=Kind.EXPORT_STARTED, subject=name, facts={"uri": now.exports[name]}) for name in started]
    return found + _thresholds(now, threshold, told)


def _new(kind: Kind, before: Iterable[str], now: Iterable[str]) -> list[Event]:
    return [Event(kind=kind, subject=name) for name in sorted(set(now) - set(before))]


def _gone(kind: Kind, before: Iterable[str], now: Iterable[str]) -> list[Event]:
    return [Event(kind=kind, subject=name) for name in sorted(set(before) - set(now))]


def _job(before: Seen, now: Seen) -> list[Event]:
    found = []
    if before.job is not None and (now.job is None or now.job.job != before.job.job):
        found.append(_ending(before.job, now.ended))
    if now.job is not None and (before.job is None or before.job.job != now.job.job):
        facts = {"mode": str(now.job.mode), "checkpoint": now.job.checkpoint}
        found.append(Event(kind=Kind.JOB_STARTED, subject=now.job.job, facts=facts))
    if now.job is not None and now.stats is not None and _moved(before.stats, now.stats):
        found.append(Event(kind=Kind.JOB_PROGRESS, subject=now.job.job, facts=_progress(now.stats)))
    return found


def _moved(before: Stats | None, now: Stats) -> bool:
    return before is None or before.job != now.job or before.disks != now.disks


def _ending(job: Job, ended: EndedJob | None) -> Event:
    if ended is None or ended.job != job.job:
        return Event(kind=Kind.JOB_FAILED, subject=job.job, facts={"error": "it ended and left no record"})
    kind = Kind.JOB_COMPLETED if ended.success else Kind.JOB_FAILED
    return Event(kind=kind, subject=job.job, facts={"error": ended.error, "checkpoint": ended.checkpoint})


def _progress(stats: Stats) -> dict[str, object]:
    return {
        "seconds": round(stats.seconds, 3),
        "disks": [
            {"target": disk.target, "status": disk.status, "done": disk.done, "total": disk.total}
            for disk in stats.disks
        ],
    }


def _thresholds(now: Seen, threshold: float, told: set[tuple[str, str]]) -> list[Event]:
    if now.stats is None or now.stats.mode != "pull":
        return []
    found = []
    for disk in now.stats.disks:
        key = (now.stats.job, disk.target)
        if disk.total and disk.done / disk.total > threshold and key not in told:
            told.add(key)
            facts: dict[str, object] = {"target": disk.target, "scratch": disk.done, "size": disk.total}
            found.append(Event(kind=Kind.JOB_THRESHOLD, subject=now.stats.job, facts=facts))
    return found
