"""A repository in a directory: files appear whole and durable, or not at all.

A file is written under a temporary name beside its place, synced, renamed, and its directory is
synced. restic takes no notice of such names (tried with 0.14), and uses the like itself.

All paths are taken from one descriptor of the repository's directory: when its file system is taken
away, we get errors instead of filling the empty mount point.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pullback import errors
from pullback.repo.store import MAX_WHOLE, Kind, Stored, is_name, path_of
from pullback.units import KiB, MiB

_CONNECTIONS = 4
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM})
#: The file system is away: network, FUSE server, device.
_AWAY = frozenset(
    {errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH}
)
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})
#: Not this file system, or not this memory or length.
_NOT_DIRECTLY = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS})
#: O_NONBLOCK: without it, opening a FIFO waits for its other end.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_TEMPORARY = re.compile(r"(config|[0-9a-f]{64})-tmp-pullback-[0-9a-f]{16}", re.ASCII)
_LEFT_SECONDS = 24 * 3600
#: Memory, offset and length of a direct write are multiples of this: no device wants more in practice.
_PAGE = 4 * KiB
#: Smaller files are not worth the extra calls.
_DIRECT = 1 * MiB


class LocalStore:
    """A directory as a `Store`. Symbolic links in the place of files are not followed."""

    def __init__(self, path: Path, root: int) -> None:
        """Use `open` or `create`."""
        self.url = str(path)
        self.connections = _CONNECTIONS
        self._root: int | None = root
        self._directory_mode, self._file_mode = _modes(root)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The directory of a repository; raises `NoRepository` if there is none with a config."""
        try:
            root = os.open(path, _DIRECTORY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise errors.NoRepository(path=str(path)) from error
        except OSError as error:
            raise _broken(str(path), "opening", error) from error
        try:
            os.stat(Kind.CONFIG.value, dir_fd=root, follow_symlinks=False)
            return cls(path, root)
        except OSError as error:
            os.close(root)
            if isinstance(error, FileNotFoundError):
                raise errors.NoRepository(path=str(path)) from error
            raise _broken(str(path), "opening", error) from error

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make the directories of a new repository; its config is still to be written.

        The directory may be there if it is empty. The one above it must be there, because it is not
        when its file system is not mounted.
        """
        with _writing(str(path)):
            if not path.parent.is_dir():
                reason = f"there is no directory {path.parent} (is its file system mounted?)"
                raise errors.CannotWrite(path=str(path), reason=reason)
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            try:
                root = os.open(path, _DIRECTORY)
            except NotADirectoryError as error:
                raise errors.CannotWrite(path=str(path), reason="a file is in its place") from error
        try:
            with _writing(str(path)):
                _require_unused(path, root)
                _make_directories(root)
            return cls(path, root)
        except BaseException:
            os.close(root)
            raise

    # -- reading -----------------------------------------------------------------------------

    def list(self, kind: Kind) -> Iterator[Stored]:
        """See `Store`."""
        if kind is Kind.CONFIG:
            with contextlib.suppress(errors.ObjectMissing), self._opened(kind, "") as (_, status):
                yield _stored("", status)
            return
        if kind is not Kind.DATA:
            yield from self._listed(kind.value, "")
            return
        for name in sorted(self._names(kind.value)):
            if re.fullmatch("[0-9a-f]{2}", name, re.ASCII):
                yield from self._listed(f"{kind.value}/{name}", name)

    def read(self, kind: Kind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store`. A file that the disk cannot read (EIO) is an `ObjectDamaged`."""
        with self._opened(kind, name) as (descriptor, status):
            wanted = status.st_size - offset if length is None else length
            if wanted < 0 or offset + wanted > status.st_size or (length is None and wanted > MAX_WHOLE):
                raise self._damaged(kind, name, f"it has {status.st_size} bytes")
            try:
                content = _pread(descriptor, offset, wanted)
            except OSError as error:
                if error.errno in _AWAY:
                    raise _broken(self.url, "reading", error) from error
                raise self._damaged(kind, name, f"it cannot be read ({error.strerror})") from error
            if len(content) != wanted:
                raise self._damaged(kind, name, "it became shorter while it was read")
            return content

    def size(self, kind: Kind, name: str) -> int:
        """See `Store`."""
        with self._opened(kind, name) as (_, status):
            return status.st_size

    @contextlib.contextmanager
    def _opened(self, kind: Kind, name: str) -> Iterator[tuple[int, os.stat_result]]:
        path = path_of(kind, name)
        try:
            descriptor = os.open(path, _READ, dir_fd=self._directory())
        except FileNotFoundError as error:
            self._require_there()
            raise errors.ObjectMissing(store=self.url, name=path) from error
        except OSError as error:
            if error.errno in _DENIED:
                raise errors.PermissionDenied(path=f"{self.url}/{path}") from error
            if error.errno in _AWAY:
                raise _broken(self.url, f"opening {path}", error) from error
            problem = (
                "it is a symbolic link" if error.errno == errno.ELOOP else f"it cannot be opened ({error.strerror})"
            )
            raise self._damaged(kind, name, problem) from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise self._damaged(kind, name, "it is no regular file")
            yield descriptor, status
        finally:
            os.close(descriptor)

    def _listed(self, directory: str, prefix: str) -> Iterator[Stored]:
        for name in self._names(directory):
            if is_name(name) and name.startswith(prefix):
                try:
                    status = os.stat(f"{directory}/{name}", dir_fd=self._directory(), follow_symlinks=False)
                except FileNotFoundError:  # deleted meanwhile
                    continue
                except OSError as error:
                    raise _broken(self.url, f"listing {directory}", error) from error
                if stat.S_ISREG(status.st_mode):
                    yield _stored(name, status)

    def _names(self, directory: str) -> Sequence[str]:
        try:
            descriptor = os.open(directory, _DIRECTORY, dir_fd=self._directory())
        except (FileNotFoundError, NotADirectoryError):
            self._require_there()
            return []
        except OSError as error:
            raise _broken(self.url, f"listing {directory}", error) from error
        try:
            return os.listdir(descriptor)
        except OSError as error:
            raise _broken(self.url, f"listing {directory}", error) from error
        finally:
            os.close(descriptor)

    # -- writing -----------------------------------------------------------------------------

    def write(self, kind: Kind, name: str, data: bytes | bytearray | memoryview, *, new: bool = False) -> None:
        """See `Store`."""
        path = path_of(kind, name)
        directory = path.rpartition("/")[0]
        temporary = f"{path}-tmp-pullback-{secrets.token_hex(8)}"
        with _writing(f"{self.url}/{path}"), contextlib.ExitStack() as undo:
            descriptor = self._begin(temporary, directory)
            undo.callback(self._remove, temporary)
            try:
                _write_all(descriptor, data)
                _sync(descriptor)
                # Read-only, as restic leaves its files, so that no accident changes them.
                with contextlib.suppress(PermissionError):
                    os.fchmod(descriptor, self._file_mode & ~0o222)
            finally:
                os.close(descriptor)
            self._put_in_place(temporary, path, new=new)
            self._sync_directory(directory or ".")

    def _begin(self, temporary: str, directory: str) -> int:
        try:
            return os.open(temporary, _NEW, self._file_mode, dir_fd=self._directory())
        except FileNotFoundError:
            self._require_there()
            # The directories were there when the repository was made, but other tools may have cleared some.
            above = directory.rpartition("/")[0]
            for each in filter(None, (above, directory)):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(each, self._directory_mode, dir_fd=self._directory())
                self._sync_directory(each.rpartition("/")[0] or ".")
            return os.open(temporary, _NEW, self._file_mode, dir_fd=self._directory())

    def _put_in_place(self, temporary: str, path: str, *, new: bool) -> None:
        root = self._directory()
        if not new:
            os.rename(temporary, path, src_dir_fd=root, dst_dir_fd=root)
            return
        try:
            os.link(temporary, path, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)
        except FileExistsError as error:
            raise errors.AlreadyStored(store=self.url, name=path) from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A file system without hard links (FAT, some network ones): the best there is.
            if self._exists(path):
                raise errors.AlreadyStored(store=self.url, name=path) from error
            os.rename(temporary, path, src_dir_fd=root, dst_dir_fd=root)

    def delete(self, kind: Kind, name: str) -> None:
        """See `Store`."""
        path = path_of(kind, name)
        with _writing(f"{self.url}/{path}"):
            try:
                os.unlink(path, dir_fd=self._directory())
            except FileNotFoundError:
                self._require_there()
                return
            self._sync_directory(path.rpartition("/")[0] or ".")

    def tidy(self) -> None:
        """See `Store`. Times are compared by the clock of the file system, which may be another machine's."""
        now = self._file_system_time()
        shards = [f"{Kind.DATA.value}/{name}" for name in self._names(Kind.DATA.value)]
        kinds = [kind.value for kind in Kind if kind not in (Kind.CONFIG, Kind.DATA)]
        for directory in (".", *kinds, *shards):
            for name in self._names(directory):
                if _TEMPORARY.fullmatch(name):
                    self._remove_if_old(f"{directory}/{name}", now)

    def _file_system_time(self) -> float:
        probe = f"{Kind.CONFIG.value}-tmp-pullback-{secrets.token_hex(8)}"
        with _writing(f"{self.url}/{probe}"):
            descriptor = os.open(probe, _NEW, self._file_mode, dir_fd=self._directory())
            try:
                return os.fstat(descriptor).st_mtime
            finally:
                os.close(descriptor)
                self._remove(probe)

    def _remove_if_old(self, path: str, now: float) -> None:
        with contextlib.suppress(FileNotFoundError), _writing(f"{self.url}/{path}"):
            status = os.stat(path, dir_fd=self._directory(), follow_symlinks=False)
            if now - status.st_mtime > _LEFT_SECONDS:
                self._remove(path)

    # -- the directory itself ----------------------------------------------------------------

    def hurry(self) -> None:
        """See `Store`: nothing is tried twice here."""

    def close(self) -> None:
        """See `Store`."""
        root, self._root = self._root, None
        if root is not None:
            os.close(root)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _directory(self) -> int:
        if self._root is None:
            raise errors.StoreUnreachable(store=self.url, reason="it is closed")
        return self._root

    def _require_there(self) -> None:
        """Something was not found: is it that the whole directory is gone?"""
        try:
            links = os.fstat(self._directory()).st_nlink
        except OSError as error:
            raise _broken(self.url, "looking at the directory", error) from error
        if links == 0:
            raise errors.StoreUnreachable(store=self.url, reason="its directory was removed")

    def _exists(self, path: str) -> bool:
        try:
            os.stat(path, dir_fd=self._directory(), follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _remove(self, path: str) -> None:
        """Remove a temporary file, whatever became of it."""
        with contextlib.suppress(OSError):
            os.unlink(path, dir_fd=self._root)

    def _sync_directory(self, path: str) -> None:
        descriptor = os.open(path, _DIRECTORY, dir_fd=self._directory())
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)

    def _damaged(self, kind: Kind, name: str, problem: str) -> errors.ObjectDamaged:
        return errors.ObjectDamaged(store=self.url, name=path_of(kind, name), problem=problem)


def _modes(root: int) -> tuple[int, int]:
    """Modes of directories and files: the group may use the repository if it may read its config, as with restic."""
    try:
        shared = os.stat(Kind.CONFIG.value, dir_fd=root).st_mode & 0o040
    except OSError:
        shared = 0
    return (0o770, 0o660) if shared else (0o700, 0o600)


def _require_unused(path: Path, root: int) -> None:
    names = os.listdir(root)
    if Kind.CONFIG.value in names:
        raise errors.RepositoryExists(path=str(path))
    if set(names) - {"lost+found"}:
        raise errors.NotARepository(path=str(path), problem="there is no config")


def _make_directories(root: int) -> None:
    """All directories at once, as restic makes them (its design document lists them)."""
    kinds = [kind.value for kind in Kind if kind is not Kind.CONFIG]
    for name in (*kinds, *(f"{Kind.DATA.value}/{shard:02x}" for shard in range(256))):
        os.mkdir(name, 0o700, dir_fd=root)
    data = os.open(Kind.DATA.value, _DIRECTORY, dir_fd=root)
    try:
        _sync(data)
    finally:
        os.close(data)
    _sync(root)


def _stored(name: str, status: os.stat_result) -> Stored:
    return Stored(name=name, size=status.st_size, modified=datetime.fromtimestamp(status.st_mtime, UTC))


def _pread(descriptor: int, offset: int, length: int) -> bytes:
    content = os.pread(descriptor, length, offset)
    if len(content) == length:
        return content
    parts = [content]
    while content and (missing := length - sum(map(len, parts))):
        content = os.pread(descriptor, missing, offset + length - missing)
        parts.append(content)
    return b"".join(parts)


def _write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    rest = _write_directly(descriptor, memoryview(data).cast("B"))
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _write_directly(descriptor: int, data: memoryview) -> memoryview:
    """Write a large file past the page cache, as far as that is possible here; gives the rest.

    For a GiB in packs, ext4 on Linux 6 took 1.4 s of processor time through the page cache and 0.1 s past it, at
    the same speed. And what a backup writes pushes nothing out of the memory of a host of machines. Needs memory
    in whole pages.
    """
    whole = len(data) // _PAGE * _PAGE
    if whole < _DIRECT:
        return data
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    done = 0
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        try:
            while done < whole and done % _PAGE == 0:
                done += os.write(descriptor, data[done:whole])
        finally:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    except OSError as error:
        if error.errno not in _NOT_DIRECTLY:
            raise
    return data[done:]


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # There are network file systems that cannot sync a directory.
        if error.errno not in _NO_SYNC:
            raise


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _broken(path, "writing", error) from error


def _broken(path: str, what: str, error: OSError) -> errors.PullbackError:
    """The system's error as one of ours."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return errors.DestinationFull(path=path)
    if error.errno in _DENIED:
        return errors.PermissionDenied(path=path)
    if error.errno in _AWAY:
        return errors.StoreUnreachable(store=path, reason=reason)
    if what == "writing":
        return errors.CannotWrite(path=path, reason=reason)
    return errors.StoreFailed(store=path, what=what, reason=reason)
