"""Killed at every step: the machine runs on, and the next run is complete, as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kit import Box, MakeBox
from pullback.model import urls
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.units import KiB, MiB
from relay import Relay, Way
from victim import Victim, eventually, running

SIZE = 2 * MiB
#: Restore points of one machine stay below the length at which a chain is begun anew.
_PER_BOX = 24
_QUERIES = ("query-", "qom-get", "x-debug-")


def small(make_box: MakeBox) -> Box:
    """One small disk with one restore point."""
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=SIZE)
    box.write("vda", 0x11, 0, MiB)
    box.backup()
    return box


def script(box: Box) -> list[str]:
    """The commands of an increment that is left alone."""
    box.write("vda", 0x12, 64 * KiB, 64 * KiB)
    with Relay(box.directory / "relay.sock", box.qmp) as relay:
        done = box.cli("backup", f"qmp:{relay.path}", "-r", f"dir:{box.repository}")
        assert done.returncode == 0, done.stderr
    return relay.commands


def changing(commands: list[str]) -> list[int]:
    """Numbers of the commands that change something, and of the first."""
    found = [n for n, name in enumerate(commands, 1) if not name.startswith(_QUERIES)]
    return [1, *found]


class Sweep:
    """One kill after the other, on a few machines."""

    def __init__(self, make_box: MakeBox) -> None:
        self._make_box = make_box
        self._box: Box | None = None
        self._done = 0
        self._value = 0

    def box(self) -> Box:
        """The machine to go on with."""
        if self._box is None or self._done % _PER_BOX == 0:
            if self._box is not None:
                self._box.quit()
            self._box = small(self._make_box)
        self._done += 1
        return self._box

    def strike(self, way: Way, number: int, *, guard_too: bool) -> None:
        """Kill there, then let the next run prove that nothing was lost."""
        box = self.box()
        where = f"{way.value} {number}"
        self._write(box, 0)
        victim = Victim(box)
        victim.at(way, number, victim.kill_all if guard_too else victim.kill)
        with victim.relay, victim.started():
            code, said = victim.ended()
            assert victim.struck.is_set(), f"{where}: {said}"
            assert code in (-9, 0), f"{where}: {said}"
            name = victim.relay.commands[-1]
            self._write(box, 1)
            if not guard_too:
                eventually(lambda: running(box), seconds=3, what=f"{where} ({name}): running again")
                eventually(lambda: victim.jobs() == [], seconds=10, what=f"{where} ({name}): cleared by the guard")
                left = [item for item in box.leftovers() if ".partial-" not in item]
                assert left == [], f"{where} ({name})"
        self._write(box, 2)
        # By the same socket: the record names the process behind it, which is the relay's.
        with Relay(victim.relay.path, box.qmp) as relay:
            self._prove(box, relay, f"{where} ({name})")

    def _write(self, box: Box, slot: int) -> None:
        """Before, right after the kill, and later: a gap would swallow one of them."""
        self._value = self._value % 250 + 1
        box.write("vda", self._value, (2 + 3 * slot + self._value % 3) * 64 * KiB + 512, 64 * KiB)
        box.zero("vda", (12 + slot) * 64 * KiB, 64 * KiB)

    def _prove(self, box: Box, relay: Relay, where: str) -> None:
        report = box.backup(machine=urls.QmpMachine(socket=relay.path))
        assert running(box), where
        assert report.broken == (), where
        assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL}, where
        assert box.leftovers() == [], where
        assert box.restored() == box.image(), where
        assert len(box.checkpoints("vda")) == 1, where


Pick = Callable[[list[str]], list[int]]


def sweep(make_box: MakeBox, way: Way, pick: Pick, *, guard_too: bool = False) -> None:
    """Kill at each of the picked messages."""
    commands = script(small(make_box))
    going = Sweep(make_box)
    for number in pick(commands):
        going.strike(way, number, guard_too=guard_too)


@pytest.mark.timeout(300)
def test_killed_at_a_changing_command_the_guard_clears_and_no_change_is_lost(make_box: MakeBox) -> None:
    sweep(make_box, Way.COMMAND, lambda commands: changing(commands)[::3])


@pytest.mark.timeout(300)
def test_killed_at_an_answer_the_guard_clears_and_no_change_is_lost(make_box: MakeBox) -> None:
    sweep(make_box, Way.REPLY, lambda commands: changing(commands)[1::6])


@pytest.mark.timeout(300)
def test_killed_together_with_its_guard_the_next_run_alone_clears(make_box: MakeBox) -> None:
    sweep(make_box, Way.COMMAND, lambda commands: changing(commands)[1::5], guard_too=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("guard_too", [False, True])
@pytest.mark.parametrize("way", list(Way))
@pytest.mark.parametrize("part", range(4))
def test_killed_at_every_message(make_box: MakeBox, way: Way, part: int, guard_too: bool) -> None:
    sweep(make_box, way, lambda commands: list(range(1, len(commands) + 1))[part::4], guard_too=guard_too)
