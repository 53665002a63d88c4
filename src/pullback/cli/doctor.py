"""pullback doctor: everything that backups need."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback import errors
from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run
from pullback.errors import Exit

if TYPE_CHECKING:
    from pullback import config as configuration
    from pullback.flows import doctor as flow
    from pullback.flows.health import Check, Subject
    from pullback.flows.machinehealth import Patient
    from pullback.flows.storehealth import Place


def doctor(
    machines: Annotated[
        list[str] | None,
        typer.Argument(metavar="MACHINE...", help="Machines to look at, as for `backup`; without any, all configured."),
    ] = None,
    repository: options.Repositories = None,
    name: options.Name = None,
    max_age: Annotated[
        float,
        typer.Option("--max-age", metavar="DAYS", min=0, help="How old a newest restore point may be (default: 2)."),
    ] = 2.0,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Look at everything that backups need, and say what should be mended. Nothing is changed."""
    from pullback.flows import doctor as flow

    output = Output(json, quiet, verbose)
    wish = _Wish(tuple(machines or ()), tuple(repository or ()), name, config, state_dir)
    request = run(wish.request(timedelta(days=max_age)), output)
    with output.progress() as progress:
        report = run(flow.examine(request, progress), output)
    output.result("doctor", _document(report), _lines(report.checks, quiet=quiet))
    code = {"problem": Exit.FAILED, "warning": Exit.WARNED}.get(report.worst)
    if code is not None:
        raise SystemExit(int(code))


class _Wish:
    """What the command line says."""

    def __init__(
        self,
        machines: Sequence[str],
        repositories: Sequence[str],
        name: str | None,
        path: Path | None,
        state_dir: Path | None,
    ) -> None:
        self._machines = machines
        self._repositories = repositories
        self._name = name
        self._path = path
        self._state_dir = state_dir

    async def request(self, limit: timedelta) -> flow.Request:
        """What is to be looked at. A configuration that cannot be used is a finding, not an error."""
        from pullback import state
        from pullback.flows import doctor as flow
        from pullback.flows.health import Subject

        if self._name is not None and len(self._machines) != 1:
            raise errors.UsageError(problem="--name is for one machine")
        try:
            known = configured.load(self._path)
        except (errors.BadConfig, errors.PermissionDenied) as error:
            path = error.facts()["path"]
            before = [Subject(area="configuration", subject=str(path)).failed("file", error)]
            return flow.Request(before=tuple(before), limit=limit, directories=state.directories(self._state_dir))
        patients = [self._patient(name, known) for name in self._machines or known.machines]
        before = list(_configuration(Subject(area="configuration", subject=str(known.path)), known))
        places, bad = self._places(known, patients)
        return flow.Request(
            machines=tuple(patients),
            repositories=tuple(places),
            before=(*before, *bad),
            complete=not self._repositories and {place.label for place in places} >= set(known.repositories),
            limit=limit,
            directories=state.directories(self._state_dir),
        )

    def _patient(self, text: str, known: configuration.Config) -> Patient:
        from pullback.flows.machinehealth import Patient
        from pullback.model.backups import Quiescing

        place, of = configured.machine(text, known)
        if of is None:
            return Patient(label=text, place=place, name=self._name)
        return Patient(
            label=text,
            place=place,
            name=self._name or of.identity,
            scratch=of.scratch,
            quiescing=Quiescing(wish=of.quiesce, agent=of.agent, mount_points=of.mount_points),
            repositories=() if self._repositories else of.repositories,
        )

    def _places(self, known: configuration.Config, patients: Sequence[Patient]) -> tuple[list[Place], list[Check]]:
        """Those that are named; else those of the machines named; else all configured, and the environment's."""
        from pullback.flows import repositories
        from pullback.flows.health import Subject
        from pullback.flows.storehealth import Place

        wanted = list(self._repositories)
        if not wanted and self._machines:
            wanted = list(dict.fromkeys(name for patient in patients for name in patient.repositories))
        if not wanted:
            wanted = list(known.repositories)
            wanted += [name] if (name := repositories.named_by(os.environ)) and name not in wanted else []
        places, bad = [], []
        for name in wanted:
            try:
                chosen = configured.repository(name, known, state=self._state_dir)
            except errors.BadConfig as error:
                bad.append(Subject(area="repository", subject=name).failed("access", error))
                continue
            places.append(Place(label=name, place=chosen.place, access=chosen.access))
        return places, bad


def _configuration(subject: Subject, known: configuration.Config) -> Iterator[Check]:
    if not known.exists:
        yield subject.ok("file", "there is none, and none is needed")
        return
    yield subject.ok("file", f"it names {len(known.machines)} machine(s), {len(known.repositories)} repository(ies)")
    for machine in known.machines.values():
        if not machine.repositories:
            remedy = f'Name one: repository = "…" in [machines.{machine.name}] or [defaults].'
            yield subject.warning("machines", f"{machine.name} is backed up to no repository", remedy)
    for repository in known.repositories.values():
        if not repository.url.startswith("dir:") and not repository.keep:
            finding = f"{repository.name} has no rule for `forget`: every restore point is kept for ever"
            yield subject.ok("keep", finding)


def _document(report: flow.Report) -> dict[str, object]:
    return {
        "worst": str(report.worst),
        "checks": [
            {
                "area": check.area,
                "subject": check.subject,
                "name": check.name,
                "status": str(check.status),
                "finding": check.finding,
                "remedy": check.remedy,
            }
            for check in report.checks
        ],
    }


def _lines(checks: Sequence[Check], *, quiet: bool) -> list[str]:
    """By subject; with `--quiet` only what is not well."""
    lines, above = [], ""
    for check in checks:
        if quiet and check.status == "ok":
            continue
        alone = check.area in ("machine", "repository", "configuration")
        title = f"{check.area} {check.subject}" if alone else check.area
        if title != above:
            above = title
            lines.append(f"{title}:")
        what = check.finding if alone else f"{check.subject}: {check.finding}"
        lines.append(f"  {check.status:<8} {what}")
        if check.remedy:
            lines.append(f"           {check.remedy}")
    return lines
