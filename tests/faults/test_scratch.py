"""Scratch full, filling, hanging or unsuitable: the backup dies of it, never the guest's write."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import mounts
from kit import Box, MakeBox
from pullback import errors
from pullback.engine import scratch
from pullback.flows import backup as flow
from pullback.model.backups import Fleecing
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.progress import Silent
from pullback.units import MiB
from victim import running

ROOM = 40 * MiB


class When(Silent):
    """Does something when the copy of the first disk begins."""

    def __init__(self, strike: Callable[[], None]) -> None:
        self._strike: Callable[[], None] | None = strike

    def start(self, subject: str, total: int) -> None:
        """The disks are frozen."""
        strike, self._strike = self._strike, None
        if strike is not None:
            strike()


def attempt(box: Box, place: Path, strike: Callable[[], None], **changes: object) -> None:
    """A backup with scratch at `place`, in which `strike` happens."""
    asyncio.run(flow.backup(box.request(scratch=place, **changes), When(strike)))


def unhurt(box: Box) -> None:
    """The guest saw no error."""
    assert box.process is not None
    # qemu-io's own words; QEMU's NBD server complains too, of clients that left.
    assert not any(line.startswith("write failed") for line in box.process.message().splitlines())
    assert running(box)
    for record in box.command("query-block"):
        assert record.get("io-status", "ok") == "ok"


def prove(box: Box) -> None:
    """Nothing is left, and the next backup is an increment without a gap."""
    assert box.leftovers() == []
    report = box.backup()
    assert report.broken == ()
    assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL}
    restored = box.restored()
    assert [restored[target] for target in sorted(restored)] == list(box.image().values())
    unhurt(box)


def filled(make_box: MakeBox, bus: qemu.Bus = qemu.Bus.VIRTIO, iothread: str | None = None) -> Box:
    """A machine with a restore point and changes since."""
    disks = [qemu.Disk(id=f"sd{letter}", path=Path(f"{letter}.qcow2"), bus=bus, iothread=iothread) for letter in "ab"]
    box = make_box(*disks)
    box.write("sda", 0x11, 0, 8 * MiB)
    box.backup()
    box.write("sda", 0x12, 0, 6 * MiB)
    return box


@pytest.mark.parametrize(("bus", "iothread"), [(qemu.Bus.VIRTIO, None), (qemu.Bus.SCSI, "io1")])
def test_scratch_that_runs_full_breaks_the_snapshot_and_not_the_guest(
    make_box: MakeBox,
    mount: mounts.Mount,
    monkeypatch: pytest.MonkeyPatch,
    bus: qemu.Bus,
    iothread: str | None,
) -> None:
    monkeypatch.setattr(scratch, "_WATCH_SECONDS", 3600)  # else it ends the backup before
    box = filled(make_box, bus, iothread)
    place = mount.tmpfs(ROOM)

    def strike() -> None:
        mounts.fill(place)
        box.write("sda", 0x13, 0, 8 * MiB)
        box.write("sdb", 0x13, 0, 8 * MiB)
        unhurt(box)
        mounts.empty(place)

    with pytest.raises(errors.SnapshotBroken) as caught:
        attempt(box, place, strike, fleecing=Fleecing.FILTER)
    assert caught.value.hint
    assert not hasattr(caught.value, "__notes__")
    unhurt(box)
    prove(box)


class Measured(When):
    """Measures scratch after the strike, and when the disk is through."""

    def __init__(self, strike: Callable[[], None], place: Path) -> None:
        super().__init__(strike)
        self._place = place
        self.occupied: list[int] = []

    def start(self, subject: str, total: int) -> None:
        """The disks are frozen."""
        super().start(subject, total)
        self._measure()

    def finish(self, subject: str) -> None:
        """All is read."""
        self._measure()

    def _measure(self) -> None:
        self.occupied.append(sum(path.stat().st_blocks * 512 for path in self._place.iterdir()))


def test_what_is_read_or_need_not_be_read_is_let_go_of_in_scratch(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="sda", path=Path("a.qcow2"), bus=qemu.Bus.SCSI))
    box.write("sda", 0x11, 0, 8 * MiB)
    box.backup()
    box.write("sda", 0x12, 0, MiB)
    at = box.image()
    measured = Measured(lambda: box.write("sda", 0x13, 0, 8 * MiB), box.scratch)
    asyncio.run(flow.backup(box.request(fleecing=Fleecing.FILTER), measured))
    before, after = measured.occupied
    assert before >= 8 * MiB
    assert after <= MiB
    assert box.restored() == at


def test_a_file_system_that_fills_up_meanwhile_ends_the_backup(make_box: MakeBox, mount: mounts.Mount) -> None:
    box = filled(make_box)
    place = mount.tmpfs(ROOM)

    def strike() -> None:
        mounts.fill(place, leave=8 * MiB)
        time.sleep(1.5)

    with pytest.raises(errors.ScratchSpace) as caught:
        attempt(box, place, strike)
    assert not hasattr(caught.value, "__notes__")
    prove(box)


def test_a_file_system_without_room_is_refused_before_anything_is_done(make_box: MakeBox, mount: mounts.Mount) -> None:
    box = filled(make_box)
    place = mount.tmpfs(8 * MiB)
    marks = box.checkpoints("sda")
    with pytest.raises(errors.ScratchSpace):
        attempt(box, place, pytest.fail)
    assert box.checkpoints("sda") == marks
    prove(box)


def test_the_command_line_wants_a_gibibyte_and_says_how_to_go_on(make_box: MakeBox, mount: mounts.Mount) -> None:
    box = filled(make_box)
    place = mount.tmpfs(ROOM)
    done = box.cli("backup", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}", "--scratch", place)
    assert done.returncode == 1
    assert "1.00 GiB" in done.stderr
    assert "--scratch" in done.stderr
    prove(box)


def test_a_file_system_that_is_not_local_is_refused(make_box: MakeBox, mount: mounts.Mount) -> None:
    box = filled(make_box)
    with mount.fuse() as place:
        assert scratch.file_system(place).startswith("fuse")
        with pytest.raises(errors.ScratchUnsuitable, match="not a local one"):
            attempt(box, place, pytest.fail)
    prove(box)


def test_a_scratch_that_hangs_holds_a_write_for_the_timeout_only_and_cleaning_up_waits_for_it(
    make_box: MakeBox, mount: mounts.Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "COPY_TIMEOUT", 1)
    monkeypatch.setattr(scratch, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(scratch, "_ASK_SECONDS", 1.0)
    box = filled(make_box)
    place = mount.ext4(64 * MiB)
    waits: list[float] = []

    def write() -> None:
        begun = time.monotonic()
        box.write("sda", 0x20 + len(waits), 0, 1 * MiB)
        waits.append(time.monotonic() - begun)

    with mounts.thawed_at_the_end(place):

        def strike() -> None:
            mounts.freeze(place)
            write()
            write()

        begun = time.monotonic()
        with pytest.raises((errors.SnapshotBroken, errors.ScratchUnsuitable)) as caught:
            attempt(box, place, strike)
        assert time.monotonic() - begun < 15
        print(f"the guest's writes took {waits[0]:.2f} s and {waits[1]:.2f} s")
        assert 0.5 < waits[0] < 3
        assert waits[1] < 0.5, "once the snapshot is broken no write waits"
        assert any("does not answer" in note for note in caught.value.__notes__)
        assert running(box)
        write()
        with pytest.raises(errors.CleanupIncomplete):
            box.backup()
        write()
        unhurt(box)
    assert box.backup().broken == ()
    prove(box)


def test_a_scratch_that_hangs_already_is_refused(
    make_box: MakeBox, mount: mounts.Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "ANSWER_SECONDS", 0.5)
    box = filled(make_box)
    place = mount.ext4(64 * MiB)
    with mounts.thawed_at_the_end(place):
        mounts.freeze(place)
        with pytest.raises(errors.ScratchUnsuitable, match="does not answer"):
            attempt(box, place, pytest.fail)
    prove(box)
