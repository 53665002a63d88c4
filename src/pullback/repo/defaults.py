"""The repository that is meant when no option names one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pullback import errors

_OURS = "PULLBACK_REPOSITORY"
_NAME = "RESTIC_REPOSITORY"
_FILE = "RESTIC_REPOSITORY_FILE"
#: Characters: more is no name.
_LIMIT = 4096


def repository_url(environ: Mapping[str, str]) -> str | None:
    """The name in PULLBACK_REPOSITORY, or else in RESTIC_REPOSITORY or the file RESTIC_REPOSITORY_FILE; or None."""
    if environ.get(_OURS):
        return environ[_OURS]
    if environ.get(_NAME) and environ.get(_FILE):
        raise errors.UsageError(problem=f"{_NAME} and {_FILE} are both set")
    if environ.get(_FILE):
        return _in_file(Path(environ[_FILE]))
    return environ.get(_NAME) or None


def _in_file(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LIMIT).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise errors.UsageError(problem=f"the file {path} that {_FILE} names cannot be read: {reason}") from error
    if not text:
        raise errors.UsageError(problem=f"the file {path} that {_FILE} names is empty")
    return text
