"""pullback show: everything about a restore point."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback.flows import showing as flow
    from pullback.model.points import Point, PointDisk


def show(
    point: options.Point = "latest",
    repository: options.Repository = None,
    machine: options.MachineName = None,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show everything about a restore point, and how much it takes."""
    from pullback.flows import showing as flow

    output = Output(json, quiet, verbose)
    request = run(_request(point, repository, machine, config, state_dir), output)
    report = run(flow.show(request), output)
    output.result("show", _document(report), _lines(report))


async def _request(
    point: str, repository: str | None, machine: str | None, config: Path | None, state_dir: Path | None
) -> flow.Request:
    from pullback.flows import showing as flow

    chosen = configured.repository(repository, configured.load(config), state=state_dir)
    return flow.Request(repository=chosen.place, access=chosen.access, point=point, machine=machine)


def _document(report: flow.Report) -> dict[str, object]:
    from pullback.model import points

    usage = report.usage
    return {
        "point": points.document(report.point),
        "freed_if_forgotten": report.freed,
        "dependents": list(report.dependents),
        "chunks": None
        if usage is None
        else {
            "total": usage.chunks,
            "zero": usage.zero_chunks,
            "distinct": usage.distinct,
            "alone": usage.alone,
            "stored": usage.stored,
        },
    }


def _lines(report: flow.Report) -> list[str]:
    point = report.point
    lines = [f"{point.machine}: restore point {point.id}"]
    lines += [f"  {name + ':':<12} {value}" for name, value in _facts(point) if value]
    for disk in point.disks:
        lines += _disk_lines(disk)
    lines += _machine_lines(point)
    if point.notes:
        lines += ["  notes:", *(f"    {note}" for note in point.notes)]
    return [*lines, *_usage_lines(report)]


def _facts(point: Point) -> list[tuple[str, str | None]]:
    from pullback.units import format_duration, format_size

    return [
        ("made", f"{point.created.astimezone():%Y-%m-%d %H:%M:%S %z}"),
        ("on", point.host),
        ("took", None if point.seconds is None else format_duration(point.seconds)),
        ("level", str(point.level)),
        ("engine", f"{point.engine}; the machine stood still for {format_duration(point.pause)}"),
        ("with", f"Pullback {point.pullback}, QEMU {point.qemu}"),
        ("checkpoint", point.checkpoint),
        ("tags", ", ".join(point.tags)),
        ("size", f"{format_size(point.size)}; {format_size(point.read)} read, {format_size(point.stored)} stored"),
    ]


def _disk_lines(disk: PointDisk) -> list[str]:
    from pullback.units import format_size

    lines = [
        f"  {disk.target:<8} {format_size(disk.size):>10}  {disk.mode}, "
        f"{format_size(disk.read)} read, {format_size(disk.stored)} stored"
    ]
    if disk.parent is not None:
        lines.append(f"    on {disk.parent.point} {disk.parent.target}")
    if disk.reason is not None:
        lines.append(f"    read whole, because {disk.reason}")
    if disk.source is not None:
        lines.append(f"    from {disk.source} ({disk.source_format})")
    lines.append(f"    digest {disk.digest}, chunks of {format_size(disk.block_size)}")
    return lines


def _machine_lines(point: Point) -> list[str]:
    """How the machine was started, its firmware and its TPM."""
    import shlex

    from pullback.units import format_size

    lines = []
    if (found := point.description) is not None:
        words = [found.machine_type, f"uuid {found.uuid}" if found.uuid else None, found.program]
        lines.append(f"  {found.kind} {found.version}: {', '.join(word for word in words if word)}".rstrip(": "))
        lines += [f"    {shlex.join(found.argv)}"] if found.argv else []
        lines += [f"    {image.target} {image.path} ({image.format})" for image in found.images]
    for device in point.firmware:
        kind = "variables" if device.writable else "code"
        lines.append(f"  firmware {device.name}: {format_size(device.size)} of {kind}, SHA-256 {device.sha256}")
    if (tpm := point.tpm) is not None:
        sealed = ", encrypted with a key that is not in it" if tpm.encrypted else ""
        lines.append(f"  TPM {tpm.version}: {format_size(sum(file.size for file in tpm.files))} of state{sealed}")
    return lines


def _usage_lines(report: flow.Report) -> list[str]:
    from pullback.units import format_size

    freed = f"  {format_size(report.freed)} would be freed if it were forgotten alone"
    usage = report.usage
    if usage is None:
        others = len(report.dependents)
        return [f"  {others} later points build on it"] if others else [freed]
    data = usage.chunks - usage.zero_chunks
    ratio = f" ({report.point.size / usage.stored:.1f} times smaller than its disks)" if usage.stored else ""
    return [
        f"  {usage.chunks} chunks: {data} with data, {usage.zero_chunks} zero; {usage.distinct} different ones, "
        f"{usage.distinct - usage.alone} of them shared with other points",
        f"  {format_size(usage.stored)} in the repository{ratio}",
        freed,
    ]
