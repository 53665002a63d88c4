"""pullback list: what lies in a repository."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback.model.points import Point


#: Characters of an id in restic's format.
_LONG = 64


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
        "tags": list(point.tags),
        "disks": [
            {"target": disk.target, "size": disk.size, "mode": str(disk.mode), "stored": disk.stored}
            for disk in point.disks
        ],
    }


def _table(found: flow_listing.Machine) -> list[str]:
    from pullback.units import format_size

    lines = [f"{found.name}:"]
    tags = {point.id: ",".join(point.tags) for point in found.points}
    width = max(map(len, tags.values()), default=0)
    for point in found.points:
        disks = ", ".join(f"{disk.target} {format_size(disk.size)} {disk.mode}" for disk in point.disks)
        moment = f"{point.created.astimezone():%Y-%m-%d %H:%M:%S}"
        column = f"{tags[point.id]:<{width}}  " if width else ""
        lines.append(f"  {short(point.id)}  {moment}  {format_size(point.stored):>10}  {column}{disks}")
    return [*lines, *(f"  {short(bad.id)}  DAMAGED: {bad.problem}" for bad in found.damaged)]


def short(identity: str) -> str:
    """The start of a long id, which is enough to name the point by."""
    return identity[:8] if len(identity) == _LONG else identity


if TYPE_CHECKING:
    from pullback.flows import listing as flow_listing
