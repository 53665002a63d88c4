"""Fleecing: freezing disks at one instant, without touching their chain.

*filter*: the machine stands still for some milliseconds, the transaction switches the bitmaps, and
a copy-before-write node is slid between each device and its disk:

    device ── disk.qcow2            device ── cbw ── disk.qcow2        guest writes go through
                                               │  ╲
                                  snapshot-access  scratch             old blocks go to scratch
                                               │
                                           NBD export                  and are read through here

If copying an old block fails or takes too long, the snapshot breaks and the guest goes on
(`on-cbw-error=break-snapshot`, `cbw-timeout`; QEMU ≥ 7.1).

*classic*: `blockdev-backup sync=none` inside the transaction, to a qcow2 scratch that is backed by
the disk; any device, and no pause but for disks in iothreads (`_must_pause`); before QEMU 10.1 a copy
that fails is a guest write that fails.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pullback import errors, state
from pullback.engine import disks, exports, graph, jobs, pause, scratch, serving, sweep, transaction
from pullback.engine.capabilities import Capabilities
from pullback.engine.guard import Guard
from pullback.engine.monitor import Monitor
from pullback.engine.names import Names, prefix
from pullback.engine.quiesce import Quiescer
from pullback.model.backups import DiskRequest, Fleecing, Frozen, SnapshotRequest, Window
from pullback.model.disks import Disk
from pullback.model.exports import Export, NbdAddress

#: The filter's cluster on a raw scratch (QEMU block-copy, BLOCK_COPY_CLUSTER_SIZE_DEFAULT).
CLUSTER = 65536
#: `stop` flushes all disks. If a flush right before takes longer than this, do not pause at all.
PAUSE_BUDGET = 0.25
_FLUSH_SECONDS = 60


@dataclass(slots=True)
class Part:
    """One disk of a snapshot in the making."""

    request: DiskRequest
    names: Names
    fleecing: Fleecing
    reason: str

    @property
    def disk(self) -> Disk:
        """The disk."""
        return self.request.disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the steps of one job share."""

    monitor: Monitor
    capabilities: Capabilities
    job: state.Job
    guard: Guard
    quiescer: Quiescer
    request: SnapshotRequest

    @property
    def runtime(self) -> Path:
        """The job's private directory."""
        return Path(self.job.record.runtime)


class FilterRefused(Exception):
    """The filter cannot be put above this disk."""

    def __init__(self, part: Part, reason: str) -> None:
        super().__init__(reason)
        self.part = part
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The one instant, as it happened."""

    parts: list[Part]
    window: Window
    #: UTC.
    moment: datetime


async def freeze(context: Context) -> Cut:
    """Freeze all disks of the request at one instant, with their checkpoints.

    On an error the checkpoints are as they were; nodes and scratch that were made for it are left
    to `sweep`.
    """
    parts = await _choose(context)
    _own_runtime(context)
    if not (context.request.lasting or context.request.pushed):
        await _require_exports(context, parts)
    await scratch.require_answer(context.request.scratch)
    for part in parts:
        await _prepare(context, part)
    while True:
        try:
            async with context.quiescer.quiet() as quiet:
                window, moment = await _cut(context, parts)
            window = replace(window, frozen=quiet.count, frozen_seconds=quiet.seconds, frozen_note=quiet.note)
            return Cut(parts=parts, window=window, moment=moment)
        except FilterRefused as refused:
            await _fall_back(context, refused)


async def publish(context: Context, cut: Cut) -> tuple[Frozen, ...]:
    """Export what is frozen; gives where each disk can be read."""
    return await _export(context, cut.parts)


# -- choosing the engine ---------------------------------------------------------------------


async def _choose(context: Context) -> list[Part]:
    pausable = await pause.can_pause(context.monitor)
    flush_seconds = await _flushed([request.disk for request in context.request.disks])
    kinds = await jobs.types(context.monitor)
    _, whole = await disks.find(context.monitor, has_graph=context.capabilities.graph)
    parts = []
    for index, request in enumerate(context.request.disks):
        _refuse_filtered(request.disk)
        foreign = _foreign_backup(request.disk, whole, kinds)
        fleecing, reason = choose(
            context.request.fleecing,
            context.capabilities,
            pausable=pausable,
            flush_seconds=flush_seconds,
            foreign_backup=foreign,
            lasting=context.request.lasting and not context.request.pushed,
        )
        if fleecing is Fleecing.CLASSIC and not context.capabilities.classic:
            raise errors.Unsupported(what="a snapshot", reason=f"{reason}, and this QEMU has no classic engine either")
        parts.append(Part(request, Names(context.request.job, index), fleecing, reason))
    return parts


def choose(
    wanted: Fleecing | None,
    capabilities: Capabilities,
    *,
    pausable: bool,
    flush_seconds: float,
    foreign_backup: str | None,
    lasting: bool = False,
) -> tuple[Fleecing, str]:
    """Which engine, and why, in words. Pure. Raises `Unsupported` if the wanted one cannot be had."""
    hindrance = None
    if not (capabilities.filter and capabilities.graph):
        hindrance = "this QEMU has no copy-before-write filter that protects the guest"
    elif foreign_backup is not None:
        whose = "an older snapshot" if foreign_backup.startswith(graph.OURS) else "a backup job of somebody else"
        hindrance = f"{whose} is on the disk ({foreign_backup})"
    elif lasting and capabilities.defects.snapshot_reads_cross:
        hindrance = "this build of QEMU gives other programs wrong data from the filter's snapshots"
    elif not pausable:
        hindrance = "the machine is in a state that cannot be held"
    elif flush_seconds > PAUSE_BUDGET:
        hindrance = f"the pause would be long (flushing took {flush_seconds * 1000:.0f} ms)"
    if wanted is Fleecing.CLASSIC:
        return Fleecing.CLASSIC, "as asked for"
    if hindrance is None:
        return Fleecing.FILTER, "it protects the guest's writes"
    if wanted is Fleecing.FILTER:
        raise errors.Unsupported(what="the filter engine", reason=hindrance, way_out="Leave the choice to us.")
    return Fleecing.CLASSIC, hindrance


def _refuse_filtered(disk: Disk) -> None:
    """One filter a disk: a second snapshot above it reads right, but the lower one could not be removed first."""
    if disk.root is not None and disk.root.startswith(graph.OURS):
        raise errors.DiskBusy(target=disk.target, holder="a snapshot that was made with the filter engine")


def _foreign_backup(disk: Disk, whole: graph.Graph, kinds: dict[str, str]) -> str | None:
    """The id of a foreign backup job on the disk. Other jobs make the disk busy.

    A mirror or stream would be bypassed silently by a filter (tried on 7.2), a commit refuses it;
    a filter above a foreign backup job's own kills QEMU when that job ends. Classic jobs stack.
    """
    assert disk.node is not None
    found = whole.jobs_on(disk.node)
    for job in found:
        if kinds.get(job) != "backup":
            raise errors.DiskBusy(target=disk.target, holder=f"the {kinds.get(job, 'block')} job {job}")
    return found[0] if found else None


async def _flushed(flushed: list[Disk]) -> float:
    try:
        async with asyncio.timeout(_FLUSH_SECONDS):
            return await asyncio.to_thread(_flush, flushed)
    except TimeoutError:
        return float(_FLUSH_SECONDS)


def _flush(flushed: list[Disk]) -> float:
    """Write out the images' dirty pages from here; gives how long a second flush takes (the forecast)."""
    paths = [path for disk in flushed if (path := graph.image_path(disk.image))]
    _sync(paths)
    begun = time.monotonic()
    _sync(paths)
    return time.monotonic() - begun


def _sync(paths: list[str]) -> None:
    for path in paths:
        with suppress(OSError):  # not ours to read: then `stop` flushes what is there
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)


# -- scratch ---------------------------------------------------------------------------------


def _own_runtime(context: Context) -> None:
    """QEMU makes sockets and mounts in our directory: let its user in."""
    owner = qemu_user(context.monitor)
    if owner is not None and os.geteuid() == 0:
        os.chown(context.runtime, *owner)


def qemu_user(monitor: Monitor) -> tuple[int, int] | None:
    """(uid, gid) that QEMU runs as, if the kernel tells."""
    return monitor.user()


def scratch_path(context: Context, part: Part) -> Path:
    """Where a disk's old blocks go."""
    chosen = part.request.scratch
    return chosen.path if chosen else context.request.scratch / part.names.scratch


async def _prepare(context: Context, part: Part) -> None:
    """Make the scratch image and its node; before the pause, because it touches no disk's graph."""
    path = scratch_path(context, part)
    owner = qemu_user(context.monitor)
    if part.request.scratch is None:
        _record(context, context.job.record.scratch, path)
        await asyncio.to_thread(scratch.create, path, part.disk, part.fleecing, owner)
    else:
        if part.request.scratch.ours:
            scratch.check_new(path, [part.disk])
            _record(context, context.job.record.chosen, path)
        await asyncio.to_thread(scratch.take, part.request.scratch, part.disk, part.fleecing, owner)
    try:
        await context.monitor.execute("blockdev-add", _scratch_node(part, path))
    except errors.RefusedError as error:
        raise errors.ScratchUnsuitable(path=str(path.parent), reason=f"QEMU says: {error.reason}") from error
    if _tells_copied(context, part):
        await _watch_scratch(context, part)
    nodes = graph.parse_nodes(await context.monitor.execute("query-named-block-nodes", {"flat": True}))
    if nodes[part.names.scratch].size != part.disk.size:  # a smaller scratch is accepted silently
        raise errors.BadReply(who="QEMU", problem=f"scratch of {part.disk.target} has another size than the disk")
    if context.request.pushed and part.fleecing is Fleecing.CLASSIC:
        await context.monitor.execute("blockdev-add", _source_node(part))


async def _watch_scratch(context: Context, part: Part) -> None:
    """A bitmap of what is copied to scratch, from before the filter is there. It ends with scratch's node.

    A cluster is in it before the filter itself knows it as copied (block/copy-before-write.c sets its
    done_bitmap when block_copy has returned, which has written to scratch by then, zeroes too). Neither ever
    forgets. So a read after which the bitmap has nothing of its range met no copied cluster, and was right on
    a build that answers wrongly there; what the bitmap has is read again (`transfer.nbd`). Looking at scratch's
    file would not do: a cluster of zeroes is copied as a hole.
    """
    arguments = {"node": part.names.scratch, "name": part.names.copied, "granularity": CLUSTER, "persistent": False}
    await context.monitor.execute("block-dirty-bitmap-add", arguments)


def _record(context: Context, files: list[str], path: Path) -> None:
    """Durably, before the file is made: who clears up after us must know it."""
    if str(path) not in files:
        files.append(str(path))
        context.job.save()


def _scratch_node(part: Part, path: Path) -> dict[str, object]:
    # Scratch is thrown away: its flushes need not reach the disk.
    common = {"node-name": part.names.scratch, "discard": "unmap", "cache": {"direct": False, "no-flush": True}}
    chosen = part.request.scratch
    driver = "host_device" if chosen and chosen.block else "file"
    file = {"driver": driver, "filename": str(path), "discard": "unmap", "cache": {"direct": False, "no-flush": True}}
    if part.fleecing is Fleecing.CLASSIC:
        return {"driver": "qcow2", "file": file, "backing": part.disk.node, **common}
    if chosen and chosen.reuse:
        return {"driver": "qcow2", "file": file, "backing": None, **common}
    size = {"size": part.disk.size} if chosen and chosen.block else {}
    return {"driver": "raw", "file": file, **size, **common}


def _source_node(part: Part) -> dict[str, object]:
    """What a push job reads: scratch itself is the target of a job, and may not be the source of another.

    A reader that is read-only and shares everything is no hindrance to the job that writes scratch. Made
    before the cut: on a running machine a node over one in an iothread can kill QEMU (`_add_snapshot`).
    """
    return {
        "driver": "raw",
        "node-name": part.names.source,
        "file": part.names.scratch,
        "read-only": True,
        "force-share": True,
    }


async def _fall_back(context: Context, refused: FilterRefused) -> None:
    """The filter was refused and all is undone: that disk gets the classic engine."""
    if context.request.fleecing is Fleecing.FILTER or not context.capabilities.classic:
        raise errors.Unsupported(what="the filter engine", reason=refused.reason, way_out="Leave the choice to us.")
    part = refused.part
    await context.monitor.execute("blockdev-del", {"node-name": part.names.scratch})
    if part.request.scratch is None or part.request.scratch.ours:
        scratch_path(context, part).unlink(missing_ok=True)
    part.fleecing, part.reason = Fleecing.CLASSIC, f"the filter was refused: {refused.reason}"
    await _prepare(context, part)


# -- the cut ---------------------------------------------------------------------------------


async def _cut(context: Context, parts: list[Part]) -> tuple[Window, datetime]:
    """The one instant. Raises `FilterRefused` with everything undone."""
    if not any(map(_must_pause, parts)):
        await transaction.run(context.monitor, _actions(context, parts))
        return Window(), datetime.now(UTC)
    flush_seconds = await _flushed([part.disk for part in parts])
    async with (
        pause.paused(context.monitor, context.job, context.guard) as held,
        context.monitor.listening("RESUME") as resumed,
    ):
        await transaction.run(context.monitor, _actions(context, parts))
        moment = datetime.now(UTC)
        try:
            for part in parts:
                if part.fleecing is Fleecing.FILTER:
                    await _insert(context, part)
            await transaction.run(context.monitor, _meanwhile(parts))
            if not resumed.empty():
                raise errors.RefusedError(command="the snapshot", reason="somebody continued the machine meanwhile")
        except BaseException:
            await _undo(context, parts)
            raise
    return Window(seconds=held.seconds, was_paused=held.was_paused, flush_seconds=flush_seconds), moment


def _must_pause(part: Part) -> bool:
    """Is the transaction alone no instant for this disk?

    The main loop, which runs transactions, serves no disk of its own meanwhile. But an iothread goes on between
    the actions (tried on QEMU 7.2.22 under load: a write that came after the first disk's job began was in the
    second's snapshot). So it could also be in a snapshot and in no list of changes.
    """
    return part.fleecing is Fleecing.FILTER or part.disk.iothread is not None


def _actions(context: Context, parts: list[Part]) -> list[transaction.Action]:
    actions: list[transaction.Action] = []
    for part in parts:
        request, node = part.request, part.disk.node
        assert node is not None
        if request.checkpoint is not None:
            transient = part.disk.transient
            actions += transaction.checkpoint(node, request.checkpoint, request.freeze, transient=transient)
        if request.since:
            actions += transaction.union(node, part.names.bitmap, request.since)
        if part.fleecing is Fleecing.CLASSIC:
            breaks = context.capabilities.classic_breaks_snapshot
            backup = transaction.BackUp(
                job=part.names.backup, node=node, scratch=part.names.scratch, break_snapshot=breaks
            )
            actions.append(backup)
    return actions


def _meanwhile(parts: list[Part]) -> list[transaction.Action]:
    """What was written between the transaction and the filter belongs to the changes too.

    No guest writes in a pause, but the monitor can (and did, in tests on QEMU 10.0): such a write is
    in the snapshot, so it must be read. The new checkpoint holds it as well, which costs a read later.
    """
    return [
        transaction.MergeInto(node=part.disk.node, target=part.names.bitmap, sources=(_recording(part.request),))
        for part in parts
        if part.fleecing is Fleecing.FILTER and part.request.since and part.disk.node
    ]


def _recording(request: DiskRequest) -> str:
    """The bitmap that records in the pause: that of the new checkpoint, else the newest of the older ones."""
    return request.checkpoint.bitmap if request.checkpoint else request.since[-1]


async def _insert(context: Context, part: Part) -> None:
    """Slide the filter between the device and its disk (the machine stands still)."""
    monitor, disk = context.monitor, part.disk
    node = {
        "driver": "copy-before-write",
        "node-name": part.names.filter,
        "file": disk.root,
        "target": part.names.scratch,
        # The disk's own node decides about discards; a filter without this would drop the guest's.
        "discard": "unmap",
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": scratch.COPY_TIMEOUT,
    }
    try:
        await monitor.execute("blockdev-add", node)
        arguments = {"path": disks.device_path(disk.qdev), "property": "drive", "value": part.names.filter}
        await monitor.execute("qom-set", arguments)
    except errors.RefusedError as error:
        raise FilterRefused(part, error.reason) from error
    await _add_snapshot(context, part)


async def _undo(context: Context, parts: list[Part]) -> None:
    """Undo the cut in the same pause: filters out, jobs ended, bitmaps merged back."""
    nodes = graph.parse_nodes(await context.monitor.execute("query-named-block-nodes", {"flat": True}))
    for part in reversed(parts):
        if part.names.snapshot in nodes:
            await context.monitor.execute("blockdev-del", {"node-name": part.names.snapshot})
        if part.names.filter in nodes:
            assert part.disk.root is not None
            await sweep.take_out(context.monitor, part.disk.qdev, part.disk.root)
            await context.monitor.execute("blockdev-del", {"node-name": part.names.filter})
    await jobs.end(context.monitor, prefix(context.request.job))
    await take_back(context.monitor, context.request, union=True)


async def take_back(monitor: Monitor, request: SnapshotRequest, *, union: bool = False) -> None:
    """Give what the new checkpoints recorded back to the older ones, so that no gap is left."""
    actions: list[transaction.Action] = []
    for index, part in enumerate(request.disks):
        node = part.disk.node
        assert node is not None
        if part.checkpoint is not None:
            actions += transaction.take_back(node, part.checkpoint, part.freeze)
        if part.since and union:
            actions.append(transaction.Remove(node=node, name=Names(request.job, index).bitmap))
    await transaction.run(monitor, actions)


async def _add_snapshot(context: Context, part: Part) -> None:
    """In the pause too: on a running machine QEMU 7.2 aborts in it for a disk in an iothread.

    (`qemu_mutex_unlock_impl: Operation not permitted`, 2 of 2 with a guest that uses the disk.)
    """
    node = {
        "driver": "snapshot-access",
        "node-name": part.names.snapshot,
        "file": part.names.filter,
        "discard": "unmap",
    }
    await context.monitor.execute("blockdev-add", node)


# -- exports ---------------------------------------------------------------------------------


async def _require_exports(context: Context, parts: list[Part]) -> None:
    """Everything that can hinder exporting is found out before the machine is touched."""
    for part in parts:
        if not _over_nbd(context, part):
            _require_fuse(context, part.disk)
    needs_server = any(_over_nbd(context, part) or part.request.since for part in parts)
    if needs_server and context.request.nbd_server is None:
        await serving.ensure_private(context.monitor, context.job)


async def _export(context: Context, parts: list[Part]) -> tuple[Frozen, ...]:
    return tuple([await _export_part(context, part) for part in parts])


def _socket(context: Context) -> Path:
    return context.request.nbd_server or serving.private_socket(context.job)


def _over_nbd(context: Context, part: Part) -> bool:
    return part.disk.iothread is None or not context.capabilities.defects.iothread_nbd_aborts


async def _export_part(context: Context, part: Part) -> Frozen:
    make = _export_nbd if _over_nbd(context, part) else _export_fuse
    return Frozen(
        disk=part.disk,
        export=await make(context, part),
        fleecing=part.fleecing,
        reason=part.reason,
        checkpoint=part.request.checkpoint,
    )


def _limit(context: Context, part: Part) -> int | None:
    crosses = context.capabilities.defects.snapshot_reads_cross
    return CLUSTER if part.fleecing is Fleecing.FILTER and crosses else None


def _tells_copied(context: Context, part: Part) -> bool:
    """Must it be known what was copied? Only NBD can tell it, and a push reads nothing through us."""
    return _limit(context, part) is not None and _over_nbd(context, part) and not context.request.pushed


async def _export_nbd(context: Context, part: Part) -> Export:
    """The data, and beside it the live disk's node: it knows the holes, and carries the bitmap."""
    monitor, names, disk = context.monitor, part.names, part.disk
    filtered = part.fleecing is Fleecing.FILTER
    data = _address(context, part, "data")
    disk_map = _address(context, part, "map")
    node = names.snapshot if filtered else names.scratch
    copied = _tells_copied(context, part)
    # Writable only so that our own copier, alone on this socket, may discard what it has read; and because QEMU
    # shows a bitmap that still records to nobody else.
    await exports.add_nbd(
        monitor,
        id=names.export("data"),
        node=node,
        name=data.export,
        bitmaps=[{"node": names.scratch, "name": names.copied}] if copied else [],
        writable=filtered,
    )
    if filtered or part.request.since:
        assert disk.node is not None
        bitmaps = [names.bitmap] if part.request.since else []
        await exports.add_nbd(monitor, id=names.export("map"), node=disk.node, name=disk_map.export, bitmaps=bitmaps)
    return Export(
        size=disk.size,
        data=data,
        request_limit=_limit(context, part),
        copied_context=f"qemu:dirty-bitmap:{names.copied}" if copied else None,
        allocation=disk_map if filtered else data,
        scratch=scratch_path(context, part) if filtered else None,
        changes=disk_map if part.request.since else None,
        changes_context=f"qemu:dirty-bitmap:{names.bitmap}" if part.request.since else None,
        trim_unit=CLUSTER if filtered else None,
    )


def _address(context: Context, part: Part, what: str) -> NbdAddress:
    return NbdAddress(socket=_socket(context), export=f"pullback-{context.request.job}-{part.disk.target}-{what}")


async def _export_fuse(context: Context, part: Part) -> Export:
    """For a disk in an iothread of a QEMU that would abort when an NBD client leaves.

    Data and holes come through FUSE, which answers in the iothread safely; what changed comes over
    NBD from a null node in the main loop, into which the bitmap is merged.
    """
    monitor, names, disk = context.monitor, part.names, part.disk
    filtered = part.fleecing is Fleecing.FILTER
    data, allocation = (context.runtime / f"{disk.target}.{what}" for what in ("data", "disk"))
    node = names.snapshot if filtered else names.scratch
    await exports.add_fuse(monitor, id=names.export("data"), node=node, mountpoint=data)
    if filtered:
        assert disk.node is not None
        await exports.add_fuse(monitor, id=names.export("disk"), node=disk.node, mountpoint=allocation)
    changes = await _export_map(context, part) if part.request.since else None
    return Export(
        size=disk.size,
        data=data,
        request_limit=_limit(context, part),
        allocation=allocation if filtered else data,
        scratch=scratch_path(context, part) if filtered else None,
        changes=changes,
        changes_context=f"qemu:dirty-bitmap:{names.bitmap}" if changes else None,
    )


def _require_fuse(context: Context, disk: Disk) -> None:
    if context.capabilities.fuse and os.path.exists("/dev/fuse"):
        return
    raise errors.Unsupported(
        what=f"backing up disk {disk.target}",
        reason="it lives in an iothread, this build of QEMU aborts when an NBD client leaves such a disk, "
        "and there are no FUSE exports to read it through",
        way_out=f"Load the fuse module, or leave it out with --exclude {disk.target}.",
    )


async def _export_map(context: Context, part: Part) -> NbdAddress:
    monitor, names, disk = context.monitor, part.names, part.disk
    address = _address(context, part, "map")
    await monitor.execute("blockdev-add", {"driver": "null-co", "node-name": names.map, "size": disk.size})
    add = transaction.Add(node=names.map, name=names.bitmap, persistent=False, recording=False)
    merge = {
        "node": names.map,
        "target": names.bitmap,
        "bitmaps": [{"node": disk.node, "name": names.bitmap}],
    }
    await transaction.run(monitor, [add])
    await monitor.execute("block-dirty-bitmap-merge", merge)
    id = names.export("map")
    await exports.add_nbd(monitor, id=id, node=names.map, name=address.export, bitmaps=[names.bitmap])
    return address


def stillness(context: Context) -> sweep.Stillness:
    """A pause for `sweep`."""
    return partial(pause.paused, context.monitor, context.job, context.guard)
