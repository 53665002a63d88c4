"""pullback backup"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback import errors, units
from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import fail, run
from pullback.config import Machine as Configured
from pullback.errors import Exit
from pullback.model.backups import Fleecing, Level, Quiescing
from pullback.model.hooks import Hooks

if TYPE_CHECKING:
    from pullback.flows import backup as flow
    from pullback.flows import several
    from pullback.model import urls


def backup(
    machine: options.Machines,
    repository: options.Repositories = None,
    level: Annotated[
        Level, typer.Option(help="auto: what changed, where that is known; full: everything.")
    ] = Level.AUTO,
    disk: options.Disks = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", "-x", metavar="TARGET", help="Leave this disk out. May be repeated."),
    ] = None,
    name: options.Name = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", metavar="WORD", help="A word for the restore point. May be repeated.")
    ] = None,
    parallel: options.Parallel = None,
    limit_rate: options.LimitRate = None,
    scratch: options.Scratch = None,
    engine: options.Engine = None,
    nbd_server: Annotated[
        str | None,
        typer.Option(metavar="unix:PATH", help="Share the NBD server that runs in QEMU already, on a private socket."),
    ] = None,
    quiesce: options.Quiesces = None,
    agent: options.Agent = None,
    mount_point: options.MountPoints = None,
    dry_run: options.DryRun = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="A chain that did not continue is a failure (1 instead of 3).")
    ] = False,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Back up machines, running or off: their disks are frozen at one instant, and only what changed is read."""
    output = Output(json, quiet, verbose)
    wish = _Wish(
        repositories=tuple(repository or ()),
        level=level,
        only=tuple(disk or ()),
        exclude=tuple(exclude or ()),
        name=name,
        tags=tuple(tag or ()),
        limit_rate=limit_rate,
        scratch=scratch.absolute() if scratch else None,
        engine=engine,
        nbd_server=nbd_server,
        quiescing=options.quiescing(quiesce, agent, mount_point),
        state_dir=state_dir,
    )
    tasks = run(_tasks(machine, wish, config), output)
    if dry_run:
        for task in tasks:
            _dry_run(task.request, output)
        return
    _backup(tasks, output, parallel=parallel or 1, strict=strict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """What the options say; it goes before what is configured."""

    repositories: tuple[str, ...]
    level: Level
    only: tuple[str, ...]
    exclude: tuple[str, ...]
    name: str | None
    tags: tuple[str, ...]
    limit_rate: str | None
    scratch: Path | None
    engine: Fleecing | None
    nbd_server: str | None
    quiescing: Quiescing
    state_dir: Path | None


async def _tasks(machines: Sequence[str], wish: _Wish, path: Path | None) -> list[several.Task]:
    """One for each machine and repository."""
    known = configured.load(path)
    found = []
    for name in machines:
        place, of = configured.machine(name, known)
        for chosen in configured.repositories(wish.repositories, of, known, state=wish.state_dir):
            found.append(_task(name, place, of, chosen, wish))
    if wish.name is not None and len(machines) > 1:
        raise errors.UsageError(problem="--name is for one machine, and there are several")
    return found


def _task(
    name: str, place: urls.Machine, of: Configured | None, chosen: configured.Chosen, wish: _Wish
) -> several.Task:
    from pullback import state
    from pullback.flows import backup as flow
    from pullback.flows import several
    from pullback.model import urls

    limit = units.parse_size(wish.limit_rate) if wish.limit_rate else None
    request = flow.Request(
        machine=place,
        repository=chosen.place,
        access=chosen.access,
        level=wish.level,
        only=wish.only or (of.disks if of else ()),
        exclude=wish.exclude or (of.exclude if of and not wish.only else ()),
        name=wish.name or (of.identity if of else None),
        scratch=wish.scratch or (of.scratch if of else None),
        fleecing=wish.engine or (of.engine if of else None),
        nbd_server=urls.unix_socket(wish.nbd_server) if wish.nbd_server else None,
        quiescing=_quiescing(wish.quiescing, of),
        tags=wish.tags or (of.tags if of else ()),
        rate=limit or (chosen.configured.limit_rate if chosen.configured else None),
        directories=state.directories(wish.state_dir),
    )
    return several.Task(machine=name, request=request, hooks=of.hooks if of else Hooks())


def _quiescing(wish: Quiescing, of: Configured | None) -> Quiescing:
    if of is None:
        return wish
    return Quiescing(
        wish=wish.wish or of.quiesce,
        agent=wish.agent or of.agent,
        mount_points=wish.mount_points or of.mount_points,
    )


def _backup(tasks: Sequence[several.Task], output: Output, *, parallel: int, strict: bool) -> None:
    """Make them, say what became of each, and end with the worst of it."""
    from pullback.cli import allocator
    from pullback.flows import several

    allocator.keep()
    with output.progress() as progress:
        outcomes = run(several.backups(tasks, progress, parallel=parallel), output)
    for outcome in outcomes:
        if outcome.report is not None:
            output.result("backup", _document(outcome.report), [] if output.quiet else _lines(outcome.report))
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    for error in failed[1:]:
        output.error(error)
    if failed:
        fail(failed[0], output)
    if any(outcome.warnings or (outcome.report and outcome.report.broken) for outcome in outcomes):
        raise SystemExit(int(Exit.FAILED if strict else Exit.WARNED))


def _document(report: flow.Report) -> dict[str, object]:
    from pullback.model import points

    return {
        "point": points.document(report.point),
        "pause_seconds": round(report.pause, 6),
        "was_paused": report.was_paused,
        "frozen_file_systems": report.frozen,
        "frozen_seconds": round(report.frozen_seconds, 6),
        "seconds": round(report.seconds, 3),
        "notes": list(report.notes),
        "broken": list(report.broken),
    }


def _lines(report: flow.Report) -> list[str]:
    from pullback.units import format_duration, format_size

    point = report.point
    lines = [f"{point.machine}: restore point {point.id}"]
    for disk in point.disks:
        lines.append(
            f"  {disk.target:<8} {disk.mode:<12} {format_size(disk.read):>10} read "
            f"{format_size(disk.stored):>10} stored  of {format_size(disk.size)}"
        )
    lines.append(f"  the machine {_stillness(report)}; {format_duration(report.seconds)} in all")
    return lines


def _stillness(report: flow.Report) -> str:
    from pullback.units import format_duration

    engine = report.point.engine
    if engine == "offline":
        return "was off"
    still = "was paused already" if report.was_paused else f"stood still for {format_duration(report.pause)}"
    if report.frozen:
        still += f", {report.frozen} file system(s) frozen for {format_duration(report.frozen_seconds)}"
    return f"{still} ({engine} engine)"


def _dry_run(request: flow.Request, output: Output) -> None:
    from pullback.flows import backup as flow
    from pullback.units import format_size

    preview = run(flow.preview(request), output)
    disks = [
        {
            "target": plan.disk.target,
            "mode": "full" if plan.whole else "incremental",
            "reason": plan.reason,
            "parent": plan.parent.point if plan.parent else None,
            "read_at_most": preview.expected[plan.disk.target],
            "size": plan.disk.size,
            "broken": plan.broken,
        }
        for plan in preview.plans
    ]
    lines = [f"{preview.machine}: nothing was done; a backup now would read"]
    for plan in preview.plans:
        mode = "whole" if plan.whole else "changes"
        reason = f"  ({plan.reason})" if plan.reason else ""
        lines.append(
            f"  {plan.disk.target:<8} {mode:<8} at most {format_size(preview.expected[plan.disk.target])}{reason}"
        )
    lines += [f"  {target:<8} left out, because {reason}" for target, reason in preview.left_out.items()]
    values = {"dry_run": True, "machine": preview.machine, "disks": disks, "left_out": dict(preview.left_out)}
    output.result("backup", values, lines)
