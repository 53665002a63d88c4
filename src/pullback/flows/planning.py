"""Deciding what of each disk is read: whole, or what changed, and why. Pure.

A restore point is a disk's parent only if the disk's own bitmaps prove it: the nonce that the
point recorded is in the disk's chain, the ranges are contiguous from there to the newest, and only
the newest records. Whatever else holds, that disk is read whole, and the reason is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from pullback import errors
from pullback.model import checkpoints
from pullback.model.backups import DiskRequest, Level
from pullback.model.checkpoints import Chain, Mark
from pullback.model.disks import Disk
from pullback.model.points import Point, PointDisk, PointRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What the repository keeps of the machine."""

    #: Its restore points, oldest first.
    points: Sequence[Point] = ()
    #: The repository's id, the owner of checkpoints; "" where there is no repository yet.
    owner: str = ""
    #: Restore points that may build on one another before a new chain is begun; None: no matter how many.
    longest: int | None = None

    @property
    def newest_first(self) -> tuple[Point, ...]:
        """The points."""
        return tuple(reversed(self.points))


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """What is done with one disk."""

    disk: Disk
    chain: Chain
    #: The disk of a restore point that the increment builds on; None: the disk is read whole.
    parent: PointRef | None = None
    #: Bitmaps whose union is what changed since then.
    since: tuple[str, ...] = ()
    #: Why it is read whole, or something to know about the increment; None if there is nothing to say.
    reason: str | None = None
    #: A chain that should have continued did not.
    broken: bool = False
    #: Worthless bitmaps, to be removed first.
    wrecks: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Is it read whole?"""
        return self.parent is None

    def read_whole(self, reason: str) -> DiskPlan:
        """The same disk, read whole after all."""
        return replace(self, parent=None, since=(), reason=reason, broken=True)

    def request(self, name: str) -> DiskRequest:
        """The disk's part of the snapshot, with a new checkpoint called `name` where it can be tracked."""
        if self.disk.untrackable is not None:
            return DiskRequest(disk=self.disk)
        sound = Chain() if self.wrecks else self.chain
        freeze = sound.newest.mark.bitmap if sound.newest else None
        return DiskRequest(disk=self.disk, since=self.since, checkpoint=sound.next_mark(name), freeze=freeze)


def select(disks: Sequence[Disk], *, machine: str, only: Sequence[str], exclude: Sequence[str]) -> tuple[Disk, ...]:
    """The disks that take part: all but those left out by default, or those named by target.

    Raises `UnknownDisk` for a target that the machine does not have, `UsageError` for one without
    a medium, `NoDisks` if nothing is left.
    """
    known = {disk.target: disk for disk in disks}
    for target in (*only, *exclude):
        if target not in known:
            raise errors.UnknownDisk(target=target, where=machine, known=", ".join(known) or "none")
    if only:
        for target in only:
            if known[target].node is None:
                raise errors.UsageError(problem=f"Disk {target} has no medium")
    chosen = [
        disk
        for disk in disks
        if disk.target not in exclude and (disk.target in only if only else disk.left_out is None)
    ]
    if not chosen:
        raise errors.NoDisks(machine=machine)
    return tuple(chosen)


def plan(disks: Iterable[Disk], kept: Kept, level: Level) -> tuple[DiskPlan, ...]:
    """What is done with each disk."""
    return tuple(_plan(disk, kept, level) for disk in disks)


def _plan(disk: Disk, kept: Kept, level: Level) -> DiskPlan:
    chain = checkpoints.chain(disk.bitmaps)
    if disk.untrackable is not None:
        return DiskPlan(disk=disk, chain=chain, reason=disk.untrackable)
    wrecks = chain.names if chain.problem else ()
    decided = DiskPlan(disk=disk, chain=chain, wrecks=wrecks)
    if level is Level.FULL:
        return replace(decided, reason=None)
    found = _parent(chain, kept.newest_first)
    if found is None:
        return _without_parent(decided, kept)
    point, parent = found
    return _with_parent(decided, point, parent, kept)


def _depth(point: Point, disk: PointDisk, kept: Kept, most: int) -> int:
    """How many images the chain of a disk of a point has, `most` at most."""
    known = {found.id: found for found in kept.points}
    depth, current = 1, disk
    while current.parent is not None and current.parent.point in known and depth < most:
        parent = current.parent
        current = next((d for d in known[parent.point].disks if d.target == parent.target), disk)
        depth += 1
    return depth


def _parent(chain: Chain, points: Sequence[Point]) -> tuple[Point, PointDisk] | None:
    """The newest point that recorded a checkpoint of this very disk, whatever its target was then."""
    for point in points:
        for candidate in point.disks:
            if candidate.mark is not None and chain.find(candidate.mark.nonce) is not None:
                return point, candidate
    return None


def _with_parent(decided: DiskPlan, point: Point, parent: PointDisk, kept: Kept) -> DiskPlan:
    assert parent.mark is not None
    since = decided.chain.since(parent.mark)
    if isinstance(since, str):
        return decided.read_whole(since)
    if parent.size != decided.disk.size:
        return decided.read_whole(f"its size changed from {parent.size} to {decided.disk.size} bytes")
    if kept.longest is not None and _depth(point, parent, kept, kept.longest) >= kept.longest:
        return replace(decided, reason=f"its chain has {kept.longest} images: a new one is begun")
    renamed = None if parent.target == decided.disk.target else f"it was {parent.target} before"
    ref = PointRef(point=point.id, target=parent.target)
    return replace(decided, parent=ref, since=tuple(link.mark.bitmap for link in since), reason=renamed)


def _without_parent(decided: DiskPlan, kept: Kept) -> DiskPlan:
    """No point's checkpoint is on the disk: a new disk, or a chain that was lost?"""
    disk = decided.disk
    before = _last_of(disk, kept.newest_first)
    if decided.chain.problem:
        return decided.read_whole(decided.chain.problem)
    owned = any(checkpoints.owner(link.mark.name) == kept.owner for link in decided.chain.links)
    if not kept.points:
        # With a checkpoint all were forgotten, or the first backup was killed, or this is a copy under another name.
        none = "there is no restore point of it in the repository"
        return replace(decided, reason=none if owned else "it is the first backup")
    if owned:
        return decided.read_whole("the restore point of its last checkpoint is not in the repository any more")
    if before is None or before.mark is None:
        return replace(decided, reason="it is a new disk" if before is None else "it had no checkpoint")
    if disk.transient:
        # Foreseen, so no chain broke: QEMU was started anew since (or all tracking was removed).
        return replace(decided, reason=f"changes on a disk of format {disk.format} are known only while QEMU runs")
    if disk.buried:
        return decided.read_whole("its checkpoints are in a backing image (an external snapshot was made)")
    return decided.read_whole("its last checkpoint is not on the disk")


def _last_of(disk: Disk, points: Sequence[Point]) -> PointDisk | None:
    return next((found for point in points for found in point.disks if found.target == disk.target), None)


def to_release(chain: Chain, repository: str, keep: Mark | None) -> tuple[str, ...]:
    """Nonces of the checkpoints that a repository owns on a disk and no longer needs, newest first.

    Newest first, so that each merges into what is older and stays in one piece.
    """
    owned = [link.mark for link in chain.links if checkpoints.owner(link.mark.name) == repository]
    return tuple(mark.nonce for mark in reversed(owned) if keep is None or mark.nonce != keep.nonce)


def checkpoint_name(repository: str, moment: datetime) -> str:
    """Name of the checkpoint of a backup that begins at `moment`."""
    return checkpoints.automatic_name(repository, moment)


def chain_of(disk: Disk) -> Chain:
    """The chain that a disk's bitmaps make."""
    return checkpoints.chain(disk.bitmaps)
