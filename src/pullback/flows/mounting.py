"""A restore point as files: a file system of ours (FUSE) on a directory of the user's, read-only."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pullback import errors, state
from pullback.flows.listening import own_directory
from pullback.flows.repositories import Access
from pullback.flows.restore import choose
from pullback.flows.servant import detach
from pullback.flows.servants import Servant, Told, Trouble, lent, started
from pullback.flows.serving import CACHE
from pullback.model import urls
from pullback.model.points import Point
from pullback.programs import process
from pullback.progress import Progress, Silent

#: Seconds that libfuse has to unmount.
_GRACE = 2.0
_STEP = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.Repository
    #: Where the files are shown: an empty directory, made if it is not there.
    directory: Path
    access: Access = field(default_factory=Access)
    #: An id, the start of one, `latest`, or a date.
    point: str = "latest"
    machine: str | None = None
    #: Targets; empty: all disks of the point.
    only: tuple[str, ...] = ()
    #: Where runtime files go; None: the usual place.
    directories: state.Directories | None = None
    #: Readers wait for a repository that is away; else they get an I/O error after the time-outs.
    patient: bool = False
    #: Bytes of decoded blocks to keep.
    cache: int = CACHE


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownFile:
    """A file that is shown."""

    path: Path
    size: int
    #: The disk, if it is one.
    target: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounted:
    """A restore point that is shown."""

    point: Point
    directory: Path
    files: tuple[ShownFile, ...]
    _servant: Servant = field(repr=False)

    @property
    def pid(self) -> int:
        """The process that shows it."""
        return self._servant.pid

    async def ended(self) -> None:
        """Wait until somebody unmounts it. Raises `ProgramFailed` if the process that shows it failed."""
        if code := await self._servant.ended():
            raise errors.ProgramFailed(
                program="The process that shows the restore point",
                status=f"status {code}",
                message="nothing is shown now",
            )


@asynccontextmanager
async def mounting(
    request: Request, progress: Progress | None = None, *, told: Told | None = None
) -> AsyncIterator[Mounted]:
    """Show a restore point while the block runs; at the end it is unmounted, also under those who read.

    `told` hears of damaged ranges and of a repository that is away; without it, `progress.note` does.
    What a killed process left on the directory is unmounted first, and told by `progress.note`.

    Errors: as opening a repository and finding a point, `UnknownDisk`, `VerificationFailed`,
    `ProgramMissing`, `ProgramFailed`, `UsageError`, `CannotWrite`.
    """
    progress = progress or Silent()
    notes = progress.note

    def hear(trouble: Trouble) -> None:
        notes(trouble.message)

    process.find("fusermount3")
    async with AsyncExitStack() as stack:
        private = stack.enter_context(own_directory(request.directories or state.directories(), None))
        found = await stack.enter_async_context(
            lent(request.repository, request.access, request.point, request.machine)
        )
        disks = choose(found.point, request.only)
        await asyncio.to_thread(_prepare, request.directory, progress)
        setup = found.setup(disks, private, cache=request.cache, patient=request.patient)
        start = partial(_start, request.directory)
        end = partial(_end, request.directory)
        servant = await stack.enter_async_context(started(setup, start, told or hear, end=end))
        shown = await asyncio.to_thread(_shown, request.directory)
        yield Mounted(point=found.point, directory=request.directory, files=shown, _servant=servant)


def _prepare(directory: Path, progress: Progress) -> None:
    """An empty directory, on which nobody's dead file system is mounted."""
    if str(directory) != os.path.abspath(directory):
        raise errors.UsageError(problem=f"{directory} is no absolute path")
    try:
        directory.mkdir(exist_ok=True)
        names = os.listdir(directory)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise errors.CannotWrite(path=str(directory), reason=error.strerror or str(error)) from error
        detach(str(directory))
        progress.note(f"what a killed process had mounted on {directory} is unmounted")
        names = os.listdir(directory)
    if names:
        raise errors.UsageError(problem=f"{directory} is not empty: what is in it would be hidden")


def _shown(directory: Path) -> tuple[ShownFile, ...]:
    try:
        return tuple(
            ShownFile(path=path, size=path.stat().st_size, target=path.stem if path.suffix == ".raw" else None)
            for path in sorted(directory.iterdir())
        )
    except OSError as error:  # unmounted again just now
        raise errors.CannotWrite(path=str(directory), reason=error.strerror or str(error)) from error


def _start(directory: Path, setup: int, words: int) -> process.Child:
    argv = [sys.executable, "-m", "pullback.flows.mount_servant", str(setup), str(words), str(directory)]
    environment = process.own_python() | {"FUSE_LIBRARY_NAME": "fuse3"}
    # On SIGTERM libfuse unmounts: so it is to die when we do.
    return process.Child(argv, env=environment, pass_fds=(setup, words), death="TERM")


async def _end(directory: Path, child: process.Child) -> None:
    """Unmount; readers that wait for the repository must not keep us."""
    child.kill(signal.SIGTERM)
    for _ in range(round(_GRACE / _STEP)):
        if child.returncode is not None:
            break
        await asyncio.sleep(_STEP)
    if child.returncode != 0:  # it did not end, or did not end well
        await asyncio.to_thread(detach, str(directory))
    child.kill()
