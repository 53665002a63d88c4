"""pullback restore: disks of a restore point, written to files, devices or NBD servers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback.flows import restore as flow_restore
    from pullback.flows.restore import Format


def restore(
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Directory for the disks (DIR/vda.raw …).")],
    repository: options.Repository = None,
    point: options.Point = "latest",
    disk: options.Disks = None,
    format: Annotated[str, typer.Option(metavar="raw|qcow2", help="What the disks are written as.")] = "raw",
    machine: options.MachineName = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write the disks of a restore point to files, each byte proven while it is written."""
    from pullback.flows import restore as flow
    from pullback.units import format_duration, format_size

    output = Output(json, quiet, verbose)
    request = run(_restore_request(repository, to, point, disk, format, machine, force=force), output)
    with output.progress() as progress:
        report = run(flow.restore(request, progress), output)
    values: dict[str, object] = {
        "point": report.point.id,
        "machine": report.point.machine,
        "created": report.point.created.isoformat(),
        "seconds": round(report.seconds, 3),
        "disks": [
            {"target": done.target, "path": str(done.path), "size": done.size, "read": done.read, "digest": done.digest}
            for done in report.disks
        ],
    }
    lines = [f"{report.point.machine}: restored {report.point.id}"]
    lines += [f"  {done.path}  {format_size(done.size)}, proven" for done in report.disks]
    lines.append(f"  {format_duration(report.seconds)} in all")
    output.result("restore", values, [] if quiet else lines)


async def _restore_request(
    repository: str | None,
    to: Path,
    point: str,
    disk: list[str] | None,
    format: str,
    machine: str | None,
    *,
    force: bool,
) -> flow_restore.Request:
    from pullback.flows import restore as flow

    chosen = configured.repository(repository, configured.load(None))
    return flow.Request(
        repository=chosen.place,
        access=chosen.access,
        to=to.absolute(),
        point=point,
        machine=machine,
        only=tuple(disk or ()),
        format=_format(format),
        force=force,
    )


def _format(text: str) -> Format:
    from pullback import errors
    from pullback.flows.restore import Format

    try:
        return Format(text)
    except ValueError as error:
        raise errors.UsageError(
            problem=f"{text!r} is no format that a disk can be written as; there are raw and qcow2"
        ) from error
