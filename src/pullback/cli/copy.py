"""pullback copy: restore points, to another repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback.flows import copying as flow


def copy(
    target: Annotated[
        str, typer.Option("--to", metavar="REPO", help="The other repository; it must be there (`pullback init`).")
    ],
    points: options.Points = None,
    repository: options.Repository = None,
    machine: options.MachineName = None,
    to_password_file: Annotated[
        Path | None,
        typer.Option("--to-password-file", metavar="FILE", help="The file that holds the other one's password."),
    ] = None,
    to_password_command: Annotated[
        str | None,
        typer.Option("--to-password-command", metavar="COMMAND", help="The command that prints it."),
    ] = None,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Copy restore points to another repository in restic's format; all, or those that are named."""
    from pullback.flows import copying as flow
    from pullback.units import format_duration, format_size

    output = Output(json, quiet, verbose)

    async def request() -> flow.Request:
        known = configured.load(config)
        source = configured.repository(repository, known, state=state_dir)
        other = configured.with_password(
            configured.repository(target, known, state=state_dir), to_password_file, to_password_command
        )
        return flow.Request(
            repository=source.place,
            access=source.access,
            target=other.place,
            target_access=other.access,
            points=tuple(points or ()),
            machine=machine,
        )

    wanted = run(request(), output)
    with output.progress() as progress:
        report = run(flow.copy(wanted, progress), output)
    values: dict[str, object] = {
        "points": [_document(one) for one in report.points],
        "stored": report.stored,
        "seconds": round(report.seconds, 3),
    }
    lines = [
        f"{one.machine} {one.id[:8]} is {one.copy[:8]} there{', since before' if one.already else ''}"
        for one in report.points
    ]
    lines.append(f"{format_size(report.stored)} stored; {format_duration(report.seconds)} in all")
    output.result("copy", values, [] if quiet else lines)


def _document(one: flow.Copied) -> dict[str, object]:
    return {
        "id": one.id,
        "copy": one.copy,
        "machine": one.machine,
        "created": one.created.isoformat(),
        "already": one.already,
    }
