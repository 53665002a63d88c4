"""Killed at any use of a repository in restic's format: no point is lost, and what had arrived is not sent again."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest

from hindered import Seen, command, hindered, small_packs
from kit import MakeBox, restic_of
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.repo import Kind
from pullback.units import MiB
from victim import eventually, running

SIZE = 6 * MiB
#: Packs that can be on their way when we are killed: they may arrive, and nobody knows.
UNDER_WAY = 4


class Sweep:
    """One kill after the other on a machine; each chunk is a pack."""

    def __init__(self, make_box: MakeBox) -> None:
        self.box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=SIZE, kind="restic")
        self.points: dict[str, dict[str, bytes]] = {}
        self._values = itertools.count(1)
        self._contents = 0
        self.change()
        self.keep()

    def change(self) -> None:
        """Most of the disk gets a content that it never had: no two chunks are alike."""
        for chunk in range(5):
            value = next(self._values)
            self.box.write("vda", value % 255 + 1, chunk * MiB + 512 * (value % 100), 512 * (1 + value // 255))

    def keep(self) -> Seen:
        """A restore point, and what was done for it in the repository."""
        seen = Seen()
        with hindered(seen), small_packs():
            report = self.box.backup()
        assert report.broken == ()
        self.points[report.point.id] = self.box.image()
        if len(self.points) > 1:
            assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL}
        return seen

    def packs(self) -> set[str]:
        """Those that are there."""
        return {path.name for path in self.box.repository.glob("data/*/*") if len(path.name) == 64}

    def strike(self, moment: str) -> bool:
        """Kill a backup at a moment of `hindered`; False if that never comes."""
        box = self.box
        before = self.packs()
        with command(box, moment) as process:
            said, _ = process.communicate(timeout=60)
        if process.returncode == 0:
            self.points[box.points()[-1].id] = box.image()
            return False
        assert process.returncode == -signal.SIGKILL, said
        eventually(lambda: running(box), seconds=4, what=f"{moment}: running again")
        eventually(lambda: box.leftovers() == [], seconds=10, what=f"{moment}: cleared by the guard {box.leftovers()}")
        self.prove(moment, len(self.packs() - before))
        return True

    def prove(self, moment: str, arrived: int) -> None:
        """Nothing is lost, and the next backup goes on where that one was."""
        box = self.box
        known = set(self.points)
        listed = {point.id for point in box.points()}
        assert known <= listed, moment
        for id in listed - known:  # it was killed after its point had become visible
            self.points[id] = box.image()
        committed = len(listed - known)
        seen = self.keep()
        # At least the trees change with each point: its disk's two, its segment's, the root; and its manifest.
        wanted = 5 + (5 if not committed else 0)
        sent = seen.count("write", Kind.DATA)
        assert sent <= max(wanted - arrived, 2) + UNDER_WAY, (moment, sent, arrived)
        for point in list(self.points)[-3:]:
            assert box.restored(point) == self.points[point], (moment, point)

    def end(self) -> None:
        """All points, by us and by restic."""
        for point, content in self.points.items():
            assert self.box.restored(point) == content
        said = restic_of(self.box).run("check", "--read-data", timeout=120)
        assert "no errors were found" in said
        assert len(restic_of(self.box).run_json("snapshots", timeout=60)) == len(self.points)


@pytest.mark.timeout(180)
def test_killed_before_some_operations_nothing_is_lost_nor_sent_twice(make_box: MakeBox) -> None:
    sweep = Sweep(make_box)
    for moment in ("write-data-1", "write-data-7", "write-snapshots-1", "delete-locks-1"):
        sweep.change()
        assert sweep.strike(moment)
    sweep.end()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_before_every_operation_nothing_is_lost_nor_sent_twice(make_box: MakeBox) -> None:
    sweep = Sweep(make_box)
    for number in itertools.count(1):
        sweep.change()
        if not sweep.strike(str(number)):
            break
    assert number > 20
    sweep.end()
