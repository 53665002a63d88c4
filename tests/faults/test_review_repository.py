"""What a review of the repository in restic's format found: each of these went wrong once."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import smallrepo
import stored
from pullback import errors, repo, state
from pullback.flows import backup as flow
from pullback.flows import restore, threads
from pullback.model import points, urls
from pullback.model.points import Point
from pullback.progress import Silent
from pullback.repo import Kind
from pullback.repo.restic import keys
from pullback.repo.restic.repository import new_key
from pullback.testing.stores import WrappedStore
from pullback.units import MiB


@dataclass
class Notes(Silent):
    """What was said."""

    said: list[str] = field(default_factory=list)

    def note(self, message: str) -> None:
        """Keep it."""
        self.said.append(message)


def again(found: stored.Stored) -> flow.Report:
    """Another restore point of the same disk."""
    request = flow.Request(
        machine=urls.machine(f"images:vda=raw:{found.directory}/vda.img"),
        repository=found.place,
        access=found.access,
        name="web01",
        directories=state.directories(found.directory / "state"),
    )
    return asyncio.run(flow.backup(request))


def junk(found: stored.Stored, kind: str, count: int) -> None:
    """Files that a server may put there, which has no key."""
    for number in range(count):
        (found.directory / "repo" / kind / f"{number:064x}").write_bytes(b"junk")


def test_whoever_asks_for_the_latest_hears_of_those_that_cannot_be_read(tmp_path: Path) -> None:
    found = stored.store(tmp_path, "restic", {"vda": stored.content_of(2 * MiB, 1)})
    newest = again(found).point.id
    path = tmp_path / "repo" / "snapshots" / newest
    path.chmod(0o600)
    path.write_bytes(b"no snapshot")
    (found.access.caches / repository_id(found) / "snapshots" / newest).unlink(missing_ok=True)
    notes = Notes()
    request = restore.Request(repository=found.place, access=found.access, to=tmp_path / "out")
    report = asyncio.run(restore.restore(request, notes))
    assert report.point.id != newest
    assert any(newest in said and "may be newer" in said for said in notes.said)
    notes.said.clear()
    named = restore.Request(repository=found.place, access=found.access, to=tmp_path / "two", point=report.point.id[:8])
    asyncio.run(restore.restore(named, notes))
    assert notes.said == []


def repository_id(found: stored.Stored) -> str:
    """All of it."""
    assert isinstance(found.place, urls.ResticRepository)
    with (
        repo.open_store(found.place.location, environ={}) as store,
        repo.open_repository(store, lambda: "secret", caches=found.access.caches) as repository,
    ):
        return repository.config.id


def test_any_number_of_damaged_files_keeps_nobody_from_making_backups(tmp_path: Path) -> None:
    found = stored.store(tmp_path, "restic", {"vda": stored.content_of(MiB, 1)})
    junk(found, "snapshots", points.MAX_NOTES + 1)
    junk(found, "index", points.MAX_NOTES + 1)
    notes = again(found).point.notes
    assert len(notes) < 100
    assert any(note.endswith("more restore points are damaged") for note in notes)
    assert any(note.endswith("more files of the repository cannot be used") for note in notes)


def test_a_backup_clears_away_what_is_of_no_use_any_more(tmp_path: Path) -> None:
    found = stored.store(tmp_path, "restic", {"vda": stored.content_of(MiB, 1)})
    name = "ab" * 32
    left = tmp_path / "repo" / "data" / "ab" / f"{name}-tmp-pullback-0123456789abcdef"
    cached = found.access.caches / repository_id(found) / "points" / name
    for path in (left, cached):
        path.write_bytes(b"left")
        os.utime(path, (time.time() - 2 * 86_400,) * 2)
    again(found)
    assert not left.exists()
    assert not cached.exists()


# -- keys, locks and waiting -----------------------------------------------------------------


@pytest.fixture(name="small")
def new_small(tmp_path: Path) -> Iterator[smallrepo.Small]:
    """A small repository in memory."""
    with smallrepo.small():
        yield smallrepo.make(tmp_path)


def test_one_key_that_cannot_be_read_keeps_nobody_with_another_one_out(small: smallrepo.Small, tmp_path: Path) -> None:
    [mine] = [stored.name for stored in small.store.list(Kind.KEYS)]
    with smallrepo.opened(small.store, tmp_path) as repository:
        other, data = new_key("other", repository.key, keys.Cost(2, 8, 1))
    small.store.write(Kind.KEYS, other, data)
    damaged = errors.ObjectDamaged(store="it", name=f"keys/{other}", problem="as was asked for")

    def before(operation: str, kind: Kind, name: str) -> None:
        if (operation, kind, name) == ("read", Kind.KEYS, other):
            raise damaged

    store = WrappedStore(small.store, before)
    with repo.open_repository(store, lambda: smallrepo.PASSWORD, caches=tmp_path) as repository:
        assert repository.key_name == mine
    with pytest.raises(errors.ObjectDamaged) as caught:  # it may be the one
        repo.open_repository(store, lambda: "other", caches=tmp_path)
    assert caught.value is damaged


@dataclass
class Doubt:
    """Once the first point of the run is visible, our lock cannot be asked for; and what is asked for fails."""

    failing: frozenset[str] = frozenset()
    on: bool = False
    asked: int = 0

    def before(self, operation: str, kind: Kind, name: str) -> None:
        """Strike."""
        if not self.on:
            return
        if (operation, kind) == ("list", Kind.LOCKS):
            self.asked += 1
            if self.asked == 1:
                raise errors.StoreFailed(store="it", what="listing locks", reason="as was asked for")
        if f"{operation} {kind}" in self.failing:
            raise errors.StoreFailed(store="it", what=f"{operation} {kind}", reason="and this too")


def doubted(small: smallrepo.Small, caches: Path, doubt: Doubt) -> Point:
    """A backup after whose end nobody knows whether our lock was there."""

    class Switching(WrappedStore):
        def write(self, kind: Kind, name: str, data: bytes | bytearray | memoryview, *, new: bool = False) -> None:
            super().write(kind, name, data, new=new)
            doubt.on = doubt.on or kind is Kind.SNAPSHOTS

    store = Switching(small.store, doubt.before)
    with repo.open_repository(store, lambda: smallrepo.PASSWORD, caches=caches) as repository:
        content = {
            "vda": smallrepo.content_of("vda", (5, 5, 5, 5, 5)),
            "vdb": smallrepo.content_of("vdb", (5, 5, 5, 5)),
        }
        return smallrepo.backup(repository, content, small.contents, 9)


def test_who_cannot_ask_for_the_lock_when_the_point_is_visible_proves_it(
    small: smallrepo.Small, tmp_path: Path
) -> None:
    doubt = Doubt()
    point = doubted(small, tmp_path, doubt)
    assert doubt.asked > 1, "a new lock was taken"
    with smallrepo.opened(small.store, tmp_path) as repository:
        assert repository.listing(smallrepo.MACHINE).points[-1].id == point.id


def test_a_point_that_is_not_proven_goes_and_if_it_cannot_go_that_is_told_besides(
    small: smallrepo.Small, tmp_path: Path
) -> None:
    before = {stored.name for stored in small.store.list(Kind.SNAPSHOTS)}
    with pytest.raises(errors.StoreFailed, match="list index"):
        doubted(small, tmp_path, Doubt(frozenset({"list index"})))
    assert {stored.name for stored in small.store.list(Kind.SNAPSHOTS)} == before
    with pytest.raises(errors.StoreFailed, match="list index") as caught:
        doubted(small, tmp_path, Doubt(frozenset({"list index", "delete snapshots"})))
    [left] = {stored.name for stored in small.store.list(Kind.SNAPSHOTS)} - before
    assert any(left[:8] in note and "visible all the same" in note for note in caught.value.__notes__)


def test_who_is_cancelled_while_something_is_entered_makes_that_short() -> None:
    waiting, hurried = threading.Event(), threading.Event()

    @contextmanager
    def slow() -> Iterator[None]:
        waiting.set()
        assert hurried.wait(30)
        yield

    async def work() -> None:
        async with threads.entered(slow(), hurry=hurried.set):
            raise AssertionError("it went on")

    async def cancelled() -> None:
        task = asyncio.create_task(work())
        await asyncio.to_thread(waiting.wait, 30)
        task.cancel()
        await task

    begun = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    assert time.monotonic() - begun < 10
