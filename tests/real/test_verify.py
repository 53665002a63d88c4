"""The commands `verify` and `show` on what a real machine was backed up to."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

import stored
from kit import Box, MakeBox, last_json
from pullback import errors
from pullback.flows import verify
from pullback.units import KiB, MiB


@pytest.fixture
def box(make_box: MakeBox) -> Box:
    """A machine with a repository in restic's format."""
    return make_box(kind="restic")


def backed_up(box: Box) -> tuple[str, str]:
    """Two points."""
    for number in range(4):
        box.write("vda", 0x11 + number, number * MiB, 1 * MiB)
    box.write("vdb", 0x33, 0, 64 * KiB)
    first = box.backup(tags=("monthly",)).point.id
    box.write("vda", 0x55, 2 * MiB, 4 * KiB)
    return first, box.backup().point.id


def flip(path: Path, at: int) -> None:
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def packs(box: Box) -> list[Path]:
    return sorted((box.repository / "data").glob("*/*"), key=lambda path: path.stat().st_mtime_ns)


def test_a_sound_repository_is_told_to_be_sound(box: Box) -> None:
    backed_up(box)
    quick = box.verify(all=True)
    assert quick.clean
    assert not quick.read_data
    whole = box.cli("verify", "--all", "--read-data", "-r", box.repository, "--json")
    assert whole.returncode == 0, whole.stderr
    told = last_json(whole.stdout)
    assert (told["damaged"], told["files"], told["packs_read"]) == (0, [], len(packs(box)))
    assert len(told["disks"]) == 4
    assert box.verify(all=True, sample="1").packs == 1


def test_damage_is_told_with_its_place_and_healed_by_the_next_backup(box: Box) -> None:
    first, second = backed_up(box)
    bad = packs(box)[0]
    flip(bad, 100)  # in the first chunk that was stored
    report = box.verify(all=True, read_data=True)
    assert [file.file for file in report.files] == [f"data/{bad.name}"]
    assert {verdict.point for verdict in report.damaged} <= {first, second}
    assert all(verdict.ranges for verdict in report.damaged)
    healed = box.backup()
    assert healed.broken == ()
    assert box.restored(healed.point.id) == box.image()
    assert box.verify(read_data=True).damaged == ()


def test_the_command_tells_damage_and_ends_with_13(box: Box) -> None:
    box.write("vda", 0x11, 0, 1 * MiB)
    point = box.backup().point.id
    for pack in packs(box):
        flip(pack, 10)
    done = box.cli("verify", "--all", "--read-data", "-r", box.repository)
    assert done.returncode == 13
    assert f"web01 {point[:8]} " in done.stdout
    assert "DAMAGED" in done.stdout
    assert done.stdout.count("BAD FILE") == len(packs(box))
    assert "hint:" in done.stderr


def test_a_directory_of_images_is_always_read_and_has_no_samples(make_box: MakeBox) -> None:
    box = make_box(kind="dir")
    box.write("vda", 0x11, 0, 1 * MiB)
    box.backup()
    assert box.verify().clean
    assert box.verify(read_data=True).verdicts == box.verify().verdicts
    with pytest.raises(errors.Unsupported):
        box.verify(sample="5%")


def test_a_point_is_shown_with_what_it_holds_alone(box: Box) -> None:
    first, second = backed_up(box)
    shown = box.cli("show", first[:8], "-r", box.repository)
    assert shown.returncode == 0, shown.stderr
    assert "monthly" in shown.stdout
    told = last_json(box.cli("show", "latest", "-r", box.repository, "--json").stdout)
    assert told["point"]["id"] == second
    # 16 chunks; the one that was written to is new, the zero chunk is shared.
    assert told["chunks"]["total"] == 16
    assert told["chunks"]["alone"] == 1
    assert 0 < told["freed_if_forgotten"] < 64 * KiB
    assert told["chunks"]["stored"] <= sum(path.stat().st_size for path in packs(box))


def test_a_point_that_others_build_upon_is_shown_so(make_box: MakeBox) -> None:
    box = make_box(kind="dir")
    first = box.backup().point
    second = box.backup().point
    told = last_json(box.cli("show", first.id, "-r", f"dir:{box.repository}", "--json").stdout)
    assert (told["dependents"], told["freed_if_forgotten"], told["chunks"]) == ([second.id], 0, None)
    told = last_json(box.cli("show", "-r", f"dir:{box.repository}", "--json").stdout)
    assert told["freed_if_forgotten"] == second.stored


def test_short_ids_and_tags_are_listed(box: Box) -> None:
    first, _ = backed_up(box)
    listed = box.cli("list", "-r", box.repository).stdout
    assert first[:8] in listed
    assert first[:9] not in listed
    assert "monthly" in listed


@pytest.mark.parametrize(("kind", "size", "rate"), [("restic", 40 * MiB, 8 * MiB), ("dir", 3 * MiB, MiB)])
def test_reading_may_be_slowed_down(tmp_path: Path, kind: str, size: int, rate: int) -> None:
    """The first second's worth is free, and what is read last (a pack of 16 MiB, a block) is not waited for."""
    found = stored.store(tmp_path, kind, {"vda": random.Random(1).randbytes(size)})
    request = verify.Request(repository=found.place, access=found.access, read_data=True, rate=rate)
    report = asyncio.run(verify.verify(request))
    assert report.clean
    assert report.seconds >= 1


def test_a_rate_is_not_for_reading_a_machine(box: Box) -> None:
    done = box.cli("verify", "--against", f"qmp:{box.qmp}", "-r", box.repository, "--limit-rate", "1M")
    assert done.returncode == 2
    assert "--against reads a machine" in done.stderr
