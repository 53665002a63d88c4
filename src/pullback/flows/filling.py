"""Where the blocks of a frozen disk go: an image of a `dir:` repository, or chunks of restic's format.

The copier reads whole blocks. An image takes the changed ranges inside them, through the server
that has it open; chunks are taken from the block as it was read, so there nothing is written by
the copier itself.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pullback import errors, extents, repo
from pullback.endpoint import Endpoint
from pullback.extents import Extent
from pullback.programs import qemu_nbd
from pullback.progress import Cancel
from pullback.transfer import NbdEndpoint


class Filling(Protocol):
    """A disk of a restore point that is being made. Its methods are called by the copier's threads."""

    @property
    def hashes(self) -> repo.HashList:
        """The hashes of its blocks; those of the parent to begin with."""

    @property
    def destination(self) -> Endpoint | None:
        """What the copier writes changed ranges to; None if `observe` takes all there is."""

    def parent_zeroes(self, window: Extent) -> Iterator[Extent]:
        """What of `window` is known to read as zeroes in the parent."""

    def lacking(self, window: Extent) -> Iterator[Extent]:
        """Blocks of the parent that cannot be inherited, and are read although nothing changed in them."""

    def observe(self, offset: int, buffer: bytearray, length: int) -> None:
        """A whole block was read."""

    def zeroed(self, extent: Extent) -> None:
        """These whole blocks are zero now."""

    def when_durable(self, told: Callable[[Sequence[Extent]], None]) -> None:
        """Tell of blocks that can be read from the repository from now on, so that they need not be kept frozen."""

    def seal(self) -> repo.Sealed:
        """All is filled, and what was opened for it is closed: check it, make it durable."""


def lacked(pending: repo.Pending, target: str) -> int:
    """Bytes of the parent of a disk that are to be read again, because the repository has lost them."""
    return pending.disk(target).lacked if isinstance(pending, repo.PendingSnapshot) else 0


def problems(repository: repo.Repository) -> tuple[str, ...]:
    """What of the repository cannot be used, as sentences."""
    return tuple(repository.problems) if isinstance(repository, repo.ResticRepository) else ()


def tidy(repository: repo.Repository) -> None:
    """Remove what is of no use any more: here in the cache, there what killed writers left. It can wait if it fails."""
    if isinstance(repository, repo.ResticRepository):
        with contextlib.suppress(errors.PullbackError):
            repository.tidy()
            repository.store.tidy()


def hurry(repository: repo.Repository) -> None:
    """Who waits for the repository's server has given up."""
    if isinstance(repository, repo.ResticRepository):
        repository.store.hurry()


@contextlib.contextmanager
def opened(pending: repo.Pending, target: str, *, cancel: Cancel) -> Iterator[Filling]:
    """The disk `target` of a pending point, open for filling while the block runs. `seal` it afterwards."""
    if isinstance(pending, repo.PendingSnapshot):
        cancel.tell(pending.stop)
        yield pending.disk(target)
        return
    assert isinstance(pending, repo.PendingPoint)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pullback-")))
        server = qemu_nbd.serve_graph(
            pending.graph(target), socket=directory / "image.sock", writable=True, check=cancel.check
        )
        address = stack.enter_context(server)
        image = NbdEndpoint(address, writable=True, name=str(pending.image(target)), cancel=cancel)
        yield _Image(pending, target, stack.enter_context(image), cancel)


class _Image:
    """A `Filling` that is a qcow2 image."""

    def __init__(self, pending: repo.PendingPoint, target: str, image: NbdEndpoint, cancel: Cancel) -> None:
        self._pending = pending
        self._target = target
        self._image = image
        self._hashes = pending.new_hashes(target)
        self._cancel = cancel

    @property
    def hashes(self) -> repo.HashList:
        return self._hashes

    @property
    def destination(self) -> Endpoint | None:
        return self._image

    def parent_zeroes(self, window: Extent) -> Iterator[Extent]:
        return extents.zeroes(self._image.extents(window))

    def lacking(self, window: Extent) -> Iterator[Extent]:
        return iter(())  # the chain was checked; what it holds only `verify` reads

    def observe(self, offset: int, buffer: bytearray, length: int) -> None:
        with memoryview(buffer) as view:
            self._hashes.hash(offset // self._hashes.block_size, view[:length])
        if (limiter := self._pending.limiter) is not None:
            self._cancel.wait(limiter.book(length))

    def zeroed(self, extent: Extent) -> None:
        self._hashes.set_zero(extent)

    def when_durable(self, told: Callable[[Sequence[Extent]], None]) -> None:
        """The copier itself knows: it flushes what it wrote."""

    def seal(self) -> repo.Sealed:
        return self._pending.seal(self._target, self._hashes)
