"""An initramfs: the "newc" cpio archive that the kernel unpacks.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.

Written here rather than by cpio(1), because a device node then needs no root, and the same input
always gives the same bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One member: a directory, file, symbolic link or character device, owned by root."""

    #: Path without a leading slash.
    path: str
    #: Type and permission bits, as in stat(2).
    mode: int
    #: Content of a file, target of a link.
    data: bytes = b""
    #: Major and minor number of a device.
    device: tuple[int, int] = (0, 0)


def directory(path: str) -> Entry:
    """A directory."""
    return Entry(path=path, mode=stat.S_IFDIR | 0o755)


def file(path: str, data: bytes, *, executable: bool = False) -> Entry:
    """A regular file."""
    return Entry(path=path, mode=stat.S_IFREG | (0o755 if executable else 0o644), data=data)


def link(path: str, target: str) -> Entry:
    """A symbolic link to `target`."""
    return Entry(path=path, mode=stat.S_IFLNK | 0o777, data=target.encode())


def character_device(path: str, major: int, minor: int) -> Entry:
    """A character device."""
    return Entry(path=path, mode=stat.S_IFCHR | 0o600, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of `entries`, with the directories above them added."""
    out = bytearray()
    for number, entry in enumerate(_with_parents(entries), start=1):
        out += _member(entry, number)
    out += _member(Entry(path=_TRAILER, mode=0), 0)
    return bytes(out)


def _with_parents(entries: Iterable[Entry]) -> list[Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        parts = entry.path.split("/")
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            found.setdefault(above, directory(above))
        found[entry.path] = entry
    return [found[path] for path in sorted(found, key=lambda path: path.split("/"))]


def _member(entry: Entry, number: int) -> bytes:
    """Magic and 13 fields of 8 hexadecimal digits, then name and data, each padded to 4 bytes.

    ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    """
    name = entry.path.encode() + b"\0"
    values = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % value for value in values)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
