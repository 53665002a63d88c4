"""pullback list, restore, verify: what lies in a repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import options
from pullback.cli.output import Output
from pullback.cli.running import run
from pullback.errors import Exit

if TYPE_CHECKING:
    from pullback.flows.restore import Format
    from pullback.model.points import Point


def listing(
    repository: options.Repository,
    machine: options.MachineName = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List the restore points of a repository."""
    from pullback.flows import listing as flow

    output = Output(json, quiet, verbose)
    machines = run(flow.listing(run(_listing_request(repository, machine), output)), output)
    values: dict[str, object] = {
        "machines": [
            {
                "machine": found.name,
                "points": [_summary(point) for point in found.points],
                "damaged": [{"id": bad.id, "problem": bad.problem} for bad in found.damaged],
            }
            for found in machines
        ]
    }
    output.result("list", values, [line for found in machines for line in _table(found)])


async def _listing_request(repository: str, machine: str | None) -> flow_listing.Request:
    from pullback.flows import listing as flow
    from pullback.model import urls

    return flow.Request(repository=urls.repository(repository), machine=machine)


def _summary(point: Point) -> dict[str, object]:
    return {
        "id": point.id,
        "created": point.created.isoformat(),
        "level": str(point.level),
        "stored": point.stored,
        "disks": [
            {"target": disk.target, "size": disk.size, "mode": str(disk.mode), "stored": disk.stored}
            for disk in point.disks
        ],
    }


def _table(found: flow_listing.Machine) -> list[str]:
    from pullback.units import format_size

    lines = [f"{found.name}:"]
    for point in found.points:
        disks = ", ".join(f"{disk.target} {format_size(disk.size)} {disk.mode}" for disk in point.disks)
        moment = f"{point.created.astimezone():%Y-%m-%d %H:%M:%S}"
        lines.append(f"  {point.id}  {moment}  {format_size(point.stored):>10}  {disks}")
    lines += [f"  {bad.id}  DAMAGED: {bad.problem}" for bad in found.damaged]
    return lines


def restore(
    repository: options.Repository,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Directory for the disks (DIR/vda.raw …).")],
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
    repository: str, to: Path, point: str, disk: list[str] | None, format: str, machine: str | None, *, force: bool
) -> flow_restore.Request:
    from pullback.flows import restore as flow
    from pullback.model import urls

    return flow.Request(
        repository=urls.repository(repository),
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


def verify(
    repository: options.Repository,
    point: options.Point = "latest",
    everything: Annotated[bool, typer.Option("--all", help="All restore points.")] = False,
    disk: options.Disks = None,
    machine: options.MachineName = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Read everything that is stored of a restore point and prove it."""
    from pullback.flows import verify as flow
    from pullback.units import format_duration, format_size

    output = Output(json, quiet, verbose)
    only = tuple(disk or ())
    request = run(_verify_request(repository, point, only, machine, everything=everything), output)
    with output.progress() as progress:
        report = run(flow.verify(request, progress), output)
    values: dict[str, object] = {
        "seconds": round(report.seconds, 3),
        "damaged": len(report.damaged),
        "disks": [
            {"machine": v.machine, "point": v.point, "target": v.target, "read": v.read, "problem": v.problem}
            for v in report.verdicts
        ],
    }
    lines = [
        f"{v.machine} {v.point} {v.target:<6} "
        + (f"DAMAGED: {v.problem}" if v.problem else f"sound, {format_size(v.read)} read")
        for v in report.verdicts
    ]
    lines.append(f"{len(report.damaged)} damaged; {format_duration(report.seconds)} in all")
    output.result("verify", values, [] if quiet else lines)
    if report.damaged:
        output.hint(
            "`pullback verify --all` shows which points are sound; `pullback backup --level full` starts afresh"
        )
        raise SystemExit(int(Exit.VERIFICATION))


async def _verify_request(
    repository: str, point: str, only: tuple[str, ...], machine: str | None, *, everything: bool
) -> flow_verify.Request:
    from pullback.flows import verify as flow
    from pullback.model import urls

    return flow.Request(repository=urls.repository(repository), point=point, machine=machine, only=only, all=everything)


if TYPE_CHECKING:
    from pullback.flows import listing as flow_listing
    from pullback.flows import restore as flow_restore
    from pullback.flows import verify as flow_verify
