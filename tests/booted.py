"""Machines that were booted from restore points, for tests: the command in a process, and what is in the machine."""

from __future__ import annotations

import asyncio
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

from kit import Box, password_file
from pullback.engine import monitor
from pullback.programs import qemu

SECONDS = 60.0


@dataclass
class Command:
    """`pullback boot --json` while it runs."""

    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    _reader: threading.Thread = field(init=False)
    _new: queue.Queue[dict[str, Any] | None] = field(default_factory=queue.Queue)
    _said: str = ""

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._new.put(json.loads(line))
        self._new.put(None)

    def until(self, **wanted: Any) -> dict[str, Any]:
        """The first line from now on that has these members."""
        deadline = time.monotonic() + SECONDS
        while (line := self._new.get(timeout=max(0.1, deadline - time.monotonic()))) is not None:
            self.lines.append(line)
            if all(line.get(key) == value for key, value in wanted.items()):
                return line
        raise AssertionError(f"no line with {wanted}: {self.lines[-3:]}, {self.stderr()}")

    def started(self) -> dict[str, Any]:
        """The facts of the machine."""
        facts: dict[str, Any] = self.until(kind="machine-started")["facts"]
        return facts

    def past(self, disk: str, done: int) -> None:
        """Wait until so many bytes of a disk are there."""
        while self.until(type="progress", disk=disk)["done"] < done:
            pass

    def notes(self) -> list[str]:
        """Sentences so far."""
        return [line["message"] for line in self.lines if line["type"] == "note"]

    def end(self) -> dict[str, Any]:
        """Its last line, when it has ended."""
        with contextlib.suppress(AssertionError):
            self.until(type="nothing")
        self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        while not self._new.empty():  # what came after an earlier end of waiting
            if (line := self._new.get()) is not None:
                self.lines.append(line)
        assert self.lines, self.stderr()
        return self.lines[-1]

    def done(self) -> dict[str, Any]:
        """Its result, which is a good one."""
        last = self.end()
        assert (self.process.returncode, last["type"]) == (0, "result"), (last, self.notes(), self.stderr())
        return last

    def kill(self, number: int = signal.SIGKILL) -> int:
        """End it by a signal; gives its exit code."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)

    def close(self) -> None:
        """Whatever state it is in."""
        self.process.kill()
        self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def stderr(self) -> str:
        """What it said to people."""
        self.process.wait(SECONDS)
        assert self.process.stderr is not None
        self._said += self.process.stderr.read()
        return self._said


@dataclass
class Place:
    """A box's restore points, and machines booted from them."""

    box: Box
    commands: list[Command] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)

    @property
    def to(self) -> Path:
        """Where the machine's disks are."""
        return self.box.directory / "vm"

    @property
    def firmware(self) -> Path:
        """Firmware with which the processor halts: no processor time."""
        path = self.box.directory / "halt.fd"
        path.write_bytes(qemu.halting_firmware())
        return path

    def boot(self, *words: object, halt: bool = True, to: Path | None = None) -> Command:
        """Begin the command."""
        line = [sys.executable, "-m", "pullback.cli.main", "boot", "--json", "-r", self.box.place.url]
        line += [
            "--to",
            str(to or self.to),
            "--fill-after",
            "0",
            *(["--firmware", str(self.firmware)] if halt else []),
            *map(str, words),
        ]
        environ = os.environ | {
            "PULLBACK_STATE_DIR": str(self.box.directory / "state"),
            "PULLBACK_CACHE_DIR": str(self.box.access.caches),
            "PULLBACK_PASSWORD_FILE": str(password_file(self.box.directory)),
        }
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
        command = Command(process)
        self.commands.append(command)
        return command

    def runs(self, facts: dict[str, Any]) -> int:
        """Its process, which ends with the test."""
        self.pids.append(facts["pid"])
        return int(facts["pid"])

    def io(self, facts: dict[str, Any], disk: str, text: str) -> str:
        """Have the machine read or write."""
        path = f"/machine/peripheral/{disk}/virtio-backend"
        return str(self.qmp(facts, "human-monitor-command", {"command-line": f'qemu-io -d {path} "{text}"'}))

    def qmp(self, facts: dict[str, Any], command: str, arguments: dict[str, object] | None = None) -> Any:
        """A command on the monitor that is for others."""

        async def ask() -> object:
            async with monitor.connect(Path(facts["monitor"].removeprefix("qmp:"))) as qmp:
                return await qmp.execute(command, arguments, timeout=SECONDS)

        return asyncio.run(ask())

    def content(self, disk: str, to: Path | None = None) -> bytes:
        """What a whole image holds, which must be sound and stand alone."""
        image = (to or self.to) / f"{disk}.qcow2"
        info = json.loads(_run("qemu-img", "info", "-U", "--output=json", image))
        assert "backing-filename" not in info
        assert info["format"] == "qcow2"
        raw = self.box.directory / f"{disk}.raw"
        _run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", image, raw)
        return raw.read_bytes()

    def check(self, disk: str) -> None:
        """`qemu-img check`, of a machine that is off."""
        _run("qemu-img", "check", "-q", self.to / f"{disk}.qcow2")

    def off(self, facts: dict[str, Any]) -> None:
        """A clean end of the machine."""
        with contextlib.suppress(Exception):
            self.qmp(facts, "quit")
        wait_gone(facts["pid"])


def _run(*words: object) -> bytes:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, timeout=SECONDS).stdout


def alive(pid: int) -> bool:
    """Is the process there, and no zombie?"""
    return bool(monitor.process_token(pid))


def wait_gone(pid: int) -> None:
    """Wait for a process's end."""
    deadline = time.monotonic() + SECONDS
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def booting(box: Box) -> Iterator[Place]:
    """All that was started is killed with the block."""
    place = Place(box)
    try:
        yield place
    finally:
        for command in place.commands:
            command.close()
        for pid in place.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
