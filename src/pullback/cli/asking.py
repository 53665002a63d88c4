"""Asking a person for a password. In a thread, so it must notice by itself that the command is to end."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import threading
from collections.abc import Iterator

from pullback import errors

#: Set when Ctrl-C or SIGTERM came: nobody waits for an answer any more.
INTERRUPTED = threading.Event()
_LOOK_SECONDS = 0.1
_LONGEST = 4096


def possible() -> bool:
    """Is somebody there who could answer?"""
    return sys.stdin.isatty() and sys.stderr.isatty()


def password(question: str) -> str:
    """The line that is typed, which is not shown. Raises `Interrupted`."""
    with _silent(sys.stdin.fileno()) as terminal:
        print(question, end="", file=sys.stderr, flush=True)
        try:
            line = _line(terminal)
        finally:
            print(file=sys.stderr, flush=True)
    return line.decode(errors="surrogateescape").rstrip("\r\n")


def _line(terminal: int) -> bytes:
    while not select.select([terminal], [], [], _LOOK_SECONDS)[0]:
        if INTERRUPTED.is_set():
            raise errors.Interrupted
    line = os.read(terminal, _LONGEST)
    if not line:  # end of file: Ctrl-D
        raise errors.Interrupted
    return line


@contextlib.contextmanager
def _silent(terminal: int) -> Iterator[int]:
    """Without echo while the block runs."""
    before = termios.tcgetattr(terminal)
    quiet = [*before]
    quiet[3] = before[3] & ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSAFLUSH, quiet)
    try:
        yield terminal
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
