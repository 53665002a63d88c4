"""A machine that is off: its images, in a storage daemon of ours.

Nobody writes, so nothing is fleeced: a snapshot is the bitmaps' transaction, stored in the images at
once (`storage`), and the disks' own nodes are exported. Checkpoints that a running machine made go
on here, and those made here go on in a running machine.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pullback import errors, machine, state
from pullback.engine import (
    capabilities,
    description,
    exports,
    imagelock,
    images,
    interrupted,
    offline_overlay,
    offline_swap,
    pause,
    push,
    pushing,
    recovery,
    serving,
    tracking,
    transaction,
)
from pullback.engine.monitor import process_lives
from pullback.engine.names import Names, prefix
from pullback.engine.offline_serving import Lending, require_plain
from pullback.engine.storage import Storage, opened
from pullback.engine.undoing import despite
from pullback.model import checkpoints, urls
from pullback.model.backups import DiskRequest, Frozen, Quiescing, SnapshotRequest, Window
from pullback.model.description import Description, Firmware
from pullback.model.disks import Disk
from pullback.model.exports import Export, Listen, NbdAddress, Served
from pullback.model.overlays import Advance, Committed, NewOverlay, Overlay
from pullback.model.pushing import PushProgress, PushRequest, pushed
from pullback.model.rollbacks import HoldRequest, Journal
from pullback.model.snapshots import ExportWish, OpenSnapshot, Wanted
from pullback.model.tpm import TpmState
from pullback.model.tracking import Begun, ChangeMap, Doomed, NewBitmap, Union
from pullback.state import rollbacks

#: How long cleaning up may take before we give the terminal back (SIGTERM: 10 s in all).
_CLEAN_SECONDS = 9.0
#: What job records have in place of a monitor's socket.
_NO_SOCKET = Path("images")


@asynccontextmanager
async def connect(
    wanted: urls.ImagesMachine,
    directories: state.Directories,
    *,
    command: str,
    name: str | None = None,
    anonymous: bool = False,
    finishing: bool = False,
) -> AsyncIterator[OfflineMachine]:
    """The machine that has these images, locked for us and against every start of it.

    `name` is what it is called in repositories; `anonymous` lets it pass without one; `finishing` lets images
    pass that are half rolled back.

    Raises `ImagesUnnamed`, `BusyError` (another pullback, or a QEMU that has an image open),
    `ImageUnusable`, `PermissionDenied`, `RollbackPending`.
    """
    if name is None and not anonymous:
        raise errors.ImagesUnnamed()
    identity = name or str(wanted.images[0].path)
    with ExitStack() as held:
        _lock(held, wanted, directories, command, identity)
        cleared = _forget_dead(directories, identity)
        found = await asyncio.to_thread(images.inspect, wanted.images)
        pending = interrupted.of_images(found, directories, identity, finishing=finishing)
        rollbacks.sweep(directories.state)
        quiet = sorted({path.resolve() for image in found for path in image.quiet()})
        locks = {path: held.enter_context(imagelock.unwritten(path)) for path in quiet}
        job = held.enter_context(_job(directories, identity, command))
        async with opened(found, Path(job.record.runtime)) as storage:
            await _require_same(found, wanted)
            version = capabilities.version_text(await storage.qmp.execute("query-version"))
            found_machine = OfflineMachine(storage, job, identity, version, cleared, locks)
            found_machine.interrupted = pending
            try:
                yield found_machine
            except BaseException as error:
                await despite(error, found_machine.close())
                raise
            await pause.uninterrupted(found_machine.close())


def _lock(
    held: ExitStack, wanted: urls.ImagesMachine, directories: state.Directories, command: str, identity: str
) -> None:
    # In one order, so that of two who lock the same images one gets all.
    for path in sorted({image.path.resolve() for image in wanted.images}):
        held.enter_context(state.lock(directories, f"image {path}", command=command, title=f"the image {path}"))
    held.enter_context(state.lock(directories, f"machine {identity}", command=command, title=identity))


def _forget_dead(directories: state.Directories, identity: str) -> list[str]:
    """Remove the files of dead jobs of this machine (its lock is ours), unless the QEMU of one still lives."""
    cleared = []
    for job in state.jobs_of(directories, socket=_NO_SOCKET, machine=identity):
        record = job.record
        if record.machine == identity and not process_lives(record.qemu):
            recovery.forget(job)
            cleared.append(record.job)
    return cleared


@contextmanager
def _job(directories: state.Directories, identity: str, command: str) -> Iterator[state.Job]:
    """A record, so that the next run removes our private directory if we are killed."""
    job = state.begin_job(directories, job=secrets.token_hex(4), socket=_NO_SOCKET, machine=identity, command=command)
    try:
        yield job
    finally:
        recovery.forget(job)


async def _require_same(found: Sequence[images.Image], wanted: urls.ImagesMachine) -> None:
    """We looked at the images before we had their locks: what we opened must still be what is there."""
    again = await asyncio.to_thread(images.inspect, wanted.images)
    for before, now in zip(found, again, strict=True):
        if before != now:
            raise errors.BusyError(what=str(now.path), holder="it was changed by another process just now")


class OfflineMachine:
    """See `machine.Machine`. Made by `connect`."""

    def __init__(
        self,
        storage: Storage,
        job: state.Job,
        name: str,
        version: str,
        cleared: Sequence[str],
        locks: Mapping[Path, imagelock.Lock],
    ) -> None:
        self._storage = storage
        self._job = job
        self._name = name
        self._version = version
        self._cleared = tuple(cleared)
        self._locks = locks
        self._lending = Lending(storage, job, locks)
        #: The rollback of its disks that is to be finished.
        self.interrupted: Journal | None = None

    @property
    def name(self) -> str:
        """Its identity, as the user gave it."""
        return self._name

    @property
    def version(self) -> str:
        """The storage daemon's version, which is QEMU's."""
        return f"QEMU {self._version}"

    @property
    def cleared(self) -> Sequence[str]:
        """Ids of dead jobs whose files were removed when we connected."""
        return self._cleared

    async def disks(self) -> tuple[Disk, ...]:
        """The images, in the order in which they were named."""
        return await self._storage.disks()

    async def describe(self) -> Description:
        """The images."""
        return description.of_images(await self.disks(), self._version)

    async def alive(self) -> bool:
        """Does the storage daemon still answer?"""
        try:
            await self._storage.qmp.execute("query-version", timeout=2.0)
        except errors.OutcomeUnknown:
            return False
        return True

    async def facts(self) -> Mapping[str, object]:
        """What there is to say, as JSON values."""
        return {
            "machine": self.name,
            "socket": None,
            "status": "off",
            "qemu": self._version,
            "capabilities": None,
            "jobs": {},
            "exports": [],
            "cleared": list(self.cleared),
        }

    @asynccontextmanager
    async def snapshot(self, request: SnapshotRequest) -> AsyncIterator[OfflineSnapshot]:
        """The disks as they are while the block runs, with their checkpoints."""
        if request.fleecing is not None or request.nbd_server is not None:
            raise errors.UsageError(problem="A machine that is off needs no engine and has no NBD server of its own")
        made = OfflineSnapshot(self._storage, self._job, request)
        try:
            await pause.uninterrupted(made.freeze())
            yield made
        except BaseException as error:
            await despite(error, made.abandon())
            raise
        await pause.uninterrupted(made.end())

    async def open_snapshot(self, wanted: Wanted) -> OpenSnapshot:
        """The disks as they are, until `close_snapshot` or the end of the connection."""
        require_plain(wanted)
        return await pause.uninterrupted(self._lending.open(wanted))

    async def snapshots(self) -> tuple[OpenSnapshot, ...]:
        """The snapshots of this connection."""
        return tuple(self._lending.snapshots.values())

    async def close_snapshot(self, snapshot: OpenSnapshot, *, take_back: bool) -> None:
        """Let go of a snapshot and its exports; with `take_back` of its checkpoint too."""
        await pause.uninterrupted(self._lending.let_go(snapshot))
        if take_back and snapshot.push is None:
            now = {disk.target: disk for disk in await self.disks()}
            parts = [
                NewBitmap(disk=now[disk.target], mark=disk.checkpoint, freeze=disk.frozen)
                for disk in snapshot.disks
                if disk.checkpoint is not None and disk.target in now
            ]
            await self.take_back_checkpoint(parts)

    async def relieve(self) -> None:
        """Nothing here can hurt: nobody writes, so there is no scratch."""

    async def annotate(self, snapshot: OpenSnapshot) -> None:
        """Keep a changed description of a snapshot."""
        await self._lending.annotate(snapshot)

    async def begin_push(self, wanted: Wanted, request: PushRequest) -> OpenSnapshot:
        """Let the storage daemon copy the images, until the push is concluded or the connection ends."""
        return await pause.uninterrupted(self._lending.begin_push(wanted, request))

    async def push_progress(self, snapshot: OpenSnapshot) -> tuple[PushProgress, ...]:
        """How far each disk of a push is."""
        return await push.progress(self._storage.qmp, pushed(snapshot.push or {}))

    async def limit_push(self, snapshot: OpenSnapshot, speed: int | None) -> None:
        """Bytes a second for each disk from now on."""
        await push.set_speed(self._storage.qmp, pushed(snapshot.push or {}), speed)

    async def pause_push(self, snapshot: OpenSnapshot, *, paused: bool) -> None:
        """Let a push rest, or go on."""
        await (push.pause if paused else push.resume)(self._storage.qmp, pushed(snapshot.push or {}))

    async def conclude_push(self, snapshot: OpenSnapshot) -> None:
        """All is copied: make backups of it."""
        await pause.uninterrupted(self._lending.conclude_push(snapshot))

    async def require_holdable(self, request: HoldRequest) -> None:
        """Raise what `hold` would, as far as it can be known."""
        offline_swap.require_holdable(self._storage, request)

    def hold(self, request: HoldRequest) -> AbstractAsyncContextManager[offline_swap.OfflineHeld]:
        """Open images for writing, and export them."""
        return offline_swap.held(self._storage, self._job, self._locks, request)

    async def serve(self, wishes: Sequence[ExportWish], listen: Listen) -> tuple[Served, ...]:
        """Export snapshots and disks: all of them, or none."""
        return await pause.uninterrupted(self._lending.serve(wishes, listen))

    async def served(self) -> tuple[Served, ...]:
        """What we export for others."""
        return await self._lending.served()

    async def unserve(self, exported: Sequence[Served]) -> None:
        """Stop exports, also under clients."""
        await pause.uninterrupted(self._lending.unserve(exported))

    async def close(self) -> None:
        """End what was lent to others."""
        await self._lending.close()

    def push(self, request: PushRequest) -> AbstractAsyncContextManager[pushing.Push]:
        """Copy the images to destinations; undone if the block is left before it is concluded."""
        return pushing.of_images(self._storage, self._job, request)

    async def drop_bitmaps(self, disk: Disk, names: Sequence[str]) -> None:
        """Remove bitmaps that are worthless."""
        assert disk.node is not None
        actions = [transaction.Remove(node=disk.node, name=name) for name in names]
        await pause.uninterrupted(self._change(disk.node, actions))

    async def _change(self, node: str, actions: Sequence[transaction.Action]) -> None:
        async with self._storage.writable([node]):
            await transaction.run(self._storage.qmp, actions)

    async def delete_checkpoints(self, disk: Disk, nonces: Sequence[str]) -> None:
        """Delete checkpoints of a disk, each merged into its older neighbour."""
        if nonces:
            assert disk.node is not None
            await pause.uninterrupted(self._delete(disk.node, nonces))

    async def _delete(self, node: str, nonces: Sequence[str]) -> None:
        async with self._storage.writable([node]):
            for nonce in nonces:
                merge = checkpoints.chain(await self._storage.bitmaps(node)).deletion(nonce)
                if merge is not None:
                    await transaction.run(self._storage.qmp, transaction.deletion(node, merge))

    async def create_checkpoint(self, parts: Sequence[NewBitmap], quiescing: Quiescing) -> Begun:
        """Make a checkpoint on several images, stored when it returns. Nobody writes, so there is nothing to freeze."""
        return await pause.uninterrupted(self._create(parts))

    async def _create(self, parts: Sequence[NewBitmap]) -> Begun:
        async with self._storage.writable(tracking.node_of(part.disk) for part in parts):
            return Begun(moment=await tracking.create(self._storage.qmp, parts), window=Window())

    async def take_back_checkpoint(self, parts: Sequence[NewBitmap]) -> None:
        """Undo `create_checkpoint`, as far as it was done."""
        await pause.uninterrupted(self._take_back(parts))

    async def _take_back(self, parts: Sequence[NewBitmap]) -> None:
        made = [part for part in parts if part.mark.bitmap in await self._names(part.disk)]
        if made:
            async with self._storage.writable(tracking.node_of(part.disk) for part in made):
                await tracking.take_back(self._storage.qmp, made)

    async def _names(self, disk: Disk) -> set[str]:
        return {bitmap.name for bitmap in await self._storage.bitmaps(tracking.node_of(disk))}

    async def delete_checkpoint(self, parts: Sequence[Doomed]) -> None:
        """Delete a checkpoint on several images in one transaction."""
        await pause.uninterrupted(self._delete_one(parts))

    async def _delete_one(self, parts: Sequence[Doomed]) -> None:
        async with self._storage.writable(tracking.node_of(part.disk) for part in parts):
            await tracking.delete(self._storage.qmp, parts)

    async def dirty_sizes(self, unions: Sequence[Union]) -> tuple[int, ...]:
        """Bytes marked in each union of bitmaps."""
        return await pause.uninterrupted(tracking.sizes(self._storage.qmp, secrets.token_hex(4), unions))

    def change_map(self, union: Union) -> AbstractAsyncContextManager[ChangeMap]:
        """The ranges marked in a union of bitmaps, over NBD."""
        return tracking.served(self._storage.qmp, self._job, union, name=secrets.token_hex(4))

    async def create_overlays(self, parts: Sequence[NewOverlay]) -> tuple[Overlay, ...]:
        """Put new overlays on images, with their checkpoints."""
        return await pause.uninterrupted(offline_overlay.create(self._storage, parts))

    async def commit_overlay(self, disk: Disk, advance: Advance) -> Committed:
        """It is refused."""
        raise offline_overlay.refuse_commit(disk.target)


class OfflineSnapshot:
    """See `machine.Snapshot`."""

    def __init__(self, storage: Storage, job: state.Job, request: SnapshotRequest) -> None:
        self._storage = storage
        self._job = job
        self._request = request
        self._moment = datetime.now(UTC)
        self._disks: tuple[Frozen, ...] = ()
        self._kept = False
        self._closed = False

    @property
    def disks(self) -> tuple[Frozen, ...]:
        """Where each can be read."""
        return self._disks

    @property
    def window(self) -> Window:
        """Nothing had to stand still."""
        return Window()

    @property
    def moment(self) -> datetime:
        """The instant, UTC. Any while we hold the images is as good."""
        return self._moment

    async def firmware(self) -> tuple[tuple[Firmware, ...], tuple[str, ...]]:
        """None: firmware is a thing of the machine, and it is off."""
        return (), ()

    async def tpm(self) -> tuple[TpmState | None, tuple[str, ...]]:
        """None, for the same reason."""
        return None, ()

    def keep(self) -> None:
        """The backup is safe."""
        self._kept = True

    async def freeze(self) -> None:
        """Make the checkpoints, store them, and export the disks."""
        qmp, parts = self._storage.qmp, self._request.disks
        actions = [action for index, part in enumerate(parts) for action in self._actions(index, part)]
        if actions:
            async with self._storage.writable(_node(part) for part in parts if part.checkpoint or part.since):
                await transaction.run(qmp, actions)
        await serving.ensure_private(qmp, self._job)
        self._disks = tuple([await self._export(index, part) for index, part in enumerate(parts)])

    def _actions(self, index: int, part: DiskRequest) -> list[transaction.Action]:
        actions: list[transaction.Action] = []
        if part.checkpoint is not None:
            actions += transaction.checkpoint(_node(part), part.checkpoint, part.freeze)
        if part.since:
            actions += transaction.union(_node(part), self._names(index).bitmap, part.since)
        return actions

    def _names(self, index: int) -> Names:
        return Names(self._request.job, index)

    async def _export(self, index: int, part: DiskRequest) -> Frozen:
        names = self._names(index)
        name = f"{prefix(self._request.job)}{part.disk.target}-data"
        address = NbdAddress(socket=serving.private_socket(self._job), export=name)
        bitmaps = [names.bitmap] if part.since else []
        await exports.add_nbd(self._storage.qmp, id=names.export("data"), node=_node(part), name=name, bitmaps=bitmaps)
        export = Export(
            size=part.disk.size,
            data=address,
            allocation=address,
            changes=address if part.since else None,
            changes_context=f"qemu:dirty-bitmap:{names.bitmap}" if part.since else None,
        )
        reason = "the machine is off"
        return Frozen(disk=part.disk, export=export, fleecing=None, reason=reason, checkpoint=part.checkpoint)

    async def close(self) -> None:
        """Let go of the exports now."""
        await pause.uninterrupted(self._close())

    async def _close(self) -> None:
        if self._closed:
            return
        qmp = self._storage.qmp
        await exports.remove(qmp, prefix(self._request.job))
        await serving.stop_unused(qmp, serving.register_of(self._job))
        gone = []
        for index, part in enumerate(self._request.disks):
            name = self._names(index).bitmap
            if name in {bitmap.name for bitmap in await self._storage.bitmaps(_node(part))}:
                gone.append(transaction.Remove(node=_node(part), name=name))
        await transaction.run(qmp, gone)
        self._closed = True

    async def end(self) -> None:
        """The block was left in good order."""
        await self._close()
        if not self._kept:
            await self._take_back()

    async def abandon(self) -> None:
        """Something failed: nothing stays, and what the new checkpoints recorded is merged back."""
        async with asyncio.timeout(_CLEAN_SECONDS):
            await self.end()

    async def _take_back(self) -> None:
        """Those of the new checkpoints that are there: making them may have failed half way."""
        actions: list[transaction.Action] = []
        nodes = []
        for part in self._request.disks:
            there = {bitmap.name for bitmap in await self._storage.bitmaps(_node(part))}
            if part.checkpoint is not None and part.checkpoint.bitmap in there:
                actions += transaction.take_back(_node(part), part.checkpoint, part.freeze)
                nodes.append(_node(part))
        if actions:
            async with self._storage.writable(nodes):
                await transaction.run(self._storage.qmp, actions)


def _node(part: DiskRequest) -> str:
    assert part.disk.node is not None, "every image has its node"
    return part.disk.node


_: type[machine.Machine] = OfflineMachine  # the interface is kept, says mypy
