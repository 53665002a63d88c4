"""Everything about one restore point."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial

from pullback import repo
from pullback.flows.repositories import Access, cancel_for, open_for
from pullback.flows.threads import blocking
from pullback.model import urls
from pullback.model.points import Point
from pullback.progress import Cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.Repository
    access: Access = field(default_factory=Access)
    point: str = "latest"
    machine: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A restore point, and what it takes."""

    point: Point
    #: Bytes that removing it alone would free.
    freed: int
    #: In restic's format: its chunks.
    usage: repo.Usage | None = None
    #: In a `dir:` repository: ids of the points with images that build upon it, so that it cannot be removed.
    dependents: tuple[str, ...] = ()


async def show(request: Request) -> Report:
    """Look at a point. Raises `UnknownPoint`, `AmbiguousPoint`, `VerificationFailed`."""
    async with open_for(request.repository, request.access) as repository:
        point = await asyncio.to_thread(partial(repository.find, request.point, machine=request.machine))
        cancel = cancel_for(repository)
        return await blocking(partial(_report, repository, point, cancel), cancel=cancel)


def _report(repository: repo.Repository, point: Point, cancel: Cancel) -> Report:
    if isinstance(repository, repo.ResticRepository):
        with repository.reading(point):
            usage = repo.usage(repository, point, cancel=cancel)
        return Report(point=point, freed=usage.freed, usage=usage)
    assert isinstance(repository, repo.Directory)
    dependents = tuple(other.id for other in repository.dependents(point))
    return Report(point=point, freed=0 if dependents else point.stored, dependents=dependents)
