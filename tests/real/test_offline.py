"""Machines that are off, backed up by their images."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit import CLUSTER, Box, MakeBox, last_json
from mounts import Mount, empty, fill
from pullback import errors, state
from pullback.engine import storage
from pullback.flows import backup as backup_flow
from pullback.model import urls
from pullback.model.backups import Fleecing
from pullback.model.points import Mode
from pullback.programs import process, qemu, qemu_img
from pullback.transfer import copy
from pullback.units import KiB, MiB


def images(box: Box, **formats: str) -> urls.ImagesMachine:
    """The machine's images as it is named when it is off."""
    return urls.ImagesMachine(
        images=tuple(urls.Image(target=d.id, path=d.path, format=formats.get(d.id)) for d in box.disks)
    )


def off(box: Box, **changes: Any) -> backup_flow.Report:
    """Back up the machine that is off, with what must hold afterwards."""
    machine = changes.pop("machine", None) or images(box)
    report = box.backup(machine=machine, name="web01", **changes)
    assert left(box) == []
    assert wrecks(box) == []
    return report


def left(box: Box) -> list[str]:
    """Everything of ours that is still there, checkpoints aside."""
    base = box.directory / "state"
    found = [str(path) for folder in ("jobs", "scratch", "run") for path in sorted((base / folder).glob("*"))]
    found += [str(path) for path in box.repository.glob("*/.partial-*")]
    return found + [bitmap.name for bitmaps in stored(box).values() for bitmap in bitmaps if "pullback-" in bitmap.name]


def stored(box: Box) -> dict[str, tuple[qemu_img.StoredBitmap, ...]]:
    """The bitmaps in each image."""
    return {disk.id: qemu_img.info(disk.path, format=disk.format).bitmaps for disk in box.disks}


def wrecks(box: Box) -> list[str]:
    """Bitmaps that are not closed well."""
    return [bitmap.name for bitmaps in stored(box).values() for bitmap in bitmaps if bitmap.in_use]


def modes(report: backup_flow.Report) -> dict[str, Mode]:
    """How each disk was read."""
    return {disk.target: disk.mode for disk in report.point.disks}


@contextlib.contextmanager
def on(box: Box) -> Iterator[Box]:
    """The machine runs while the block runs, and is shut down cleanly."""
    box.start()
    try:
        yield box
    finally:
        box.quit()


def shrink_and_grow(path: Path, size: int, through: int) -> None:
    """Resize an image down and back."""
    process.run(["qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path, str(through)], timeout=20)
    process.run(["qemu-img", "resize", "-q", "-f", "qcow2", path, str(size)], timeout=20)


FULL = {"vda": Mode.FULL, "vdb": Mode.FULL}
CHANGES = {"vda": Mode.INCREMENTAL, "vdb": Mode.INCREMENTAL}


@pytest.fixture
def stopped(make_box: MakeBox) -> Box:
    """A machine with two disks that holds some data and is off."""
    box = make_box(start=False)
    with on(box):
        box.write("vda", 0x11, 1 * MiB, 2 * MiB + 4 * KiB)
        box.write("vdb", 0x22, 0, CLUSTER)
    return box


def test_a_full_and_increments_restore_every_point_byte_for_byte(stopped: Box) -> None:
    box = stopped
    moments = []
    for step in range(3):
        report = off(box)
        assert modes(report) == (CHANGES if step else FULL)
        assert report.broken == ()
        assert report.pause == 0
        assert len(stored(box)["vda"]) == 1
        moments.append((report.point.id, box.image()))
        with on(box):
            box.write("vda", 0x30 + step, 256 * KiB * step, 100 * KiB)
            box.write("vdb", 0x40 + step, 7 * MiB + step * 512, 512)
            box.zero("vda", 2 * MiB + step * CLUSTER, CLUSTER)
            box.discard("vda", 3 * MiB + step * CLUSTER, CLUSTER)
    for point, content in moments:
        assert box.restored(point) == content
    assert box.verify(all=True).damaged == ()


def test_an_increment_reads_only_what_changed(stopped: Box) -> None:
    box = stopped
    off(box)
    with on(box):
        box.write("vda", 0x12, 3 * MiB + 8 * KiB, 4 * KiB)
    report = off(box)
    assert report.point.disk("vda").read == 1 * MiB
    assert report.point.disk("vdb").read == 0
    assert box.restored() == box.image()


def test_increments_go_on_from_running_to_off_and_back(stopped: Box) -> None:
    box = stopped
    box.start()
    box.backup()
    box.write("vda", 0x12, 5 * MiB, 64 * KiB)
    box.quit()
    report = off(box)
    assert modes(report) == CHANGES
    assert report.point.engine == "offline"
    assert box.restored() == box.image()
    box.start()
    box.write("vdb", 0x13, 5 * MiB, 64 * KiB)
    report = box.backup()
    assert modes(report) == CHANGES
    assert report.point.disk("vda").read == 0
    box.quit()
    assert modes(off(box)) == CHANGES
    assert box.restored() == box.image()


def test_a_chain_that_began_while_off_goes_on_while_running(stopped: Box) -> None:
    box = stopped
    off(box)
    box.start()
    box.write("vda", 0x12, 5 * MiB, 64 * KiB)
    report = box.backup()
    assert modes(report) == CHANGES
    assert report.point.disk("vda").read == 1 * MiB
    assert box.restored() == box.image()


def test_after_a_crash_of_the_machine_worthless_bitmaps_are_removed_and_all_is_read(stopped: Box) -> None:
    box = stopped
    off(box)
    box.start()
    box.write("vda", 0x12, 0, 64 * KiB)
    box.command("qom-list", {"path": "/"})
    qemu.hmp(box.hmp, 'qemu-io -d /machine/peripheral/vda/virtio-backend "flush"')
    box.kill()
    report = off(box)
    assert modes(report) == FULL
    assert report.broken == ("vda", "vdb")
    assert "inconsistent" in (report.point.disk("vda").reason or "")
    assert box.restored() == box.image()
    assert modes(off(box)) == CHANGES


def test_an_image_that_a_running_machine_has_open_is_refused_as_busy(box: Box) -> None:
    with pytest.raises(errors.BusyError, match=r"vda\.qcow2.*in use by another process") as caught:
        off(box)
    assert caught.value.exit_code == 11
    box.write("vda", 0x11, 0, 512)


def test_a_raw_image_that_a_running_machine_has_open_is_refused_as_busy(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"))
    with pytest.raises(errors.BusyError, match=r"a\.raw.*in use by another process"):
        off(box)


def test_a_raw_backing_file_that_somebody_writes_to_is_refused_as_busy(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"))
    overlay = box.directory / "overlay.qcow2"
    process.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.raw", "-F", "raw", "-u", overlay, "8M"], timeout=20
    )
    machine = urls.ImagesMachine(images=(urls.Image(target="vda", path=overlay, format="qcow2"),))
    with pytest.raises(errors.BusyError, match=r"a\.raw"):
        off(box, machine=machine)


def during(box: Box, monkeypatch: pytest.MonkeyPatch, what: Callable[[], object], **changes: Any) -> backup_flow.Report:
    """Do `what` while the data is copied."""

    def copying(*words: Any, **options: Any) -> Any:
        what()
        return copy(*words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(backup_flow, "copy", copying)
        return off(box, **changes)


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_no_machine_can_be_started_on_the_images_meanwhile(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a"), format=format), start=False)
    said = []

    def start() -> None:
        with pytest.raises(errors.ProgramFailed) as caught:
            box.start()
        said.append(caught.value.message)

    during(box, monkeypatch, start)
    assert said
    assert all("lock" in message for message in said)
    with on(box):
        box.write("vda", 0x11, 0, 512)


@contextlib.contextmanager
def reader(path: Path) -> Iterator[None]:
    """Somebody reads the image while the block runs."""
    line: list[str | Path] = ["qemu-io", "-r", "-f", "qcow2", path]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("length\n")
        child.stdin.flush()
        assert child.stdout.readline(), "it has opened the image"
        yield
        child.stdin.close()


def test_an_image_that_somebody_reads_can_take_no_checkpoint_and_is_refused_as_busy(small: Box) -> None:
    with reader(small.disks[0].path), pytest.raises(errors.BusyError, match="in use by another process"):
        off(small)
    assert modes(off(small)) == {"vda": Mode.INCREMENTAL}


def test_a_reader_that_comes_in_the_middle_only_delays_the_release(small: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    scribble(small, 0x12)
    with contextlib.ExitStack() as readers:
        come = [readers.enter_context]
        report = during(small, monkeypatch, lambda: come and come.pop()(reader(small.disks[0].path)))
    assert any("an older checkpoint stays for now" in note for note in report.notes)
    assert len(stored(small)["vda"]) == 2
    assert modes(off(small)) == {"vda": Mode.INCREMENTAL}
    assert len(stored(small)["vda"]) == 1
    assert small.restored() == small.image()


def test_a_second_backup_of_the_same_images_is_refused_as_busy(stopped: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []

    def second() -> None:
        words = ("backup", f"images:vdb={stopped.disks[0].path}", "-r", f"dir:{stopped.directory / 'other'}")
        said.append(stopped.cli(*words, "--name", "other"))

    during(stopped, monkeypatch, second)
    assert [done.returncode for done in said] == [11] * len(said)
    assert "vda.qcow2" in said[0].stderr


def test_a_raw_disk_is_read_whole_each_time_and_that_is_no_warning(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"), start=False)
    for value in (0x11, 0x12):
        with on(box):
            box.write("vda", value, value * CLUSTER, 1 * MiB)
        report = off(box)
        assert modes(report) == {"vda": Mode.FULL}
        assert report.broken == ()
        assert "raw" in (report.point.disk("vda").reason or "")
        assert box.restored() == box.image()


def test_a_qcow2_with_a_raw_data_file_is_incremental(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), start=False)
    data = box.directory / "data.raw"
    qemu_img.create(box.disks[0].path, 8 * MiB, options=f"data_file={data},data_file_raw=on")
    layered = images(box, vda="qcow2")
    with on(box):
        box.write("vda", 0x11, 1 * MiB, 2 * MiB)
    off(box, machine=layered)
    with on(box):
        box.write("vda", 0x12, 2 * MiB + 512, 512)
        box.zero("vda", 1 * MiB, CLUSTER)
    report = off(box, machine=layered)
    assert modes(report) == {"vda": Mode.INCREMENTAL}
    assert report.point.disk("vda").read <= 2 * MiB
    assert box.restored() == box.image()
    assert data.read_bytes() == box.image()["vda"]


def test_a_backing_chain_gives_its_visible_content(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("base.qcow2")), start=False)
    with on(box):
        box.write("vda", 0x11, 1 * MiB, 2 * MiB)
    for below, above in (("base", "middle"), ("middle", "top")):
        qemu_img.create(box.directory / f"{above}.qcow2", 8 * MiB, backing=f"{below}.qcow2")
    box.disks = [replace(box.disks[0], path=box.directory / "top.qcow2")]
    layered = images(box, vda="qcow2")
    with on(box):
        box.write("vda", 0x12, 2 * MiB, CLUSTER)
        box.zero("vda", 1 * MiB, CLUSTER)
    off(box, machine=layered)
    assert box.restored() == box.image()
    with on(box):
        box.zero("vda", 2 * MiB, 3 * CLUSTER)
    report = off(box, machine=layered)
    assert modes(report) == {"vda": Mode.INCREMENTAL}
    assert box.restored() == box.image()


def test_checkpoints_that_an_external_snapshot_buried_are_missed_loudly(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("base.qcow2")), start=False)
    off(box)
    qemu_img.create(box.directory / "top.qcow2", 8 * MiB, backing="base.qcow2")
    box.disks = [replace(box.disks[0], path=box.directory / "top.qcow2")]
    report = off(box, machine=images(box, vda="qcow2"))
    assert report.broken == ("vda",)
    assert "backing image" in (report.point.disk("vda").reason or "")


def test_a_disk_shrunk_and_grown_back_is_restored_with_its_zeroes(stopped: Box) -> None:
    box = stopped
    with on(box):
        box.write("vda", 0x11, 0, 8 * MiB)
    off(box)
    through = 5 * MiB + 512 * KiB
    shrink_and_grow(box.disks[0].path, 8 * MiB, through)
    box.model["vda"][through:] = bytes(8 * MiB - through)
    assert modes(off(box)) == CHANGES
    assert box.restored() == box.image()


@pytest.mark.parametrize("size", [512, 64 * KiB + 512, 3 * MiB + 1536])
def test_odd_sizes_work(make_box: MakeBox, size: int) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=size, start=False)
    for value in (0x11, 0x12):
        with on(box):
            box.write("vda", value, size - 512, 512)
        off(box)
        assert box.restored() == box.image()


def test_a_raw_file_that_ends_within_a_sector_is_filled_with_zeroes(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"), start=False)
    box.disks[0].path.write_bytes(b"\x11" * 70001)
    off(box)
    assert box.restored() == {"vda": b"\x11" * 70001 + bytes(-70001 % 512)}


def test_a_block_device_is_read_whole(short_dir: Path, make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"), start=False)
    box.disks[0].path.write_bytes(b"\x11" * MiB + bytes(MiB))
    with loop(box.disks[0].path) as device:
        machine = urls.ImagesMachine(images=(urls.Image(target="vda", path=device),))
        off(box, machine=machine)
        assert box.restored() == {"vda": b"\x11" * MiB + bytes(MiB)}
        process.run(["mkfs.ext4", "-q", "-F", device], timeout=20)
        point = short_dir / "mounted"
        point.mkdir()
        process.run(["mount", device, point], timeout=20)
        try:
            with pytest.raises(errors.BusyError, match="mounted"):
                off(box, machine=machine)
        finally:
            process.run(["umount", point], timeout=20)


@contextlib.contextmanager
def loop(path: Path) -> Iterator[Path]:
    """A block device whose content is the file's."""
    device = Path(process.run(["losetup", "--find", "--show", path], timeout=20).decode().strip())
    try:
        yield device
    finally:
        process.run(["losetup", "--detach", device], timeout=20)


# -- failures --------------------------------------------------------------------------------


def test_a_failed_backup_takes_its_checkpoints_back(stopped: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box = stopped
    off(box)
    before = stored(box)
    with on(box):
        box.write("vda", 0x12, 0, 64 * KiB)

    def fail() -> None:
        assert len(stored(box)["vda"]) == 2, "the new checkpoint is stored before a byte is copied"
        assert wrecks(box) == []
        raise errors.DestinationFull(path="nowhere")

    with pytest.raises(errors.DestinationFull):
        during(box, monkeypatch, fail)
    assert stored(box) == before
    assert left(box) == []
    assert modes(off(box)) == CHANGES
    assert box.restored() == box.image()


def named(box: Box) -> str:
    """The machine that is off, as users name it."""
    return "images:" + ",".join(f"{disk.id}={disk.path}" for disk in box.disks)


def backup_off(box: Box, *words: object, to: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`pullback backup` of the machine that is off."""
    return box.cli("backup", named(box), "-r", f"dir:{to or box.repository}", "--name", "web01", *words)


def struck(box: Box, number: signal.Signals, command: str, occurrence: int) -> tuple[int, str]:
    """A backup that gets a signal right after the answer to a QMP command; gives its end."""
    words = ["backup", named(box), "-r", f"dir:{box.repository}", "--name", "web01"]
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "dying.py", number.name, command, str(occurrence), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PULLBACK_STATE_DIR": str(box.directory / "state")},
    )
    return done.returncode, done.stdout


def daemons(box: Box) -> list[int]:
    """Storage daemons that work in the machine's state directory."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and str(box.directory).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def gone(box: Box) -> None:
    """Wait until no program of a killed backup is left: the kernel ends them with it."""
    deadline = time.monotonic() + 10
    while daemons(box):
        assert time.monotonic() < deadline, "a child outlived its parent"
        time.sleep(0.01)


def scribble(box: Box, value: int) -> None:
    """Write to the machine's one disk while it is off (a machine that ran for a moment does the same, slower)."""
    start = value % 16 * 2 * CLUSTER
    words: list[str | Path] = [
        "qemu-io",
        "-f",
        "qcow2",
        "-c",
        f"write -q -P {value} {start} {CLUSTER}",
        box.disks[0].path,
    ]
    process.run(words, timeout=20)
    box.model["vda"][start : start + CLUSTER] = bytes([value]) * CLUSTER


@pytest.fixture
def small(make_box: MakeBox) -> Box:
    """A machine with one small disk and one restore point."""
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=2 * MiB, start=False)
    scribble(box, 0x11)
    off(box)
    return box


#: The QMP commands of an increment at which it can be hit, in order; True: while an image is writable.
MOMENTS = [
    ("blockdev-add", 2, False),
    ("blockdev-reopen", 1, True),
    ("transaction", 1, True),
    ("blockdev-reopen", 2, False),
    ("block-export-add", 1, False),
    ("nbd-server-stop", 1, False),
    ("blockdev-reopen", 3, True),
    ("transaction", 3, True),
    ("blockdev-reopen", 4, False),
    ("quit", 1, False),
]


def test_killed_at_any_moment_the_next_backup_is_right_and_only_a_writable_image_is_read_whole(small: Box) -> None:
    box = small
    for value, (command, occurrence, writable) in enumerate(MOMENTS, 0x20):
        where = f"{command} {occurrence}"
        scribble(box, value)
        code, said = struck(box, signal.SIGKILL, command, occurrence)
        assert code == -signal.SIGKILL, f"{where}: {said}"
        gone(box)
        assert bool(wrecks(box)) is writable, where
        scribble(box, value + 0x40)
        report = off(box)
        assert modes(report) == {"vda": Mode.FULL if writable else Mode.INCREMENTAL}, where
        assert report.broken == (("vda",) if writable else ()), where
        assert box.restored() == box.image(), where
        assert len(stored(box)["vda"]) == 1, where


def test_sigterm_at_any_moment_leaves_nothing_and_no_gap(small: Box) -> None:
    box = small
    for value, (command, occurrence, _) in enumerate(MOMENTS[::2] + MOMENTS[7:8], 0x20):
        where = f"{command} {occurrence}"
        scribble(box, value)
        code, said = struck(box, signal.SIGTERM, command, occurrence)
        assert code in (143, 0), f"{where}: {said}"
        assert daemons(box) == [], where
        assert left(box) == [], f"{where}: {said}"
        assert wrecks(box) == [], where
        report = off(box)
        assert modes(report) == {"vda": Mode.INCREMENTAL}, where
        assert report.broken == (), where
        assert box.restored() == box.image(), where
        assert len(stored(box)["vda"]) == 1, where


def test_what_a_dead_job_of_the_running_machine_left_is_removed_and_the_other_way_round(small: Box) -> None:
    box = small
    dead = state.begin_job(
        box.directories, job="0123abcd", socket=box.qmp, machine="web01", command="backup", qemu="1:1"
    )
    box.scratch.mkdir()
    dead.record.scratch = [str(box.scratch / "pullback-0123abcd-scr0")]
    (box.scratch / "pullback-0123abcd-scr0").touch()
    dead.save()
    off(box)
    code, _ = struck(box, signal.SIGKILL, "block-export-add", 1)
    assert code == -signal.SIGKILL
    gone(box)
    with on(box):
        assert modes(box.backup()) == {"vda": Mode.INCREMENTAL}
        assert box.leftovers() == []


def test_when_the_storage_daemon_dies_nothing_is_lost(small: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    scribble(small, 0x12)

    def kill() -> None:
        for pid in daemons(small):
            if b"qemu-storage-daemon" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(errors.EndpointFailed):
        during(small, monkeypatch, kill)
    assert modes(off(small)) == {"vda": Mode.INCREMENTAL}
    assert small.restored() == small.image()
    assert len(stored(small)["vda"]) == 1


def test_an_image_on_a_full_file_system_is_read_whole_and_keeps_its_checkpoints(small: Box, mount: Mount) -> None:
    move(small, mount.tmpfs(4 * MiB))
    before = stored(small)
    with filled(small.disks[0].path.parent, leave=64 * KiB):
        report = off(small)
        assert modes(report) == {"vda": Mode.FULL}
        assert "full" in (report.point.disk("vda").reason or "")
        assert stored(small) == before
    assert small.restored() == small.image()


def test_checkpoints_that_cannot_be_stored_fail_the_backup_and_the_next_says_that_they_are_lost(
    small: Box, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        process.run(["qemu-img", "bitmap", "--add", small.disks[0].path, f"foreign{number}"], timeout=20)
    scribble(small, 0x12)
    move(small, mount.tmpfs(8 * MiB))
    with filled(small.disks[0].path.parent, leave=0), monkeypatch.context() as patch:
        patch.setattr(storage, "_has_room", lambda *_: True)
        with pytest.raises(errors.CheckpointsNotStored, match="No space left"):
            off(small)
    assert wrecks(small) != []
    report = small.backup(machine=images(small), name="web01")
    assert report.broken == ("vda",)
    assert modes(small.backup(machine=images(small), name="web01")) == {"vda": Mode.INCREMENTAL}
    assert small.restored() == small.image()


def move(box: Box, directory: Path) -> None:
    """Move the machine's images."""
    box.disks = [replace(disk, path=Path(shutil.move(disk.path, directory))) for disk in box.disks]


@contextlib.contextmanager
def filled(directory: Path, *, leave: int) -> Iterator[None]:
    """A file system without room."""
    fill(directory, leave)
    try:
        yield
    finally:
        empty(directory)


# -- images that are not as they should be ---------------------------------------------------


def test_a_read_only_image_is_read_whole_without_a_checkpoint(small: Box, mount: Mount) -> None:
    place = mount.tmpfs(4 * MiB)
    move(small, place)
    before = stored(small)
    process.run(["mount", "-o", "remount,ro", place], timeout=20)
    for _ in range(2):
        report = off(small)
        assert modes(report) == {"vda": Mode.FULL}
        assert report.broken == ()
        assert "cannot be written" in (report.point.disk("vda").reason or "")
        assert report.point.disk("vda").mark is None
    assert stored(small) == before
    assert small.restored() == small.image()


def test_an_image_that_was_not_closed_cleanly_is_repaired_first(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), start=False)
    qemu_img.create(box.disks[0].path, 8 * MiB, options="lazy_refcounts=on")
    off(box)
    for value in (0x12, 0x13):
        box.start()
        box.write("vda", value, value * 4 * CLUSTER, MiB)
        qemu.hmp(box.hmp, 'qemu-io -d /machine/peripheral/vda/virtio-backend "flush"')
        box.kill()
        assert backup_off(box, "--dry-run").returncode == 0
        assert qemu_img.info(box.disks[0].path).dirty, "a look does not change it"
        report = off(box)
        assert report.broken == ("vda",)
        assert not qemu_img.info(box.disks[0].path).dirty
        assert qemu_img.check(box.disks[0].path) is None
        assert box.restored() == box.image()


def test_an_image_that_is_marked_corrupt_is_read_whole_and_not_written_to(small: Box) -> None:
    path = small.disks[0].path
    header = bytearray(path.read_bytes())
    header[79] |= 2  # incompatible features, bit 1 (docs/interop/qcow2.txt)
    path.write_bytes(header)
    report = off(small)
    assert "corrupt" in (report.point.disk("vda").reason or "")
    assert path.read_bytes() == header
    assert small.restored() == small.image()


def test_an_old_qcow2_is_read_whole_and_that_is_said(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), start=False)
    qemu_img.create(box.disks[0].path, 8 * MiB, options="compat=0.10")
    assert "version 2" in (off(box).point.disk("vda").reason or "")


def test_a_guest_cannot_make_us_read_other_files_by_a_feigned_header(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"), start=False)
    path = box.disks[0].path
    (box.directory / "secret").write_bytes(b"secret" * 1000)
    for options, backing in ((None, "secret"), (f"data_file={box.directory / 'secret2'}", None)):
        path.unlink()
        qemu_img.create(path, 8 * MiB, backing=backing, options=options)
        with pytest.raises(errors.ImageUnusable, match="over another file") as caught:
            off(box)
        assert f"vda=qcow2:{path}" in (caught.value.hint or "")
    off(box, machine=images(box, vda="raw"))
    assert box.restored()["vda"].startswith(path.read_bytes())


def test_other_formats_are_refused_unless_they_are_called_raw(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.vmdk"), format="raw"), start=False)
    path = box.disks[0].path
    path.unlink()
    qemu_img.create(path, 8 * MiB, format="vmdk")
    with pytest.raises(errors.ImageUnusable, match="format vmdk"):
        off(box)
    off(box, machine=images(box, vda="raw"))
    assert box.restored()["vda"].rstrip(b"\0") == path.read_bytes().rstrip(b"\0")


def test_a_backing_file_of_unknown_format_is_refused(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), start=False)
    path = box.directory / "top.qcow2"
    qemu_img.create(path, 8 * MiB, backing="a.qcow2")
    header = bytearray(path.read_bytes())
    at = header.index(b"\xe2\x79\x2a\xca")  # the header extension with the backing format's name
    header[at : at + 4] = b"\x12\x34\x56\x78"  # one that nobody knows
    path.write_bytes(header)
    machine = urls.ImagesMachine(images=(urls.Image(target="vda", path=path, format="qcow2"),))
    with pytest.raises(errors.ImageUnusable, match="is not recorded"):
        off(box, machine=machine)


def test_backing_files_that_go_round_are_refused(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), start=False)
    for above, below in (("a", "b"), ("b", "a")):
        qemu_img.create(box.directory / f"{above}.qcow2", 8 * MiB, backing=f"{below}.qcow2")
    with pytest.raises(errors.ImageUnusable, match="go round"):
        off(box, machine=images(box, vda="qcow2"))


def test_paths_with_commas_and_colons_work(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a,b:c.qcow2")), start=False)
    name = str(box.disks[0].path).replace(",", ",,")
    done = box.cli("backup", f"images:vda={name}", "-r", f"dir:{box.repository}", "--name", "web01")
    assert done.returncode == 0, done.stderr
    assert "was off" in done.stdout
    assert box.restored() == box.image()


# -- the command line ------------------------------------------------------------------------


def refused(box: Box, machine: str, **changes: Any) -> str:
    """A backup that is refused as a wrong request; gives what is said, with the hint."""
    with pytest.raises(errors.PullbackError) as caught:
        box.backup(**({"machine": urls.machine(f"images:{machine}"), "name": "web01"} | changes))
    assert caught.value.exit_code == 2
    assert left(box) == []
    return f"{caught.value} {caught.value.hint}"


def test_what_cannot_be_an_image_is_refused_by_name(small: Box) -> None:
    box = small
    path, link, pipe = box.disks[0].path, box.directory / "link", box.directory / "pipe"
    link.symlink_to(path)
    os.mkfifo(pipe)
    (box.directory / "text").write_text("no image")
    cases = {
        f"vda={path},vda={path}": "there are two disks vda",
        f"vda={path},vdb={link}": "vda and vdb are the same image",
        f"vda={box.directory}/nothing": "No such file or directory",
        f"vda={box.directory}": "it is a directory",
        f"vda={pipe}": "neither a file nor a block device",
        f"vda=qcow2:{box.directory}/text": "not in qcow2 format",
        f"../vda={path}": "is no disk's name",
    }
    for machine, words in cases.items():
        assert words in refused(box, machine)


def test_a_request_that_makes_no_sense_for_images_is_refused(small: Box) -> None:
    machine = f"vda={small.disks[0].path}"
    assert "--name" in refused(small, machine, name=None)
    assert "needs no engine" in refused(small, machine, fleecing=Fleecing.FILTER)
    assert "There is no disk 'vdb'" in refused(small, machine, only=("vdb",))


def test_an_image_that_lies_under_another_is_no_disk_of_its_own(small: Box) -> None:
    above = small.directory / "above.qcow2"
    qemu_img.create(above, 2 * MiB, backing=small.disks[0].path.name)
    said = refused(small, f"vda=qcow2:{above},vdb={small.disks[0].path}")
    assert "is disk vdb, and a part of vda too" in said


def test_an_image_that_we_may_not_read_is_refused(small: Box) -> None:
    small.disks[0].path.chmod(0)
    small.disks[0].path.parent.chmod(0o755)
    os.chown(small.disks[0].path, 65534, 65534)
    lost = "-dac_override,-dac_read_search"
    line = ["setpriv", "--bounding-set", lost, "--inh-caps", lost, sys.executable, "-m", "pullback.cli.main"]
    words = ["info", named(small)]
    environment = os.environ | {"PULLBACK_STATE_DIR": str(small.directory / "state2")}
    done = subprocess.run([*line, *words], capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 1
    assert f"No permission to use {small.disks[0].path}" in done.stderr


def test_an_image_in_use_ends_with_11(box: Box) -> None:
    done = backup_off(box)
    assert done.returncode == 11
    assert f"{box.disks[0].path}: it is in use by another process" in done.stderr


def test_dry_run_info_and_untrack_know_images(small: Box) -> None:
    scribble(small, 0x12)
    done = backup_off(small, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["disks"][0]["read_at_most"] == CLUSTER
    done = small.cli("info", named(small))
    assert done.returncode == 0, done.stderr
    assert "off, QEMU" in done.stdout
    assert "checkpoint auto." in done.stdout
    done = small.cli("info", named(small), "--json")
    assert last_json(done.stdout)["disks"][0]["target"] == "vda"
    done = small.cli("untrack", named(small))
    assert done.returncode == 0, done.stderr
    assert stored(small) == {"vda": ()}
    assert left(small) == []
