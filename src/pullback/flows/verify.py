"""Proving restore points. Of a `dir:` repository, everything is read and compared.

Of one in restic's format, what can be known without reading the data is always looked at; with
`read_data` the data too, or a random part of it. See `repo.scrub`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from functools import partial

from pullback import errors, repo
from pullback.extents import Extent
from pullback.flows import reading
from pullback.flows.repositories import Access, cancel_for, open_for
from pullback.flows.repositories import reading as reading_of
from pullback.flows.restore import choose
from pullback.flows.threads import blocking
from pullback.model import urls
from pullback.model.points import Point, PointDisk
from pullback.progress import Cancel, Progress, Silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.Repository
    access: Access = field(default_factory=Access)
    point: str = "latest"
    machine: str | None = None
    only: tuple[str, ...] = ()
    #: All points (of `machine`, or of all machines) instead of one.
    all: bool = False
    #: Read the data too (of a `dir:` repository it always is).
    read_data: bool = False
    #: Read only a random part of it: `5%`, `10G`, or a number of packs.
    sample: str | None = None
    #: Bytes of packs (of a `dir:` repository, of disks) to be read in a second at most.
    rate: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found about a disk of a point (or about a point as a whole: target "")."""

    machine: str
    point: str
    target: str
    #: Bytes read; in restic's format, bytes of the disk that were proven.
    read: int = 0
    #: What is wrong, or None if nothing was found.
    problem: str | None = None
    #: Where it cannot be read, if that is known; at most `repo.MAX_RANGES`.
    ranges: tuple[Extent, ...] = ()
    #: Ranges beyond those.
    more: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a verification found."""

    verdicts: tuple[Verdict, ...]
    seconds: float
    #: Files of the repository that are not what was written, whether a point needs them or not.
    files: tuple[repo.BadFile, ...] = ()
    #: Sentences about what is no damage of what was asked for.
    notes: tuple[str, ...] = ()
    #: Whether the data was read: all of it, or a sample.
    read_data: bool = True
    sampled: bool = False
    #: Packs that were read, and their bytes.
    packs: int = 0
    pack_bytes: int = 0

    @property
    def damaged(self) -> tuple[Verdict, ...]:
        """The bad ones."""
        return tuple(verdict for verdict in self.verdicts if verdict.problem is not None)

    @property
    def clean(self) -> bool:
        """Was nothing bad found at all?"""
        return not self.damaged and not self.files


async def verify(request: Request, progress: Progress | None = None) -> Report:
    """Look for damage; it is in the report, not raised, so that all of it is found."""
    begun = time.monotonic()
    sample = repo.Sample.parse(request.sample) if request.sample is not None else None
    async with open_for(request.repository, request.access) as repository:
        if isinstance(repository, repo.ResticRepository):
            found = await _scrub(repository, request, sample, progress or Silent())
            return _report(found, request, time.monotonic() - begun)
        if sample is not None:
            raise errors.Unsupported(
                what="--sample",
                reason="a dir: repository is always read whole",
                way_out="Leave it out, or name one point or disk.",
            )
        verdicts = await _verify_all(repository, request, progress or Silent())
        return Report(verdicts=tuple(verdicts), seconds=time.monotonic() - begun)


# -- restic's format ---------------------------------------------------------------------------


async def _scrub(
    repository: repo.ResticRepository, request: Request, sample: repo.Sample | None, progress: Progress
) -> repo.Findings:
    points = None
    if not request.all:
        point = await asyncio.to_thread(partial(repository.find, request.point, machine=request.machine))
        choose(point, request.only)  # raises for a disk that it does not have
        points = frozenset([point.id])
    scope = repo.Scope(
        points=points,
        machine=request.machine if request.all else None,
        only=request.only,
        read_data=request.read_data or sample is not None,
        sample=sample,
    )
    cancel = cancel_for(repository)
    work = partial(repo.scrub, repository, scope, progress=progress, cancel=cancel, rate=request.rate)
    found = await blocking(work, cancel=cancel)
    if not found.disks and not found.files:
        of_machine = f" of {request.machine}" if request.machine else ""
        raise errors.NoPoints(path=repository.name, of_machine=of_machine)
    return found


def _report(found: repo.Findings, request: Request, seconds: float) -> Report:
    verdicts = [
        Verdict(
            machine=disk.machine,
            point=disk.point,
            target=disk.target,
            read=disk.read,
            problem=disk.problem,
            ranges=disk.ranges,
            more=disk.more,
        )
        for disk in found.disks
    ]
    return Report(
        verdicts=tuple(verdicts),
        seconds=seconds,
        files=found.files,
        notes=found.notes,
        read_data=request.read_data or request.sample is not None,
        sampled=request.sample is not None,
        packs=found.packs_read,
        pack_bytes=found.bytes_read,
    )


# -- images ------------------------------------------------------------------------------------


async def _verify_all(repository: repo.Repository, request: Request, progress: Progress) -> list[Verdict]:
    verdicts: list[Verdict] = []
    points: list[Point] = []
    if request.all:
        await asyncio.to_thread(_collect, repository, request.machine, points, verdicts)
    else:
        points.append(await asyncio.to_thread(partial(repository.find, request.point, machine=request.machine)))
    for point in points:
        verdicts += await _verify_point(repository, point, request, progress)
    if not verdicts:
        raise errors.NoPoints(path=repository.name)
    return verdicts


def _collect(repository: repo.Repository, machine: str | None, points: list[Point], verdicts: list[Verdict]) -> None:
    for name in repository.machines() if machine is None else (machine,):
        listing = repository.listing(name)
        points += listing.points
        verdicts += [
            Verdict(machine=name, point=damaged.id, target="", problem=damaged.problem) for damaged in listing.damaged
        ]


async def _verify_point(
    repository: repo.Repository, point: Point, request: Request, progress: Progress
) -> list[Verdict]:
    verdicts = []
    limiter = repo.Limiter(request.rate) if request.rate else None
    async with reading_of(repository, point):
        for disk in choose(point, request.only):
            cancel = cancel_for(repository)
            work = partial(
                _verify_disk, repository, point, disk, progress, cancel, alone=not request.all, limiter=limiter
            )
            verdicts.append(await blocking(work, cancel=cancel))
        if not request.only:
            verdicts += await asyncio.to_thread(_verify_rest, repository, point)
    return verdicts


def _verify_rest(repository: repo.Repository, point: Point) -> list[Verdict]:
    """What a point has besides disks; only damage is told."""
    verdicts = []
    for name, look in (("firmware", repository.firmware), ("tpm", repository.tpm)):
        try:
            look(point)
        except errors.VerificationFailed as error:
            verdicts.append(Verdict(machine=point.machine, point=point.id, target=name, problem=error.problem))
    return verdicts


def _verify_disk(
    repository: repo.Repository,
    point: Point,
    disk: PointDisk,
    progress: Progress,
    cancel: Cancel,
    *,
    alone: bool,
    limiter: repo.Limiter | None,
) -> Verdict:
    try:
        if isinstance(repository, repo.Directory):
            links = repository.chain(point, disk.target)
            # With --all each image is checked with the point that it belongs to.
            problems = repo.complaints(links if alone else links[:1])
            if problems:
                return Verdict(machine=point.machine, point=point.id, target=disk.target, problem="; ".join(problems))
        read = reading.prove(repository, point, disk, None, progress=progress, cancel=cancel, limiter=limiter)
    except errors.VerificationFailed as error:
        return Verdict(machine=point.machine, point=point.id, target=disk.target, problem=error.problem)
    return Verdict(machine=point.machine, point=point.id, target=disk.target, read=read)
