"""What lasts on a machine, and what else happens to it: its chain, its NBD server, resets, resizes, migrations."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import pullback
from kit import CLUSTER, Box, MakeBox, last_json
from mounts import Mount
from pullback import errors, sync
from pullback.programs import qemu
from pullback.units import KiB, MiB

pytestmark = pytest.mark.timeout(120)


def opened(box: Box) -> AbstractContextManager[sync.Machine]:
    """The machine by the library."""
    return sync.connect(f"qmp:{box.qmp}", state_dir=box.directories.state)


def content(uri: str) -> bytes:
    """All bytes of an export, by nbdcopy."""
    return subprocess.run(["nbdcopy", uri, "-"], capture_output=True, timeout=60, check=True).stdout


def told(uri: str, context: str) -> list[tuple[int, int, int]]:
    """(start, length, flags) of a context, as nbdinfo sees it."""
    line = ["nbdinfo", "--json", f"--map={context}", uri]
    rows = json.loads(subprocess.run(line, capture_output=True, timeout=60, check=True).stdout)
    return [(row["offset"], row["length"], row["type"]) for row in rows]


def nodes(box: Box) -> set[str]:
    """Names of all nodes."""
    return {node["node-name"] for node in box.command("query-named-block-nodes", {"flat": True})}


def chains(box: Box) -> dict[str, set[str]]:
    """The images that each device stands on."""
    return {record["qdev"]: _files(record["inserted"]["image"]) for record in box.command("query-block")}


def _files(image: Any) -> set[str]:
    """An image and those below it. (A filter is shown as one more of the same file.)"""
    return {image["filename"], *(_files(image["backing-image"]) if "backing-image" in image else ())}


# -- the chain -------------------------------------------------------------------------------


def test_no_image_is_put_on_or_under_a_disk_and_afterwards_its_nodes_are_the_same(box: Box) -> None:
    before, there = chains(box), nodes(box)
    with opened(box) as machine:
        machine.backup_begin({"mode": "pull"}, {"name": "monday"})
        assert chains(box) == before
        machine.backup_end()
    box.backup()
    assert chains(box) == before
    assert nodes(box) == there


def test_a_machine_shows_which_checkpoints_each_disk_has(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(path=Path("a.qcow2"), id="vda"), qemu.Disk(path=Path("b.qcow2"), id="vdb"))
    with opened(box) as machine:
        machine.checkpoint_create({"name": "monday"})
        machine.checkpoint_create({"name": "tuesday", "disks": [{"name": "vdb"}]})
    shown = last_json(box.cli("info", f"qmp:{box.qmp}", "--json").stdout)["disks"]
    found = {disk["target"]: [checkpoint["name"] for checkpoint in disk["checkpoints"]] for disk in shown}
    assert found == {"vda": ["monday"], "vdb": ["monday", "tuesday"]}


# -- the NBD server --------------------------------------------------------------------------


def test_the_server_comes_with_the_first_export_is_private_and_goes_with_the_last(box: Box) -> None:
    def free() -> bool:
        try:
            box.command("nbd-server-stop")
        except errors.RefusedError:
            return True
        return False

    assert free()
    with opened(box) as machine:
        [first] = machine.export_start({"disks": [{"name": "vda"}]})
        [second] = machine.export_start({"disks": [{"name": "vdb"}]})
        assert first.address == second.address
        socket = Path(str(first.address.socket))
        assert socket.stat().st_mode & 0o777 == 0o600
        machine.export_stop([first.name])
        assert content(second.uri) == box.image()["vdb"]
        machine.export_stop([second.name])
        assert not socket.exists()
    assert free()


def test_what_changed_and_what_is_zero_are_told_side_by_side(box: Box) -> None:
    box.write("vda", 0x11, 0, MiB)
    with opened(box) as machine:
        machine.checkpoint_create({"name": "monday"})
    box.write("vda", 0x12, 2 * MiB, CLUSTER)
    box.zero("vda", 0, CLUSTER)
    with opened(box) as machine:
        disks = [{"name": "vda", "incremental": "monday", "exportbitmap": "since"}]
        job = machine.backup_begin({"mode": "pull", "disks": disks})
    uri = job.exports[0].uri
    dirty = [(start, length) for start, length, flags in told(uri, "qemu:dirty-bitmap:since") if flags & 1]
    assert dirty == [(0, CLUSTER), (2 * MiB, CLUSTER)]
    data = {start // CLUSTER for start, _, flags in _pieces(told(uri, "base:allocation")) if not flags & 2}
    at = box.image()["vda"]
    assert data == {start // CLUSTER for start in range(0, len(at), CLUSTER) if any(at[start : start + CLUSTER])}
    with opened(box) as machine:
        machine.backup_abort()


def _pieces(rows: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    for start, length, flags in rows:
        for at in range(start, start + length, CLUSTER):
            yield at, CLUSTER, flags


@contextmanager
def loop_device(path: Path, size: int) -> Iterator[str]:
    """A block device."""
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(size)
    done = subprocess.run(["losetup", "-f", "--show", path], capture_output=True, text=True, check=False, timeout=10)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr}")
    try:
        yield done.stdout.strip()
    finally:
        subprocess.run(["losetup", "-d", done.stdout.strip()], check=True, timeout=10)


def test_a_block_device_takes_old_blocks_and_stays(box: Box) -> None:
    box.write("vda", 0x13, 0, MiB)
    at = box.image()["vda"]
    with loop_device(box.directory / "loop", 16 * MiB) as device:
        disk = {"name": "vda", "type": "block", "scratch": {"dev": device}}
        with opened(box) as machine:
            job = machine.backup_begin({"mode": "pull", "disks": [disk]})
        box.write("vda", 0x14, 0, 2 * MiB)
        assert content(job.exports[0].uri) == at
        with opened(box) as machine:
            machine.backup_end()
        assert Path(device).is_block_device()
    assert box.leftovers() == []


def test_the_keeper_gives_up_a_job_whose_scratch_gets_low_on_room(box: Box, mount: Mount) -> None:
    place = mount.tmpfs(1280 * MiB)
    with opened(box) as machine:
        machine.checkpoint_create({"name": "monday"})
        machine.backup_begin({"mode": "pull"}, {"name": "tuesday"}, how=pullback.How(scratch=place))
    box.write("vda", 0x1A, 0, MiB)
    with (place / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 512 * MiB)
    deadline = time.monotonic() + 20
    while box.leftovers():
        assert time.monotonic() < deadline, box.leftovers()
        time.sleep(0.1)
    with opened(box) as machine:
        ended = machine.backup_last()
        assert ended is not None
        assert not ended.success
        assert "free" in str(ended.error)
        assert [checkpoint.name for checkpoint in machine.checkpoint_list().checkpoints] == ["monday"]
        changed = [(extent.start, extent.length) for extent in machine.changes("vda", since="monday").extents]
        assert changed == [(0, MiB)]


def test_who_watches_hears_of_others_and_holds_nothing_between_looks(box: Box) -> None:
    with opened(box) as machine:
        machine.checkpoint_create({"name": "monday"})
    stream = sync.watch(f"qmp:{box.qmp}", state_dir=box.directories.state, interval=0.05)
    first = next(stream)
    assert (first.kind, first.subject) == ("checkpoint-created", "monday")
    with opened(box) as machine:
        machine.checkpoint_create({"name": "tuesday"})
    second = next(event for event in stream if event.kind != "busy")
    assert (second.kind, second.subject) == ("checkpoint-created", "tuesday")
    stream.close()
    assert "pullback" not in {thread.name for thread in threading.enumerate()}


# -- what else happens -----------------------------------------------------------------------


def test_a_guest_that_resets_does_not_end_a_job(box: Box) -> None:
    box.write("vda", 0x15, 0, MiB)
    at = box.image()
    with opened(box) as machine:
        job = machine.backup_begin({"mode": "pull"}, {"name": "monday"})
    box.command("system_reset")
    box.write("vda", 0x16, 0, MiB)
    for served in job.exports:
        assert content(served.uri) == at[served.target]
    with opened(box) as machine:
        assert machine.backup_end().success
        changed = [(extent.start, extent.length) for extent in machine.changes("vda", since="monday").extents]
        assert changed == [(0, MiB)]


def test_a_disk_in_a_snapshot_is_not_resized(box: Box) -> None:
    with opened(box) as machine:
        machine.snapshot_create({"name": "s", "disks": [{"name": "vda"}]})
    with pytest.raises(errors.RefusedError):
        box.command("block_resize", {"node-name": "vda-format", "size": 16 * MiB})
    with opened(box) as machine:
        machine.snapshot_delete("s")
    box.command("block_resize", {"node-name": "vda-format", "size": 16 * MiB})


@contextmanager
def destination(box: Box) -> Iterator[Box]:
    """A second QEMU on the same images, which waits for the machine to come."""
    directory = box.directory / "there"
    directory.mkdir()
    other = Box(directory, list(box.disks), extra=("-incoming", f"unix:{directory}/incoming"))
    other.model = box.model
    other.start()
    try:
        yield other
    finally:
        other.close()


def migrated(box: Box, other: Box) -> str:
    """Move it; gives how that ended."""
    box.command("migrate", {"uri": f"unix:{other.directory}/incoming"})
    deadline = time.monotonic() + 30
    while (status := str(box.command("query-migrate").get("status"))) not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < deadline, status
        time.sleep(0.05)
    return status


def test_checkpoints_move_with_a_machine_whose_images_are_shared(box: Box) -> None:
    with opened(box) as machine:
        machine.checkpoint_create({"name": "monday"})
    box.write("vda", 0x17, 0, 64 * KiB)
    with destination(box) as other:
        assert migrated(box, other) == "completed"
        box.kill()
        other.write("vda", 0x18, MiB, 64 * KiB)
        with opened(other) as machine:
            [found] = machine.checkpoint_list().checkpoints
            assert (found.name, found.problem) == ("monday", None)
            changed = [(extent.start, extent.length) for extent in machine.changes("vda", since="monday").extents]
        assert changed == [(0, 64 * KiB), (MiB, 64 * KiB)]
        other.quit()


def test_a_machine_with_a_job_is_not_migrated_and_the_job_goes_on(box: Box) -> None:
    with opened(box) as machine:
        job = machine.backup_begin({"mode": "pull"}, {"name": "monday"})
    at = box.image()["vda"]
    with destination(box) as other:
        status = migrated(box, other)
        assert status == "failed", status
    box.write("vda", 0x19, 0, 64 * KiB)
    uri = next(served.uri for served in job.exports if served.target == "vda")
    assert content(uri) == at
    with opened(box) as machine:
        assert machine.backup_end().success
