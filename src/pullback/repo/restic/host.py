"""What this host and process say of themselves in locks, keys and snapshots."""

from __future__ import annotations

import getpass
import os


def user() -> str:
    """The user's name; the number of one that has no name (in a container)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
