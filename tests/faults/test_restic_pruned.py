"""What a backup relies on is pruned away under it: it fails as if nothing had been, or its point is whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from hindered import Seen, hindered, small_packs
from kit import Box, MakeBox, access_of, place_of, restic_of
from pullback import errors
from pullback.flows.repositories import opened_restic
from pullback.model import urls
from pullback.model.backups import Level
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.repo import Kind
from pullback.repo.restic import lockfile, times, unpacked
from pullback.units import KiB, MiB

SIZE = 6 * MiB


def machine(make_box: MakeBox) -> Box:
    """A machine with two restore points, of which the second inherits; each chunk and tree is a pack."""
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=SIZE, kind="restic")
    with small_packs():
        for chunk in range(5):
            box.write("vda", chunk + 1, chunk * MiB, 512 * (chunk + 1))
        box.backup()
        box.write("vda", 0x77, MiB, 64 * KiB)
        box.backup()
    box.write("vda", 0x78, 2 * MiB, 64 * KiB)
    return box


def prune(box: Box, points: Sequence[str]) -> None:
    """Somebody in a hurry."""
    restic = restic_of(box)
    restic.run("unlock", "--remove-all", timeout=60)
    restic.run("forget", *points, "--prune", timeout=60)


def ids(box: Box) -> list[str]:
    """All points, oldest first."""
    return [point.id for point in box.points()]


def other_lock(box: Box, *, exclusive: bool = True) -> None:
    """A lock of somebody on another host."""
    assert isinstance(box.place, urls.ResticRepository)
    with opened_restic(box.place, box.access) as repository:
        moment = times.write(datetime.now(UTC))
        lock = lockfile.Lock(time=moment, exclusive=exclusive, hostname="elsewhere", username="u", pid=1)
        name, data = unpacked.seal_file(repository.key, lockfile.encode(lock), compress=True)
        repository.store.write(Kind.LOCKS, name, data)


def at(moment: str, strike: Callable[[], None]) -> Seen:
    """Strikes once, right before that operation; `visible`: before the first one behind the point's own file."""
    seen = Seen()
    done: list[str] = []

    def maybe(number: int, operation: str, kind: Kind) -> None:
        visible = seen.count("write", Kind.SNAPSHOTS) == 1 and (operation, kind) != ("write", Kind.SNAPSHOTS)
        now = visible if moment == "visible" else moment == f"{operation}-{kind.value}-{seen.count(operation, kind)}"
        if now and not done:
            done.append(moment)
            strike()

    seen.strike = maybe
    return seen


def attempt(box: Box, seen: Seen) -> str | None:
    """The backup under which something happens: the point's id, None if it failed as it may."""
    before = {point.id for point in box.points()}
    with hindered(seen), small_packs():
        try:
            return box.backup().point.id
        except (errors.RepositoryChanged, errors.BusyError):
            assert {point.id for point in box.points()} <= before
            return None
        finally:
            assert box.leftovers() == []


def prove(box: Box, made: str | None) -> None:
    """What is visible is whole, and so is the next point."""
    if made is not None:
        assert box.restored(made) == box.image()
    box.write("vda", 0x79, 3 * MiB, 64 * KiB)
    report = box.backup()
    assert box.restored(report.point.id) == box.image()
    for point in box.points():
        box.restored(point.id)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("moment", "fails"),
    [
        ("list-index-1", False),  # our lock is there, nothing was read yet: the parent is gone, all is read
        ("write-data-1", True),
        ("write-index-1", True),
        ("write-snapshots-1", True),
        ("visible", False),
    ],
)
def test_pruned_at_any_moment_the_point_is_whole_or_there_is_none(make_box: MakeBox, moment: str, fails: bool) -> None:
    box = machine(make_box)
    former = ids(box)
    made = attempt(box, at(moment, lambda: prune(box, former)))
    assert (made is None) is fails
    prove(box, made)
    restic = restic_of(box)
    restic.run("prune", timeout=60)
    assert "no errors were found" in restic.run("check", "--read-data", timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_pruned_before_every_operation_the_point_is_whole_or_there_is_none(make_box: MakeBox) -> None:
    with small_packs():
        box = machine(make_box)
        for number in range(1, 60):
            box.write("vda", number + 100, 2 * MiB, 64 * KiB)
            seen, former = Seen(), ids(box)
            seen.strike = partial(_at_number, number, partial(prune, box, former))
            prove(box, attempt(box, seen))
            if len(seen.operations) < number:
                break
        assert number > 20


def _at_number(number: int, strike: Callable[[], None], at: int, operation: str, kind: Kind) -> None:
    if at == number:
        strike()


@pytest.mark.parametrize("moment", ["write-index-1", "write-snapshots-1", "visible"])
def test_while_somebody_prunes_who_removed_our_lock_no_point_stays(make_box: MakeBox, moment: str) -> None:
    box = machine(make_box)

    def strike() -> None:
        restic_of(box).run("unlock", "--remove-all", timeout=60)
        other_lock(box)

    assert attempt(box, at(moment, strike)) is None
    restic_of(box).run("unlock", "--remove-all", timeout=60)
    prove(box, None)


def test_a_lock_that_was_removed_alone_is_no_reason_to_fail(make_box: MakeBox) -> None:
    box = machine(make_box)
    made = attempt(box, at("write-data-1", lambda: restic_of(box).run("unlock", "--remove-all", timeout=60)))  # type: ignore[arg-type]
    assert made is not None
    assert box.points()[-1].disks[0].mode is Mode.INCREMENTAL
    prove(box, made)


# -- damaged before --------------------------------------------------------------------------


def packs(box: Box) -> list[Path]:
    """Those that are there, the oldest first."""
    found = [path for path in box.repository.glob("data/*/*") if len(path.name) == 64]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("harm", ["missing", "short", "indexes", "one index"])
def test_what_the_repository_lost_before_is_stored_again_from_the_live_disk(make_box: MakeBox, harm: str) -> None:
    box = machine(make_box)
    if harm in ("missing", "short"):
        for pack in packs(box):
            if harm == "missing":
                pack.unlink()
            else:
                pack.chmod(0o600)
                pack.write_bytes(pack.read_bytes()[:-1])
    else:
        for index in list(box.repository.glob("index/*"))[: 1 if harm == "one index" else None]:
            index.unlink()
    report = box.backup()
    assert box.restored(report.point.id) == box.image()
    box.write("vda", 0x42, 0, 512)
    again = box.backup()
    assert again.point.disks[0].mode is Mode.INCREMENTAL
    assert box.restored(again.point.id) == box.image()


def test_a_pack_that_was_lost_is_read_again_without_reading_the_rest(make_box: MakeBox) -> None:
    box = machine(make_box)
    box.backup()
    newest = box.points()[-1]
    with contextlib.ExitStack() as stack:
        place = place_of(box.repository, "restic")
        assert isinstance(place, urls.ResticRepository)
        repository = stack.enter_context(opened_restic(place, access_of(box.directory)))
        chunk = repository.hashes(newest, "vda").entry(4)
        assert chunk is not None
        [lost] = {found.pack.hex() for found in repository.index.find(chunk)}
    (box.repository / "data" / lost[:2] / lost).unlink()
    report = box.backup()
    [disk] = report.point.disks
    assert (disk.mode, disk.read) == (Mode.INCREMENTAL, MiB)
    assert box.restored(report.point.id) == box.image()
    assert box.restored(newest.id) == box.image()  # healed with it
    assert "no errors were found" in restic_of(box).run("rebuild-index", timeout=60) + restic_of(box).run(
        "check", timeout=60
    )


def test_a_whole_read_of_what_is_stored_already_adds_nothing(make_box: MakeBox) -> None:
    box = machine(make_box)
    box.backup()
    before = len(packs(box))
    report = box.backup(level=Level.FULL)
    assert report.point.disks[0].mode is Mode.FULL
    assert len(packs(box)) - before <= 2  # the manifest, the root tree
