"""A repository that is away: its readers get an error, or they wait until it is back.

Away is what a server, a network or a disk can come back from. A file that is missing or damaged is
damage, unless the whole repository is missing: who waits for it looks at its config first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from pullback import errors
from pullback.repo import Kind, Store, Stored
from pullback.serve.words import Teller

T = TypeVar("T")
#: Seconds between two tries, at first; then twice as long each time, up to the second.
_FIRST, _LONGEST = 0.2, 5.0
_AWAY = (
    errors.StoreUnreachable,
    errors.StoreRefused,
    errors.StoreFailed,
    errors.PermissionDenied,
    errors.NoRepository,
    errors.NotARepository,
)


class Patience:
    """How to bear with a repository, for all who read from it."""

    def __init__(self, teller: Teller, *, patient: bool) -> None:
        self.patient = patient
        self._teller = teller
        self._lock = threading.Lock()
        #: Since when it is away, by the monotonic clock.
        self._since: float | None = None

    def run(self, work: Callable[[], T], mend: Callable[[], None]) -> T:
        """What `work` gives; tried for ever, with a `mend` before each try, if we are patient."""
        pause = _FIRST
        while True:
            begun = time.monotonic()
            try:
                value = work()
            except _AWAY as error:
                self._away(error)
                if self.patient:
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST)
                with suppress(errors.PullbackError):
                    mend()
                if not self.patient:
                    raise  # the next reader may be lucky
            else:
                if self._since is not None:
                    self._back(begun)
                return value

    def _away(self, error: errors.PullbackError) -> None:
        with self._lock:
            first = self._since is None
            self._since = time.monotonic()
        if first:
            self._teller.away(error, waiting=self.patient)

    def _back(self, begun: float) -> None:
        """A read that began after the last failure went well."""
        with self._lock:
            if self._since is None or begun < self._since:
                return
            self._since = None
        self._teller.back()


class PatientStore:
    """The store of a repository, opened anew when it comes back. Only for reading."""

    def __init__(self, opening: Callable[[], Store], patience: Patience) -> None:
        self._opening = opening
        self._patience = patience
        self._lock = threading.Lock()
        self._store = opening()
        #: It may be in use by a thread that is still in a call.
        self._before: Store | None = None
        self.url = self._store.url
        self.connections = self._store.connections

    def list(self, kind: Kind) -> Iterator[Stored]:
        """See `Store`."""
        return iter(self._patience.run(lambda: list(self._store.list(kind)), self._mend))

    def read(self, kind: Kind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store`."""
        return self._patience.run(lambda: self._read(kind, name, offset, length), self._mend)

    def _read(self, kind: Kind, name: str, offset: int, length: int | None) -> bytes:
        store = self._store
        try:
            return store.read(kind, name, offset, length)
        except (errors.ObjectMissing, errors.ObjectDamaged):
            if self._patience.patient:
                self._require_there(store)
            raise

    def _require_there(self, store: Store) -> None:
        """Is it this file alone? A disk that was pulled out has nothing any more."""
        try:
            store.read(Kind.CONFIG, "")
        except (errors.ObjectMissing, errors.ObjectDamaged) as error:
            raise errors.StoreUnreachable(store=self.url, reason=str(error).rstrip(".")) from error

    def _mend(self) -> None:
        with self._lock:
            new = self._opening()
            before, self._before, self._store = self._before, self._store, new
        if before is not None:
            before.close()

    def size(self, kind: Kind, name: str) -> int:
        """See `Store`."""
        return self._patience.run(lambda: self._store.size(kind, name), self._mend)

    def write(self, kind: Kind, name: str, data: bytes | bytearray | memoryview, *, new: bool = False) -> None:
        """Nothing is written here."""
        raise NotImplementedError("a served repository is only read")

    def delete(self, kind: Kind, name: str) -> None:
        """Nothing is written here."""
        raise NotImplementedError("a served repository is only read")

    def tidy(self) -> None:
        """Nothing is written here."""

    def hurry(self) -> None:
        """See `Store`."""
        self._store.hurry()

    def close(self) -> None:
        """See `Store`."""
        for store in (self._before, self._store):
            if store is not None:
                store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
