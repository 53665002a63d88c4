"""pullback rollback: a machine's own disks, back to a restore point."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run
from pullback.model import urls
from pullback.model.rollbacks import After

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pullback.flows import rollback as flow


_Machine = Annotated[
    str,
    typer.Argument(
        metavar="MACHINE",
        help="A QEMU process, by its QMP socket (qmp:/run/web01.sock), a machine that is off, by its images "
        "(images:vda=/srv/a.qcow2,vdb=raw:/srv/b.raw), or a configured name.",
    ),
]
_After = Annotated[
    After | None,
    typer.Option(
        "--after", help="What becomes of the machine: it runs, is held, or ends. Without it, it runs if it ran before."
    ),
]
_NoSafety = Annotated[bool, typer.Option("--no-safety", help="Make no restore point of the machine as it is now.")]
_Abandon = Annotated[
    bool,
    typer.Option(
        "--abandon",
        help="Forget a rollback that was interrupted: its disks stay half rolled back, and are no use as they are.",
    ),
]
_Staging = Annotated[
    Path | None,
    typer.Option(
        "--staging",
        metavar="DIR",
        help="Where what is to be written is kept first; on a local file system (default: the state directory).",
    ),
]


def rollback(
    machine: _Machine,
    point: options.Point = "latest",
    repository: options.Repository = None,
    disk: options.Disks = None,
    after: _After = None,
    no_safety: _NoSafety = False,
    dry_run: options.DryRun = False,
    abandon: _Abandon = False,
    staging: _Staging = None,
    name: options.Name = None,
    limit_rate: options.LimitRate = None,
    scratch: options.Scratch = None,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Roll a machine's own disks back to a restore point: it is reset, and only what differs is written."""
    output = Output(json, quiet, verbose)
    wish = _Wish(
        machine=machine,
        repository=repository,
        point=point,
        disks=tuple(disk or ()),
        after=after,
        safety=not no_safety,
        staging=staging,
        name=name,
        limit_rate=limit_rate,
        scratch=scratch,
        config=config,
        state_dir=state_dir,
    )
    request = run(_request(wish), output)
    if abandon:
        _abandon(request, output)
    elif dry_run:
        _dry_run(request, output)
    else:
        _rollback(request, output)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """The command line, as it stands."""

    machine: str
    repository: str | None
    point: str
    disks: tuple[str, ...]
    after: After | None
    safety: bool
    staging: Path | None
    name: str | None
    limit_rate: str | None
    scratch: Path | None
    config: Path | None
    state_dir: Path | None


async def _request(wish: _Wish) -> flow.Request:
    from pullback import state, units
    from pullback.flows import rollback as flow

    known = configured.load(wish.config)
    place, of = configured.machine(wish.machine, known)
    named = (wish.repository,) if wish.repository is not None else ()
    chosen = configured.repositories(named, of, known, state=wish.state_dir)[0]
    scratch = wish.scratch.absolute() if wish.scratch else (of.scratch if of else None)
    return flow.Request(
        machine=place,
        repository=chosen.place,
        access=chosen.access,
        point=wish.point,
        only=wish.disks,
        name=wish.name or (of.identity if of else None),
        after=wish.after,
        safety=wish.safety,
        staging=wish.staging.absolute() if wish.staging else None,
        scratch=scratch,
        rate=units.parse_size(wish.limit_rate) if wish.limit_rate else None,
        directories=state.directories(wish.state_dir),
    )


def _rollback(request: flow.Request, output: Output) -> None:
    from pullback.cli import allocator
    from pullback.flows import rollback as flow

    allocator.keep()
    with output.progress() as progress:
        report = run(flow.rollback(request, progress), output)
    off = isinstance(request.machine, urls.ImagesMachine)
    output.result("rollback", _values(report), [] if output.quiet else list(_lines(report, off=off)))


def _values(report: flow.Report) -> dict[str, object]:
    return {
        "dry_run": False,
        "machine": report.machine,
        "point": report.point,
        "created": report.created.isoformat() if report.created else None,
        "safety": report.safety.id if report.safety else None,
        "finished": report.finished,
        "after": str(report.after),
        "down_seconds": round(report.down, 3),
        "seconds": round(report.seconds, 3),
        "disks": [
            {
                "target": disk.target,
                "size": disk.size,
                "by_bitmaps": disk.by_bitmaps,
                "reason": disk.reason,
                "changed": disk.changed,
                "written": disk.data,
                "zeroed": disk.zeroes,
            }
            for disk in report.disks
        ],
        "notes": list(report.notes),
    }


def _lines(report: flow.Report, *, off: bool) -> Iterator[str]:
    from pullback.units import format_duration, format_size

    yield f"{report.machine}: rolled back to {report.point}{', which had been interrupted' if report.finished else ''}"
    for disk in report.disks:
        how = "" if disk.by_bitmaps else f"  (compared whole: {disk.reason})"
        written = f"{format_size(disk.data)} written, {format_size(disk.zeroes)} zeroed"
        yield f"  {disk.target:<8} {written} of {format_size(disk.size)}{how}"
    if report.safety is not None:
        yield f"  as it was before: restore point {report.safety.id}"
    ends = {After.RUN: "it runs again, from its beginning", After.HELD: "it is held", After.QUIT: "it has ended"}
    end = "it was off" if off else ends[report.after]
    yield f"  {end}; its disks were ours for {format_duration(report.down)}, {format_duration(report.seconds)} in all"


def _dry_run(request: flow.Request, output: Output) -> None:
    from pullback.flows import rollback as flow
    from pullback.units import format_size

    preview = run(flow.preview(request), output)
    disks = [
        {
            "target": disk.target,
            "size": disk.size,
            "by_bitmaps": disk.by_bitmaps,
            "reason": disk.reason,
            "bytes": disk.bytes,
            "written_since": disk.since,
        }
        for disk in preview.disks
    ]
    lines = [f"{preview.machine}: nothing was done; a rollback to {preview.point.id} now would write at most"]
    for disk in preview.disks:
        if disk.by_bitmaps:
            how = f"known by hashes and bitmaps; {format_size(disk.since)} was written since the newest point"
            lines.append(f"  {disk.target:<8} {format_size(disk.bytes)} of {format_size(disk.size)}  ({how})")
        else:
            lines.append(f"  {disk.target:<8} what differs, found by reading it whole, because {disk.reason}")
    values: dict[str, object] = {
        "dry_run": True,
        "machine": preview.machine,
        "point": preview.point.id,
        "disks": disks,
    }
    output.result("rollback", values, lines)


def _abandon(request: flow.Request, output: Output) -> None:
    from pullback.flows import rollback as flow

    journal = run(flow.abandon(request), output)
    targets = [disk.target for disk in journal.disks]
    values: dict[str, object] = {
        "dry_run": False,
        "abandoned": True,
        "machine": journal.machine,
        "point": journal.point,
        "targets": targets,
    }
    lines = [f"{journal.machine}: the rollback to {journal.point} is forgotten; {', '.join(targets)}: half rolled back"]
    output.result("rollback", values, [] if output.quiet else lines)
