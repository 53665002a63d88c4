"""`pullback serve` and `pullback mount` as programs, and clients of what they serve."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stored import Stored

SECONDS = 60


@dataclass
class Program:
    """A program that has printed its result and stays."""

    process: subprocess.Popen[bytes]
    result: dict[str, Any]
    _lines: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)

    def uri(self, target: str = "vda") -> str:
        """Of a served disk."""
        uri: str = next(disk["uri"] for disk in self.result["disks"] if disk["target"] == target)
        return uri

    @property
    def socket(self) -> Path:
        """The unix socket."""
        return Path(self.uri().partition("?socket=")[2])

    def children(self, name: str) -> list[int]:
        """Its processes (and theirs) of that name."""
        return [pid for pid in descendants(self.process.pid) if name_of(pid) == name]

    def event(self, kind: str, seconds: float = SECONDS) -> dict[str, Any]:
        """The next event of a kind."""
        deadline = time.monotonic() + seconds
        while True:
            line = self._lines.get(timeout=max(0.01, deadline - time.monotonic()))
            if line["type"] == "event" and line["kind"] == kind:
                return line

    def quiet(self) -> list[dict[str, Any]]:
        """Events that nobody waited for."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._lines.get_nowait())
        return [line for line in found if line["type"] == "event"]

    def end(self, signum: int = signal.SIGTERM) -> int:
        """Send it a signal and wait; gives its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(SECONDS)


@contextlib.contextmanager
def running(
    command: str, stored: Stored, *words: object, ends: int | None = 0, state: Path | None = None, **environ: str
) -> Iterator[Program]:
    """`pullback COMMAND … --json` until the block ends; `ends` is the exit status that it must have then.

    `state`: Pullback's own directories, if they are not to be those of all.
    """
    line = [sys.executable, "-m", "pullback.cli.main", command, *map(str, words), "-r", stored.place.url, "--json"]
    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ
        | dict(stored.access.environ)
        | {"PULLBACK_STATE_DIR": str(state or stored.directory / "state")}
        | environ,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    reader: threading.Thread | None = None
    try:
        before: list[dict[str, Any]] = []
        for text in process.stdout:
            found = json.loads(text)
            if found["type"] in ("result", "error"):
                break
            before.append(found)
        else:
            raise AssertionError(process.stderr.read().decode())
        assert found["type"] == "result", found
        program = Program(process, found)
        for other in before:
            program._lines.put(other)
        reader = threading.Thread(target=_read, args=(process, program._lines), daemon=True)
        reader.start()
        yield program
        status = program.end()
        assert ends is None or status == ends, (status, process.stderr.read().decode())
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stderr.close()
        if reader is not None:
            reader.join(SECONDS)
        process.stdout.close()


def _read(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[dict[str, Any]]) -> None:
    assert process.stdout is not None
    for text in process.stdout:
        lines.put(json.loads(text))


def descendants(pid: int) -> list[int]:
    """Processes below a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def living(pids: list[int]) -> list[int]:
    """Those that run; one that has ended and that nobody has asked for its status does not."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def name_of(pid: int) -> str:
    """What the kernel calls a process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def until(condition: Any, what: str, seconds: float = SECONDS) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def run(*words: object, code: int = 0) -> str:
    """A program to its end; gives what it said."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def copied(uri: str, to: Path, *words: str) -> bytes:
    """A disk, as nbdcopy reads it."""
    to.unlink(missing_ok=True)
    run("nbdcopy", *words, uri, to)
    return to.read_bytes()


def flip(path: Path, at: int, count: int = 1) -> None:
    """Change bytes of a file, which may be read-only."""
    mode = path.stat().st_mode & 0o777
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    for number in range(at, at + count):
        content[number] ^= 0xFF
    path.write_bytes(content)
    path.chmod(mode)
