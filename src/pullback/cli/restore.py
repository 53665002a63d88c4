"""pullback restore: disks of a restore point, written to files, devices or NBD servers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pullback.flows import restore as flow
    from pullback.flows.destinations import Place
    from pullback.flows.restore import Format


def restore(
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="DIR",
            help="Directory for the disks (DIR/vda.raw …). Or TARGET=PLACE, repeated for several disks: a file "
            "(vda=/srv/a.qcow2), a block device (vda=/dev/vg/web01), an NBD server (vda=nbd://host/export). "
            "Of a single disk, a device or server alone is enough.",
        ),
    ],
    repository: options.Repository = None,
    point: options.Point = "latest",
    disk: options.Disks = None,
    format: Annotated[
        str, typer.Option(metavar="raw|qcow2", help="What files are written as whose name does not say it.")
    ] = "raw",
    machine: options.MachineName = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there, and block devices.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="At the end, read back what was written, and compare it.")
    ] = False,
    parallel: options.Parallel = None,
    limit_rate: options.LimitRate = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write the disks of a restore point to files, devices or servers, each byte proven while it is written."""
    from pullback.flows import restore as flow

    output = Output(json, quiet, verbose)
    wish = _Wish(repository, to, point, disk or [], format, machine, force, check, parallel, limit_rate)
    request = run(_request(wish), output)
    with output.progress() as progress:
        report = run(flow.restore(request, progress), output)
    output.result("restore", _values(report), [] if quiet else _lines(report))


def _values(report: flow.Report) -> dict[str, object]:
    return {
        "point": report.point.id,
        "machine": report.point.machine,
        "created": report.point.created.isoformat(),
        "seconds": round(report.seconds, 3),
        "disks": [
            {
                "target": done.target,
                "path": done.place,
                "format": str(done.format),
                "size": done.size,
                "read": done.read,
                "digest": done.digest,
                "checked": done.checked,
            }
            for done in report.disks
        ],
    }


def _lines(report: flow.Report) -> list[str]:
    from pullback.units import format_duration, format_size

    lines = [f"{report.point.machine}: restored {report.point.id}"]
    for done in report.disks:
        lines.append(f"  {done.place}  {format_size(done.size)}, proven{', read back' if done.checked else ''}")
    return [*lines, f"  {format_duration(report.seconds)} in all"]


@dataclass(frozen=True, slots=True)
class _Wish:
    """The command line, as it stands."""

    repository: str | None
    to: list[str]
    point: str
    disks: list[str]
    format: str
    machine: str | None
    force: bool
    check: bool
    parallel: int | None
    limit_rate: str | None


async def _request(wish: _Wish) -> flow.Request:
    from pullback import units
    from pullback.flows import restore as flow

    chosen = configured.repository(wish.repository, configured.load(None))
    return flow.Request(
        repository=chosen.place,
        access=chosen.access,
        to=_to(wish),
        point=wish.point,
        machine=wish.machine,
        only=tuple(wish.disks),
        format=_format(wish.format),
        force=wish.force,
        check=wish.check,
        parallel=wish.parallel or flow.PARALLEL,
        rate=units.parse_size(wish.limit_rate) if wish.limit_rate else None,
    )


def _to(wish: _Wish) -> Path | Place | Mapping[str, Place]:
    """A directory, the place of the only disk, or places by target."""
    from pullback import errors
    from pullback.flows import destinations

    named = [destinations.targeted(text) for text in wish.to]
    places = dict(one for one in named if one is not None)
    if not places and len(wish.to) == 1:
        [text] = wish.to
        return destinations.parse(text) if destinations.names_itself(text) else Path(text).absolute()
    if len(places) != len(wish.to):
        raise errors.UsageError(
            problem="--to is one directory, or one place, or TARGET=PLACE for each disk, each target once"
        )
    if wish.disks:
        raise errors.UsageError(problem="--to with TARGET=PLACE says already which disks are meant; leave --disk out")
    return places


def _format(text: str) -> Format:
    from pullback import errors
    from pullback.flows.restore import Format

    try:
        return Format(text)
    except ValueError as error:
        raise errors.UsageError(
            problem=f"{text!r} is no format that a disk can be written as; there are raw and qcow2"
        ) from error
