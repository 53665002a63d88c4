"""pullback snapshot …: frozen views of disks that last until they are deleted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import lasting, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback import state
    from pullback.flows.opening import Opened
    from pullback.model.documents.checkpoint import CheckpointDocument
    from pullback.model.documents.snapshot import SnapshotDocument
    from pullback.model.exports import Served
    from pullback.model.snapshots import OpenSnapshot, SnapshotDisk

app = typer.Typer(
    help="Snapshots: frozen views of disks, to be read over NBD (`export`) until they are deleted.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_Snapshot = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="The snapshot's name.")]


# -- create ----------------------------------------------------------------------------------


@app.command("create")
def create(
    machine: options.Machine,
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="A domainblocksnapshot, as XML or JSON; '-' is standard input."),
    ] = None,
    new_name: Annotated[
        str | None,
        typer.Option("--as", metavar="SNAPSHOT", help="The snapshot's name; without it, that of its checkpoint."),
    ] = None,
    disk: options.Disks = None,
    with_checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="CHECKPOINT", help="Make a checkpoint of this name in the same instant."),
    ] = None,
    checkpoint_file: Annotated[
        str | None,
        typer.Option("--checkpoint-file", metavar="FILE", help="Make this domaincheckpoint (XML or JSON) with it."),
    ] = None,
    name: options.Name = None,
    scratch: options.Scratch = None,
    engine: options.Engine = None,
    quiesce: options.Quiesces = None,
    agent: options.Agent = None,
    mount_point: options.MountPoints = None,
    owner: options.Owner = None,
    wait: options.Wait = False,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Freeze disks at one instant, until the snapshot is deleted or the machine ends. The guest goes on.

    Of a machine that is off, and with --wait, the command stays, and the snapshot ends with it.
    """
    from pullback.flows import snapshots as flow
    from pullback.flows import staying

    output = Output(json, quiet, verbose)
    tracked = with_checkpoint is not None or checkpoint_file is not None
    place = run(lasting.at(machine, name, state_dir, "snapshot create", anonymous=not tracked), output)
    how = run(lasting.how(scratch, engine, quiesce, agent, mount_point, owner, wait=wait), output)
    wish = run(_wish(file, new_name, disk or []), output)
    checkpoint = run(_checkpoint(with_checkpoint, checkpoint_file), output) if tracked else None

    async def begin(opened: Opened, places: state.Directories) -> OpenSnapshot:
        return await flow.create(opened, places, wish, checkpoint, how=how, name=new_name)

    def told(made: OpenSnapshot) -> None:
        notes = [made.window.frozen_note] if made.window.frozen_note else []
        for note in notes:
            output.note(note)
        values: dict[str, object] = {"machine": made.machine, "snapshot": _values(made), "notes": notes}
        output.result("snapshot create", values, [] if quiet else _lines(made))

    lasting.stay(place, staying.a_snapshot(place, begin), output, told=told, wait=wait)


async def _wish(file: str | None, name: str | None, disks: Sequence[str]) -> SnapshotDocument | None:
    """The document that a file and the options ask for; options win. None: all disks."""
    from pullback.cli import inputs
    from pullback.model.documents import snapshot as documents
    from pullback.model.xml import snapshot as xml

    wish = None
    if file is not None:
        wish = inputs.document(file, documents.ROOT, xml=xml.parse, values=documents.from_dict)
    if disks:
        kept = {part.name: part for part in wish.disks} if wish else {}
        chosen = tuple(kept.get(target, documents.SnapshotDisk(name=target)) for target in disks)
        wish = documents.SnapshotDocument(name=wish.name if wish else None, disks=chosen)
    if wish is None:
        return None
    # Through the rules, as a file's text was.
    return documents.from_dict({**documents.to_dict(wish), "name": name or wish.name})


async def _checkpoint(name: str | None, file: str | None) -> CheckpointDocument:
    from pullback.cli import inputs
    from pullback.model.documents import checkpoint as documents
    from pullback.model.xml import checkpoint as xml

    wish = documents.CheckpointDocument()
    if file is not None:
        wish = inputs.document(file, documents.ROOT, xml=xml.parse, values=documents.from_dict)
    return documents.from_dict(documents.to_dict(replace(wish, name=name or wish.name)))


# -- looking ---------------------------------------------------------------------------------


def _values(snapshot: OpenSnapshot) -> dict[str, object]:
    window = snapshot.window
    return {
        "name": snapshot.name,
        "job": snapshot.job,
        "created": snapshot.moment.isoformat(),
        "checkpoint": snapshot.checkpoint,
        "owner": int(snapshot.owner.partition(":")[0]) if snapshot.owner else None,
        "pause_seconds": round(window.seconds, 6),
        "frozen_file_systems": window.frozen,
        "frozen_seconds": round(window.frozen_seconds, 6),
        "disks": [_disk_values(disk) for disk in snapshot.disks],
    }


def _disk_values(disk: SnapshotDisk) -> dict[str, object]:
    return {
        "target": disk.target,
        "size": disk.size,
        "engine": disk.fleecing.value if disk.fleecing else None,
        "reason": disk.reason,
        "scratch": disk.scratch,
        "checkpoint": disk.checkpoint.name if disk.checkpoint else None,
    }


def _lines(snapshot: OpenSnapshot) -> list[str]:
    from pullback.units import format_duration, format_size

    checkpoint = f", with checkpoint {snapshot.checkpoint}" if snapshot.checkpoint else ""
    owner = f", until process {snapshot.owner.partition(':')[0]} ends" if snapshot.owner else ""
    lines = [f"{snapshot.name}: of {lasting.moment(snapshot.moment)}{checkpoint}{owner}"]
    if snapshot.window.seconds:
        lines.append(f"  the machine stood still for {format_duration(snapshot.window.seconds)}")
    for disk in snapshot.disks:
        engine = f"{disk.fleecing} engine" if disk.fleecing else "as it is"
        lines.append(f"  {disk.target:<8} {format_size(disk.size):>10}  {engine}: {disk.reason}")
    return lines


@app.command("list")
def listing(
    machine: options.Machine,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the snapshots of a machine, oldest first. Those of jobs are shown by `job info`."""
    from pullback.flows import snapshots as flow

    output = Output(json, quiet, verbose)
    place = run(lasting.at(machine, name, state_dir, "snapshot list"), output)

    async def work(opened: Opened, _: state.Directories) -> tuple[str, tuple[OpenSnapshot, ...]]:
        return opened.name, await flow.listing(opened)

    machine_name, found = run(place.do(work), output)
    values: dict[str, object] = {"machine": machine_name, "snapshots": [_values(snapshot) for snapshot in found]}
    lines = [line for snapshot in found for line in _lines(snapshot)]
    output.result("snapshot list", values, lines or [f"{machine_name}: no snapshots"])


@app.command("info")
def info(
    machine: options.Machine,
    snapshot: _Snapshot,
    as_xml: options.AsXml = False,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show one snapshot, and where it is served."""
    from pullback.flows import snapshots as flow

    output = Output(json, quiet, verbose)
    place = run(lasting.at(machine, name, state_dir, "snapshot info"), output)

    async def work(opened: Opened, _: state.Directories) -> tuple[OpenSnapshot, tuple[Served, ...]]:
        found = await flow.find(opened, snapshot)
        return found, tuple(served for served in await opened.served() if served.job == found.job)

    found, served = run(place.do(work), output)
    document, xml = run(_document(found), output)
    values: dict[str, object] = {
        "machine": found.machine,
        "snapshot": _values(found),
        "exports": [lasting.export_values(one) for one in served],
        "document": document,
    }
    lines = xml.rstrip("\n").split("\n") if as_xml else [*_lines(found), *lasting.export_lines(served)]
    output.result("snapshot info", values, lines)


async def _document(snapshot: OpenSnapshot) -> tuple[dict[str, object], str]:
    """Its `domainblocksnapshot`, as JSON and as XML."""
    from pullback.model.documents import snapshot as documents
    from pullback.model.xml import snapshot as xml

    disks = tuple(documents.SnapshotDisk(name=disk.target, fleece=disk.scratch) for disk in snapshot.disks)
    document = documents.SnapshotDocument(name=snapshot.name, disks=disks)
    return documents.to_dict(document), xml.serialise(document)


# -- delete ----------------------------------------------------------------------------------


@app.command("delete")
def delete(
    machine: options.Machine,
    snapshot: _Snapshot,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Let go of a snapshot, its exports (also under clients) and its scratch. Its checkpoint stays."""
    from pullback.flows import snapshots as flow

    output = Output(json, quiet, verbose)
    place = run(lasting.at(machine, name, state_dir, "snapshot delete"), output)

    async def work(opened: Opened, _: state.Directories) -> OpenSnapshot:
        return await flow.delete(opened, snapshot)

    gone = run(place.do(work), output)
    values: dict[str, object] = {"machine": gone.machine, "deleted": gone.name, "checkpoint": gone.checkpoint}
    kept = f"; its checkpoint {gone.checkpoint} stays" if gone.checkpoint else ""
    output.result("snapshot delete", values, [] if quiet else [f"snapshot {gone.name} is deleted{kept}"])
