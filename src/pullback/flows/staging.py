"""A disk on its way back to a restore point: what differs, staged in a local file, then written and read back.

    chunks that the point has otherwise than its newest point ──────────┐
    chunks written since that, by the bitmaps ────────┐                 ├──▶ wanted ─▶ staged (fetched, proven)
    chunks with holes that no bitmap accounts for ────┼─▶ read: differ? ┘                    │
    (without bitmaps: all chunks with data) ──────────┘                                      └─▶ written, read back

All in whole chunks, the blocks of the hash list. What is staged is proven by its hash once more when it is
written. Blocking; used in threads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pullback import errors, extents, repo, state
from pullback.endpoint import Endpoint
from pullback.extents import Extent, between
from pullback.flows import increments, reading
from pullback.model.points import Point
from pullback.model.rollbacks import JournalDisk
from pullback.progress import Cancel, Progress
from pullback.transfer import Fetch, FileEndpoint, NbdEndpoint, Piece, Work, Zero, copy
from pullback.units import GiB, KiB, MiB, format_size

#: The changes and the allocation of so many bytes are held in memory at a time.
_WINDOW = 4 * GiB
#: Bytes of a disk whose chunks are looked up together.
_FETCH_WINDOW = 256 * MiB
#: Holes are looked at in units of this, as a backup does.
_GRAIN = 64 * KiB
#: Zeroes go to the disk in requests of this at most.
_ZERO_WINDOW = 256 * MiB
_RUN = re.compile(b"\x01+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How work on a disk goes on, and how it is stopped."""

    progress: Progress
    cancel: Cancel
    limiter: repo.Limiter | None = None

    def wait(self, length: int) -> None:
        """Be as slow as the user wants."""
        if self.limiter is not None:
            self.cancel.wait(self.limiter.book(length))


@dataclass(slots=True, kw_only=True)
class Returning:
    """A disk on its way. Flags are set by several threads, each its own."""

    target: str
    #: What it shall hold.
    hashes: repo.HashList
    #: The file that takes what is to be written, each chunk at its place.
    place: Path
    #: A byte for each chunk: it is to be written.
    wanted: bytearray = field(default_factory=bytearray)
    #: It lies in the file, durable.
    staged: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        if not self.wanted:
            self.wanted = bytearray(self.hashes.count)
        if not self.staged:
            self.staged = bytearray(self.hashes.count)

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.hashes.size

    @property
    def block(self) -> int:
        """Bytes of a chunk."""
        return self.hashes.block_size

    def zero(self, index: int) -> bool:
        """Is that chunk all zeroes in the point? Then it needs no staging."""
        return self.hashes.entry(index) == repo.zero_hash(self.hashes.block(index).length)

    def want(self, indexes: Iterable[int]) -> None:
        """These chunks are to be written."""
        for index in indexes:
            self.wanted[index] = 1

    def lacking(self) -> bytearray:
        """A byte for each chunk: it is wanted, has data, and is not staged."""
        found = bytearray(self.hashes.count)
        for index in _set(self.wanted):
            found[index] = not self.staged[index] and not self.zero(index)
        return found

    def bytes_of(self, flags: bytearray) -> int:
        """Bytes of the chunks that are flagged."""
        last = self.hashes.count - 1
        short = self.block - self.hashes.block(last).length if flags[last] else 0
        return flags.count(1) * self.block - short

    def runs(self, flags: bytearray, most: int) -> Iterator[Extent]:
        """The ranges of flagged chunks, joined, cut at multiples of `most` bytes."""
        for run in _RUN.finditer(bytes(flags)):
            start, end = self.hashes.block(run.start()).start, self.hashes.block(run.end() - 1).end
            yield from extents.split([between(start, end)], max(self.block, most // self.block * self.block))

    def chunks(self, extent: Extent) -> Iterator[Extent]:
        """The chunks that an extent touches."""
        return (self.hashes.block(index) for index in self.hashes.touched(extent))


def _set(flags: bytearray) -> Iterator[int]:
    index = flags.find(1)
    while index >= 0:
        yield index
        index = flags.find(1, index + 1)


# -- what differs ----------------------------------------------------------------------------


def by_ids(disk: Returning, newest: repo.HashList) -> None:
    """Chunks that the newest point has otherwise. Raises `ValueError` for a list of another shape."""
    disk.want(newest.differing(disk.hashes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracking:
    """What is known of a disk's changes."""

    #: The metadata context that tells what was written since the newest point.
    context: str
    newest: repo.HashList
    #: Bytes of the image's cluster.
    cluster: int
    #: The file whose holes are the disk's, where QEMU does not tell all of them.
    hole_file: str | None


def by_bitmaps(disk: Returning, live: NbdEndpoint, known: Tracking, report: Report) -> None:
    """Chunks that were written since the newest point, or have holes that no bitmap accounts for: if they differ.

    They are read, for they may be as they shall be: a rollback before this one wrote to them too.
    """
    suspects = bytearray(disk.hashes.count)
    for window in increments.windows(disk.size, disk.block, _WINDOW):
        report.cancel.check()
        zero = list(extents.zeroes(live.extents(window)))
        for index in _touched(disk, _hidden(disk, zero, known, window)):
            # A hole in a chunk that was zero before tells nothing new.
            was_zero = known.newest.entry(index) == repo.zero_hash(disk.hashes.block(index).length)
            suspects[index] = not disk.wanted[index] and not was_zero
        for index in _touched(disk, extents.clip(live.dirty(known.context, window), window)):
            suspects[index] = 1
        for index in _touched(disk, increments.whole_blocks(zero, disk.block, disk.size)):
            if suspects[index] or disk.wanted[index]:  # it is known without reading
                suspects[index] = 0
                disk.wanted[index] = not disk.zero(index)
    for index in _set(suspects):
        disk.wanted[index] = 0
    _examine(disk, live, suspects, report)


def _hidden(disk: Returning, zero: list[Extent], known: Tracking, window: Extent) -> Iterator[Extent]:
    """Holes, and what lies right before them: a disk that shrank and grew back shows nothing else of it."""
    holes = list(increments.whole_blocks(zero, min(known.cluster, _GRAIN), disk.size))
    path = Path(known.hole_file or "")
    if path.is_file():
        with FileEndpoint(path) as file:
            inside = extents.clip(extents.zeroes(file.extents(window)), window)
            holes = list(extents.union(holes, increments.whole_blocks(inside, _GRAIN, disk.size)))
    return (between(max(window.start, hole.start - _GRAIN), hole.end) for hole in holes)


def _touched(disk: Returning, stream: Iterable[Extent]) -> Iterator[int]:
    for extent in stream:
        yield from disk.hashes.touched(extent)


def by_reading(disk: Returning, live: NbdEndpoint, report: Report) -> None:
    """Chunks that read otherwise: the whole disk is looked at. What was wanted before is found anew."""
    disk.wanted[:] = bytes(disk.hashes.count)
    unread = bytearray(disk.hashes.count)
    for window in increments.windows(disk.size, disk.block, _WINDOW):
        report.cancel.check()
        zero = list(extents.zeroes(live.extents(window)))
        whole = list(increments.whole_blocks(zero, disk.block, disk.size))
        for index in _touched(disk, whole):
            disk.wanted[index] = not disk.zero(index)
        for index in _touched(disk, extents.subtract([window], whole)):
            unread[index] = 1
    _examine(disk, live, unread, report)


def _examine(disk: Returning, live: NbdEndpoint, flags: bytearray, report: Report) -> None:
    """Read these chunks of the disk as it is; those that are otherwise are wanted."""
    subject = f"{disk.target} compare"
    report.progress.start(subject, disk.bytes_of(flags))

    def observe(offset: int, buffer: bytearray, length: int) -> None:
        index = offset // disk.block
        with memoryview(buffer) as view:
            if not disk.hashes.matches(index, view[:length]):
                disk.wanted[index] = 1

    pieces = (Piece(chunk, ()) for run in disk.runs(flags, _WINDOW) for chunk in disk.chunks(run))
    copy(
        live,
        None,
        pieces,
        observe=observe,
        advance=partial(report.progress.advance, subject),
        block=min(disk.block, disk.size),
        cancel=report.cancel,
    )
    report.progress.finish(subject)


# -- staging ---------------------------------------------------------------------------------


def require_room(place: Path, needed: int) -> None:
    """Raise `StagingSpace` if there is too little for so many bytes where staged files go."""
    status = os.statvfs(place)
    free = (status.f_bfree if os.geteuid() == 0 else status.f_bavail) * status.f_frsize
    needed += 16 * MiB  # the file system's own, hash lists, and the journal
    if free < needed:
        raise errors.StagingSpace(path=str(place), free=format_size(free), needed=format_size(needed))


def prepare(disk: Returning) -> None:
    """A new, empty file for what will be staged. Raises `CannotWrite`, `PermissionDenied`."""
    try:
        FileEndpoint(disk.place, create=disk.size).close()
    except errors.EndpointFailed as error:
        raise errors.CannotWrite(path=str(disk.place), reason=error.reason) from error


def stage(disk: Returning, repository: repo.Repository, point: Point, source: str, report: Report) -> int:
    """Fetch what is wanted and not staged yet, from the point's disk `source`; durable when it returns.

    Gives the bytes read. Raises `VerificationFailed`, `DestinationFull`.
    """
    lacking = disk.lacking()
    if 1 not in lacking:
        return 0

    def failed(problem: str) -> errors.VerificationFailed:
        return errors.VerificationFailed(point=point.id, problem=f"disk {source}: {problem}")

    subject = f"{disk.target} stage"
    report.progress.start(subject, disk.bytes_of(lacking))
    try:
        with (
            reading.opened(repository, point, source, cancel=report.cancel) as stored,
            FileEndpoint(disk.place, writable=True) as file,
        ):
            if stored.size != disk.size:
                raise failed("its image has another size")
            fetching = _Fetching(disk, stored, report, failed)
            result = copy(
                stored,
                file,
                fetching.work(lacking),
                observe=fetching.observe,
                advance=partial(report.progress.advance, subject),
                skip_zeroes=True,
                workers=max(2, stored.channels),
                block=min(disk.block, disk.size),
                cancel=report.cancel,
            )
    except errors.EndpointFailed as error:
        if error.endpoint.startswith("restore point"):
            raise failed(f"it cannot be read at offset {error.offset} ({error.reason})") from error
        raise
    except errors.ProgramFailed as error:  # qemu-nbd could not even open it
        raise failed(f"its image cannot be opened ({error.message})") from error
    for index in _set(lacking):
        disk.staged[index] = 1
    report.progress.finish(subject)
    return result.read


class _Fetching:
    """Chunks of a restore point, each proven. Used by several threads."""

    def __init__(
        self, disk: Returning, stored: Endpoint, report: Report, failed: Callable[[str], errors.PullbackError]
    ) -> None:
        self._disk = disk
        self._stored = stored
        self._report = report
        self._failed = failed

    def work(self, flags: bytearray) -> Iterator[Work]:
        """The flagged chunks."""
        for run in self._disk.runs(flags, _FETCH_WINDOW):
            if isinstance(self._stored, repo.PointEndpoint):
                yield from (Fetch(partial(self._fetch, self._stored, batch)) for batch in self._stored.batches(run))
            else:
                yield from (Piece(chunk, (chunk,)) for chunk in self._disk.chunks(run))

    def _fetch(self, stored: repo.PointEndpoint, batch: repo.Batch) -> Iterator[tuple[int, bytes | bytearray]]:
        """Proven by their ids already."""
        for offset, content in stored.fetch(batch):
            self._report.wait(len(content))
            yield offset, content

    def observe(self, offset: int, buffer: bytearray, length: int) -> None:
        """Compare one chunk with its hash."""
        self._report.wait(length)
        with memoryview(buffer) as view:
            if not self._disk.hashes.matches(offset // self._disk.block, view[:length]):
                raise self._failed(f"the {length} bytes at offset {offset} are not what was stored")


# -- writing ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written to a disk, in bytes."""

    data: int
    #: By requests for zeroes.
    zeroes: int


def write(disk: Returning, live: NbdEndpoint, report: Report) -> Written:
    """Write what is wanted; durable when it returns. Raises `EndpointFailed`, `DestinationFull`."""
    subject = f"{disk.target} write"
    report.progress.start(subject, disk.bytes_of(disk.wanted))

    def observe(offset: int, buffer: bytearray, length: int) -> None:
        report.wait(length)
        with memoryview(buffer) as view:
            if not disk.hashes.matches(offset // disk.block, view[:length]):
                problem = f"the {length} bytes at offset {offset} are not what was staged"
                raise errors.DestinationDiffers(place=str(disk.place), problem=problem)

    with FileEndpoint(disk.place) as file:
        result = copy(
            file,
            live,
            _writing(disk),
            observe=observe,
            advance=partial(report.progress.advance, subject),
            block=min(disk.block, disk.size),
            cancel=report.cancel,
        )
    report.progress.finish(subject)
    return Written(data=result.written, zeroes=result.zeroed)


def _writing(disk: Returning) -> Iterator[Work]:
    zeroes = bytearray(disk.hashes.count)
    data = bytearray(disk.hashes.count)
    for index in _set(disk.wanted):
        (zeroes if disk.zero(index) else data)[index] = 1
    for run in disk.runs(zeroes, _ZERO_WINDOW):
        yield Zero(run)
    for run in disk.runs(data, _WINDOW):
        yield from (Piece(chunk, (chunk,)) for chunk in disk.chunks(run))


def check(disk: Returning, live: NbdEndpoint, report: Report) -> None:
    """Read back what was written. Raises `DestinationDiffers`."""
    subject = f"{disk.target} check"
    report.progress.start(subject, disk.bytes_of(disk.wanted))

    def observe(offset: int, buffer: bytearray, length: int) -> None:
        with memoryview(buffer) as view:
            if not disk.hashes.matches(offset // disk.block, view[:length]):
                problem = f"the {length} bytes at offset {offset} are not what was written"
                raise errors.DestinationDiffers(place=f"disk {disk.target}", problem=problem)

    pieces = (Piece(chunk, ()) for run in disk.runs(disk.wanted, _WINDOW) for chunk in disk.chunks(run))
    copy(
        live,
        None,
        pieces,
        observe=observe,
        advance=partial(report.progress.advance, subject),
        block=min(disk.block, disk.size),
        cancel=report.cancel,
    )
    report.progress.finish(subject)


# -- for the journal -------------------------------------------------------------------------


def keep(disk: Returning, entry: JournalDisk) -> None:
    """Make durable what the journal names beside the staged file."""
    _durably(Path(entry.hashes), disk.hashes.encode())
    _durably(Path(entry.wanted), bytes(disk.wanted))
    state.sync_file(disk.place)


def _durably(path: Path, content: bytes) -> None:
    beside = path.with_name(f"{path.name}.new")
    try:
        beside.write_bytes(content)
        beside.chmod(0o600)
        state.sync_file(beside)
        beside.rename(path)
        state.sync_directory(path.parent)
    except OSError as error:
        raise errors.CannotWrite(path=str(path), reason=error.strerror or str(error)) from error


def again(entry: JournalDisk, journal: str) -> Returning:
    """A disk from the journal. All that was wanted is staged. Raises `JournalDamaged`."""
    try:
        hashes = repo.HashList.decode(Path(entry.hashes).read_bytes(), size=entry.size, block_size=entry.block_size)
        wanted = bytearray(Path(entry.wanted).read_bytes())
        staged = Path(entry.staged).stat()
    except (OSError, ValueError) as error:
        raise errors.JournalDamaged(path=journal, problem=f"disk {entry.target}: {error}") from error
    if hashes.digest() != entry.digest or len(wanted) != hashes.count or wanted.strip(b"\0\1"):
        raise errors.JournalDamaged(path=journal, problem=f"disk {entry.target}: what it names was changed")
    if staged.st_size != entry.size:
        raise errors.JournalDamaged(path=journal, problem=f"disk {entry.target}: what was staged has another size")
    disk = Returning(target=entry.target, hashes=hashes, place=Path(entry.staged), wanted=wanted)
    disk.staged[:] = wanted
    return disk
