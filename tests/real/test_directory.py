"""A `dir:` repository with real images, real locks and real deaths.

Run as a program (`python test_directory.py ROLE PATH`), this file is the second process that some tests need.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pullback import errors, repo
from pullback.model import points
from pullback.model.backups import Level
from pullback.model.points import Mode, Point, PointDisk, PointRef
from pullback.programs import process, qemu_img
from pullback.repo import files
from pullback.repo.directory import chain, layout
from pullback.units import KiB, MiB

SIZE = 4 * MiB
BLOCK = 64 * KiB
START = datetime(2026, 11, 24, 6, 0, 18, 250_000, tzinfo=UTC)
#: Offset, length and byte of a write.
Write = tuple[int, int, int]


# -- a small backup --------------------------------------------------------------------------


def fill(graph: dict[str, object], writes: Sequence[Write]) -> None:
    commands = [word for at, length, byte in writes for word in ("-c", f"write -P {byte} {at} {length}")]
    process.run(["qemu-io", *commands, repo.pseudo_filename(graph)], timeout=30)


def after(content: bytes, writes: Sequence[Write]) -> bytes:
    new = bytearray(content)
    for at, length, byte in writes:
        new[at : at + length] = bytes([byte]) * length
    return bytes(new)


def hashes_of(content: bytes) -> repo.HashList:
    hashes = repo.HashList(len(content), BLOCK)
    for index in range(hashes.count):
        block = hashes.block(index)
        hashes.hash(index, content[block.start : block.end])
    return hashes


def disk_of(target: str, sealed: repo.Sealed) -> PointDisk:
    return PointDisk(
        target=target,
        qdev=None,
        serial=None,
        source=None,
        source_format=None,
        size=sealed.size,
        mode=Mode.INCREMENTAL if sealed.parent else Mode.FULL,
        reason=None,
        parent=sealed.parent,
        mark=None,
        block_size=sealed.block_size,
        digest=sealed.digest,
        stored=sealed.stored,
        read=0,
        files=sealed.files,
    )


def point_of(pending: repo.PendingPoint, created: datetime, *disks: PointDisk) -> Point:
    return Point(
        id=pending.id_at(created),
        machine=pending.machine,
        created=created,
        level=Level.AUTO,
        pullback="0",
        qemu="7.2",
        engine="filter",
        pause=0.005,
        checkpoint=None,
        disks=disks,
    )


class Backups:
    """A repository and what the disk `vda` of `web01` held at each point."""

    def __init__(self, path: Path) -> None:
        self.directory = repo.create_or_open(path)
        self.content = bytes(SIZE)
        self.points: list[Point] = []
        self.contents: list[bytes] = []

    def make(self, *writes: Write, machine: str = "web01", full: bool = False) -> Point:
        parent = None if full or not self.points else PointRef(point=self.points[-1].id, target="vda")
        self.content = after(self.content, writes)
        whole = [(at, BLOCK, self.content[at]) for at in range(0, SIZE, BLOCK) if self.content[at]]
        with self.directory.writer(machine, command="a test") as writer, writer.begin() as pending:
            pending.create("vda", SIZE, parent=parent)
            fill(pending.graph("vda"), writes if parent else whole)
            sealed = pending.seal("vda", hashes_of(self.content))
            created = START + timedelta(hours=len(self.points))
            self.points.append(pending.commit(point_of(pending, created, disk_of("vda", sealed))))
        self.contents.append(self.content)
        return self.points[-1]

    def place(self, number: int) -> Path:
        return self.directory.path / "web01" / self.points[number].id

    def image(self, number: int) -> Path:
        return self.place(number) / "vda.qcow2"


def read(directory: repo.Directory, point: Point) -> bytes:
    """What the disk holds in a point, as QEMU sees it through our graph."""
    graph = repo.graph(directory.chain(point, "vda"))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "vda.raw")
        process.run(["qemu-img", "convert", "-O", "raw", repo.pseudo_filename(graph), out], timeout=30)
        return out.read_bytes()


@pytest.fixture
def backups(tmp_path: Path) -> Backups:
    """A whole point and two increments."""
    made = Backups(tmp_path / "repo")
    made.make((0, MiB, 1), (3 * MiB, BLOCK, 2))
    made.make((BLOCK, BLOCK, 3), (3 * MiB, BLOCK, 0))
    made.make((2 * MiB, 2 * BLOCK, 4))
    return made


def tree(path: Path) -> dict[str, tuple[int, bytes]]:
    """All files below `path`: modification time and content."""
    return {
        str(file.relative_to(path)): (file.lstat().st_mtime_ns, file.read_bytes())
        for file in path.rglob("*")
        if file.is_file()
    }


def refused(backups: Backups, number: int = -1) -> str:
    """Assert that a point's chain is refused; gives the problem."""
    with pytest.raises(errors.VerificationFailed) as caught:
        backups.directory.chain(backups.points[number], "vda")
    return caught.value.problem


# -- writing and reading ---------------------------------------------------------------------


def test_every_point_reads_back_as_the_disk_was(backups: Backups) -> None:
    for point, content in zip(backups.points, backups.contents, strict=True):
        assert read(backups.directory, point) == content
        assert backups.directory.hashes(point, "vda").digest() == hashes_of(content).digest()
        assert repo.complaints(backups.directory.chain(point, "vda")) == ()
    assert [len(backups.directory.chain(point, "vda")) for point in backups.points] == [1, 2, 3]


def test_qemu_img_alone_can_read_a_point(backups: Backups, tmp_path: Path) -> None:
    out = tmp_path / "plain.raw"
    process.run(["qemu-img", "convert", "-O", "raw", backups.image(-1), out], timeout=30)
    assert out.read_bytes() == backups.contents[-1]


def test_points_are_listed_oldest_first_with_what_they_take(backups: Backups) -> None:
    listing = backups.directory.listing("web01")
    assert listing.points == tuple(backups.points)
    assert listing.damaged == ()
    assert backups.directory.machines() == ("web01",)
    assert all(0 < point.stored <= 3 * MiB and point.size == SIZE for point in listing.points)


def test_nobody_else_can_look_into_a_repository(backups: Backups) -> None:
    paths = [backups.directory.path, *backups.directory.path.rglob("*")]
    assert {path.stat().st_mode & 0o77 for path in paths} == {0}


def test_a_plain_copy_elsewhere_is_the_same_repository(backups: Backups, tmp_path: Path) -> None:
    copy = tmp_path / "other" / "copy, with: odd name"
    shutil.copytree(backups.directory.path, copy, copy_function=shutil.copyfile)
    shutil.rmtree(backups.directory.path)
    directory = repo.open_directory(copy)
    assert directory.id == backups.directory.id
    assert read(directory, directory.find()) == backups.contents[-1]
    assert repo.complaints(directory.chain(directory.find(), "vda")) == ()


def test_reading_changes_nothing(backups: Backups) -> None:
    before = tree(backups.directory.path)
    directory = repo.open_directory(backups.directory.path)
    point = directory.find()
    with directory.reading(point):
        assert read(directory, point) == backups.contents[-1]
        assert repo.complaints(directory.chain(point, "vda")) == ()
    assert tree(backups.directory.path) == before


def test_a_point_reads_while_somebody_has_its_images_open(backups: Backups, tmp_path: Path) -> None:
    socket = tmp_path / "nbd"
    argv: list[str | Path] = ["qemu-nbd", "-t", "-f", "qcow2", "-k", socket, backups.image(-1)]
    with process.Child(argv) as server:
        server.wait_until(socket.exists, what="socket", timeout=10)
        assert read(backups.directory, backups.points[-1]) == backups.contents[-1]


@pytest.mark.parametrize("text", ["latest", "20261124T08", "2026-11-24 08:00:18Z", "2026-11-25"])
def test_the_last_point_is_found_by_many_names(backups: Backups, text: str) -> None:
    assert backups.directory.find(text.replace(" 08:00:18Z", "T08:00:18Z")) == backups.points[-1]


def test_a_point_is_found_by_id_date_and_machine(backups: Backups) -> None:
    directory, first = backups.directory, backups.points[0]
    assert directory.find(first.id, machine="web01") == first
    assert directory.find("2026-11-24T06:59:59Z") == first
    with pytest.raises(errors.NoPoints, match="of db01"):
        directory.find(machine="db01")
    with pytest.raises(errors.UnknownPoint):
        directory.find("2026-11-24T06:00:17Z")
    with pytest.raises(errors.UnknownPoint):
        directory.point("web01", "../..")


def test_several_machines_need_a_name(backups: Backups) -> None:
    other = backups.make(machine="db/01 ü", full=True)
    assert backups.directory.machines() == ("db/01 ü", "web01")
    with pytest.raises(errors.AmbiguousPoint):
        backups.directory.find()
    assert backups.directory.find(machine="db/01 ü") == other
    assert backups.directory.find(other.id) == other


def test_a_chain_of_the_greatest_depth_opens_at_once(tmp_path: Path) -> None:
    base = repo.create_or_open(tmp_path / "repo")
    with base.writer("web01", command="a test") as writer, writer.begin() as pending:
        image = pending.create("vda", SIZE)
        point = pending.commit(point_of(pending, START, disk_of("vda", pending.seal("vda", hashes_of(bytes(SIZE))))))
    image = base.path / "web01" / point.id / image.name
    links = [repo.Link(point=point, disk=point.disks[0], path=image, backing=None)] * repo.MAX_DEPTH
    process.run(["qemu-img", "map", repo.pseudo_filename(repo.graph(links))], timeout=10)


# -- damage and malice -----------------------------------------------------------------------


def test_a_flipped_bit_in_a_manifest_makes_the_point_damaged_and_no_other(backups: Backups) -> None:
    manifest = backups.place(1) / "manifest.json"
    data = bytearray(manifest.read_bytes())
    data[len(data) // 2] ^= 4
    manifest.write_bytes(data)
    listing = backups.directory.listing("web01")
    assert [point.id for point in listing.points] == [backups.points[0].id, backups.points[2].id]
    assert [(found.id, found.created) for found in listing.damaged] == [
        (backups.points[1].id, backups.points[1].created.replace(microsecond=0))
    ]
    assert "its parent" in refused(backups)
    with pytest.raises(errors.VerificationFailed):
        backups.directory.find("2026-11-24T07:30:00Z")


def test_a_damaged_latest_point_is_not_passed_over(backups: Backups) -> None:
    (backups.place(-1) / "manifest.json").unlink()
    with pytest.raises(errors.VerificationFailed, match=r"manifest.json is missing"):
        backups.directory.find()


def test_a_flipped_bit_in_a_hash_list_is_seen(backups: Backups) -> None:
    path = backups.place(-1) / "vda.sha256"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.VerificationFailed, match="hash list"):
        backups.directory.hashes(backups.points[-1], "vda")
    (complaint,) = repo.complaints(backups.directory.chain(backups.points[-1], "vda"))
    assert "vda.sha256" in complaint


def test_a_damaged_table_in_an_image_is_found_by_its_structure(backups: Backups) -> None:
    with open(backups.image(0), "r+b") as file:
        file.seek(40)  # l1_table_offset of the header
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        file.write(b"\x80" + b"\xff" * 7)
    with pytest.raises(errors.VerificationFailed, match=r"vda\.qcow2"):
        backups.directory.chain(backups.points[0], "vda")


def _cut(backups: Backups) -> None:
    os.truncate(backups.image(1), 50)


def _drop(backups: Backups) -> None:
    backups.image(1).unlink()


def _rename(backups: Backups) -> None:
    backups.place(1).rename(backups.place(1).with_name("20200101T000000Z-00000000"))


def _swap_points(backups: Backups) -> None:
    other = backups.place(1).with_name("aside")
    backups.place(1).rename(other)
    backups.place(0).rename(backups.place(1))
    other.rename(backups.place(0))


def _swap_images(backups: Backups) -> None:
    shutil.copyfile(backups.image(2), backups.image(1))


def _flatten(backups: Backups) -> None:
    process.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", backups.image(1)], timeout=30)


def _rebase(backups: Backups) -> None:
    argv: list[str | Path] = [
        "qemu-img",
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        "/etc/passwd",
        backups.image(1),
    ]
    process.run(argv, timeout=30)


def _rebase_as_raw(backups: Backups) -> None:
    name = layout.backing_name(backups.points[0].id, "vda.qcow2")
    argv: list[str | Path] = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", name, backups.image(1)]
    process.run(argv, timeout=30)


def _data_file(backups: Backups) -> None:
    image = backups.image(1)
    image.unlink()
    options = f"data_file={image}.data,data_file_raw=on"
    process.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, str(SIZE)], timeout=30)


def _grow(backups: Backups) -> None:
    process.run(["qemu-img", "resize", "-q", "-f", "qcow2", backups.image(1), str(2 * SIZE)], timeout=30)


def _make_raw(backups: Backups) -> None:
    backups.image(1).write_bytes(b"root:x:0:0" + bytes(SIZE))


def _link(backups: Backups) -> None:
    moved = backups.directory.path.parent / "moved.qcow2"
    backups.image(1).rename(moved)
    backups.image(1).symlink_to(moved)


def _link_point(backups: Backups) -> None:
    moved = backups.directory.path.parent / "moved"
    backups.place(1).rename(moved)
    backups.place(1).symlink_to(moved)


def _fifo(backups: Backups) -> None:
    backups.image(1).unlink()
    os.mkfifo(backups.image(1))


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (_cut, "cut off"),
        (_drop, "missing"),
        (_rename, "not there"),
        (_swap_points, "manifest is that of"),
        (_swap_images, "is backed by"),
        (_flatten, "is backed by nothing"),
        (_rebase, "is backed by '/etc/passwd'"),
        (_rebase_as_raw, "does not say that its backing file is a qcow2"),
        (_data_file, "another file"),
        (_grow, f"{2 * SIZE} bytes instead of {SIZE}"),
        (_make_raw, "not a qcow2"),
        (_link, "symbolic link"),
        (_link_point, "not there"),
        (_fifo, "not a regular file"),
    ],
)
@pytest.mark.timeout(20)
def test_a_chain_with_a_foreign_or_damaged_image_is_refused(
    backups: Backups, harm: Callable[[Backups], None], problem: str
) -> None:
    harm(backups)
    assert problem in refused(backups)


def test_an_increment_is_not_made_on_a_damaged_parent_but_a_whole_image_is(backups: Backups) -> None:
    _rebase(backups)
    with backups.directory.writer("web01", command="a test") as writer, writer.begin() as pending:
        with pytest.raises(errors.VerificationFailed):
            pending.create("vda", SIZE, parent=PointRef(point=backups.points[1].id, target="vda"))
        assert qemu_img.info(pending.create("vda", SIZE), format="qcow2").backing is None


def test_an_increment_of_another_size_is_refused(backups: Backups) -> None:
    parent = PointRef(point=backups.points[1].id, target="vda")
    with backups.directory.writer("web01", command="a test") as writer, writer.begin() as pending:
        for number in range(2):
            with pytest.raises(errors.VerificationFailed, match="another size"):
                pending.create(f"vd{number}", 2 * SIZE, parent=parent)


def test_a_chain_that_is_long_enough_is_not_made_longer(backups: Backups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "MAX_DEPTH", 3)
    with backups.directory.writer("web01", command="a test") as writer, writer.begin() as pending:
        pending.create("vda", SIZE, parent=PointRef(point=backups.points[1].id, target="vda"))
        with pytest.raises(errors.Unsupported, match="3 images already"):
            pending.create("vdb", SIZE, parent=PointRef(point=backups.points[2].id, target="vda"))
    monkeypatch.setattr(chain, "MAX_DEPTH", 2)
    assert refused(backups) == "the chain of vda does not end"


def test_a_circle_of_parents_is_refused(backups: Backups) -> None:
    first, last = backups.points[0], backups.points[-1]
    disk = replace(first.disks[0], mode=Mode.INCREMENTAL, parent=PointRef(point=last.id, target="vda"))
    (backups.place(0) / "manifest.json").write_bytes(points.encode(replace(first, disks=(disk,))))
    assert refused(backups) == "the chain of vda does not end"


def test_links_for_marker_and_machine_are_not_followed(backups: Backups, tmp_path: Path) -> None:
    path = backups.directory.path
    (path / "web01").rename(tmp_path / "web01")
    (path / "web01").symlink_to(tmp_path / "web01")
    assert backups.directory.machines() == ()
    with pytest.raises(errors.NoPoints):
        backups.directory.find(machine="web01")
    with pytest.raises(errors.CannotWrite), backups.directory.writer("web01", command="a test"):
        pass
    (path / "pullback.json").rename(tmp_path / "marker")
    (path / "pullback.json").symlink_to(tmp_path / "marker")
    with pytest.raises(errors.NotARepository):
        repo.open_directory(path)


# -- opening ---------------------------------------------------------------------------------


def test_a_missing_or_empty_directory_is_none_to_read_and_one_to_write(tmp_path: Path) -> None:
    (tmp_path / "empty" / "lost+found").mkdir(parents=True)
    for path in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(errors.NoRepository):
            repo.open_directory(path)
        made = repo.create_or_open(path)
        assert repo.open_directory(path).id == repo.create_or_open(path).id == made.id
        assert "pullback.json" in os.listdir(path)


def test_a_directory_above_that_is_missing_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(errors.CannotWrite, match="there is no directory"):
        repo.create_or_open(tmp_path / "unmounted" / "repo")


@pytest.mark.parametrize(
    ("marker", "kind"),
    [
        (b"", errors.NotARepository),
        (b"[]", errors.NotARepository),
        (b"[" * 4000, errors.NotARepository),
        (b"{}" + b" " * 5000, errors.NotARepository),
        (b'{"format": 1, "kind": "another", "id": "0011223344556677"}', errors.NotARepository),
        (b'{"format": true, "kind": "pullback-directory", "id": "0011223344556677"}', errors.NotARepository),
        (b'{"format": 1, "kind": "pullback-directory", "id": "../.."}', errors.NotARepository),
        (b'{"format": 2, "kind": "pullback-directory"}', errors.RepositoryTooNew),
    ],
)
def test_another_marker_is_told_apart(tmp_path: Path, marker: bytes, kind: type[errors.PullbackError]) -> None:
    (tmp_path / "pullback.json").write_bytes(marker)
    for opening in (repo.open_directory, repo.create_or_open):
        with pytest.raises(kind):
            opening(tmp_path)


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "holiday.jpg"):
        for opening in (repo.open_directory, repo.create_or_open):
            with pytest.raises(errors.NotARepository):
                opening(path)
    assert os.listdir(tmp_path) == ["holiday.jpg"]


def test_two_who_make_a_repository_at_once_agree(tmp_path: Path) -> None:
    children = [second("create", tmp_path / "repo") for _ in range(4)]
    told = {child.communicate(timeout=20)[0] for child in children}
    assert told == {repo.open_directory(tmp_path / "repo").id.encode()}


# -- points that are not finished ------------------------------------------------------------


def test_leaving_without_commit_leaves_nothing(backups: Backups) -> None:
    before = sorted(os.listdir(backups.directory.path / "web01"))
    with backups.directory.writer("web01", command="a test") as writer:
        with contextlib.suppress(KeyboardInterrupt), writer.begin() as pending:
            pending.create("vda", SIZE)
            raise KeyboardInterrupt
        assert sorted(os.listdir(backups.directory.path / "web01")) == before
    assert backups.directory.listing("web01").points == tuple(backups.points)


def test_a_point_that_says_other_than_what_was_sealed_is_not_committed(backups: Backups) -> None:
    with backups.directory.writer("web01", command="a test") as writer, writer.begin() as pending:
        pending.create("vda", SIZE)
        pending.create("vdb", SIZE)
        disk = disk_of("vda", pending.seal("vda", hashes_of(bytes(SIZE))))
        with pytest.raises(ValueError, match="made and sealed"):
            pending.commit(point_of(pending, START, disk))
        pending.seal("vdb", hashes_of(b"x" + bytes(SIZE - 1)))
        liar = replace(disk, target="vdb")
        with pytest.raises(ValueError, match="other things of vdb"):
            pending.commit(point_of(pending, START, disk, liar))


def test_an_image_that_was_rebased_while_it_was_written_is_not_sealed(backups: Backups) -> None:
    with backups.directory.writer("web01", command="a test") as writer, writer.begin() as pending:
        image = pending.create("vda", SIZE)
        process.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/x", image], timeout=30)
        with pytest.raises(errors.VerificationFailed):
            pending.seal("vda", hashes_of(bytes(SIZE)))


def write_two_disks(path: Path) -> None:
    directory = repo.create_or_open(path)
    with directory.writer("web01", command="a test") as writer, writer.begin() as pending:
        for target in ("vda", "vdb"):
            pending.create(target, SIZE)
            pending.seal(target, hashes_of(bytes(SIZE)))


@pytest.mark.parametrize("limit", ["size=300k", "nr_inodes=8"])
def test_a_full_file_system_is_told_so(tmp_path: Path, limit: str) -> None:
    with small_file_system(tmp_path, limit) as path:
        with pytest.raises(errors.DestinationFull):
            write_two_disks(path / "repo")
        assert not list((path / "repo").glob("*/.partial*"))


@contextlib.contextmanager
def small_file_system(path: Path, option: str) -> Iterator[Path]:
    """A tmpfs that soon is full, of bytes or of files."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", option, "none", path], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


# -- removing --------------------------------------------------------------------------------


def test_only_a_point_that_no_other_needs_is_removed(backups: Backups) -> None:
    directory = backups.directory
    assert directory.dependents(backups.points[0]) == (backups.points[1],)
    with directory.writer("web01", command="a test") as writer:
        for point in backups.points[:2]:
            with pytest.raises(errors.UsageError, match="needs"):
                writer.remove(point.id)
        writer.remove(backups.points[2].id)
        with pytest.raises(errors.UnknownPoint):
            writer.remove(backups.points[2].id)
    assert directory.listing("web01").points == tuple(backups.points[:2])
    assert not list((directory.path / "web01").glob(".partial*"))


def test_a_point_that_is_read_is_not_removed(backups: Backups) -> None:
    directory, last = backups.directory, backups.points[-1]
    with directory.writer("web01", command="a test") as writer:
        with directory.reading(last), pytest.raises(errors.BusyError, match="reads it"):
            writer.remove(last.id)
        assert read(directory, last) == backups.contents[-1]
        writer.remove(last.id)
    with pytest.raises(errors.VerificationFailed), directory.reading(last):
        pass


def test_a_damaged_neighbour_prevents_removing_but_can_be_removed(backups: Backups) -> None:
    (backups.place(2) / "manifest.json").unlink()
    with backups.directory.writer("web01", command="a test") as writer:
        with pytest.raises(errors.UsageError, match="is damaged"):
            writer.remove(backups.points[1].id)
        writer.remove(backups.points[2].id)
        writer.remove(backups.points[1].id)


# -- other processes -------------------------------------------------------------------------


def second(role: str, path: Path, *before: str) -> subprocess.Popen[bytes]:
    """This file as a program."""
    argv = [*before, sys.executable, "-B", __file__, role, str(path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@contextlib.contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process in the middle of writing a point."""
    with second("hold", path) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"holding\n"
            yield child
        finally:
            child.kill()


def test_a_second_writer_is_told_who_is_first(backups: Backups) -> None:
    with holder(backups.directory.path) as child:
        with pytest.raises(errors.BusyError) as caught, backups.directory.writer("web01", command="me"):
            pass
        assert f"holding on (process {child.pid}" in caught.value.holder
        assert " since 20" in caught.value.holder
        with backups.directory.writer("db01", command="another machine"):
            pass
        assert backups.directory.find() == backups.points[-1]


def test_what_a_killed_writer_left_is_removed_by_the_next(backups: Backups) -> None:
    place = backups.directory.path / "web01"
    with holder(backups.directory.path):
        assert len(list(place.glob(".partial-*/vda.qcow2"))) == 1
    assert len(list(place.glob(".partial-*/vda.qcow2"))) == 1
    assert backups.directory.listing("web01").points == tuple(backups.points)
    with backups.directory.writer("web01", command="me"):
        assert not list(place.glob(".partial-*"))
    assert (place / ".lock").read_bytes() == b""


def test_noise_in_a_lock_file_harms_nobody(backups: Backups) -> None:
    lock = backups.directory.path / "web01" / ".lock"
    with holder(backups.directory.path):
        for noise in (b"", b"[" * 5000, b'{"pid": 1}', b"\xff"):
            lock.write_bytes(noise)
            with (
                pytest.raises(errors.BusyError, match="somebody else"),
                backups.directory.writer("web01", command="me"),
            ):
                pass


def test_a_writer_killed_at_any_step_leaves_a_whole_point_or_none(tmp_path: Path) -> None:
    with second("die", tmp_path / "repo") as child:
        told = json.loads(child.communicate(timeout=60)[0])
    assert told["finished"] == [False] * (len(told["finished"]) - 1) + [True]
    # Absent at first, whole from the rename on; and there are steps on both sides of it.
    assert told["points"] == sorted(told["points"])
    assert set(told["points"]) == {0, 1}
    assert told["points"].count(1) > 1
    assert len(told["points"]) > 12


def test_a_repository_without_the_right_to_write_can_be_read(backups: Backups) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become nobody")
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)
        copy = Path(open_to_all, "repo")
        shutil.copytree(backups.directory.path, copy)
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        (copy / "web01" / ".lock").chmod(0)
        program = Path(open_to_all, "second.py")
        shutil.copyfile(__file__, program)
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        with second("read", copy, *nobody) as child:
            told = json.loads(child.communicate(timeout=20)[0])
    assert told == {"digest": backups.points[-1].disks[0].digest, "complaints": [], "write": "permission-denied"}


# -- the second process ----------------------------------------------------------------------


def _create(path: Path) -> None:
    print(repo.create_or_open(path).id, end="")


def _hold(path: Path) -> None:
    directory = repo.open_directory(path)
    with directory.writer("web01", command="holding on") as writer, writer.begin() as pending:
        pending.create("vda", SIZE)
        print("holding", flush=True)
        sys.stdin.read()


def _read(path: Path) -> None:
    directory = repo.open_directory(path)
    point = directory.find()
    with directory.reading(point):
        digest = hashes_of(read(directory, point)).digest()
        complaints = repo.complaints(directory.chain(point, "vda"))
    write = ""
    try:
        with directory.writer("web01", command="no"):
            pass
    except errors.PullbackError as error:
        write = error.code
    print(json.dumps({"digest": digest, "complaints": complaints, "write": write}))


STEPS = frozenset(
    {"open", "os.mkdir", "os.chmod", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "subprocess.Popen"}
)


def _die_at(step: int) -> None:
    """From now on, be killed before the `step`-th thing that touches a file system."""
    counter = itertools.count()

    def watch(event: str, _: object) -> None:
        if event in STEPS and next(counter) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _die(path: Path) -> None:
    """Write a point again and again in a fresh repository, killed one step later each time."""
    Backups(path.with_name("warm")).make((0, BLOCK, 1))
    finished: list[bool] = []
    found: list[int] = []
    while not (finished and finished[-1]):
        files.remove_tree(path)
        child = os.fork()
        if child == 0:
            _die_at(len(finished))
            Backups(path).make((0, BLOCK, 1))
            os._exit(0)
        finished.append(os.waitpid(child, 0)[1] == 0)
        found.append(_sound_points(path))
    print(json.dumps({"finished": finished, "points": found}))


def _sound_points(path: Path) -> int:
    """How many points there are after a death; each must be sound, and the next backup must work."""
    before: tuple[Point, ...] = ()
    directory = repo.create_or_open(path)
    listing = directory.listing("web01")
    assert not listing.damaged
    before = listing.points
    for point in before:
        assert directory.hashes(point, "vda").digest() == point.disks[0].digest
        assert directory.chain(point, "vda")
    with directory.writer("web01", command="the next"):
        assert not list((path / "web01").glob(".partial*"))
    assert directory.listing("web01").points == before
    return len(before)


if __name__ == "__main__":
    {"create": _create, "hold": _hold, "read": _read, "die": _die}[sys.argv[1]](Path(sys.argv[2]))
