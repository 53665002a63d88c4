"""The guard's own process: when it acts, and when it must not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pullback.engine import guard

# A parent of the guard that can be killed: it says what it is told to, then sleeps.
_PARENT = """
import os, subprocess, sys, time
guard = subprocess.Popen(
    [sys.executable, "-m", "pullback.engine.rescue", sys.argv[1], str(os.getpid())],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
assert guard.stdout.readline() == b"ready\\n"
for word in sys.argv[2:]:
    if word.startswith("+"):
        time.sleep(float(word))
    else:
        guard.stdin.write(word.encode()); guard.stdin.flush()
if "Q" in sys.argv:
    sys.exit(guard.wait(10))
guard.stdin.close() if "close" in sys.argv else time.sleep(60)
"""
LONG = f"+{guard.SILENCE_SECONDS * 2}"


def parent(tmp_path: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start it; the job's record is not there, so there is nothing to rescue."""
    argv = [sys.executable, "-c", _PARENT, str(tmp_path / "0123abcd.json"), *words]
    return subprocess.Popen(argv, stderr=subprocess.PIPE)


def outcome(process: subprocess.Popen[bytes]) -> int:
    """Its exit status; -9 if the guard killed it."""
    with process:
        try:
            return process.wait(20)
        finally:
            process.kill()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("words", "status"),
    [
        pytest.param(["Q"], 0, id="a goodbye ends it"),
        pytest.param([LONG, "Q"], 0, id="silence before a pause is nothing"),
        pytest.param(["A", "D", LONG, "Q"], 0, id="silence after a pause is nothing"),
        pytest.param(["AD", LONG, "Q"], 0, id="a pause so short that both words come at once"),
        pytest.param(["A", "+0.6", ".", "+0.6", ".", "+0.6", "D", "Q"], 0, id="a long pause with beats"),
        pytest.param(["A"], -signal.SIGKILL, id="silence inside a pause is death"),
        pytest.param(["A", "+0.5", "."], -signal.SIGKILL, id="silence after some beats is death"),
        pytest.param(["A", "D", "A"], -signal.SIGKILL, id="in the second pause too"),
    ],
)
def test_only_silence_inside_a_pause_kills(tmp_path: Path, words: list[str], status: int) -> None:
    begun = time.monotonic()
    assert outcome(parent(tmp_path, *words)) == status
    if status:
        assert time.monotonic() - begun < guard.SILENCE_SECONDS * 2 + 3


def test_a_guard_is_deaf_to_signals_but_ends_with_its_pipe(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "pullback.engine.rescue", str(tmp_path / "0123abcd.json"), "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            child.send_signal(number)
        time.sleep(0.2)
        assert child.poll() is None
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(10) == 0
