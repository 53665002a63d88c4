"""Locks on a repository directory: flock, so that a killed holder holds nothing.

One writer per machine (`.lock` in the machine's directory). Readers do not meet the writer: a point
is complete before it can be seen and is never changed. What a reader must fear is that the point
is removed while it reads; so it shares a lock on the manifest, which removing wants alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pullback import errors
from pullback.model.texts import showable
from pullback.repo import files
from pullback.units import KiB

_HELD = frozenset({errno.EAGAIN, errno.EACCES})
_TEXT_LIMIT = 4 * KiB


@contextlib.contextmanager
def writer(path: Path, *, what: str, command: str) -> Iterator[None]:
    """Hold the lock file `path` alone; it tells others who we are: `{"pid", "host", "command", "since"}`.

    Raises `BusyError` with the holder's words if it is held, else as `files.writing` does.
    """
    with files.writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _take(descriptor, path, what)
        with files.writing(path):
            _replace(descriptor, _ourselves(command))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise errors.BusyError(what=what, holder=_holder(descriptor)) from error
        raise errors.CannotWrite(path=str(path), reason=f"it cannot be locked ({error.strerror})") from error


def _ourselves(command: str) -> bytes:
    return json.dumps(
        {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": command[:1000],
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    ).encode()


def _replace(descriptor: int, data: bytes) -> None:
    # Shorter than a sector and of no use after a crash: neither atomic nor synced.
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)


def _holder(descriptor: int) -> str:
    """Who holds the lock, in words; the text is whatever stands in the file."""
    try:
        told = json.loads(os.pread(descriptor, _TEXT_LIMIT, 0))
        text = f"{told['command']} (process {told['pid']} on {told['host']}) since {told['since']}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "somebody else writes there"
    return showable(text)


@contextlib.contextmanager
def reader(path: Path) -> Iterator[None]:
    """Share the file `path` with other readers while the block runs, if that is possible.

    A file that cannot be locked (no permission, a file system without locks) is read without:
    reading must never need more than reading. Raises `FileNotFoundError` if it is not there
    (any more), and `OSError` as `files.opened` does.
    """
    with files.opened(path) as descriptor:
        _share(descriptor, path)
        if not _same(descriptor, path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        yield


def _share(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise errors.BusyError(what=str(path.parent), holder="it is being removed") from error


def _same(descriptor: int, path: Path) -> bool:
    """Is the open file still the one at `path`? (It may have been removed before we had the lock.)"""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def remover(path: Path) -> Iterator[None]:
    """Hold the file `path` against readers. Raises `BusyError` if there are any, `OSError` of opening."""
    # For writing, because NFS turns flock into a lock that demands it (flock(2)).
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _take_from_readers(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _take_from_readers(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise errors.BusyError(what=str(path.parent), holder="somebody reads it") from error
        raise
