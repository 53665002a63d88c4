"""Programs of the user's that run around a backup, as values."""

from __future__ import annotations

from dataclasses import dataclass

#: How long a hook may take, in seconds, unless the configuration says otherwise.
DEFAULT_TIMEOUT = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """The programs, each as its words (no shell takes part); without words there is none."""

    #: Before anything is done; if it fails, nothing is done.
    pre: tuple[str, ...] = ()
    #: After a backup that succeeded.
    post: tuple[str, ...] = ()
    #: After one that did not, whatever the reason; also after a `pre` that failed.
    error: tuple[str, ...] = ()
    #: Seconds for each.
    timeout: float = DEFAULT_TIMEOUT
