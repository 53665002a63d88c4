"""Freezing the guest's file systems: an agent that hangs, lies or vanishes, and our death while it is frozen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from agents import Answer, agent
from kit import Box
from pullback import errors
from pullback.model.backups import Quiesce, Quiescing


def hang(command: str) -> object:
    time.sleep(60)
    return {"return": 1}


def slow_freeze(command: str) -> object:
    time.sleep(5 if "freeze-freeze" in command else 0)
    return {"return": 1}


def refuse(command: str) -> object:
    return {"error": {"class": "CommandNotFound", "desc": "not here"}}


BAD: dict[str, Answer] = {
    "refuses": refuse,
    "talks nonsense": lambda command: b"\x00\x01{{{\n",
    "answers a text": lambda command: {"return": "many"},
    "answers without end": lambda command: b"[" * 2_000_000 + b"\n",
    "freezes nothing": lambda command: {"return": 0},
    "freezes after we gave up": slow_freeze,
}


TALKERS = ("talks nonsense", "answers a text", "answers without end")


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_agent_costs_at_most_ten_seconds_and_no_backup(box: Box, kind: str) -> None:
    path = box.directory / "agent"
    with agent(path, BAD[kind]) as asked:
        begun = time.monotonic()
        report = box.backup(quiescing=Quiescing(wish=Quiesce.TRY, agent=path))
        assert time.monotonic() - begun < 10 + 3
    assert report.frozen == 0
    assert any("file systems were not frozen" in note or "still be frozen" in note for note in report.notes)
    told = kind in ("refuses", "freezes nothing")
    assert told or "guest-fsfreeze-thaw" in asked.asked, "what is not known to be thawed may be frozen later"
    # A thaw that nobody confirmed is owed: the record stays until the next run has tried.
    left = box.leftovers()
    assert left == [] or (kind in TALKERS and all("/state/jobs/" in path for path in left))


def test_an_agent_that_hangs_is_thawed_by_the_next_run(box: Box) -> None:
    path = box.directory / "agent"
    with agent(path, hang):
        begun = time.monotonic()
        report = box.backup(quiescing=Quiescing(wish=Quiesce.TRY, agent=path))
        assert time.monotonic() - begun < 10 + 3
    assert any("may still be frozen" in note for note in report.notes)
    path.unlink()
    with agent(path, lambda command: {"return": 1}) as asked:
        box.backup()
    assert "guest-fsfreeze-thaw" in asked.asked
    assert box.leftovers() == []


def test_a_required_freeze_that_fails_does_nothing(box: Box) -> None:
    box.backup()
    before = box.checkpoints("vda")
    path = box.directory / "agent"
    with agent(path, refuse), pytest.raises(errors.QuiesceFailed, match="refused guest-fsfreeze-freeze"):
        box.backup(quiescing=Quiescing(wish=Quiesce.REQUIRE, agent=path))
    assert box.checkpoints("vda") == before
    assert box.leftovers() == []


def test_no_agent_is_an_error_where_required_a_note_where_tried_and_nothing_otherwise(box: Box) -> None:
    with pytest.raises(errors.QuiesceFailed, match="no guest agent"):
        box.backup(quiescing=Quiescing(wish=Quiesce.REQUIRE))
    assert any("not frozen" in note for note in box.backup(quiescing=Quiescing(wish=Quiesce.TRY)).notes)
    assert box.backup().notes == ()


def test_a_paused_machine_is_not_asked_to_freeze(box: Box) -> None:
    path = box.directory / "agent"
    box.command("stop")
    with agent(path, lambda command: {"return": 1}) as asked:
        report = box.backup(quiescing=Quiescing(wish=Quiesce.TRY, agent=path))
    assert asked.asked == []
    assert any("stands still" in note for note in report.notes)


def test_the_freeze_lies_around_the_cut_and_is_short(box: Box) -> None:
    path = box.directory / "agent"
    states: list[str] = []

    def watch(command: str) -> object:
        states.append(f"{command} {box.command('query-status')['status']}")
        return {"return": 2}

    with agent(path, watch):
        report = box.backup(quiescing=Quiescing(wish=Quiesce.REQUIRE, agent=path))
    assert states == ["guest-fsfreeze-freeze running", "guest-fsfreeze-thaw running"]
    assert report.frozen == 2
    assert report.pause < report.frozen_seconds < 5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_guard_thaws_within_two_seconds_of_our_death(box: Box, number: signal.Signals) -> None:
    path = box.directory / "agent"
    died: list[float] = []
    thawed: list[float] = []
    process: list[subprocess.Popen[bytes]] = []

    def answer(command: str) -> object:
        if "freeze-freeze" in command:
            os.kill(process[0].pid, number)
            died.append(time.monotonic())
        elif "thaw" in command:
            thawed.append(time.monotonic())
        return {"return": 1}

    argv = [sys.executable, "-m", "pullback.cli.main", "backup", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}"]
    argv += ["--quiesce", "require", "--agent", str(path), "--state-dir", str(box.directory / "state")]
    with agent(path, answer):
        process.append(subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        process[0].wait(30)
        deadline = time.monotonic() + 10
        while not thawed and time.monotonic() < deadline:
            time.sleep(0.02)
    assert thawed
    print(f"thawed {thawed[0] - died[0]:.2f} s after {number.name}")
    assert thawed[0] - died[0] < 2.5
    assert box.command("query-status")["status"] == "running"
    box.backup()
    assert box.restored() == box.image()
    assert box.leftovers() == []
