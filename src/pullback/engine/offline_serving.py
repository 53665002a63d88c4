"""Snapshots and exports of a machine that is off: they last as long as our connection to its images.

Nobody writes while we hold the images, so a snapshot is the disks as they are. An export for writing
opens its image for writing until it ends; what is written counts in the recording bitmap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pullback import errors, state
from pullback.engine import disks, ending, exports, imagelock, images, opened, serving, transaction
from pullback.engine.pushing import OfflinePush
from pullback.engine.storage import Storage
from pullback.engine.undoing import despite
from pullback.model import checkpoints
from pullback.model.backups import DiskRequest, Window
from pullback.model.exports import Listen, Served, ServerAddress
from pullback.model.pushing import PushRequest, pushed
from pullback.model.snapshots import ExportWish, OpenSnapshot, SnapshotDisk, Wanted
from pullback.state.serving import Register


@dataclass(slots=True)
class Lending:
    """What is lent to others of the images in `storage`."""

    storage: Storage
    job: state.Job
    #: Our locks on images that nobody else may write to.
    locks: Mapping[Path, imagelock.Lock]
    snapshots: dict[str, OpenSnapshot] = field(default_factory=dict)
    pushes: dict[str, OfflinePush] = field(default_factory=dict)
    #: Of exports for writing, by id: their images are open for writing.
    _writable: dict[str, AsyncExitStack] = field(default_factory=dict)

    @property
    def _register(self) -> Register:
        return serving.register_of(self.job)

    async def open(self, wanted: Wanted) -> OpenSnapshot:
        """Make the checkpoints, and remember what belongs to the snapshot."""
        parts = wanted.request.disks
        await self._require_unwritten(parts)
        actions = [action for part in parts if part.checkpoint for action in _checkpoint(part)]
        if actions:
            async with self.storage.writable(_node(part) for part in parts if part.checkpoint):
                await transaction.run(self.storage.qmp, actions)
        found = OpenSnapshot(
            name=wanted.name,
            job=wanted.request.job,
            kind=wanted.kind,
            machine=self.job.record.machine,
            moment=datetime.now(UTC),
            window=Window(),
            disks=tuple(_disk(part) for part in parts),
            owner=wanted.owner,
            document=wanted.document,
        )
        self.snapshots[found.job] = found
        return found

    async def annotate(self, snapshot: OpenSnapshot) -> None:
        """Remember it as it is now."""
        self.snapshots[snapshot.job] = snapshot

    async def begin_push(self, wanted: Wanted, request: PushRequest) -> OpenSnapshot:
        """Let the storage daemon copy the images as they are."""
        await self._require_unwritten(request.snapshot.disks)
        pushing = OfflinePush(self.storage, self.job, request)
        try:
            begun = await pushing.begin()
        except BaseException as error:
            await despite(error, pushing.undo())
            raise
        self.pushes[request.job] = pushing
        found = OpenSnapshot(
            name=wanted.name,
            job=request.job,
            kind=wanted.kind,
            machine=self.job.record.machine,
            moment=begun.moment or datetime.now(UTC),
            window=Window(),
            disks=tuple(_disk(part) for part in request.snapshot.disks),
            document=wanted.document,
            push=begun.document(),
        )
        self.snapshots[found.job] = found
        return found

    async def conclude_push(self, snapshot: OpenSnapshot) -> None:
        """All is copied: make backups of it."""
        pushing = self.pushes[snapshot.job]
        try:
            await pushing.conclude(pushed(snapshot.push or {}))
        except (errors.BusyError, errors.OutcomeUnknown):
            raise
        except errors.PullbackError as error:
            await despite(error, pushing.undo())
            self._forget(snapshot)
            raise
        self._forget(snapshot)

    def _forget(self, snapshot: OpenSnapshot) -> None:
        self.snapshots.pop(snapshot.job, None)
        self.pushes.pop(snapshot.job, None)

    async def serve(self, wishes: Sequence[ExportWish], listen: Listen) -> tuple[Served, ...]:
        """Export snapshots and disks: all of them, or none."""
        done: list[Served] = []
        try:
            private = serving.private_socket(self.job)
            address = await serving.ensure(self.storage.qmp, self._register, listen, private=private)
            for wish in wishes:
                done.append(await self._serve_one(wish, address))
        except BaseException as error:
            await despite(error, self.unserve(done))
            raise
        return tuple(done)

    async def _serve_one(self, wish: ExportWish, address: ServerAddress) -> Served:
        qmp = self.storage.qmp
        id = await opened.free_id(qmp, wish.snapshot.job if wish.snapshot else self.job.record.job)
        if wish.snapshot is not None:
            return await opened.serve_view(qmp, self._register, wish, address, id=id)
        disk = disks.named(await self.storage.disks(), wish.target, self.job.record.machine)
        assert disk.node is not None
        async with AsyncExitStack() as stack:
            if wish.writable:
                self._require_unshown(wish.target)
                await stack.enter_async_context(self.storage.writable([disk.node]))
                stack.enter_context(self._given(disk.node))
            job = self.job.record.job
            served = await opened.serve_disk(qmp, self._register, wish, address, job=job, node=disk.node, id=id)
            self._writable[served.id] = stack.pop_all()
        return served

    async def _require_unwritten(self, parts: Sequence[DiskRequest]) -> None:
        """A snapshot here is the disk itself, so nobody may write to it."""
        written = {served.target: served.name for served in await self.served() if served.writable}
        for part in parts:
            if part.disk.target in written:
                holder = f"the export {written[part.disk.target]}, through which it is written"
                raise errors.DiskBusy(target=part.disk.target, holder=holder)

    def _require_unshown(self, target: str) -> None:
        for snapshot in self.snapshots.values():
            if snapshot.disk(target) is not None:
                raise errors.DiskBusy(target=target, holder=f"the snapshot {snapshot.name}, which shows it as it is")

    @contextmanager
    def _given(self, node: str) -> Iterator[None]:
        """Our own lock against writers is not in the way of our own daemon."""
        [image] = [image for index, image in enumerate(self.storage.images) if images.node(index) == node]
        with ExitStack() as stack:
            for path in {image.path.resolve()} & set(self.locks):
                stack.enter_context(self.locks[path].lifted())
            yield

    async def served(self) -> tuple[Served, ...]:
        """What is exported."""
        found = await serving.current(self.storage.qmp, self._register)
        return found.exports if found else ()

    async def unserve(self, exported: Sequence[Served]) -> None:
        """Stop exports, also under clients; what was written is stored then."""
        for served in exported:
            await exports.remove_one(self.storage.qmp, served.id)
        await serving.stop_unused(self.storage.qmp, self._register)
        for served in exported:
            await self._forget_bitmaps(served)
            if (stack := self._writable.pop(served.id, None)) is not None:
                await stack.aclose()

    async def _forget_bitmaps(self, served: Served) -> None:
        """The bitmaps that told changes stand on the disk's own node here."""
        found = disks.named(await self.storage.disks(), served.target, self.job.record.machine)
        assert found.node is not None
        there = {bitmap.name for bitmap in found.bitmaps if not bitmap.persistent}
        names = [context.removeprefix("qemu:dirty-bitmap:") for context, _ in served.contexts]
        gone = [transaction.Remove(node=found.node, name=name) for name in names if name in there]
        await transaction.run(self.storage.qmp, gone)

    async def let_go(self, snapshot: OpenSnapshot) -> None:
        """End a snapshot's exports or copying, and forget it."""
        if snapshot.job in self.pushes:
            await self.pushes[snapshot.job].undo()
        await self.unserve([served for served in await self.served() if served.job == snapshot.job])
        self._forget(snapshot)

    async def close(self) -> None:
        """End all, so that what was written is stored before the images are closed."""
        try:
            for id, pushing in self.pushes.items():
                await pushing.undo()
                made = [disk.checkpoint.bitmap for disk in self.snapshots[id].disks if disk.checkpoint]
                await ending.forget_documents(self.storage.qmp, self.job, made)
        finally:  # a push that cannot be undone is no reason to lose what others wrote
            await self.unserve(await self.served())


def _node(part: DiskRequest) -> str:
    assert part.disk.node is not None, "every image has its node"
    return part.disk.node


def _checkpoint(part: DiskRequest) -> list[transaction.Action]:
    assert part.checkpoint is not None
    return transaction.checkpoint(_node(part), part.checkpoint, part.freeze)


def _disk(part: DiskRequest) -> SnapshotDisk:
    return SnapshotDisk(
        target=part.disk.target,
        size=part.disk.size,
        node=_node(part),
        view=_node(part),
        fleecing=None,
        reason="the machine is off",
        checkpoint=part.checkpoint,
        frozen=part.freeze,
        newest=checkpoints.parse(part.since[-1]) if part.since else None,
        older=tuple(link.mark.nonce for link in checkpoints.chain(part.disk.bitmaps).links),
    )


def require_plain(wanted: Wanted) -> None:
    """A machine that is off needs no engine."""
    if wanted.request.fleecing is not None:
        raise errors.UsageError(problem="A machine that is off needs no engine")
