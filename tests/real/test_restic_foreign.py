"""The program restic works on what we write, and we on what it writes: each of its commands, on real backups."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit import PASSWORD, Box, MakeBox, place_of, restic_of
from pullback import errors
from pullback.flows.repositories import opened
from pullback.model.points import Mode
from pullback.programs import qemu, restic
from pullback.units import GiB, KiB, MiB
from victim import eventually

#: More than a segment, so that a disk has several files; almost all of it is zeroes.
LONG = GiB + 3 * MiB + 512
SHORT = 9 * MiB + 512


class Life:
    """A machine with a long disk and a short one, and what they held at each of its points."""

    def __init__(self, make_box: MakeBox, *, ours: bool) -> None:
        disks = [qemu.Disk(id="vda", path=Path("a.qcow2")), qemu.Disk(id="vdb", path=Path("b.qcow2"))]
        self.box: Box = make_box(*disks, size=8 * MiB, kind="restic", start=False)
        if not ours:
            subprocess.run(["rm", "-r", str(self.box.repository)], check=True)
            restic_of(self.box).run("init", timeout=60)
        self.box.start()
        self.restic = restic_of(self.box)
        self.points: dict[str, dict[str, bytes]] = {}

    def keep(self, **changes: Any) -> str:
        """A restore point."""
        report = self.box.backup(**changes)
        self.points[report.point.id] = self.box.image()
        return report.point.id

    def live(self, size: int = SHORT) -> None:
        """Whole, then increments with writes, zeroes, discards and a resize."""
        box = self.box
        box.scramble("vda", 1, 0, 3 * MiB)
        box.write("vdb", 0x11, MiB, 64 * KiB)
        self.keep(tags=("first",))
        box.write("vda", 0x22, MiB - 512, 1024)
        box.zero("vda", 2 * MiB, MiB)
        box.discard("vdb", MiB, 64 * KiB)
        self.keep()
        box.command("block_resize", {"node-name": "vda-format", "size": size})
        box.model["vda"].extend(bytes(size - len(box.model["vda"])))
        box.write("vda", 0x33, size - 512, 512)
        box.write("vda", 0x34, min(GiB, size) - 1536, 1024)
        self.keep()

    def check(self) -> None:
        """Everything, read."""
        said = self.restic.run("check", "--read-data", timeout=120)
        assert "no errors were found" in said

    def listed(self) -> list[dict[str, Any]]:
        """restic's own list."""
        found: list[dict[str, Any]] = self.restic.run_json("snapshots", timeout=60)
        return found


@pytest.fixture
def life(make_box: MakeBox) -> Life:
    """In a repository that we made."""
    made = Life(make_box, ours=True)
    made.live()
    return made


def joined(directory: Path, target: str) -> bytes:
    """`cat directory/vda/*/*`."""
    done = subprocess.run(
        f"cat {directory}/{target}/*/*", shell=True, capture_output=True, check=True, timeout=60, executable="/bin/bash"
    )
    return done.stdout


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("ours", "size"), [(True, SHORT), (True, LONG), (False, SHORT)], ids=["our init", "long disk", "restic's init"]
)
def test_restic_checks_lists_and_restores_what_we_wrote(make_box: MakeBox, ours: bool, size: int) -> None:
    life = Life(make_box, ours=ours)
    life.live(size)
    life.check()
    listed = life.listed()
    assert [one["id"] for one in listed] == list(life.points)
    assert {one["hostname"] for one in listed} == {"web01"}
    assert {tuple(one["paths"]) for one in listed} == {("/pullback/web01",)}
    assert [one["tags"] for one in listed] == [["pullback", "first"], ["pullback"], ["pullback"]]
    assert [one.get("parent") for one in listed] == [None, *list(life.points)[:2]]
    for number, (point, content) in enumerate(list(life.points.items())[-2:] if size == LONG else life.points.items()):
        out = life.box.directory / f"restored-{number}"
        life.restic.run("restore", point, f"--target={out}", timeout=60)
        for target, wanted in content.items():
            assert joined(out, target) == wanted
        subprocess.run(["rm", "-r", str(out)], check=True)


@pytest.mark.timeout(120)
def test_it_lists_and_dumps_files_of_a_point(life: Life) -> None:
    point, content = list(life.points.items())[-1]
    names = [line for line in life.restic.run("ls", point, timeout=60).splitlines() if line.startswith("/")]
    assert "/pullback.json" in names
    files = [name for name in names if name.startswith("/vda/") and name.count("/") == 3]
    assert len(files) == 1
    parts = [_dump(life.box, point, name) for name in files]
    assert b"".join(parts) == content["vda"]
    assert b'"web01"' in _dump(life.box, point, "/pullback.json")


def _dump(box: Box, point: str, name: str) -> bytes:
    environ = {"PATH": os.environ["PATH"], "RESTIC_PASSWORD": PASSWORD, "RESTIC_REPOSITORY": str(box.repository)}
    words = ["restic", "--no-cache", "dump", point, name]
    return subprocess.run(words, env=environ, capture_output=True, check=True, timeout=60).stdout


@contextlib.contextmanager
def mounted(box: Box) -> Iterator[Path]:
    """`restic mount`, while the block runs."""
    at = box.directory / "mnt"
    at.mkdir()
    environ = {"PATH": os.environ["PATH"], "RESTIC_PASSWORD": PASSWORD, "RESTIC_REPOSITORY": str(box.repository)}
    process = subprocess.Popen(["restic", "--no-cache", "mount", str(at)], env=environ, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: at.is_mount() and (at / "snapshots").is_dir(), seconds=30, what="mounted")
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=False, capture_output=True)
        process.terminate()
        process.wait(30)


@pytest.mark.timeout(120)
@pytest.mark.skipif(not os.access("/dev/fuse", os.W_OK), reason="no FUSE here")
def test_a_point_that_it_mounts_is_served_as_a_disk_by_nbdkit(make_box: MakeBox) -> None:
    life = Life(make_box, ours=True)
    life.live(LONG)
    content = list(life.points.values())[-1]
    with mounted(life.box) as at:
        socket = life.box.directory / "split.sock"
        words = ["nbdkit", "-f", "-r", "-U", socket, "--filter=noextents", "split"]
        words += sorted((at / "snapshots" / "latest" / "vda").glob("*/*"))
        with subprocess.Popen([str(word) for word in words]) as server:
            try:
                eventually(socket.exists, seconds=10, what="served")
                out = life.box.directory / "copy"
                uri = f"nbd+unix:///?socket={socket}"
                subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, out], check=True, timeout=60)
                assert out.read_bytes() == content["vda"]
            finally:
                server.terminate()


@pytest.mark.timeout(120)
def test_what_it_forgets_and_prunes_we_do_without(life: Life) -> None:
    life.restic.run("forget", "--keep-last", "1", "--prune", timeout=60)
    [kept] = [point.id for point in life.box.points()]
    assert kept == list(life.points)[-1]
    assert life.box.restored(kept) == life.points[kept]
    life.box.write("vda", 0x44, 5 * MiB, 512)
    made = life.keep()
    newest = life.box.points()[-1]
    assert [disk.mode for disk in newest.disks] == [Mode.INCREMENTAL] * 2
    assert life.box.restored(made) == life.points[made]
    life.check()


@pytest.mark.timeout(120)
def test_a_copy_that_it_makes_is_a_repository_of_its_own(life: Life) -> None:
    other = life.box.directory / "other"
    program = restic_of(life.box, other)
    program.run("init", timeout=60)
    program.copy_from(restic.Access(url=str(life.box.repository), password=PASSWORD))
    place = place_of(other, "restic")
    with opened(place, life.box.access) as repository:
        points = repository.listing("web01").points
    for point, wanted in zip(points, life.points.values(), strict=True):
        assert life.box.restored(point.id, repository=place) == wanted
    # A backup to it builds on the copy, whose checkpoint is on the disk; from then on each has its own.
    for where in (place, life.box.place, place):
        life.box.write("vda", 0x66, 6 * MiB, 512)
        report = life.box.backup(repository=where)
        assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL}
        assert life.box.restored(repository=where) == life.box.image()


@pytest.mark.timeout(120)
def test_passwords_that_it_adds_and_removes_open_what_we_write(life: Life) -> None:
    box = life.box
    life.restic.add_key("second word")
    environ = {key: value for key, value in box.access.environ.items() if not key.startswith("PULLBACK_PASSWORD")}
    (box.directory / "second").write_text("second word\n")
    access = replace(box.access, environ=environ | {"PULLBACK_PASSWORD_FILE": str(box.directory / "second")})
    assert box.restored(access=access) == box.image()
    made = box.backup(access=access)
    assert {disk.mode for disk in made.point.disks} == {Mode.INCREMENTAL}
    first = next(one["id"] for one in life.restic.run_json("key", "list", timeout=60) if one["current"])
    restic.Restic(
        restic.Access(url=str(box.repository), password="second word"),
        {"PATH": os.environ["PATH"], "RESTIC_CACHE_DIR": "/nonexistent"},
    ).run("key", "remove", first, timeout=60)
    with pytest.raises(errors.WrongPassword):
        box.restored()
    assert box.restored(access=access) == box.image()


@pytest.mark.timeout(120)
def test_tags_that_it_sets_are_ours_and_the_chain_goes_on(life: Life) -> None:
    life.restic.run("tag", "--set", "pullback", "--set", "monday", timeout=60)
    points = life.box.points()
    assert {point.tags for point in points} == {("monday",)}
    for point, wanted in zip(points, life.points.values(), strict=True):
        assert life.box.restored(point.id) == wanted  # the ids are others now
    life.box.write("vda", 0x55, 0, 512)
    report = life.box.backup()
    assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL}
    assert life.box.restored() == life.box.image()
    life.check()


@pytest.mark.timeout(120)
def test_snapshots_of_files_beside_ours_are_left_alone(life: Life) -> None:
    (life.box.directory / "file").write_text("a file")
    life.restic.run("backup", str(life.box.directory / "file"), timeout=60)
    assert len(life.box.points()) == len(life.points)
    made = life.keep()
    assert life.box.restored("latest") == life.points[made]
    assert len(life.listed()) == len(life.points) + 1
    life.check()


@pytest.mark.timeout(120)
def test_a_rebuilt_index_is_as_good_as_ours(life: Life) -> None:
    life.restic.run("rebuild-index", "--read-all-packs", timeout=60)
    report = life.box.backup()
    assert sum(disk.read for disk in report.point.disks) == 0
    for point, wanted in life.points.items():
        assert life.box.restored(point) == wanted
    life.check()
