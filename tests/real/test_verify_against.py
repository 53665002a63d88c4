"""`verify --against`: a hypervisor that does not tell of a change is caught, an honest one is not."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import kit
from kit import Box, MakeBox
from pullback import errors
from pullback.extents import Extent
from pullback.flows import auditing
from pullback.model import urls
from pullback.programs import qemu
from pullback.units import KiB, MiB


@pytest.fixture(params=["dir", "restic"])
def make_box(make_box: MakeBox, request: pytest.FixtureRequest) -> MakeBox:
    """Everything here holds for both kinds of repository."""
    return partial(make_box, kind=request.param)


@pytest.fixture
def box(make_box: MakeBox) -> Box:
    return make_box()


def audit(box: Box, **changes: Any) -> auditing.Report:
    words: dict[str, Any] = {
        "machine": urls.QmpMachine(socket=box.qmp),
        "repository": box.place,
        "access": box.access,
        "directories": box.directories,
    }
    return asyncio.run(auditing.audit(auditing.Request(**words | changes)))


def found(report: auditing.Report, target: str) -> auditing.Compared:
    return next(disk for disk in report.disks if disk.target == target)


def without_tracking(box: Box, target: str, change: Callable[[], None]) -> None:
    """Let something be written while the disk's bitmap is off, and turn it on as if nothing had been."""
    node = f"{target}-format"
    [bitmap] = box.checkpoints(target)
    box.command("block-dirty-bitmap-disable", {"node": node, "name": bitmap["name"]})
    change()
    box.command("block-dirty-bitmap-enable", {"node": node, "name": bitmap["name"]})


def test_an_honest_machine_tells_the_truth_and_stays_as_it_was(box: Box) -> None:
    box.write("vda", 0x11, 0, 3 * MiB)
    box.backup()
    box.write("vda", 0x12, 1 * MiB + 64 * KiB, 64 * KiB)
    box.zero("vdb", 4 * MiB, 1 * MiB)
    before = box.checkpoints("vda"), box.checkpoints("vdb")
    report = audit(box)
    assert not report.lies
    assert found(report, "vda").compared == 7 * MiB
    assert found(report, "vda").changed == 1 * MiB
    assert (box.checkpoints("vda"), box.checkpoints("vdb")) == before
    assert box.leftovers() == []
    assert box.backup().broken == ()
    assert box.restored() == box.image()


def test_a_write_while_nothing_was_recorded_is_caught(box: Box) -> None:
    box.write("vda", 0x11, 0, 4 * MiB)
    box.backup()
    without_tracking(box, "vda", lambda: box.write("vda", 0x66, 2 * MiB + 4 * KiB, 512))
    box.write("vda", 0x12, 0, 512)
    report = audit(box)
    assert report.lies
    assert found(report, "vda").ranges == (Extent(2 * MiB, 1 * MiB),)
    assert found(report, "vda").differing == 1 * MiB
    assert found(report, "vdb").differing == 0
    assert box.leftovers() == []


def test_data_written_into_a_hole_without_a_trace_is_caught(box: Box) -> None:
    box.write("vda", 0x11, 0, 64 * KiB)
    box.backup()
    without_tracking(box, "vda", lambda: box.write("vda", 0x66, 5 * MiB, 64 * KiB))
    assert found(audit(box), "vda").ranges == (Extent(5 * MiB, 1 * MiB),)


def test_an_image_changed_while_the_machine_was_off_is_caught(box: Box) -> None:
    box.write("vda", 0x11, 0, 4 * MiB)
    box.backup()
    box.quit()
    path = next(disk.path for disk in box.disks if disk.id == "vda")
    offset = cluster_of(path, 3 * MiB)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x66" * 512)
    box.start()
    report = audit(box)
    assert found(report, "vda").ranges == (Extent(3 * MiB, 1 * MiB),)


def cluster_of(path: Path, start: int) -> int:
    """Where in a qcow2 file a byte of its disk is."""
    done = subprocess.run(
        ["qemu-img", "map", "--output=json", "-f", "qcow2", str(path)], check=True, capture_output=True, timeout=30
    )
    for part in json.loads(done.stdout):
        if part["start"] <= start < part["start"] + part["length"]:
            return int(part["offset"]) + start - int(part["start"])
    raise AssertionError("not in the image")


def test_a_raw_disk_written_under_qemu_s_feet_is_caught(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"))
    box.write("vda", 0x11, 0, 4 * MiB)
    box.backup()
    words = ["qemu-io", "-U", "-f", "raw", "-c", "write -q -P 102 1M 4k", str(box.disks[0].path)]
    done = subprocess.run(words, check=False, capture_output=True, timeout=30)
    if done.returncode:  # this qemu-io keeps from writing to what is locked
        with box.disks[0].path.open("r+b") as file:
            file.seek(1 * MiB)
            file.write(b"\x66" * 4096)
    assert found(audit(box), "vda").ranges == (Extent(1 * MiB, 1 * MiB),)


def test_a_disk_shrunk_and_grown_back_is_no_lie(box: Box) -> None:
    box.write("vda", 0x11, 0, 8 * MiB)
    box.backup()
    box.command("block_resize", {"node-name": "vda-format", "size": 5 * MiB})
    box.command("block_resize", {"node-name": "vda-format", "size": 8 * MiB})
    disk = found(audit(box), "vda")
    assert disk.differing == 0
    assert disk.noticed == 3 * MiB


def test_an_older_point_can_be_named(box: Box) -> None:
    box.write("vda", 0x11, 0, 1 * MiB)
    report = box.backup()
    assert found(audit(box, point=report.point.id[:20]), "vda").point == report.point.id


def test_a_sample_compares_a_part(box: Box) -> None:
    box.write("vda", 0x11, 0, 8 * MiB)
    box.backup()
    sizes = {found(audit(box, sample="40%"), "vda").compared for _ in range(5)}
    assert max(sizes) < 8 * MiB or len(sizes) > 1


def test_without_a_checkpoint_nothing_can_be_compared(box: Box) -> None:
    box.backup(only=("vdb",))
    with pytest.raises(errors.Unsupported):
        audit(box, only=("vda",))


def test_a_machine_that_is_off_is_compared_by_its_images(box: Box) -> None:
    box.write("vda", 0x11, 0, 4 * MiB)
    box.backup()
    box.write("vda", 0x12, 0, 512)
    box.quit()
    images = urls.machine("images:" + ",".join(f"{disk.id}=qcow2:{disk.path}" for disk in box.disks))
    report = audit(box, machine=images, name=box.name)
    assert not report.lies
    assert found(report, "vda").compared == 7 * MiB
    box.start()
    assert box.backup().broken == ()
    assert box.restored() == box.image()


def test_the_command_says_it_and_ends_with_13(box: Box) -> None:
    box.write("vda", 0x11, 0, 4 * MiB)
    box.backup()
    words = ["verify", "--against", f"qmp:{box.qmp}", "-r", box.place.url]
    honest = box.cli(*words, "--json")
    assert honest.returncode == 0, honest.stderr
    assert kit.last_json(honest.stdout)["disks"][0]["compared"] == 8 * MiB
    without_tracking(box, "vda", lambda: box.write("vda", 0x66, 0, 512))
    lying = box.cli(*words)
    assert lying.returncode == 13
    assert "LIES" in lying.stdout
    assert "bytes 0 to 1048575" in lying.stdout
