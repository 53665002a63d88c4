"""What the cases of the table of mishaps share: a machine with restore points, and the table itself."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kit

PAGE = Path(__file__).parents[1] / "docs" / "exit-codes.md"
Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    what: str
    sentence: str
    hint: str
    exit: int


def rows() -> list[Row]:
    """The lines of the tables in the section "What goes wrong"."""
    section = PAGE.read_text(encoding="utf-8").partition("## What goes wrong")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and "| ---" not in line]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [Row(what, said, hint, int(code)) for what, said, hint, code in cells if code != "exit"]


class World:
    """A running machine with two restore points in a repository, and what else the cases need."""

    def __init__(self, directory: Path, make: kit.MakeBox) -> None:
        self.directory = directory
        self.make = make
        self.state = directory / "state"
        self.box = make()
        self.repository = directory / "repo"
        for value in (1, 2):
            self.box.write("vda", value, 0, 1 << 20)
            assert self.backup().returncode == 0
        self.made = 0

    def fresh(self, name: str) -> Path:
        """A path that nobody used."""
        self.made += 1
        return self.directory / f"{self.made}-{name}"

    def run(self, *words: object, **options: Any) -> Done:
        """The command line."""
        return kit.run_cli(*words, state=self.state, **options)

    def backup(self, *words: object, machine: object = None, repository: Path | None = None) -> Done:
        """A backup of the machine."""
        where = repository or self.repository
        return self.run("backup", machine or f"qmp:{self.box.qmp}", "-r", f"dir:{where}", *words)

    def restore(self, *words: object, repository: Path | None = None) -> Done:
        """A restore from the repository."""
        to = () if "--to" in words else ("--to", self.fresh("out"))
        return self.run("restore", "-r", f"dir:{repository or self.repository}", *to, *words)

    def list(self, repository: Path, *words: object) -> Done:
        """A listing."""
        return self.run("list", "-r", f"dir:{repository}", *words)

    def copy(self) -> Path:
        """A copy of the repository, to be spoilt."""
        return Path(shutil.copytree(self.repository, self.fresh("copy")))


Said = tuple[Done, dict[str, object]]
CASES: dict[str, Callable[[World], Said]] = {}


def case(what: str) -> Callable[[Callable[[World], Said]], Callable[[World], Said]]:
    """The function makes that line of the table happen; it gives the outcome, and what its capitals stand for."""

    def keep(function: Callable[[World], Said]) -> Callable[[World], Said]:
        CASES[what] = function
        return function

    return keep


@contextlib.contextmanager
def listening(path: Path, greeting: bytes) -> Iterator[None]:
    """A server that says one thing to whoever comes, and hangs up if that is nothing."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(4)
        held = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    client.sendall(greeting)
                    if greeting:
                        held.append(client)
                    else:
                        client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            for client in held:
                client.close()
