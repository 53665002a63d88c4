"""Whether a disk can be rolled back in place, and how what differs is found: every reason there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pullback import errors
from pullback.engine import swap
from pullback.flows import planning, rollbackplan
from pullback.model import points
from pullback.model.backups import Level
from pullback.model.checkpoints import Mark
from pullback.model.disks import Bitmap, Bus, Disk
from pullback.model.points import ImageFiles, Mode, Point, PointDisk

OWNER = "755e342bd54fe80e"
MiB = 1 << 20


def mark(step: int) -> Mark:
    return Mark(name=f"auto.{OWNER}.{step}", nonce=f"{step:016x}", first=step, last=step)


def disk(target: str = "vda", *steps: int, size: int = MiB, serial: str = "") -> Disk:
    """A disk of the machine, with the checkpoints of these steps; the last one records."""
    bitmaps = tuple(
        Bitmap(name=mark(step).bitmap, granularity=65536, count=0, recording=step == steps[-1]) for step in steps
    )
    return Disk(
        target=target, bus=Bus.VIRTIO, qdev=target, serial=serial, root="r", node="n", format="qcow2", size=size,
        bitmaps=bitmaps,
    )  # fmt: skip


def point(step: int, *targets: str, size: int = MiB, serial: str | None = None, block: int = MiB) -> Point:
    """The restore point of a step."""
    created = datetime(2026, 11, 24, tzinfo=UTC) + timedelta(hours=step)
    stored = tuple(
        PointDisk(
            target=target, qdev=None, serial=serial, source=None, source_format=None, size=size, mode=Mode.FULL,
            reason=None, parent=None, mark=mark(step), block_size=block, digest="0" * 64, stored=0, read=0,
            files=ImageFiles(image=f"{target}.qcow2", hashes=f"{target}.sha256", structure="0" * 64),
        )
        for target in targets or ("vda",)
    )  # fmt: skip
    return Point(
        id=points.new_id(created, f"{step:08x}"), machine="web01", created=created, level=Level.AUTO, pullback="0.1.0",
        qemu="7.2.22", engine="filter", pause=0.0, checkpoint=None, disks=stored,
    )  # fmt: skip


def plan(of: Disk, to: Point, *known: Point) -> rollbackplan.Plan:
    """The way of one disk."""
    kept = planning.Kept(points=known, owner=OWNER)
    [found] = rollbackplan.plan(planning.plan([of], kept, Level.AUTO), to, kept, machine="web01")
    return found


def test_what_differs_is_known_by_the_newest_point_and_the_bitmaps_since() -> None:
    first, second = point(1), point(2)
    found = plan(disk("vda", 1, 2), first, first, second)
    assert found.by_bitmaps
    assert (found.newest, found.since, found.reason) == (second, (mark(2).bitmap,), None)


def test_a_chain_is_never_too_long_to_go_back() -> None:
    known = [point(step) for step in range(1, 100)]
    assert plan(disk("vda", 98, 99), known[0], *known).by_bitmaps


@pytest.mark.parametrize(
    ("of", "known"),
    [
        (disk("vda"), [point(1)]),
        (disk("vda", 7), [point(1)]),
        (disk("vda", 1, 3), [point(1)]),
        (disk("vda", 1), [point(1, size=2 * MiB)]),
        (disk("vda", 1), []),
    ],
)
def test_without_good_bitmaps_the_disk_is_compared_whole_and_the_reason_said(of: Disk, known: Sequence[Point]) -> None:
    found = plan(of, point(1), *known)
    assert not found.by_bitmaps
    assert found.since == ()
    assert found.reason


def test_hashes_of_other_chunks_tell_nothing() -> None:
    newest = point(2)
    found = plan(disk("vda", 2), point(1, block=MiB // 2), newest)
    assert not found.by_bitmaps
    assert "chunks of another size" in str(found.reason)


def test_a_disk_of_another_size_is_refused() -> None:
    with pytest.raises(errors.DisksDiffer, match="vda has 2097152 bytes, and had 1048576 then"):
        plan(disk("vda", 1, size=2 * MiB), point(1), point(1))


def test_another_serial_number_is_another_disk() -> None:
    assert plan(disk("vda", 1, serial="a"), point(1, serial="a"), point(1)).by_bitmaps
    assert plan(disk("vda", 1), point(1, serial="a"), point(1)).by_bitmaps
    with pytest.raises(errors.DisksDiffer, match="serial number b, and had a then"):
        plan(disk("vda", 1, serial="b"), point(1, serial="a"), point(1))


def test_a_disk_whose_bitmaps_prove_that_it_is_another_one_is_refused() -> None:
    both = point(1, "vda", "vdb")
    newest = replace(point(2, "vda", "vdb"), disks=point(2, "vdb").disks)
    with pytest.raises(errors.DisksDiffer, match=r"vda was vdb in .*changed their places"):
        plan(disk("vda", 2), both, both, newest)


def test_the_disks_must_be_those_of_the_point() -> None:
    def choose(disks: Sequence[Disk], to: Point, *only: str) -> list[str]:
        return [found.target for found in rollbackplan.choose(disks, to, machine="web01", only=only)]

    vda, vdb = disk("vda"), disk("vdb")
    assert choose([vda, vdb], point(1, "vda", "vdb")) == ["vda", "vdb"]
    with pytest.raises(errors.DisksDiffer, match="restore point does not have its disk vdb"):
        choose([vda, vdb], point(1))
    with pytest.raises(errors.DisksDiffer, match="it has no disk vdb, which the restore point has"):
        choose([vda], point(1, "vda", "vdb"))
    with pytest.raises(errors.DisksDiffer, match="no disk vdb"):
        choose([vda, replace(vdb, left_out="it is read-only")], point(1, "vda", "vdb"))
    assert choose([vda, vdb], point(1), "vda") == ["vda"]
    with pytest.raises(errors.UnknownDisk):
        choose([vda, vdb], point(1), "vdb")
    with pytest.raises(errors.UnknownDisk):
        choose([vda], point(1, "vda", "vdb"), "vdb")


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        ([], False),
        (["-no-reboot"], True),
        (["--no-reboot"], True),
        (["-no-shutdown"], False),
        (["-action", "reboot=shutdown,panic=pause"], True),
        (["--action", "panic=pause,reboot=shutdown"], True),
        (["-action", "reboot=reset"], False),
        (["-action"], False),
        (["-name", "-no-reboots"], False),
    ],
)
def test_a_command_line_tells_whether_qemu_ends_at_a_reset(words: list[str], ends: bool) -> None:
    assert swap.ends_at_reset(["qemu", *words]) is ends
