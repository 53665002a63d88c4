"""`domainblockexport`: what is served over NBD (the external backup API of 2018).

    <domainblockexport type='nbd'>
      <address type='ip' host='192.0.2.1' port='10809' tls='yes'/>
      <disk name='vda' snapshot='before-upgrade' exportname='web01-vda' checkpoint='monday'/>
    </domainblockexport>

JSON form (keys that say nothing are left out; `*` must be there):

    {"type": "nbd" (default),
     "address": {"type": "ip" (default) | "unix",
                 "host": "…" (* for ip), "port": 10809, "autoport": true, "tls": true,
                 "socket": "/run/x.sock" (* for unix)},
     "disks": [{"name": "vda" or "/path" *, "exportname": "…", "snapshot": "…",
                "checkpoint": "…"  or  "allcheckpoints": true, "readonly": true}]}

That API never became a part of libvirt, and its schema is known from its author's product only. Our
reading: disks stand directly under the root. Without `snapshot` the disk itself is served: read
only, unless `readonly` says no (for a restore). A snapshot is always read only. Checkpoints are served
with a snapshot only, because the changes of a disk that is being written have no end. Without a port
there is an automatic one. Ours alone: addresses of type `unix`, and no address at all, which means
the place that the machine's exports have (a private unix socket).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from pullback.model.documents import rules
from pullback.model.documents.fields import Fields, Place, plain
from pullback.model.documents.machine import Machine, MachineDisk

ROOT = "domainblockexport"
_MAX_PORT = 65535


class AddressType(StrEnum):
    """What a server listens on."""

    IP = "ip"
    UNIX = "unix"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the server listens."""

    type: AddressType = AddressType.IP
    #: ip: the host's name or address.
    host: str | None = None
    #: ip: None if not said (0 in XML means the same).
    port: int | None = None
    #: ip: a free port is found; the default without a port.
    autoport: bool | None = None
    #: unix: absolute path.
    socket: str | None = None
    tls: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportDisk:
    """One export."""

    #: The disk's target, or the absolute path of its source.
    name: str
    #: `TARGET` or `TARGET-SNAPSHOT` by default.
    exportname: str | None = None
    #: Name of the snapshot that is served; None: the disk itself.
    snapshot: str | None = None
    #: The checkpoint since which changes are told.
    checkpoint: str | None = None
    #: Changes since each checkpoint are told.
    allcheckpoints: bool | None = None
    readonly: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportDocument:
    """Exports of one NBD server."""

    #: Only `nbd`.
    type: str = "nbd"
    address: Address | None = None
    #: One or more.
    disks: tuple[ExportDisk, ...]


def to_dict(document: ExportDocument) -> dict[str, object]:
    """The document as JSON values; the form stands above."""
    return plain(document)


def from_dict(values: object) -> ExportDocument:
    """The document that JSON values describe. Raises `BadDocument` for anything that breaks a rule."""
    fields = Fields(values, Place(document=ROOT))
    fields.word("type", "nbd")
    inner = fields.inner("address")
    document = ExportDocument(
        address=_address(inner) if inner else None,
        disks=tuple(_disk(item) for item in fields.items("disks")),
    )
    fields.end()
    if not document.disks:
        raise fields.bad("disks", "is missing")
    return document


def _address(fields: Fields) -> Address:
    kind = fields.choice("type", AddressType) or AddressType.IP
    address = Address(
        type=kind,
        host=fields.text("host", rules.host),
        port=fields.integer("port", _MAX_PORT) or None,
        autoport=fields.flag("autoport"),
        socket=fields.text("socket", rules.socket),
        tls=fields.flag("tls"),
    )
    fields.end()
    foreign = ("socket",) if kind is AddressType.IP else ("host", "port", "autoport")
    for key in foreign:
        if fields.has(key):
            raise fields.bad(key, f"does not fit type {kind}")
    needed = "host" if kind is AddressType.IP else "socket"
    fields.need(needed, getattr(address, needed))
    if address.port and address.autoport:
        raise fields.bad("port", "does not fit autoport=yes")
    return address


def _disk(fields: Fields) -> ExportDisk:
    disk = ExportDisk(
        name=fields.need("name", fields.text("name", rules.target_or_path)),
        exportname=fields.text("exportname", rules.export_name),
        snapshot=fields.text("snapshot", rules.checkpoint_name),
        checkpoint=fields.text("checkpoint", rules.checkpoint_name),
        allcheckpoints=fields.flag("allcheckpoints"),
        readonly=fields.flag("readonly"),
    )
    fields.end()
    if disk.checkpoint and disk.allcheckpoints:
        raise fields.bad("checkpoint", "does not fit allcheckpoints=yes")
    if disk.snapshot is None and (disk.checkpoint or disk.allcheckpoints):
        raise fields.bad("snapshot", "is missing: checkpoints are served with one only")
    if disk.snapshot is not None and disk.readonly is False:
        raise fields.bad("readonly", "must be yes for a snapshot")
    return disk


def effective(document: ExportDocument, disks: Sequence[MachineDisk]) -> ExportDocument:
    """The document with nothing left open, but for an automatic port and the address if there is none.

    The same disk may be listed more than once (with different snapshots). Raises `BadDocument`: no
    disks, an unknown one, one without a medium, two exports of one name, no port where one is needed.
    """
    machine = Machine(disks, Place(document=ROOT))
    filled = tuple(_filled(disk, machine) for disk in document.disks)
    _distinct_names(filled, machine)
    return replace(document, address=_filled_address(document.address, machine.place), disks=filled)


def _filled_address(address: Address | None, place: Place) -> Address | None:
    if address is None or address.type is AddressType.UNIX:
        return address and replace(address, tls=bool(address.tls))
    if address.port is None and address.autoport is False:
        raise place.at("address").at("port").bad("is missing")
    return replace(address, autoport=address.port is None, tls=bool(address.tls))


def _filled(disk: ExportDisk, machine: Machine) -> ExportDisk:
    found = machine.find_by_path(disk.name)
    if found.empty:
        raise machine.at(disk.name).bad("has no medium")
    default = f"{found.target}-{disk.snapshot}" if disk.snapshot else found.target
    return replace(
        disk,
        name=found.target,
        exportname=default if disk.exportname is None else disk.exportname,
        allcheckpoints=bool(disk.allcheckpoints),
        readonly=disk.readonly is not False,
    )


def _distinct_names(disks: tuple[ExportDisk, ...], machine: Machine) -> None:
    names: set[str | None] = set()
    for disk in disks:
        if disk.exportname in names:
            raise machine.at(disk.name).at("exportname").bad("is that of another export too")
        names.add(disk.exportname)
