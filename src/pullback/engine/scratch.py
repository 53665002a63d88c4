"""Scratch: the images that take a guest's old blocks, and the rules that keep them from hurting it.

A scratch that hangs would hang the guest's writes (until the copy timeout) and, worse, every
draining command; a scratch that fills the host's file system could fill the guest's too. So: only
on a local file system, only with room to spare, watched while it grows.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import stat
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from pullback import errors, units
from pullback.model.backups import Fleecing, Scratch
from pullback.model.disks import Disk
from pullback.programs import qemu_img

#: Seconds that a guest's write waits at most for its old block to be copied; then the snapshot breaks. Not more:
#: QEMU before 9.1 keeps it as 32 bits of nanoseconds, so that 5 s are 0.7 s (tried, 7.2).
COPY_TIMEOUT = 4
#: Scratch that does not answer a small write within this is taken for hanging.
ANSWER_SECONDS = 5.0
_TOUCH = 'umask 077; echo > "$1" && sync "$1"; rm -f "$1"'
#: Children that hang are kept: they cannot be waited for, and are nobody's errors.
_hanging: list[subprocess.Popen[bytes]] = []
_MINIMUM_FREE = units.GiB
_WATCH_SECONDS = 0.5
#: So often is a running job's scratch asked for an answer.
_ASK_SECONDS = 5.0
#: File systems whose writes do not depend on another machine or on a user process.
_LOCAL = {
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "reiserfs", "tmpfs", "xfs", "zfs",
}  # fmt: skip
_FALLOC_KEEP_SIZE = 1


def needed(disks: Iterable[Disk]) -> int:
    """Bytes that must stay free where scratch lies: 1 GiB, or 5 % of the disks if that is more."""
    return needed_bytes(disk.size for disk in disks)


def needed_bytes(sizes: Iterable[int]) -> int:
    """The same, by the sizes of the disks."""
    return max(_MINIMUM_FREE, sum(sizes) // 20)


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
    judge(directory, disks)


def judge(directory: Path, disks: Iterable[Disk]) -> None:
    """The same of a directory that is there; nothing is made."""
    kind = file_system(directory)
    if not is_local(kind):
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


def is_local(kind: str) -> bool:
    """Does a file system of that type depend on no other machine and on no user process?"""
    return kind in _LOCAL


async def watch(directory: Path, disks: Iterable[Disk]) -> None:
    """Run until less than `needed` is free (`ScratchSpace`) or the file system hangs (`ScratchUnsuitable`).

    Cancelled by its owner. A hang is asked for, because a discard that hangs would not be noticed
    before its own deadline, which is meant for slow disks.
    """
    wanted = needed(disks)
    asked = time.monotonic()
    while True:
        room(directory, wanted)
        if time.monotonic() - asked >= _ASK_SECONDS:
            await require_answer(directory)
            asked = time.monotonic()
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


def check_new(path: Path, disks: Iterable[Disk]) -> None:
    """May a scratch image be made under a name that the user chose? The rules of its directory are the same."""
    if path.exists() or path.is_symlink():
        raise errors.DestinationExists(path=str(path))
    if not path.parent.is_dir():
        raise errors.ScratchUnsuitable(path=str(path.parent), reason="it is no directory")
    check(path.parent, disks)


def take(chosen: Scratch, disk: Disk, fleecing: Fleecing, owner: tuple[int, int] | None) -> None:
    """Make, format or check the place that the user chose for a disk's old blocks."""
    if chosen.ours:
        create(chosen.path, disk, fleecing, owner)
    elif chosen.block:
        _take_device(chosen.path, disk, fleecing)
    else:
        _require_empty(chosen.path, disk)


def _take_device(path: Path, disk: Disk, fleecing: Fleecing) -> None:
    if not path.is_block_device():
        raise errors.ScratchUnsuitable(path=str(path), reason="it is no block device")
    with open(path, "rb") as device:
        length = device.seek(0, os.SEEK_END)
    if length < disk.size:
        reason = f"it has {units.format_size(length)}, and disk {disk.target} has {units.format_size(disk.size)}"
        raise errors.ScratchUnsuitable(path=str(path), reason=reason)
    if fleecing is Fleecing.CLASSIC:
        qemu_img.create(path, disk.size)


def _require_empty(path: Path, disk: Disk) -> None:
    """A scratch image with old data in it would show that in place of the disk's."""
    try:
        found = qemu_img.info(path, format="qcow2")
        mapped = qemu_img.allocated(path, format="qcow2")
    except errors.ProgramFailed as error:
        raise errors.ScratchUnsuitable(path=str(path), reason=f"it is no qcow2 image ({error.message})") from error
    if found.virtual_size != disk.size:
        raise errors.ScratchUnsuitable(
            path=str(path), reason=f"it has {found.virtual_size} bytes, the disk {disk.size}"
        )
    if found.backing or mapped:
        raise errors.ScratchUnsuitable(path=str(path), reason="it is not empty")


def remove_chosen(path: Path) -> None:
    """Remove an image that we made under a user's name, if it still is a file of ours alone."""
    try:
        status = path.lstat()
    except OSError:
        return
    if stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600:
        path.unlink(missing_ok=True)


def _reserve(descriptor: int, directory: Path, disk: Disk) -> bool:
    """Allocate a disk's size, and 1/64 for tables, behind the end of file, if room is left then."""
    length = disk.size + disk.size // 64 + units.MiB
    if free_bytes(directory) - length < needed([disk]):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return bool(libc.fallocate(descriptor, _FALLOC_KEEP_SIZE, 0, length) == 0)


async def answers(directory: Path, seconds: float | None = None) -> bool:
    """Does the file system of scratch still answer? A small write and sync of a child's, under a deadline.

    An error is an answer too. Asked before draining commands: QEMU would wait in them for ever,
    with its main lock held, for a scratch that hangs. A child, because a write that hangs cannot be
    killed, and no process ends before all its threads do; it removes its file when the hang ends.
    """
    if not directory.is_dir():
        return True  # nothing of ours can hang there
    path = directory / f".pullback-answer-{os.getpid()}-{secrets.token_hex(4)}"
    return await _ends(_TOUCH, path, seconds)


async def synced(device: Path, seconds: float | None = None) -> bool:
    """Does a block device still answer? A sync of a child's, under a deadline; an error is an answer."""
    return await _ends('sync "$1"', device, seconds)


async def _ends(script: str, path: Path, seconds: float | None) -> bool:
    """Does a shell script about `path` come to an end in time?"""
    child = subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", path], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True, env={"PATH": os.defpath},
    )  # fmt: skip
    deadline = time.monotonic() + (ANSWER_SECONDS if seconds is None else seconds)
    while child.poll() is None:
        if time.monotonic() > deadline:
            _hanging.append(child)
            return False
        await asyncio.sleep(0.002)
    return True


async def require_answer(directory: Path) -> None:
    """Raise `ScratchUnsuitable` if the file system hangs: making an image there would hang us too."""
    if not await answers(directory):
        raise errors.ScratchUnsuitable(path=str(directory), reason="its file system does not answer")
