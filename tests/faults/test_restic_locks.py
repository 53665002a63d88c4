"""Locks of others in a repository in restic's format: respected, passed over when nobody holds them, and ours kept."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hindered import Seen, hindered
from kit import PASSWORD, Box, MakeBox, last_json, make_repository, restic_of
from pullback import errors, repo
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.repo import Kind
from pullback.repo.restic import lockfile, times, unpacked
from pullback.repo.restic.locking import RepositoryLock
from pullback.repo.store.local import LocalStore
from pullback.testing.stores import WrappedStore
from pullback.units import MiB
from victim import eventually

OLD = timedelta(minutes=31)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[repo.ResticRepository]:
    """An empty one."""
    make_repository(tmp_path / "repo", tmp_path / "cache")
    with repo.open_repository(LocalStore.open(tmp_path / "repo"), lambda: PASSWORD, caches=tmp_path / "cache") as made:
        yield made


def put(
    repository: repo.ResticRepository,
    *,
    exclusive: bool = True,
    host: str = "elsewhere",
    pid: int = 1,
    says: timedelta = timedelta(0),
    written: timedelta = timedelta(0),
) -> str:
    """Somebody's lock: how old it says that it is, and how long ago the store got it."""
    now = datetime.now(UTC)
    lock = lockfile.Lock(time=times.write(now - says), exclusive=exclusive, hostname=host, username="u", pid=pid)
    name, data = unpacked.seal_file(repository.key, lockfile.encode(lock), compress=True)
    repository.store.write(Kind.LOCKS, name, data)
    age(repository, name, written)
    return name


def age(repository: repo.ResticRepository, name: str, written: timedelta) -> None:
    """Let a lock have been written so long ago, by the store's clock."""
    moment = time.time() - written.total_seconds()
    os.utime(Path(repository.store.url) / "locks" / name, (moment, moment))


def names(repository: repo.ResticRepository) -> set[str]:
    """All locks that are there."""
    return {stored.name for stored in repository.store.list(Kind.LOCKS)}


def dead() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


# -- those of others -------------------------------------------------------------------------


def test_an_exclusive_lock_keeps_everybody_out(repository: repo.ResticRepository) -> None:
    theirs = put(repository)
    for exclusive in (False, True):
        with pytest.raises(errors.BusyError, match="process 1 on elsewhere by u") as caught:
            repository.lock(exclusive=exclusive).__enter__()
        assert caught.value.exit_code == 11
    assert names(repository) == {theirs}


def test_a_shared_lock_keeps_out_only_those_who_want_to_be_alone(repository: repo.ResticRepository) -> None:
    theirs = put(repository, exclusive=False)
    with repository.lock():
        assert len(names(repository)) == 2
    with pytest.raises(errors.BusyError):
        repository.lock(exclusive=True).__enter__()
    assert names(repository) == {theirs}


def test_one_that_comes_while_we_make_ours_is_seen(repository: repo.ResticRepository) -> None:
    def strike(number: int, operation: str, kind: Kind) -> None:
        if operation == "write":
            put(repository)

    lock = RepositoryLock(WrappedStore(repository.store, Seen(strike=strike)), repository.key)
    with pytest.raises(errors.BusyError):
        lock.__enter__()
    assert len(names(repository)) == 1


@pytest.mark.parametrize("says", [timedelta(0), -timedelta(days=400), timedelta(days=400), OLD])
def test_how_old_a_lock_is_says_the_stores_clock_alone(repository: repo.ResticRepository, says: timedelta) -> None:
    """Whatever the other's clock said: he may be at work."""
    put(repository, says=says, written=timedelta(minutes=29))
    with pytest.raises(errors.BusyError):
        repository.lock().__enter__()


@pytest.mark.parametrize("says", [timedelta(0), -timedelta(days=400), timedelta(days=400)])
def test_a_lock_that_was_not_renewed_for_half_an_hour_is_nobodys(
    repository: repo.ResticRepository, says: timedelta
) -> None:
    theirs = put(repository, says=says, written=OLD)
    with repository.lock():
        pass
    assert names(repository) == {theirs}  # but not ours to remove


def test_a_store_whose_clock_is_years_off_makes_no_difference(
    repository: repo.ResticRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours may be off as well: only what the store says of both locks is compared."""
    old, new = put(repository, written=timedelta(days=-365) + OLD), None
    real = RepositoryLock._write

    def late(self: RepositoryLock) -> None:
        real(self)
        age(repository, self._names[-1], timedelta(days=-365))

    monkeypatch.setattr(RepositoryLock, "_write", late)
    with repository.lock():
        pass
    new = put(repository, written=timedelta(days=-365) + timedelta(minutes=29))
    with pytest.raises(errors.BusyError):
        repository.lock().__enter__()
    assert names(repository) == {old, new}


def test_a_lock_of_a_process_of_this_host_that_has_ended_is_removed(repository: repo.ResticRepository) -> None:
    put(repository, host=socket.gethostname(), pid=dead())
    with repository.lock():
        assert len(names(repository)) == 1
    assert names(repository) == set()


def test_a_process_that_does_not_run_here_may_run_on_another_host(repository: repo.ResticRepository) -> None:
    put(repository, pid=dead())
    with pytest.raises(errors.BusyError):
        repository.lock().__enter__()


@pytest.mark.parametrize("content", [b"", b"rubbish", bytes(4096)])
def test_a_lock_that_cannot_be_read_counts_until_it_is_old(repository: repo.ResticRepository, content: bytes) -> None:
    name = "ab" * 32
    repository.store.write(Kind.LOCKS, name, content)
    with pytest.raises(errors.BusyError, match="lock abababab, which cannot be read"):
        repository.lock().__enter__()
    age(repository, name, OLD)
    with repository.lock():
        pass
    assert names(repository) == {name}


def test_a_backup_is_refused_while_restic_prunes_and_goes_on_afterwards(make_box: MakeBox) -> None:
    box = one_disk(make_box)
    with pruning(box) as release:
        done = box.cli("backup", "--json", f"qmp:{box.qmp}", "-r", str(box.repository))
        assert (done.returncode, last_json(done.stdout)["code"]) == (11, "busy")
        assert "process" in done.stderr
        assert box.leftovers() == []
        release()
    report = box.backup()
    assert report.point.disks[0].mode is Mode.INCREMENTAL
    assert box.restored() == box.image()


def test_a_killed_prune_is_in_nobodys_way(make_box: MakeBox) -> None:
    box = one_disk(make_box)
    with pruning(box):
        pass  # killed
    report = box.backup()
    assert report.point.disks[0].mode is Mode.INCREMENTAL
    restic_of(box).run("prune", timeout=60)  # nor in restic's: we removed its lock


@contextmanager
def pruning(box: Box) -> Iterator[Callable[[], None]]:
    """restic holds its exclusive lock while the block runs; what is given lets it end well. Killed at the end."""
    environ = {"PATH": os.environ["PATH"], "RESTIC_PASSWORD": PASSWORD, "RESTIC_REPOSITORY": str(box.repository)}
    locks = box.repository / "locks"
    with subprocess.Popen(
        ["restic", "--no-cache", "prune"], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            while not [path for path in locks.iterdir() if len(path.name) == 64]:
                assert process.poll() is None
            process.send_signal(signal.SIGSTOP)

            def release() -> None:
                process.send_signal(signal.SIGCONT)
                assert process.wait(60) == 0

            yield release
        finally:
            process.kill()


def one_disk(make_box: MakeBox) -> Box:
    """A machine with a restore point."""
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=2 * MiB, kind="restic")
    box.write("vda", 0x11, 0, MiB)
    box.backup()
    box.write("vda", 0x12, MiB, 512)
    return box


# -- ours ------------------------------------------------------------------------------------


def lock(repository: repo.ResticRepository) -> RepositoryLock:
    """One that is renewed all the time."""
    return RepositoryLock(repository.store, repository.key, refresh=0.02)


def test_ours_is_renewed_and_there_is_never_a_moment_without_it(repository: repo.ResticRepository) -> None:
    seen: set[str] = set()
    with lock(repository) as ours:
        while len(seen) < 4:
            now = names(repository)
            assert now
            seen |= now
            assert ours.trusted()
    assert names(repository) == set()


def test_one_that_was_removed_is_never_trusted_again_and_can_be_replaced(repository: repo.ResticRepository) -> None:
    with lock(repository) as ours:
        for name in names(repository):
            repository.store.delete(Kind.LOCKS, name)
        eventually(lambda: not ours.trusted(), seconds=5, what="noticed")
        time.sleep(0.1)
        if names(repository):  # it was removed right while it was renewed
            repository.store.delete(Kind.LOCKS, names(repository).pop())
        assert not ours.trusted()
        ours.renew()
        assert ours.trusted()
        [first] = names(repository)
        eventually(lambda: first not in names(repository), seconds=5, what="renewed again")
        assert ours.trusted()
    assert names(repository) == set()


def test_one_that_was_removed_just_while_it_was_renewed_is_not_trusted(repository: repo.ResticRepository) -> None:
    """Somebody may have taken his lock in the moment without ours, and not have seen the new one."""

    def strike(number: int, operation: str, kind: Kind) -> None:
        if operation == "write" and seen.count("write", Kind.LOCKS) == 2:
            for name in names(repository):
                repository.store.delete(Kind.LOCKS, name)

    seen = Seen(strike=strike)
    with RepositoryLock(WrappedStore(repository.store, seen), repository.key, refresh=0.02) as ours:
        eventually(lambda: seen.count("write", Kind.LOCKS) == 2, seconds=5, what="renewed")
        eventually(lambda: not ours.trusted(), seconds=5, what="noticed")
        time.sleep(0.1)
        assert not ours.trusted()


def test_a_store_that_fails_for_a_while_costs_us_neither_lock_nor_trust(repository: repo.ResticRepository) -> None:
    """The old lock was there all the time."""

    def strike(number: int, operation: str, kind: Kind) -> None:
        if operation == "write" and 2 <= seen.count("write", Kind.LOCKS) <= 4:
            raise errors.StoreFailed(store="it", what="writing", reason="as was asked for")

    seen = Seen(strike=strike)
    with RepositoryLock(WrappedStore(repository.store, seen), repository.key, refresh=0.02) as ours:
        [first] = names(repository)
        eventually(lambda: first not in names(repository), seconds=5, what="renewed")
        assert seen.count("write", Kind.LOCKS) > 4
        assert ours.trusted()
    assert names(repository) == set()


def test_restic_does_not_prune_while_we_back_up(make_box: MakeBox) -> None:
    box = one_disk(make_box)
    refused: list[type[BaseException]] = []

    def strike(number: int, operation: str, kind: Kind) -> None:
        if operation == "write" and kind is Kind.DATA and not refused:
            with pytest.raises(errors.BusyError) as caught:
                restic_of(box).run("forget", box.points()[0].id, "--prune", timeout=60)
            refused.append(caught.type)

    with hindered(Seen(strike=strike)):
        box.backup()
    assert refused
    assert box.restored() == box.image()
