"""The last backup job of a machine, for who asks after its end.

STATE/machines/<hash of the machine's name>/last-job.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pullback import state

_LIMIT = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedJob:
    """How a job ended."""

    job: str
    #: pull or push.
    mode: str
    success: bool
    #: Why it failed; None after a success.
    error: str | None
    #: UTC, ISO 8601.
    began: str
    ended: str
    #: The checkpoint that was made with it and stays; None if none was, or it was taken back.
    checkpoint: str | None
    #: Its effective document as JSON.
    document: Mapping[str, object]
    #: By target: what was copied of what, in bytes.
    disks: Mapping[str, Mapping[str, object]]


def save(base: Path, machine: str, ended: EndedJob) -> None:
    """Remember it instead of the one before. `base`: the state directory."""
    path = _path(base, machine)
    state.private(path.parent)
    state.write_durably(path, asdict(ended))


def load(base: Path, machine: str) -> EndedJob | None:
    """The last one, or None if there is none, or its record is damaged."""
    try:
        values = json.loads(_path(base, machine).read_bytes()[:_LIMIT])
        found = EndedJob(**values)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return found if _plausible(found) else None


def _plausible(found: EndedJob) -> bool:
    texts = (found.job, found.mode, found.began, found.ended)
    return (
        all(isinstance(text, str) for text in texts)
        and all(text is None or isinstance(text, str) for text in (found.error, found.checkpoint))
        and isinstance(found.success, bool)
        and isinstance(found.document, dict)
        and isinstance(found.disks, dict)
        and all(isinstance(disk, dict) for disk in found.disks.values())
    )


def _path(base: Path, machine: str) -> Path:
    return state.machine_directory(base, machine) / "last-job.json"
