"""Snapshots that last, alone: made, listed, deleted. Exports and jobs stand on them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pullback import errors, state
from pullback.engine.monitor import process_token
from pullback.engine.undoing import despite
from pullback.flows import checkpoints as checkpoint_flow
from pullback.flows import planning
from pullback.machine import Machine
from pullback.model import checkpoints
from pullback.model.backups import DiskRequest, Fleecing, Quiesce, Quiescing, Scratch, SnapshotRequest
from pullback.model.disks import Disk
from pullback.model.documents import snapshot as documents
from pullback.model.documents.checkpoint import CheckpointDisk, CheckpointDocument
from pullback.model.documents.snapshot import SnapshotDocument
from pullback.model.snapshots import Kind, OpenSnapshot, Wanted
from pullback.model.tracking import NewBitmap


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How a snapshot is made: the same for one alone and for a job."""

    #: Directory for scratch images that are not named; None: the default one.
    scratch: Path | None = None
    fleecing: Fleecing | None = None
    quiescing: Quiescing = field(default_factory=lambda: Quiescing(wish=Quiesce.NO))
    #: It ends when this process does.
    owner: int | None = None

    @property
    def owner_token(self) -> str | None:
        """The owner so that a number used again is not taken for it. Raises `UsageError`."""
        if self.owner is None:
            return None
        token = process_token(self.owner)
        if not token:
            raise errors.UsageError(problem=f"There is no process {self.owner} that could own it")
        return token


async def create(
    machine: Machine,
    directories: state.Directories,
    document: SnapshotDocument | None = None,
    checkpoint: CheckpointDocument | None = None,
    *,
    how: How | None = None,
    name: str | None = None,
) -> OpenSnapshot:
    """Freeze disks (by default all that take part), with a checkpoint at the same instant if one is given.

    Its name is `name`, else the document's, else the checkpoint's, else made up.

    Raises `SnapshotExists`, `BadDocument`, and what freezing and checkpoints do; nothing stays then.
    """
    how = how or How()
    disks = await machine.disks()
    name = await _name(machine, name, document, checkpoint)
    chosen, files = _chosen(machine, disks, document, name)
    if checkpoint is not None:
        checkpoint = within(checkpoint, disks, {disk.target for disk in chosen})
    prepared = await _prepared(machine, directories, checkpoint, name)
    try:
        request = request_for(chosen, prepared.parts if prepared else (), files, directories, how)
        wanted = Wanted(name=name, kind=Kind.SNAPSHOT, request=request, owner=how.owner_token)
        made = await machine.open_snapshot(wanted)
    except BaseException:
        if prepared:
            prepared.abort()
        raise
    if prepared:
        prepared.commit()
    return made


async def _name(
    machine: Machine, given: str | None, document: SnapshotDocument | None, checkpoint: CheckpointDocument | None
) -> str:
    if given is None and document is not None:
        given = document.name
    if given is None and checkpoint is not None:
        given = checkpoint.name
    name = checkpoints.check_name(given or f"snapshot-{secrets.token_hex(4)}")
    if any(snapshot.name == name for snapshot in await machine.snapshots()):
        raise errors.SnapshotExists(machine=machine.name, name=name)
    return name


async def _prepared(
    machine: Machine, directories: state.Directories, checkpoint: CheckpointDocument | None, name: str
) -> checkpoint_flow.Prepared | None:
    """A checkpoint without a name takes the snapshot's, as in the API of 2018."""
    if checkpoint is None:
        return None
    return await checkpoint_flow.prepare(machine, directories, checkpoint_flow.called(checkpoint, name))


def within(wish: CheckpointDocument, disks: Sequence[Disk], chosen: set[str]) -> CheckpointDocument:
    """A checkpoint of the disks in a snapshot: it names those that can be tracked, or is refused for naming another.

    Of a disk that is not frozen no bitmap would begin at the instant. Raises `UsageError`.
    """
    for disk in disks:
        named = {disk.target, disk.image} & {part.name for part in wish.tracked}
        if named and disk.target not in chosen:
            raise errors.UsageError(problem=f"The checkpoint names disk {disk.target}, which takes no part")
    inside = [disk for disk in disks if disk.target in chosen]
    tracked = [disk for disk in inside if not (disk.unlasting or disk.left_out)] or inside
    if wish.disks or len(inside) == len(disks):
        return wish
    return replace(wish, disks=tuple(CheckpointDisk(name=disk.target) for disk in tracked))


def _chosen(
    machine: Machine, disks: Sequence[Disk], document: SnapshotDocument | None, name: str
) -> tuple[Sequence[Disk], Mapping[str, Scratch]]:
    """The disks, and the files for the old blocks of those that name one."""
    if document is None:
        return planning.select(disks, machine=machine.name, only=(), exclude=()), {}
    whole = documents.effective(document, checkpoint_flow.machine_disks(disks), name, directory="/")
    by_target = {disk.target: disk for disk in disks}
    named = [disk.fleece for disk in document.disks]
    files = {
        disk.name: Scratch(path=Path(disk.fleece))
        for disk, given in zip(whole.disks, named, strict=True)
        if given is not None and disk.fleece is not None
    }
    return [by_target[disk.name] for disk in whole.disks], files


def request_for(
    disks: Sequence[Disk],
    new: Sequence[NewBitmap],
    files: Mapping[str, Scratch],
    directories: state.Directories,
    how: How,
) -> SnapshotRequest:
    """What the machine is asked for. Where a bitmap records, a copy of it is kept as it is at the instant."""
    marks = {part.disk.target: part for part in new}
    parts = []
    for disk in disks:
        chain = checkpoints.chain(disk.bitmaps)
        recording = chain.newest.mark.bitmap if chain.newest and not chain.problem else None
        part = marks.get(disk.target)
        parts.append(
            DiskRequest(
                disk=disk,
                since=(recording,) if recording else (),
                checkpoint=part.mark if part else None,
                freeze=part.freeze if part else None,
                scratch=files.get(disk.target),
            )
        )
    return SnapshotRequest(
        job=secrets.token_hex(4),
        disks=tuple(parts),
        scratch=how.scratch or directories.scratch,
        fleecing=how.fleecing,
        quiescing=how.quiescing,
        lasting=True,
    )


async def listing(machine: Machine) -> tuple[OpenSnapshot, ...]:
    """The snapshots that were made alone, oldest first."""
    return tuple(snapshot for snapshot in await machine.snapshots() if snapshot.kind is Kind.SNAPSHOT)


async def find(machine: Machine, name: str) -> OpenSnapshot:
    """The snapshot of that name. Raises `NoSnapshot`."""
    for snapshot in await listing(machine):
        if snapshot.name == name:
            return snapshot
    raise errors.NoSnapshot(machine=machine.name, name=name)


async def delete(machine: Machine, name: str) -> OpenSnapshot:
    """Let go of a snapshot and its exports. Its checkpoint stays. Raises `NoSnapshot`."""
    found = await find(machine, name)
    await machine.close_snapshot(found, take_back=False)
    return found


async def undo(machine: Machine, snapshot: OpenSnapshot, error: BaseException) -> None:
    """After `error`: nothing of it stays, its checkpoint is merged back."""
    await despite(error, machine.close_snapshot(snapshot, take_back=True))
