"""Checkpoints by themselves: made, deleted, measured and shown, without a snapshot. On any monitor.

A checkpoint on several disks is one transaction, so it is one instant and needs no pause. Nothing
of ours stays: what a measurement or a map makes is named `pullback-<job>-…`, and who finds it
removes it (`recovery.strays`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from pullback import errors, state
from pullback.engine import exports, graph, guestagent, pause, recovery, serving, transaction
from pullback.engine.monitor import Monitor
from pullback.engine.names import Names, prefix
from pullback.engine.quiesce import Quiescer, Quiet
from pullback.engine.undoing import despite
from pullback.model import checkpoints, tree
from pullback.model.backups import Quiesce, Quiescing
from pullback.model.checkpoints import Merge
from pullback.model.disks import Bitmap, Disk
from pullback.model.exports import NbdAddress
from pullback.model.tracking import ChangeMap, Doomed, NewBitmap, Union
from pullback.units import MiB

#: QEMU's memory that the temporary bitmaps of a measurement take at a time (more only for a single one).
_MEMORY = 64 * MiB
Bitmaps = Mapping[str, Bitmap]


# -- making ----------------------------------------------------------------------------------


async def create(monitor: Monitor, parts: Sequence[NewBitmap]) -> datetime:
    """Make a checkpoint on all its disks at one instant; gives that. `BusyError` if one is used."""
    now = await _nodes(monitor)
    for part in parts:
        _require_idle(part.disk, _bitmaps(now, part.disk), [part.freeze] if part.freeze else [])
    actions = [
        transaction.checkpoint(node_of(part.disk), part.mark, part.freeze, transient=part.disk.transient)
        for part in parts
    ]
    await transaction.run(monitor, [action for some in actions for action in some])
    return datetime.now(UTC)


async def take_back(monitor: Monitor, parts: Sequence[NewBitmap]) -> None:
    """Undo `create`, as far as it was done."""
    now = await _nodes(monitor)
    actions: list[transaction.Action] = []
    for part in parts:
        if part.mark.bitmap in _bitmaps(now, part.disk):
            actions += transaction.take_back(node_of(part.disk), part.mark, part.freeze)
    await transaction.run(monitor, actions)


@asynccontextmanager
async def quiet(monitor: Monitor, wish: Quiescing, begin: Callable[[], state.Job]) -> AsyncIterator[Quiet]:
    """The guest's file systems are frozen while the block runs, as far as the user's wish goes.

    To be used inside `pause.uninterrupted`. `begin` gives the job whose record says that a thaw is
    owed; it is not called where there is nobody to be asked.
    """
    if not await _is_wanted(monitor, wish):
        yield Quiet()
        return
    job = begin()
    async with recovery.guarded(job) as watcher:
        quiescer = Quiescer(monitor, job, watcher, wish)
        try:
            async with quiescer.quiet() as found:
                yield found
        finally:
            await quiescer.end()
            if not job.record.frozen_agent:  # else the next run tries again
                recovery.forget(job)


async def _is_wanted(monitor: Monitor, wish: Quiescing) -> bool:
    if wish.wish is Quiesce.NO:
        return False
    return wish.wish is not None or wish.agent is not None or await guestagent.find(monitor) is not None


# -- deleting --------------------------------------------------------------------------------


async def delete(monitor: Monitor, parts: Sequence[Doomed]) -> None:
    """Delete a checkpoint on all its disks in one transaction. `BusyError` if one is used; then nothing was done."""
    now = await _nodes(monitor)
    merges = [(part.disk, _deletion(_bitmaps(now, part.disk), part.nonce)) for part in parts]
    actions: list[transaction.Action] = []
    for disk, merge in merges:
        if merge is not None:
            _require_idle(disk, _bitmaps(now, disk), (*merge.sources, *merge.remove))
            actions += transaction.deletion(node_of(disk), merge)
    await transaction.run(monitor, actions)


def _deletion(bitmaps: Bitmaps, nonce: str) -> Merge | None:
    return checkpoints.chain(bitmaps.values()).deletion(nonce)


# -- measuring -------------------------------------------------------------------------------


async def sizes(monitor: Monitor, job: str, unions: Sequence[Union]) -> tuple[int, ...]:
    """The bytes that each union has marked, as far as memory allows all at one instant.

    To be used inside `pause.uninterrupted`.
    """
    # Small ones first: one that is in the next is not joined again (100 checkpoints have 5000 bitmaps to join else).
    order = sorted(range(len(unions)), key=lambda index: (unions[index].disk.target, len(unions[index].bitmaps)))
    found: list[int] = []
    for batch in _batches(unions[index] for index in order):
        found += await _measured(monitor, job, batch)
    by_index = dict(zip(order, found, strict=True))
    return tuple(by_index[index] for index in range(len(unions)))


def _batches(unions: Iterable[Union]) -> Iterator[list[Union]]:
    batch: list[Union] = []
    taken = 0
    for union in unions:
        wanted = tree.memory(union.disk.size, checkpoints.GRANULARITY)
        if batch and taken + wanted > _MEMORY:
            yield batch
            batch, taken = [], 0
        batch.append(union)
        taken += wanted
    if batch:
        yield batch


async def _measured(monitor: Monitor, job: str, unions: Sequence[Union]) -> list[int]:
    now = await _nodes(monitor)
    for union in unions:
        _require_there(union, _bitmaps(now, union.disk))
    names = [Names(job, index).bitmap for index in range(len(unions))]
    actions = _joins(unions, names)
    try:
        await transaction.run(monitor, actions)
        now = await _nodes(monitor)
        # QEMU counts whole granules, also the one that reaches beyond the disk's end.
        pairs = zip(unions, names, strict=True)
        return [min(_bitmaps(now, union.disk)[name].count, union.disk.size) for union, name in pairs]
    finally:
        await _remove(monitor, job, [union.disk for union in unions])


def _joins(unions: Sequence[Union], names: Sequence[str]) -> list[transaction.Action]:
    """Make a temporary bitmap for each union, out of the one before where that is a part of it."""
    actions: list[transaction.Action] = []
    before: tuple[str, frozenset[str], str] = ("", frozenset(), "")
    for union, name in zip(unions, names, strict=True):
        node, wanted = node_of(union.disk), frozenset(union.bitmaps)
        sources: Sequence[str] = union.bitmaps
        if before[0] == node and before[1] <= wanted:
            sources = (before[2], *sorted(wanted - before[1]))
        actions += transaction.union(node, name, sources)
        before = (node, wanted, name)
    return actions


async def _remove(monitor: Monitor, job: str, disks: Iterable[Disk]) -> None:
    now = await _nodes(monitor)
    actions = [
        transaction.Remove(node=node, name=name)
        for node in sorted({node_of(disk) for disk in disks} & set(now))
        for name in (bitmap.name for bitmap in now[node].bitmaps)
        if name.startswith(prefix(job))
    ]
    await transaction.run(monitor, actions)


# -- showing ---------------------------------------------------------------------------------


@asynccontextmanager
async def served(
    monitor: Monitor, job: state.Job, union: Union, *, name: str, end: Callable[[], None] | None = None
) -> AsyncIterator[ChangeMap]:
    """A union's ranges over NBD while the block runs; `end` is called when all of it is gone.

    The disk itself is not exported, so it may be in an iothread of a QEMU that dies of NBD clients
    there: a null node in the main loop carries the union. `name`: eight hex digits, for all names.
    """
    try:
        yield await pause.uninterrupted(_serve(monitor, job, union, Names(name, 0)))
    except BaseException as error:
        await despite(error, _withdraw(monitor, job, Names(name, 0), end))
        raise
    await pause.uninterrupted(_withdraw(monitor, job, Names(name, 0), end))


async def _serve(monitor: Monitor, job: state.Job, union: Union, names: Names) -> ChangeMap:
    _require_there(union, _bitmaps(await _nodes(monitor), union.disk))
    socket = await _server(monitor, job)
    await monitor.execute("blockdev-add", {"driver": "null-co", "node-name": names.map, "size": union.disk.size})
    add = transaction.Add(node=names.map, name=names.bitmap, persistent=False, recording=False)
    await transaction.run(monitor, [add])
    # All but the newest are frozen, so what is written meanwhile is in the union or after it: no instant is needed.
    sources = [{"node": node_of(union.disk), "name": bitmap} for bitmap in union.bitmaps]
    merge = {"node": names.map, "target": names.bitmap, "bitmaps": sources}
    await monitor.execute("block-dirty-bitmap-merge", merge)
    address = NbdAddress(socket=socket, export=f"{prefix(names.job)}{union.disk.target}-changes")
    id = names.export("map")
    await exports.add_nbd(monitor, id=id, node=names.map, name=address.export, bitmaps=[names.bitmap])
    return ChangeMap(address=address, context=f"qemu:dirty-bitmap:{names.bitmap}", size=union.disk.size)


async def _server(monitor: Monitor, job: state.Job) -> Path:
    """QEMU's NBD server, on our private socket."""
    await serving.ensure_private(monitor, job)
    return serving.private_socket(job)


async def _withdraw(monitor: Monitor, job: state.Job, names: Names, end: Callable[[], None] | None) -> None:
    await exports.remove(monitor, prefix(names.job))
    await serving.stop_unused(monitor, serving.register_of(job))
    if names.map in await _nodes(monitor):
        try:
            await monitor.execute("blockdev-del", {"node-name": names.map})
        except errors.RefusedError as error:
            raise errors.CleanupIncomplete(what=f"node {names.map}", reason=error.reason) from error
    if end is not None:
        end()


# -- what is there ---------------------------------------------------------------------------


async def _nodes(monitor: Monitor) -> Mapping[str, graph.Node]:
    return graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True}))


def _bitmaps(nodes: Mapping[str, graph.Node], disk: Disk) -> Bitmaps:
    node = nodes.get(node_of(disk))
    return {bitmap.name: bitmap for bitmap in node.bitmaps} if node is not None else {}


def node_of(disk: Disk) -> str:
    """The node that holds a disk's bitmaps."""
    assert disk.node is not None, "only disks with a medium have bitmaps"
    return disk.node


def _require_there(union: Union, bitmaps: Bitmaps) -> None:
    for name in union.bitmaps:
        mark = checkpoints.parse(name)
        if name not in bitmaps:
            problem = "its bitmap was removed just now"
            raise errors.CheckpointInconsistent(
                checkpoint=mark.name if mark else name, target=union.disk.target, problem=problem
            )
    _require_idle(union.disk, bitmaps, union.bitmaps)


def _require_idle(disk: Disk, bitmaps: Bitmaps, names: Iterable[str]) -> None:
    for name in names:
        if name in bitmaps and bitmaps[name].busy:
            raise errors.BusyError(what=f"bitmap {name} of {disk.target}", holder="a job or an export uses it")
