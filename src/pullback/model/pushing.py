"""Pushing: the hypervisor itself copies disks of one instant to destinations.

    push  =  the frozen view of a snapshot  +  one copying job per disk, inside the hypervisor

So a push needs nobody who reads. It goes on when the program that began it has ended; what any other
program needs to go on with it is one value, `Pushed`, that becomes JSON and comes from it.

What lies at a destination afterwards:

- a whole copy: the disk. A new raw file is sparse where the disk is.
- an increment (`PushPart.since`) to something new: only the clusters that changed, in an image without a
  backing file; a raw one has holes elsewhere. It is of use to who knows what lies below it. Who wants a
  chain makes the image beforehand, backed by the last one, and says `reuse`.
- with `reuse`: what was there, with the clusters on top that were copied.
"""

from __future__ import annotations

import enum
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pullback import errors
from pullback.model import checkpoints
from pullback.model.backups import DiskRequest, Fleecing, Quiescing, SnapshotRequest
from pullback.model.checkpoints import Mark
from pullback.model.disks import Disk

T = TypeVar("T")

NBD_PORT = 10809


class Kind(enum.StrEnum):
    """What a destination is."""

    #: A file: made by us, unless it is to be reused.
    FILE = "file"
    #: A block device, which is there already.
    BLOCK = "block"
    #: An export of somebody's NBD server.
    NBD = "nbd"


class Format(enum.StrEnum):
    """The format of an image at a destination."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdServer:
    """Where an NBD URI leads (NBD URI specification)."""

    #: The socket; None for TCP.
    socket: Path | None
    host: str = ""
    port: int = NBD_PORT
    export: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a disk is copied to. Made by `file`, `block` and `nbd`, which check."""

    kind: Kind
    #: An absolute path, or an NBD URI.
    place: str
    format: Format = Format.QCOW2
    #: It was made by the caller: its format and size must fit, and it is not removed when the push fails.
    reuse: bool = False
    #: Compress what is copied (qcow2 only).
    compress: bool = False

    @property
    def server(self) -> NbdServer:
        """Where its URI leads."""
        return parse_nbd(self.place)

    @property
    def path(self) -> Path:
        """Its path, of a file or block device."""
        return Path(self.place)

    @classmethod
    def file(
        cls, path: str | Path, format: Format = Format.QCOW2, *, reuse: bool = False, compress: bool = False
    ) -> Destination:
        """A file. Raises `UsageError`."""
        return cls._checked(Kind.FILE, _absolute(path), format, reuse=reuse, compress=compress)

    @classmethod
    def block(
        cls, path: str | Path, format: Format = Format.RAW, *, reuse: bool = False, compress: bool = False
    ) -> Destination:
        """A block device, at least as large as the disk. Raises `UsageError`.

        Without `reuse`, a qcow2 image is made in it; what was there is lost.
        """
        return cls._checked(Kind.BLOCK, _absolute(path), format, reuse=reuse, compress=compress)

    @classmethod
    def nbd(cls, uri: str, format: Format = Format.RAW, *, reuse: bool = False, compress: bool = False) -> Destination:
        """An NBD export, at least as large as the disk. Otherwise like `block`. Raises `UsageError`."""
        parse_nbd(uri)
        return cls._checked(Kind.NBD, uri, format, reuse=reuse, compress=compress)

    @classmethod
    def _checked(cls, kind: Kind, place: str, format: Format, *, reuse: bool, compress: bool) -> Destination:
        if compress and format is not Format.QCOW2:
            raise errors.UsageError(problem="Only qcow2 can be compressed")
        return cls(kind=kind, place=place, format=format, reuse=reuse, compress=compress)


def _absolute(path: str | Path) -> str:
    if not Path(path).is_absolute() or "\0" in str(path):
        raise errors.UsageError(problem=f"A destination is an absolute path, not {str(path)!r}")
    return str(path)


def parse_nbd(uri: str) -> NbdServer:
    """Read `nbd://host:port/export` or `nbd+unix:///export?socket=/path`. Raises `UsageError`."""
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme.startswith("nbds"):
        raise errors.UsageError(problem="A push cannot use NBD with TLS (nbds:): take a unix socket or a tunnel")
    export = urllib.parse.unquote(parts.path.removeprefix("/"))
    query = urllib.parse.parse_qs(parts.query)
    try:
        if parts.scheme == "nbd+unix" and not parts.netloc and set(query) == {"socket"} and len(query["socket"]) == 1:
            return NbdServer(socket=Path(_absolute(query["socket"][0])), export=export)
        if parts.scheme in ("nbd", "nbd+tcp") and parts.hostname and not query and not parts.username:
            port = NBD_PORT if parts.port is None else parts.port
            return NbdServer(socket=None, host=parts.hostname, port=port, export=export)
    except ValueError:  # the port is no number
        pass
    example = "nbd://host:10809/export or nbd+unix:///export?socket=/path"
    raise errors.UsageError(problem=f"{uri!r} is no NBD URI that can be pushed to ({example})")


# -- what is asked ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPart:
    """One disk's part in a push."""

    disk: Disk
    destination: Destination
    #: Bitmaps whose union is to be copied; empty: everything.
    since: tuple[str, ...] = ()
    #: The checkpoint to be made in the same instant.
    checkpoint: Mark | None = None
    #: The bitmap that records until then, to be frozen.
    freeze: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PushRequest:
    """Copy these disks, as they are at one instant, to their destinations."""

    #: Eight hex digits; every name that we make carries it.
    job: str
    parts: tuple[PushPart, ...]
    #: Directory for scratch images.
    scratch: Path
    fleecing: Fleecing | None = None
    #: Bytes per second for each disk; None: as fast as it goes.
    speed: int | None = None
    quiescing: Quiescing = field(default_factory=Quiescing)

    @property
    def snapshot(self) -> SnapshotRequest:
        """The snapshot that is copied from."""
        disks = [
            DiskRequest(disk=part.disk, since=part.since, checkpoint=part.checkpoint, freeze=part.freeze)
            for part in self.parts
        ]
        return SnapshotRequest(
            job=self.job,
            disks=tuple(disks),
            scratch=self.scratch,
            fleecing=self.fleecing,
            quiescing=self.quiescing,
            pushed=True,
        )


# -- how it goes -----------------------------------------------------------------------------


class PushStatus(enum.StrEnum):
    """How it stands with one disk."""

    #: Not begun.
    PENDING = "pending"
    RUNNING = "running"
    PAUSED = "paused"
    #: All is copied; it becomes a backup when all disks are there and the push is concluded.
    CONCLUDED = "concluded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PushProgress:
    """How far one disk is."""

    target: str
    #: Bytes copied, and bytes to copy.
    done: int
    total: int
    status: PushStatus
    #: Why it failed, in the hypervisor's words.
    error: str | None = None
    #: The limit in bytes per second, or None.
    speed: int | None = None


# -- the description -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PushedDisk:
    """One disk of a push that is under way."""

    #: Its number: part of the names.
    index: int
    target: str
    #: Bytes.
    size: int
    #: The disk's own node, which has the bitmaps.
    node: str
    destination: Destination
    incremental: bool
    #: What is written to now, if it has another name than in the end.
    part: str | None = None
    #: A qcow2 without data through which a sparse raw file is written.
    meta: str | None = None
    #: Bytes of a chunk of the copy.
    chunk: int = checkpoints.GRANULARITY
    checkpoint: Mark | None = None
    freeze: str | None = None
    #: How it was frozen (None: nobody writes to it), and why so.
    fleecing: Fleecing | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """A push that is under way: what another process needs to go on with it."""

    job: str
    disks: tuple[PushedDisk, ...]
    #: The instant, UTC; None before it.
    moment: datetime | None = None

    def document(self) -> dict[str, object]:
        """As JSON has it."""
        moment = self.moment.isoformat() if self.moment else None
        return {"job": self.job, "moment": moment, "disks": [_disk_document(disk) for disk in self.disks]}


def _disk_document(disk: PushedDisk) -> dict[str, object]:
    to = disk.destination
    return {
        "index": disk.index,
        "target": disk.target,
        "size": disk.size,
        "node": disk.node,
        "destination": {
            "kind": str(to.kind),
            "place": to.place,
            "format": str(to.format),
            "reuse": to.reuse,
            "compress": to.compress,
        },
        "incremental": disk.incremental,
        "part": disk.part,
        "meta": disk.meta,
        "chunk": disk.chunk,
        "checkpoint": disk.checkpoint.bitmap if disk.checkpoint else None,
        "freeze": disk.freeze,
        "fleecing": str(disk.fleecing) if disk.fleecing else None,
        "reason": disk.reason,
    }


def pushed(document: Mapping[str, Any]) -> Pushed:
    """Read what `Pushed.document` gave. Raises `BadDocument`."""
    try:
        return Pushed(
            job=_exactly(str, document["job"]),
            moment=_maybe(datetime.fromisoformat, document["moment"]),
            disks=tuple(_disk(disk) for disk in document["disks"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, errors.UsageError) as error:
        raise errors.BadDocument(document="push", field="document", problem=f"is damaged ({error})") from error


def _disk(document: Mapping[str, Any]) -> PushedDisk:
    to = document["destination"]
    make = {Kind.FILE: Destination.file, Kind.BLOCK: Destination.block, Kind.NBD: Destination.nbd}[Kind(to["kind"])]
    destination = make(
        _exactly(str, to["place"]),
        Format(to["format"]),
        reuse=_exactly(bool, to["reuse"]),
        compress=_exactly(bool, to["compress"]),
    )
    return PushedDisk(
        index=_exactly(int, document["index"]),
        target=_exactly(str, document["target"]),
        size=_exactly(int, document["size"]),
        node=_exactly(str, document["node"]),
        destination=destination,
        incremental=_exactly(bool, document["incremental"]),
        part=_maybe(_absolute, document["part"]),
        meta=_maybe(_absolute, document["meta"]),
        chunk=_exactly(int, document["chunk"]),
        checkpoint=_maybe(_mark, document["checkpoint"]),
        freeze=_maybe(lambda value: _exactly(str, value), document["freeze"]),
        fleecing=_maybe(Fleecing, document["fleecing"]),
        reason=_exactly(str, document["reason"]),
    )


def _exactly(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def _maybe(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def _mark(bitmap: str) -> Mark:
    found = checkpoints.parse(bitmap)
    if found is None:
        raise ValueError(f"{bitmap!r} is no bitmap of ours")
    return found
