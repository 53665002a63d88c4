"""Pullback as a process that something happens to: killed, stopped or signalled at a chosen message."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kit import Box
from relay import Before, Message, Relay, Way


def eventually(done: Callable[[], bool], *, seconds: float, what: str) -> float:
    """Wait until `done()`; gives the seconds it took."""
    begun = time.monotonic()
    while not done():
        assert time.monotonic() - begun < seconds, f"{what}: not within {seconds:g} s"
        time.sleep(0.01)
    return time.monotonic() - begun


def running(box: Box) -> bool:
    """Does the machine run?"""
    return bool(box.command("query-status")["status"] == "running")


def guards_of(parent: int) -> list[int]:
    """Process ids of the guards that a pullback process started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            ppid = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if ppid == parent and b"pullback.engine.rescue" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


class Victim:
    """A `pullback` process behind a relay on the monitor's socket."""

    def __init__(self, box: Box, *words: object, before: Before | None = None) -> None:
        self.box = box
        self.relay = Relay(box.directory / "relay.sock", box.qmp, before=before, after=self._after)
        self._words = words or ("backup", f"qmp:{self.relay.path}", "-r", f"dir:{box.repository}")
        self._started = threading.Event()
        self._strikes: list[tuple[Way, int, Callable[[], None]]] = []
        self.struck = threading.Event()

    def at(self, way: Way, number: int, strike: Callable[[], None]) -> None:
        """Do that as soon as the n-th message was passed on."""
        self._strikes.append((way, number, strike))

    def at_command(self, name: str, strike: Callable[[], None], *, way: Way = Way.COMMAND, occurrence: int = 1) -> None:
        """Do that at the first (second …) command of that name, or at its answer."""
        self._strikes.append((way, -occurrence, strike))
        self._names = {**getattr(self, "_names", {}), id(strike): name}

    def _after(self, way: Way, number: int, message: Message) -> None:
        for wanted, at, strike in self._strikes:
            if way is wanted and self._hits(at, number, strike):
                self._started.wait(10)
                strike()
                self.struck.set()

    def _hits(self, at: int, number: int, strike: Callable[[], None]) -> bool:
        if at > 0:
            return number == at
        passed, name = self.relay.commands[:number], self._names[id(strike)]
        return bool(passed) and passed[-1] == name and passed.count(name) == -at

    @property
    def pid(self) -> int:
        """Of the pullback process."""
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL to pullback; its guard lives."""
        self._process.kill()

    def kill_guard(self) -> None:
        """SIGKILL to its guard alone."""
        for guard in guards_of(self.pid):
            os.kill(guard, signal.SIGKILL)

    def kill_all(self) -> None:
        """SIGKILL to pullback and its guard."""
        guards = guards_of(self.pid)
        self._process.kill()
        for guard in guards:
            os.kill(guard, signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Any signal."""
        self._process.send_signal(number)

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """It runs while the block runs, and is ended with it."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pullback.cli.main", *map(str, self._words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PULLBACK_STATE_DIR": str(self.box.directory / "state")},
        )
        self._started.set()
        try:
            yield
        finally:
            if self._process.poll() is None:
                self._process.kill()
            self._process.communicate()

    def ended(self, timeout: float = 30) -> tuple[int, str]:
        """Wait for its end: exit status and what it said."""
        out, err = self._process.communicate(timeout=timeout)
        return self._process.returncode, out + err

    def jobs(self) -> list[Path]:
        """Job records that are there."""
        return list((self.box.directory / "state" / "jobs").glob("*.json"))
