"""Reading a disk of a restore point, with the proof that it is what was stored."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pullback import errors, extents, repo
from pullback.endpoint import Endpoint
from pullback.extents import Extent
from pullback.flows import increments
from pullback.model.points import Point, PointDisk
from pullback.programs import qemu_nbd
from pullback.progress import Cancel, Progress
from pullback.transfer import NbdEndpoint, Piece, copy
from pullback.transfer.copier import Result
from pullback.units import GiB, MiB

_WINDOW = 4 * GiB
#: Bytes of a restore point that are asked for at once.
_STRETCH = 4 * MiB


@contextlib.contextmanager
def opened(repository: repo.Repository, point: Point, target: str, *, cancel: Cancel) -> Iterator[Endpoint]:
    """A disk of a restore point as an endpoint. Raises `VerificationFailed` for a damaged one."""
    name = f"restore point {point.id}, disk {target}"
    if isinstance(repository, repo.ResticRepository):
        with repository.endpoint(point, target) as chunks:
            yield chunks
        return
    assert isinstance(repository, repo.Directory)
    links = repository.chain(point, target)
    # The chain of images, each named by us, served read-only.
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pullback-")))
        address = stack.enter_context(qemu_nbd.serve_graph(repo.graph(links), socket=directory / "point.sock"))
        yield stack.enter_context(NbdEndpoint(address, cancel=cancel, name=name))


def prove(
    repository: repo.Repository,
    point: Point,
    disk: PointDisk,
    destination: Endpoint | None,
    *,
    progress: Progress,
    cancel: Cancel,
) -> int:
    """Read a whole disk, compare each block with its hash, and write it to `destination` if there is one.

    Gives the bytes read. Raises `VerificationFailed` at the first block that is not what was stored.
    """
    proof = _Proof(point, disk, repository.hashes(point, disk.target))
    progress.start(disk.target, disk.size)
    try:
        with opened(repository, point, disk.target, cancel=cancel) as source:
            if source.size != disk.size:
                raise proof.failed("its image has another size")
            result = _copy(source, destination, proof, partial(progress.advance, disk.target), cancel)
    except errors.EndpointFailed as error:
        if error.endpoint.startswith("restore point"):
            raise proof.failed(f"it cannot be read at offset {error.offset} ({error.reason})") from error
        raise
    except errors.ProgramFailed as error:  # qemu-nbd could not even open it
        raise proof.failed(f"its image cannot be opened ({error.message})") from error
    progress.finish(disk.target)
    return result.read


def _copy(
    source: Endpoint, destination: Endpoint | None, proof: _Proof, advance: Callable[[int], None], cancel: Cancel
) -> Result:
    block = min(proof.block_size, source.size)
    if not isinstance(source, repo.PointEndpoint):
        work = proof.work(source, block)
        return copy(
            source,
            destination,
            work,
            observe=proof.compare,
            advance=advance,
            skip_zeroes=True,
            block=block,
            cancel=cancel,
        )
    # Chunks prove themselves by their ids. Several are asked for at once: they often lie side by side.
    block = min(max(block, _STRETCH), source.size)
    return copy(
        source,
        destination,
        proof.work(source, block),
        advance=advance,
        skip_zeroes=True,
        workers=source.channels,
        block=block,
        cancel=cancel,
    )


class _Proof:
    """The comparison of one disk with its hash list. Used by several threads; holds no state that changes."""

    def __init__(self, point: Point, disk: PointDisk, hashes: repo.HashList) -> None:
        self._point = point
        self._disk = disk
        self._hashes = hashes

    def failed(self, problem: str) -> errors.VerificationFailed:
        """The error for this disk."""
        return errors.VerificationFailed(point=self._point.id, problem=f"disk {self._disk.target}: {problem}")

    @property
    def block_size(self) -> int:
        """Bytes that one hash is of."""
        return self._hashes.block_size

    def work(self, source: Endpoint, length: int) -> Iterator[Piece]:
        """What has data is read, so many bytes at a time; what is shown as holes must be zero by its hash too."""
        size, block = self._disk.size, self._hashes.block_size
        for window in increments.windows(size, block, _WINDOW):
            data = extents.align_out(extents.data(source.extents(window)), block, size)
            step = increments.whole(data, window, block=length, size=size)
            for hole in step.zero_blocks:
                self._check_hole(hole)
            yield from (Piece(item.read, item.write) for item in step.blocks)

    def _check_hole(self, hole: Extent) -> None:
        for index in self._hashes.touched(hole):
            length = self._hashes.block(index).length
            if self._hashes.entry(index) != repo.zero_hash(length):
                raise self._differs(index)

    def compare(self, offset: int, buffer: bytearray, length: int) -> None:
        """One block against its hash."""
        index = offset // self._hashes.block_size
        with memoryview(buffer) as view:
            if not self._hashes.matches(index, view[:length]):
                raise self._differs(index)

    def _differs(self, index: int) -> errors.VerificationFailed:
        extent = self._hashes.block(index)
        return self.failed(f"the {extent.length} bytes at offset {extent.start} are not what was stored")
