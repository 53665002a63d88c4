"""What a review of the repository in restic's format found: each of these went wrong once."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import stored
from pullback import repo, state
from pullback.flows import backup as flow
from pullback.flows import restore
from pullback.model import points, urls
from pullback.progress import Silent
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
