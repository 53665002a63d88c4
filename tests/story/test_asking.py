"""The password on a terminal: not shown, and Ctrl-C ends the question at once."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import kit


@dataclass
class Terminal:
    """A command that believes to be on a terminal."""

    process: subprocess.Popen[bytes]
    descriptor: int
    shown: bytes = b""

    def until(self, text: bytes) -> None:
        """Wait until it has shown this."""
        deadline = time.monotonic() + 20
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self.shown += self._read()

    def _read(self) -> bytes:
        try:
            return os.read(self.descriptor, 4096)
        except OSError:  # the other end is closed
            raise AssertionError(self.shown) from None

    def write(self, keys: bytes) -> None:
        """Type."""
        os.write(self.descriptor, keys)

    def status(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if select.select([self.descriptor], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.descriptor, 4096)
                except OSError:
                    break
        return self.process.wait(20)


@pytest.fixture
def listing(tmp_path: Path) -> Iterator[Terminal]:
    """`pullback list` of a repository whose password nobody has told."""
    kit.make_repository(tmp_path / "repo", tmp_path / "cache")
    environ = {name: value for name, value in os.environ.items() if "PASSWORD" not in name}
    environ |= {"PULLBACK_STATE_DIR": str(tmp_path / "state"), "PULLBACK_REPOSITORY": str(tmp_path / "repo")}
    # A terminal of its own, with which Ctrl-C reaches it.
    words = ["setsid", "--ctty", "--wait", sys.executable, "-m", "pullback.cli.main", "list"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, env=environ, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        yield Terminal(process, ours)
        os.close(ours)


def test_the_password_is_asked_for_and_not_shown(listing: Terminal) -> None:
    listing.until(b"Password of the repository")
    listing.write(kit.PASSWORD.encode() + b"\n")
    assert listing.status() == 10  # the repository is empty
    assert b"no restore point" in listing.shown
    assert kit.PASSWORD.encode() not in listing.shown


def test_a_wrong_password_is_told(listing: Terminal) -> None:
    listing.until(b"Password of the repository")
    listing.write(b"wrong\n")
    assert listing.status() == 12


def test_ctrl_c_ends_the_question_at_once(listing: Terminal) -> None:
    listing.until(b"Password of the repository")
    begun = time.monotonic()
    listing.write(b"\x03")
    assert listing.status() == 130
    assert time.monotonic() - begun < 5
