"""Random histories of a machine: whatever happened before, each restore point is exactly its moment."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import CLUSTER, Box, MakeBox, boxes
from pullback.engine import scratch
from pullback.model.backups import Fleecing, Level
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.units import MiB
from relay import Message, Relay, Way, refusal
from storm import random_operation
from victim import Victim, eventually, running

#: No chain becomes so long that it is begun anew.
_BACKUPS = 50
_LARGEST = 6 * MiB


def differing(left: bytes, right: bytes) -> list[tuple[int, int]]:
    """Sectors that differ, as ranges; and a last one if the lengths do."""
    found: list[tuple[int, int]] = [] if len(left) == len(right) else [(len(left) // 512, len(right) // 512)]
    for sector in range(min(len(left), len(right)) // 512):
        if left[sector * 512 : sector * 512 + 512] != right[sector * 512 : sector * 512 + 512]:
            if found and found[-1][1] == sector:
                found[-1] = (found[-1][0], sector + 1)
            else:
                found.append((sector, sector + 1))
    return found


class History:
    """A machine, what it holds, and what is expected of its next backup."""

    def __init__(self, box: Box, seed: int) -> None:
        self._box = box
        self._rng = random.Random(seed)
        #: Disks whose chain was lost, by what happened: they must be read whole, and said so.
        self._lost: set[str] = set()
        self._tracked: set[str] = set()
        self._points: dict[str, dict[str, bytes]] = {}
        self.log: list[str] = []
        self._steps: list[tuple[int, Callable[[], None]]] = [
            (10, self.write),
            (6, self.backup),
            (1, self.backup_full),
            (2, self.backup_some),
            (2, self.killed),
            (1, self.killed_with_guard),
            (2, self.refused),
            (1, self.restart),
            (1, self.kill_and_restart),
            (1, self.untrack),
            (1, self.grow),
            (1, self.shrink_and_grow_back),
            (1, self.old_point),
        ]

    def step(self) -> None:
        """One thing happens."""
        weights, steps = zip(*self._steps, strict=True)
        [chosen] = self._rng.choices(steps, weights)
        self.log.append(chosen.__name__)
        chosen()

    @property
    def worn_out(self) -> bool:
        """Time for another machine."""
        return len(self._points) >= _BACKUPS

    def _disk(self) -> str:
        return self._rng.choice(self._box.disks).id

    def _change(self, disk: str) -> None:
        operation = random_operation(self._rng, disk, len(self._box.model[disk]))
        self._box._io(disk, operation.command())
        operation.apply(self._box.model[disk])

    # -- what may happen -----------------------------------------------------------------------

    def write(self) -> None:
        """Some writes, zeroes and discards."""
        for _ in range(self._rng.randrange(1, 8)):
            self._change(self._disk())

    def backup(self) -> None:
        """The usual."""
        self._backup()

    def backup_full(self) -> None:
        """Everything."""
        self._backup(level=Level.FULL)

    def backup_some(self) -> None:
        """One disk only, or all but one."""
        name = "only" if self._rng.random() < 0.5 else "exclude"
        self._backup(**{name: (self._disk(),)})

    def _backup(self, **changes: object) -> None:
        engine = self._rng.choice([None, Fleecing.FILTER, Fleecing.CLASSIC])
        report = self._box.backup(fleecing=engine, **changes)
        full = changes.get("level") is Level.FULL
        for disk in report.point.disks:
            whole = full or disk.target in self._lost or disk.target not in self._tracked
            assert disk.mode is (Mode.FULL if whole else Mode.INCREMENTAL), (disk.target, disk.reason)
        targets = {disk.target for disk in report.point.disks}
        if not full:
            assert set(report.broken) == self._lost & targets
        self._lost -= targets
        self._tracked |= targets
        content = {target: data for target, data in self._box.image().items() if target in targets}
        self._points[report.point.id] = content
        restored = self._box.restored(report.point.id)
        wrong = {target: differing(restored[target], data) for target, data in content.items()}
        assert not any(wrong.values()), f"{report.point}: {wrong}"
        assert self._box.leftovers() == []
        assert running(self._box)

    def old_point(self) -> None:
        """An older point is still what it was."""
        if self._points:
            point = self._rng.choice(list(self._points))
            assert self._box.restored(point) == self._points[point]

    def killed(self) -> None:
        """A backup that is killed at some command; its guard clears."""
        self._killed(guard_too=False)

    def killed_with_guard(self) -> None:
        """The same, guard and all."""
        self._killed(guard_too=True)

    def _killed(self, *, guard_too: bool) -> None:
        victim = Victim(self._box)
        number = self._rng.randrange(1, 150)
        victim.at(self._rng.choice(list(Way)), number, victim.kill_all if guard_too else victim.kill)
        with victim.relay, victim.started():
            self._ended(victim)
            self._change(self._disk())
            if not guard_too:
                eventually(lambda: running(self._box), seconds=3, what="running again")
                eventually(lambda: victim.jobs() == [], seconds=10, what="cleared by the guard")
        if guard_too:
            # By the same socket: the record names the process behind it, which is the relay's.
            with Relay(victim.relay.path, self._box.qmp) as relay:
                assert self._box.cli("info", f"qmp:{relay.path}").returncode == 0
            assert running(self._box)

    def refused(self) -> None:
        """A backup of which some command is refused."""
        number = self._rng.randrange(1, 150)

        def refuse(way: Way, at: int, message: Message) -> Message | None:
            return refusal(message) if way is Way.COMMAND and at == number else None

        victim = Victim(self._box, before=refuse)
        with victim.relay, victim.started():
            code, said = self._ended(victim)
            assert code in (0, 1, 3, 11), said

    def _ended(self, victim: Victim) -> tuple[int, str]:
        """It may have been through before anything happened: then there is a point, of now."""
        before = self._box.image()
        known = set(self._names())
        code, said = victim.ended(60)
        new = set(self._names()) - known
        for point in new:
            self._points[point] = before
            self._tracked |= set(before)
            self._lost -= set(before)
        return code, said

    def _names(self) -> list[str]:
        found = self._box.repository.glob("*/*/manifest.json") if self._box.repository.exists() else []
        return [path.parent.name for path in found if not path.parent.name.startswith(".")]

    def restart(self) -> None:
        """A clean end."""
        self._box.quit()
        self._box.start()

    def kill_and_restart(self) -> None:
        """SIGKILL of QEMU: all chains are lost."""
        for disk in self._box.disks:
            qemu.hmp(self._box.hmp, f'qemu-io {disk.node_name} "flush"')
        self._box.kill()
        self._box.start()
        self._lost |= self._tracked

    def untrack(self) -> None:
        """All bitmaps go."""
        done = self._box.cli("untrack", f"qmp:{self._box.qmp}")
        assert done.returncode == 0, done.stderr
        self._lost |= self._tracked

    def grow(self) -> None:
        """A disk grows."""
        disk = self._disk()
        model = self._box.model[disk]
        size = len(model) + self._rng.randrange(1, 1024) * 512
        if size <= _LARGEST:
            self._resize(disk, size)
            model.extend(bytes(size - len(model)))
            if disk in self._tracked:
                self._lost.add(disk)

    def shrink_and_grow_back(self) -> None:
        """Its end becomes zeroes, and no bitmap says so. (Within a cluster qcow2 would bring the old data back.)"""
        disk = self._disk()
        model = self._box.model[disk]
        size = self._rng.randrange(1, len(model) // CLUSTER) * CLUSTER
        self._resize(disk, size)
        self._resize(disk, len(model))
        model[size:] = bytes(len(model) - size)

    def _resize(self, disk: str, size: int) -> None:
        # QEMU resizes no disk under a filter of ours that a killed run has left: any run clears it.
        assert self._box.cli("info", f"qmp:{self._box.qmp}").returncode == 0
        node = next(known for known in self._box.disks if known.id == disk).node_name
        self._box.command("block_resize", {"node-name": node, "size": size})


def live(make_box: MakeBox, seed: int, steps: int, deadline: float) -> int:
    """One machine's life; gives the steps it had."""
    disks = [qemu.Disk(id=f"vd{letter}", path=Path(f"{letter}.qcow2")) for letter in "ab"]
    history = History(make_box(*disks, size=2 * MiB + 5 * 512), seed)
    for count in range(steps):
        if history.worn_out or time.monotonic() > deadline:
            return count
        try:
            history.step()
        except BaseException as error:
            error.add_note(f"seed {seed}, history: {' '.join(history.log)}")
            raise
    return steps


@pytest.mark.parametrize("engine", list(Fleecing))
def test_a_block_that_became_zero_half_noticed_and_half_not_is_zero_in_the_point(
    make_box: MakeBox, engine: Fleecing
) -> None:
    """Found by a random history: written zeroes (in the bitmap) beside what a shrink took away (in no bitmap)."""
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=4 * MiB)
    box.write("vda", 0x11, 0, 4 * MiB)
    box.backup(fleecing=engine)
    box.zero("vda", MiB, 3 * CLUSTER)
    for size in (MiB + 4 * CLUSTER, 4 * MiB):
        box.command("block_resize", {"node-name": "vda-format", "size": size})
    box.zero("vda", MiB + 3 * CLUSTER, CLUSTER)
    box.model["vda"][MiB:] = bytes(3 * MiB)
    report = box.backup(fleecing=engine)
    assert report.point.disk("vda").mode is Mode.INCREMENTAL
    assert box.restored() == box.image()
    assert box.verify(all=True).damaged == ()


@pytest.mark.parametrize("seed", [pytest.param(1), pytest.param(2, marks=pytest.mark.slow)])
def test_every_point_of_a_random_history_is_exact(make_box: MakeBox, seed: int) -> None:
    live(make_box, seed, 24, time.monotonic() + 100)


@pytest.mark.slow
@pytest.mark.timeout(24 * 3600)
def test_every_point_of_many_random_histories_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_MINIMUM_FREE", 16 * MiB)
    deadline = time.monotonic() + float(os.environ.get("PULLBACK_FUZZ_SECONDS", "120"))
    seed, steps = random.SystemRandom().randrange(10**6), 0
    while time.monotonic() < deadline:
        with tempfile.TemporaryDirectory(prefix="pb-") as directory, boxes(Path(directory)) as make:
            steps += live(make, seed, 200, deadline)
        seed += 1
    print(f"{steps} steps")
