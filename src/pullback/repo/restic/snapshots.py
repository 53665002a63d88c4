"""Snapshots: a tree, when it was taken, of what, and by whom ("Snapshots").

The file's name is the snapshot's id. Fields that a later restic may add are kept as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pullback.repo.restic import documents, times
from pullback.repo.restic.types import Buffer

_KNOWN = frozenset(
    {
        "time",
        "parent",
        "tree",
        "paths",
        "hostname",
        "username",
        "uid",
        "gid",
        "excludes",
        "tags",
        "original",
        "program_version",
    }
)
_MAX_UID = (1 << 32) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A snapshot. Ids in hex."""

    #: RFC 3339, with nine digits after the second if restic wrote it.
    time: str
    #: Id of the root tree.
    tree: str
    #: Id of the snapshot that this one was made upon.
    parent: str | None = None
    #: What was backed up. `forget` groups by host and paths.
    paths: tuple[str, ...] = ()
    hostname: str = ""
    username: str = ""
    uid: int = 0
    gid: int = 0
    excludes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    #: Id of the snapshot whose tags were changed to make this one.
    original: str | None = None
    program_version: str = ""
    #: Fields that we do not know.
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def when(self) -> datetime:
        """`time`, in UTC."""
        return times.read(self.time)


def encode(snapshot: Snapshot) -> bytes:
    """The document."""
    optional: dict[str, object] = {
        "hostname": snapshot.hostname,
        "username": snapshot.username,
        "uid": snapshot.uid,
        "gid": snapshot.gid,
        "excludes": list(snapshot.excludes),
        "tags": list(snapshot.tags),
        "original": snapshot.original,
        "program_version": snapshot.program_version,
    }
    return documents.dump(
        {
            "time": snapshot.time,
            **({"parent": snapshot.parent} if snapshot.parent else {}),
            "tree": snapshot.tree,
            "paths": list(snapshot.paths),
            **{name: value for name, value in optional.items() if value},
            **snapshot.extra,
        }
    )


def parse(data: Buffer, where: str) -> Snapshot:
    """What the document says. Raises `RepositoryDamaged`."""
    fields = documents.load(data, where)
    snapshot = Snapshot(
        time=fields.text("time"),
        tree=fields.identifier("tree"),
        parent=fields.identifier("parent", "") or None,
        paths=fields.texts("paths"),
        hostname=fields.text("hostname", ""),
        username=fields.text("username", ""),
        uid=fields.integer("uid", 0, most=_MAX_UID),
        gid=fields.integer("gid", 0, most=_MAX_UID),
        excludes=fields.texts("excludes"),
        tags=fields.texts("tags"),
        original=fields.identifier("original", "") or None,
        program_version=fields.text("program_version", ""),
        extra=fields.others(_KNOWN),
    )
    try:
        times.read(snapshot.time)
    except ValueError:
        fields.fail("its time is none")
    return snapshot
