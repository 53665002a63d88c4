"""Looking at the locks of a repository, and removing those that nobody holds any more."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pullback.repo.restic import lockfile, locking, times, unpacked
from pullback.repo.restic.locking import Held
from pullback.repo.restic.repository import Repository
from pullback.repo.store import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A lock that was there."""

    held: Held
    #: Its holder is gone.
    stale: bool
    removed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a look at the locks shows."""

    seen: tuple[Seen, ...]
    #: How far the store's clock is ahead of ours.
    ahead: timedelta


def look(repository: Repository) -> Look:
    """Who holds a lock? The store's clock tells how old one is: a lock of ours is written for it, and removed.

    Raises as writing to the store does.
    """
    begun = datetime.now(UTC)
    with _probe(repository) as name:
        ended = datetime.now(UTC)
        found = locking.held(repository.store, repository.key)
    now = next((one.modified for one in found if one.name == name), ended)
    seen = [Seen(held=one, stale=one.stale(now)) for one in found if one.name != name]
    seen.sort(key=lambda one: (one.held.modified, one.held.name))
    # Stores may tell whole seconds only, and writing takes some time.
    early, late = now - ended, now + timedelta(seconds=1) - begun
    ahead = early if early > timedelta(0) else late if late < timedelta(0) else timedelta(0)
    return Look(seen=tuple(seen), ahead=ahead)


@contextlib.contextmanager
def _probe(repository: Repository) -> Iterator[str]:
    """A shared lock, there for a moment."""
    lock = lockfile.Lock(
        time=times.write(datetime.now(UTC)),
        exclusive=False,
        hostname=socket.gethostname(),
        username="",
        pid=os.getpid(),
    )
    name, data = unpacked.seal_file(repository.key, lockfile.encode(lock), compress=repository.compresses)
    repository.store.write(Kind.LOCKS, name, data)
    try:
        yield name
    finally:
        repository.store.delete(Kind.LOCKS, name)


def bury(repository: Repository) -> None:
    """Remove the locks of processes of this host that have ended: restic would take them for living ones."""
    locking.bury(repository.store, locking.held(repository.store, repository.key))


def unlock(repository: Repository, *, everything: bool = False) -> tuple[Seen, ...]:
    """Remove the stale locks, or all of them; gives those that were there."""
    found = []
    for one in look(repository).seen:
        removed = one.stale or everything
        if removed:
            repository.store.delete(Kind.LOCKS, one.held.name)
        found.append(Seen(held=one.held, stale=one.stale, removed=removed))
    return tuple(found)
