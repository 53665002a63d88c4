"""Proving restore points: everything that is stored of them is read and compared."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from functools import partial

from pullback import errors, repo
from pullback.flows import reading
from pullback.flows.repositories import Access, open_for
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found about a disk of a point (or about a point as a whole: target "")."""

    machine: str
    point: str
    target: str
    #: Bytes read.
    read: int = 0
    #: What is wrong, or None if it is proven sound.
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a verification found."""

    verdicts: tuple[Verdict, ...]
    seconds: float

    @property
    def damaged(self) -> tuple[Verdict, ...]:
        """The bad ones."""
        return tuple(verdict for verdict in self.verdicts if verdict.problem is not None)


async def verify(request: Request, progress: Progress | None = None) -> Report:
    """Read and compare; damage is in the report, not raised, so that all of it is found."""
    begun = time.monotonic()
    verdicts: list[Verdict] = []
    points: list[Point] = []
    async with open_for(request.repository, request.access) as repository:
        if request.all:
            await asyncio.to_thread(_collect, repository, request.machine, points, verdicts)
        else:
            points.append(await asyncio.to_thread(partial(repository.find, request.point, machine=request.machine)))
        for point in points:
            verdicts += await _verify_point(repository, point, request, progress or Silent())
        if not verdicts:
            raise errors.NoPoints(path=repository.name)
    return Report(verdicts=tuple(verdicts), seconds=time.monotonic() - begun)


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
    with repository.reading(point):
        for disk in choose(point, request.only):
            cancel = Cancel()
            work = partial(_verify_disk, repository, point, disk, progress, cancel, alone=not request.all)
            verdicts.append(await blocking(work, cancel=cancel))
    return verdicts


def _verify_disk(
    repository: repo.Repository, point: Point, disk: PointDisk, progress: Progress, cancel: Cancel, *, alone: bool
) -> Verdict:
    try:
        if isinstance(repository, repo.Directory):
            links = repository.chain(point, disk.target)
            # With --all each image is checked with the point that it belongs to.
            problems = repo.complaints(links if alone else links[:1])
            if problems:
                return Verdict(machine=point.machine, point=point.id, target=disk.target, problem="; ".join(problems))
        read = reading.prove(repository, point, disk, None, progress=progress, cancel=cancel)
    except errors.VerificationFailed as error:
        return Verdict(machine=point.machine, point=point.id, target=disk.target, problem=error.problem)
    return Verdict(machine=point.machine, point=point.id, target=disk.target, read=read)
