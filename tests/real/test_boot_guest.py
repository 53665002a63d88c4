"""Instant restore of a real guest: it comes up from its restore point, goes on with its work, and loses nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from booted import Place, booting
from kit import Box, make_repository
from pullback.engine import guestagent, scratch
from pullback.guest import build, disks, run
from pullback.guest.console import Console
from pullback.programs import process, qemu
from pullback.units import MiB, TiB

pytestmark = [pytest.mark.guest, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def small() -> build.SmallGuest:
    """The small guest."""
    return build.guest(Path(os.environ.get("PULLBACK_GUEST_CACHE", build.CACHE)))


@pytest.fixture
def stored(
    request: pytest.FixtureRequest, short_dir: Path, small: build.SmallGuest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Place, qemu.Disk, int]]:
    """A guest that was backed up while it wrote, and lost its power then: the last record that it knew before."""
    kind, size = getattr(request, "param", ("dir", 0))
    monkeypatch.setattr(scratch, "needed", lambda disks: MiB)
    disk = qemu.Disk(id="vda", path=short_dir / "vda.qcow2")
    disks.make(disk.path, 128 * MiB, filler=24 * MiB)
    if size:
        process.run(["qemu-img", "resize", "-q", disk.path, str(size)], timeout=20)
    box = Box(short_dir, [disk], kind=kind)
    if kind == "restic":
        make_repository(box.repository, short_dir / "cache" / "repositories")
    with run.boot(small, run.Writer(noise=2), disks=[disk], directory=short_dir, name=box.name) as guest:
        guest.wait_for_record(10)
        last = guest.last_record()
        (short_dir / "qmp.sock").symlink_to(guest.qmp[0])
        box.backup()
        guest.kill()
    with booting(box) as place:
        yield place, disk, last


async def _agent(socket: Path) -> None:
    """Wait until the guest's agent answers."""
    deadline = time.monotonic() + 120
    while True:
        try:
            async with guestagent.connect(socket):
                return
        except guestagent.AgentFailed:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "stored", [("dir", 0), pytest.param(("restic", 8 * TiB), marks=pytest.mark.slow)], indirect=True
)
def test_a_guest_comes_up_and_goes_on_while_its_disk_is_filled(
    stored: tuple[Place, qemu.Disk, int], small: build.SmallGuest
) -> None:
    place, disk, last = stored
    words = run.cmdline(run.Writer(noise=2), [disk])
    command = place.boot("--kernel", small.kernel, "--initrd", small.initrd, "--append", words, halt=False)
    facts = command.started()
    pid = place.runs(facts)
    asyncio.run(_agent(Path(facts["agent"])))
    console = Console(Path(facts["console"]), lambda: True)
    assert not console.matches("^PB-IOERROR")
    report = command.done()
    assert (report["filled"], report["runs"], report["pid"]) == (True, True, pid)
    known = max(int(match[1]) for match in console.matches(r"^PB-RECORD (\d+)$")) if console.matches("^PB-REC") else 0
    console.wait_until(r"^PB-RECORD (\d+)$", lambda match: int(match[1]) >= known + 10, 60)
    durable = max(int(match[1]) for match in console.matches(r"^PB-RECORD (\d+)$"))
    place.off(facts)
    verdict = disks.check(place.to / "vda.qcow2", format="qcow2")
    assert verdict.problem is None
    assert verdict.last_record >= durable > last
    place.check("vda")
