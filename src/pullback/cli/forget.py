"""pullback forget: restore points that are not needed any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pullback import errors
from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run
from pullback.model.retention import Keep

if TYPE_CHECKING:
    from pullback.flows import retention as flow

_MOST = 1_000_000


def _keep(kind: str, what: str) -> typer.models.OptionInfo:
    """An option of the rule."""
    found: typer.models.OptionInfo = typer.Option(f"--keep-{kind}", metavar="N", min=0, max=_MOST, help=what)
    return found


def forget(
    points: options.Points = None,
    repository: options.Repository = None,
    machine: options.MachineName = None,
    keep_last: Annotated[int, _keep("last", "Keep the newest N.")] = 0,
    keep_hourly: Annotated[int, _keep("hourly", "Keep the newest of each hour, of the last N that have one.")] = 0,
    keep_daily: Annotated[int, _keep("daily", "The same for days (UTC).")] = 0,
    keep_weekly: Annotated[int, _keep("weekly", "The same for weeks.")] = 0,
    keep_monthly: Annotated[int, _keep("monthly", "The same for months.")] = 0,
    keep_yearly: Annotated[int, _keep("yearly", "The same for years.")] = 0,
    keep_tag: Annotated[
        list[str] | None,
        typer.Option("--keep-tag", metavar="WORD", help="Keep those with this tag, besides. May be repeated."),
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove the data that nothing needs any more, too.")] = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Forget restore points: those that a rule does not keep, for each machine, or those that are named."""
    from pullback.flows import retention as flow

    output = Output(json, quiet, verbose)
    keep = Keep(
        last=keep_last,
        hourly=keep_hourly,
        daily=keep_daily,
        weekly=keep_weekly,
        monthly=keep_monthly,
        yearly=keep_yearly,
    )

    async def request() -> flow.Request:
        chosen = configured.repository(repository, configured.load(config), state=state_dir)
        if points and (keep or keep_tag):
            raise errors.UsageError(problem="Points are named, and a rule is given: one must go")
        rule = keep or (chosen.configured.keep if chosen.configured and not points else keep)
        return flow.Request(
            repository=chosen.place,
            access=chosen.access,
            machine=machine,
            points=tuple(points or ()),
            keep=rule,
            keep_tags=tuple(keep_tag or ()),
            prune=prune,
            dry_run=dry_run,
        )

    wanted = run(request(), output)
    with output.progress() as progress:
        report = run(flow.forget(wanted, progress), output)
    output.result("forget", _document(report), [] if quiet else _lines(report))


def _document(report: flow.Report) -> dict[str, object]:
    return {
        "dry_run": report.dry_run,
        "machines": [
            {
                "machine": group.machine or None,
                "kept": [_judged(point) for point in group.kept],
                "removed": [_judged(point) for point in group.removed],
            }
            for group in report.groups
        ],
        "pruned": report.pruned,
        "freed": report.freed,
        "notes": list(report.notes),
    }


def _judged(point: flow.Judged) -> dict[str, object]:
    created = point.created.isoformat() if point.created else None
    return {"id": point.id, "created": created, "reasons": list(point.reasons)}


def _lines(report: flow.Report) -> list[str]:
    from pullback.units import format_size

    lines = []
    for group in report.groups:
        lines.append(f"{group.machine or 'damaged snapshots'}:")
        words = [*((point, "keep  ") for point in group.kept), *((point, "remove") for point in group.removed)]
        words.sort(key=lambda pair: (pair[0].created.timestamp() if pair[0].created else 0.0, pair[0].id))
        for point, word in words:
            moment = f"{point.created.astimezone():%Y-%m-%d %H:%M:%S}" if point.created else "?" * 19
            lines.append(f"  {word}  {point.id[:8]}  {moment}  {', '.join(point.reasons)}")
    removed = len(report.removed)
    if report.dry_run:
        freed = f", about {format_size(report.freed)} freed" if report.freed is not None else ""
        return [*lines, f"nothing was done; {removed} would be removed{freed}"]
    freed = f", {format_size(report.freed)} freed" if report.freed is not None else ""
    rest = "" if report.pruned or not removed else "; their data stays until --prune"
    return [*lines, f"{removed} removed{freed}{rest}"]
