"""Killed at any step of a rollback: nothing is half done that somebody could use, and the same command finishes."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rolling
from kit import Box, MakeBox, last_json, password_file
from pullback.model.rollbacks import Phase
from pullback.programs import qemu
from pullback.state import rollbacks
from pullback.units import KiB, MiB
from victim import eventually

HOWS = ("us", "both", "term", "qemu")
SIZE = 4 * MiB


class Sweep:
    """One disturbed rollback after the other on a machine, each to its first restore point."""

    def __init__(self, make_box: MakeBox, kind: str) -> None:
        disks = [
            qemu.Disk(id="vda", path=Path("a.qcow2")),
            qemu.Disk(id="vdb", path=Path("b.qcow2"), style=qemu.Style.DRIVE),
        ]
        self.box: Box = make_box(*disks, size=SIZE, kind=kind)
        for disk in ("vda", "vdb"):
            self.box.scramble(disk, 1, 0, 2 * MiB)
        self.point = self.box.backup().point.id
        self.then = self.box.image()
        self._rolls = random.Random(1)
        self.seen: list[str] = []

    def disturb(self, how: str, moment: str) -> bool:
        """A rollback to which that happens; what must hold is looked at. False if the step never came."""
        box = self.box
        self._change()
        now = box.image()
        done = self._run(how, moment)
        steps = re.findall(r"^steps (\d+)$", done.stderr, re.MULTILINE)
        if moment.isdecimal() and steps and int(steps[0]) < int(moment):
            assert done.returncode == 0, done.stderr
            self._is_back()
            return False
        self.seen.append(self._judge(how, moment, done, now))
        self._is_exact(how)
        return True

    def _change(self) -> None:
        """Some of it is in the newest restore point too, some is not."""
        box, rolls = self.box, self._rolls
        for _ in range(2):
            for disk in ("vda", "vdb"):
                start = 512 * rolls.randrange((SIZE - 70 * KiB) // 512)
                box.scramble(disk, rolls.randrange(1 << 30), start, 64 * KiB)
            if _ == 0 and rolls.random() < 0.5:
                box.backup()
        box.zero("vdb", 0, MiB)
        for disk in ("vda", "vdb"):
            box._io(disk, "flush")  # what is not flushed may be lost when QEMU is killed

    def words(self, machine: str | None = None) -> list[str]:
        """The command."""
        box = self.box
        place = str(box.repository) if box.kind == "restic" else f"dir:{box.repository}"
        return ["rollback", machine or f"qmp:{box.qmp}", self.point, "-r", place, "--no-safety", "--name", box.name]

    def _run(self, how: str, moment: str) -> subprocess.CompletedProcess[str]:
        box = self.box
        assert box.process is not None
        environ = {
            "PULLBACK_STATE_DIR": str(box.directory / "state"),
            "PULLBACK_PASSWORD_FILE": str(password_file(box.directory)),
            "PULLBACK_CACHE_DIR": str(box.access.caches),
        }
        line = [sys.executable, str(Path(rolling.__file__).with_name("tripping.py")), how, moment, box.process.pid]
        return subprocess.run(
            [str(word) for word in (*line, *self.words())],
            capture_output=True, text=True, env=os.environ | environ, timeout=60, check=False,
        )  # fmt: skip

    # -- what must hold ----------------------------------------------------------------------

    def _journal(self) -> Phase | None:
        found = rollbacks.every(self.box.directories.state)
        return found[0].phase if found else None

    def _judge(self, how: str, moment: str, done: subprocess.CompletedProcess[str], now: dict[str, bytes]) -> str:
        """How it went, in a word."""
        expected = {"us": -signal.SIGKILL, "both": -signal.SIGKILL, "term": 143, "qemu": 1}[how]
        # The last of its steps come when all is done.
        assert done.returncode in (expected, 0), (how, moment, done.returncode, done.stderr)
        if how == "qemu":
            return self._after_qemu(now)
        if self._journal() is Phase.WRITING:
            eventually(lambda: not self._guards(), seconds=15, what="the end of the guard")
            assert self.box.command("query-status")["status"] == "prelaunch"
            roots = [one["inserted"]["drv"] for one in self.box.command("query-block")]
            assert roots == ["blkdebug", "blkdebug"]
            self._is_refused(f"qmp:{self.box.qmp}")
            self._finish()
            return "finished"
        if how == "both":
            assert self.box.cli("info", f"qmp:{self.box.qmp}").returncode == 0
        eventually(self._is_settled, seconds=15, what=f"the machine after {how} at step {moment}")
        return self._is_whole(now)

    def _guards(self) -> list[str]:
        """Guards of this machine's jobs."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if b"pullback.engine.rescue" in words and str(self.box.directory).encode() in words:
                    found.append(entry.name)
        return found

    def _is_settled(self) -> bool:
        box = self.box
        return box.command("query-status")["status"] == "running" and not list(
            (box.directory / "state" / "jobs").glob("*.json")
        )

    def _after_qemu(self, now: dict[str, bytes]) -> str:
        box = self.box
        assert box.process is not None
        box.process.wait(10)
        box.process.close()
        writing = self._journal() is Phase.WRITING
        if writing and len(self.seen) % 2:
            machine = "images:" + ",".join(f"{disk.id}=qcow2:{disk.path}" for disk in box.disks)
            self._is_refused(machine, "--name", box.name)
            self._finish(machine)
            box.start()
            return "finished off line"
        box.start()
        if writing:
            self._is_refused(f"qmp:{box.qmp}")
            self._finish()
            return "finished in a new QEMU"
        assert box.cli("info", f"qmp:{box.qmp}").returncode == 0
        return self._is_whole(now)

    def _is_refused(self, machine: str, *more: str) -> None:
        """By every other command; the machine does not run."""
        box = self.box
        if machine.startswith("qmp:") and not more:
            done = box.cli("info", machine, "--json")
        else:
            done = box.cli("checkpoint", "list", machine, *more, "--json")
        assert done.returncode == 11, done.stderr
        assert last_json(done.stdout)["code"] == "rollback-pending"
        assert f"{self.point[:12]}" in last_json(done.stdout)["hint"]

    def _finish(self, machine: str | None = None) -> None:
        """The same command; its repository is not there any more."""
        box = self.box
        away = box.repository.rename(box.directory / "away")
        try:
            done = box.cli(*self.words(machine), "--json")
        finally:
            away.rename(box.repository)
        assert done.returncode == 0, done.stderr
        assert last_json(done.stdout)["finished"] is True
        self._is_back()

    def _is_back(self) -> None:
        for disk, wanted in self.then.items():
            assert rolling.content(self.box, disk) == wanted
            self.box.model[disk][:] = wanted

    def _is_whole(self, now: dict[str, bytes]) -> str:
        """As it was, or as it shall be."""
        found = {disk: rolling.content(self.box, disk) for disk in now}
        assert found in (now, self.then)
        if found == self.then:
            self._is_back()
            return "done"
        return "undone"

    def _is_exact(self, how: str) -> None:
        """Nothing is left, the machine runs, and the next backup is right; an increment, if QEMU lives."""
        box = self.box
        assert box.leftovers() == []
        assert box.command("query-status")["status"] in ("running", "prelaunch")
        box.write("vda", 9, SIZE - 64 * KiB, 512)
        report = box.backup()
        if how != "qemu":
            assert report.broken == ()
        assert box.restored() == box.image()
        assert list((box.directory / "state" / "rollbacks").glob("*")) == []  # the next command removes what is left


@pytest.fixture(params=["dir", "restic"])
def sweep(request: pytest.FixtureRequest, make_box: MakeBox) -> Sweep:
    """A machine that is disturbed."""
    return Sweep(make_box, request.param)


@pytest.mark.parametrize(
    ("how", "kind", "moments"),
    [
        ("us", "dir", {"system_reset:1": "undone", "NbdChannel.write:2": "finished"}),
        ("term", "restic", {"NbdChannel.write:2": "finished"}),
        ("qemu", "dir", {"NbdChannel.write:1": "finished in a new QEMU"}),
        pytest.param(
            "both",
            "restic",
            {"qom-set:2": "undone", "NbdChannel.flush:2": "finished", "qom-set:4": "done", "cont:1": "done"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "qemu",
            "restic",
            {"blockdev-add:3": "undone", "NbdChannel.write:1": "finished off line", "qom-set:3": "done"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rollback_that_dies_at_some_steps_can_always_be_finished(
    make_box: MakeBox, how: str, kind: str, moments: dict[str, str]
) -> None:
    sweep = Sweep(make_box, kind)
    for moment, expected in moments.items():
        assert sweep.disturb(how, moment)
        assert sweep.seen[-1] == expected


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", HOWS)
def test_a_rollback_that_dies_at_any_step_can_always_be_finished(sweep: Sweep, how: str) -> None:
    for number in itertools.count(1):
        if not sweep.disturb(how, str(number)):
            break
    print(how, {word: sweep.seen.count(word) for word in sorted(set(sweep.seen))})
    assert {"undone", "done"} <= set(sweep.seen)
    assert any(word.startswith("finished") for word in sweep.seen)
