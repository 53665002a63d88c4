"""Locks of a repository, as restic has them ("Locks" in its design document).

A lock is a sealed file in `locks/`: shared for those who read or add, exclusive for those who
remove. Nothing enforces it, so everybody looks before and after making his own. It is made anew
every five minutes; one that is older than half an hour is nobody's. How old it is says the store's
own clock, by which our lock and the other's were written: clocks of hosts differ, and jump.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pullback import errors
from pullback.repo.restic import host, lockfile, times, unpacked
from pullback.repo.restic.crypto import Key
from pullback.repo.store import Kind, Store

#: Seconds after which a held lock is made anew.
REFRESH = 300.0
#: A lock refreshed longer ago than this is no proof that nobody removed things meanwhile.
TRUSTED = 20 * 60.0
#: Seconds between making our lock and looking again for somebody else's (as restic waits).
SETTLE = 0.2
#: Seconds that releasing a lock may take: who is done does not wait for a server that does not answer.
_END_SECONDS = 20.0
#: Seconds that one refresh may be late before it is tried again.
_RETRY = 10.0
#: Names that many hosts have: a process that does not run here may run on another one.
_NAMELESS = frozenset({"", "localhost", "localhost.localdomain"})


@dataclass(frozen=True, slots=True)
class Held:
    """Somebody's lock."""

    name: str
    #: None: it cannot be read, so it is taken for an exclusive one.
    lock: lockfile.Lock | None
    #: By the store's clock.
    modified: datetime

    @property
    def ended(self) -> bool:
        """Was it made by a process of this host that does not run any more?"""
        return (
            self.lock is not None
            and self.lock.hostname == socket.gethostname()
            and self.lock.hostname not in _NAMELESS
            and self.lock.pid > 0
            and not _alive(self.lock.pid)
        )

    def stale(self, now: datetime) -> bool:
        """Is its holder gone? `now`: by the store's clock."""
        return self.ended or now - self.modified > lockfile.STALE_AFTER

    def __str__(self) -> str:
        if self.lock is None:
            return f"lock {self.name[:8]}, which cannot be read"
        kind = "an exclusive lock" if self.lock.exclusive else "a lock"
        lock = self.lock
        return f"{kind} of process {lock.pid} on {lock.hostname} by {lock.username}, since {lock.time[:19]}"


def held(store: Store, key: Key) -> list[Held]:
    """All locks of the repository."""
    found = []
    for stored in store.list(Kind.LOCKS):
        with contextlib.suppress(errors.ObjectMissing):  # released between listing and reading
            found.append(Held(stored.name, _read(store, key, stored.name), stored.modified))
    return found


def bury(store: Store, found: Iterable[Held]) -> None:
    """Remove the locks of our own dead: they would keep restic from pruning. What cannot go, stays."""
    for one in found:
        if one.ended:
            with contextlib.suppress(errors.PullbackError):
                store.delete(Kind.LOCKS, one.name)


def _read(store: Store, key: Key, name: str) -> lockfile.Lock | None:
    where = f"locks/{name}"
    try:
        return lockfile.parse(unpacked.open_file(key, store.read(Kind.LOCKS, name), name, where), where)
    except (errors.RepositoryDamaged, errors.ObjectDamaged):
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


class RepositoryLock:
    """A lock that we hold while a block runs; a thread of its own refreshes it."""

    def __init__(
        self, store: Store, key: Key, *, exclusive: bool = False, compress: bool = True, refresh: float = REFRESH
    ) -> None:
        self._store = store
        self._key = key
        self._exclusive = exclusive
        self._compress = compress
        self._refresh = refresh
        self._names: list[str] = []
        self._refreshed = 0.0
        #: Was there a moment without it? Then somebody may have pruned.
        self._lost = False
        #: Guards what stands above.
        self._changing = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RepositoryLock:
        self._look_around()
        try:
            self._acquire()
        except BaseException:
            self.close()
            raise
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._keep, name="repository-lock", daemon=True)
        self._thread.start()

    # -- others ------------------------------------------------------------------------------

    def _forbids(self, other: Held) -> bool:
        return other.name not in self._names and (other.lock is None or other.lock.conflicts(self._exclusive))

    def _busy(self, other: Held) -> errors.BusyError:
        return errors.BusyError(what=f"The repository {self._store.url}", holder=str(other))

    def _look_around(self) -> None:
        """Before anything is written: raise `BusyError` for a lock that is new by any clock."""
        now = datetime.now(UTC)
        for other in held(self._store, self._key):
            age = now - other.modified
            if self._forbids(other) and not other.ended and timedelta(0) <= age < lockfile.STALE_AFTER:
                raise self._busy(other)

    def _acquire(self) -> None:
        """Write ours, and raise `BusyError` if somebody else's forbids it."""
        self._write()
        self._ended.wait(SETTLE)
        found = held(self._store, self._key)
        # By the store's clock. Ours is not there any more? Then everything counts as new.
        now = next((one.modified for one in found if one.name == self._names[-1]), datetime.min.replace(tzinfo=UTC))
        for other in found:
            if self._forbids(other) and not other.stale(now):
                raise self._busy(other)
        bury(self._store, found)

    # -- ours --------------------------------------------------------------------------------

    def _write(self) -> None:
        lock = lockfile.Lock(
            time=times.write(datetime.now(UTC)),
            exclusive=self._exclusive,
            hostname=socket.gethostname(),
            username=host.user(),
            pid=os.getpid(),
            uid=os.getuid(),
            gid=os.getgid(),
        )
        name, data = unpacked.seal_file(self._key, lockfile.encode(lock), compress=self._compress)
        before = _clock()
        self._store.write(Kind.LOCKS, name, data)
        self._names.append(name)
        self._refreshed = before

    def _keep(self) -> None:
        wait = self._refresh
        while not self._ended.wait(wait):
            try:
                with self._changing:
                    if not self._renewed():
                        return
                wait = self._refresh
            except errors.PullbackError:
                wait = min(self._refresh, _RETRY)  # tried again; `trusted` tells if that lasts too long

    def _renewed(self) -> bool:
        """Make it anew, unless there was a moment without it: the old one must be there when the new one is."""
        before = self._names[-1]
        if not self._is_there(before):
            self._lost = True
            return False
        self._write()
        lost, self._lost = self._lost, True  # unless it turns out otherwise
        if not self._is_there(before):
            return False
        self._lost = lost
        self._remove(self._names[:-1])
        return True

    def _is_there(self, name: str) -> bool:
        return any(stored.name == name for stored in self._store.list(Kind.LOCKS))

    def trusted(self) -> bool:
        """Has it been there all the time, and fresh enough for nobody to take it for a dead one's?"""
        with self._changing:
            held = not self._lost and bool(self._names)
            return held and _clock() - self._refreshed < TRUSTED and self._is_there(self._names[-1])

    def renew(self) -> None:
        """Take a new lock after the old one was lost. Raises `BusyError` as at the beginning."""
        with self._changing:
            self._acquire()
            self._lost = False
        if self._thread is not None and not self._thread.is_alive():
            self._begin()

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self._store.delete(Kind.LOCKS, name)
            self._names.remove(name)

    def close(self) -> None:
        """Release it, within a deadline; twice is fine. One that cannot be removed is stale soon."""
        self._ended.set()
        ending = threading.Thread(target=self._end, name="repository-unlock", daemon=True)
        ending.start()
        ending.join(_END_SECONDS)

    def _end(self) -> None:
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(errors.PullbackError):
            self._remove(list(self._names))


def _clock() -> float:
    """Seconds that go on while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
