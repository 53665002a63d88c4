"""Scratch: the images that take a guest's old blocks, and the rules that keep them from hurting it.

A scratch that hangs would hang the guest's writes (until the copy timeout) and, worse, every
draining command; a scratch that fills the host's file system could fill the guest's too. So: only
on a local file system, only with room to spare, watched while it grows.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pullback import errors, units
from pullback.model.backups import Fleecing
from pullback.model.disks import Disk
from pullback.programs import qemu_img

#: A guest's write waits at most so long for its old block to be copied; then the snapshot breaks.
COPY_TIMEOUT = 5
#: Scratch that does not answer a small write within this is taken for hanging.
ANSWER_SECONDS = 5.0
_MINIMUM_FREE = units.GiB
_WATCH_SECONDS = 0.5
#: File systems whose writes do not depend on another machine or on a user process.
_LOCAL = {
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "reiserfs", "tmpfs", "xfs", "zfs",
}  # fmt: skip
_FALLOC_KEEP_SIZE = 1


def needed(disks: Iterable[Disk]) -> int:
    """Bytes that must stay free where scratch lies: 1 GiB, or 5 % of the disks if that is more."""
    return max(_MINIMUM_FREE, sum(disk.size for disk in disks) // 20)


def check(directory: Path, disks: Iterable[Disk]) -> None:
    """Refuse a directory that is not local, or too full; makes it (mode 0700) if it is not there."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(directory)) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise errors.ScratchUnsuitable(path=str(directory), reason="it is no directory") from error
    except OSError as error:
        raise errors.ScratchUnsuitable(path=str(directory), reason=os.strerror(error.errno or 0)) from error
    kind = file_system(directory)
    if kind not in _LOCAL:
        raise errors.ScratchUnsuitable(path=str(directory), reason=f"its file system {kind!r} is not a local one")
    room(directory, needed(disks))


def room(directory: Path, wanted: int) -> None:
    """Raise `ScratchSpace` if less than `wanted` bytes are free there."""
    free = free_bytes(directory)
    if free < wanted:
        raise errors.ScratchSpace(path=str(directory), free=units.format_size(free), needed=units.format_size(wanted))


def free_bytes(directory: Path) -> int:
    """Bytes that an ordinary user may still write there (statvfs f_bavail)."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, from /proc/self/mountinfo (proc(5))."""
    real = os.path.realpath(path)
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


async def watch(directory: Path, disks: Iterable[Disk]) -> None:
    """Run until less than `needed` is free, then raise `ScratchSpace`. Cancelled by its owner."""
    wanted = needed(disks)
    while True:
        room(directory, wanted)
        await asyncio.sleep(_WATCH_SECONDS)


def create(path: Path, disk: Disk, fleecing: Fleecing, owner: tuple[int, int] | None) -> None:
    """Make the scratch image: raw and sparse for the filter, qcow2 for the classic engine.

    A classic scratch that runs full fails the guest's write (before QEMU 10.1), so its space is
    reserved beforehand where there is enough: allocated behind the end of the file, where qcow2
    will grow. `owner` is the user QEMU runs as.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        if fleecing is Fleecing.FILTER:
            os.truncate(descriptor, disk.size)
        else:
            qemu_img.create(path, disk.size)
            _reserve(descriptor, path.parent, disk)
        if owner is not None and os.geteuid() == 0:
            os.fchown(descriptor, *owner)
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, directory: Path, disk: Disk) -> bool:
    """Allocate a disk's size, and 1/64 for tables, behind the end of file, if room is left then."""
    length = disk.size + disk.size // 64 + units.MiB
    if free_bytes(directory) - length < needed([disk]):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return bool(libc.fallocate(descriptor, _FALLOC_KEEP_SIZE, 0, length) == 0)


async def answers(directory: Path, seconds: float = ANSWER_SECONDS) -> bool:
    """Does the file system of scratch still answer? Our own small write and sync, under a deadline.

    An error is an answer too. Asked before draining commands: QEMU would wait in them for ever,
    with its main lock held, for a scratch that hangs.
    """
    if not directory.is_dir():
        return True  # nothing of ours can hang there
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def attempt() -> None:
        with suppress(OSError):
            _touch(directory)
        with suppress(RuntimeError):  # the loop may be gone when a hang ends
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=attempt, name="scratch-answers", daemon=True).start()
    try:
        async with asyncio.timeout(seconds):
            await done.wait()
    except TimeoutError:
        return False
    return True


def _touch(directory: Path) -> None:
    path = directory / f".pullback-answer-{os.getpid()}"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        path.unlink()
        os.write(descriptor, b"?")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
