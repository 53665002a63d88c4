"""Locks of a repository, as restic has them ("Locks" in its design document).

A lock is a sealed file in `locks/`: shared for those who read or add, exclusive for those who
remove. Nothing enforces it, so everybody looks before and after making his own. It is made anew
every five minutes; one that is older than half an hour is nobody's.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pullback import errors
from pullback.repo.restic import lockfile, times, unpacked
from pullback.repo.restic.crypto import Key
from pullback.repo.store import Kind, Store

#: Seconds after which a held lock is made anew.
REFRESH = 300.0
#: A lock refreshed longer ago than this is no proof that nobody removed things meanwhile.
TRUSTED = 20 * 60.0
#: Seconds between making our lock and looking again for somebody else's (as restic waits).
SETTLE = 0.2
#: Seconds that one refresh may be late before it is tried again.
_RETRY = 10.0


@dataclass(frozen=True, slots=True)
class Held:
    """Somebody's lock."""

    name: str
    #: None: it cannot be read, so it is taken for an exclusive one.
    lock: lockfile.Lock | None
    #: By the store's clock.
    modified: datetime

    @property
    def stale(self) -> bool:
        """Is its holder gone?"""
        now = datetime.now(UTC)
        if self.lock is None:
            return now - self.modified > timedelta(minutes=30)
        return lockfile.is_stale(self.lock, now, socket.gethostname(), _alive)

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
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RepositoryLock:
        self._judge()
        self._write()
        try:
            self._ended.wait(SETTLE)
            self._judge()
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._keep, name="repository-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _judge(self) -> None:
        """Raise `BusyError` if somebody else's lock forbids ours."""
        for other in held(self._store, self._key):
            if other.name in self._names or other.stale:
                continue
            if self._exclusive or other.lock is None or other.lock.exclusive:
                raise errors.BusyError(what=f"The repository {self._store.url}", holder=str(other))

    def _write(self) -> None:
        lock = lockfile.Lock(
            time=times.write(datetime.now(UTC)),
            exclusive=self._exclusive,
            hostname=socket.gethostname(),
            username=_user(),
            pid=os.getpid(),
            uid=os.getuid(),
            gid=os.getgid(),
        )
        name, data = unpacked.seal_file(self._key, lockfile.encode(lock), compress=self._compress)
        before = time.monotonic()
        self._store.write(Kind.LOCKS, name, data)
        self._names.append(name)
        self._refreshed = before

    def _keep(self) -> None:
        wait = self._refresh
        while not self._ended.wait(wait):
            try:
                if not self.there():  # somebody removed it: `trusted` must never hold again
                    return
                self._write()
                self._remove(self._names[:-1])
                wait = self._refresh
            except errors.PullbackError:
                wait = min(self._refresh, _RETRY)  # tried again; `trusted` tells if that lasts too long

    def there(self) -> bool:
        """Is our lock still in the repository?"""
        try:
            return any(stored.name == self._names[-1] for stored in self._store.list(Kind.LOCKS))
        except errors.ObjectMissing:
            return False

    def trusted(self) -> bool:
        """Has it been there all the time, and fresh enough for nobody to take it for a dead one's?"""
        return time.monotonic() - self._refreshed < TRUSTED and self.there()

    def renew(self) -> None:
        """Take a new lock after the old one was lost. Raises `BusyError` as at the beginning."""
        self._judge()
        self._write()
        self._ended.wait(SETTLE)
        self._judge()

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self._store.delete(Kind.LOCKS, name)
            self._names.remove(name)

    def close(self) -> None:
        """Release it; twice is fine. One that cannot be removed is stale soon."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(errors.PullbackError):
            self._remove(list(self._names))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
