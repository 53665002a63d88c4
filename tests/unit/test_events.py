"""What happened between two looks at a machine, with values alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from pullback import errors
from pullback.flows import events
from pullback.flows.events import Event, Kind, Seen
from pullback.flows.jobs import DiskStats, Job, Stats
from pullback.model.documents.backup import BackupDocument, Mode
from pullback.state.history import EndedJob

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def job(id: str = "aaaaaaaa", mode: Mode = Mode.PULL) -> Job:
    """A job."""
    return Job(
        job=id, machine="web01", mode=mode, moment=NOW, pause=0, frozen_seconds=0,
        document=BackupDocument(mode=mode), checkpoint="monday", exports=(), engines={},
    )  # fmt: skip


def stats(done: int, id: str = "aaaaaaaa", mode: Mode = Mode.PULL, seconds: float = 1) -> Stats:
    """How far it is, of 100 bytes."""
    status = "serving" if mode is Mode.PULL else "running" if done < 100 else "concluded"
    disk = DiskStats(target="vda", status=status, done=done, total=100)
    return Stats(job=id, mode=mode, seconds=seconds, disks=(disk,))


def ended(id: str = "aaaaaaaa", error: str | None = None) -> EndedJob:
    """How it ended."""
    return EndedJob(
        job=id, mode="pull", success=error is None, error=error, began="", ended="", checkpoint="monday",
        document={}, disks={},
    )  # fmt: skip


def told(before: Seen, now: Seen, known: set[tuple[str, str]] | None = None) -> list[tuple[str, str]]:
    """Kinds and subjects."""
    found = events.differences(before, now, threshold=0.5, told=set() if known is None else known)
    return [(event.kind, event.subject) for event in found]


def test_nothing_happens_while_nothing_differs() -> None:
    seen = Seen(job=job(), stats=stats(7), snapshots=frozenset({"s"}), exports={"e": "nbd://"}, ended=ended("bbbbbbbb"))
    later = replace(seen, stats=stats(7, seconds=99), job=job())
    assert told(seen, later) == []


def test_what_comes_and_goes_is_told_by_name_what_goes_first() -> None:
    before = Seen(snapshots=frozenset({"s1"}), exports={"e1": "nbd://1"}, checkpoints=frozenset({"c1"}))
    now = Seen(snapshots=frozenset({"s3", "s2"}), exports={"e2": "nbd://2"}, checkpoints=frozenset({"c2"}))
    assert told(before, now) == [
        (Kind.EXPORT_STOPPED, "e1"),
        (Kind.SNAPSHOT_DELETED, "s1"),
        (Kind.CHECKPOINT_CREATED, "c2"),
        (Kind.CHECKPOINT_DELETED, "c1"),
        (Kind.SNAPSHOT_CREATED, "s2"),
        (Kind.SNAPSHOT_CREATED, "s3"),
        (Kind.EXPORT_STARTED, "e2"),
    ]
    [*_, started] = events.differences(before, now, threshold=0.5, told=set())
    assert started.facts == {"uri": "nbd://2"}


def test_an_export_that_moved_is_no_event() -> None:
    assert told(Seen(exports={"e": "nbd://1"}), Seen(exports={"e": "nbd://2"})) == []


def test_a_job_begins_moves_and_ends() -> None:
    push = Mode.PUSH
    begun = Seen(job=job(mode=push), stats=stats(0, mode=push))
    moved = replace(begun, stats=stats(60, mode=push))
    assert told(Seen(), begun) == [(Kind.JOB_STARTED, "aaaaaaaa"), (Kind.JOB_PROGRESS, "aaaaaaaa")]
    assert told(begun, moved) == [(Kind.JOB_PROGRESS, "aaaaaaaa")]
    assert told(moved, Seen(ended=ended())) == [(Kind.JOB_COMPLETED, "aaaaaaaa")]


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (ended(error="it was aborted"), "it was aborted"),
        (ended("bbbbbbbb"), "it ended and left no record"),
        (None, "it ended and left no record"),
    ],
)
def test_a_job_that_failed_says_why(record: EndedJob | None, error: str) -> None:
    [event] = events.differences(Seen(job=job()), Seen(ended=record), threshold=0.5, told=set())
    assert (event.kind, event.facts["error"]) == (Kind.JOB_FAILED, error)


def test_one_job_after_another_are_two() -> None:
    second = Seen(job=job("bbbbbbbb"), stats=stats(0, "bbbbbbbb"), ended=ended())
    assert told(Seen(job=job(), stats=stats(0)), second) == [
        (Kind.JOB_COMPLETED, "aaaaaaaa"),
        (Kind.JOB_STARTED, "bbbbbbbb"),
        (Kind.JOB_PROGRESS, "bbbbbbbb"),
    ]


def test_a_threshold_is_told_once_for_each_disk_of_each_pull() -> None:
    known: set[tuple[str, str]] = set()
    half, more = Seen(job=job(), stats=stats(50)), Seen(job=job(), stats=stats(51))
    assert (Kind.JOB_THRESHOLD, "aaaaaaaa") not in told(Seen(), half, known)
    assert (Kind.JOB_THRESHOLD, "aaaaaaaa") in told(half, more, known)
    assert told(more, more, known) == []
    again = Seen(job=job("bbbbbbbb"), stats=stats(99, "bbbbbbbb"), ended=ended())
    assert (Kind.JOB_THRESHOLD, "bbbbbbbb") in told(more, again, known)
    push = Seen(job=job("cccccccc", Mode.PUSH), stats=stats(99, "cccccccc", Mode.PUSH), ended=ended("bbbbbbbb"))
    assert (Kind.JOB_THRESHOLD, "cccccccc") not in told(again, push, known)


# -- looking again and again -----------------------------------------------------------------


def looks(script: Sequence[Seen | errors.PullbackError]) -> events.Look:
    """Looks that see one after the other."""
    left = list(script)

    async def look() -> Seen:
        found = left.pop(0)
        if isinstance(found, errors.PullbackError):
            raise found
        return found

    return look


GONE = errors.UnreachableError(socket="/run/x", reason="No such file or directory")


def followed(*script: Seen | errors.PullbackError) -> list[tuple[str, str]]:
    """The events of looks, until the machine is gone."""

    async def all_of() -> list[Event]:
        return [event async for event in events.follow(looks(script), interval=0)]

    return [(event.kind, event.subject) for event in asyncio.run(all_of())]


def test_busy_is_told_once_and_hides_nothing() -> None:
    one, two = Seen(snapshots=frozenset({"s"})), Seen(snapshots=frozenset({"s", "t"}))
    busy = Seen(busy="backup, process 1")
    assert followed(one, busy, busy, two, busy, GONE) == [
        (Kind.SNAPSHOT_CREATED, "s"),
        (Kind.BUSY, "machine"),
        (Kind.SNAPSHOT_CREATED, "t"),
        (Kind.BUSY, "machine"),
        (Kind.MACHINE_GONE, "machine"),
    ]


def test_a_machine_that_never_was_there_is_an_error() -> None:
    with pytest.raises(errors.UnreachableError):
        followed(GONE)


def seen_of_job(*script: Seen, wanted: str | None = None) -> list[str | None]:
    """The jobs of looks at one that is under way."""

    async def all_of() -> list[Seen]:
        return [seen async for seen in events.running(looks(script), interval=0, job=wanted)]

    return [seen.job.job if seen.job else None for seen in asyncio.run(all_of())]


def test_a_job_is_looked_at_until_it_is_over() -> None:
    under_way, busy = Seen(job=job(), stats=stats(1)), Seen(busy="somebody")
    assert seen_of_job(busy, under_way, busy, under_way, Seen(ended=ended())) == ["aaaaaaaa", "aaaaaaaa", None]
    assert seen_of_job(under_way, Seen(job=job("bbbbbbbb"))) == ["aaaaaaaa", "bbbbbbbb"]
    assert seen_of_job(under_way, Seen(), wanted="aaaaaaaa") == ["aaaaaaaa", None]
    assert seen_of_job(Seen(ended=ended()), wanted="aaaaaaaa") == [None]


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [(Seen(), None), (Seen(ended=ended()), None), (Seen(ended=ended("bbbbbbbb")), "aaaaaaaa"), (Seen(job=job()), "b")],
)
def test_a_job_that_is_not_there_cannot_be_looked_at(seen: Seen, wanted: str | None) -> None:
    with pytest.raises(errors.NoJob):
        seen_of_job(seen, wanted=wanted)
