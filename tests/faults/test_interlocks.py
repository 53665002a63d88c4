"""What others do to a machine while a backup of it runs: each row of docs/interlocks.md, on real QEMU."""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit import Box, MakeBox
from pullback import errors
from pullback.flows import backup as flow
from pullback.model.backups import Fleecing
from pullback.model.points import Mode
from pullback.programs import qemu, qemu_img
from pullback.progress import Silent
from pullback.units import MiB
from victim import eventually, running

SIZE = 4 * MiB
ROOT = Path(__file__).parents[2]
both_engines = pytest.mark.parametrize("engine", list(Fleecing))


class During(Silent):
    """Does something when the disk is frozen, before a byte is read."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def start(self, subject: str, total: int) -> None:
        """The copy begins."""
        self._act()


def one(make_box: MakeBox, **options: Any) -> Box:
    """A machine with a disk, a restore point, and changes since."""
    box = make_box(qemu.Disk(id="sda", path=Path("a.qcow2"), bus=qemu.Bus.SCSI), size=SIZE, **options)
    box.write("sda", 0x11, 0, MiB)
    box.backup()
    box.write("sda", 0x12, MiB, MiB)
    return box


def backup(box: Box, engine: Fleecing, act: Callable[[], object]) -> flow.Report:
    """A backup, with something that happens while the disk is frozen."""
    then = {}

    def during() -> None:
        then.update(box.image())
        act()
        if running(box):
            box.write("sda", 0x13, MiB + 512, 512)  # the guest is well: it writes

    report = asyncio.run(flow.backup(box.request(fleecing=engine), During(during)))
    assert report.broken == ()
    assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL}
    assert box.restored() == then
    assert box.leftovers() == []
    return report


def increment(box: Box) -> None:
    """The next backup goes on, exactly."""
    report = box.backup()
    assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL}, report.notes
    assert box.restored() == box.image()
    assert box.leftovers() == []


def refused(box: Box, command: str, arguments: dict[str, object]) -> None:
    """QEMU refuses it."""
    with pytest.raises(errors.RefusedError):
        box.command(command, arguments)


def root(box: Box) -> str:
    """The node directly under the device."""
    [node] = [block["inserted"]["node-name"] for block in box.command("query-block") if block.get("inserted")]
    return str(node)


def target(box: Box) -> None:
    """A node that their job could copy to."""
    path = box.directory / "theirs.qcow2"
    qemu_img.create(path, SIZE)
    file = {"driver": "file", "filename": str(path)}
    box.command("blockdev-add", {"driver": "qcow2", "node-name": "theirs", "file": file})


# -- jobs ------------------------------------------------------------------------------------


@both_engines
def test_mirror_and_commit_are_refused_by_qemu_while_a_backup_runs(make_box: MakeBox, engine: Fleecing) -> None:
    box = one(make_box)

    def act() -> None:
        target(box)
        for node in ("sda-format", root(box)):
            refused(box, "blockdev-mirror", {"job-id": "m", "device": node, "target": "theirs", "sync": "full"})
            refused(box, "block-commit", {"job-id": "c", "device": node})

    backup(box, engine, act)
    increment(box)


@both_engines
def test_a_foreign_backup_job_that_begins_during_a_backup_runs_beside_it(make_box: MakeBox, engine: Fleecing) -> None:
    box = one(make_box)

    def act() -> None:
        target(box)
        job: dict[str, object] = {"job-id": "b", "device": "sda-format", "target": "theirs", "sync": "none"}
        box.command("blockdev-backup", job)

    backup(box, engine, act)
    assert [job["id"] for job in box.command("query-jobs")] == ["b"]
    box.command("block-job-cancel", {"device": "b"})
    eventually(lambda: box.command("query-jobs") == [], seconds=10, what="the end of their job")
    increment(box)


@both_engines
def test_a_stream_that_begins_during_a_backup_is_harmless(make_box: MakeBox, engine: Fleecing) -> None:
    """It changes where the data lies, not what the disk holds. It may outlast the backup."""
    box = one(make_box)
    overlay = box.directory / "overlay.qcow2"
    snapshot: dict[str, object] = {"node-name": "sda-format", "snapshot-file": str(overlay)}
    box.command("blockdev-snapshot-sync", {**snapshot, "snapshot-node-name": "overlay"})
    box.backup()
    box.write("sda", 0x14, 0, 512)
    job: dict[str, object] = {"job-id": "s", "device": "overlay", "speed": 1}
    backup(box, engine, lambda: box.command("block-stream", job))
    if box.command("query-jobs"):  # else it was quick
        with pytest.raises(errors.DiskBusy, match="the stream job s"):
            box.backup()
        box.command("block-job-set-speed", {"device": "s", "speed": 0})
    box.write("sda", 0x15, 2 * MiB, 512)
    eventually(lambda: box.command("query-jobs") == [], seconds=10, what="the end of their job")
    box.write("sda", 0x16, 0, 512)
    increment(box)


# -- the machine's life ----------------------------------------------------------------------


@both_engines
def test_a_migration_that_begins_during_a_backup_fails_and_the_backup_goes_on(
    make_box: MakeBox, engine: Fleecing
) -> None:
    box = one(make_box)

    def act() -> None:
        box.command("migrate", {"uri": f"exec:cat > {box.directory / 'state.mig'}"})
        eventually(
            lambda: box.command("query-migrate").get("status") in ("failed", "completed"), seconds=20, what="its end"
        )
        assert box.command("query-migrate")["status"] == "failed"
        assert running(box)

    backup(box, engine, act)
    increment(box)


def test_no_backup_of_a_machine_that_has_moved_away(make_box: MakeBox) -> None:
    box = one(make_box)
    box.command("migrate", {"uri": f"exec:cat > {box.directory / 'state.mig'}"})
    eventually(lambda: box.command("query-migrate").get("status") == "completed", seconds=20, what="migration")
    with pytest.raises(errors.BusyError, match="migrated"):
        box.backup()
    assert box.command("query-status")["status"] == "postmigrate"


@both_engines
def test_the_disk_cannot_be_resized_while_a_backup_runs(make_box: MakeBox, engine: Fleecing) -> None:
    box = one(make_box)

    def act() -> None:
        for node in ("sda-format", root(box)):
            refused(box, "block_resize", {"node-name": node, "size": 2 * SIZE})

    backup(box, engine, act)
    increment(box)


@both_engines
def test_a_disk_that_is_unplugged_during_a_backup_is_read_to_the_end(make_box: MakeBox, engine: Fleecing) -> None:
    box = one(make_box)
    then = box.image()

    def unplug() -> None:
        box.command("device_del", {"id": "sda"})
        eventually(
            lambda: not any(block.get("qdev", "").endswith("sda") for block in box.command("query-block")),
            seconds=10,
            what="the end of the device",
        )

    report = asyncio.run(flow.backup(box.request(fleecing=engine), During(unplug)))
    assert report.broken == ()
    assert box.restored() == then
    assert box.leftovers() == []
    assert running(box)


def test_a_reboot_of_the_guest_changes_nothing(make_box: MakeBox) -> None:
    box = one(make_box)
    backup(box, Fleecing.FILTER, lambda: box.command("system_reset"))
    increment(box)


@both_engines
def test_a_guest_that_powers_off_where_qemu_stays_is_backed_up_all_the_same(
    make_box: MakeBox, engine: Fleecing
) -> None:
    """An idle guest cannot; `-no-reboot` makes the same request of its reset."""
    box = one(make_box, extra=("-no-reboot", "-no-shutdown"))

    def act() -> None:
        box.command("system_reset")
        eventually(lambda: box.command("query-status")["status"] == "shutdown", seconds=10, what="power-off")

    backup(box, engine, act)
    assert box.command("query-status")["status"] == "shutdown"


@pytest.mark.parametrize("command", ["system_reset", "quit"])
def test_a_guest_that_powers_off_with_its_qemu_or_quit_fails_the_backup_and_keeps_the_bitmaps(
    make_box: MakeBox, command: str
) -> None:
    box = one(make_box, extra=("-no-reboot",))

    def act() -> None:
        box.command(command)
        assert box.process is not None
        box.process.wait(20)
        box.process.close()

    with pytest.raises(errors.MachineGone) as caught:
        asyncio.run(flow.backup(box.request(fleecing=Fleecing.FILTER), During(act)))
    assert caught.value.exit_code == 1
    state = box.directory / "state"
    assert [path for folder in ("jobs", "scratch", "run") for path in (state / folder).glob("*")] == []
    box.start()
    increment(box)


def test_who_stops_the_nbd_server_during_a_backup_is_named_in_the_error(make_box: MakeBox) -> None:
    box = one(make_box)
    with pytest.raises(errors.EndpointFailed) as caught:
        backup(box, Fleecing.FILTER, lambda: box.command("nbd-server-stop"))
    assert any("Somebody else ended the export or the NBD server" in note for note in caught.value.__notes__)
    assert box.leftovers() == []
    increment(box)


def test_a_machine_that_is_stopped_and_continued_meanwhile_is_left_as_it_was_left(make_box: MakeBox) -> None:
    box = one(make_box)
    backup(box, Fleecing.FILTER, lambda: box.command("stop"))
    assert box.command("query-status")["status"] == "paused"
    box.command("cont")
    increment(box)


# -- the table -------------------------------------------------------------------------------


def test_every_row_of_the_table_names_a_test_that_is_there() -> None:
    rows = [
        line
        for line in (ROOT / "docs" / "interlocks.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|") and not line.startswith(("| what", "| ---"))
    ]
    assert len(rows) >= 16
    there = {
        (path.name, node.name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    for row in rows:
        named = re.findall(r"\[(test_\w+)\]\(\.\./tests/\w+/(test_\w+\.py)\)", row)
        assert named, f"no test: {row}"
        for test, file in named:
            assert (file, test) in there, f"{file} has no {test}"
