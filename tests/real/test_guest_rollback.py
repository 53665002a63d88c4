"""A real guest is rolled back: it boots again and finds its disk as it was, and nothing of its memory survives."""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path

import pytest

from pullback import state
from pullback.flows import backup as backup_flow
from pullback.flows import restore as restore_flow
from pullback.flows import rollback as rollback_flow
from pullback.guest import build, disks, run
from pullback.model import urls
from pullback.programs import qemu
from pullback.units import MiB

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def small() -> build.SmallGuest:
    """The small guest."""
    return build.guest(Path(os.environ.get("PULLBACK_GUEST_CACHE", build.CACHE)))


def said_since(guest: run.Guest, mark: int, pattern: str, seconds: float = 90) -> re.Match[str]:
    """What the guest says on its console after that many characters."""
    assert guest.machine.serial is not None
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        said = guest.machine.serial.read_text(errors="replace")[mark:]
        if found := re.search(pattern, said, re.MULTILINE):
            return found
        assert guest.qemu.returncode is None, guest.qemu.message()
        time.sleep(0.1)
    raise AssertionError(f"the guest does not say {pattern}: {said[-500:]}")


@pytest.mark.parametrize(
    ("bus", "iothread"),
    [
        pytest.param(qemu.Bus.VIRTIO, "io1", marks=pytest.mark.slow),
        (qemu.Bus.SCSI, "io1"),
        pytest.param(qemu.Bus.NVME, None, marks=pytest.mark.slow),
    ],
)
def test_a_guest_boots_again_with_the_content_of_then(
    small: build.SmallGuest, short_dir: Path, bus: qemu.Bus, iothread: str | None
) -> None:
    disks.make(short_dir / "disk.qcow2", 128 * MiB, filler=8 * MiB)
    disk = qemu.Disk(id="disk0", path=short_dir / "disk.qcow2", bus=bus, iothread=iothread)
    repository = urls.DirectoryRepository(path=short_dir / "repo")
    directories = state.directories(short_dir / "state")

    with run.boot(small, run.Writer(), disks=[disk], directory=short_dir) as guest:
        machine = urls.QmpMachine(socket=guest.qmp[0])

        def back_up() -> backup_flow.Report:
            request = backup_flow.Request(machine=machine, repository=repository, directories=directories)
            return asyncio.run(backup_flow.backup(request))

        guest.wait_for_record(20)
        before = guest.last_record()
        point = back_up().point
        behind = guest.last_record()
        guest.wait_for_record(behind + 100)
        assert guest.machine.serial is not None
        mark = len(guest.machine.serial.read_text(errors="replace"))

        request = rollback_flow.Request(machine=machine, repository=repository, point=point.id, directories=directories)
        report = asyncio.run(rollback_flow.rollback(request))

        assert all(one.by_bitmaps for one in report.disks)
        found = int(said_since(guest, mark, r"^PB-CHECK ok last=(\d+)")[1])
        assert before <= found <= behind + 1
        said_since(guest, mark, rf"^PB-RECORD {found + 20}$")
        assert guest.io_errors() == []
        again = back_up()
        assert again.broken == ()
        assert report.safety is not None
        for one, lowest in ((again.point.id, found + 20), (point.id, before), (report.safety.id, behind + 100)):
            to = restore_flow.Request(repository=repository, point=one, to=short_dir / f"out-{one}")
            [restored] = asyncio.run(restore_flow.restore(to)).disks
            verdict = disks.check(restored.path)
            assert verdict.problem is None
            assert verdict.last_record >= lowest
