"""How users name a file of a restore point: vda1:/etc/hosts, group/volume:/path, or /etc/hosts alone. Pure."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pullback import errors

_VOLUME = re.compile(r"[A-Za-z0-9+_.-]+(?:/[A-Za-z0-9+_.-]+)?")
_MAX_PATH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePath:
    """A place in a restore point."""

    #: The disk, partition or logical volume; None: the path is the guest's own, from its root.
    volume: str | None
    #: An absolute path.
    path: bytes

    def __str__(self) -> str:
        text = self.path.decode("utf-8", "backslashreplace")
        return text if self.volume is None else f"{self.volume}:{text}"

    @property
    def name(self) -> bytes:
        """What it is called where it is put: the last component, or the volume."""
        last = self.path.rstrip(b"/").rpartition(b"/")[2]
        if last not in (b"", b".", b".."):
            return last
        return (self.volume or "root").replace("/", "-").encode()


def parse(text: str) -> FilePath:
    """A path as it stands on a command line. Raises `UsageError`."""
    volume, colon, path = ("", "", text) if text.startswith("/") else text.partition(":")
    raw = os.fsencode(path or "/")
    raw = raw if raw.startswith(b"/") else b"/" + raw
    if b"\0" in raw or len(raw) > _MAX_PATH:
        raise errors.UsageError(problem="A path has at most 4096 bytes, and none of them is zero")
    if not volume and not colon:
        return FilePath(volume=None, path=raw)
    if not _VOLUME.fullmatch(volume):
        raise errors.UsageError(
            problem=f"{text!r} is neither a path (/etc/hosts) nor a volume (vda1, group/volume) with or without one"
        )
    return FilePath(volume=volume, path=raw)
