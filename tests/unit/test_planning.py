"""What of each disk is read, and why: every reason there is."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pullback import errors
from pullback.flows import planning
from pullback.model import points
from pullback.model.backups import Level
from pullback.model.checkpoints import Mark
from pullback.model.disks import Bitmap, Bus, Disk
from pullback.model.points import ImageFiles, Mode, Point, PointDisk, PointRef

START = datetime(2026, 11, 24, 6, 0, tzinfo=UTC)
OWNER = "755e342bd54fe80e"
SIZE = 1 << 20


def mark(step: int, *, last: int | None = None, name: str = "") -> Mark:
    """The mark of the checkpoint of a step."""
    return Mark(name=name or f"auto.{OWNER}.{step}", nonce=f"{step:016x}", first=step, last=last or step)


def bitmap(of: Mark, *, recording: bool = False, inconsistent: bool = False) -> Bitmap:
    """Its bitmap."""
    return Bitmap(name=of.bitmap, granularity=65536, count=0, recording=recording, inconsistent=inconsistent)


def disk(*bitmaps: Bitmap, target: str = "vda", size: int = SIZE) -> Disk:
    """A disk of the machine."""
    return Disk(
        target=target, bus=Bus.VIRTIO, qdev=target, root="r", node="n", format="qcow2", size=size, bitmaps=bitmaps
    )


def point(
    step: int, *, made: Mark | None, parent: PointRef | None = None, target: str = "vda", size: int = SIZE
) -> Point:
    """A restore point with one disk."""
    created = START + timedelta(hours=step)
    stored = PointDisk(
        target=target, qdev=None, serial=None, source=None, source_format=None, size=size,
        mode=Mode.INCREMENTAL if parent else Mode.FULL, reason=None, parent=parent, mark=made,
        block_size=1 << 20, digest="0" * 64, stored=0, read=0,
        files=ImageFiles(image=f"{target}.qcow2", hashes=f"{target}.sha256", structure="0" * 64),
    )  # fmt: skip
    return Point(
        id=points.new_id(created, f"{step:08x}"), machine="web01", created=created, level=Level.AUTO, pullback="0.1.0",
        qemu="7.2.22", engine="filter", pause=0.0, checkpoint=made.name if made else None, disks=(stored,),
    )  # fmt: skip


#: What a `dir:` repository allows.
LONGEST = 60
FIRST = point(1, made=mark(1))
TRACKED = disk(bitmap(mark(1), recording=True))


def plan(of: Disk, *known: Point, level: Level = Level.AUTO) -> planning.DiskPlan:
    """The plan for one disk."""
    [found] = planning.plan([of], planning.Kept(points=known, owner=OWNER, longest=LONGEST), level)
    return found


# -- an increment ----------------------------------------------------------------------------


def test_an_increment_builds_on_the_newest_point_whose_checkpoint_is_on_the_disk() -> None:
    second = point(2, made=mark(2), parent=PointRef(point=FIRST.id, target="vda"))
    both = disk(bitmap(mark(1)), bitmap(mark(2), recording=True))
    found = plan(both, FIRST, second)
    assert (found.whole, found.reason, found.broken) == (False, None, False)
    assert found.parent == PointRef(point=second.id, target="vda")
    assert found.since == (mark(2).bitmap,)


def test_an_older_point_is_the_parent_when_the_newer_ones_are_lost() -> None:
    """Somebody removed the newest point: the changes since the one before are the union of both bitmaps."""
    both = disk(bitmap(mark(1)), bitmap(mark(2), recording=True))
    assert plan(both, FIRST).since == (mark(1).bitmap, mark(2).bitmap)


def test_a_merged_neighbour_is_no_reason_to_read_everything() -> None:
    assert not plan(disk(bitmap(mark(1, last=3), recording=True)), FIRST).whole


def test_a_disk_that_moved_to_another_target_goes_on() -> None:
    found = plan(replace(TRACKED, target="vdb"), FIRST)
    assert found.parent == PointRef(point=FIRST.id, target="vda")
    assert found.reason == "it was vda before"


# -- read whole, as expected -----------------------------------------------------------------

RAW = replace(disk(), untrackable="its format raw cannot hold bitmaps")


@pytest.mark.parametrize(
    ("of", "known", "level", "reason"),
    [
        (disk(), [], Level.AUTO, "it is the first backup"),
        (disk(target="vdb"), [FIRST], Level.AUTO, "it is a new disk"),
        (disk(), [point(1, made=None)], Level.AUTO, "it had no checkpoint"),
        (RAW, [FIRST], Level.AUTO, "its format raw cannot hold bitmaps"),
        (TRACKED, [FIRST], Level.FULL, None),
    ],
)
def test_a_whole_read_that_was_to_be_expected(of: Disk, known: list[Point], level: Level, reason: str | None) -> None:
    found = plan(of, *known, level=level)
    assert found.whole
    assert found.reason == reason
    assert not found.broken


def test_a_chain_that_is_too_long_is_begun_anew() -> None:
    known = [FIRST]
    for step in range(2, LONGEST + 2):
        known.append(point(step, made=mark(step), parent=PointRef(point=known[-1].id, target="vda")))
        found = plan(disk(bitmap(mark(step), recording=True)), *known)
        assert found.whole == (step >= LONGEST)
    assert found.reason == f"its chain has {LONGEST} images: a new one is begun"
    assert not found.broken


# -- read whole, because the chain broke -----------------------------------------------------


@pytest.mark.parametrize(
    ("of", "reason", "wrecks"),
    [
        (disk(), "its last checkpoint is not on the disk", 0),
        (replace(disk(), buried=(mark(1).bitmap,)), "its checkpoints are in a backing image", 0),
        (disk(bitmap(mark(1), inconsistent=True)), "its bitmaps are inconsistent", 1),
        (disk(bitmap(mark(1))), "its newest checkpoint is not recording", 1),
        (disk(bitmap(mark(1)), bitmap(mark(3), recording=True)), "a checkpoint is missing between", 2),
        (disk(bitmap(mark(1), recording=True), size=2 * SIZE), f"its size changed from {SIZE} to {2 * SIZE}", 0),
    ],
)
def test_a_broken_chain_is_told_and_its_wreck_removed(of: Disk, reason: str, wrecks: int) -> None:
    found = plan(of, FIRST)
    assert found.whole
    assert reason in (found.reason or "")
    assert found.broken
    assert len(found.wrecks) == wrecks


def test_checkpoints_of_others_alone_are_no_parent() -> None:
    theirs = mark(1, name="before-upgrade")
    found = plan(disk(bitmap(theirs, recording=True)), point(1, made=mark(2)))
    assert found.whole
    assert found.broken


def test_a_wreck_does_not_matter_where_everything_is_read_anyway() -> None:
    found = plan(disk(bitmap(mark(1), inconsistent=True)), FIRST, level=Level.FULL)
    assert (found.reason, found.broken, len(found.wrecks)) == (None, False, 1)


# -- the part of the snapshot ----------------------------------------------------------------


def test_the_new_checkpoint_follows_the_newest() -> None:
    request = plan(TRACKED, FIRST).request("auto.x.2")
    assert request.checkpoint is not None
    assert (request.checkpoint.first, request.checkpoint.last) == (2, 2)
    assert request.freeze == mark(1).bitmap


def test_after_a_wreck_the_chain_begins_anew() -> None:
    request = plan(disk(bitmap(mark(5), inconsistent=True)), FIRST).request("auto.x.2")
    assert request.checkpoint is not None
    assert (request.checkpoint.first, request.freeze) == (1, None)


def test_an_untrackable_disk_gets_no_checkpoint() -> None:
    assert plan(RAW).request("auto.x.1").checkpoint is None


# -- which disks -----------------------------------------------------------------------------

VDA, VDB = disk(), disk(target="vdb")
CDROM = replace(disk(target="sda"), node=None, left_out="it has no medium")
FLOPPY = replace(disk(target="fda"), left_out="it is removable")
ALL = (VDA, VDB, CDROM, FLOPPY)


@pytest.mark.parametrize(
    ("only", "exclude", "chosen"),
    [
        ([], [], ["vda", "vdb"]),
        (["vdb"], [], ["vdb"]),
        ([], ["vda"], ["vdb"]),
        (["vda", "vdb"], ["vda"], ["vdb"]),
        (["fda"], [], ["fda"]),
    ],
)
def test_disks_are_chosen(only: list[str], exclude: list[str], chosen: list[str]) -> None:
    found = planning.select(ALL, machine="web01", only=only, exclude=exclude)
    assert [item.target for item in found] == chosen


@pytest.mark.parametrize(
    ("only", "exclude", "error"),
    [
        (["vdz"], [], errors.UnknownDisk),
        ([], ["vdz"], errors.UnknownDisk),
        (["sda"], [], errors.UsageError),
        ([], ["vda", "vdb"], errors.NoDisks),
    ],
)
def test_a_choice_that_cannot_be_is_refused(only: list[str], exclude: list[str], error: type[Exception]) -> None:
    with pytest.raises(error):
        planning.select(ALL, machine="web01", only=only, exclude=exclude)


# -- afterwards ------------------------------------------------------------------------------


def test_only_checkpoints_of_this_repository_are_released_newest_first() -> None:
    others = [mark(2, name="before-upgrade"), mark(3, name="auto.0000000000000000.3")]
    links = [mark(1), *others, mark(4), mark(5)]
    chain = planning.chain_of(disk(*(bitmap(link, recording=link.first == 5) for link in links)))
    assert planning.to_release(chain, OWNER, mark(5)) == (mark(4).nonce, mark(1).nonce)
    assert planning.to_release(chain, "ffffffffffffffff", mark(5)) == ()
