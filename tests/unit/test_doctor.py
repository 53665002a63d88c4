"""What the doctor makes of what it sees."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pullback import state
from pullback.flows import doctor, health, machinehealth, storehealth
from pullback.flows.health import Status, Subject
from pullback.flows.repositories import Access
from pullback.model import checkpoints, urls
from pullback.model.checkpoints import Mark
from pullback.model.disks import Bitmap, Bus, Disk
from pullback.model.points import Point

SUBJECT = Subject(area="machine", subject="web01")
OWNER = "0123456789abcdef"


def bitmap(step: int, *, recording: bool = False, inconsistent: bool = False, owner: str = OWNER) -> Bitmap:
    """A checkpoint's bitmap."""
    name = checkpoints.automatic_name(owner, datetime(2026, 11, 24, tzinfo=UTC))
    mark = Mark(name=name, nonce=f"{step:016x}", first=step, last=step)
    return Bitmap(
        name=mark.bitmap,
        granularity=checkpoints.GRANULARITY,
        count=0,
        recording=recording,
        inconsistent=inconsistent,
        persistent=True,
    )


def disk(*bitmaps: Bitmap, **facts: object) -> Disk:
    """A disk that takes part."""
    known = {"target": "vda", "bus": Bus.VIRTIO, "qdev": "vda", "node": "vda", "root": "vda", "format": "qcow2"}
    return Disk(**known | facts, bitmaps=bitmaps)  # type: ignore[arg-type]


def of_disks(*disks: Disk, owners: dict[str, str] | None = None) -> list[tuple[str, Status]]:
    """Names and statuses of what is found."""
    return [(check.name, check.status) for check in machinehealth._disks(SUBJECT, disks, owners)]


def test_sound_checkpoints_are_one_good_line() -> None:
    assert of_disks(disk(bitmap(1), bitmap(2, recording=True)), owners={OWNER: "main"}) == [("bitmaps", Status.OK)]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (disk(bitmap(1, inconsistent=True)), "inconsistent"),
        (disk(bitmap(1, recording=True), Bitmap(name="theirs", granularity=1, count=0, inconsistent=True)), "theirs"),
        (disk(buried=("x",)), "backing image"),
        (disk(*(bitmap(step, recording=step == 40) for step in range(1, 41))), "40 checkpoints"),
        (disk(bitmap(1, recording=True, owner="f" * 16)), "not configured"),
    ],
)
def test_what_is_wrong_with_bitmaps_is_a_warning_with_a_remedy(found: Disk, words: str) -> None:
    checks = list(machinehealth._disks(SUBJECT, [found], {OWNER: "main"}))
    [bad] = [check for check in checks if check.status is Status.WARNING]
    assert words in bad.finding
    assert bad.remedy


def test_nothing_is_said_of_owners_while_not_all_repositories_are_known() -> None:
    assert of_disks(disk(bitmap(1, recording=True, owner="f" * 16))) == [("bitmaps", Status.OK)]


def test_a_machine_without_disks_to_back_up_has_a_problem() -> None:
    assert of_disks(disk(left_out="it is read-only")) == [("disks", Status.PROBLEM)]


def place() -> storehealth.Place:
    """A repository, by its name."""
    where = urls.ResticRepository(location=urls.LocalPlace(path=Path("/srv/backup")))
    return storehealth.Place(label="main", place=where, access=Access(environ={}))


@pytest.mark.parametrize(
    ("age", "status", "words"),
    [
        (timedelta(hours=30), Status.OK, "30.0 hours old"),
        (timedelta(hours=60), Status.WARNING, "2.5 days old"),
        (timedelta(hours=-5), Status.WARNING, "of the future"),
    ],
)
def test_the_age_of_the_newest_point_is_judged(age: timedelta, status: Status, words: str) -> None:
    point = _point(datetime.now(UTC) - age)
    [check] = storehealth.ages(place(), {"web01": point}, ["web01"], timedelta(days=2))
    assert check.status is status
    assert words in check.finding


def _point(created: datetime) -> Point:
    from pullback.model.backups import Level

    return Point(
        id="",
        machine="web01",
        created=created,
        level=Level.AUTO,
        pullback="0",
        qemu="7.2",
        engine="filter",
        pause=0.0,
        checkpoint=None,
        disks=(),
    )


def test_a_machine_without_a_point_is_a_warning() -> None:
    [check] = storehealth.ages(place(), {}, ["web01"], timedelta(days=2))
    assert (check.status, check.finding) == (Status.WARNING, "there is no restore point of web01")


def test_directories_are_looked_at_and_not_made(tmp_path: Path) -> None:
    known = state.Directories(state=tmp_path / "a" / "b", runtime=tmp_path / "open", cache=tmp_path / "file" / "cache")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").touch()
    checks = {check.name: check.status for check in health.directories(known)}
    assert checks == {"state": Status.OK, "runtime": Status.PROBLEM, "cache": Status.PROBLEM}
    assert sorted(os.listdir(tmp_path)) == ["file", "open"]


def test_scratch_is_judged_by_the_rule_of_backups(tmp_path: Path) -> None:
    assert health.scratch_room(SUBJECT, Path("/proc/scratch"), []).status is Status.PROBLEM
    huge = health.scratch_room(SUBJECT, tmp_path / "scratch", [disk(size=1 << 62)])
    assert huge.status is Status.PROBLEM
    assert "needs at least" in huge.finding or "not a local one" in huge.finding
    assert not (tmp_path / "scratch").exists()


def test_programs_that_are_missing_are_told_by_their_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "setpriv").symlink_to("/usr/bin/setpriv")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {check.subject: check for check in health.programs()}
    assert found["setpriv"].status is Status.OK
    assert found["qemu-img"].status is Status.PROBLEM
    assert found["restic"].status is Status.WARNING
    assert found["restic"].remedy == "apt-get install restic"


def test_the_worst_decides() -> None:
    ok, warning, problem = SUBJECT.ok("a", "x"), SUBJECT.warning("a", "x"), SUBJECT.problem("a", "x")
    assert doctor.Report(checks=(ok,)).worst is Status.OK
    assert doctor.Report(checks=(ok, warning)).worst is Status.WARNING
    assert doctor.Report(checks=(warning, problem, ok)).worst is Status.PROBLEM
