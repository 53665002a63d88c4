"""QEMU dies, or drops us, in the middle of a backup."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import Box, MakeBox
from pullback import errors
from pullback.engine import monitor
from pullback.flows import backup as flow
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.progress import Silent
from pullback.units import MiB
from victim import Victim, eventually, running

PLACES = [(qemu.Bus.VIRTIO, None), (qemu.Bus.SCSI, "io1")]


class During(Silent):
    """Does something when the copy of the first disk begins."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act: Callable[[], None] | None = act

    def start(self, subject: str, total: int) -> None:
        """The disks are frozen."""
        act, self._act = self._act, None
        if act is not None:
            act()


def two_disks(make_box: MakeBox, bus: qemu.Bus = qemu.Bus.VIRTIO, iothread: str | None = None) -> Box:
    """A machine with a restore point, restarted since, and a change."""
    disks = [qemu.Disk(id=f"sd{letter}", path=Path(f"{letter}.qcow2"), bus=bus, iothread=iothread) for letter in "ab"]
    box = make_box(*disks)
    box.write("sda", 0x11, 0, 8 * MiB)
    box.write("sdb", 0x11, 0, 8 * MiB)
    box.backup()
    box.quit()
    box.start()
    box.write("sda", 0x12, 1 * MiB, 4 * MiB)
    box.write("sdb", 0x12, 1 * MiB, 4 * MiB)
    return box


def prove(box: Box, mode: Mode) -> None:
    """The next backup is right, and whole where the death of QEMU made the bitmaps worthless."""
    report = box.backup()
    assert {disk.mode for disk in report.point.disks} == {mode}
    restored = box.restored()
    assert [restored[target] for target in sorted(restored)] == list(box.image().values())
    assert box.leftovers() == []
    assert running(box)


def points(box: Box) -> list[str]:
    """Restore points, and what pretends to be one."""
    return sorted(path.name for path in box.repository.glob("*/*") if path.is_dir())


def flushed(box: Box) -> None:
    """What was written is in the images, so that the model still holds after a kill."""
    for disk in box.disks:
        qemu.hmp(box.hmp, f'qemu-io {disk.node_name} "flush"')


@pytest.mark.parametrize(("bus", "iothread"), PLACES)
def test_qemu_killed_during_the_copy_is_said_and_leaves_no_files(
    make_box: MakeBox, bus: qemu.Bus, iothread: str | None
) -> None:
    box = two_disks(make_box, bus, iothread)
    flushed(box)
    before = points(box)
    with pytest.raises(errors.MachineGone) as caught:
        asyncio.run(flow.backup(box.request(), During(box.kill)))
    assert caught.value.exit_code == 1
    assert points(box) == before
    state = box.directory / "state"
    left = [path for folder in ("jobs", "scratch", "run") for path in (state / folder).glob("*")]
    assert left == []
    with pytest.raises(errors.UnreachableError):
        box.backup()
    box.start()
    prove(box, Mode.FULL)
    prove(box, Mode.INCREMENTAL)


def test_qemu_and_pullback_killed_together_leave_files_that_the_next_run_removes(make_box: MakeBox) -> None:
    box = two_disks(make_box)
    flushed(box)

    def strike() -> None:
        victim.kill_all()
        assert box.process is not None
        os.kill(box.process.pid, signal.SIGKILL)

    victim = Victim(box)
    victim.at_command("block-export-add", strike)
    with victim.relay, victim.started():
        victim.ended()
    box.kill()
    assert len(victim.jobs()) == 1
    box.start()
    prove(box, Mode.FULL)
    prove(box, Mode.INCREMENTAL)


def test_the_record_of_a_pause_never_continues_another_qemu(make_box: MakeBox) -> None:
    """Killed in the pause with its guard; QEMU ends too, and is started again, standing still by its user's will."""
    box = two_disks(make_box)
    flushed(box)
    victim = Victim(box)
    victim.at_command("transaction", victim.kill_all)
    with victim.relay, victim.started():
        victim.ended()
    [record] = victim.jobs()
    content = json.loads(record.read_bytes())
    assert content["paused_by_us"] is True
    assert box.process is not None
    content["qemu"] = monitor.process_token(box.process.pid)  # the relay's process stood there
    content["socket"] = str(box.qmp)
    record.write_text(json.dumps(content))
    box.kill()
    box.start(paused=True)
    assert box.command("query-status")["status"] == "prelaunch"
    box.command("cont")
    box.command("stop")
    box.backup()
    assert box.command("query-status")["status"] == "paused"
    box.command("cont")
    prove(box, Mode.INCREMENTAL)


def test_the_guard_survives_the_end_of_its_qemu(make_box: MakeBox) -> None:
    box = two_disks(make_box)
    flushed(box)

    def strike() -> None:
        victim.relay.shut()
        box.kill()

    victim = Victim(box)
    victim.at_command("transaction", strike)
    with victim.relay, victim.started():
        code, said = victim.ended(60)
    assert code == 1
    assert "No answer to transaction" in said
    box.start()
    prove(box, Mode.FULL)


@pytest.mark.parametrize(("bus", "iothread"), PLACES)
def test_an_export_that_is_taken_away_fails_the_backup_clearly_and_loses_nothing(
    make_box: MakeBox, bus: qemu.Bus, iothread: str | None
) -> None:
    box = two_disks(make_box, bus, iothread)

    def act() -> None:
        for export in box.command("query-block-exports"):
            box.command("block-export-del", {"id": export["id"], "mode": "hard"})
        eventually(lambda: box.command("query-block-exports") == [], seconds=10, what="the end of the exports")

    with pytest.raises(errors.EndpointFailed) as caught:
        asyncio.run(flow.backup(box.request(), During(act)))
    [note] = caught.value.__notes__
    assert note.startswith("Somebody else ended the export")
    assert len(box.checkpoints("sda")) == 1
    assert box.leftovers() == []
    prove(box, Mode.INCREMENTAL)


def test_a_monitor_that_is_lost_in_the_middle_is_told_apart_from_a_refusal(make_box: MakeBox) -> None:
    box = two_disks(make_box)
    victim = Victim(box)
    victim.at_command("block-export-add", lambda: victim.relay.drop())
    with victim.relay, victim.started():
        code, said = victim.ended(60)
        assert code == 1
        assert "No answer to" in said
        assert "it first finds and removes what is left" in said
    prove(box, Mode.INCREMENTAL)
