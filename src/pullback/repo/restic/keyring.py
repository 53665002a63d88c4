"""The keys of an open repository: looking at them, adding, removing and replacing them.

Each key file holds the repository's one key under a password of its own, so no data is written
anew. What is removed stays known to whoever had both the password and the file.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from pullback import errors
from pullback.repo.restic import keys
from pullback.repo.restic.repository import Repository, new_key
from pullback.repo.store import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEntry:
    """A key of a repository."""

    #: Its id, 64 hex digits.
    id: str
    #: Who made it, as the file says (nobody proves it); None: the file cannot be used.
    info: keys.KeyInfo | None
    #: It is the one that opened the repository.
    current: bool


def listed(repository: Repository) -> list[KeyEntry]:
    """All keys, the oldest first."""
    found = [_entry(repository, stored.name) for stored in repository.store.list(Kind.KEYS)]
    return sorted((entry for entry in found if entry), key=lambda entry: (_created(entry), entry.id))


def _created(entry: KeyEntry) -> str:
    return entry.info.created if entry.info else ""


def _entry(repository: Repository, name: str) -> KeyEntry | None:
    try:
        info = keys.describe(repository.store.read(Kind.KEYS, name), name)
    except errors.ObjectMissing:
        return None  # removed meanwhile
    except (errors.RepositoryDamaged, errors.ObjectDamaged):
        info = None
    return KeyEntry(id=name, info=info, current=name == repository.key_name)


def add(repository: Repository, password: str, *, cost: keys.Cost = keys.DEFAULT_COST) -> KeyEntry:
    """Add a password. Raises `UsageError` if there are as many as are ever tried, `BusyError`."""
    with repository.lock():
        return _added(repository, password, cost)


def _added(repository: Repository, password: str, cost: keys.Cost) -> KeyEntry:
    if sum(1 for _ in repository.store.list(Kind.KEYS)) >= keys.MAX_KEYS:
        raise errors.UsageError(problem=f"The repository has {keys.MAX_KEYS} keys already, and no more are ever tried")
    name, data = new_key(password, repository.key, cost)
    repository.store.write(Kind.KEYS, name, data, new=True)
    try:
        # Before anybody relies on it: what is stored opens with this password, and holds this key.
        if keys.unlock(repository.store.read(Kind.KEYS, name), password, name) != repository.key:
            raise errors.RepositoryDamaged(file=f"keys/{name}", problem="it is not what was written")
    except BaseException:
        with contextlib.suppress(errors.PullbackError):
            repository.store.delete(Kind.KEYS, name)
        raise
    return KeyEntry(id=name, info=keys.describe(data, name), current=False)


def remove(repository: Repository, text: str) -> KeyEntry:
    """Remove the key whose id begins with `text`. The one that is in use stays, so there is always one.

    Raises `UsageError` for that one, and if none or several begin so; `BusyError`.
    """
    with repository.lock(exclusive=True):
        found = [entry for entry in listed(repository) if text and entry.id.startswith(text.lower())]
        if len(found) != 1:
            problem = f"{text!r} is the start of {len(found) or 'no'} key's id" + ("s" if len(found) > 1 else "")
            raise errors.UsageError(problem=f"{problem} (`pullback key list` shows them)")
        [entry] = found
        if entry.current:
            problem = f"Key {entry.id[:8]} opened the repository just now; open it with another password to remove it"
            raise errors.UsageError(problem=problem)
        _require_current(repository)
        repository.store.delete(Kind.KEYS, entry.id)
        return entry


def change(repository: Repository, password: str, *, cost: keys.Cost = keys.DEFAULT_COST) -> KeyEntry:
    """Replace the key that opened the repository by one with another password; gives the new one."""
    with repository.lock(exclusive=True):
        _require_current(repository)
        made = _added(repository, password, cost)
        repository.store.delete(Kind.KEYS, repository.key_name)
    repository.key_name = made.id
    return KeyEntry(id=made.id, info=made.info, current=True)


def _require_current(repository: Repository) -> None:
    """Two who remove each other's key must not leave none: ours is still there, and nobody else may remove now."""
    if all(stored.name != repository.key_name for stored in repository.store.list(Kind.KEYS)):
        raise errors.ObjectMissing(store=repository.name, name=f"keys/{repository.key_name}")
