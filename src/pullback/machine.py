"""The interface of a machine, whatever runs it: what the flows need, and nothing of how it is done.

Implemented by `engine`: a QEMU process by its monitor (`qemu`), the images of a machine that is off (`offline`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol

from pullback.model.backups import Frozen, SnapshotRequest, Window
from pullback.model.disks import Disk


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

    def keep(self) -> None:
        """The backup is safe: leaving the block will not take the new checkpoints back."""


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

    def snapshot(self, request: SnapshotRequest) -> AbstractAsyncContextManager[Snapshot]:
        """Freeze disks while the block runs. Left without `keep`, the new checkpoints are merged back."""

    async def drop_bitmaps(self, disk: Disk, names: Sequence[str]) -> None:
        """Remove bitmaps that are worthless."""

    async def delete_checkpoints(self, disk: Disk, nonces: Sequence[str]) -> None:
        """Delete checkpoints of a disk, each merged into its older neighbour."""

    async def alive(self) -> bool:
        """Does it still answer?"""
