"""What differs between two restore points, told by `diff`, against what was written."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kit import Box, MakeBox, last_json
from pullback import errors
from pullback.extents import Extent
from pullback.flows import diff as flow
from pullback.programs import qemu
from pullback.units import KiB, MiB


@pytest.fixture(params=["dir", "restic"])
def make_box(make_box: MakeBox, request: pytest.FixtureRequest) -> MakeBox:
    """Everything here holds for both kinds of repository."""
    return partial(make_box, kind=request.param)


@pytest.fixture
def box(make_box: MakeBox) -> Box:
    return make_box()


def diff(box: Box, old: str, new: str = "latest", **changes: Any) -> dict[str, flow.DiskDiff]:
    request = flow.Request(repository=box.place, access=box.access, old=old, new=new, **changes)
    return {disk.target: disk for disk in asyncio.run(flow.diff(request)).disks}


def differing(before: bytes, after: bytes) -> list[Extent]:
    """The model: pieces of 4 KiB that differ, merged."""
    found: list[Extent] = []
    for at in range(0, len(before), flow.GRAIN):
        if before[at : at + flow.GRAIN] != after[at : at + flow.GRAIN]:
            length = min(flow.GRAIN, len(before) - at)
            if found and found[-1].end == at:
                found[-1] = Extent(found[-1].start, found[-1].length + length)
            else:
                found.append(Extent(at, length))
    return found


def test_the_ranges_are_those_that_were_written(box: Box) -> None:
    box.write("vda", 0x11, 0, 6 * MiB)
    first, before = box.backup().point.id, box.image()
    box.write("vda", 0x12, 1 * MiB + 512, 512)
    box.write("vda", 0x12, 3 * MiB - 4 * KiB, 8 * KiB)
    box.write("vda", 0x11, 4 * MiB, 64 * KiB)  # the same again
    box.zero("vda", 5 * MiB, 64 * KiB)
    box.write("vdb", 0x13, 8 * MiB - 512, 512)
    second = box.backup().point.id
    found = diff(box, first, second)
    for target, content in box.image().items():
        assert list(found[target].ranges) == differing(before[target], content)
        assert found[target].changed == sum(extent.length for extent in found[target].ranges)
    assert diff(box, second, first)["vda"].ranges == found["vda"].ranges
    assert diff(box, second)["vda"].ranges == ()


def test_a_quick_diff_tells_whole_chunks(box: Box) -> None:
    box.write("vda", 0x11, 0, 6 * MiB)
    first = box.backup().point.id
    box.write("vda", 0x12, 1 * MiB + 512, 512)
    box.backup()
    assert diff(box, first, quick=True)["vda"].ranges == (Extent(1 * MiB, 1 * MiB),)


def test_a_disk_that_was_resized_added_or_removed_is_told(make_box: MakeBox) -> None:
    box = make_box(*(qemu.Disk(id=id, path=Path(f"{id}.qcow2")) for id in ("vda", "vdb")), size=3 * MiB + 512)
    box.write("vda", 0x11, 0, 1 * MiB)
    first = box.backup(only=("vda",)).point.id
    box.command("block_resize", {"node-name": "vda-format", "size": 5 * MiB})
    box.model["vda"].extend(bytes(2 * MiB - 512))
    box.write("vda", 0x12, 3 * MiB, 4 * KiB)
    box.backup()
    found = diff(box, first)
    assert (found["vda"].old_size, found["vda"].new_size) == (3 * MiB + 512, 5 * MiB)
    assert found["vda"].ranges == (Extent(3 * MiB, 512),)
    assert (found["vdb"].old_size, found["vdb"].new_size) == (None, 3 * MiB + 512)
    back = diff(box, "latest", first)
    assert (back["vdb"].old_size, back["vdb"].new_size) == (3 * MiB + 512, None)


def test_one_disk_can_be_compared_and_must_be_there(box: Box) -> None:
    box.backup()
    assert list(diff(box, "latest", only=("vdb",))) == ["vdb"]
    with pytest.raises(errors.UnknownDisk):
        diff(box, "latest", only=("vdz",))


def test_damage_in_what_is_compared_is_told(box: Box) -> None:
    box.write("vda", 0x11, 0, 1 * MiB)
    first = box.backup().point.id
    box.write("vda", 0x12, 0, 512)
    second = box.backup().point.id
    pattern = f"web01/{second}/vda.qcow2" if box.kind == "dir" else "data/*/*"
    for path in box.repository.glob(pattern):
        path.chmod(0o600)
        data = bytearray(path.read_bytes())
        data[len(data) // 4 :] = bytes(len(data) - len(data) // 4)
        path.write_bytes(data)
    with pytest.raises(errors.VerificationFailed):
        diff(box, first, second)


def test_the_command_tells_people_and_programs(box: Box) -> None:
    box.write("vda", 0x11, 0, 1 * MiB)
    first = box.backup().point.id
    box.write("vda", 0x12, 4 * KiB, 512)
    second = box.backup().point.id
    done = box.cli("diff", first, second, "-r", box.place.url)
    assert done.returncode == 0, done.stderr
    assert "bytes 4096 to 8191" in done.stdout
    assert "nothing changed" in done.stdout
    told = last_json(box.cli("diff", first, "-r", box.place.url, "--json").stdout)
    assert (told["old"], told["new"], told["grain"]) == (first, second, 4 * KiB)
    assert told["disks"][0]["ranges"] == [{"start": 4 * KiB, "length": 4 * KiB}]
