"""The disks of another machine as places for disks of a restore point. The machine must not run.

Its disks are taken from the guest (`Machine.hold`), whose memory is lost with that, written through exports of
its own, and given back. So what is written counts in its checkpoints, as if its guest had written it. The
machine stands still afterwards; its firmware and its TPM are not touched.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pullback import errors, state
from pullback.flows.destinations import Format, Output
from pullback.flows.opening import Opened, open_machine
from pullback.machine import Held
from pullback.model import urls
from pullback.model.disks import Bus, Disk
from pullback.model.points import PointDisk
from pullback.model.rollbacks import HoldDisk, HoldRequest

#: Run states in which a guest's programs go on, or may at any moment (QAPI run-state.json).
_STOPPED = frozenset({"off", "paused", "prelaunch", "shutdown"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where disks of a restore point can be written."""

    machine: str
    outputs: tuple[Output, ...]
    held: Held

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the machine, when all is written."""
        if not self.held.disturbed:
            return ()
        return (f"{self.machine} was continued {self.held.disturbed} times meanwhile, and stopped and reset again",)


@asynccontextmanager
async def opened(
    url: urls.Machine,
    directories: state.Directories,
    wanted: Sequence[PointDisk],
    disk_map: Mapping[str, str],
    *,
    force: bool,
) -> AsyncIterator[Places]:
    """The places, while the block runs; when it is left well the machine has its disks back.

    Raises `UnknownDisk`, `DestinationUnusable` (it runs, a disk is too small or read-only, or not `force`),
    `DiskBusy`, and errors of opening a machine.
    """
    async with open_machine(url, directories, command="restore", anonymous=True) as machine:
        pairs = _pairs(machine.name, await machine.disks(), wanted, disk_map)
        await _require_stopped(machine, pairs)
        for disk, theirs in pairs:
            _require_suitable(machine.name, disk, theirs, force=force)
        request = HoldRequest(job=secrets.token_hex(4), disks=tuple(HoldDisk(disk=theirs) for _, theirs in pairs))
        await _require_holdable(machine, pairs, request)
        async with machine.hold(request) as held:
            outputs = [
                Output(disk.target, disk.size, _name(machine.name, theirs), found.address, Format.RAW, force=force)
                for (disk, theirs), found in zip(pairs, held.disks, strict=True)
            ]
            yield Places(machine=machine.name, outputs=tuple(outputs), held=held)
            await held.give_back()
            await held.conclude()


def _pairs(
    machine: str, there: Sequence[Disk], wanted: Sequence[PointDisk], disk_map: Mapping[str, str]
) -> list[tuple[PointDisk, Disk]]:
    """Each disk of the point with the machine's that it goes to."""
    for target in disk_map:
        if target not in {disk.target for disk in wanted}:
            raise errors.UsageError(problem=f"{target} in --disk-map is none of the disks that are restored")
    known = {disk.target: disk for disk in there}
    found = []
    for disk in wanted:
        target = disk_map.get(disk.target, disk.target)
        if target not in known:
            raise errors.UnknownDisk(target=target, where=machine, known=", ".join(sorted(known)) or "none")
        found.append((disk, known[target]))
    taken = [theirs.target for _, theirs in found]
    for target in taken:
        if taken.count(target) > 1:
            raise errors.UsageError(problem=f"Two disks cannot both go to {target} of {machine}: use --disk-map")
    return found


async def _require_stopped(machine: Opened, pairs: Sequence[tuple[PointDisk, Disk]]) -> None:
    status = (await machine.facts()).get("status")
    if status not in _STOPPED:
        disk, theirs = pairs[0]
        raise errors.DestinationUnusable(
            place=_name(machine.name, theirs),
            target=disk.target,
            reason=f"the machine is {status}",
            way_out="Start it with -S, or stop it: what its guest has in memory is lost. "
            "(A machine of which the restore point is, is brought back by `pullback rollback`.)",
        )


async def _require_holdable(machine: Opened, pairs: Sequence[tuple[PointDisk, Disk]], request: HoldRequest) -> None:
    try:
        await machine.require_holdable(request)
    except errors.Unsupported as error:
        raise errors.DestinationUnusable(
            place=machine.name,
            target=pairs[0][0].target,
            reason=error.reason,
            way_out="Write to its images while it is off: --to images:…",
        ) from error


def _require_suitable(machine: str, disk: PointDisk, theirs: Disk, *, force: bool) -> None:
    reason, way_out = None, "Name another disk with --disk-map."
    if theirs.node is None or theirs.bus is Bus.FIRMWARE:
        reason = "it has no medium" if theirs.node is None else "it is firmware, not a disk"
    elif theirs.read_only:
        reason = "it is read-only"
    elif theirs.size < disk.size:
        reason = f"it has {theirs.size} bytes, and the disk {disk.size}"
    elif not force:
        reason, way_out = "all that is on this disk would be lost", "If that is meant, say --force."
    if reason is not None:
        place = _name(machine, theirs)
        raise errors.DestinationUnusable(place=place, target=disk.target, reason=reason, way_out=way_out)


def _name(machine: str, disk: Disk) -> str:
    return f"disk {disk.target} of {machine}"
