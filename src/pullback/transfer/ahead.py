"""Filling an overlay that QEMU has open: it reads ahead what the overlay lacks, and keeps it.

We ask for ranges over NBD; the data goes from the restore point's server to QEMU, and never to us. What
the guest writes meanwhile wins: QEMU copies only what the overlay still lacks, one cluster at a time
(block/io.c, bdrv_co_do_copy_on_readv).
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

from pullback import errors
from pullback.extents import Extent, merge, split
from pullback.progress import Cancel
from pullback.transfer.nbd import NbdChannel, NbdEndpoint
from pullback.units import KiB, MiB

#: Bytes of one request.
REQUEST = 1 * MiB
#: Requests at a time. More would make the guest's own reads wait longer: QEMU has 16 in flight for all.
WORKERS = 4
#: What is tried again where a request failed: one cluster of the overlay.
GRAIN = 64 * KiB
#: Seconds after which a full file system is tried again.
_FULL_SECONDS = 2.0
#: QEMU tells in metadata context `qemu:allocation-depth`: 0 nowhere, 1 the overlay itself, 2 below it.
DEPTH = "qemu:allocation-depth"
_OWN = 1


class Filling:
    """What is asked of one overlay; shared by its threads."""

    def __init__(
        self,
        overlay: NbdEndpoint,
        *,
        cancel: Cancel,
        advance: Callable[[int], None],
        throttle: Callable[[int], None],
        full: Callable[[], None],
    ) -> None:
        """`throttle` waits until so many bytes may be read; `full` hears that the overlay has no room."""
        self._overlay = overlay
        self._cancel = cancel
        self._advance = advance
        self._throttle = throttle
        self._full = full
        self._lock = threading.Lock()
        self._lost: list[Extent] = []

    def fill(self, ranges: Iterable[Extent], *, workers: int = WORKERS) -> tuple[Extent, ...]:
        """Have the overlay hold the ranges; gives those that cannot be read, merged.

        Raises the first error of the connection, or the reason in `cancel`.
        """
        work = split(ranges, REQUEST)
        failures: list[BaseException] = []
        threads = [
            threading.Thread(target=self._run, args=(work, failures), name=f"fill-{number}", daemon=True)
            for number in range(min(workers, self._overlay.channels))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return tuple(merge(sorted(self._lost)))

    def _run(self, work: Iterator[Extent], failures: list[BaseException]) -> None:
        try:
            with ExitStack() as stack:
                channel = stack.enter_context(self._overlay.channel())
                while not failures and (piece := self._next(work)) is not None:
                    self._cancel.check()
                    self._piece(channel, piece)
                    self._advance(piece.length)
        except BaseException as error:  # noqa: BLE001 - raised by `fill`
            failures.append(error)

    def _next(self, work: Iterator[Extent]) -> Extent | None:
        with self._lock:
            return next(work, None)

    def _piece(self, channel: NbdChannel, piece: Extent) -> None:
        self._throttle(piece.length)
        if self._kept(channel, piece):
            return
        for part in split([piece], GRAIN):
            if not self._kept(channel, part):
                with self._lock:
                    self._lost.append(part)

    def _kept(self, channel: NbdChannel, piece: Extent) -> bool:
        """False: it cannot be read."""
        while True:
            try:
                channel.prefetch(piece.start, piece.length)
                return True
            except errors.EndpointFailed as error:
                if error.errno == errno.ENOSPC:
                    self._full()
                    self._cancel.wait(_FULL_SECONDS)
                elif error.errno == errno.EIO:
                    return False
                else:
                    raise


def lacking(overlay: NbdEndpoint, ranges: Iterable[Extent]) -> Iterator[Extent]:
    """What of the ranges the overlay does not hold itself; it must offer `DEPTH`."""
    for wanted in ranges:
        yield from merge(extent for extent, depth in overlay.status(DEPTH, wanted) if depth != _OWN)
