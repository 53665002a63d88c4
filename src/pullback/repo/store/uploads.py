"""Files on their way to a store: a few at once, and never more bytes than a limit."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pullback.repo.store import Kind, Store
from pullback.repo.store.limit import Limiter
from pullback.units import MiB

_LIMIT = 64 * MiB
#: How long who gives up waits for requests under way.
_ABANDON_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Upload:
    kind: Kind
    name: str
    data: bytes | bytearray | memoryview
    done: Callable[[], None] | None


class Uploads:
    """Writes to a store in threads of its own.

    Leaving the block waits until all is durable, and raises what went wrong. Left by an exception,
    it drops what waits, and does not wait long for what is under way: a file that is half sent never
    appears, and one that does appear is named by nobody.
    """

    def __init__(
        self, store: Store, *, workers: int | None = None, limit_bytes: int = _LIMIT, limiter: Limiter | None = None
    ) -> None:
        """`limit_bytes` bounds what was submitted and is not stored; one file may be larger."""
        self._store = store
        self._limit = limit_bytes
        self._limiter = limiter
        self._changed = threading.Condition()
        self._waiting: deque[_Upload] = deque()
        #: Bytes, and files, that were submitted and are not stored.
        self._bytes = 0
        self._files = 0
        self._error: BaseException | None = None
        self._ended = False
        self._stop = threading.Event()
        self._workers = [
            # Daemons: a request that hangs must not keep the program from ending.
            threading.Thread(target=self._work, name=f"upload-{number}", daemon=True)
            for number in range(workers or store.connections)
        ]
        for worker in self._workers:
            worker.start()

    def submit(
        self, kind: Kind, name: str, data: bytes | bytearray | memoryview, done: Callable[[], None] | None = None
    ) -> None:
        """Have a file written; it must not be changed any more.

        Blocks while too much is on its way. Raises the first error of any upload so far; after that
        nothing is written any more. `done` is called in a worker's thread when the file is durable;
        what it raises counts as an error of the upload.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or self._error or not self._files or self._bytes + len(data) <= self._limit
            )
            self._require_well()
            self._waiting.append(_Upload(kind, name, data, done))
            self._bytes += len(data)
            self._files += 1
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything submitted is durable; raises the first error."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._files)
            self._require_well()

    def _require_well(self) -> None:
        if self._error is not None:
            raise self._error
        if self._ended:
            raise RuntimeError("these uploads have ended")

    def fail(self, error: BaseException) -> None:
        """From now on all who submit or flush, or wait there, get this error; nothing more is begun."""
        with self._changed:
            self._error = self._error or error
            self._drop()
            self._changed.notify_all()
        self._stop.set()

    def close(self) -> None:
        """Wait for everything, then end; raises the first error. Twice is fine."""
        if self._ended:
            return
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self, seconds: float = _ABANDON_SECONDS) -> None:
        """End: drop what waits, and wait for what is under way at most so long."""
        with self._changed:
            self._ended = True
            self._drop()
            self._changed.notify_all()
        self._stop.set()
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def _work(self) -> None:
        while (upload := self._next()) is not None:
            error: BaseException | None = None
            try:
                self._send(upload)
            except BaseException as raised:  # noqa: BLE001 - told to whoever submits or flushes
                error = raised
            with self._changed:
                if error is not None:
                    self._error = self._error or error
                    self._drop()
                self._bytes -= len(upload.data)
                self._files -= 1
                self._changed.notify_all()
            # Not to be held while waiting for the next.
            del upload, error

    def _next(self) -> _Upload | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._waiting)
            return self._waiting.popleft() if self._waiting else None

    def _send(self, upload: _Upload) -> None:
        if self._limiter is not None and not self._limiter.take(len(upload.data), self._stop):
            return
        self._store.write(upload.kind, upload.name, upload.data)
        if upload.done is not None:
            upload.done()

    def _drop(self) -> None:
        self._bytes -= sum(len(upload.data) for upload in self._waiting)
        self._files -= len(self._waiting)
        self._waiting.clear()
