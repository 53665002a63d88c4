"""Looking at what a repository holds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from pullback import errors, repo
from pullback.flows.repositories import Access, opened
from pullback.model import urls
from pullback.model.points import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.Repository
    access: Access = field(default_factory=Access)
    #: One machine only; None: all.
    machine: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """A restore point that cannot be used."""

    id: str
    #: What is wrong, as a clause.
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine's restore points, oldest first."""

    name: str
    points: tuple[Point, ...]
    damaged: tuple[Damaged, ...]


async def listing(request: Request) -> tuple[Machine, ...]:
    """All restore points, by machine. Raises `NoPoints` if there is none."""
    return await asyncio.to_thread(_listing, request)


def _listing(request: Request) -> tuple[Machine, ...]:
    with opened(request.repository, request.access) as repository:
        wanted = repository.machines() if request.machine is None else (request.machine,)
        found = [_machine(name, repository.listing(name)) for name in wanted]
        if request.machine is None and (strays := repository.strays()):
            found.append(Machine(name="?", points=(), damaged=_damaged(strays)))
        if not any(machine.points or machine.damaged for machine in found):
            of_machine = f" of {request.machine}" if request.machine else ""
            raise errors.NoPoints(path=repository.name, of_machine=of_machine)
        return tuple(found)


def _machine(name: str, listing: repo.Listing) -> Machine:
    return Machine(name=name, points=listing.points, damaged=_damaged(listing.damaged))


def _damaged(found: Sequence[repo.Damaged]) -> tuple[Damaged, ...]:
    return tuple(Damaged(id=bad.id, problem=bad.problem) for bad in found)
