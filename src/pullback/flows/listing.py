"""Looking at what a repository holds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pullback import errors, repo
from pullback.model import urls
from pullback.model.points import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.DirectoryRepository
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
    directory = repo.open_directory(request.repository.path)
    names = directory.machines() if request.machine is None else (request.machine,)
    found = tuple(_machine(directory, name) for name in names)
    if not any(machine.points or machine.damaged for machine in found):
        of_machine = f" of {request.machine}" if request.machine else ""
        raise errors.NoPoints(path=str(directory.path), of_machine=of_machine)
    return found


def _machine(directory: repo.Directory, name: str) -> Machine:
    listing = directory.listing(name)
    damaged = tuple(Damaged(id=bad.id, problem=bad.problem) for bad in listing.damaged)
    return Machine(name=name, points=listing.points, damaged=damaged)
