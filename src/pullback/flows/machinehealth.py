"""What `pullback doctor` looks at in a machine. Nothing is changed: no lock, no clearing away."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pullback import errors, state
from pullback.engine import images, sight
from pullback.flows.health import Check, Subject, scratch_room
from pullback.model import checkpoints, urls
from pullback.model.backups import Quiesce, Quiescing
from pullback.model.disks import Disk
from pullback.programs import qemu_img

#: More bitmaps of ours on a disk than this: QEMU keeps each in memory, and reads all when it starts.
MANY = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """A machine to be looked at."""

    #: What the user calls it.
    label: str
    place: urls.Machine
    #: What it is called in repositories, if the user says so.
    name: str | None = None
    scratch: Path | None = None
    quiescing: Quiescing = field(default_factory=Quiescing)
    #: What the user calls the repositories that it is backed up to.
    repositories: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What was found."""

    #: What it is called in repositories, as far as that could be told.
    name: str | None
    checks: tuple[Check, ...]


async def look(patient: Patient, directories: state.Directories, owners: Mapping[str, str] | None) -> Looked:
    """Look at it.

    `owners`: ids of the repositories that are there, with what users call them; None if they are not all known,
    so that nothing can be said of checkpoints for another one.
    """
    subject = Subject(area="machine", subject=patient.label)
    if isinstance(patient.place, urls.ImagesMachine):
        checks = tuple(await asyncio.to_thread(lambda: list(_images(subject, patient, owners))))
        return Looked(name=patient.name, checks=checks)
    socket = patient.place.socket
    try:
        found = await sight.look(socket, directories, name=patient.name)
    except errors.PullbackError as error:
        return Looked(name=patient.name, checks=(subject.failed("monitor", error),))
    checks = tuple([check async for check in _running(subject, patient, found, directories, owners)])
    return Looked(name=found.name, checks=checks)


# -- one that runs ---------------------------------------------------------------------------


async def _running(
    subject: Subject,
    patient: Patient,
    found: sight.Sight,
    directories: state.Directories,
    owners: Mapping[str, str] | None,
) -> AsyncIterator[Check]:
    yield subject.ok("monitor", f"QEMU {found.can.version} answers, and is {found.status}")
    if found.name is None:
        yield subject.problem(
            "name", "its QEMU has neither a name nor a uuid", "Start QEMU with -name, or name it with --name."
        )
    if found.dead:
        dead = ", ".join(found.dead)
        yield subject.warning("leftovers", f"dead jobs left something: {dead}", "`pullback recover` clears it away.")
    for job, kind in found.jobs.items():
        yield subject.warning("jobs", f"the {kind} job {job} runs", "A backup waits for it, or ends as busy.")
    for check in (*_engine(subject, found), *_disks(subject, found.disks, owners)):
        yield check
    taking = [disk for disk in found.disks if disk.node is not None and disk.left_out is None]
    yield scratch_room(subject, patient.scratch or directories.scratch, taking)
    yield await _agent(subject, patient.quiescing, found)


def _engine(subject: Subject, found: sight.Sight) -> Iterator[Check]:
    can = found.can
    if can.filter:
        yield subject.ok("engine", "filter: a failing copy breaks the snapshot, never the guest")
    elif can.classic:
        finding = "classic: a scratch that fails can fail the guest's writes"
        yield subject.warning("engine", finding, "QEMU 7.1 and later have a better one.")
    else:
        yield subject.problem("engine", "this QEMU cannot make snapshots for backups", "QEMU 4.2 and later can.")
    if not can.defects.probed:
        yield subject.warning("build", "its binary could not be tried, so the worst is assumed", "Run as root.")
    in_threads = [disk.target for disk in found.disks if disk.iothread]
    if can.defects.iothread_nbd_aborts and in_threads and not can.fuse:
        yield subject.problem(
            "build",
            f"this build dies of NBD clients of disks in iothreads ({', '.join(in_threads)}), and has no FUSE exports",
            "Install a QEMU with FUSE exports, or one without the defect.",
        )


async def _agent(subject: Subject, quiescing: Quiescing, found: sight.Sight) -> Check:
    if quiescing.wish is Quiesce.NO:
        return subject.ok("agent", "file systems are not to be frozen")
    judge = subject.problem if quiescing.wish is Quiesce.REQUIRE else subject.warning
    remedy = 'Install qemu-guest-agent in the guest, or say quiesce = "no".'
    socket = quiescing.agent or found.agent
    if socket is None:
        return judge("agent", "no guest agent runs: backups are as after a power cut", remedy)
    if (reason := await sight.agent_answers(socket)) is not None:
        return judge("agent", reason, remedy)
    return subject.ok("agent", "the guest agent answers: file systems are frozen for the instant")


# -- disks -----------------------------------------------------------------------------------


def _disks(subject: Subject, disks: Sequence[Disk], owners: Mapping[str, str] | None) -> Iterator[Check]:
    taking = [disk for disk in disks if disk.node is not None and disk.left_out is None]
    if not taking:
        yield subject.problem("disks", "no disk would be backed up", "`pullback info` tells why; --disk includes one.")
    for disk in taking:
        if disk.untrackable is not None:
            yield subject.ok("tracking", f"{disk.target} is read whole each time, because {disk.untrackable}")
        elif disk.transient:
            yield subject.ok("tracking", f"{disk.target}: changes are known while QEMU runs, because {disk.unlasting}")
        if disk.hole_file and not disk.hole_file.startswith("nbd") and not os.access(disk.hole_file, os.R_OK):
            finding = f"{disk.target} is read whole each time: holes in {disk.hole_file} cannot be looked at"
            yield subject.warning("images", finding, "Let the user who runs backups read it.")
    bitmaps = [check for disk in disks for check in _bitmaps(subject, disk, owners)]
    yield from bitmaps
    if taking and not bitmaps:
        yield subject.ok("bitmaps", f"the checkpoints of {', '.join(disk.target for disk in taking)} are sound")


def _bitmaps(subject: Subject, disk: Disk, owners: Mapping[str, str] | None) -> Iterator[Check]:
    chain = checkpoints.chain(disk.bitmaps)
    if chain.problem is not None:
        finding = f"{disk.target}: {chain.problem}"
        yield subject.warning("bitmaps", finding, "The next backup removes them, and reads the disk whole.")
    others = [one.name for one in disk.bitmaps if one.inconsistent and checkpoints.parse(one.name) is None]
    if others:
        finding = f"{disk.target}: bitmap {others[0]} of another program is inconsistent"
        yield subject.warning("bitmaps", finding, "Only its owner, or block-dirty-bitmap-remove, can remove it.")
    if disk.buried:
        finding = f"{disk.target}: its checkpoints are in a backing image, where they are of no use"
        yield subject.warning(
            "bitmaps", finding, "Make overlays with `pullback overlay create`, which takes them along."
        )
    if len(chain.links) > MANY:
        finding = f"{disk.target} has {len(chain.links)} checkpoints, and QEMU keeps each in memory"
        yield subject.warning("bitmaps", finding, "`pullback checkpoint delete` removes one; no change is lost.")
    yield from _orphans(subject, disk.target, [one.name for one in disk.bitmaps], owners)


def _orphans(
    subject: Subject, target: str, bitmaps: Sequence[str], owners: Mapping[str, str] | None
) -> Iterator[Check]:
    """Checkpoints that wait for a repository which is not there (any more)."""
    for bitmap in bitmaps:
        mark = checkpoints.parse(bitmap)
        owner = checkpoints.owner(mark.name) if mark else None
        if mark is not None and owner is not None and owners is not None and owner not in owners:
            finding = f"{target}: checkpoint {mark.name} is for a repository {owner}, which is not configured"
            yield subject.warning("bitmaps", finding, f"`pullback checkpoint delete {subject.subject} {mark.name}`")


# -- one that is off -------------------------------------------------------------------------


def _images(subject: Subject, patient: Patient, owners: Mapping[str, str] | None) -> Iterator[Check]:
    assert isinstance(patient.place, urls.ImagesMachine)
    if patient.name is None:
        yield subject.problem("name", "images do not say the name of their machine", "Give it with --name.")
    for wanted in patient.place.images:
        try:
            [image] = images.inspect([wanted])
            stored = qemu_img.info(image.path, format="qcow2").bitmaps if image.top.format == "qcow2" else ()
        except errors.PullbackError as error:
            yield subject.failed("images", error)
            continue
        if image.corrupt:
            finding = f"{wanted.target}: QEMU marked it as corrupt"
            yield subject.problem("images", finding, f"qemu-img check -r all {image.path}")
        elif image.top.format == "qcow2" and not image.writable:
            finding = f"{wanted.target} is read whole each time: its file cannot be written to"
            yield subject.warning("images", finding, "Let the user who runs backups write it.")
        else:
            yield subject.ok("images", f"{wanted.target} can be read")
        if any(bitmap.in_use for bitmap in stored):
            finding = f"{wanted.target} is in use just now, or its checkpoints were left behind by a crash"
            yield subject.warning("bitmaps", finding, "If its machine runs, back it up by its QMP socket.")
        yield from _orphans(subject, wanted.target, [one.name for one in stored], owners)
