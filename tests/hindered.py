"""Stores in whose way something stands, and the command `pullback` that kills itself at its n-th use of one.

python tests/hindered.py 7 1 backup qmp:…               killed before the seventh operation; packs end at 1 byte
python tests/hindered.py write-snapshots-1 1 backup …   killed before the first file in snapshots/ is written
python tests/hindered.py hang-write-data-1 1 backup …   hangs there
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kit import Box, password_file
from pullback import repo
from pullback.engine import scratch
from pullback.repo import Kind, Store
from pullback.repo.restic import packer
from pullback.testing.stores import Before, WrappedStore
from pullback.units import MiB

#: What a store does to a store.
Wrap = Callable[[Store], Store]


@contextlib.contextmanager
def wrapped(wrap: Wrap) -> Iterator[None]:
    """Every store that is opened while the block runs is wrapped."""
    real = repo.open_store

    def opened(*words: Any, **options: Any) -> Store:
        return wrap(real(*words, **options))

    repo.open_store = opened
    try:
        yield
    finally:
        repo.open_store = real


@contextlib.contextmanager
def hindered(before: Before) -> Iterator[None]:
    """Before each operation of every store that is opened while the block runs, `before` is called."""
    with wrapped(lambda store: WrappedStore(store, before)):
        yield


@contextlib.contextmanager
def small_packs(size: int = 1) -> Iterator[None]:
    """Packs are closed when they have so many bytes (by default each blob has its own), and few are under way."""
    real = packer.PACK_SIZE, packer.IN_FLIGHT
    packer.PACK_SIZE, packer.IN_FLIGHT = size, 2 * MiB
    try:
        yield
    finally:
        packer.PACK_SIZE, packer.IN_FLIGHT = real


def command(box: Box, moment: str, *options: str) -> subprocess.Popen[str]:
    """A backup of a machine, to which that happens."""
    words = [sys.executable, __file__, moment, 1, "backup", f"qmp:{box.qmp}", "-r", box.repository, *options]
    environ = {
        "PULLBACK_STATE_DIR": str(box.directory / "state"),
        "PULLBACK_PASSWORD_FILE": str(password_file(box.directory)),
        "PULLBACK_CACHE_DIR": str(box.access.caches),
    }
    return subprocess.Popen(
        [str(word) for word in words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environ,
    )  # fmt: skip


@dataclass
class Seen:
    """Notes all operations; at one of them something may be done. A `Before`."""

    operations: list[tuple[str, Kind, str]] = field(default_factory=list)
    #: Called in the thread of the operation, for each that it is asked about.
    strike: Callable[[int, str, Kind], None] = lambda number, operation, kind: None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, operation: str, kind: Kind, name: str) -> None:
        with self._lock:
            self.operations.append((operation, kind, name))
            number = len(self.operations)
        self.strike(number, operation, kind)

    def count(self, operation: str, kind: Kind) -> int:
        """So many of these there were."""
        return sum(seen[:2] == (operation, kind) for seen in self.operations)


def main(moment: str, size: str, *words: str) -> None:
    """See the module."""
    from pullback.cli import main as cli

    *what, number = moment.removeprefix("hang-").split("-")
    seen = Seen()

    def strike(at: int, operation: str, kind: Kind) -> None:
        if what in ([], [operation, kind.value]) and int(number) == (seen.count(operation, kind) if what else at):
            if moment.startswith("hang-"):
                print("hangs", flush=True)
                threading.Event().wait()
            os.kill(os.getpid(), signal.SIGKILL)

    seen.strike = strike
    scratch._MINIMUM_FREE = 16 << 20  # as in tests/conftest.py
    sys.argv = ["pullback", *words]
    with hindered(seen), small_packs(int(size)):
        cli.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
