"""Which files are overlays that we made, so that a commit may remove them.

STATE/overlays/<hash of the path>.json
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from pullback import state

_LIMIT = 64 << 10


def remember(base: Path, overlay: Path) -> None:
    """An overlay was made. `base`: the state directory."""
    record = _record(base, overlay)
    state.private(record.parent)
    state.write_durably(record, {"path": str(overlay), **_identity(overlay)})


def ours(base: Path, overlay: Path) -> bool:
    """Is it a file that we made, and no other that has its name now?"""
    try:
        kept = json.loads(_record(base, overlay).read_bytes()[:_LIMIT])
        return bool(kept == {"path": str(overlay), **_identity(overlay)})
    except (OSError, ValueError, RecursionError):
        return False


def forget(base: Path, overlay: Path) -> None:
    """It is gone, or never came to be."""
    with suppress(FileNotFoundError):
        _record(base, overlay).unlink()


def _identity(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"device": status.st_dev, "inode": status.st_ino}


def _record(base: Path, overlay: Path) -> Path:
    name = hashlib.sha256(str(overlay).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return base / "overlays" / f"{name}.json"
