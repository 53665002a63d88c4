"""Backups of a real guest that writes: one instant over all disks, and no harm to the guest."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pullback import state
from pullback.flows import backup as backup_flow
from pullback.flows import restore as restore_flow
from pullback.guest import build, disks, run, turns
from pullback.model import urls
from pullback.model.backups import Fleecing, Quiesce, Quiescing
from pullback.programs import qemu, qemu_img
from pullback.units import MiB

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def small() -> build.SmallGuest:
    """The small guest."""
    return build.guest(Path(os.environ.get("PULLBACK_GUEST_CACHE", build.CACHE)))


def two_disks(place: Path, bus: qemu.Bus, iothread: str | None) -> list[qemu.Disk]:
    pair = [qemu.Disk(id=id, path=place / f"{id}.qcow2", bus=bus, iothread=iothread) for id in ("first", "second")]
    for disk in pair:
        qemu_img.create(disk.path, 64 * MiB)
    return pair


def back_up(guest: run.Guest, place: Path, **changes: object) -> backup_flow.Report:
    request = backup_flow.Request(
        machine=urls.QmpMachine(socket=guest.qmp[0]),
        repository=urls.DirectoryRepository(path=place / "repo"),
        directories=state.directories(place / "state"),
        **changes,  # type: ignore[arg-type]
    )
    return asyncio.run(backup_flow.backup(request))


def restored(place: Path, point: str = "latest") -> list[Path]:
    to = place / f"out-{time.monotonic_ns()}"
    request = restore_flow.Request(repository=urls.DirectoryRepository(path=place / "repo"), to=to, point=point)
    return [disk.path for disk in asyncio.run(restore_flow.restore(request)).disks]


@contextmanager
def taking_turns(
    small: build.SmallGuest, place: Path, bus: qemu.Bus = qemu.Bus.VIRTIO, iothread: str | None = None
) -> Iterator[run.Guest]:
    pair = two_disks(place, bus, iothread)
    with run.boot(small, run.Turns(a="first", b="second"), disks=pair, directory=place) as guest:
        guest.wait_ready()
        guest.console.wait_for_line("PB-TURN", timeout=30)
        yield guest


@pytest.mark.parametrize(
    ("bus", "iothread", "engine"),
    [
        (qemu.Bus.VIRTIO, None, Fleecing.FILTER),
        (qemu.Bus.VIRTIO, None, Fleecing.CLASSIC),
        (qemu.Bus.VIRTIO, "io1", Fleecing.FILTER),
        (qemu.Bus.SCSI, "io1", Fleecing.CLASSIC),
    ],
)
def test_two_disks_are_frozen_at_one_instant(
    small: build.SmallGuest, short_dir: Path, bus: qemu.Bus, iothread: str | None, engine: Fleecing
) -> None:
    """The guest writes each number to the first disk, then to the second: never may the second be ahead."""
    with taking_turns(small, short_dir, bus, iothread) as guest:
        cuts = []
        for _ in range(2):
            back_up(guest, short_dir, fleecing=engine)
            cuts.append([turns.read(path) for path in restored(short_dir)])
        assert guest.io_errors() == []
    for first, second in cuts:
        assert first.problems == ()
        assert second.problems == ()
        assert second.newest in (first.newest, first.newest - 1)
    assert cuts[0][0].newest < cuts[1][0].newest, "the guest wrote between the cuts"


def test_disks_frozen_one_by_one_are_not_one_instant(small: build.SmallGuest, short_dir: Path) -> None:
    """A check of the test above: it would notice."""
    with taking_turns(small, short_dir) as guest:
        back_up(guest, short_dir, only=("vda",))
        [first] = [turns.read(path) for path in restored(short_dir)]
        back_up(guest, short_dir, only=("vdb",))
        [second] = [turns.read(path) for path in restored(short_dir)]
    assert second.newest not in (first.newest, first.newest - 1)


@pytest.mark.parametrize(
    ("bus", "iothread"),
    [(qemu.Bus.VIRTIO, "io1"), pytest.param(qemu.Bus.VIRTIO, None, marks=pytest.mark.slow)],
)
def test_a_guest_under_write_load_sees_no_error_and_short_pauses(
    small: build.SmallGuest, short_dir: Path, bus: qemu.Bus, iothread: str | None
) -> None:
    disk = qemu.Disk(id="disk0", path=short_dir / "disk.qcow2", bus=bus, iothread=iothread)
    qemu_img.create(disk.path, 128 * MiB)
    with run.boot(small, run.Load(disk="disk0"), disks=[disk], directory=short_dir) as guest:
        guest.wait_ready()
        reports = [back_up(guest, short_dir) for _ in range(4)]
        time.sleep(0.5)
        assert guest.io_errors() == []
        assert guest.qemu.returncode is None
    pauses = [report.pause for report in reports]
    print(f"pauses under load: {[round(pause * 1000, 1) for pause in pauses]} ms")
    assert statistics.median(pauses) < 1.0
    assert all(report.broken == () for report in reports)


def test_what_the_guest_believed_durable_is_in_the_restored_disk(small: build.SmallGuest, short_dir: Path) -> None:
    disks.make(short_dir / "disk.qcow2", 256 * MiB, filler=8 * MiB)
    disk = qemu.Disk(id="disk0", path=short_dir / "disk.qcow2")
    with run.boot(small, run.Writer(), disks=[disk], directory=short_dir) as guest:
        guest.wait_for_record(20)
        bounds = []
        for wish in (Quiesce.NO, Quiesce.REQUIRE):
            durable = guest.last_record()
            report = back_up(guest, short_dir, quiescing=Quiescing(wish=wish))
            assert report.frozen == (wish is Quiesce.REQUIRE)
            bounds.append((report.point.id, durable))
            guest.wait_for_record(guest.last_record() + 20)  # it was thawed
    for point, durable in bounds:
        [path] = restored(short_dir, point)
        verdict = disks.check(path)
        assert verdict.problem is None
        assert verdict.last_record >= durable
