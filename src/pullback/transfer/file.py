"""Disks in files: raw images, block devices, and what a FUSE export shows as a file.

A request on a file cannot be interrupted: if its file system hangs (a FUSE server that is stopped,
NFS), the thread hangs in the kernel with it, and no deadline of ours helps. Whoever needs
deadlines reads over NBD.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from pullback import errors
from pullback.extents import Extent, Mapped, split
from pullback.units import GiB, MiB

#: Threads that may use a file at a time; more only deepens the queue of one device.
CHANNELS = 4
#: Threads that may write to a new file at a time: they take turns at its inode's lock, and spin while they wait.
_WRITERS = 2
#: fallocate(2): FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, the only mode that every file system
#: with holes, and block devices that can zero cheaply, have in common. Of a block device it reads as
#: zeroes afterwards, and is unmapped where the device can (Linux block/fops.c, blkdev_fallocate).
_PUNCH_HOLE = 0x02 | 0x01
#: FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE: of a block device what BLKZEROOUT does. The kernel writes the
#: zeroes where the device cannot, which costs us no copy.
_ZERO_RANGE = 0x10 | 0x01
#: ioctl BLKDISCARD (linux/fs.h), _IO(0x12, 119): start and length in bytes. Content is undefined afterwards:
#: since Linux 4.12 no device is said to read as zeroes then.
_BLKDISCARD = 0x1277
_RANGE = struct.Struct("=QQ")
#: Answers that mean "not here": no holes (EOPNOTSUPP), no such call (ENOSYS), a block device's
#: own alignment (EINVAL). Then zeroes are written.
_NO_HOLES = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})
#: lseek(2) answers that mean that SEEK_DATA is not known there (block devices, some FUSE servers).
_NO_SEEK = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
#: sync_file_range(2): SYNC_FILE_RANGE_WRITE, begin to write and do not wait.
_BEGIN_WRITING = 0x02
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_LONGEST_HOLE = 1 * GiB
#: Zeroes that the kernel may have to write, at a time: nobody can interrupt it.
_LONGEST_ZERO = 64 * MiB
_ZEROES = bytearray(1 * MiB)


def _fallocate_call() -> Callable[[int, int, int, int], int]:
    """fallocate(2), which `os` does not offer with a mode."""
    call = ctypes.CDLL(None, use_errno=True).fallocate64
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    call.restype = ctypes.c_int
    return call


def _sync_file_range_call() -> Callable[[int, int, int, int], int] | None:
    """sync_file_range(2), which `os` does not offer."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        call.restype = ctypes.c_int
    return call


_fallocate = _fallocate_call()
_sync_file_range = _sync_file_range_call()


def _failed(operation: str, path: Path, offset: int, error: OSError) -> errors.PullbackError:
    if error.errno in _FULL:
        return errors.DestinationFull(path=str(path))
    return errors.EndpointFailed(
        operation=operation,
        endpoint=str(path),
        offset=offset,
        reason=error.strerror or str(error),
        errno=error.errno or errno.EIO,
    )


class FileChannel:
    """A descriptor of its own on the same open file, so that closing the endpoint cannot pull it away."""

    def __init__(self, descriptor: int, path: Path, size: int, limit: int | None = None) -> None:
        self._descriptor = descriptor
        self._limit = limit
        self._path = path
        self._size = size
        self._device = stat.S_ISBLK(os.fstat(descriptor).st_mode)

    def read_into(self, offset: int, buffer: bytearray, length: int) -> None:
        """Fill `buffer[:length]`; a file that ends before is an error (`EndpointFailed`)."""
        with memoryview(buffer) as view:
            for part in split([Extent(offset, length)], self._limit or length or 1):
                self._read_part(part, view[part.start - offset : part.end - offset])

    def _read_part(self, part: Extent, view: memoryview) -> None:
        done = 0
        while done < part.length:
            done += self._read_once(part.start + done, view[done:])

    def _read_once(self, offset: int, view: memoryview) -> int:
        try:
            count = os.preadv(self._descriptor, [view], offset)
        except OSError as error:
            raise _failed("read", self._path, offset, error) from error
        if count == 0:
            raise _failed("read", self._path, offset, OSError(errno.EIO, "the file ends here"))
        return count

    def write(self, offset: int, buffer: bytes | bytearray, start: int, length: int) -> None:
        """Write `buffer[start:start + length]` at `offset`; `DestinationFull` when there is no room."""
        self._check_inside("write", offset, length)
        with memoryview(buffer) as view:
            done = 0
            while done < length:
                done += self._write_once(offset + done, view[start + done : start + length])
        if _sync_file_range is not None:
            # Else the kernel gathers gigabytes, and the flush at the end waits for all of them. A failure
            # to write is told by that flush.
            _sync_file_range(self._descriptor, offset, length, _BEGIN_WRITING)

    def _write_once(self, offset: int, view: memoryview) -> int:
        try:
            return os.pwrite(self._descriptor, view, offset)
        except OSError as error:
            raise _failed("write", self._path, offset, error) from error

    def zero(self, offset: int, length: int) -> None:
        """Punch a hole; else have zeroes written by the kernel, or write them."""
        self._check_inside("zero", offset, length)
        for part in split([Extent(offset, length)], _LONGEST_HOLE):
            if not self._fallocate("zero", part, _PUNCH_HOLE):
                self._zero_out(part)

    def zero_quickly(self, offset: int, length: int) -> bool:
        """Make the range read as zeroes without writing any; False where that cannot be."""
        self._check_inside("zero", offset, length)
        return all(
            self._fallocate("zero", part, _PUNCH_HOLE) for part in split([Extent(offset, length)], _LONGEST_HOLE)
        )

    def _zero_out(self, extent: Extent) -> None:
        for part in split([extent], _LONGEST_ZERO):
            if not self._fallocate("zero", part, _ZERO_RANGE):
                self._write_zeroes(part)

    def _write_zeroes(self, extent: Extent) -> None:
        for part in split([extent], len(_ZEROES)):
            self.write(part.start, _ZEROES, 0, part.length)

    def trim(self, offset: int, length: int) -> None:
        """Discard on a block device, else punch a hole; nothing where that is not known."""
        self._check_inside("trim", offset, length)
        for part in split([Extent(offset, length)], _LONGEST_HOLE):
            if self._device:
                self._discard(part)
            else:
                self._fallocate("trim", part, _PUNCH_HOLE)

    def _discard(self, extent: Extent) -> None:
        try:
            fcntl.ioctl(self._descriptor, _BLKDISCARD, _RANGE.pack(extent.start, extent.length))
        except OSError as error:
            if error.errno not in _NO_HOLES | {errno.ENOTTY}:
                raise _failed("trim", self._path, extent.start, error) from error

    def _check_inside(self, operation: str, offset: int, length: int) -> None:
        """A disk does not grow by writing, as a file would."""
        if offset < 0 or offset + length > self._size:
            raise _failed(operation, self._path, offset, OSError(errno.EINVAL, "beyond the end of the disk"))

    def _fallocate(self, operation: str, extent: Extent, mode: int) -> bool:
        """False: it is not known there."""
        while _fallocate(self._descriptor, mode, extent.start, extent.length) != 0:
            number = ctypes.get_errno()
            if number in _NO_HOLES:
                return False
            if number != errno.EINTR:
                raise _failed(operation, self._path, extent.start, OSError(number, os.strerror(number)))
        return True

    def flush(self) -> None:
        """fdatasync(2): what was written, and the size, are durable."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise _failed("flush", self._path, 0, error) from error

    def close(self) -> None:
        """Close the descriptor; twice is fine."""
        descriptor, self._descriptor = self._descriptor, -1
        _close(descriptor)

    def __enter__(self) -> FileChannel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FileEndpoint:
    """A raw image, a block device or a FUSE-exported file as an `Endpoint`.

    `create` makes a new sparse file of that many bytes (mode 0600), and is refused with
    `DestinationExists` when something is there. `request_limit`: no read may cross a multiple of so
    many bytes; the file is read past the page cache then (O_DIRECT), because the kernel's read-ahead
    asks in 128 KiB. Raises `PermissionDenied`, or `EndpointFailed` with the errno.
    """

    def __init__(
        self, path: Path, *, writable: bool = False, create: int | None = None, request_limit: int | None = None
    ) -> None:
        self._path = path
        self._limit = request_limit
        flags = os.O_RDWR if writable or create is not None else os.O_RDONLY
        if create is not None:
            flags |= os.O_CREAT | os.O_EXCL
        if request_limit is not None:
            flags |= os.O_DIRECT
        self._descriptor = _open(path, flags)
        try:
            self._size = self._measure(create)
        except BaseException:
            self.close()
            raise

    def _measure(self, create: int | None) -> int:
        try:
            if create is not None:
                os.ftruncate(self._descriptor, create)
            return os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError as error:
            raise _failed("open", self._path, 0, error) from error

    @property
    def name(self) -> str:
        """The path."""
        return str(self._path)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @property
    def channels(self) -> int:
        """How many channels may be open at a time."""
        return CHANNELS

    def extents(self, window: Extent) -> Iterator[Mapped]:
        """The allocation of `window` by SEEK_DATA; all of it is data where that is not known. Lazy."""
        offset, limit = window.start, min(window.end, self._size)
        while offset < limit:
            start = min(self._seek(offset, os.SEEK_DATA), limit)
            if start > offset:
                yield Mapped(offset, start - offset, zero=True)
            end = min(self._seek(start, os.SEEK_HOLE), limit) if start < limit else limit
            if end > start:
                yield Mapped(start, end - start, zero=False)
            offset = end

    def _seek(self, offset: int, whence: int) -> int:
        """Where data, or a hole, begins at or after `offset`."""
        try:
            return os.lseek(self._descriptor, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self._behind_data(offset)
            if error.errno in _NO_SEEK:
                return offset if whence == os.SEEK_DATA else self._size
            raise _failed("block status", self._path, offset, error) from error

    def _behind_data(self, offset: int) -> int:
        """No data from `offset` on, unless the file was cut short: that would read as zeroes silently."""
        if os.lseek(self._descriptor, 0, os.SEEK_END) < self._size:
            raise _failed("block status", self._path, offset, OSError(errno.EIO, "the file was cut short"))
        return self._size

    def channel(self) -> FileChannel:
        """A new channel."""
        return FileChannel(os.dup(self._descriptor), self._path, self._size, self._limit)

    def close(self) -> None:
        """Close the file; twice is fine. Channels stay usable until they are closed themselves."""
        descriptor, self._descriptor = self._descriptor, -1
        _close(descriptor)

    def __enter__(self) -> FileEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise errors.DestinationExists(path=str(path)) from error
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(path)) from error
    except OSError as error:
        raise _failed("open", path, 0, error) from error


def _close(descriptor: int) -> None:
    """A file whose FUSE server died says so even at closing (ENOTCONN); it is closed all the same."""
    if descriptor >= 0:
        try:
            os.close(descriptor)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
