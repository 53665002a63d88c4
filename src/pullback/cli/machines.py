"""pullback info, recover, untrack: a machine itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pullback.cli import options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback.flows import machines as flow
    from pullback.model.disks import Disk


async def _request(machine: str, name: str | None, state_dir: Path | None) -> flow.Request:
    from pullback import state
    from pullback.flows import machines as flow
    from pullback.model import urls

    return flow.Request(machine=urls.machine(machine), name=name, directories=state.directories(state_dir))


def info(
    machine: options.Machine,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show a machine's disks and checkpoints, and what its QEMU can do."""
    from pullback.flows import machines as flow

    output = Output(json, quiet, verbose)
    found = run(flow.info(run(_request(machine, name, state_dir), output)), output)
    values = {**found.facts, "disks": [_disk_document(disk) for disk in found.disks]}
    output.result("info", values, _lines(found))


def _disk_document(disk: Disk) -> dict[str, object]:
    from pullback.model import checkpoints

    chain = checkpoints.chain(disk.bitmaps)
    return {
        **asdict(disk),
        "bitmaps": [asdict(bitmap) for bitmap in disk.bitmaps],
        "checkpoints": [asdict(link.mark) | {"dirty": link.bitmap.count} for link in chain.links],
        "chain_problem": chain.problem,
    }


def _lines(found: flow.Info) -> list[str]:
    facts = found.facts
    lines = [f"{facts['machine']}: {facts['status']}, QEMU {facts['qemu']}"]
    for disk in found.disks:
        lines += _disk_lines(disk)
    return lines + _ability_lines(facts)


def _disk_lines(disk: Disk) -> list[str]:
    from pullback.model import checkpoints
    from pullback.units import format_size

    where = f"{disk.format} {disk.image}" if disk.node else "no medium"
    device = f", {disk.qdev}" if disk.qdev else ""
    thread = f", iothread {disk.iothread}" if disk.iothread else ""
    lines = [f"  {disk.target:<8} {format_size(disk.size):>10}  {disk.bus}{thread}{device}  {where}"]
    if disk.left_out:
        lines.append(f"           left out of backups, because {disk.left_out}")
    elif disk.node:
        lines.append(f"           {_tracking(disk)}")
    chain = checkpoints.chain(disk.bitmaps)
    for link in chain.links:
        lines.append(f"           checkpoint {link.mark.name}, {format_size(link.bitmap.count)} changed since")
    if chain.problem:
        lines.append(f"           its checkpoints are worthless: {chain.problem}")
    return lines


def _tracking(disk: Disk) -> str:
    """How what changes on a disk is known."""
    if disk.untrackable:
        return f"read whole each time, because {disk.untrackable}"
    if disk.transient:
        return f"tracked while this QEMU runs, because {disk.unlasting}"
    return "tracked in the image"


def _ability_lines(facts: object) -> list[str]:
    assert isinstance(facts, dict)
    lines = _engine_lines(facts["capabilities"]) if facts["capabilities"] else []
    lines += [f"  job      {job} ({kind}) runs" for job, kind in facts["jobs"].items()]
    lines += [f"  export   {export['id']} ({export['type']}) is there" for export in facts["exports"]]
    lines += [f"  cleared  what the dead job {job} had left" for job in facts["cleared"]]
    return lines


def _engine_lines(can: dict[str, Any]) -> list[str]:
    """What its QEMU can do and what its build does wrong; a machine that is off has none."""
    defects = can["defects"]
    lines = [
        f"  engine   {'filter: a failing copy breaks the snapshot, never the guest' if can['filter'] else 'classic'}"
    ]
    if defects["snapshot_reads_cross"]:
        lines.append("  note     this build answers some long reads of snapshots wrongly; Pullback reads those again")
    if defects["iothread_nbd_aborts"]:
        how = "they are read through FUSE" if can["fuse"] else "and it has no FUSE exports: they cannot be backed up"
        lines.append(f"  note     this build dies of NBD clients of disks in an iothread; {how}")
    if not defects["probed"]:
        lines.append("  note     the binary could not be probed, so the worst is assumed")
    return lines


def untrack(
    machine: options.Machine,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Remove every trace of Pullback from a machine: bitmaps, documents, and what dead jobs left."""
    from pullback.flows import machines as flow

    output = Output(json, quiet, verbose)
    done = run(flow.untrack(run(_request(machine, name, state_dir), output)), output)
    values: dict[str, object] = {
        "machine": done.machine,
        "bitmaps": {target: list(names) for target, names in done.bitmaps.items()},
        "checkpoints": list(done.documents),
        "jobs": list(done.jobs),
    }
    lines = [f"{target}: {len(names)} bitmap(s) removed" for target, names in done.bitmaps.items()]
    lines += [f"what was written down about checkpoint {name} is removed" for name in done.documents]
    lines += [f"what the dead job {job} had left is removed" for job in done.jobs]
    lines = lines or ["there was nothing to remove"]
    output.result("untrack", values, [] if quiet else lines)


def recover(
    machine: options.Machine,
    end: Annotated[
        bool, typer.Option("--end", help="End what lasts too: jobs are aborted, snapshots deleted, exports stopped.")
    ] = False,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what earlier commands left of a machine: dead jobs are cleared away, what lasts is listed."""
    from pullback.flows import machines as flow

    output = Output(json, quiet, verbose)
    found = run(flow.recover(run(_request(machine, name, state_dir), output), end=end), output)
    values: dict[str, object] = {
        "machine": found.machine,
        "running": found.running,
        "cleared": list(found.cleared),
        "adopted": [{"job": one.job, "kind": str(one.kind), "name": one.name} for one in found.adopted],
        "exports": list(found.exports),
        "ended": found.ended,
    }
    lines = [f"what the dead job {job} had left is removed" for job in found.cleared]
    if not found.running:
        lines.append(f"{found.machine} does not run any more")
    word = "ended" if found.ended else "lasts"
    lines += [f"{one.kind} {one.name} (job {one.job}) {word}" for one in found.adopted if one.kind != "export"]
    lines += [f"export {export} {word}" for export in found.exports]
    output.result("recover", values, [] if quiet else lines or ["there is nothing of ours"])
