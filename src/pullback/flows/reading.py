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
from pullback.transfer import Fetch, NbdEndpoint, Piece, Work, Zero, copy
from pullback.units import GiB, MiB

_WINDOW = 4 * GiB
#: Threads for a disk at least: while one waits for the repository, the other decodes.
_FEWEST = 2
#: Bytes of a disk whose chunks are looked up together, and come in the order in which they were stored.
_FETCH_WINDOW = 256 * MiB


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
    prepare: Callable[[], bool] | None = None,
    share: int = 1,
    limiter: repo.Limiter | None = None,
) -> int:
    """Read a whole disk, compare each block with its hash, and write it to `destination` if there is one.

    `prepare` is called right before the first byte is written, and tells whether the destination reads as
    zeroes then; without it, the destination is new and does. `share`: so many disks are read at a time, and
    share the requests that the repository takes. `limiter`: of the disk's bytes that are read.

    Gives the bytes read. Raises `VerificationFailed` at the first block that is not what was stored.
    """

    def failed(problem: str) -> errors.VerificationFailed:
        return errors.VerificationFailed(point=point.id, problem=f"disk {disk.target}: {problem}")

    progress.start(disk.target, disk.size)
    try:
        with opened(repository, point, disk.target, cancel=cancel) as source:
            if source.size != disk.size:
                raise failed("its image has another size")
            # Those of a disk in chunks were asked of the repository already.
            known = source.hashes if isinstance(source, repo.PointEndpoint) else None
            hashes = known or repository.hashes(point, disk.target)
            reader = _Reader(disk, hashes, failed, cancel, limiter)
            empty = prepare is None or prepare()
            result = copy(
                source,
                destination,
                reader.work(source),
                observe=reader.observe,
                advance=partial(progress.advance, disk.target),
                skip_zeroes=empty,
                workers=max(_FEWEST, -(-source.channels // share)),
                block=min(hashes.block_size, disk.size),
                cancel=cancel,
            )
    except errors.EndpointFailed as error:
        if error.endpoint.startswith("restore point"):
            raise failed(f"it cannot be read at offset {error.offset} ({error.reason})") from error
        raise
    except errors.ProgramFailed as error:  # qemu-nbd could not even open it
        raise failed(f"its image cannot be opened ({error.message})") from error
    progress.finish(disk.target)
    return result.read


def compare(
    disk: PointDisk,
    hashes: repo.HashList,
    endpoint: Endpoint,
    *,
    failed: Failed,
    advance: Callable[[int], None],
    cancel: Cancel,
) -> None:
    """Read the disk from anywhere (what lies behind its end is not looked at) and compare it with its hashes.

    Raises what `failed` makes of a clause that says what differs.
    """
    reader = _Reader(disk, hashes, failed, cancel)
    block = min(hashes.block_size, disk.size)
    copy(endpoint, None, reader.work(endpoint), observe=reader.observe, advance=advance, block=block, cancel=cancel)


#: The error for what is wrong, given as a clause.
Failed = Callable[[str], errors.PullbackError]


class _Reader:
    """The reading of one disk, with its hash list. Used by several threads; holds no state that changes."""

    def __init__(
        self,
        disk: PointDisk,
        hashes: repo.HashList,
        failed: Failed,
        cancel: Cancel,
        limiter: repo.Limiter | None = None,
    ) -> None:
        self._disk = disk
        self._hashes = hashes
        self._failed = failed
        self._cancel = cancel
        self._limiter = limiter

    def work(self, source: Endpoint) -> Iterator[Work]:
        """The whole disk. Lazy."""
        return self._chunks(source) if isinstance(source, repo.PointEndpoint) else self._blocks(source)

    def _blocks(self, source: Endpoint) -> Iterator[Work]:
        """What has data is read, a block at a time; what is shown as holes must be zero by its hash too."""
        size, block = self._disk.size, self._hashes.block_size
        for window in increments.windows(size, block, _WINDOW):
            data = extents.align_out(extents.data(source.extents(window)), block, size)
            step = increments.whole(data, window, block=block, size=size)
            for hole in step.zero_blocks:
                self._check_hole(hole)
                yield Zero(hole)
            yield from (Piece(item.read, item.write) for item in step.blocks)

    def _check_hole(self, hole: Extent) -> None:
        for index in self._hashes.touched(hole):
            length = self._hashes.block(index).length
            if self._hashes.entry(index) != repo.zero_hash(length):
                raise self._differs(index)

    def _chunks(self, source: repo.PointEndpoint) -> Iterator[Work]:
        """Chunks prove themselves by their ids, which are the hash list, and come in the order of their packs."""
        for window in increments.windows(self._disk.size, self._hashes.block_size, _FETCH_WINDOW):
            for hole in extents.subtract([window], extents.data(source.extents(window))):
                yield Zero(hole)
            for batch in source.batches(window):
                yield Fetch(partial(self._fetch, source, batch))

    def _fetch(self, source: repo.PointEndpoint, batch: repo.Batch) -> Iterator[tuple[int, bytes | bytearray]]:
        for offset, content in source.fetch(batch):
            self._wait(len(content))
            yield offset, content

    def observe(self, offset: int, buffer: bytearray, length: int) -> None:
        """Compare one block with its hash."""
        self._wait(length)
        index = offset // self._hashes.block_size
        with memoryview(buffer) as view:
            if not self._hashes.matches(index, view[:length]):
                raise self._differs(index)

    def _wait(self, length: int) -> None:
        if self._limiter is not None:
            self._cancel.wait(self._limiter.book(length))

    def _differs(self, index: int) -> errors.PullbackError:
        extent = self._hashes.block(index)
        return self._failed(f"the {extent.length} bytes at offset {extent.start} are not what was stored")
