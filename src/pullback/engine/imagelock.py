"""QEMU's own lock on an image file, held by us: nobody may open the file for writing meanwhile.

QEMU's lock is a row of bytes (block/file-posix.c): byte 100+n is locked by whoever *uses*
permission n, byte 200+n by whoever *forbids* it to others, both as shared open-file-description
locks; each looks for the other's. A qcow2 image opened for reading forbids writing by itself, but
a raw one, read over NBD, does not (tried on 7.2): a machine could be started on it meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pullback import errors

_USES, _FORBIDS = 100, 200
#: Numbers of the permissions (QEMU's BLK_PERM_WRITE and BLK_PERM_RESIZE).
_WRITE, _RESIZE = 1, 3
_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True, slots=True)
class Lock:
    """A file that is held. Made by `unwritten`."""

    path: Path
    descriptor: int

    def take(self) -> None:
        """Forbid writing. Raises `BusyError` if somebody has it open for that."""
        for permission in (_WRITE, _RESIZE):
            _forbid(self.descriptor, self.path, permission)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """In the block a QEMU of ours may write, which then keeps others away by its own lock."""
        for permission in (_WRITE, _RESIZE):
            fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_UNLCK, _FORBIDS + permission))
        try:
            yield
        finally:
            self.take()


@contextmanager
def unwritten(path: Path) -> Iterator[Lock]:
    """No QEMU writes to the file while the block runs. Raises `BusyError` if one has it open for that."""
    descriptor = _open(path)
    try:
        held = Lock(path, descriptor)
        held.take()
        yield held
    finally:
        os.close(descriptor)


def in_use(path: Path) -> errors.BusyError:
    """The error for an image that somebody has open."""
    return errors.BusyError(what=str(path), holder="it is in use by another process")


def _open(path: Path) -> int:
    """Open for reading; a block device exclusively, which fails if it is mounted, and keeps it from being so."""
    try:
        exclusive = os.O_EXCL if stat.S_ISBLK(path.stat().st_mode) else 0
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | exclusive)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise errors.BusyError(what=str(path), holder="it is mounted, or in use by the kernel") from error
        raise errors.ImageUnusable(path=str(path), reason=os.strerror(error.errno or 0)) from error


def _forbid(descriptor: int, path: Path, permission: int) -> None:
    """First forbid, then look: so of two who come at once, at least one sees the other."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, _FORBIDS + permission))
        found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, _USES + permission))
    except OSError as error:
        reason = f"it cannot be locked ({os.strerror(error.errno or 0)})"
        raise errors.ImageUnusable(path=str(path), reason=reason) from error
    if _FLOCK.unpack(found)[0] != fcntl.F_UNLCK:
        raise in_use(path)


def _lock(kind: int, offset: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0)
