"""The one place that chooses an engine: by the kind of machine that a URL names."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from pullback import state
from pullback.engine import offline, qemu
from pullback.machine import Machine
from pullback.model import urls


def open_machine(
    url: urls.Machine,
    directories: state.Directories,
    *,
    command: str,
    name: str | None = None,
    anonymous: bool = False,
) -> AbstractAsyncContextManager[Machine]:
    """A machine, locked for us while the block runs; what dead jobs left of it is cleared away first.

    `name`: what it is called in repositories, instead of its own name; `anonymous` lets a machine
    without any pass. Errors: those of `engine.qemu.connect` and `engine.offline.connect`.
    """
    if isinstance(url, urls.ImagesMachine):
        return offline.connect(url, directories, command=command, name=name, anonymous=anonymous)
    return qemu.connect(url.socket, directories, command=command, name=name, anonymous=anonymous)
