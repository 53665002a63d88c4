"""The interface of a machine, whatever runs it: what the flows need, and nothing of how it is done.

Implemented by `engine`: a QEMU process by its monitor (`qemu`), the images of a machine that is off (`offline`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol

from pullback.model.backups import Frozen, Quiescing, SnapshotRequest, Window
from pullback.model.description import Description, Firmware
from pullback.model.disks import Disk
from pullback.model.exports import Listen, Served
from pullback.model.overlays import Advance, Committed, NewOverlay, Overlay
from pullback.model.pushing import PushProgress, PushRequest
from pullback.model.rollbacks import After, HeldDisk, HoldRequest, Journal
from pullback.model.snapshots import ExportWish, OpenSnapshot, Wanted
from pullback.model.tpm import TpmState
from pullback.model.tracking import Begun, ChangeMap, Doomed, NewBitmap, Union


class Snapshot(Protocol):
    """Disks frozen at one instant; made by `Machine.snapshot`."""

    @property
    def disks(self) -> tuple[Frozen, ...]:
        """Where each can be read."""

    @property
    def window(self) -> Window:
        """How long the machine stood still."""

    @property
    def moment(self) -> datetime:
        """The instant, UTC."""

    async def close(self) -> None:
        """Let go of the frozen view now (its checkpoint stays undecided); twice is fine."""

    async def firmware(self) -> tuple[tuple[Firmware, ...], tuple[str, ...]]:
        """The content of the machine's firmware devices, and sentences about those that cannot be read."""

    async def tpm(self) -> tuple[TpmState | None, tuple[str, ...]]:
        """The state that the machine's TPM had at the instant, if it has one; and what there is to say of it."""

    def keep(self) -> None:
        """The backup is safe: leaving the block will not take the new checkpoints back."""


class Held(Protocol):
    """Disks taken from the guest, for us to write; made by `Machine.hold`."""

    @property
    def disks(self) -> tuple[HeldDisk, ...]:
        """Where each can be written, as asked for."""

    @property
    def kept(self) -> str:
        """The QEMU process in which they were held by this very job already when we came; "" if they were not.

        Nobody else could write to them there since.
        """

    @property
    def process(self) -> str:
        """The QEMU process in which they stay held when we die, as `<pid>:<start time>`; "" if there is none."""

    @property
    def disturbed(self) -> int:
        """How often somebody continued the machine meanwhile, and it was stopped and reset again."""

    async def watch(self) -> None:
        """To run beside the work: keeps the machine stopped. Never ends by itself."""

    async def give_back(self) -> None:
        """All is written and durable: the disks are the guest's again, and nothing of ours is left."""

    async def conclude(self) -> After:
        """Let the machine run, or leave it, or end it, as was asked for; gives which."""


class Machine(Protocol):
    """A machine that can be backed up. All methods raise `PullbackError`s."""

    @property
    def name(self) -> str:
        """Its identity: what restore points are filed under."""

    @property
    def version(self) -> str:
        """Of the hypervisor, for people."""

    @property
    def cleared(self) -> Sequence[str]:
        """Ids of dead jobs whose leftovers were removed when we connected."""

    async def disks(self) -> tuple[Disk, ...]:
        """All block devices, as they are now."""

    async def facts(self) -> Mapping[str, object]:
        """What this machine and its hypervisor can do, for `pullback info` (JSON values)."""

    async def describe(self) -> Description:
        """How it was started."""

    def snapshot(self, request: SnapshotRequest) -> AbstractAsyncContextManager[Snapshot]:
        """Freeze disks while the block runs. Left without `keep`, the new checkpoints are merged back."""

    async def open_snapshot(self, wanted: Wanted) -> OpenSnapshot:
        """Freeze disks until `close_snapshot`; of a running machine, the snapshot lasts when we are gone."""

    async def snapshots(self) -> tuple[OpenSnapshot, ...]:
        """The snapshots that last, with jobs that export disks themselves; oldest first."""

    async def close_snapshot(self, snapshot: OpenSnapshot, *, take_back: bool) -> None:
        """Let go of a snapshot and its exports; with `take_back` its new checkpoint is merged back."""

    async def relieve(self) -> None:
        """Let go of snapshots that must not stay: their scratch leaves too little free, their owner has ended.

        Nobody else can while we hold the machine.
        """

    async def annotate(self, snapshot: OpenSnapshot) -> None:
        """Keep a changed description of a lasting snapshot."""

    async def begin_push(self, wanted: Wanted, request: PushRequest) -> OpenSnapshot:
        """Freeze disks and let the hypervisor copy them, until `conclude_push` or `close_snapshot` (which undoes)."""

    async def push_progress(self, snapshot: OpenSnapshot) -> tuple[PushProgress, ...]:
        """How far each disk of a push is."""

    async def limit_push(self, snapshot: OpenSnapshot, speed: int | None) -> None:
        """Bytes a second for each disk from now on; None: as fast as it goes."""

    async def pause_push(self, snapshot: OpenSnapshot, *, paused: bool) -> None:
        """Let a push rest, or go on."""

    async def conclude_push(self, snapshot: OpenSnapshot) -> None:
        """All is copied: make backups of it.

        Raises `BusyError` while it is not. If it failed, all is undone and the reason is raised.
        """

    @property
    def interrupted(self) -> Journal | None:
        """The rollback of its disks that was interrupted; only who opens it to finish that gets here."""

    async def require_holdable(self, request: HoldRequest) -> None:
        """Raise what `hold` would, as far as it can be known before anything is done."""

    def hold(self, request: HoldRequest) -> AbstractAsyncContextManager[Held]:
        """Take disks from the guest, whose memory is lost with it, and export them for writing.

        While the journal of that job does not say that writing has begun, all is undone when the block fails,
        and a machine that ran runs again, from its beginning. After that the disks stay out of reach until
        `give_back`, whatever happens to us. Raises `Unsupported`, `DiskBusy`, `BusyError`, `NbdServerBusy`.
        """

    async def serve(self, wishes: Sequence[ExportWish], listen: Listen) -> tuple[Served, ...]:
        """Export snapshots and disks for others: all of them, or none.

        Raises `NbdServerBusy`, `InsecureExport`, `ExportExists`, `UnknownDisk`, `Unsupported`, `DiskBusy`.
        """

    async def served(self) -> tuple[Served, ...]:
        """What we export for others."""

    async def unserve(self, exported: Sequence[Served]) -> None:
        """Stop exports, also under clients; the server too, if they were its last."""

    async def drop_bitmaps(self, disk: Disk, names: Sequence[str]) -> None:
        """Remove bitmaps that are worthless."""

    async def delete_checkpoints(self, disk: Disk, nonces: Sequence[str]) -> None:
        """Delete checkpoints of a disk, each merged into its older neighbour."""

    async def create_checkpoint(self, parts: Sequence[NewBitmap], quiescing: Quiescing) -> Begun:
        """Make a checkpoint on several disks at one instant, and nothing else.

        Raises `BusyError` while one of the bitmaps is in use, `QuiesceFailed`; nothing was done then.
        """

    async def take_back_checkpoint(self, parts: Sequence[NewBitmap]) -> None:
        """Undo `create_checkpoint`, as far as it was done: what was recorded goes back to the older ones."""

    async def delete_checkpoint(self, parts: Sequence[Doomed]) -> None:
        """Delete a checkpoint on several disks, each at most once, in one transaction; no other loses a change.

        Raises `BusyError` while one of the bitmaps is in use; nothing was done then.
        """

    async def dirty_sizes(self, unions: Sequence[Union]) -> tuple[int, ...]:
        """The bytes that are marked in each union of bitmaps, now."""

    def change_map(self, union: Union) -> AbstractAsyncContextManager[ChangeMap]:
        """The ranges that are marked in a union of bitmaps, over NBD while the block runs."""

    async def create_overlays(self, parts: Sequence[NewOverlay]) -> tuple[Overlay, ...]:
        """Put new overlays on disks at one instant, with their checkpoints: all of them, or none.

        Raises `DiskBusy`, `BusyError`, `DestinationExists`, `Unsupported`.
        """

    async def commit_overlay(self, disk: Disk, advance: Advance) -> Committed:
        """Commit a disk's top image into the one below, with its checkpoints.

        Raises `DiskBusy`, `BusyError`, `UsageError`, `OverlayNotCommitted`, `Unsupported`.
        """

    async def alive(self) -> bool:
        """Does it still answer?"""
