"""The passwords of a repository, and its locks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pullback import repo
from pullback.flows.repositories import Access, opened_restic, require_restic
from pullback.model import urls
from pullback.repo import keyring, unlocking

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Which repository."""

    repository: urls.Repository
    access: Access = field(default_factory=Access)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A password's key."""

    #: 64 hex digits.
    id: str
    #: It opened the repository.
    current: bool
    #: Who made it, and when (RFC 3339), as the file says; "" if it does not.
    user: str = ""
    host: str = ""
    created: str = ""
    #: The file cannot be used.
    damaged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A lock that was there."""

    #: 64 hex digits.
    id: str
    exclusive: bool
    host: str
    user: str
    #: The process on that host; None if the lock cannot be read.
    pid: int | None
    #: ISO 8601: when it was made or last refreshed.
    since: str
    #: Its holder is gone.
    stale: bool
    removed: bool


async def listed(request: Request) -> tuple[Key, ...]:
    """All keys, the oldest first."""
    return await _with_keys(request, "key list", lambda found: tuple(map(_key, keyring.listed(found))))


async def added(request: Request, password: Callable[[], str]) -> Key:
    """Add a password, which is asked for when the repository is open; gives its key."""
    return await _with_keys(request, "key add", lambda found: _key(keyring.add(found, password())))


async def removed(request: Request, key: str) -> Key:
    """Remove the key whose id begins so; the one that opened the repository cannot be."""
    return await _with_keys(request, "key remove", lambda found: _key(keyring.remove(found, key)))


async def changed(request: Request, password: Callable[[], str]) -> Key:
    """Replace the password that opened the repository; gives the new key."""
    return await _with_keys(request, "key passwd", lambda found: _key(keyring.change(found, password())))


async def unlocked(request: Request, *, everything: bool = False) -> tuple[Lock, ...]:
    """Remove stale locks, or all; gives those that were there, the oldest first."""
    reason = "a machine's directory is locked by the kernel while a process writes to it, and no lock outlives that"
    place = require_restic(request.repository, "unlock", reason, "There is nothing to remove.")

    def work() -> tuple[Lock, ...]:
        with opened_restic(place, request.access) as repository:
            return tuple(map(_lock, unlocking.unlock(repository, everything=everything)))

    return await asyncio.to_thread(work)


async def _with_keys(request: Request, command: str, work: Callable[[repo.ResticRepository], T]) -> T:
    reason = "it is not encrypted, so it has neither keys nor passwords"
    way_out = "Make one that is encrypted: `pullback init -r /path`."
    place = require_restic(request.repository, command, reason, way_out)

    def run() -> T:
        with opened_restic(place, request.access) as repository:
            return work(repository)

    return await asyncio.to_thread(run)


def _key(entry: repo.KeyEntry) -> Key:
    if entry.info is None:
        return Key(id=entry.id, current=entry.current, damaged=True)
    info = entry.info
    return Key(id=entry.id, current=entry.current, user=info.username, host=info.hostname, created=info.created)


def _lock(seen: unlocking.Seen) -> Lock:
    lock = seen.held.lock
    if lock is None:
        since = seen.held.modified.isoformat()
        return Lock(
            id=seen.held.name, exclusive=True, host="", user="", pid=None, since=since,
            stale=seen.stale, removed=seen.removed,
        )  # fmt: skip
    return Lock(
        id=seen.held.name, exclusive=lock.exclusive, host=lock.hostname, user=lock.username, pid=lock.pid,
        since=lock.when.isoformat(), stale=seen.stale, removed=seen.removed,
    )  # fmt: skip
