"""Files of a repository directory: read without being led astray, written so that they last.

Somebody else may have put things there. So a file is opened only if it is a regular file itself
(a symbolic link could lead anywhere, a FIFO would hang us), and is read up to a bound.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from pullback import errors

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM})


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of the regular file `path`, for reading.

    Raises `OSError`: ELOOP for a symbolic link, EINVAL for anything else that is no regular file.
    """
    # O_NONBLOCK: without it, opening a FIFO waits for its other end.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield descriptor
    finally:
        os.close(descriptor)


def read(path: Path, *, limit: int) -> bytes:
    """The content of a regular file, at most `limit` + 1 bytes of it (so that "longer" shows)."""
    with opened(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        return file.read(limit + 1)


def is_directory(path: Path) -> bool:
    """Is it a directory itself, and no link to one? Raises `PermissionDenied` if that cannot be seen."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(path)) from error
    except OSError:
        return False


def names(directory: Path) -> list[str]:
    """What lies in a directory, sorted; nothing if it is not there. Raises `PermissionDenied`."""
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(directory)) from error


def allocated(path: Path) -> int:
    """Bytes that the file takes on its file system."""
    return path.lstat().st_blocks * 512  # unit of st_blocks on Linux, whatever the file system (stat(2))


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not be there yet (mode 0600), durably."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file's content, or a directory's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it (links are removed, not followed); absent is fine."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors of writing into ours: `DestinationFull`, `PermissionDenied`, `CannotWrite`."""
    try:
        yield
    except OSError as error:
        raise _unwritten(path, error) from error
    except errors.ProgramFailed as error:
        if os.strerror(errno.ENOSPC) in error.message or os.strerror(errno.EDQUOT) in error.message:
            raise errors.DestinationFull(path=str(path)) from error
        raise errors.CannotWrite(path=str(path), reason=error.message) from error


def _unwritten(path: Path, error: OSError) -> errors.PullbackError:
    if error.errno in _FULL:
        return errors.DestinationFull(path=str(path))
    if error.errno in _DENIED:
        return errors.PermissionDenied(path=str(path))
    return errors.CannotWrite(path=str(path), reason=error.strerror or str(error))


@contextlib.contextmanager
def judging(point: str, name: str) -> Iterator[None]:
    """Turn what goes wrong with the file `name` of a restore point into `VerificationFailed`.

    A lack of permission stays what it is: `PermissionDenied`. `ValueError` carries what is wrong
    with the content.
    """
    try:
        yield
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(error.filename or name)) from error
    except FileNotFoundError as error:
        raise errors.VerificationFailed(point=point, problem=f"{name} is missing") from error
    except OSError as error:
        problem = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        raise errors.VerificationFailed(point=point, problem=f"{name} {problem}") from error
    except ValueError as error:
        raise errors.VerificationFailed(point=point, problem=f"{name}: {error}") from error
