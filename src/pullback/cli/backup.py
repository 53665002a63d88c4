"""pullback backup"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import options
from pullback.cli.output import Output
from pullback.cli.running import run
from pullback.errors import Exit
from pullback.model.backups import Fleecing, Level, Quiescing

if TYPE_CHECKING:
    from pullback.flows import backup as flow


def backup(
    machine: options.Machine,
    repository: options.Repository,
    level: Annotated[
        Level, typer.Option(help="auto: what changed, where that is known; full: everything.")
    ] = Level.AUTO,
    disk: options.Disks = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", "-x", metavar="TARGET", help="Leave this disk out. May be repeated."),
    ] = None,
    name: options.Name = None,
    scratch: options.Scratch = None,
    engine: options.Engine = None,
    nbd_server: Annotated[
        str | None,
        typer.Option(metavar="unix:PATH", help="Share the NBD server that runs in QEMU already, on a private socket."),
    ] = None,
    quiesce: options.Quiesces = None,
    agent: options.Agent = None,
    mount_point: options.MountPoints = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Say what would be read, and why.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="A chain that did not continue is a failure (1 instead of 3).")
    ] = False,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Back up a machine, running or off: its disks are frozen at one instant, and only what changed is read."""
    output = Output(json, quiet, verbose)
    quiescing = Quiescing(
        wish=quiesce, agent=agent.absolute() if agent else None, mount_points=tuple(mount_point or ())
    )
    request = run(
        _request(machine, repository, level, disk, exclude, name, scratch, engine, nbd_server, quiescing, state_dir),
        output,
    )
    if dry_run:
        _dry_run(request, output)
        return
    _backup(request, output, strict=strict)


async def _request(
    machine: str,
    repository: str,
    level: Level,
    disk: list[str] | None,
    exclude: list[str] | None,
    name: str | None,
    scratch: Path | None,
    engine: Fleecing | None,
    nbd_server: str | None,
    quiescing: Quiescing,
    state_dir: Path | None,
) -> flow.Request:
    from pullback import state
    from pullback.flows import backup as flow
    from pullback.model import urls

    return flow.Request(
        machine=urls.machine(machine),
        repository=urls.repository(repository),
        level=level,
        only=tuple(disk or ()),
        exclude=tuple(exclude or ()),
        name=name,
        scratch=scratch.absolute() if scratch else None,
        fleecing=engine,
        nbd_server=urls.unix_socket(nbd_server) if nbd_server else None,
        quiescing=quiescing,
        directories=state.directories(state_dir),
    )


def _backup(request: flow.Request, output: Output, *, strict: bool) -> None:
    from pullback.flows import backup as flow

    with output.progress() as progress:
        report = run(flow.backup(request, progress), output)
    output.result("backup", _document(report), [] if output.quiet else _lines(report))
    if report.broken:
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
