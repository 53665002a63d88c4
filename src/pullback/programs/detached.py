"""A program that goes on when we end: started in a session of its own, what it says in a log."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pullback import errors
from pullback.programs import process

#: Characters of the log that a message takes.
_TOLD = 2000


class Detached:
    """A program that we started and do not end. Nothing is left of ours when it is let go."""

    def __init__(self, argv: Sequence[str], *, log: Path) -> None:
        """`log` is appended to; it holds nothing secret, but is ours alone. Raises `CannotWrite`, `ProgramMissing`."""
        self._name = Path(argv[0]).name
        self._log = log
        try:
            with open(log, "ab", opener=lambda path, flags: os.open(path, flags | os.O_CLOEXEC, 0o600)) as file:
                self._began = file.tell()
                self._process = subprocess.Popen(
                    list(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=process.environment(None),
                    start_new_session=True,
                    cwd="/",
                )
        except FileNotFoundError as error:
            raise errors.ProgramMissing(program=self._name, package=self._name) from error
        except OSError as error:
            raise errors.CannotWrite(path=str(log), reason=error.strerror or str(error)) from error

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Has it ended?"""
        return self._process.poll() is not None

    def failure(self, what: str) -> errors.ProgramFailed:
        """Why it ended, or did not get so far."""
        code = self._process.poll()
        status = what if code is None else f"exit status {code}" if code >= 0 else f"killed by signal {-code}"
        return errors.ProgramFailed(program=self._name, status=status, message=self.message())

    def message(self) -> str:
        """The end of what it said since it was started."""
        with open(self._log, "rb") as file:
            file.seek(self._began)
            return file.read().decode("utf-8", "replace").strip()[-_TOLD:] or "it said nothing"

    def kill(self) -> None:
        """End it after all: it never came to be what was asked for."""
        if not self.ended:
            self._process.kill()
            self._process.wait()
