"""What a guest says: the serial port's log file, read while it grows."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from pullback import errors

_POLL_SECONDS = 0.01
#: The kernel cannot go on, or a program of ours gave up: waiting longer is of no use.
_FATAL = re.compile(r"Kernel panic|^PB-FAILED|^PB-CHECK bad")
_LINES_SHOWN = 15


class Console:
    """The lines of a serial log. For one thread at a time."""

    def __init__(self, path: Path, alive: Callable[[], bool]) -> None:
        """`path` is written by QEMU; `alive()` tells whether more can come."""
        self._path = path
        self._alive = alive
        self._offset = 0
        self._rest = b""
        self._lines: list[str] = []

    def lines(self) -> list[str]:
        """All whole lines so far."""
        self._read()
        return list(self._lines)

    def _read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as log:
            log.seek(self._offset)
            new = log.read()
        self._offset += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        self._lines += [line.rstrip(b"\r").decode("utf-8", "replace") for line in whole]

    def matches(self, pattern: str) -> list[re.Match[str]]:
        """Where `pattern` was found (`re.search`), line by line, so far."""
        expression = re.compile(pattern)
        return [match for line in self.lines() if (match := expression.search(line))]

    def wait_for_line(self, pattern: str, timeout: float) -> re.Match[str]:
        """The first line, old or new, in which `pattern` is found.

        Raises `ProgramFailed` with the last lines when `timeout` seconds are over, when the guest
        ended, and at once when it panics or a program in it gives up.
        """
        return self.wait_until(pattern, lambda match: True, timeout)

    def wait_until(self, pattern: str, accept: Callable[[re.Match[str]], bool], timeout: float) -> re.Match[str]:
        """As `wait_for_line`, for the first match that `accept` takes."""
        expression = re.compile(pattern)
        deadline = time.monotonic() + timeout
        seen = 0
        while True:
            more = self._alive()  # asked before reading: what it said at last is still seen
            self._read()
            for line in self._lines[seen:]:
                if (match := expression.search(line)) and accept(match):
                    return match
                if _FATAL.search(line):
                    raise self._failed("it gave up")
            seen = len(self._lines)
            if not more:
                raise self._failed("it ended")
            if time.monotonic() > deadline:
                raise self._failed(f"no line {pattern!r} within {timeout:g} s")
            time.sleep(_POLL_SECONDS)

    def _failed(self, status: str) -> errors.ProgramFailed:
        self._read()
        said = "\n".join([*self._lines[-_LINES_SHOWN:], self._rest.decode("utf-8", "replace")])
        return errors.ProgramFailed(program="the guest", status=status, message=said)
