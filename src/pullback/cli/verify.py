"""pullback verify: is what is stored what was written, and does a machine tell the truth about its changes?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback import errors
from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.points import short
from pullback.cli.running import run
from pullback.errors import Exit

if TYPE_CHECKING:
    from pullback import extents
    from pullback.flows import auditing
    from pullback.flows import verify as flow_verify

#: Ranges of a disk that people are shown.
_SHOWN = 5


def verify(
    repository: options.Repository = None,
    point: options.Point = "latest",
    everything: Annotated[bool, typer.Option("--all", help="All restore points.")] = False,
    read_data: Annotated[
        bool,
        typer.Option(
            "--read-data", help="Read and prove all data, not only what leads to it. A dir: repository is always read."
        ),
    ] = False,
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample",
            metavar="PART",
            help="Read a random part of the data: 5%, 10G, or so many packs (with --against: blocks).",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MACHINE",
            help="Read blocks of this machine that are said to be unchanged since the point, and compare them.",
        ),
    ] = None,
    disk: options.Disks = None,
    machine: options.MachineName = None,
    name: options.Name = None,
    limit_rate: options.LimitRate = None,
    scratch: options.Scratch = None,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Look for damage in a repository, and tell which machines, disks and ranges it touches."""
    output = Output(json, quiet, verbose)
    wish = _Wish(
        repository=repository,
        point=point,
        everything=everything,
        read_data=read_data,
        sample=sample,
        against=against,
        only=tuple(disk or ()),
        machine=machine,
        name=name,
        limit_rate=limit_rate,
        scratch=scratch,
        config=config,
        state_dir=state_dir,
    )
    if against is not None:
        _audit(run(_audit_request(wish), output), output)
    else:
        _verify(run(_request(wish), output), output)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """The command line."""

    repository: str | None
    point: str
    everything: bool
    read_data: bool
    sample: str | None
    against: str | None
    only: tuple[str, ...]
    machine: str | None
    name: str | None
    limit_rate: str | None
    scratch: Path | None
    config: Path | None
    state_dir: Path | None


async def _request(wish: _Wish) -> flow_verify.Request:
    from pullback import units
    from pullback.flows import verify as flow

    chosen = configured.repository(wish.repository, configured.load(wish.config), state=wish.state_dir)
    return flow.Request(
        repository=chosen.place,
        access=chosen.access,
        point=wish.point,
        machine=wish.machine,
        only=wish.only,
        all=wish.everything,
        read_data=wish.read_data,
        sample=wish.sample,
        rate=units.parse_size(wish.limit_rate) if wish.limit_rate else None,
    )


def _verify(request: flow_verify.Request, output: Output) -> None:
    from pullback.flows import verify as flow

    with output.progress() as progress:
        report = run(flow.verify(request, progress), output)
    output.result("verify", _document(report), [] if output.quiet else _lines(report))
    if not report.clean:
        output.hint(_hint(report))
        raise SystemExit(int(Exit.VERIFICATION))


def _hint(report: flow_verify.Report) -> str:
    if not report.files:
        return "`pullback verify --all` shows which points are sound; `pullback backup --level full` starts afresh"
    return (
        "the next backup from here stores again what the live disks still hold of it; afterwards `restic repair "
        "packs` (or `rebuild-index`, for index files) takes bad files out of the repository"
    )


def _document(report: flow_verify.Report) -> dict[str, object]:
    return {
        "seconds": round(report.seconds, 3),
        "damaged": len(report.damaged),
        "disks": [
            {
                "machine": found.machine,
                "point": found.point,
                "target": found.target,
                "read": found.read,
                "problem": found.problem,
                "ranges": _ranges(found.ranges),
                "more_ranges": found.more,
            }
            for found in report.verdicts
        ],
        "files": [
            {"file": bad.file, "problem": bad.problem, "lost": bad.lost, "spared": bad.spared} for bad in report.files
        ],
        "notes": list(report.notes),
        "packs_read": report.packs,
        "bytes_read": report.pack_bytes,
    }


def _ranges(found: Sequence[extents.Extent]) -> list[dict[str, int]]:
    return [{"start": extent.start, "length": extent.length} for extent in found]


def _lines(report: flow_verify.Report) -> list[str]:
    from pullback.units import format_duration, format_size

    lines = []
    for found in report.verdicts:
        where = f"{found.machine} {short(found.point)} {found.target:<6} "
        if found.problem is not None:
            lines.append(f"{where}DAMAGED: {found.problem}")
            lines += _range_lines(found.ranges, found.more)
        elif report.read_data and not report.sampled:
            lines.append(f"{where}sound, {format_size(found.read)} read")
        else:
            lines.append(f"{where}nothing wrong found")
    for bad in report.files:
        blobs = f" ({bad.lost} blobs lost, {bad.spared} have another copy)" if bad.lost + bad.spared else ""
        lines.append(f"BAD FILE {bad.file}: {bad.problem}{blobs}")
    lines += report.notes
    read = f"{report.packs} packs, {format_size(report.pack_bytes)} read; " if report.packs else ""
    bad_files = f", {len(report.files)} bad files" if report.files else ""
    unread = "" if report.read_data else " (the data itself was not read: --read-data)"
    lines.append(f"{len(report.damaged)} damaged{bad_files}{unread}; {read}{format_duration(report.seconds)} in all")
    return lines


def _range_lines(found: Sequence[extents.Extent], more: int) -> list[str]:
    lines = [f"    bytes {extent.start} to {extent.end - 1}" for extent in found[:_SHOWN]]
    rest = len(found) - len(found[:_SHOWN]) + more
    return [*lines, *([f"    and {rest} more ranges"] if rest else [])]


# -- against a machine -------------------------------------------------------------------------


async def _audit_request(wish: _Wish) -> auditing.Request:
    from pullback import state
    from pullback.flows import auditing

    if wish.limit_rate:
        raise errors.UsageError(problem="--limit-rate is for the data of a repository; --against reads a machine")
    known = configured.load(wish.config)
    chosen = configured.repository(wish.repository, known, state=wish.state_dir)
    place, of = configured.machine(wish.against or "", known)
    scratch = wish.scratch or (of.scratch if of else None)
    return auditing.Request(
        machine=place,
        repository=chosen.place,
        access=chosen.access,
        point=wish.point,
        only=wish.only,
        sample=wish.sample,
        name=wish.name or (of.identity if of else None),
        scratch=scratch.absolute() if scratch else None,
        directories=state.directories(wish.state_dir),
    )


def _audit(request: auditing.Request, output: Output) -> None:
    from pullback.flows import auditing

    with output.progress() as progress:
        report = run(auditing.audit(request, progress), output)
    output.result("verify", _audit_document(report), [] if output.quiet else _audit_lines(report))
    if report.lies:
        output.hint("tracking missed writes: do not trust increments of these disks; `pullback backup --level full`")
        raise SystemExit(int(Exit.VERIFICATION))


def _audit_document(report: auditing.Report) -> dict[str, object]:
    return {
        "against": report.machine,
        "seconds": round(report.seconds, 3),
        "disks": [
            {
                "target": disk.target,
                "point": disk.point,
                "reason": disk.reason,
                "size": disk.size,
                "changed": disk.changed,
                "compared": disk.compared,
                "differing": disk.differing,
                "noticed": disk.noticed,
                "ranges": _ranges(disk.ranges),
                "more_ranges": disk.more,
            }
            for disk in report.disks
        ],
    }


def _audit_lines(report: auditing.Report) -> list[str]:
    from pullback.units import format_duration, format_size

    lines = []
    for disk in report.disks:
        where = f"{report.machine} {disk.target:<6} "
        if disk.point is None:
            lines.append(f"{where}not compared: {disk.reason}")
            continue
        compared = f"{format_size(disk.compared)} of {format_size(disk.size)} compared with {short(disk.point)}"
        if disk.differing:
            lines.append(f"{where}LIES: {format_size(disk.differing)} changed without a trace; {compared}")
            lines += _range_lines(disk.ranges, disk.more)
        else:
            lines.append(f"{where}tells the truth; {compared}, {format_size(disk.changed)} known to have changed")
        if disk.noticed:
            lines.append(f"    {format_size(disk.noticed)} became holes, which a backup looks at by itself")
    lines.append(f"{format_duration(report.seconds)} in all")
    return lines
