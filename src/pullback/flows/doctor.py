"""Looking at everything that backups need, and saying what should be mended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

from pullback import state
from pullback.flows import health, machinehealth, storehealth
from pullback.flows.health import Check, Status
from pullback.flows.machinehealth import Patient
from pullback.flows.storehealth import Place
from pullback.progress import Progress, Silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be looked at."""

    machines: tuple[Patient, ...] = ()
    repositories: tuple[Place, ...] = ()
    #: What was found out about the configuration before.
    before: tuple[Check, ...] = ()
    #: Are these all repositories that the machines are backed up to? Then a checkpoint for another one is an orphan.
    complete: bool = False
    #: The age of a newest point that is worth a warning.
    limit: timedelta = timedelta(days=2)
    directories: state.Directories = field(default_factory=state.directories)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found, in order."""

    checks: tuple[Check, ...]

    @property
    def worst(self) -> Status:
        """Of all that was found."""
        found = {check.status for check in self.checks}
        return next((status for status in (Status.PROBLEM, Status.WARNING) if status in found), Status.OK)


async def examine(request: Request, progress: Progress | None = None) -> Report:
    """Look at it all. Nothing is changed; a repository gets a lock for a moment, to see that it can be written.

    Whatever is found is in the report: this does not raise.
    """
    told = progress or Silent()
    checks = [*(await asyncio.to_thread(lambda: list(health.programs()))), *request.before]
    checks += health.directories(request.directories)
    looked = []
    for place in request.repositories:
        told.note(f"looking at the repository {place.label}")
        looked.append(await asyncio.to_thread(partial(storehealth.look, place)))
    owners = {found.id: place.label for found, place in zip(looked, request.repositories, strict=True) if found.id}
    known = owners if request.complete and len(owners) == len(request.repositories) else None
    names: list[tuple[Patient, str | None]] = []
    for patient in request.machines:
        told.note(f"looking at the machine {patient.label}")
        seen = await machinehealth.look(patient, request.directories, known)
        names.append((patient, seen.name))
        checks += seen.checks
    for place, found in zip(request.repositories, looked, strict=True):
        checks += found.checks
        if found.id is not None:
            machines = _expected(place, names) if names else sorted(found.newest)
            checks += storehealth.ages(place, found.newest, machines, request.limit)
    return Report(checks=tuple(checks))


def _expected(place: Place, names: Sequence[tuple[Patient, str | None]]) -> list[str]:
    """The machines of which this repository should have points."""
    return [
        name or patient.label
        for patient, name in names
        if not patient.repositories or place.label in patient.repositories
    ]
