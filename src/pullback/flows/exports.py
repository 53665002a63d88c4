"""Exports over NBD for others: of snapshots, and of disks themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pullback import errors
from pullback.flows import checkpoints as checkpoint_flow
from pullback.flows import snapshots
from pullback.machine import Machine
from pullback.model import checkpoints
from pullback.model.disks import Disk
from pullback.model.documents import export as documents
from pullback.model.documents.export import Address, AddressType, ExportDisk, ExportDocument
from pullback.model.exports import Listen, Served, Tls, TlsKind
from pullback.model.snapshots import ExportWish, OpenSnapshot

#: Where TLS credentials are looked for when a document only says that TLS is wanted.
TLS_VARIABLE, TLS_DIRECTORY = "PULLBACK_TLS_DIR", "/etc/pullback/tls"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may connect."""

    #: Credentials; None: those of the default directory, where TLS is wanted.
    tls: Tls | None = None
    #: TCP without TLS is meant.
    insecure: bool = False
    max_connections: int | None = None


def default_tls() -> Tls:
    """$PULLBACK_TLS_DIR, else /etc/pullback/tls: with keys.psk for shared keys, else certificates."""
    directory = Path(os.environ.get(TLS_VARIABLE) or TLS_DIRECTORY)
    kind = TlsKind.PSK if (directory / "keys.psk").exists() else TlsKind.X509
    return Tls(kind=kind, directory=directory)


def listen(address: Address | None, access: Access) -> Listen:
    """Where the server is wanted."""
    if address is None:
        return unix(None, wanted=None, access=access)
    if address.type is AddressType.UNIX:
        return unix(address.socket, wanted=address.tls, access=access)
    return tcp(address.host, address.port, wanted=address.tls, access=access)


def unix(socket: str | None, *, wanted: bool | None, access: Access) -> Listen:
    """A unix socket, whose file modes say who may connect. Raises `UsageError` if TLS is wanted there."""
    if wanted or access.tls is not None:
        raise errors.UsageError(problem="TLS goes with a host and port, not with a unix socket")
    return Listen(socket=Path(socket) if socket else None, max_connections=access.max_connections)


def tcp(host: str | None, port: int | None, *, wanted: bool | None, access: Access) -> Listen:
    """A host and port, with TLS unless it is meant otherwise."""
    tls = access.tls or (default_tls() if wanted else None)
    return Listen(host=host, port=port, tls=tls, insecure=access.insecure, max_connections=access.max_connections)


async def start(machine: Machine, document: ExportDocument, access: Access | None = None) -> tuple[Served, ...]:
    """Serve what the document names: all of it, or nothing.

    Raises `BadDocument`, `NoSnapshot`, `CheckpointInconsistent`, `NbdServerBusy`, `InsecureExport`,
    `ExportExists`, `DiskBusy` (a disk for writing, under a running guest), `Unsupported`.
    """
    disks = await machine.disks()
    whole = documents.effective(document, checkpoint_flow.machine_disks(disks))
    open_ones = await snapshots.listing(machine)
    by_target = {disk.target: disk for disk in disks}
    wishes = [_wish(machine, disk, by_target[disk.name], open_ones) for disk in whole.disks]
    return await machine.serve(wishes, listen(whole.address, access or Access()))


def _wish(machine: Machine, wanted: ExportDisk, disk: Disk, open_ones: Sequence[OpenSnapshot]) -> ExportWish:
    assert wanted.exportname is not None, "an effective document names its exports"
    snapshot = None
    if wanted.snapshot is not None:
        snapshot = next((one for one in open_ones if one.name == wanted.snapshot), None)
        if snapshot is None:
            raise errors.NoSnapshot(machine=machine.name, name=wanted.snapshot)
    return ExportWish(
        name=wanted.exportname,
        target=wanted.name,
        snapshot=snapshot,
        writable=wanted.readonly is False,
        bitmaps=_bitmaps(wanted, disk, snapshot),
    )


def _bitmaps(wanted: ExportDisk, disk: Disk, snapshot: OpenSnapshot | None) -> Mapping[str, str]:
    """The changes since a checkpoint are told under the checkpoint's name."""
    if wanted.checkpoint is not None:
        return {wanted.checkpoint: wanted.checkpoint}
    if not wanted.allcheckpoints or snapshot is None:
        return {}
    part = snapshot.disk(disk.target)
    if part is None or part.newest is None:
        return {}
    older = [link.mark for link in checkpoints.chain(disk.bitmaps).links if link.mark.nonce in part.older]
    return {mark.name: mark.name for mark in older}


async def listing(machine: Machine) -> tuple[Served, ...]:
    """Everything that is exported for others."""
    return await machine.served()


async def stop(machine: Machine, names: Sequence[str]) -> tuple[Served, ...]:
    """Stop exports by their names (none: all that belong to no job), also under clients. Raises `NoExport`."""
    there = await machine.served()
    jobs = {one.job for one in await machine.snapshots() if one.document is not None}
    for name in names:
        if not any(served.name == name for served in there):
            raise errors.NoExport(machine=machine.name, name=name)
    gone = [served for served in there if (served.name in names if names else served.job not in jobs)]
    await machine.unserve(gone)
    return tuple(gone)
