"""What commands print: tables and progress for people, JSON lines for programs.

Data goes to standard output, messages to standard error. With --json, standard output has one JSON
object a line: any number of {"type": "progress"} and {"type": "note"}, then exactly one
{"type": "result"} or {"type": "error"}.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pullback import errors
from pullback.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

#: At most so often does a disk's progress become a JSON line.
_JSON_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Output:
    """How to speak: chosen once, by the options before or behind the command."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def result(self, command: str, values: dict[str, object], human: Sequence[str]) -> None:
        """The command's outcome: `values` as JSON, or the `human` lines."""
        if self.json:
            _line({"type": "result", "command": command, **values})
        else:
            for line in human:
                print(line)
            sys.stdout.flush()  # some commands stay after it

    def event(self, values: dict[str, object], human: str) -> None:
        """Something that happened: a JSON line of its own, or the `human` one."""
        if self.json:
            _line({"type": "event", **values})
        else:
            print(human, flush=True)

    def done(self, disk: str, done: int, expected: int, *, finished: bool, human: str) -> None:
        """How far a disk is: a JSON line as in a backup, or the `human` one."""
        if self.json:
            _progress(disk, done, expected, finished=finished)
        else:
            print(human, flush=True)

    def note(self, sentence: str) -> None:
        """A sentence on standard error (or a JSON note)."""
        if self.json:
            _line({"type": "note", "message": sentence})
        elif not self.quiet:
            print(sentence, file=sys.stderr)

    def error(self, error: errors.PullbackError) -> None:
        """One sentence, then the hint on a line of its own."""
        notes = list(getattr(error, "__notes__", []))
        if self.json:
            _line(_error_document(error, notes))
        print(f"pullback: {error}", file=sys.stderr)
        for note in notes:
            print(f"  also: {note}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)

    def hint(self, text: str) -> None:
        """A remedy for a result that is bad news, on standard error. Programs see it in the result."""
        if not self.json and not self.quiet:
            print(f"  hint: {text}", file=sys.stderr)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A place to report to while the block runs: bars on a terminal, JSON lines, or notes only."""
        if self.json:
            yield _JsonProgress()
        elif self.quiet:
            yield Silent()
        elif sys.stderr.isatty():
            with _bars() as bars:
                yield _BarProgress(bars)
        else:
            yield _NoteProgress()


def _error_document(error: errors.PullbackError, notes: list[str]) -> dict[str, object]:
    return {
        "type": "error",
        "code": error.code,
        "message": str(error),
        "hint": error.hint,
        "facts": {name: _plain(value) for name, value in error.facts().items()},
        "notes": notes,
        "exit_code": int(error.exit_code),
    }


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _line(values: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(values, default=str) + "\n")
    sys.stdout.flush()


def _progress(disk: str, done: int, expected: int, *, finished: bool) -> None:
    _line({"type": "progress", "disk": disk, "done": done, "expected": expected, "finished": finished})


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return RichProgress(*columns, console=Console(stderr=True), transient=True)


class _BarProgress:
    """A bar for each disk. Rich's own lock makes it safe to call from the copier's threads."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def start(self, subject: str, total: int) -> None:
        """A new bar."""
        self._tasks[subject] = self._bars.add_task(subject, total=total or None)

    def advance(self, subject: str, done: int) -> None:
        """More of it."""
        self._bars.advance(self._tasks[subject], done)

    def finish(self, subject: str) -> None:
        """Full, whatever was expected."""
        task = self._tasks[subject]
        done = self._bars.tasks[self._bars.task_ids.index(task)].completed
        self._bars.update(task, total=done or 1, completed=done or 1)

    def note(self, message: str) -> None:
        """Above the bars."""
        self._bars.console.print(message, markup=False, highlight=False)


class _NoteProgress(Silent):
    """Not on a terminal: sentences only."""

    def note(self, message: str) -> None:
        """On standard error."""
        print(message, file=sys.stderr)


class _JsonProgress:
    """JSON lines, at most two a second and disk. The lock guards the sums, for threads call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: dict[str, list[float]] = {}

    def start(self, subject: str, total: int) -> None:
        """The first line of a disk."""
        with self._lock:
            self._state[subject] = [0, total, time.monotonic()]
            self._say(subject)

    def advance(self, subject: str, done: int) -> None:
        """A line if the last one is old enough."""
        with self._lock:
            state = self._state[subject]
            state[0] += done
            if time.monotonic() - state[2] >= _JSON_SECONDS:
                state[2] = time.monotonic()
                self._say(subject)

    def finish(self, subject: str) -> None:
        """The last line of a disk."""
        with self._lock:
            self._say(subject, finished=True)

    def note(self, message: str) -> None:
        """A note."""
        with self._lock:
            _line({"type": "note", "message": message})

    def _say(self, subject: str, *, finished: bool = False) -> None:
        done, total, _ = self._state[subject]
        _progress(subject, int(done), int(total), finished=finished)
