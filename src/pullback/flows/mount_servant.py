"""The process that shows a restore point as files, through libfuse (mfusepy).

    python -m pullback.flows.mount_servant SETUP WORDS DIRECTORY      descriptors that it inherits, see `serve.words`

    DIRECTORY/vda.raw …        the disks, each byte proven when it is read
    DIRECTORY/pflash1.fd …    firmware devices
    DIRECTORY/point.json       what the restore point says of itself

Nothing in it ever changes, so the kernel may keep what it has read.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mfusepy  # type: ignore[import-untyped]

from pullback import errors
from pullback.extents import Extent
from pullback.flows import servant
from pullback.model import points
from pullback.serve.disk import Disk
from pullback.units import MiB, format_size

#: Firmware devices that are larger together are left out: they would be held in memory.
MOST_FIRMWARE = 64 * MiB
#: Seconds that the kernel may believe names and sizes.
_LASTING = 3600.0
#: Seconds that libfuse has to unmount when we are to end.
_GRACE = 2.0
_SECTOR = 512
_NANO = 10**9


#: What mfusepy copies from.
Content = bytes | ctypes.Array[ctypes.c_char]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file that is shown."""

    inode: int
    size: int
    #: Bytes that are not holes.
    allocated: int
    #: Gives `length` bytes from an offset, all inside the file. Raises `PullbackError`.
    read: Callable[[int, int], Content]


class Operations(mfusepy.Operations):  # type: ignore[misc]  # no types come with it
    """What the kernel asks. Called by many threads."""

    use_ns = True

    def __init__(self, files: Mapping[str, File], moment: int, ready: Callable[[], None]) -> None:
        """`moment`: when all of it was made, ns since the epoch."""
        self._files = {f"/{name}": file for name, file in files.items()}
        self._moment = moment
        self._ready = ready

    def init(self, path: str) -> None:
        """It is mounted."""
        self._ready()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """What stat(2) tells."""
        times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), self._moment)
        owner = {"st_uid": os.geteuid(), "st_gid": os.getegid()}
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o500, "st_nlink": 2, "st_ino": 1, **times, **owner}
        file = self._file(path)
        return {
            "st_mode": stat.S_IFREG | 0o400,
            "st_nlink": 1,
            "st_ino": file.inode,
            "st_size": file.size,
            "st_blocks": -(-file.allocated // _SECTOR),
            **times,
            **owner,
        }

    def readdir(self, path: str, fh: int) -> list[str]:
        """The names."""
        return [".", "..", *(name[1:] for name in self._files)]

    def open(self, path: str, flags: int) -> int:
        """For reading only."""
        file = self._file(path)
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return file.inode

    def read(self, path: str, size: int, offset: int, fh: int) -> Content:
        """The bytes, or EIO: nothing else is ever handed out."""
        file = self._file(path)
        length = min(size, file.size - offset)
        if length <= 0:
            return b""
        try:
            return file.read(offset, length)
        except (errors.PullbackError, MemoryError) as error:
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error

    def statfs(self, path: str) -> dict[str, int]:
        """As large as its files, and full."""
        total = sum(file.size for file in self._files.values())
        return {"f_bsize": MiB, "f_frsize": _SECTOR, "f_blocks": -(-total // _SECTOR), "f_namemax": 255}

    def _file(self, path: str) -> File:
        found = self._files.get(path)
        if found is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return found


def files(serving: servant.Servant) -> dict[str, File]:
    """All that is shown, by name."""
    found: dict[str, Callable[[int], File]] = {}
    for target, disk in serving.disks.items():
        found[f"{target}.raw"] = partial(_disk, disk)
    point = serving.point
    if sum(header.size for header in point.firmware) <= MOST_FIRMWARE:
        for firmware in serving.repository.firmware(point):
            found[f"{firmware.name}.fd"] = partial(_bytes, firmware.data)
    else:
        total = format_size(sum(header.size for header in point.firmware))
        serving.teller.notice(f"the firmware is not shown, because it has {total}")
    document = json.dumps(points.document(point), indent=1, ensure_ascii=False).encode() + b"\n"
    found["point.json"] = partial(_bytes, document)
    return {name: make(number) for number, (name, make) in enumerate(found.items(), start=2)}


def _disk(disk: Disk, inode: int) -> File:
    data = sum(part.length for part in disk.map(Extent(0, disk.size)) if not part.zero)

    def read(offset: int, length: int) -> Content:
        content = ctypes.create_string_buffer(length)
        with memoryview(content) as chars, chars.cast("B") as view:
            disk.read_into(offset, view)
        return content

    return File(inode=inode, size=disk.size, allocated=data, read=read)


def _bytes(content: bytes, inode: int) -> File:
    return File(
        inode=inode,
        size=len(content),
        allocated=len(content),
        read=lambda offset, length: content[offset : offset + length],
    )


def _gone(directory: str) -> None:
    """Who started us is gone: unmount."""
    os.kill(os.getpid(), signal.SIGTERM)  # libfuse's own handler ends its loop
    time.sleep(_GRACE)
    servant.detach(directory)
    os._exit(1)


def main() -> None:
    """Mount, and stay until it is unmounted."""
    setup, words, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    serving = servant.begin(setup, words, gone=partial(_gone, directory))

    def ready() -> None:
        servant.silence()
        serving.teller.ready()

    moment = round(serving.point.created.timestamp() * _NANO)
    try:
        shown = files(serving)
        threading.excepthook = lambda _: None
        mfusepy.FUSE(
            Operations(shown, moment, ready),
            directory,
            foreground=True,
            ro=True,
            fsname=f"pullback-{serving.point.id[:8]}",
            subtype="pullback",
            kernel_cache=True,
            attr_timeout=_LASTING,
            entry_timeout=_LASTING,
        )
    except errors.PullbackError as error:
        serving.teller.failed(error)
        raise
    os._exit(0)


if __name__ == "__main__":
    main()
