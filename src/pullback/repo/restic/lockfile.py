"""Locks: who is at work on the repository, and since when ("Locks").

A lock is never changed: its owner writes a new one every five minutes and deletes the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from pullback.repo.restic import documents, times
from pullback.repo.restic.types import Buffer

#: A lock that was not refreshed for this long is stale.
STALE_AFTER = timedelta(minutes=30)
#: How often restic refreshes a lock.
REFRESH_EVERY = timedelta(minutes=5)

_MAX_UID = (1 << 32) - 1
_MAX_PID = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A lock."""

    #: When it was written, RFC 3339.
    time: str
    #: Alone (prune), or beside others (backup, restore).
    exclusive: bool
    hostname: str
    username: str
    #: Of the process that holds it, on its host.
    pid: int
    uid: int = 0
    gid: int = 0

    @property
    def when(self) -> datetime:
        """`time`, in UTC."""
        return times.read(self.time)

    def conflicts(self, exclusive: bool) -> bool:
        """Does it forbid another lock, which is exclusive or not?"""
        return self.exclusive or exclusive


def encode(lock: Lock) -> bytes:
    """The document."""
    document = {
        "time": lock.time,
        "exclusive": lock.exclusive,
        "hostname": lock.hostname,
        "username": lock.username,
        "pid": lock.pid,
        **({"uid": lock.uid} if lock.uid else {}),
        **({"gid": lock.gid} if lock.gid else {}),
    }
    return documents.dump(document)


def parse(data: Buffer, where: str) -> Lock:
    """What the document says. Raises `RepositoryDamaged`."""
    fields = documents.load(data, where)
    lock = Lock(
        time=fields.text("time"),
        exclusive=fields.flag("exclusive", False),
        hostname=fields.text("hostname", ""),
        username=fields.text("username", ""),
        pid=fields.integer("pid", 0, most=_MAX_PID),
        uid=fields.integer("uid", 0, most=_MAX_UID),
        gid=fields.integer("gid", 0, most=_MAX_UID),
    )
    try:
        times.read(lock.time)
    except ValueError:
        fields.fail("its time is none")
    return lock
