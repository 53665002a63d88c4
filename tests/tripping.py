"""The command `pullback`, to which something happens right before its n-th step.

python tests/tripping.py us 7 - rollback qmp:…        killed; its guard lives
python tests/tripping.py both qom-set:2 - rollback …  killed before the second command of that name, its guard too
python tests/tripping.py term 7 - rollback qmp:…      SIGTERM
python tests/tripping.py qemu 7 4711 rollback qmp:…   that QEMU is killed

A step is a QMP command that changes something, a write, a request for zeroes or a flush of a disk or a staged file, and
each change of what is written down. Steps are counted over all threads. At the end their number is printed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from pullback import state
from pullback.cli import main as cli
from pullback.engine import monitor, scratch
from pullback.flows import staging
from pullback.state import rollbacks
from pullback.transfer.file import FileChannel
from pullback.transfer.nbd import NbdChannel
from victim import guards_of

#: Commands that change nothing.
_QUESTIONS = ("query-", "qom-get", "x-debug-query")
_lock = threading.Lock()
_seen: list[str] = []


def arm(how: str, moment: str, victim: str) -> None:
    """Let it happen before that step: a number, or NAME:OCCURRENCE."""
    wanted, _, occurrence = moment.partition(":")

    def step(name: str) -> None:
        with _lock:
            _seen.append(name)
            if _seen.count(name) == int(occurrence) and name == wanted if occurrence else len(_seen) == int(wanted):
                _strike(how, victim)

    _count(monitor.Monitor, "execute", step)
    for kind in (NbdChannel, FileChannel):
        for name in ("write", "zero", "flush"):
            _count(kind, name, step)
    for module, name in ((rollbacks, "save"), (rollbacks, "_unlink"), (rollbacks, "_clear"), (staging, "_durably")):
        _count(module, name, step)
    _count(state.Job, "save", step)
    _count(state.Job, "remove", step)


def _count(owner: Any, name: str, step: Callable[[str], None]) -> None:
    real = getattr(owner, name)

    def counted(*words: Any, **options: Any) -> Any:
        told = str(words[1]) if name == "execute" else f"{owner.__name__.rpartition('.')[2]}.{name}"
        if not told.startswith(_QUESTIONS):
            step(told)
        return real(*words, **options)

    setattr(owner, name, counted)


def _strike(how: str, victim: str) -> None:
    if how == "qemu":
        os.kill(int(victim), signal.SIGKILL)
        return
    if how == "both":
        for guard in guards_of(os.getpid()):
            os.kill(guard, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGTERM if how == "term" else signal.SIGKILL)


def main(how: str, moment: str, victim: str, *words: str) -> None:
    """See the module."""
    scratch._MINIMUM_FREE = 16 << 20  # as in tests/conftest.py
    arm(how, moment, victim)
    sys.argv = ["pullback", *words]
    try:
        cli.main()
    finally:
        print(f"steps {len(_seen)}", file=sys.stderr)
        if moment == "0":
            print("\n".join(_seen), file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
