"""File systems of their own for tests: small, full, frozen, foreign. Root only, as `make test` is run."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_FILLER = "filler"
_SECONDS = 30


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, timeout=_SECONDS)


def fill(directory: Path, leave: int = 0) -> None:
    """Take all room there, but for `leave` bytes."""
    with open(directory / _FILLER, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(64 * 1024))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        if leave:
            file.truncate(max(0, file.tell() - leave))


def empty(directory: Path) -> None:
    """Give the room back."""
    (directory / _FILLER).unlink()


def freeze(directory: Path) -> None:
    """From now on every write in the file system waits."""
    _run("fsfreeze", "-f", directory)


@contextlib.contextmanager
def thawed_at_the_end(directory: Path) -> Iterator[None]:
    """The file system may be frozen in the block; nothing could end while it is."""
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", str(directory)], check=False, capture_output=True, timeout=_SECONDS)


class Mount:
    """Mounts below a directory; all are gone with the block."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._stack = stack

    def _point(self, name: str) -> Path:
        point = self._directory / name
        point.mkdir()
        return point

    def tmpfs(self, size: int) -> Path:
        """A file system of `size` bytes in memory."""
        point = self._point(f"tmpfs-{len(os.listdir(self._directory))}")
        _run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", point)
        self._stack.callback(_run, "umount", "-l", point)
        return point

    def ext4(self, size: int) -> Path:
        """A file system of `size` bytes in a file, that can be frozen."""
        image = self._directory / f"ext4-{len(os.listdir(self._directory))}.img"
        with open(image, "wb") as file:
            file.truncate(size)
        _run("mkfs.ext4", "-q", "-F", image)
        point = self._point(f"{image.name}.d")
        _run("mount", "-o", "loop", image, point)
        self._stack.callback(_run, "umount", "-l", point)
        return point

    @contextlib.contextmanager
    def fuse(self) -> Iterator[Path]:
        """A file system that depends on a user process, as all that are not local do in the end."""
        point = self._point(f"fuse-{len(os.listdir(self._directory))}")
        server = subprocess.Popen(
            ["nbdfuse", str(point), "--command", "nbdkit", "-s", "memory", "1M"], stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + _SECONDS
            while not point.is_mount():
                assert time.monotonic() < deadline, "nbdfuse does not mount"
                time.sleep(0.01)
            yield point
        finally:
            subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True, timeout=_SECONDS)
            server.kill()
            server.wait(_SECONDS)


@contextlib.contextmanager
def mounts(directory: Path) -> Iterator[Mount]:
    """A place to mount at."""
    directory.mkdir()
    with contextlib.ExitStack() as stack:
        yield Mount(directory, stack)
