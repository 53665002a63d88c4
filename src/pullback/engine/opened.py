"""Snapshots that last: found again by their records, exported, and let go.

A lasting snapshot is a job whose record says that it is open. Everything else is as in a backup: the
same names in QEMU, the same sweep at the end. While nobody is connected, a `keeper` process watches it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pullback import errors, state
from pullback.engine import exports, fleece, graph, pause, scratch, serving, sweep, transaction
from pullback.engine.capabilities import Capabilities
from pullback.engine.guard import guarding
from pullback.engine.monitor import Monitor, process_lives
from pullback.engine.names import prefix
from pullback.model import checkpoints, pushing
from pullback.model.backups import Fleecing, Window
from pullback.model.checkpoints import Chain
from pullback.model.documents import backup as backup_documents
from pullback.model.exports import Served, ServerAddress
from pullback.model.snapshots import ExportWish, Kind, OpenSnapshot, SnapshotDisk, Wanted, from_dict
from pullback.state.history import EndedJob
from pullback.state.serving import Register


def parsed(job: state.Job) -> OpenSnapshot | None:
    """The lasting snapshot that a record tells of, or None: it is another job's, or damaged."""
    if not job.record.open:
        return None
    try:
        found = from_dict(job.record.open)
        if found.kind in (Kind.PULL, Kind.PUSH) and not job.record.ends:  # else it may lack its address
            backup_documents.from_dict(dict(found.document or {}))
        if found.kind is Kind.PUSH:
            pushing.pushed(found.push or {})
    except (ValueError, errors.BadDocument):
        return None
    return found if found.job == job.record.job and found.machine == job.record.machine else None


def lasting(job: state.Job, qemu: str) -> bool:
    """Does it stay, in this QEMU process? Not while it is made or ended (`ending`)."""
    return job.record.qemu == qemu and not job.record.ends and parsed(job) is not None


def needs_keeper(job: state.Job) -> bool:
    """Exports of disks themselves hold nothing that must be watched."""
    found = parsed(job)
    return found is not None and found.kind is not Kind.EXPORT


def is_empty(job: state.Job, there: Sequence[str]) -> bool:
    """Did it export disks themselves, and does not any more? `there`: jobs of which QEMU knows something."""
    found = parsed(job)
    return found is not None and found.kind is Kind.EXPORT and found.job not in there


def describe(context: fleece.Context, cut: fleece.Cut, wanted: Wanted, machine: str) -> OpenSnapshot:
    """What the record says of a snapshot that was just made."""
    return OpenSnapshot(
        name=wanted.name,
        job=wanted.request.job,
        kind=wanted.kind,
        machine=machine,
        moment=cut.moment,
        window=cut.window,
        disks=tuple(_disk(context, part) for part in cut.parts),
        owner=wanted.owner,
        document=wanted.document,
    )


def exports_only(job: state.Job) -> OpenSnapshot:
    """What the record says of a job that only exports disks themselves."""
    return OpenSnapshot(
        name=f"exports-{job.record.job}",
        job=job.record.job,
        kind=Kind.EXPORT,
        machine=job.record.machine,
        moment=datetime.now(UTC),
        window=Window(),
        disks=(),
    )


def _disk(context: fleece.Context, part: fleece.Part) -> SnapshotDisk:
    disk, request = part.disk, part.request
    assert disk.node is not None
    filtered = part.fleecing is Fleecing.FILTER
    return SnapshotDisk(
        target=disk.target,
        size=disk.size,
        node=disk.node,
        view=part.names.snapshot if filtered else part.names.scratch,
        fleecing=part.fleecing,
        reason=part.reason,
        iothread=disk.iothread is not None,
        scratch=str(fleece.scratch_path(context, part)),
        checkpoint=request.checkpoint,
        frozen=request.freeze,
        newest=checkpoints.parse(request.since[-1]) if request.since else None,
        copy=part.names.bitmap if request.since else None,
        older=tuple(link.mark.nonce for link in checkpoints.chain(disk.bitmaps).links),
    )


def remember(job: state.Job, snapshot: OpenSnapshot) -> None:
    """From now on the next run keeps it."""
    job.record.open = recorded(snapshot)
    job.save()


def recorded(snapshot: OpenSnapshot) -> dict[str, Any]:
    """As it is read back from a record: lists instead of tuples, texts instead of enums."""
    found: dict[str, Any] = json.loads(json.dumps(snapshot.to_dict()))
    return found


# -- what must not stay ---------------------------------------------------------------------


def trouble(snapshot: OpenSnapshot) -> str | None:
    """Why a snapshot must be let go of now, or None."""
    if snapshot.owner is not None and not process_lives(snapshot.owner):
        return "the process that it belonged to has ended"
    for directory in _directories(snapshot):
        try:
            scratch.room(directory, scratch.needed_bytes(disk.size for disk in snapshot.disks))
        except errors.PullbackError as error:
            return str(error)
    return None


def _directories(snapshot: OpenSnapshot) -> set[Path]:
    """Where its scratch files lie (a block device has no room that could run out for others)."""
    files = [Path(disk.scratch) for disk in snapshot.disks if disk.scratch]
    return {path.parent for path in files if not path.is_block_device()}


async def unanswering(snapshot: OpenSnapshot) -> str | None:
    """The same of scratch that hangs."""
    for directory in _directories(snapshot):
        if not await scratch.answers(directory):
            return f"scratch in {directory} does not answer"
    return None


# -- what changed ----------------------------------------------------------------------------


def sources(chain: Chain, disk: SnapshotDisk, checkpoint: str) -> tuple[str, ...]:
    """The bitmaps of the disk's node whose union is what changed from a checkpoint to the snapshot's instant.

    Exact as long as no checkpoint around the instant was deleted meanwhile; then it is more, never less. Pure.
    Raises `NoCheckpoint`, `CheckpointInconsistent`.
    """
    if chain.problem:
        raise errors.CheckpointInconsistent(checkpoint=checkpoint, target=disk.target, problem=chain.problem)
    found = next((link for link in chain.links if link.mark.name == checkpoint), None)
    if found is None or disk.newest is None or found.mark.nonce not in disk.older:
        raise errors.CheckpointInconsistent(
            checkpoint=checkpoint, target=disk.target, problem="it is not older than the snapshot, or not on the disk"
        )
    chosen = []
    for link in chain.links[chain.links.index(found) :]:
        if link.mark.first > disk.newest.last:
            break
        chosen.append(disk.copy if link.mark == disk.newest and disk.copy else link.mark.bitmap)
    return tuple(chosen)


async def tell_changes(monitor: Monitor, disk: SnapshotDisk, told: dict[str, tuple[str, ...]]) -> None:
    """Make frozen bitmaps on the view: name -> the bitmaps of the disk's node that are joined in it."""
    node = graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True})).get(disk.view)
    there = {bitmap.name: bitmap for bitmap in node.bitmaps} if node else {}
    actions: list[dict[str, object]] = []
    for name, joined in told.items():
        if name in there and there[name].busy:  # QEMU exports a bitmap once
            raise errors.BusyError(what=f"what changed on {disk.target} since {name}", holder="another export tells it")
        if name in there and disk.view == disk.node:
            raise errors.ExportExists(name=name)
        if name in there:  # of an earlier export: what changed up to the instant is the same for ever
            continue
        actions.append(transaction.Add(node=disk.view, name=name, persistent=False, recording=False).qmp())
        merge = {
            "node": disk.view,
            "target": name,
            "bitmaps": [{"node": disk.node, "name": source} for source in joined],
        }
        actions.append({"type": "block-dirty-bitmap-merge", "data": merge})
    if actions:
        await monitor.transaction(actions)


# -- exports ---------------------------------------------------------------------------------


def require_exportable(can: Capabilities, target: str, *, iothread: bool) -> None:
    """A build that dies when an NBD client leaves a disk of an iothread exports none such to others."""
    if iothread and can.defects.iothread_nbd_aborts:
        raise errors.Unsupported(
            what=f"exporting disk {target}",
            reason="it lives in an iothread, and this build of QEMU aborts when an NBD client leaves such a disk",
            way_out="Use a push job, or `pullback backup`, which reads such disks in another way.",
        )


async def serve_view(
    monitor: Monitor, register: Register, wish: ExportWish, address: ServerAddress, *, id: str
) -> Served:
    """Export a disk of a snapshot, read-only, with the changes that are wished."""
    assert wish.snapshot is not None
    disk = wish.snapshot.disk(wish.target)
    if disk is None:
        known = ", ".join(disk.target for disk in wish.snapshot.disks)
        raise errors.UnknownDisk(target=wish.target, where=f"the snapshot {wish.snapshot.name}", known=known)
    node = graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True})).get(disk.node)
    chain = checkpoints.chain(node.bitmaps if node else ())
    joined = {bitmap: sources(chain, disk, checkpoint) for bitmap, checkpoint in wish.bitmaps.items()}
    await tell_changes(monitor, disk, joined)
    served = _served(wish, wish.snapshot.job, address, id)
    await serving.add(monitor, register, served, node=disk.view, bitmaps=list(wish.bitmaps))
    return served


async def serve_disk(
    monitor: Monitor, register: Register, wish: ExportWish, address: ServerAddress, *, job: str, node: str, id: str
) -> Served:
    """Export a disk itself."""
    served = _served(wish, job, address, id)
    try:
        await serving.add(monitor, register, served, node=node, bitmaps=[])
    except errors.RefusedError as error:
        if wish.writable and "onflict" in error.reason:
            raise errors.DiskBusy(target=wish.target, holder="the guest's own device (share-rw is off)") from error
        raise
    return served


def _served(wish: ExportWish, job: str, address: ServerAddress, id: str) -> Served:
    return Served(
        id=id,
        job=job,
        name=wish.name,
        target=wish.target,
        snapshot=wish.snapshot.name if wish.snapshot else None,
        writable=wish.writable,
        contexts=tuple((f"qemu:dirty-bitmap:{bitmap}", since) for bitmap, since in wish.bitmaps.items()),
        address=address,
    )


async def free_id(monitor: Monitor, job: str) -> str:
    """The first id of a job's exports that is not taken."""
    taken = {item["id"] for item in await exports.listed(monitor)}
    return next(id for number in range(len(taken) + 1) if (id := f"{prefix(job)}exp{number}") not in taken)


# -- the end ---------------------------------------------------------------------------------


def ended(
    snapshot: OpenSnapshot, *, error: str | None, disks: Mapping[str, Mapping[str, object]] | None = None
) -> EndedJob:
    """The record of a job that came to its end. `disks`: what was copied of what, by target."""
    return EndedJob(
        job=snapshot.job,
        mode=snapshot.kind,
        success=error is None,
        error=error,
        began=snapshot.moment.isoformat(),
        ended=datetime.now(UTC).isoformat(),
        checkpoint=snapshot.checkpoint if error is None else None,
        document=snapshot.document or {},
        disks=disks or {},
    )


@asynccontextmanager
async def stillness(monitor: Monitor, job: state.Job) -> AsyncIterator[sweep.Stillness]:
    """A guard over the job while the block runs, and with it a pause for `sweep`."""
    async with guarding(job) as guard:
        yield partial(pause.paused, monitor, job, guard)
