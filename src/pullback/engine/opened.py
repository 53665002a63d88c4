"""Snapshots that last: found again by their records, exported, and let go.

A lasting snapshot is a job whose record says that it is open. Everything else is as in a backup: the
same names in QEMU, the same sweep at the end. While nobody is connected, a `keeper` process watches it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial

from pullback import errors, state
from pullback.engine import exports, fleece, graph, pause, serving, sweep, transaction
from pullback.engine.capabilities import Capabilities
from pullback.engine.guard import guarding
from pullback.engine.monitor import Monitor
from pullback.engine.names import prefix
from pullback.model import checkpoints
from pullback.model.backups import Fleecing, Window
from pullback.model.checkpoints import Chain
from pullback.model.exports import Served, ServerAddress
from pullback.model.pushing import PushProgress
from pullback.model.snapshots import ExportWish, Kind, OpenSnapshot, SnapshotDisk, Wanted, from_dict
from pullback.state.history import EndedJob
from pullback.state.serving import Register


def parsed(job: state.Job) -> OpenSnapshot | None:
    """The lasting snapshot that a record tells of, or None: it is another job's, or damaged."""
    if not job.record.open:
        return None
    try:
        found = from_dict(job.record.open)
    except ValueError:
        return None
    return found if found.job == job.record.job and found.machine == job.record.machine else None


def lasting(job: state.Job, qemu: str) -> bool:
    """Is it to be kept, in this QEMU process?"""
    return job.record.qemu == qemu and parsed(job) is not None


def needs_keeper(job: state.Job) -> bool:
    """Exports of disks themselves hold nothing that must be watched."""
    found = parsed(job)
    return found is not None and found.kind is not Kind.EXPORT


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
    )


def remember(job: state.Job, snapshot: OpenSnapshot) -> None:
    """From now on the next run keeps it."""
    job.record.open = snapshot.to_dict()
    job.save()


# -- what changed ----------------------------------------------------------------------------


def sources(chain: Chain, disk: SnapshotDisk, checkpoint: str) -> tuple[str, ...]:
    """The bitmaps of the disk's node whose union is what changed from a checkpoint to the snapshot's instant.

    Exact as long as no checkpoint around the instant was deleted meanwhile; then it is more, never less. Pure.
    Raises `NoCheckpoint`, `CheckpointInconsistent`.
    """
    if chain.problem:
        raise errors.CheckpointInconsistent(checkpoint=checkpoint, target=disk.target, problem=chain.problem)
    found = next((link for link in chain.links if link.mark.name == checkpoint), None)
    if found is None or disk.newest is None or found.mark.first > disk.newest.last:
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
    there = {bitmap.name for bitmap in node.bitmaps} if node else set()
    actions: list[dict[str, object]] = []
    for name, joined in told.items():
        if name in there and disk.view == disk.node:
            raise errors.ExportExists(name=name)
        if name in there:
            actions.append(transaction.Remove(node=disk.view, name=name).qmp())
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


async def serve_view(monitor: Monitor, register: Register, wish: ExportWish, address: ServerAddress) -> Served:
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
    served = await _served(monitor, wish, wish.snapshot.job, address)
    await serving.add(monitor, register, served, node=disk.view, bitmaps=list(wish.bitmaps))
    return served


async def serve_disk(
    monitor: Monitor, register: Register, wish: ExportWish, address: ServerAddress, *, job: str, node: str
) -> Served:
    """Export a disk itself."""
    served = await _served(monitor, wish, job, address)
    try:
        await serving.add(monitor, register, served, node=node, bitmaps=[])
    except errors.RefusedError as error:
        if wish.writable and "onflict" in error.reason:
            raise errors.DiskBusy(target=wish.target, holder="the guest's own device (share-rw is off)") from error
        raise
    return served


async def _served(monitor: Monitor, wish: ExportWish, job: str, address: ServerAddress) -> Served:
    return Served(
        id=f"{prefix(job)}exp{await free_number(monitor, job)}",
        job=job,
        name=wish.name,
        target=wish.target,
        snapshot=wish.snapshot.name if wish.snapshot else None,
        writable=wish.writable,
        contexts=tuple((f"qemu:dirty-bitmap:{bitmap}", since) for bitmap, since in wish.bitmaps.items()),
        address=address,
    )


async def free_number(monitor: Monitor, job: str) -> int:
    """The first number that no export of a job has."""
    taken = {item["id"] for item in await exports.listed(monitor)}
    return next(number for number in range(len(taken) + 1) if f"{prefix(job)}exp{number}" not in taken)


# -- the end ---------------------------------------------------------------------------------


async def let_go(monitor: Monitor, job: state.Job, snapshot: OpenSnapshot, *, take_back: bool) -> None:
    """Remove a snapshot, its exports and its scratch; with `take_back` its checkpoint too.

    What its checkpoint recorded goes to the older one, so that nothing is lost.
    """
    async with stillness(monitor, job) as still:
        await pause.uninterrupted(sweep.sweep(monitor, job, still=still))
    if take_back:
        await pause.uninterrupted(_take_back(monitor, snapshot))
    job.remove()


async def _take_back(monitor: Monitor, snapshot: OpenSnapshot) -> None:
    nodes = graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True}))
    actions: list[transaction.Action] = []
    for disk in snapshot.disks:
        node = nodes.get(disk.node)
        if node is None or disk.checkpoint is None:
            continue
        actions += transaction.give_back(disk.node, checkpoints.chain(node.bitmaps), disk.checkpoint)
    await transaction.run(monitor, actions)


def ended(snapshot: OpenSnapshot, *, error: str | None, progress: Sequence[PushProgress] = ()) -> EndedJob:
    """The record of a job that came to its end."""
    return EndedJob(
        job=snapshot.job,
        mode=snapshot.kind,
        success=error is None,
        error=error,
        began=snapshot.moment.isoformat(),
        ended=datetime.now(UTC).isoformat(),
        checkpoint=snapshot.checkpoint if error is None else None,
        document=snapshot.document or {},
        disks={one.target: {"done": one.done, "total": one.total} for one in progress},
    )


@asynccontextmanager
async def stillness(monitor: Monitor, job: state.Job) -> AsyncIterator[sweep.Stillness]:
    """A guard over the job while the block runs, and with it a pause for `sweep`."""
    async with guarding(job) as guard:
        yield partial(pause.paused, monitor, job, guard)
