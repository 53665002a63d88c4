"""Forgetting, copying, keys and locks: by the real restic, on repositories that we write."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import kit
import made
from kit import MakeBox
from pullback import errors
from pullback.flows import copying, keys, repositories, restore, retention, verify
from pullback.flows.repositories import Access
from pullback.model import urls
from pullback.model.points import Mode
from pullback.model.retention import Keep
from pullback.programs import restic
from pullback.repo.restic import lockfile, times, unpacked
from pullback.repo.store import Kind
from pullback.units import MiB

DAY = datetime(2026, 11, 20, 6, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty repository."""
    return made.empty(tmp_path / "repo")


def forget(path: Path, **wish: Any) -> retention.Report:
    """Forget in the repository."""
    request = retention.Request(repository=made.place(path), access=kit.access_of(path.parent), **wish)
    return asyncio.run(retention.forget(request))


def ids(path: Path, machine: str = "web01") -> list[str]:
    """The points of a machine, oldest first."""
    with made.opened(path) as repository:
        return [point.id for point in repository.listing(machine).points]


def files(path: Path) -> dict[str, int]:
    """All files of a repository, with their sizes."""
    return {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}


def program(path: Path, password: str = kit.PASSWORD) -> restic.Restic:
    """restic itself."""
    environ = {"PATH": os.environ["PATH"], "RESTIC_CACHE_DIR": str(path.parent / "restic")}
    return restic.Restic(restic.Access(url=str(path), password=password), environ)


# -- forget ----------------------------------------------------------------------------------


def test_a_rule_holds_for_each_machine_and_touches_nothing_else(path: Path) -> None:
    web = [made.point(path, "web01", DAY + step * 9 * HOUR) for step in range(4)]
    db = made.point(path, "db01", DAY)
    (path.parent / "file").write_text("theirs")
    for _ in range(2):
        program(path).run("backup", "--host=web01", "--tag=pullback", str(path.parent / "file"), timeout=60)
    before = files(path)
    plan = forget(path, keep=Keep(daily=2), prune=True, dry_run=True)
    assert files(path) == before
    report = forget(path, keep=Keep(daily=2), prune=True)
    assert report.removed == plan.removed == (web[0], web[2])
    assert [group.machine for group in report.groups] == ["db01", "web01"]
    assert [point.reasons for point in report.groups[1].kept] == [("daily snapshot",), ("daily snapshot",)]
    assert ids(path) == [web[1], web[3]]
    assert ids(path, "db01") == [db]
    assert report.freed == sum(before.values()) - sum(files(path).values()) > 0
    assert plan.freed
    assert len(program(path).run_json("snapshots", "--path", str(path.parent / "file"), timeout=60)) == 2
    checked = verify.Request(repository=made.place(path), access=kit.access_of(path.parent), all=True, read_data=True)
    assert asyncio.run(verify.verify(checked)).damaged == ()


def test_the_newest_point_of_a_machine_stays_whatever_the_rule_says(path: Path) -> None:
    tagged = made.point(path, "web01", DAY, tags=["gold"])
    made.point(path, "web01", DAY + HOUR)
    newest = made.point(path, "web01", DAY + 2 * HOUR)
    report = forget(path, keep_tags=("gold",))
    assert ids(path) == [tagged, newest]
    assert report.groups[0].kept[1].reasons == ("the newest of its machine",)
    assert report.notes == ()


def test_a_rule_that_keeps_nothing_is_refused(path: Path) -> None:
    with pytest.raises(errors.UsageError, match="Nothing says what to keep"):
        forget(path)


def test_named_points_go_and_one_machine_is_enough_for_a_rule(path: Path) -> None:
    web = [made.point(path, "web01", DAY + step * HOUR) for step in range(3)]
    db = [made.point(path, "db01", DAY + step * HOUR) for step in range(2)]
    assert forget(path, machine="db01", keep=Keep(last=1)).removed == (db[0],)
    assert ids(path) == web
    report = forget(path, points=(web[0][:10], "latest"), machine="web01")
    assert ids(path) == [web[1]]
    assert report.notes == ("the newest point of web01 goes: its next backup reads all of its disks",)


def test_a_snapshot_that_cannot_be_read_hinders_prune_and_can_be_forgotten(path: Path) -> None:
    first, second = (made.point(path, "web01", DAY + step * HOUR) for step in range(2))
    file = path / "snapshots" / first
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    for cached in (path.parent / "cache").rglob(first):
        cached.unlink()
    with pytest.raises(errors.RepositoryDamaged, match=first[:8]):
        forget(path, keep=Keep(last=1), prune=True)
    assert file.exists()
    report = forget(path, points=(first[:10],), prune=True)
    assert report.removed == (first,)
    assert ids(path) == [second]


def test_a_killed_backup_keeps_forget_away_no_more(path: Path) -> None:
    """Its lock is still there, and fresh."""
    made.point(path, "web01", DAY)
    point = made.point(path, "web01", DAY + HOUR)
    with subprocess.Popen(["true"]) as ended:
        pass
    with made.opened(path) as repository:
        host, now = socket.gethostname(), times.write(datetime.now(UTC))
        holder = lockfile.Lock(time=now, exclusive=False, hostname=host, username="u", pid=ended.pid)
        repository.store.write(Kind.LOCKS, *unpacked.seal_file(repository.key, lockfile.encode(holder)))
    assert forget(path, points=(point,), prune=True).removed == (point,)
    assert len(ids(path)) == 1


def test_a_backup_at_work_keeps_forget_away(path: Path) -> None:
    made.point(path, "web01", DAY)
    point = made.point(path, "web01", DAY + HOUR)
    with made.opened(path) as repository, repository.writer("db01", command="test"):
        with pytest.raises(errors.BusyError) as caught:
            forget(path, points=(point,))
        assert caught.value.exit_code == 11
    assert len(ids(path)) == 2


def test_without_restic_its_package_is_named(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made.point(path, "web01", DAY)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "setpriv").symlink_to("/usr/bin/setpriv")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(errors.ProgramMissing) as caught:
        forget(path, keep=Keep(last=1))
    assert caught.value.hint == "apt-get install restic"


def test_after_the_last_point_was_forgotten_the_next_backup_reads_whole_and_says_why(make_box: MakeBox) -> None:
    box = make_box(kind="restic")
    box.write("vda", 0x11, 0, MiB)
    first = box.backup().point
    box.write("vda", 0x12, MiB, MiB)
    second = box.backup().point
    forget(box.repository, points=(second.id,), prune=True)
    report = box.backup()
    assert [disk.mode for disk in report.point.disks] == [Mode.FULL, Mode.FULL]
    assert "is not in the repository any more" in (report.point.disk("vda").reason or "")
    assert report.broken == ("vda", "vdb")
    assert box.restored() == box.image()
    box.write("vda", 0x13, 0, MiB)
    forget(box.repository, keep=Keep(last=1), prune=True)
    with pytest.raises(errors.UnknownPoint):
        box.restored(first.id)
    assert box.backup().point.disk("vda").mode is Mode.INCREMENTAL
    assert box.restored() == box.image()


# -- copy ------------------------------------------------------------------------------------


@pytest.fixture
def there(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A second repository with a password of its own."""
    place = path.parent / "there" / "repo"
    place.parent.mkdir()
    (place.parent / "password").write_text("another")
    with monkeypatch.context() as patch:
        patch.setattr(kit, "PASSWORD", "another")
        return made.empty(place)


def copy(path: Path, there: Path, **wish: Any) -> copying.Report:
    """Copy."""
    request = copying.Request(
        repository=made.place(path),
        access=kit.access_of(path.parent),
        target=made.place(there),
        target_access=wish.pop("target_access", kit.access_of(there.parent)),
        **wish,
    )
    return asyncio.run(copying.copy(request))


def test_copies_list_verify_and_restore_and_are_not_made_twice(path: Path, there: Path) -> None:
    web = [made.point(path, "web01", DAY + step * HOUR) for step in range(2)]
    made.point(path, "db01", DAY)
    first = copy(path, there, points=(web[1][:12],))
    assert [(one.id, one.already) for one in first.points] == [(web[1], False)]
    assert ids(there) == [first.points[0].copy]
    report = copy(path, there, machine="web01")
    assert [(one.id, one.already) for one in report.points] == [(web[0], False), (web[1], True)]
    assert copy(path, there, machine="web01").stored == 0
    assert ids(there) == [one.copy for one in report.points]
    access = kit.access_of(there.parent)
    checked = verify.Request(repository=made.place(there), access=access, all=True, read_data=True)
    assert asyncio.run(verify.verify(checked)).damaged == ()
    wanted = restore.Request(repository=made.place(there), access=access, to=there.parent / "out", point=ids(there)[0])
    [disk] = asyncio.run(restore.restore(wanted)).disks
    assert disk.path is not None
    assert disk.path.read_bytes() == made.content("web01", DAY)


def test_a_copy_with_the_wrong_password_or_to_itself_is_refused(path: Path, there: Path) -> None:
    made.point(path, "web01", DAY)
    with pytest.raises(errors.WrongPassword) as caught:
        copy(path, there, target_access=kit.access_of(path.parent))
    assert caught.value.path == str(there)
    with pytest.raises(errors.UsageError, match="are one repository"):
        copy(path, path, target_access=kit.access_of(path.parent))


def test_one_set_of_keys_serves_a_copy_between_buckets() -> None:
    bucket = urls.ResticRepository(location=urls.S3Place(endpoint="s3.example.com", bucket="a"))
    local = made.place(Path("/srv/backup"))
    mine, theirs = {"AWS_ACCESS_KEY_ID": "mine", "HOME": "/"}, {"AWS_ACCESS_KEY_ID": "theirs", "HOME": "/"}
    environ = copying._environ
    assert environ(bucket, mine, local, theirs)["AWS_ACCESS_KEY_ID"] == "mine"
    assert environ(local, mine, bucket, theirs)["AWS_ACCESS_KEY_ID"] == "theirs"
    assert environ(bucket, mine, bucket, mine) == mine
    with pytest.raises(errors.Unsupported):
        environ(bucket, mine, bucket, theirs)


# -- keys ------------------------------------------------------------------------------------


def key_request(path: Path, password: str = kit.PASSWORD) -> keys.Request:
    """The repository, opened with that password."""
    environ = dict(os.environ) | {"PULLBACK_PASSWORD_COMMAND": f"echo '{password}'", "PULLBACK_PASSWORD_FILE": ""}
    return keys.Request(repository=made.place(path), access=Access(environ=environ, cache=path.parent / "cache"))


def test_keys_are_added_changed_and_removed_as_restic_has_them(path: Path) -> None:
    added = asyncio.run(keys.added(key_request(path), lambda: "second"))
    assert program(path, "second").run_json("snapshots", timeout=60) == []
    changed = asyncio.run(keys.changed(key_request(path, "second"), lambda: "third"))
    with pytest.raises(errors.WrongPassword):
        asyncio.run(keys.listed(key_request(path, "second")))
    listed = json.loads(program(path, "third").run("key", "list", "--json", timeout=60))
    assert (
        {key["id"][:8]: key["current"] for key in listed}
        == {  # restic 0.18 tells ids whole
            key.id[:8]: key.id == changed.id for key in asyncio.run(keys.listed(key_request(path)))
        }
    )
    assert added.id != changed.id
    assert asyncio.run(keys.removed(key_request(path), changed.id[:8])).id == changed.id
    [last] = asyncio.run(keys.listed(key_request(path)))
    assert last.current


def test_the_key_in_use_is_never_removed(path: Path) -> None:
    [only] = asyncio.run(keys.listed(key_request(path)))
    with pytest.raises(errors.UsageError, match="opened the repository just now"):
        asyncio.run(keys.removed(key_request(path), only.id[:6]))
    with pytest.raises(errors.UsageError, match="no key's id"):
        asyncio.run(keys.removed(key_request(path), "x"))
    assert asyncio.run(keys.listed(key_request(path))) == (only,)


def test_a_password_that_restic_could_not_be_given_is_refused() -> None:
    for password in ("", " x", "x ", "a\nb"):
        with pytest.raises(errors.UsageError):
            repositories.new_password(None, lambda password=password: password)  # type: ignore[misc]
    with pytest.raises(errors.UsageError, match="--new-password-file"):
        repositories.new_password(None, None)


# -- locks -----------------------------------------------------------------------------------


def lock(path: Path, *, pid: int, host: str, exclusive: bool = False) -> str:
    """A lock of somebody's."""
    with made.opened(path) as repository:
        wanted = lockfile.Lock(
            time=times.write(datetime.now(UTC)), exclusive=exclusive, hostname=host, username="x", pid=pid
        )
        name, data = unpacked.seal_file(repository.key, lockfile.encode(wanted), compress=True)
        repository.store.write(Kind.LOCKS, name, data)
        return name


def test_stale_locks_are_removed_and_others_only_by_force(path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = lock(path, pid=ended.pid, host=os.uname().nodename)
    far = lock(path, pid=1, host="far-away", exclusive=True)
    old = lock(path, pid=1, host="far-away")
    os.utime(path / "locks" / old, (0, 0))
    found = asyncio.run(keys.unlocked(key_request(path)))
    assert {one.id: (one.stale, one.removed) for one in found} == {
        dead: (True, True),
        far: (False, False),
        old: (True, True),
    }
    assert os.listdir(path / "locks") == [far]
    [one] = asyncio.run(keys.unlocked(key_request(path), everything=True))
    assert (one.id, one.exclusive, one.removed) == (far, True, True)
    assert asyncio.run(keys.unlocked(key_request(path))) == ()
