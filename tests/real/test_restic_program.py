"""The program restic, run by us on real repositories of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import proxy
from pullback import errors
from pullback.programs import restic
from pullback.programs.restic import Access, Restic
from seaweed import Server

PASSWORD = "correct horse"
_numbers = itertools.count()


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two empty repositories: making one takes restic seconds, copying it none."""
    directory = tmp_path_factory.mktemp("templates")
    program(Access(url=str(directory / "repo"), password=PASSWORD)).run("init", timeout=60)
    program(Access(url=str(directory / "second"), password="another")).run("init", timeout=60)
    return directory


@pytest.fixture
def access(templates: Path, tmp_path: Path) -> Access:
    """A new repository."""
    shutil.copytree(templates / "repo", tmp_path / "repo")
    return Access(url=str(tmp_path / "repo"), password=PASSWORD)


@pytest.fixture
def second(templates: Path, tmp_path: Path) -> Access:
    """Another new repository."""
    shutil.copytree(templates / "second", tmp_path / "second")
    return Access(url=str(tmp_path / "second"), password="another")


def program(access: Access, **environ: str) -> Restic:
    """restic without a cache."""
    base = {"PATH": os.environ["PATH"], "RESTIC_CACHE_DIR": "/nonexistent"}
    return Restic(access, base | environ)


def backup(access: Access, content: str, directory: Path) -> str:
    """Back a file up with restic itself; gives the snapshot's short id."""
    path = directory / "file"
    path.write_text(content)
    said = program(access).run("backup", "--quiet", "--json", str(path), timeout=60)
    return str(json.loads(said.splitlines()[-1])["snapshot_id"])


def test_it_is_there_and_has_a_version() -> None:
    assert restic.version() >= (0, 14)


def test_json_comes_back_as_values(access: Access, tmp_path: Path) -> None:
    assert program(access).run_json("snapshots", timeout=60) == []
    backup(access, "one", tmp_path)
    [snapshot] = program(access).run_json("snapshots", timeout=60)
    assert snapshot["paths"] == [str(tmp_path / "file")]


def test_what_is_no_json_is_told(access: Access) -> None:
    with pytest.raises(errors.BadReply, match="prints no JSON"):
        program(access).run_json("cat", "config", "--help", timeout=60)


def test_lines_are_handed_over_as_they_come(access: Access, tmp_path: Path) -> None:
    backup(access, "one", tmp_path)
    lines: list[str] = []
    assert program(access).run("check", on_line=lines.append, timeout=60) == ""
    assert "no errors were found" in lines


def test_forget_and_prune_work(access: Access, tmp_path: Path) -> None:
    backup(access, "one", tmp_path)
    kept = backup(access, "two", tmp_path)
    program(access).run("forget", "--keep-last=1", "--prune", timeout=60)
    assert [each["short_id"] for each in program(access).run_json("snapshots", timeout=60)] == [kept[:8]]


def test_what_our_killed_writers_leave_does_not_disturb_it(access: Access, tmp_path: Path) -> None:
    backup(access, "one", tmp_path)
    repo, marked = Path(access.url), "-tmp-pullback-0123456789abcdef"
    for file in [path for path in repo.rglob("*") if path.is_file()]:
        file.with_name(file.name + marked).write_bytes(file.read_bytes()[:100])
    (repo / "locks" / ("0" * 64 + marked)).write_bytes(b"")
    (repo / "keys" / ("0" * 64 + marked)).write_bytes(b"{")
    program(access).run("check", "--read-data", timeout=60)
    program(access).run("forget", "--keep-last=1", "--prune", timeout=60)
    assert len(program(access).run_json("key", "list", timeout=60)) == 1
    assert len(list(repo.rglob(f"*{marked}"))) >= 6


def test_keys_are_added_and_changed_without_showing_them(access: Access) -> None:
    program(access).add_key("second one")
    other = Access(url=access.url, password="second one")
    program(other).change_password("third one")
    assert program(Access(url=access.url, password="third one")).run_json("snapshots", timeout=60) == []


def test_snapshots_are_copied_with_a_password_for_each_side(access: Access, second: Access, tmp_path: Path) -> None:
    ids = backup(access, "one", tmp_path), backup(access, "two", tmp_path)
    program(second).copy_from(access, [ids[1]])
    [copied] = program(second).run_json("snapshots", timeout=60)
    assert copied["original"].startswith(ids[1])
    program(second).copy_from(access)
    assert len(program(second).run_json("snapshots", timeout=60)) == 2


def test_the_wrong_password_of_a_copy_is_told_with_its_repository(access: Access, second: Access) -> None:
    with pytest.raises(errors.WrongPassword) as caught:
        program(second).copy_from(Access(url=access.url, password="wrong"))
    assert caught.value.path == access.url
    with pytest.raises(errors.WrongPassword) as caught:
        program(Access(url=second.url, password="wrong")).copy_from(access)
    assert caught.value.path == second.url


# -- what goes wrong -------------------------------------------------------------------------


def test_a_wrong_password_is_told(access: Access) -> None:
    with pytest.raises(errors.WrongPassword):
        program(Access(url=access.url, password="wrong")).run("snapshots", timeout=60)


def test_no_repository_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.NoRepository):
        program(Access(url=str(tmp_path / "none"), password=PASSWORD)).run("snapshots", timeout=60)


def test_a_locked_repository_is_told_with_who_has_it(access: Access) -> None:
    feeding = subprocess.Popen(
        ["restic", "-r", access.url, "backup", "--stdin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "RESTIC_PASSWORD": PASSWORD, "RESTIC_CACHE_DIR": "/nonexistent"},
    )
    try:
        wait_for(lambda: os.listdir(Path(access.url) / "locks"))
        with pytest.raises(errors.BusyError) as caught:
            program(access).run("prune", timeout=60)
        assert f"PID {feeding.pid} on" in caught.value.holder
    finally:
        feeding.communicate(b"data", timeout=60)
    program(access).run("prune", timeout=60)


def test_an_unknown_command_is_told_in_its_own_words(access: Access) -> None:
    with pytest.raises(errors.ProgramFailed, match="unknown command") as caught:
        program(access).run("forgive", timeout=60)
    assert caught.value.program == "restic forgive"


def test_a_password_that_restic_would_change_is_refused(access: Access) -> None:
    for password in ("", " x", "x\n"):
        with pytest.raises(errors.UsageError):
            program(access).add_key(password)


def test_without_restic_its_package_is_named(access: Access, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("setpriv",):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.ProgramMissing) as caught:
        program(access).run("snapshots")
    assert caught.value.hint == "apt-get install restic"


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (10, "Fatal: repository does not exist", errors.NoRepository),
        (11, "unable to create lock in backend: repository is already locked", errors.BusyError),
        (12, "Fatal: wrong password or no key found", errors.WrongPassword),
        (1, "Fatal: unable to open config file: Stat: The specified bucket does not exist", errors.NoRepository),
        (1, "Fatal: unable to open config file: client.GetObject: Access Denied.\nIs there a", errors.StoreRefused),
        (1, "Fatal: unable to open config file: dial tcp: connection refused", errors.StoreUnreachable),
        (1, "Fatal: unable to open config file: open /x/config: permission denied", errors.PermissionDenied),
        (1, "Save(<data/ab>) failed: write /x: no space left on device", errors.DestinationFull),
        (1, "panic: something", None),
        (3, "failed to remove one or more snapshots", None),
    ],
)
def test_the_words_of_old_and_the_statuses_of_new_releases_mean_the_same(
    status: int, message: str, kind: type[errors.PullbackError] | None
) -> None:
    found = restic.failure("URL", status, message)
    assert (None if found is None else type(found)) is kind


# -- secrets, and ends -----------------------------------------------------------------------


def wait_for(ready: Callable[[], object], seconds: float = 20) -> None:
    """Until it is true."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(parent: int) -> list[int]:
    """Processes that run restic, below another."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and (entry / "comm").read_text() == "restic\n":
                found.append(int(entry.name))
    return found


@pytest.fixture
def remote(s3_server: Server, templates: Path) -> Iterator[tuple[Access, proxy.Proxy]]:
    """A new repository in a bucket behind a proxy."""
    name = f"restic-{next(_numbers)}"
    s3_server.make_bucket(name)
    with proxy.before(s3_server.port) as between:
        made = Access(url=s3_server.place(name, "web", port=between.port).url, password=PASSWORD)
        for path in (templates / "repo").rglob("*"):
            if path.is_file():
                s3_server.request("PUT", f"/{name}/web/{path.relative_to(templates / 'repo')}", body=path.read_bytes())
        yield made, between


def hang_after_the_lock(between: proxy.Proxy) -> threading.Event:
    """From now on the server does not answer who asks for the index, which comes after the lock; tells when."""
    locked, never = threading.Event(), threading.Event()

    def rule(request: proxy.Request) -> proxy.Fault | None:
        if "index" not in request.path:
            return None
        locked.set()
        return proxy.Fault(until=never)

    between.rule = rule
    return locked


def test_a_cancelled_restic_ends_and_takes_its_lock_away(s3_server: Server, remote: tuple[Access, proxy.Proxy]) -> None:
    access, between = remote
    locked, cancelled = hang_after_the_lock(between), threading.Event()
    environ = {"PATH": os.environ["PATH"], "RESTIC_CACHE_DIR": "/nonexistent", **s3_server.environ}
    caught: list[BaseException] = []

    def prune() -> None:
        try:
            Restic(access, environ, cancelled=cancelled).run("prune")
        except errors.Interrupted as error:
            caught.append(error)

    thread = threading.Thread(target=prune)
    thread.start()
    assert locked.wait(20)
    [pid] = children(os.getpid())
    shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    assert PASSWORD.encode() not in shown
    cancelled.set()
    thread.join(20)
    assert len(caught) == 1
    between.rule = lambda request: None
    assert program(access, **s3_server.environ).run("list", "locks", "--no-lock", timeout=60) == ""


def test_a_deadline_ends_it(s3_server: Server, remote: tuple[Access, proxy.Proxy]) -> None:
    access, between = remote
    hang_after_the_lock(between)
    with pytest.raises(errors.ProgramFailed, match=r"no end within 1\.5 s"):
        program(access, **s3_server.environ).run("prune", timeout=1.5)
    assert children(os.getpid()) == []


_RUNS = """
import os, sys
from pullback.programs.restic import Access, Restic
Restic(Access(url=sys.argv[1], password=sys.argv[2]), os.environ).run("prune")
"""


def test_it_ends_with_us_and_leaves_no_lock(s3_server: Server, remote: tuple[Access, proxy.Proxy]) -> None:
    access, between = remote
    locked = hang_after_the_lock(between)
    environ = os.environ | s3_server.environ | {"RESTIC_CACHE_DIR": "/nonexistent"}
    ours = subprocess.Popen([sys.executable, "-c", _RUNS, access.url, PASSWORD], env=environ)
    assert locked.wait(20)
    [pid] = children(ours.pid)
    ours.send_signal(signal.SIGKILL)
    ours.wait(20)
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    between.rule = lambda request: None
    assert program(access, **s3_server.environ).run("list", "locks", "--no-lock", timeout=60) == ""


def test_the_cache_directory_is_handed_on(access: Access, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    Restic(access, {"PATH": os.environ["PATH"]}, cache=cache).run("snapshots", timeout=60)
    assert any(cache.iterdir())


def test_passwords_and_names_in_the_environment_do_not_matter(access: Access) -> None:
    strange = {
        "RESTIC_PASSWORD": "wrong",
        "RESTIC_PASSWORD_COMMAND": "false",
        "RESTIC_REPOSITORY": "/nonexistent",
        "RESTIC_REPOSITORY_FILE": "/nonexistent",
        "RESTIC_FROM_PASSWORD_COMMAND": "false",
    }
    assert program(access, **strange).run_json("snapshots", timeout=60) == []
    assert "correct" not in f"{access!r}"
