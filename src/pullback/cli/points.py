"""pullback list, verify: what lies in a repository."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run
from pullback.errors import Exit

if TYPE_CHECKING:
    from pullback.model.points import Point


def listing(
    repository: options.Repository = None,
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


async def _listing_request(repository: str | None, machine: str | None) -> flow_listing.Request:
    from pullback.flows import listing as flow

    chosen = configured.repository(repository, configured.load(None))
    return flow.Request(repository=chosen.place, access=chosen.access, machine=machine)


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


def verify(
    repository: options.Repository = None,
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
    repository: str | None, point: str, only: tuple[str, ...], machine: str | None, *, everything: bool
) -> flow_verify.Request:
    from pullback.flows import verify as flow

    chosen = configured.repository(repository, configured.load(None))
    return flow.Request(
        repository=chosen.place, access=chosen.access, point=point, machine=machine, only=only, all=everything
    )


if TYPE_CHECKING:
    from pullback.flows import listing as flow_listing
    from pullback.flows import verify as flow_verify
