"""What is known of a QEMU binary, kept between runs: it is the same for every process of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

#: Files of another format are not read.
_FORMAT = 2


class Build:
    """The binary that runs as a process, and what was written down about it under `cache`."""

    def __init__(self, pid: int | None, cache: Path) -> None:
        self.exe = Path(f"/proc/{pid}/exe")
        self._cache = cache
        self._key = self._identity()

    def _identity(self) -> str | None:
        """A binary that was replaced has another inode or time; /proc/PID/exe follows even a deleted one."""
        try:
            status = self.exe.stat()
            if "qemu" not in os.path.basename(os.readlink(self.exe)):
                return None
        except OSError:  # not our user's process, or no Linux /proc
            return None
        return f"{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"

    @property
    def known(self) -> bool:
        """Can it be told from others? Else nothing is kept."""
        return self._key is not None

    def _path(self, kind: str) -> Path:
        return self._cache / f"{kind}-{self._key}.json"

    def load(self, kind: str) -> Mapping[str, object] | None:
        """What was written down, or None."""
        if self._key is None:
            return None
        try:
            record = json.loads(self._path(kind).read_bytes())
            if record.pop("format") != _FORMAT:
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return record if isinstance(record, dict) else None

    def save(self, kind: str, values: Mapping[str, object]) -> None:
        """Write it down. Losing it costs the time of finding it out again, so failing is no error."""
        if self._key is None:
            return
        path = self._path(kind)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps({"format": _FORMAT, **values}))
            beside.rename(path)
