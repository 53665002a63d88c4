"""`domainbackup`: a backup job, as `virDomainBackupBegin` takes it.

JSON form (keys that say nothing are left out; `*` must be there):

    {"mode": "push" (default) | "pull",
     "incremental": "<checkpoint>",           changes since then; absent: everything
     "server": {"transport": "tcp" (default) | "unix" | "fd",     pull only
                "name": "<host>" (* for tcp), "port": 10809,      tcp
                "socket": "/run/x.sock" (* for unix),
                "fdgroup": "<name>" (* for fd),
                "tls": true},
     "disks": [{"name": "vda" *, "backup": true (default),
                "type": "file" | "block" | "network",   * in a push, file by default in a pull
                "backupmode": "full" | "incremental",
                "incremental": "<checkpoint>",
                "exportname": "…", "exportbitmap": "…",           pull only
                "index": 3,                   told by a running job, never asked for
                "driver": "qcow2",            format; in a pull only qcow2
                "target": {…},                push only  | see `pullback.model.documents.storage`
                "scratch": {…}}]}             pull only  |

The rules are those of libvirt (its schema, which it always applies to this document, and its code;
9.0 to 11.3). Of a disk with `backup: false` all else is dropped, as there. Differences:

- a pull without `server` is read here and refused by `effective`, so that a caller can put its own
  server in; libvirt's code has a default for it (localhost, without the port that it then demands),
  its schema refuses it
- transport `fd` is read; libvirt's schema has it only in later releases
- disks have other targets too, such as nvme0n1
- `index` is read, so that what a running job of libvirt tells can be read (its schema refuses it)
- paths are absolute in the sense of Linux, of a length that Linux opens, and without control characters
- type `network` with the URI of an NBD server is ours alone, for the target of a push
- `effective` refuses a file or export name that two disks would share, and a file that is a disk's source
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from pullback.model.documents import rules
from pullback.model.documents.fields import Fields, Place, plain
from pullback.model.documents.machine import Machine, MachineDisk, Moment
from pullback.model.documents.storage import Format, Store, StoreType, store

ROOT = "domainbackup"
_MAX_PORT = 65535
_MAX_INDEX = (1 << 32) - 1


class Mode(StrEnum):
    """Who moves the data."""

    #: The hypervisor writes it to targets.
    PUSH = "push"
    #: A client reads it over NBD.
    PULL = "pull"


class Transport(StrEnum):
    """How clients reach the NBD server of a pull."""

    TCP = "tcp"
    UNIX = "unix"
    #: A listening socket that the caller hands over (libvirt: virDomainFDAssociate).
    FD = "fd"


class DiskMode(StrEnum):
    """How much of a disk is backed up."""

    FULL = "full"
    INCREMENTAL = "incremental"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The NBD server of a pull."""

    transport: Transport = Transport.TCP
    #: tcp: the host's name or address to listen on.
    name: str | None = None
    #: tcp: None if not said (0 in XML means the same).
    port: int | None = None
    #: unix: absolute path.
    socket: str | None = None
    #: fd: name of the group that holds the one descriptor.
    fdgroup: str | None = None
    tls: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupDisk:
    """One disk's part in a job."""

    #: Its target: vda.
    name: str
    #: False: it is left out, and nothing else is said of it.
    backup: bool = True
    type: StoreType = StoreType.FILE
    #: None: follows whether there is a checkpoint to begin from.
    backupmode: DiskMode | None = None
    #: Checkpoint for this disk, instead of the job's.
    incremental: str | None = None
    #: Pull: name of the NBD export, the target by default.
    exportname: str | None = None
    #: Pull: name of the exported bitmap, `backup-TARGET` by default.
    exportbitmap: str | None = None
    #: Told by a running job: the number for block thresholds (`vda[3]`).
    index: int | None = None
    #: Format of target or scratch, qcow2 by default.
    driver: Format | None = None
    #: Push: where the data goes.
    target: Store | None = None
    #: Pull: where old blocks are kept while the job runs.
    scratch: Store | None = None

    @property
    def store(self) -> Store | None:
        """Target or scratch, whichever there is."""
        return self.target or self.scratch

    @property
    def context(self) -> str | None:
        """The NBD metadata context that tells the changed blocks, if they are told."""
        return f"qemu:dirty-bitmap:{self.exportbitmap}" if self.exportbitmap else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupDocument:
    """A backup job."""

    mode: Mode = Mode.PUSH
    #: Checkpoint since which changes are wanted; None: everything.
    incremental: str | None = None
    #: Pull only.
    server: Server | None = None
    #: Empty: all disks that are writable and have a medium.
    disks: tuple[BackupDisk, ...] = ()

    @property
    def taking_part(self) -> tuple[BackupDisk, ...]:
        """The disks that are backed up; of an effective document, all of them."""
        return tuple(disk for disk in self.disks if disk.backup)


# -- JSON ------------------------------------------------------------------------------------


def to_dict(document: BackupDocument) -> dict[str, object]:
    """The document as JSON values; the form stands above."""
    return {**plain(document), **({"disks": [_disk_dict(disk) for disk in document.disks]} if document.disks else {})}


def _disk_dict(disk: BackupDisk) -> dict[str, object]:
    return plain(disk) if disk.backup else {"name": disk.name, "backup": False}


def from_dict(values: object) -> BackupDocument:
    """The document that JSON values describe. Raises `BadDocument` for anything that breaks a rule."""
    fields = Fields(values, Place(document=ROOT))
    mode = fields.choice("mode", Mode) or Mode.PUSH
    inner = fields.inner("server")
    if inner and mode is Mode.PUSH:
        raise fields.bad("server", "needs mode pull")
    document = BackupDocument(
        mode=mode,
        incremental=fields.text("incremental", rules.checkpoint_name),
        server=_server(inner) if inner else None,
        disks=tuple(_disk(item, mode) for item in fields.items("disks")),
    )
    fields.end()
    return document


def _server(fields: Fields) -> Server:
    transport = fields.choice("transport", Transport) or Transport.TCP
    server = Server(
        transport=transport,
        name=fields.text("name", rules.host),
        port=fields.integer("port", _MAX_PORT) or None,
        socket=fields.text("socket", rules.socket),
        fdgroup=fields.text("fdgroup", rules.short),
        tls=fields.flag("tls"),
    )
    needed, allowed = {
        Transport.TCP: ("name", {"name", "port"}),
        Transport.UNIX: ("socket", {"socket"}),
        Transport.FD: ("fdgroup", {"fdgroup"}),
    }[transport]
    for key in ("name", "port", "socket", "fdgroup"):
        if fields.has(key) and key not in allowed:
            raise fields.bad(key, f"does not fit transport {transport}")
    fields.need(needed, getattr(server, needed))
    fields.end()
    return server


def _disk(fields: Fields, mode: Mode) -> BackupDisk:
    name = fields.need("name", fields.text("name", rules.target))
    if fields.flag("backup") is False:
        return _left_out(fields, name, mode)
    kind = fields.choice("type", StoreType)
    if kind is None and mode is Mode.PUSH:
        raise fields.bad("type", "is missing: file or block")
    kind = kind or StoreType.FILE
    _one_sided(fields, mode)
    inner = fields.inner(_place_key(mode))
    disk = BackupDisk(
        name=name,
        type=kind,
        backupmode=fields.choice("backupmode", DiskMode),
        incremental=fields.text("incremental", rules.checkpoint_name),
        exportname=fields.text("exportname", rules.export_name),
        exportbitmap=fields.text("exportbitmap", rules.bitmap_name),
        index=fields.integer("index", _MAX_INDEX) or None,
        driver=fields.choice("driver", Format),
    )
    disk = _placed(disk, store(inner, kind) if inner else None, mode)
    fields.end()
    _agree(fields, disk, mode)
    return disk


def _left_out(fields: Fields, name: str, mode: Mode) -> BackupDisk:
    """A disk with backup no: libvirt reads no further, but its schema still refuses a place."""
    for key in ("type", "driver", "target", "scratch", "index"):
        if fields.has(key):
            raise fields.bad(key, "does not fit backup=no")
    fields.choice("backupmode", DiskMode)
    for key in ("incremental", "exportname", "exportbitmap"):
        fields.text(key, rules.words)
    _one_sided(fields, mode)
    fields.end()
    return BackupDisk(name=name, backup=False)


def _one_sided(fields: Fields, mode: Mode) -> None:
    """Refuse what belongs to the other mode, and a checkpoint where everything is wanted."""
    foreign = ("scratch", "exportname", "exportbitmap") if mode is Mode.PUSH else ("target",)
    for key in foreign:
        if fields.has(key):
            raise fields.bad(key, f"does not fit mode {mode}")
    if fields.has("incremental") and fields.choice("backupmode", DiskMode) is DiskMode.FULL:
        raise fields.bad("incremental", "does not fit backupmode full")


def _agree(fields: Fields, disk: BackupDisk, mode: Mode) -> None:
    """Rules of a pull's scratch: libvirt formats it as qcow2, and makes up no block device."""
    if mode is Mode.PUSH:
        return
    if disk.type is StoreType.NETWORK:
        raise fields.bad("type", "must be file or block in a pull")
    if disk.driver not in (None, Format.QCOW2):
        raise fields.bad("driver", "must be qcow2 in a pull")
    if disk.scratch is None and (disk.driver is not None or disk.type is StoreType.BLOCK):
        raise fields.bad("scratch", "is missing")


def _place_key(mode: Mode) -> str:
    return "target" if mode is Mode.PUSH else "scratch"


def _placed(disk: BackupDisk, where: Store | None, mode: Mode) -> BackupDisk:
    return replace(disk, target=where) if mode is Mode.PUSH else replace(disk, scratch=where)


# -- defaults --------------------------------------------------------------------------------


def effective(
    document: BackupDocument,
    disks: Sequence[MachineDisk],
    moment: Moment,
    *,
    directory: str | None = None,
    autoport: bool = False,
) -> BackupDocument:
    """The document with nothing left open, as libvirt tells it of a running job.

    Every disk of the machine is in it: those listed first, in their order, then the others with
    `backup=False`; without a list, all that are writable and have a medium take part. Files that
    are not named are called `SOURCE.SUFFIX`, where SUFFIX is `moment.name`, or
    `directory/TARGET.SUFFIX` if a directory is given. With `autoport` a server needs no port: it is left
    open, as the socket of a server without one is. Raises `BadDocument`: no disks, an unknown
    one, one listed twice or without a medium, no checkpoint for an increment, a server that cannot
    be reached, a file or export name used twice.
    """
    machine = Machine(disks, Place(document=ROOT))
    _check_server(document, machine.place, autoport=autoport)
    machine.once(disk.name for disk in document.disks)
    listed = document.disks or tuple(BackupDisk(name=disk.target) for disk in disks if disk.takes_part)
    filled = [_filled(document, disk, machine, moment, directory) for disk in listed]
    rest = [BackupDisk(name=disk.target, backup=False) for disk in machine.others(disk.name for disk in listed)]
    found = replace(document, disks=(*filled, *rest))
    _check_disks(found, machine)
    return found


def _check_server(document: BackupDocument, place: Place, *, autoport: bool) -> None:
    """Libvirt makes up no port (up to 12.5)."""
    server = document.server
    if document.mode is Mode.PUSH:
        if server is not None:
            raise place.at("server").bad("needs mode pull")
    elif server is None or (server.transport is Transport.TCP and server.port is None and not autoport):
        raise place.at("server").at("port").bad("is missing")


def _filled(
    document: BackupDocument, disk: BackupDisk, machine: Machine, moment: Moment, directory: str | None
) -> BackupDisk:
    found = machine.find(disk.name)
    if not disk.backup:
        return BackupDisk(name=disk.name, backup=False)
    if found.empty:
        raise machine.at(disk.name).bad("has no medium")
    disk = _since(document, disk, machine.at(disk.name))
    disk = replace(disk, driver=disk.driver or Format.QCOW2)
    if disk.store is None:
        disk = _placed(disk, _invented(document, disk, machine, moment, directory), document.mode)
    return _exported(disk) if document.mode is Mode.PULL else disk


def _since(document: BackupDocument, disk: BackupDisk, place: Place) -> BackupDisk:
    """Mode and checkpoint of a disk: its own checkpoint, else the job's, decides both."""
    since = disk.incremental or document.incremental
    mode = disk.backupmode or (DiskMode.INCREMENTAL if since else DiskMode.FULL)
    if mode is DiskMode.FULL:
        return replace(disk, backupmode=mode, incremental=None)
    if since is None:
        raise place.at("incremental").bad("is missing, for the disk and for the job")
    return replace(disk, backupmode=mode, incremental=since)


def _invented(
    document: BackupDocument, disk: BackupDisk, machine: Machine, moment: Moment, directory: str | None
) -> Store:
    key = _place_key(document.mode)
    if disk.type is not StoreType.FILE:
        raise machine.at(disk.name).at(key).bad("is missing")
    return Store(file=machine.invent(machine.find(disk.name), moment.name, directory, key))


def _exported(disk: BackupDisk) -> BackupDisk:
    bitmap = f"backup-{disk.name}" if disk.incremental else None
    return replace(
        disk,
        exportname=disk.name if disk.exportname is None else disk.exportname,
        exportbitmap=disk.exportbitmap or bitmap,
    )


def _check_disks(document: BackupDocument, machine: Machine) -> None:
    part = document.taking_part
    if not part:
        raise machine.place.at("disks").bad("cannot be: none would take part")
    places = [(disk.name, disk.store.path) for disk in part if disk.store]
    machine.distinct([(name, path) for name, path in places if path], _place_key(document.mode))
    names: set[str | None] = set()
    for disk in part if document.mode is Mode.PULL else ():
        if disk.exportname in names:
            raise machine.at(disk.name).at("exportname").bad("is that of another disk too")
        names.add(disk.exportname)
