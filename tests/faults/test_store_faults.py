"""A repository's directory: full, read-only, taken away, tampered with; writers that die; uploads that fail."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mounts
from mounts import Mount
from pullback import errors
from pullback.model.urls import LocalPlace
from pullback.repo.store import Kind, Store, opening, path_of
from pullback.repo.store.limit import Limiter
from pullback.repo.store.local import LocalStore
from pullback.repo.store.memory import MemoryStore
from pullback.repo.store.uploads import Uploads
from pullback.testing.stores import WrappedStore, delaying, failing, hanging, named
from pullback.units import KiB, MiB


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore.create(tmp_path / "repo") as made:
        made.write(Kind.CONFIG, "", b"config", new=True)
        yield made


def files(directory: Path) -> list[str]:
    """All files below a directory."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


# -- the directory ---------------------------------------------------------------------------


def test_only_the_owner_may_use_what_is_made(store: LocalStore, tmp_path: Path) -> None:
    store.write(Kind.DATA, named(b"x"), b"x")
    directory = tmp_path / "repo"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*") if path.is_dir()}
    assert modes | {stat.S_IMODE(directory.stat().st_mode)} == {0o700}
    assert {stat.S_IMODE((directory / name).stat().st_mode) for name in files(directory)} == {0o400}
    assert len(list((directory / "data").iterdir())) == 256


def test_a_group_that_may_read_the_config_may_use_the_rest(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "repo" / "config").chmod(0o440)
    with LocalStore.open(tmp_path / "repo") as again:
        again.write(Kind.DATA, named(b"x"), b"x")
    written = tmp_path / "repo" / path_of(Kind.DATA, named(b"x"))
    assert stat.S_IMODE(written.stat().st_mode) & 0o440 == 0o440


def test_a_repository_is_made_in_an_empty_directory_only(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "photo").touch()
    with pytest.raises(errors.NotARepository):
        LocalStore.create(repo)
    (repo / "photo").rename(repo / "config")
    with pytest.raises(errors.RepositoryExists):
        LocalStore.create(repo)
    assert files(repo) == ["config"]


def test_where_no_repository_is_none_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path, tmp_path / "file"):
        with pytest.raises(errors.NoRepository):
            opening.open_store(LocalPlace(path=path), {})


def test_a_repository_below_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.CannotWrite, match="is its file system mounted"):
        LocalStore.create(tmp_path / "mnt" / "repo")
    assert list(tmp_path.iterdir()) == []


def test_a_removed_directory_is_told(store: LocalStore, tmp_path: Path) -> None:
    subprocess.run(["rm", "-r", str(tmp_path / "repo")], check=True)
    attempts: list[Callable[[], object]] = [
        lambda: store.write(Kind.DATA, named(b"x"), b"x"),
        lambda: store.read(Kind.CONFIG, ""),
        lambda: list(store.list(Kind.DATA)),
        lambda: store.delete(Kind.KEYS, named(b"x")),
    ]
    for attempt in attempts:
        with pytest.raises(errors.StoreUnreachable, match="was removed"):
            attempt()


def test_an_unmounted_file_system_is_not_replaced_by_the_empty_mount_point(mount: Mount) -> None:
    place = mount.tmpfs(4 * MiB)
    with LocalStore.create(place / "repo") as store:
        subprocess.run(["umount", "-l", str(place)], check=True)
        store.write(Kind.DATA, named(b"x"), b"x")
        assert list(place.iterdir()) == []
        assert store.read(Kind.DATA, named(b"x")) == b"x"
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], check=True)  # for the fixture to unmount


def test_missing_directories_are_made_again(store: LocalStore, tmp_path: Path) -> None:
    subprocess.run(["rm", "-r", str(tmp_path / "repo" / "data")], check=True)
    assert list(store.list(Kind.DATA)) == []
    store.write(Kind.DATA, named(b"x"), b"x")
    assert store.read(Kind.DATA, named(b"x")) == b"x"


# -- writing ---------------------------------------------------------------------------------


def test_a_full_file_system_leaves_nothing_half_written(mount: Mount) -> None:
    place = mount.tmpfs(4 * MiB)
    with LocalStore.create(place / "repo") as store:
        store.write(Kind.DATA, named(b"before"), b"before")
        mounts.fill(place, leave=256 * KiB)
        with pytest.raises(errors.DestinationFull) as caught:
            store.write(Kind.DATA, named(b"big"), bytes(MiB))
        assert path_of(Kind.DATA, named(b"big")) in str(caught.value)
        assert files(place / "repo") == [path_of(Kind.DATA, named(b"before"))]
        mounts.empty(place)
        store.write(Kind.DATA, named(b"big"), bytes(MiB))


def test_a_read_only_file_system_is_told(mount: Mount) -> None:
    place = mount.tmpfs(4 * MiB)
    with LocalStore.create(place / "repo") as store:
        store.write(Kind.DATA, named(b"x"), b"x")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with pytest.raises(errors.CannotWrite, match="Read-only"):
            store.write(Kind.DATA, named(b"y"), b"y")
        with pytest.raises(errors.CannotWrite, match="Read-only"):
            store.delete(Kind.DATA, named(b"x"))
        assert store.read(Kind.DATA, named(b"x")) == b"x"


def test_a_limit_of_file_sizes_is_told(store: LocalStore) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, before[1]))
    try:
        with pytest.raises(errors.DestinationFull):
            store.write(Kind.DATA, named(b"x"), bytes(2 * MiB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


_DIES = """
import os, sys
from pathlib import Path
from pullback.repo.store.local import LocalStore
from pullback.repo.store import Kind
store = LocalStore.open(Path(sys.argv[1]))
os.fsync = lambda descriptor: os.kill(os.getpid(), 9)
store.write(Kind.DATA, "a" * 64, bytes(1 << 20))
"""


def test_what_a_killed_writer_leaves_is_not_seen_and_goes_after_a_day(store: LocalStore, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    assert subprocess.run([sys.executable, "-c", _DIES, repo], check=False).returncode == -9
    [left] = (repo / "data" / "aa").iterdir()
    assert list(store.list(Kind.DATA)) == []
    with pytest.raises(errors.ObjectMissing):
        store.read(Kind.DATA, "a" * 64)
    store.tidy()
    assert left.exists(), "it may be a writer's that lives"
    os.utime(left, (time.time(), time.time() - 25 * 3600))
    foreign = left.with_name("a" * 64 + "-tmp-1234567")
    foreign.touch()
    os.utime(foreign, (0, 0))
    store.tidy()
    assert files(repo) == ["config", str(foreign.relative_to(repo))]


# -- reading what others put there -----------------------------------------------------------


def test_what_is_no_file_is_damage_and_is_not_followed(store: LocalStore, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (tmp_path / "secret").write_text("secret")
    (repo / path_of(Kind.DATA, "a" * 64)).symlink_to(tmp_path / "secret")
    os.mkfifo(repo / path_of(Kind.DATA, "b" * 64))
    (repo / path_of(Kind.DATA, "c" * 64)).mkdir()
    for letter, problem in (("a", "symbolic link"), ("b", "no regular file"), ("c", "no regular file")):
        with pytest.raises(errors.ObjectDamaged, match=problem):
            store.read(Kind.DATA, letter * 64)
    assert list(store.list(Kind.DATA)) == []


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("victim")
    link = tmp_path / "repo" / path_of(Kind.DATA, "a" * 64)
    link.symlink_to(tmp_path / "victim")
    store.write(Kind.DATA, "a" * 64, b"pack")
    assert (tmp_path / "victim").read_text() == "victim"
    assert store.read(Kind.DATA, "a" * 64) == b"pack"


def test_files_with_other_names_are_left_out_of_lists(store: LocalStore, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    store.write(Kind.DATA, "a" * 64, b"x")
    for name in ("data/aa/short", "data/bb/" + "a" * 64, "data/README", "data/aa/" + "A" * 64, "data/aa/" + "a" * 65):
        (repo / name).write_text("x")
    (repo / "snapshots" / "notes.txt").write_text("x")
    assert [each.name for each in store.list(Kind.DATA)] == ["a" * 64]
    assert list(store.list(Kind.SNAPSHOTS)) == []


def test_a_huge_file_is_read_in_parts_only(store: LocalStore, tmp_path: Path) -> None:
    path = tmp_path / "repo" / path_of(Kind.INDEX, "a" * 64)
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(errors.ObjectDamaged, match="it has 1099511627776 bytes"):
        store.read(Kind.INDEX, "a" * 64)
    assert store.read(Kind.INDEX, "a" * 64, 2**40 - 10, 10) == bytes(10)


def test_a_file_of_another_user_is_told(store: LocalStore, tmp_path: Path) -> None:
    store.write(Kind.DATA, "a" * 64, b"x")
    repo = tmp_path / "repo"
    code = f"""
import os
from pathlib import Path
from pullback import errors
from pullback.repo.store import Kind
from pullback.repo.store.local import LocalStore
store = LocalStore.open(Path({str(repo)!r}))
os.seteuid(65534)
for attempt in (
    lambda: store.read(Kind.DATA, "a" * 64),
    lambda: list(store.list(Kind.DATA)),
    lambda: store.write(Kind.DATA, "b" * 64, b""),
    lambda: LocalStore.open(Path({str(repo)!r})),
):
    try:
        attempt()
    except errors.PermissionDenied as error:
        print("denied")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "denied\n" * 4


@contextmanager
def served(path: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A file whose content a program gives (nbdkit, through FUSE)."""
    server = subprocess.Popen(["nbdfuse", str(path), "--command", "nbdkit", "-s", *words], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while path.stat().st_size == 0:
            assert time.monotonic() < deadline, "nbdfuse does not mount"
            time.sleep(0.01)
        yield server
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)
        server.kill()
        server.wait(20)


def test_what_the_disk_cannot_read_is_damage(store: LocalStore, tmp_path: Path) -> None:
    path = tmp_path / "repo" / path_of(Kind.DATA, "a" * 64)
    path.touch()
    with served(path, "--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=100%"):
        with pytest.raises(errors.ObjectDamaged, match="Input/output error"):
            store.read(Kind.DATA, "a" * 64, 0, 4096)
        assert store.size(Kind.DATA, "a" * 64) == MiB


def test_a_file_system_whose_server_died_is_unreachable(store: LocalStore, tmp_path: Path) -> None:
    path = tmp_path / "repo" / path_of(Kind.DATA, "a" * 64)
    path.touch()
    with served(path, "memory", "1M") as server:
        assert store.read(Kind.DATA, "a" * 64, 0, 4096) == bytes(4096)
        server.kill()
        server.wait(20)
        with pytest.raises(errors.StoreUnreachable):
            store.read(Kind.DATA, "a" * 64, 0, 4096)


# -- uploads ---------------------------------------------------------------------------------


def fill_with(uploads: Uploads, count: int, size: int = 1000) -> list[str]:
    """Submit so many files."""
    names = []
    for number in range(count):
        content = number.to_bytes(4, "big") * (size // 4)
        uploads.submit(Kind.DATA, named(content), content)
        names.append(named(content))
    return names


def stored(store: Store) -> set[str]:
    """Names of all packs."""
    return {each.name for each in store.list(Kind.DATA)}


def test_all_that_was_submitted_is_stored_at_the_end() -> None:
    store = MemoryStore()
    told: list[int] = []
    with Uploads(WrappedStore(store, delaying(0.001)), workers=3) as uploads:
        names = fill_with(uploads, 50)
        uploads.submit(Kind.DATA, named(b"last"), b"last", done=lambda: told.append(len(stored(store))))
        uploads.flush()
        assert stored(store) == {*names, named(b"last")}
        assert len(told) == 1
        fill_with(uploads, 60)
    assert len(stored(store)) == 61


def test_no_more_bytes_are_under_way_than_the_limit() -> None:
    released, store = threading.Event(), MemoryStore()
    with Uploads(WrappedStore(store, hanging(released, "write")), workers=2, limit_bytes=10_000) as uploads:
        submitting = threading.Thread(target=lambda: fill_with(uploads, 30))
        submitting.start()
        submitting.join(0.2)
        assert submitting.is_alive()
        assert (uploads._bytes, uploads._files) == (10_000, 10)
        released.set()
        submitting.join(10)
        uploads.flush()
        assert len(stored(store)) == 30
        uploads.submit(Kind.DATA, named(b"big"), bytes(50_000))  # one that is larger passes alone


@contextmanager
def broken_uploads(store: Store, every: int) -> Iterator[Uploads]:
    """Uploads that end with an error, which is swallowed here."""
    with pytest.raises(errors.StoreFailed), Uploads(WrappedStore(store, failing(every, "write")), workers=2) as uploads:
        yield uploads


def test_the_first_error_is_told_at_the_next_call_and_nothing_is_written_any_more() -> None:
    store = MemoryStore()
    with broken_uploads(store, every=5) as uploads:
        with pytest.raises(errors.StoreFailed):
            uploads_until_it_fails(uploads)
        count = len(stored(store))
        with pytest.raises(errors.StoreFailed):
            uploads.submit(Kind.DATA, named(b"late"), b"late")
        with pytest.raises(errors.StoreFailed):
            uploads.flush()
        assert len(stored(store)) == count < 10


def uploads_until_it_fails(uploads: Uploads) -> None:
    """Submit until an error comes back."""
    for _ in range(1000):
        fill_with(uploads, 10)
        time.sleep(0.001)


def test_an_error_after_the_last_submit_is_told_at_the_end() -> None:
    with broken_uploads(MemoryStore(), every=3) as uploads:
        fill_with(uploads, 3)


def test_an_error_of_who_is_told_counts() -> None:
    def done() -> None:
        raise LookupError

    with pytest.raises(LookupError), Uploads(MemoryStore(), workers=1) as uploads:
        uploads.submit(Kind.DATA, named(b"x"), b"x", done=done)


def test_leaving_by_an_exception_does_not_wait_for_a_store_that_hangs() -> None:
    released, store, under_way = threading.Event(), MemoryStore(), threading.Semaphore(0)

    def hang(*_: object) -> None:
        under_way.release()
        released.wait()

    uploads = Uploads(WrappedStore(store, hang), workers=2)
    fill_with(uploads, 10)
    assert under_way.acquire(timeout=5)
    assert under_way.acquire(timeout=5)
    begin = time.monotonic()
    uploads.abandon(0.2)
    assert time.monotonic() - begin < 2
    with pytest.raises(RuntimeError):
        uploads.submit(Kind.DATA, named(b"x"), b"x")
    released.set()
    uploads.abandon()
    assert len(stored(store)) == 2, "those under way; the others were dropped"


def test_a_limit_holds_back_uploads_and_their_end_does_not_wait_for_it() -> None:
    store = MemoryStore()
    begin = time.monotonic()
    with Uploads(store, workers=4, limiter=Limiter(100_000)) as uploads:
        fill_with(uploads, 30)
    assert 0.25 < time.monotonic() - begin < 3
    uploads = Uploads(store, workers=4, limiter=Limiter(1))
    fill_with(uploads, 40)
    uploads.abandon()
    assert time.monotonic() - begin < 5
