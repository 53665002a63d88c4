"""A repository in restic's format that is full, fails, hangs or is away: no point, no gap, nothing left in QEMU."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mounts
import proxy
from hindered import Seen, command, hindered, small_packs
from kit import PASSWORD, Box, MakeBox, make_repository, place_of
from mounts import Mount
from pullback import errors, repo
from pullback.model import urls
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.repo import Kind
from pullback.repo.restic import keys
from pullback.repo.store.s3 import Patience, S3Store
from pullback.testing.stores import delaying
from pullback.units import KiB, MiB
from seaweed import Server
from victim import eventually, running

SIZE = 6 * MiB
#: Seconds in which a failed backup has ended, and the machine is as before.
PROMISE = 15.0


class Life:
    """A machine with a restore point in a repository that will fail, and a change since."""

    def __init__(self, make_box: MakeBox, place: urls.Repository | None = None) -> None:
        self.box: Box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=SIZE, kind="restic")
        self.place = place or self.box.place
        self.box.scramble("vda", 1, 0, MiB)
        self.first = self.backup()
        self.content = self.box.image()
        self.box.scramble("vda", 2, MiB, 4 * MiB)

    def backup(self) -> str:
        """One that must succeed; what it reads is no more than what changed."""
        report = self.box.backup(repository=self.place)
        assert report.broken == ()
        return report.point.id

    def fails(self, *expected: type[errors.PullbackError]) -> errors.PullbackError:
        """One that must fail so, and soon."""
        begun = time.monotonic()
        with pytest.raises(expected) as caught:
            self.box.backup(repository=self.place)
        assert time.monotonic() - begun < PROMISE
        assert running(self.box)
        assert self.box.leftovers() == []
        assert len(self.box.checkpoints("vda")) == 1  # merged back
        return caught.value

    def prove(self) -> None:
        """No point, and no change, was lost; the next one is an increment of the first."""
        self.box.scramble("vda", 3, 5 * MiB, 64 * KiB)
        made = self.backup()
        points = self.points()
        assert [point.id for point in points] == [self.first, made]
        [disk] = points[1].disks
        assert disk.mode is Mode.INCREMENTAL
        assert disk.read == 5 * MiB
        assert self.box.restored(made, repository=self.place) == self.box.image()
        assert self.box.restored(self.first, repository=self.place) == self.content

    def points(self) -> list[Any]:
        """All, oldest first."""
        from pullback.flows.repositories import opened

        with opened(self.place, self.box.access) as repository:
            return list(repository.listing(self.box.name).points)


# -- a directory -----------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, MiB, 3 * MiB])
def test_a_full_file_system_costs_nothing_but_this_attempt(make_box: MakeBox, mount: Mount, room: int) -> None:
    directory = mount.tmpfs(24 * MiB)
    make_repository(directory / "repo", directory.parent / "cache")
    life = Life(make_box, place_of(directory / "repo", "restic"))
    mounts.fill(directory, room)
    with small_packs():
        error = life.fails(errors.DestinationFull)
    assert str(directory) in str(error)
    mounts.empty(directory)
    life.prove()


def test_a_repository_that_was_removed_is_told(make_box: MakeBox) -> None:
    life = Life(make_box)
    life.box.repository.rename(life.box.directory / "elsewhere")
    error = life.fails(errors.NoRepository)
    assert str(life.box.repository) in str(error)
    (life.box.directory / "elsewhere").rename(life.box.repository)
    life.prove()


def test_a_repository_that_is_removed_in_the_middle_ends_the_backup(make_box: MakeBox) -> None:
    life = Life(make_box)
    kept = life.box.directory / "kept"
    subprocess.run(["cp", "-r", str(life.box.repository), str(kept)], check=True)

    def strike(number: int, operation: str, kind: Kind) -> None:
        if (operation, kind) == ("write", Kind.DATA):
            subprocess.run(["rm", "-rf", str(life.box.repository)], check=True)

    with hindered(Seen(strike=strike)), small_packs():
        error = life.fails(errors.StoreUnreachable)
    assert "was removed" in str(error)
    kept.rename(life.box.repository)
    life.prove()


# -- any store -------------------------------------------------------------------------------

_REASON = "as was asked for"


def raising(make: Callable[[], errors.PullbackError], moment: str, times: int = 1 << 30) -> Seen:
    """From that operation on, those of its sort fail."""
    operation, kind, number = moment.split("-")

    def strike(at: int, *now: object) -> None:
        count = seen.count(operation, Kind(kind))
        if now == (operation, Kind(kind)) and int(number) <= count < int(number) + times:
            raise make()

    seen = Seen(strike=strike)
    return seen


@pytest.mark.parametrize("moment", ["write-locks-1", "list-data-1", "write-data-1", "write-data-5", "write-index-1"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: errors.StoreFailed(store="it", what="writing", reason="Input/output error"),
        lambda: errors.StoreUnreachable(store="it", reason=_REASON),
        lambda: errors.StoreRefused(store="it", what="writing", reason=_REASON, way_out="Ask."),
    ],
    ids=["EIO", "away", "refused"],
)
def test_whatever_fails_is_told_as_it_is(
    make_box: MakeBox, make: Callable[[], errors.PullbackError], moment: str
) -> None:
    life = Life(make_box)
    with hindered(raising(make, moment)), small_packs():
        error = life.fails(type(make()))
    assert str(error) == str(make())
    life.prove()


def test_a_point_that_does_not_become_visible_is_not_there(make_box: MakeBox) -> None:
    life = Life(make_box)
    failing = raising(lambda: errors.StoreFailed(store="it", what="writing", reason="EIO"), "write-snapshots-1")
    with hindered(failing):
        life.fails(errors.StoreFailed)
    life.prove()


def test_all_that_was_sent_before_a_failure_is_not_sent_again(make_box: MakeBox) -> None:
    life = Life(make_box)
    failing = raising(lambda: errors.StoreFailed(store="it", what="writing", reason="EIO"), "write-index-1")
    with hindered(failing), small_packs():
        life.fails(errors.StoreFailed)
    seen = Seen()
    with hindered(seen), small_packs():
        life.backup()
    assert failing.count("write", Kind.DATA) >= 4 + 3
    assert seen.count("write", Kind.DATA) <= 2  # the manifest and the root tree, which has its time
    assert life.box.restored() == life.box.image()


def test_a_slow_store_is_waited_for(make_box: MakeBox) -> None:
    life = Life(make_box)
    with hindered(delaying(0.1)), small_packs():
        life.prove()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.timeout(60)
@pytest.mark.parametrize("moment", ["hang-write-data-1", pytest.param("hang-write-data-3", marks=pytest.mark.slow)])
def test_a_store_that_hangs_is_left_by_a_signal(make_box: MakeBox, moment: str, number: signal.Signals) -> None:
    life = Life(make_box)
    with command(life.box, moment) as process:
        assert process.stdout is not None
        assert "hangs" in process.stdout.readline()
        begun = time.monotonic()
        process.send_signal(number)
        said, _ = process.communicate(timeout=40)
        assert time.monotonic() - begun < PROMISE, said
    assert process.returncode == 128 + number, said
    assert running(life.box)
    assert life.box.leftovers() == []
    life.prove()


@pytest.mark.timeout(60)
def test_a_backup_that_may_send_little_is_ended_at_once(make_box: MakeBox) -> None:
    life = Life(make_box)
    with command(life.box, "write-index-9", "--limit-rate", "10KiB") as process:
        eventually(lambda: life.box.leftovers() != [], seconds=20, what="begun")
        time.sleep(2)  # all was read, and waits to be sent
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=40)
        assert time.monotonic() - begun < PROMISE, said
    assert process.returncode == 128 + signal.SIGTERM, said
    assert life.box.leftovers() == []
    life.prove()


# -- a bucket --------------------------------------------------------------------------------


@contextmanager
def bucket(server: Server, name: str, directory: Path, patience: Patience) -> Iterator[tuple[proxy.Proxy, Any]]:
    """An empty repository in a new bucket behind a proxy: the proxy, the repository's place."""
    server.make_bucket(name)
    with proxy.before(server.port) as between:
        place = server.place(name, "backups", between.port)
        with S3Store(place, server.environ) as store:
            cost = keys.Cost(1024, 8, 1)
            repo.create_repository(store, PASSWORD, caches=directory, cost=cost).close()
        real = repo.open_store
        repo.open_store = lambda *_, **__: S3Store(place, server.environ, patience=patience)
        try:
            yield between, urls.ResticRepository(location=place)
        finally:
            repo.open_store = real


_IMPATIENT = Patience(request=2, transfer=2, total=3, first=3, pause=0.05, longest=0.2)
_LONG = replace(_IMPATIENT, total=30)
_SLOW_DOWN = proxy.Fault(status=503, code="SlowDown")
_INTERNAL = proxy.Fault(status=500, code="InternalError")
_DENIED = proxy.Fault(status=403, code="AccessDenied")
_CUT = proxy.Fault(cut="after")


def name_of(request: pytest.FixtureRequest) -> str:
    """A bucket for the test."""
    return re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())[-50:].strip("-")


@pytest.mark.parametrize("fault", [_SLOW_DOWN, _INTERNAL, _CUT], ids=["slowdown", "internal", "cut"])
def test_a_bucket_that_stumbles_is_asked_again(
    make_box: MakeBox, s3_server: Server, tmp_path: Path, request: pytest.FixtureRequest, fault: proxy.Fault
) -> None:
    with bucket(s3_server, name_of(request), tmp_path, _LONG) as (between, place):
        life = Life(make_box, place)
        between.rule = lambda asked: fault if asked.number % 3 == 0 else None
        life.prove()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (_SLOW_DOWN, errors.StoreUnreachable),
        (_INTERNAL, errors.StoreUnreachable),
        (_DENIED, errors.StoreRefused),
        (proxy.Fault(cut="before"), errors.StoreUnreachable),
        (proxy.Fault(until=threading.Event()), errors.StoreUnreachable),
    ],
    ids=["slowdown", "internal", "denied", "cut", "hangs"],
)
def test_a_bucket_that_is_lost_in_the_middle_ends_the_backup_soon(
    make_box: MakeBox,
    s3_server: Server,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    fault: proxy.Fault,
    expected: type[errors.PullbackError],
) -> None:
    with bucket(s3_server, name_of(request), tmp_path, _IMPATIENT) as (between, place):
        life = Life(make_box, place)
        begun = threading.Event()

        def rule(asked: proxy.Request) -> proxy.Fault | None:
            if asked.method == "PUT" and "/data/" in asked.path:
                begun.set()
            return fault if begun.is_set() else None

        between.rule = rule
        life.fails(expected)
        between.rule = lambda asked: None
        if fault.until is not None:
            fault.until.set()
        life.prove()
