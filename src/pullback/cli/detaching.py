"""A command that goes on in the background once it has done what people wait for.

It is split in two at its beginning: the child does all the work, on the terminal, so that it can ask for a
password and be interrupted; the parent waits. When the child leaves, the parent ends with 0. A child that
fails before ends the parent with its own exit code.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

_LEFT = b"+"


@dataclass(frozen=True, slots=True)
class Parent:
    """Who waits for us."""

    pipe: int

    def leave(self, log: Path) -> None:
        """Let the parent end. What is said from now on goes to `log`, and the terminal's signals do not reach us."""
        sys.stdout.flush()
        sys.stderr.flush()
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        nowhere = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(nowhere, 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        os.close(nowhere)
        os.setsid()
        os.write(self.pipe, _LEFT)
        os.close(self.pipe)


def begin() -> Parent:
    """Returns in the child; the parent waits for it, and ends."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        os.close(reading)
        return Parent(writing)
    os.close(writing)
    # Ctrl-C goes to both; the child decides. What is sent to us alone is passed on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, frame: os.kill(child, got))
    left = os.read(reading, 1) == _LEFT
    code = 0 if left else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)
