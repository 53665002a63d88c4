"""Deciding whether a machine's disks can be rolled back in place, and how what differs is found. Pure.

A disk is told by its target. Whatever speaks against its being the same disk (another size, another serial
number, bitmaps that prove that it had another target) refuses it: the wrong disk would be overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pullback import errors
from pullback.flows import planning
from pullback.flows.planning import DiskPlan, Kept
from pullback.model.disks import Disk
from pullback.model.points import Point, PointDisk

_NO_CHECKPOINT = "it has no usable checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One disk's way back."""

    disk: Disk
    #: The disk in the restore point.
    wanted: PointDisk
    #: Bitmaps whose union is what was written since `newest`; empty: the disk is compared whole.
    since: tuple[str, ...]
    #: The newest point that these bitmaps continue, and the disk in it.
    newest: Point | None
    newest_disk: PointDisk | None
    #: Why it is compared whole, or None.
    reason: str | None

    @property
    def by_bitmaps(self) -> bool:
        """Is what differs known without reading the whole disk?"""
        return self.newest is not None


def choose(disks: Sequence[Disk], point: Point, *, machine: str, only: Sequence[str]) -> tuple[Disk, ...]:
    """The disks that are meant: those named, or all of the machine, which must be all of the point then.

    Raises `DisksDiffer`, `UnknownDisk`, `NoDisks`.
    """
    chosen = planning.select(disks, machine=machine, only=only, exclude=())
    there, saved = {disk.target for disk in chosen}, {disk.target for disk in point.disks}
    if only:
        for target in only:
            point.disk(target)
        return chosen
    problems = [f"it has no disk {target}, which the restore point has" for target in sorted(saved - there)]
    problems += [f"the restore point does not have its disk {target}" for target in sorted(there - saved)]
    if problems:
        raise errors.DisksDiffer(
            machine=machine,
            point=point.id,
            problem=" and ".join(problems),
            way_out="Name the disks that are to be rolled back with --disk; the others are left as they are.",
        )
    return chosen


def plan(increments: Sequence[DiskPlan], point: Point, kept: Kept, *, machine: str) -> tuple[Plan, ...]:
    """How each disk goes back, given what an increment would read of it now. Raises `DisksDiffer`."""
    return tuple(_plan(one, point, kept, machine) for one in increments)


def _plan(decided: DiskPlan, point: Point, kept: Kept, machine: str) -> Plan:
    disk, wanted = decided.disk, point.disk(decided.disk.target)
    if problem := _problem(decided, wanted):
        raise errors.DisksDiffer(machine=machine, point=point.id, problem=problem)
    newest = _newest(decided, kept)
    if newest is None:
        return _whole(disk, wanted, decided.reason)
    newest_disk = newest.disk(disk.target)
    if (newest_disk.size, newest_disk.block_size) != (wanted.size, wanted.block_size):
        return _whole(disk, wanted, "its newest restore point has chunks of another size")
    return Plan(disk=disk, wanted=wanted, since=decided.since, newest=newest, newest_disk=newest_disk, reason=None)


def _newest(decided: DiskPlan, kept: Kept) -> Point | None:
    if decided.parent is None:
        return None
    return next(found for found in kept.points if found.id == decided.parent.point)


def _whole(disk: Disk, wanted: PointDisk, reason: str | None) -> Plan:
    return Plan(disk=disk, wanted=wanted, since=(), newest=None, newest_disk=None, reason=reason or _NO_CHECKPOINT)


def _problem(decided: DiskPlan, wanted: PointDisk) -> str | None:
    """What speaks against its being the same disk."""
    disk = decided.disk
    if disk.size != wanted.size:
        return f"{disk.target} has {disk.size} bytes, and had {wanted.size} then"
    if disk.serial and wanted.serial and disk.serial != wanted.serial:
        return f"{disk.target} has the serial number {disk.serial}, and had {wanted.serial} then: it is another disk"
    if decided.parent is not None and decided.parent.target != disk.target:
        return f"{disk.target} was {decided.parent.target} in {decided.parent.point}: disks have changed their places"
    return None
