"""pullback diff: what differs between two restore points."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.points import short
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback.flows import diff as flow

#: Ranges of a disk that people are shown.
_SHOWN = 20


def diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A restore point, as POINT elsewhere.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Another one of the same machine.")] = "latest",
    repository: options.Repository = None,
    disk: options.Disks = None,
    machine: options.MachineName = None,
    quick: Annotated[bool, typer.Option("--quick", help="By hashes alone: whole chunks, and no data is read.")] = False,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Tell which ranges of which disks differ between two restore points."""
    from dataclasses import replace

    from pullback.flows import diff as flow

    output = Output(json, quiet, verbose)
    request = run(_request(repository, config, state_dir), output)
    request = replace(request, old=old, new=new, machine=machine, only=tuple(disk or ()), quick=quick)
    with output.progress() as progress:
        report = run(flow.diff(request, progress), output)
    output.result("diff", _document(report), [] if quiet else _lines(report))


async def _request(repository: str | None, config: Path | None, state_dir: Path | None) -> flow.Request:
    from pullback.flows import diff as flow

    chosen = configured.repository(repository, configured.load(config), state=state_dir)
    return flow.Request(repository=chosen.place, access=chosen.access, old="")


def _document(report: flow.Report) -> dict[str, object]:
    return {
        "machine": report.old.machine,
        "old": report.old.id,
        "new": report.new.id,
        "grain": report.grain,
        "seconds": round(report.seconds, 3),
        "disks": [
            {
                "target": disk.target,
                "old_size": disk.old_size,
                "new_size": disk.new_size,
                "changed": disk.changed,
                "ranges": [{"start": extent.start, "length": extent.length} for extent in disk.ranges],
                "more_ranges": disk.more,
            }
            for disk in report.disks
        ],
    }


def _lines(report: flow.Report) -> list[str]:
    from pullback.units import format_size

    lines = [f"{report.old.machine}: {short(report.old.id)} to {short(report.new.id)}"]
    for disk in report.disks:
        lines.append(f"  {disk.target:<8} {_summary(disk)}")
        lines += [
            f"    bytes {extent.start} to {extent.end - 1} ({format_size(extent.length)})"
            for extent in disk.ranges[:_SHOWN]
        ]
        if rest := len(disk.ranges) - len(disk.ranges[:_SHOWN]) + disk.more:
            lines.append(f"    and {rest} more ranges (all with --json)")
    return lines


def _summary(disk: flow.DiskDiff) -> str:
    from pullback.units import format_size

    if disk.old_size is None:
        return f"added ({format_size(disk.new_size or 0)})"
    if disk.new_size is None:
        return f"removed ({format_size(disk.old_size)})"
    sizes = ""
    if disk.old_size != disk.new_size:
        sizes = f", resized from {format_size(disk.old_size)} to {format_size(disk.new_size)}"
    if not disk.changed:
        return f"nothing changed{sizes}"
    return f"{format_size(disk.changed)} changed in {len(disk.ranges) + disk.more} ranges{sizes}"
