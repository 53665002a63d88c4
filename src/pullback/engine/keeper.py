"""The keeper: a process of its own that watches a lasting snapshot while nobody is connected.

A snapshot that outlives its command still must not hurt the guest or the host. The keeper lets go of
it when its scratch leaves too little free or does not answer, when the process that owns it ends, or
when a push has come to its end; and when QEMU ends it removes the files. It holds no connection and
no lock meanwhile: the monitor serves one client, and that should be the user's.

The guard of the command that made the snapshot becomes it (`guard.keep`), which takes no time; one that
died is started anew by the next connection. Its own end is `keeping`.
"""

from __future__ import annotations

import asyncio
import fcntl
import subprocess
import sys
from pathlib import Path

from pullback.programs import process

_PROCESS = "pullback.engine.keeping"
#: The shell ends at once, so that the keeper is nobody's child: neither a zombie later, nor waited for.
_DETACHED = '"$@" &'
_START_SECONDS = 10.0


def words(record: Path) -> list[str]:
    """The keeper's command."""
    return [sys.executable, "-m", _PROCESS, str(record)]


def lock_path(record: Path) -> Path:
    """What a living keeper holds locked."""
    return record.with_suffix(".keeper")


def lives(record: Path) -> bool:
    """Has the job a keeper?"""
    try:
        with open(lock_path(record), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


async def ensure(record: Path) -> None:
    """Start a keeper for a lasting job that has none (killed with its session, or at the end of its memory)."""
    if not lives(record):
        await asyncio.to_thread(_start, record)


def _start(record: Path) -> None:
    subprocess.run(
        ["/bin/sh", "-c", _DETACHED, "sh", *words(record)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, cwd="/", env=process.environment(None), timeout=_START_SECONDS, check=True,
    )  # fmt: skip
