"""A repository whose files rot, vanish or change places: verify and restore must notice, always."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import Box
from pullback import errors
from pullback.units import MiB


def three_points(box: Box) -> list[str]:
    """A whole point and two increments of two disks; their ids."""
    found = []
    box.write("vda", 0x11, 0, 3 * MiB + 512)
    box.write("vdb", 0x22, 1 * MiB, 1 * MiB)
    for number in range(3):
        found.append(box.backup().point.id)
        box.write("vda", 0x30 + number, number * MiB + 4096, 4096)
        box.zero("vda", 2 * MiB + number * 65536, 65536)
        box.write("vdb", 0x40 + number, 5 * MiB, 100_352)
    return found


def noticed(box: Box, repository: Path, point: str) -> None:
    """Verify reports it and restore refuses it, and leaves nothing."""
    verified = box.cli("verify", point, "-r", f"dir:{repository}")
    assert verified.returncode == 13, verified.stdout
    out = repository.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    restored = box.cli("restore", point, "-r", f"dir:{repository}", "--to", out)
    assert restored.returncode == 13, restored.stdout
    assert [path.name for path in out.glob("*") if path.name.startswith(".")] == []


def test_every_flipped_bit_of_an_image_is_noticed(box: Box) -> None:
    """Also in tables, in their unused entries, behind the last cluster, and in the header's padding."""
    ids = three_points(box)
    rng = random.Random(1)
    place = box.repository / "web01"
    missed = []
    for path in [place / id / f"{disk}.qcow2" for id in ids for disk in ("vda", "vdb")]:
        whole = path.read_bytes()
        for _ in range(25):
            offset = rng.randrange(len(whole))
            damaged = bytearray(whole)
            damaged[offset] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            if not box.verify(point=path.parent.name).damaged:
                missed.append((path.name, offset))
        path.write_bytes(whole)
    assert missed == []
    assert box.verify(all=True).damaged == ()


@pytest.mark.parametrize("name", ["manifest.json", "vda.sha256", "vda.qcow2"])
def test_a_flipped_bit_ends_with_13(box: Box, name: str) -> None:
    newest = three_points(box)[-1]
    path = box.repository / "web01" / newest / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    noticed(box, box.repository, newest)


def remove(point: Path) -> None:
    (point / "vda.qcow2").unlink()


def truncate(point: Path) -> None:
    path = point / "vda.qcow2"
    path.write_bytes(path.read_bytes()[:-512])


def rename(point: Path) -> None:
    (point / "vda.qcow2").rename(point / "vdc.qcow2")


def swap(point: Path) -> None:
    for kind in ("qcow2", "sha256"):
        first, second = point / f"vda.{kind}", point / f"vdb.{kind}"
        aside = point / "aside"
        first.rename(aside)
        second.rename(first)
        aside.rename(second)


def from_another_point(point: Path) -> None:
    other = next(found for found in sorted(point.parent.glob("2*")) if found != point)
    shutil.copy(other / "vdb.qcow2", point / "vdb.qcow2")


@pytest.mark.parametrize("damage", [remove, truncate, rename, swap, from_another_point])
@pytest.mark.parametrize("which", [0, pytest.param(-1, marks=pytest.mark.slow)])
def test_a_file_that_is_not_what_it_was_ends_with_13(box: Box, damage: Callable[[Path], None], which: int) -> None:
    """Of the newest point, or of the first, on which it is built."""
    ids = three_points(box)
    damage(box.repository / "web01" / ids[which])
    noticed(box, box.repository, ids[-1])


def test_a_plain_copy_with_new_times_restores(box: Box) -> None:
    three_points(box)
    content = box.restored()
    copied = box.directory / "copy"
    shutil.copytree(box.repository, copied, copy_function=shutil.copy)
    shutil.rmtree(box.repository)
    copied.rename(box.repository)
    assert box.restored() == content
    assert box.verify(all=True).damaged == ()


def test_a_restore_writes_nothing_into_the_repository(box: Box) -> None:
    three_points(box)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(box.repository.rglob("*"))}
    box.restored()
    box.verify(all=True)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(box.repository.rglob("*"))}
    assert after == before


def test_a_damaged_parent_means_a_whole_read_with_the_reason(box: Box) -> None:
    newest = three_points(box)[-1]
    (box.repository / "web01" / newest / "vda.sha256").unlink()
    report = box.backup()
    assert report.broken == ("vda",)
    assert box.restored() == box.image()
    with pytest.raises(errors.VerificationFailed):
        box.restored(newest)
