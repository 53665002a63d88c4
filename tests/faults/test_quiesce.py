"""Freezing the guest's file systems: an agent that hangs, lies or vanishes, and our death while it is frozen."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit import Box
from pullback import errors
from pullback.model.backups import Quiesce, Quiescing

Answer = Callable[[str], object]


class Agent:
    """The far end of the agent's channel, which the guest controls: it answers what a test wants."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self.asked: list[str] = []
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection, connection.makefile("rwb") as channel:
                self._talk(channel)

    def _talk(self, channel: Any) -> None:
        try:
            for line in channel:
                request = json.loads(line.lstrip(b"\xff"))
                command = request["execute"]
                self.asked.append(command)
                if command == "guest-sync-delimited":
                    channel.write(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")
                else:
                    answer = self._answer(command)
                    channel.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n")
                channel.flush()
        except (OSError, ValueError):
            return

    def close(self) -> None:
        self._socket.close()


@contextmanager
def agent(path: Path, answer: Answer) -> Iterator[Agent]:
    made = Agent(path, answer)
    try:
        yield made
    finally:
        made.close()


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
