"""The parallel copier between any two endpoints: backup, restore and verify are this with other ends.

    work (lazy) ──lock──► worker 1..n:  read a block ─► observe it ─► zeroes? ─► zero
                                                                  └─ data ────► write
                          every settle_bytes: flush ─► settled(ranges)        at the end: flush

A worker is a thread with one buffer, which takes a channel of each end for the time of a request.
So memory is `workers` blocks whatever the size of the disk, and an end with a single channel still
overlaps with the other end and with `observe`. The first error is kept and raised; the other
workers stop at their next block, and no thread is left when `copy` returns.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from pullback.endpoint import Channel, Endpoint
from pullback.extents import Extent, between, merge, split, total
from pullback.progress import Cancel
from pullback.units import GiB, KiB, MiB

#: Bytes of one read. 256 KiB cost a tenth more CPU in our own process, 2 MiB gained nothing.
BLOCK_SIZE = 1 * MiB
#: Threads of one copy. Two cost 10 % less CPU in all programs together, but on a host that is busy
#: otherwise (two cores, load 6; 3 GiB, qemu-nbd to qemu-nbd, SHA-256) took 11.6 s against 10.4 s.
WORKERS = 4
#: Bytes between two flushes where the caller wants to hear of durable data.
SETTLE_BYTES = 512 * MiB
#: Zeroes are looked for in units of a qcow2 cluster: a smaller hole would save nothing there.
_GRAIN = 64 * KiB
_ZEROES = bytes(_GRAIN)
#: The cancel token is looked at between zero requests of this length.
_LONGEST_ZERO = 1 * GiB


class Piece(NamedTuple):
    """One block to read, at most `BLOCK_SIZE` (or the `block` given to `copy`), and what of it to store."""

    read: Extent
    #: Sorted, disjoint ranges inside `read`; none: it is only observed.
    write: tuple[Extent, ...]


class Zero(NamedTuple):
    """A range that is known to read as zeroes: zeroed at the destination, not read."""

    extent: Extent


class Fetch(NamedTuple):
    """Pieces of the disk that somebody else reads, in an order of his own, and gives as (offset, content)."""

    #: A content is valid until the next one is asked for.
    load: Callable[[], Iterable[tuple[int, bytes | bytearray]]]


Work = Piece | Zero | Fetch
#: Called with (offset, buffer, length) for each block read; `buffer[:length]` is valid during the call.
Observe = Callable[[int, bytearray, int], None]
#: Called with sorted, merged ranges.
Settled = Callable[[Sequence[Extent]], None]


def blocks(extents: Iterable[Extent], block: int = BLOCK_SIZE) -> Iterator[Piece]:
    """Plain work: read and store these extents, cut at multiples of `block` bytes. Lazy."""
    for extent in split(extents, block):
        yield Piece(extent, (extent,))


@dataclass(slots=True, kw_only=True)
class Result:
    """What a copy did, in bytes."""

    #: Read from the source.
    read: int = 0
    #: Written to the destination as data.
    written: int = 0
    #: Made zero at the destination by a zero request.
    zeroed: int = 0
    #: Zeroes that needed no request, because the destination was empty.
    skipped: int = 0


def copy(
    source: Endpoint,
    destination: Endpoint | None,
    work: Iterable[Work],
    *,
    observe: Observe | None = None,
    settled: Settled | None = None,
    settle_bytes: int = SETTLE_BYTES,
    advance: Callable[[int], None] | None = None,
    skip_zeroes: bool = False,
    workers: int = WORKERS,
    block: int = BLOCK_SIZE,
    cancel: Cancel | None = None,
) -> Result:
    """Do all `work` from `source` to `destination`, flush, and tell what was done.

    `work` is pulled lazily, by one worker at a time; its order is the order of reading, roughly.
    No `destination`: blocks are only read and observed. `skip_zeroes`: the destination is new and
    reads as zeroes, so zeroes need no request.

    The callbacks are called from worker threads: `observe(offset, buffer, length)` for each block
    read, in any order and several at a time; `advance(bytes)` after each piece, several at a time;
    `settled(ranges)` with the ranges stored (or zeroed) since its last call, one call at a time,
    always after a flush that covers them, about every `settle_bytes` and at the end. What a `Fetch`
    gives is not observed, but all the rest is done with it.

    Raises the first error of an endpoint, of `work` or of a callback, or the reason in `cancel`.
    What was written until then is not flushed.
    """
    with ExitStack() as stack:
        plan = _Plan(observe=observe, advance=advance, skip_zeroes=skip_zeroes, block=block)
        readers = stack.enter_context(_Channels.open(source, workers))
        writers = stack.enter_context(_Channels.open(destination, workers)) if destination is not None else None
        ledger = _Ledger(settled, settle_bytes, writers)
        run = _Run(plan, _Feed(iter(work), cancel or Cancel()), readers, writers, ledger)
        run.together(workers)
        ledger.finish()
        return run.result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What every worker does with a block."""

    observe: Observe | None
    advance: Callable[[int], None] | None
    skip_zeroes: bool
    block: int


class _Channels:
    """The open channels of one end, each lent to one thread at a time."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._free: queue.SimpleQueue[Channel] = queue.SimpleQueue()
        for channel in channels:
            self._free.put(channel)

    @classmethod
    @contextmanager
    def open(cls, endpoint: Endpoint, most: int) -> Iterator[_Channels]:
        """As many channels as the endpoint allows, at most `most`; closed with the block."""
        with ExitStack() as stack:
            count = max(1, min(most, endpoint.channels))
            yield cls([stack.enter_context(endpoint.channel()) for _ in range(count)])

    @contextmanager
    def lend(self) -> Iterator[Channel]:
        """A channel for the time of the block. Who holds one is bound by the deadlines of its requests."""
        channel = self._free.get()
        try:
            yield channel
        finally:
            self._free.put(channel)


class _Feed:
    """The work, pulled by one thread at a time, and the reason why no more is given out."""

    def __init__(self, work: Iterator[Work], cancel: Cancel) -> None:
        self._work = work
        self._cancel = cancel
        self._failed = Cancel()
        self._lock = threading.Lock()

    def next(self) -> Work | None:
        """The next piece, or None at the end; raises if the copy failed or was cancelled meanwhile."""
        with self._lock:
            self.check()
            return next(self._work, None)

    def check(self) -> None:
        """Raise the first failure, or the reason of the caller's cancel."""
        self._failed.check()
        self._cancel.check()

    def fail(self, error: BaseException) -> None:
        """Stop everybody; the first error is kept."""
        self._failed.cancel(error)


class _Ledger:
    """Which ranges were stored, until a flush made them durable. Shared by all workers."""

    def __init__(self, settled: Settled | None, settle_bytes: int, writers: _Channels | None) -> None:
        self._settled = settled
        self._settle_bytes = settle_bytes
        self._writers = writers
        self._lock = threading.Lock()
        self._settling = threading.Lock()
        self._stored: list[Extent] = []
        self._bytes = 0

    def stored(self, ranges: Sequence[Extent]) -> None:
        """These were answered by the destination. Flushes, and tells the caller, when it is time."""
        if self._settled is None or self._writers is None:
            return
        with self._lock:
            self._stored.extend(ranges)
            self._bytes += total(ranges)
            due = self._bytes >= self._settle_bytes
            batch = self._take() if due else []
        if due:
            self._settle(batch)

    def finish(self) -> None:
        """The last flush, and its ranges."""
        if self._writers is not None:
            self._settle(self._take())

    def _take(self) -> list[Extent]:
        batch, self._stored, self._bytes = self._stored, [], 0
        return batch

    def _settle(self, batch: list[Extent]) -> None:
        """Only what was stored *before* the flush began is told: a flush covers answered writes alone."""
        assert self._writers is not None
        with self._settling:
            with self._writers.lend() as channel:
                channel.flush()
            if self._settled is not None and batch:
                self._settled(list(merge(sorted(batch))))


@dataclass(slots=True)
class _Run:
    """One copy: the workers, and what they count (each adds its own sums at its end, under the lock)."""

    plan: _Plan
    feed: _Feed
    readers: _Channels
    writers: _Channels | None
    ledger: _Ledger
    result: Result = field(default_factory=Result)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def together(self, workers: int) -> None:
        """Run the workers to their end, or to the first error, which is raised."""
        threads = [threading.Thread(target=self._work, name=f"copy-{number}") for number in range(workers)]
        try:
            for thread in threads:
                thread.start()
        except BaseException as error:
            self.feed.fail(error)
            raise
        finally:
            self._join([thread for thread in threads if thread.ident is not None])
        self.feed.check()

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # a signal's: stop the workers first, then let it through
            self.feed.fail(error)
            for thread in threads:
                thread.join()
            raise

    def _work(self) -> None:
        try:
            worker = _Worker(self)
            while (piece := self.feed.next()) is not None:
                worker.do(piece)
            self._add(worker.result)
        except BaseException as error:  # noqa: BLE001 - kept, and raised by the thread that waits for us
            self.feed.fail(error)

    def _add(self, part: Result) -> None:
        with self.lock:
            self.result.read += part.read
            self.result.written += part.written
            self.result.zeroed += part.zeroed
            self.result.skipped += part.skipped


class _Worker:
    """What one thread does with its buffer."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._plan = run.plan
        self._buffer = bytearray(run.plan.block)
        self.result = Result()

    def do(self, piece: Work) -> None:
        """One piece of work, through all its stations."""
        if isinstance(piece, Zero):
            for part in split([piece.extent], _LONGEST_ZERO):
                self._run.feed.check()
                self._zero(part)
                self._done((part,), part.length)
        elif isinstance(piece, Fetch):
            for offset, content in piece.load():
                self._run.feed.check()
                self._fetched(Extent(offset, len(content)), content)
        else:
            self._read(piece.read)
            self._store(self._buffer, piece.read.start, piece.write)
            self._done(piece.write, piece.read.length)

    def _fetched(self, extent: Extent, content: bytes | bytearray) -> None:
        self.result.read += extent.length
        self._store(content, extent.start, (extent,))
        self._done((extent,), extent.length)

    def _done(self, stored: Sequence[Extent], length: int) -> None:
        self._run.ledger.stored(stored)
        if self._plan.advance is not None:
            self._plan.advance(length)

    def _read(self, extent: Extent) -> None:
        if extent.length > len(self._buffer):
            raise ValueError(f"a piece of {extent.length} bytes does not fit a block of {len(self._buffer)}")
        with self._run.readers.lend() as channel:
            channel.read_into(extent.start, self._buffer, extent.length)
        self.result.read += extent.length
        if self._plan.observe is not None:
            self._plan.observe(extent.start, self._buffer, extent.length)

    def _store(self, buffer: bytes | bytearray, base: int, ranges: Sequence[Extent]) -> None:
        """`buffer` holds the disk's bytes from offset `base`."""
        if self._run.writers is None:
            return
        for wanted in ranges:
            for part, zero in runs(buffer, base, wanted):
                if zero:
                    self._zero(part)
                else:
                    self._write(part, buffer, part.start - base)

    def _write(self, extent: Extent, buffer: bytes | bytearray, position: int) -> None:
        assert self._run.writers is not None
        with self._run.writers.lend() as channel:
            channel.write(extent.start, buffer, position, extent.length)
        self.result.written += extent.length

    def _zero(self, extent: Extent) -> None:
        if self._run.writers is None:
            return
        if self._plan.skip_zeroes:
            self.result.skipped += extent.length
            return
        with self._run.writers.lend() as channel:
            channel.zero(extent.start, extent.length)
        self.result.zeroed += extent.length


def runs(buffer: bytes | bytearray, base: int, wanted: Extent) -> Iterator[tuple[Extent, bool]]:
    """Cut `wanted` into runs of data and of zeroes (True), in units of 64 KiB of the disk.

    `buffer` holds the disk's bytes from offset `base`. `startswith` is a memcmp without a copy:
    it costs nothing on data, whose first bytes differ, and 64 KiB of cache reads on zeroes.
    """
    first, second = wanted.start - base, -(-(wanted.start + 1) // _GRAIN) * _GRAIN - base
    if buffer[first : first + 1] != b"\0" and 0 not in buffer[second : wanted.end - base : _GRAIN]:
        yield wanted, False  # no unit begins with a zero
        return
    start, kind = wanted.start, False
    for grain in split([wanted], _GRAIN):
        zero = buffer.startswith(_zeroes(grain.length), grain.start - base)
        if zero != kind and grain.start > start:
            yield between(start, grain.start), kind
            start = grain.start
        kind = zero
    if wanted.end > start:
        yield between(start, wanted.end), kind


def _zeroes(length: int) -> bytes | memoryview:
    return _ZEROES if length == _GRAIN else memoryview(_ZEROES)[:length]
