"""Calls of the library, each in a process of its own to which something happens at the n-th QMP command.

A process is forked for each from one that has everything loaded, so hundreds take minutes. Orders and
answers are lines of JSON: `Zygote` is our end, and the module run as a program the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pullback
from pullback import errors
from pullback.engine import monitor, scratch
from victim import guards_of

_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A call, and what happens to it."""

    socket: str
    state: str
    #: A method of the library's machine, and its arguments.
    call: str
    words: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    #: "": nothing; refuse; before, after: a signal then, `all` to its guard as well.
    how: str = ""
    #: The command, from 1.
    number: int = 0
    signal: int = signal.SIGKILL
    all: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """How it went."""

    #: Exit status, or minus the signal.
    code: int
    #: The error's code, "" if there was none.
    error: str
    #: What else was said: a traceback, if there was one.
    said: str
    #: The commands that were sent.
    commands: list[str]


class Zygote:
    """Our end."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    def run(self, order: Order) -> Told:
        """Do it, and wait for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**asdict(order), "log": str(self._log)}) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())
        lines = self._log.read_text().splitlines()
        commands = [line[1:] for line in lines if line.startswith(">")]
        error = next((line[1:] for line in lines if line.startswith("!")), "")
        said = "\n".join(line for line in lines if line[:1] not in ">!")
        return Told(code=code, error=error, said=said, commands=commands)


@contextlib.contextmanager
def zygote(directory: Path) -> Iterator[Zygote]:
    """It lives while the block runs."""
    words = [sys.executable, __file__]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Zygote(process, directory / "commands.log")
    finally:
        process.communicate(timeout=_SECONDS)


# -- the other end ---------------------------------------------------------------------------


def _strike(order: dict[str, Any]) -> None:
    if order["all"]:
        for guard in guards_of(os.getpid()):
            os.kill(guard, signal.SIGKILL)
    os.kill(os.getpid(), order["signal"])


def _arm(order: dict[str, Any], log: Any) -> None:
    real = monitor.Monitor.execute
    seen: list[str] = []

    async def execute(self: monitor.Monitor, name: str, *words: Any, **options: Any) -> object:
        seen.append(name)
        print(f">{name}", file=log, flush=True)
        now = len(seen) == order["number"]
        if now and order["how"] == "refuse":
            raise errors.RefusedError(command=name, reason="refused by the test")
        if now and order["how"] == "before":
            _strike(order)
        try:
            return await real(self, name, *words, **options)
        finally:
            if now and order["how"] == "after":
                _strike(order)

    monitor.Monitor.execute = execute  # type: ignore[method-assign,assignment]


async def _call(order: dict[str, Any]) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with pullback.connect(f"qmp:{order['socket']}", state_dir=Path(order["state"])) as machine:
        await getattr(machine, order["call"])(*order["words"], **order["options"])


def _child(order: dict[str, Any]) -> int:
    with open(order["log"], "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        _arm(order, log)
        try:
            asyncio.run(_call(order))
        except errors.PullbackError as error:
            print(f"!{error.code}", file=log)
            print(str(error), getattr(error, "__notes__", ""), file=log)
            return 1
        except asyncio.CancelledError:
            return 143
    return 0


def main() -> None:
    """Fork for each order, and tell its status."""
    scratch._MINIMUM_FREE = 16 << 20
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = _child(order)
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    main()
