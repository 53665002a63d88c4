"""The snapshot shows the instant, whatever the guest overwrites while it is read.

This is the promise that everything stands on, so it is attacked: thousands of overlapping writes,
zeroes and discards of all sizes, at any sector, hit what was copied, what is being copied and what
will be copied.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kit import CLUSTER, Box, MakeBox
from pullback import errors
from pullback.engine import capabilities, monitor, probe
from pullback.flows import backup as flow
from pullback.model.backups import Fleecing
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.progress import Silent
from pullback.units import KiB, MiB
from storm import KINDS, Storm

SIZE = 8 * MiB + 37 * 512


class Slow(Silent):
    """A destination that takes its time; notes what the storm had done when the first disk was begun."""

    def __init__(self, storm: Storm, seconds: float = 0.01) -> None:
        self._storm = storm
        self._seconds = seconds
        self.begun: int | None = None

    def start(self, subject: str, total: int) -> None:
        """The disks are frozen."""
        if self.begun is None:
            self.begun = self._storm.count
        time.sleep(self._seconds)

    def advance(self, subject: str, done: int) -> None:
        """A block is through."""
        time.sleep(self._seconds)


def fill(box: Box) -> None:
    """Something old everywhere, with holes and zeroes between."""
    for disk in box.disks:
        for index in range(0, SIZE // CLUSTER, 7):
            length = min(6 * CLUSTER, SIZE - index * CLUSTER)
            box.write(disk.id, index % 250 + 1, index * CLUSTER, length)


def two_disks(make_box: MakeBox, bus: qemu.Bus, iothread: str | None) -> Box:
    disks = [qemu.Disk(id=f"sd{letter}", path=Path(f"{letter}.qcow2"), bus=bus, iothread=iothread) for letter in "ab"]
    return make_box(*disks, size=SIZE)


def content(box: Box) -> dict[str, bytes]:
    """The newest point's disks, by the ids of the box."""
    restored = box.restored()
    return dict(zip([disk.id for disk in box.disks], [restored[target] for target in sorted(restored)], strict=True))


def together(restored: dict[str, bytes], engine: Fleecing) -> list[dict[str, bytes]]:
    """What must be of one instant: with the classic engine all disks, else each (see `storm`)."""
    return [restored] if engine is Fleecing.CLASSIC else [{disk: data} for disk, data in restored.items()]


def weather(box: Box, seed: int, engine: Fleecing, kinds: Sequence[str]) -> None:
    """A whole backup and two increments in one storm each."""
    fill(box)
    for step in range(3):
        with Storm(box, seed * 100 + step, kinds) as storm:
            slow = Slow(storm)
            first = storm.count
            report = asyncio.run(flow.backup(box.request(fleecing=engine), slow))
            after = storm.count
        assert report.point.engine == str(engine)
        assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL if step else Mode.FULL}
        assert slow.begun is not None
        assert after - slow.begun > 20, "the storm must blow while the disks are read"
        for shown in together(content(box), engine):
            assert storm.matches(shown, max(0, first - 1), slow.begun) != [], f"{list(shown)}: never so at one instant"
    assert box.leftovers() == []


PLACES = [
    pytest.param(qemu.Bus.VIRTIO, None, KINDS, id="main loop"),
    # HMP's own `write -z` kills QEMU for a disk in an iothread; discards zero there too.
    pytest.param(qemu.Bus.SCSI, "io1", ("write", "write", "discard"), id="iothread"),
]
ENGINES = [Fleecing.FILTER, Fleecing.CLASSIC]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("bus", "iothread", "kinds"), PLACES)
def test_a_changed_block_never_leaks_into_the_snapshot(
    make_box: MakeBox, bus: qemu.Bus, iothread: str | None, kinds: Sequence[str], engine: Fleecing
) -> None:
    weather(two_disks(make_box, bus, iothread), 1, engine, kinds)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("bus", "iothread", "kinds"), PLACES)
def test_a_changed_block_never_leaks_in_many_storms(
    make_box: MakeBox, bus: qemu.Bus, iothread: str | None, kinds: Sequence[str], engine: Fleecing, seed: int
) -> None:
    weather(two_disks(make_box, bus, iothread), seed, engine, kinds)
