"""The one place that chooses an engine: by the kind of machine that a URL names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from pullback import state
from pullback.engine import qemu
from pullback.machine import Machine
from pullback.model import urls

T = TypeVar("T")
#: An open machine, for those who only pass it on.
Opened = Machine
#: What is done with an open machine.
Work = Callable[[Machine, state.Directories], Awaitable[T]]


def open_machine(
    url: urls.Machine,
    directories: state.Directories,
    *,
    command: str,
    name: str | None = None,
    anonymous: bool = False,
    finishing: bool = False,
) -> AbstractAsyncContextManager[Machine]:
    """A machine, locked for us while the block runs; what dead jobs left of it is cleared away first.

    `name`: what it is called in repositories, instead of its own name; `anonymous` lets a machine
    without any pass, `finishing` one whose disks are half rolled back. Errors: those of
    `engine.qemu.connect` and `engine.offline.connect`.
    """
    if isinstance(url, urls.ImagesMachine):
        from pullback.engine import offline  # here: a tenth of a command's start on a machine that runs

        return offline.connect(url, directories, command=command, name=name, anonymous=anonymous, finishing=finishing)
    return qemu.connect(url.socket, directories, command=command, name=name, anonymous=anonymous, finishing=finishing)


async def on_machine(
    url: urls.Machine,
    directories: state.Directories,
    work: Work[T],
    *,
    command: str,
    name: str | None = None,
    anonymous: bool = False,
) -> T:
    """Open a machine for one piece of work."""
    async with open_machine(url, directories, command=command, name=name, anonymous=anonymous) as machine:
        return await work(machine, directories)
