"""Images that are copied, cloned and put back: a checkpoint's mark is never taken for another's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from kit import Box, MakeBox
from pullback.model import urls
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.units import KiB, MiB

SIZE = 4 * MiB


def copied(box: Box, to: Path) -> None:
    """Copy the images of a machine that is off."""
    to.mkdir(exist_ok=True)
    for disk in box.disks:
        shutil.copyfile(disk.path, to / disk.path.name)


def test_a_clone_with_the_same_bitmaps_gets_a_chain_of_its_own(make_box: MakeBox) -> None:
    original = make_box(size=SIZE)
    repository = urls.DirectoryRepository(path=original.repository)
    original.write("vda", 0x11, 0, MiB)
    original.backup()
    original.write("vda", 0x12, MiB, 64 * KiB)
    original.quit()
    clone = make_box(size=SIZE, start=False, name="web02")
    copied(original, clone.directory)
    clone.model = {disk: bytearray(content) for disk, content in original.model.items()}
    original.start()
    clone.start()
    for step in range(3):
        clone.write("vda", 0x20 + step, 2 * MiB + step * 512, 64 * KiB)
        original.write("vda", 0x30 + step, 3 * MiB + step * 512, 64 * KiB)
        for box in (clone, original):
            report = box.backup(repository=repository)
            first = box is clone and step == 0
            assert {disk.mode for disk in report.point.disks} == {Mode.FULL if first else Mode.INCREMENTAL}
            assert report.broken == ()
            assert len(box.checkpoints("vda")) == 1
    for box in (original, clone):
        assert original.restored(machine=box.name) == box.image()
    assert original.verify(all=True).damaged == ()


def test_a_clone_that_keeps_the_name_never_gives_the_wrong_content(make_box: MakeBox) -> None:
    original = make_box(size=SIZE)
    repository = urls.DirectoryRepository(path=original.repository)
    original.write("vda", 0x11, 0, MiB)
    original.backup()
    original.quit()
    clone = make_box(size=SIZE, start=False)
    copied(original, clone.directory)
    clone.model = {disk: bytearray(content) for disk, content in original.model.items()}
    original.start()
    clone.start()
    for step in range(3):
        clone.write("vda", 0x20 + step, 2 * MiB + step * 512, 64 * KiB)
        original.write("vda", 0x30 + step, step * 512, 64 * KiB)
        for box in (clone, original):
            box.backup(repository=repository)
            assert original.restored() == box.image()


def test_images_put_back_from_an_older_copy_are_never_continued_from_the_newer_point(make_box: MakeBox) -> None:
    box = make_box(size=SIZE)
    box.write("vda", 0x11, 0, MiB)
    first = box.backup().point.id
    box.write("vda", 0x12, MiB, 64 * KiB)
    box.quit()
    copied(box, box.directory / "copy")
    old = {disk: bytearray(content) for disk, content in box.model.items()}
    box.start()
    box.write("vda", 0x13, 2 * MiB, 64 * KiB)
    second = box.backup()
    for disk in box.disks:
        box.quit() if box.process and box.process.returncode is None else None
        shutil.copyfile(box.directory / "copy" / disk.path.name, disk.path)
    newer, box.model = box.image(), old
    box.start()
    box.write("vda", 0x14, 3 * MiB, 64 * KiB)
    report = box.backup()
    assert all(disk.parent is None or disk.parent.point == first for disk in report.point.disks)
    assert box.restored() == box.image()
    assert box.restored(second.point.id) == newer
    box.write("vda", 0x15, 0, 512)
    assert {disk.mode for disk in box.backup().point.disks} == {Mode.INCREMENTAL}
    assert box.restored() == box.image()


def test_only_one_disk_put_back_is_judged_by_itself(make_box: MakeBox) -> None:
    box = make_box(size=SIZE)
    box.quit()
    copied(box, box.directory / "copy")
    old = bytearray(box.model["vda"])
    box.start()
    box.write("vda", 0x11, 0, MiB)
    box.write("vdb", 0x11, 0, MiB)
    box.backup()
    box.quit()
    shutil.copyfile(box.directory / "copy" / "vda.qcow2", box.disks[0].path)
    box.model["vda"] = old
    box.start()
    box.write("vdb", 0x12, 512, 512)
    report = box.backup()
    assert {disk.target: disk.mode for disk in report.point.disks} == {"vda": Mode.FULL, "vdb": Mode.INCREMENTAL}
    assert report.broken == ("vda",)
    assert box.restored() == box.image()


def test_qemu_itself_refuses_to_go_back_to_an_internal_snapshot_under_our_bitmaps(make_box: MakeBox) -> None:
    """It would change the content behind their back. Should a QEMU allow it one day, this must be thought about."""
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=SIZE)
    box.write("vda", 0x11, 0, MiB)
    box.quit()
    path = box.disks[0].path
    subprocess.run(["qemu-img", "snapshot", "-c", "before", path], check=True, timeout=20)
    box.start()
    box.backup()
    box.quit()
    done = subprocess.run(["qemu-img", "snapshot", "-a", "before", path], capture_output=True, timeout=20, check=False)
    assert done.returncode != 0
    assert b"bitmap" in done.stderr
