"""Where an increment cannot be: the disk is read whole, only what changed is stored, and the reason is said."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kit import Box, MakeBox, make_repository, place_of, restic_of
from pullback.model import urls
from pullback.model.points import Mode, PointDisk
from pullback.programs import qemu
from pullback.repo.restic import pending
from pullback.units import KiB, MiB

SIZE = 6 * MiB


def machine(make_box: MakeBox, format: str = "qcow2") -> Box:
    """A machine with one restore point, and a change of one chunk since."""
    box = make_box(qemu.Disk(id="vda", path=Path("a.img"), format=format), size=SIZE, kind="restic")
    box.scramble("vda", 1, 0, 4 * MiB)
    box.backup()
    box.write("vda", 0x22, 2 * MiB, 64 * KiB)
    return box


def whole(box: Box, reason: str, *, place: urls.Repository | None = None, broken: bool = True) -> PointDisk:
    """The next backup reads the disk whole for that reason, stores only what changed, and the one after is small."""
    place = place or box.place
    report = box.backup(repository=place)
    [disk] = report.point.disks
    assert (disk.mode, disk.parent, disk.read) == (Mode.FULL, None, 5 * MiB)
    assert disk.reason is not None
    assert reason in disk.reason
    assert any(disk.reason in note for note in report.notes)
    assert (report.broken == ("vda",)) is broken
    assert box.restored(report.point.id, repository=place) == box.image()
    box.write("vda", 0x23, 3 * MiB, 512)
    [again] = box.backup(repository=place).point.disks
    assert again.mode is Mode.INCREMENTAL
    assert again.read == MiB or box.disks[0].format == "raw"
    assert box.restored(repository=place) == box.image()
    return disk


def only_what_changed(disk: PointDisk) -> None:
    """One chunk, of 1 MiB that nobody can compress, and trees."""
    assert 900 * KiB < disk.stored < MiB + 64 * KiB


def test_without_its_bitmap(make_box: MakeBox) -> None:
    box = machine(make_box)
    box.write("vda", 0x22, 4 * MiB, 512)  # so that five chunks are no zeroes
    [bitmap] = box.checkpoints("vda")
    box.command("block-dirty-bitmap-remove", {"node": "vda-format", "name": bitmap["name"]})
    only_what_changed(whole(box, "its last checkpoint is not on the disk"))


def test_with_a_broken_bitmap(make_box: MakeBox) -> None:
    box = machine(make_box)
    box.write("vda", 0x22, 4 * MiB, 512)
    box.quit()  # only then QEMU stores bitmaps
    box.start()
    box.kill()
    box.start()
    only_what_changed(whole(box, "its bitmaps are inconsistent"))


def test_of_another_size(make_box: MakeBox) -> None:
    box = machine(make_box)
    box.command("block_resize", {"node-name": "vda-format", "size": SIZE + MiB})
    box.model["vda"].extend(bytes(MiB))
    box.write("vda", 0x22, SIZE, 512)
    only_what_changed(whole(box, f"its size changed from {SIZE} to {SIZE + MiB} bytes"))


def test_raw_and_qemu_was_started_anew(make_box: MakeBox) -> None:
    box = machine(make_box, "raw")
    box.write("vda", 0x22, 4 * MiB, 512)
    qemu.hmp(box.hmp, 'qemu-io vda-format "flush"')
    box.quit()
    box.start()
    only_what_changed(whole(box, "known only while QEMU runs", broken=False))


def test_its_parent_was_forgotten(make_box: MakeBox) -> None:
    """And pruned: all is stored again."""
    box = machine(make_box)
    box.write("vda", 0x22, 4 * MiB, 512)
    restic_of(box).run("forget", box.points()[0].id, "--prune", timeout=60)
    disk = whole(box, "there is no restore point of it", broken=False)
    assert disk.stored > 3 * MiB


def test_its_parent_was_forgotten_and_an_older_one_is_there(make_box: MakeBox) -> None:
    """Its checkpoint went when the newer one was made, so the older one is no help but for its chunks."""
    box = machine(make_box)
    box.backup()
    box.write("vda", 0x24, 4 * MiB, 512)
    restic_of(box).run("forget", box.points()[1].id, "--prune", timeout=60)
    disk = whole(box, "not in the repository any more")
    assert disk.stored < MiB + 128 * KiB  # the forgotten point's chunk, and the new one


def test_another_repository_at_the_same_place(make_box: MakeBox) -> None:
    box = machine(make_box)
    box.write("vda", 0x22, 4 * MiB, 512)
    subprocess.run(["rm", "-r", str(box.repository)], check=True)
    make_repository(box.repository, box.access.caches)
    report = box.backup()
    [disk] = report.point.disks
    assert (disk.mode, disk.reason) == (Mode.FULL, "it is the first backup")
    assert box.restored() == box.image()
    box.write("vda", 0x25, 0, 512)
    [again] = box.backup().point.disks
    assert (again.mode, again.read) == (Mode.INCREMENTAL, MiB)
    assert box.restored() == box.image()
    # Nobody can know that the old one is gone: its checkpoint stays until somebody deletes it.
    assert len(box.checkpoints("vda")) == 2


def test_chunks_of_another_size(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    box = machine(make_box)
    monkeypatch.setattr(pending, "block_size_for", lambda size: 2 * MiB)
    report = box.backup()
    [disk] = report.point.disks
    assert disk.mode is Mode.FULL
    assert disk.reason is not None
    assert "chunks of another size" in disk.reason
    assert any("chunks of another size" in note for note in report.notes)
    assert box.restored() == box.image()
    box.write("vda", 0x25, 0, 512)
    [again] = box.backup().point.disks
    assert (again.mode, again.read) == (Mode.INCREMENTAL, 2 * MiB)
    assert box.restored() == box.image()
    assert "no errors were found" in restic_of(box).run("check", "--read-data", timeout=60)


def test_two_repositories_in_turn_are_independent(make_box: MakeBox) -> None:
    box = machine(make_box)
    second = place_of(box.directory / "second", "restic")
    make_repository(box.directory / "second", box.access.caches)
    box.backup(repository=second)
    contents: dict[str, list[tuple[str, dict[str, bytes]]]] = {"first": [], "second": []}
    places = {"first": box.place, "second": second}
    for number, name in enumerate(["first", "second", "second", "first", "second", "first", "first"]):
        box.write("vda", 0x30 + number, (number % 6) * MiB + 4096 * number, 4096)
        box.zero("vda", ((number + 3) % 6) * MiB, 64 * KiB)
        [disk] = (report := box.backup(repository=places[name])).point.disks
        assert disk.mode is Mode.INCREMENTAL
        contents[name].append((report.point.id, box.image()))
    assert len(box.checkpoints("vda")) == 2
    for name, points in contents.items():
        for point, content in points:
            assert box.restored(point, repository=places[name]) == content
        assert "no errors" in restic_of(box, Path(places[name].location.path)).run("check", "--read-data", timeout=60)  # type: ignore[union-attr]


def test_a_cache_that_is_gone_costs_nothing_but_time(make_box: MakeBox) -> None:
    box = machine(make_box)
    subprocess.run(["rm", "-r", str(box.access.caches)], check=True)
    [disk] = box.backup().point.disks
    assert disk.mode is Mode.INCREMENTAL
    assert disk.read <= 3 * MiB  # where the parent had zeroes is not known: chunks with holes are looked at
    assert box.restored() == box.image()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(make_box: MakeBox) -> None:
    box = machine(make_box)
    subprocess.run(["rm", "-r", str(box.access.caches)], check=True)
    box.access.caches.write_text("in the way")
    for value in (1, 2):
        box.write("vda", value, 0, 512)
        [disk] = box.backup().point.disks
        assert disk.mode is Mode.INCREMENTAL
        assert box.restored() == box.image()
