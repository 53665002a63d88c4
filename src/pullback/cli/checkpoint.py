"""pullback checkpoint …: named moments since which changes are tracked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pullback import errors
from pullback.cli import options
from pullback.cli.output import Output
from pullback.cli.running import run
from pullback.model.backups import Quiesce

if TYPE_CHECKING:
    from pullback.flows import checkpoints as flow
    from pullback.flows.opening import Work
    from pullback.model.documents.checkpoint import CheckpointDocument
    from pullback.model.tree import Checkpoint, CheckpointDisk, Tree

T = TypeVar("T")

app = typer.Typer(
    help="Checkpoints: named moments of a machine since which changes are tracked.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="The checkpoint's name.")]


async def _opened(machine: str, name: str | None, state_dir: Path | None, command: str, work: Work[T]) -> T:
    """Run `work` with the machine open."""
    from pullback import state
    from pullback.flows.opening import on_machine
    from pullback.model import urls

    url = urls.machine(machine)
    return await on_machine(url, state.directories(state_dir), work, command=f"checkpoint {command}", name=name)


async def _given(file: str) -> CheckpointDocument:
    """The document in a file."""
    from pullback.cli import inputs
    from pullback.model.documents import checkpoint as documents
    from pullback.model.xml import checkpoint as xml

    return inputs.document(file, documents.ROOT, xml=xml.parse, values=documents.from_dict)


def _notes(output: Output, notes: Iterable[str]) -> list[str]:
    told = list(notes)
    for note in told:
        output.note(note)
    return told


# -- create ----------------------------------------------------------------------------------


@app.command("create")
def create(
    machine: options.Machine,
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="A domaincheckpoint, as XML or JSON; '-' is standard input."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option("--as", metavar="CHECKPOINT", help="The new checkpoint's name; without it, the time in seconds."),
    ] = None,
    description: Annotated[str | None, typer.Option(metavar="TEXT", help="What it is for.")] = None,
    disk: options.Disks = None,
    name: options.Name = None,
    quiesce: options.Quiesces = None,
    agent: options.Agent = None,
    mount_point: options.MountPoints = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Make a checkpoint: from this instant on changes are tracked, on all disks that can be."""
    from pullback.flows import checkpoints as flow

    output = Output(json, quiet, verbose)
    quiescing = options.quiescing(quiesce or Quiesce.NO, agent, mount_point)

    wish = run(_wish(file, checkpoint, description, disk or []), output)

    made = run(
        _opened(
            machine,
            name,
            state_dir,
            "create",
            lambda opened, places: flow.create(opened, places, wish, quiescing=quiescing),
        ),
        output,
    )
    values = {
        **_info_values(made.info),
        "frozen_file_systems": made.window.frozen,
        "frozen_seconds": round(made.window.frozen_seconds, 6),
        "notes": _notes(output, made.info.notes),
    }
    disks = ", ".join(part.target for part in made.info.checkpoint.disks)
    lines = [] if quiet else [f"checkpoint {made.info.checkpoint.name} of {disks}"]
    output.result("checkpoint create", values, lines)


async def _wish(
    file: str | None, checkpoint: str | None, description: str | None, disks: Sequence[str]
) -> CheckpointDocument:
    """The document that a file and the options ask for; options win."""
    from pullback.model.documents import checkpoint as documents

    wish = documents.CheckpointDocument() if file is None else await _given(file)
    if disks:
        wish = replace(wish, disks=tuple(documents.CheckpointDisk(name=target) for target in disks))
    # Through the rules, as a file's text was.
    values = {
        **documents.to_dict(wish),
        "name": checkpoint or wish.name,
        "description": description or wish.description,
    }
    return documents.from_dict(values)


# -- looking ---------------------------------------------------------------------------------


@app.command("list")
def listing(
    machine: options.Machine,
    roots: Annotated[bool, typer.Option("--roots", help="Only those without a parent.")] = False,
    leaves: Annotated[bool, typer.Option("--leaves", help="Only those without children.")] = False,
    no_leaves: Annotated[bool, typer.Option("--no-leaves", help="Only those with children.")] = False,
    start: Annotated[
        str | None, typer.Option("--from", metavar="CHECKPOINT", help="Only the children of this one.")
    ] = None,
    descendants: Annotated[
        bool, typer.Option("--descendants", help="With --from: all behind it, not only its children.")
    ] = False,
    topological: Annotated[
        bool, typer.Option("--topological", help="Parents before children, whatever their names; else by name.")
    ] = False,
    tree: Annotated[bool, typer.Option("--tree", help="Drawn as a tree.")] = False,
    size: options.Sizes = False,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the checkpoints of a machine."""
    from pullback.flows import checkpoints as flow

    output = Output(json, quiet, verbose)

    run(_check(roots=roots, leaves=leaves, no_leaves=no_leaves, start=start, descendants=descendants), output)
    found = run(
        _opened(machine, name, state_dir, "list", lambda opened, places: flow.listing(opened, places, sizes=size)),
        output,
    )
    only = True if leaves else False if no_leaves else None
    chosen = run(_chosen(found, roots=roots, leaves=only, start=start, descendants=descendants), output)
    if not topological:
        chosen = tuple(sorted(chosen, key=lambda checkpoint: checkpoint.name))
    values: dict[str, object] = {
        "machine": found.machine,
        "current": found.current.name if found.current else None,
        "checkpoints": [_values(checkpoint) for checkpoint in chosen],
        "notes": _notes(output, found.notes),
    }
    output.result("checkpoint list", values, _drawn(found, chosen) if tree else _table(found, chosen, sizes=size))


async def _chosen(
    found: Tree, *, roots: bool, leaves: bool | None, start: str | None, descendants: bool
) -> tuple[Checkpoint, ...]:
    return found.select(roots=roots, leaves=leaves, start=start, descendants=descendants)


async def _check(*, roots: bool, leaves: bool, no_leaves: bool, start: str | None, descendants: bool) -> None:
    if roots and start is not None:
        raise errors.UsageError(problem="--roots and --from exclude each other")
    if leaves and no_leaves:
        raise errors.UsageError(problem="--leaves and --no-leaves exclude each other")
    if descendants and start is None:
        raise errors.UsageError(problem="--descendants goes with --from")


def _values(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "name": checkpoint.name,
        "created": checkpoint.created.isoformat() if checkpoint.created else None,
        "description": checkpoint.description,
        "parent": checkpoint.parent,
        "repository": checkpoint.owner,
        "documented": checkpoint.saved is not None,
        "problem": checkpoint.problem,
        "disks": [_disk_values(disk) for disk in checkpoint.disks],
    }


def _disk_values(disk: CheckpointDisk) -> dict[str, object]:
    return {
        "target": disk.target,
        "nonce": disk.mark.nonce,
        "first": disk.mark.first,
        "last": disk.mark.last,
        "granularity": disk.granularity,
        "recorded": disk.recorded,
        "recording": disk.recording,
        "busy": disk.busy,
        "memory": disk.memory,
        "stored": disk.stored,
        "problem": disk.problem,
        "dirty": disk.dirty,
    }


def _table(found: Tree, chosen: Sequence[Checkpoint], *, sizes: bool) -> list[str]:
    if not chosen:
        return [f"{found.machine}: no checkpoints"]
    header = ("checkpoint", "made", "parent", "disks", *(("changed since",) if sizes else ()), "")
    rows = [header, *(_row(found, checkpoint, sizes=sizes) for checkpoint in chosen)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(found: Tree, checkpoint: Checkpoint, *, sizes: bool) -> tuple[str, ...]:
    moment = f"{checkpoint.created.astimezone():%Y-%m-%d %H:%M:%S}" if checkpoint.created else "-"
    disks = ", ".join(disk.target for disk in checkpoint.disks) or "-"
    size = (_size(checkpoint),) if sizes else ()
    return (checkpoint.name, moment, checkpoint.parent or "-", disks, *size, _remark(found, checkpoint))


def _size(checkpoint: Checkpoint) -> str:
    from pullback.units import format_size

    known = [disk.dirty for disk in checkpoint.disks if disk.dirty is not None]
    return format_size(sum(known)) if known else "-"


def _remark(found: Tree, checkpoint: Checkpoint) -> str:
    if checkpoint.problem:
        return f"UNUSABLE: {checkpoint.problem}"
    return "current" if found.current is not None and found.current.name == checkpoint.name else ""


def _drawn(found: Tree, chosen: Sequence[Checkpoint]) -> list[str]:
    """Each below its parent, if that is shown too. Without recursion: a chain of thousands is thousands deep."""
    shown = {checkpoint.name for checkpoint in chosen}
    below: dict[str | None, list[Checkpoint]] = {}
    for checkpoint in chosen:
        parent = checkpoint.parent if checkpoint.parent in shown else None
        below.setdefault(parent, []).append(checkpoint)
    lines = []
    stack = [(checkpoint, 0) for checkpoint in reversed(below.get(None, []))]
    while stack:
        checkpoint, depth = stack.pop()
        remark = _remark(found, checkpoint)
        lines.append(f"{'  ' * depth}{checkpoint.name}{f'  ({remark})' if remark else ''}")
        stack += [(child, depth + 1) for child in reversed(below.get(checkpoint.name, []))]
    return lines


@app.command("info")
def info(
    machine: options.Machine,
    checkpoint: _Checkpoint,
    xml: Annotated[bool, typer.Option("--xml", help="As a domaincheckpoint, which `redefine` takes back.")] = False,
    size: options.Sizes = False,
    no_domain: Annotated[
        bool, typer.Option("--no-domain", help="Without the machine's description that was given with it.")
    ] = False,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show one checkpoint."""
    from pullback.flows import checkpoints as flow

    output = Output(json, quiet, verbose)

    found = run(
        _opened(
            machine, name, state_dir, "info", lambda opened, places: flow.info(opened, places, checkpoint, sizes=size)
        ),
        output,
    )
    if no_domain:
        found = replace(found, document=replace(found.document, domain=None))
    values = {**_info_values(found), "notes": _notes(output, found.notes)}
    output.result("checkpoint info", values, _xml(found, output) if xml else _info_lines(found))


def _info_values(found: flow.Info) -> dict[str, object]:
    from pullback.model.documents.checkpoint import to_dict

    return {
        "machine": found.machine,
        "checkpoint": _values(found.checkpoint),
        "document": to_dict(found.document),
        "kept": dict(found.kept),
    }


def _xml(found: flow.Info, output: Output) -> list[str]:
    async def text() -> str:
        from pullback.model.xml.checkpoint import serialise

        return serialise(found.document)

    return run(text(), output).rstrip("\n").split("\n")


def _info_lines(found: flow.Info) -> list[str]:
    from pullback.units import format_size

    checkpoint = found.checkpoint
    moment = f"{checkpoint.created.astimezone():%Y-%m-%d %H:%M:%S}" if checkpoint.created else "at an unknown time"
    lines = [f"{checkpoint.name}: made {moment}, behind {checkpoint.parent or 'none'}"]
    if checkpoint.description:
        lines += [f"  {line}" for line in checkpoint.description.splitlines()]
    if checkpoint.owner:
        lines.append(f"  made by a backup to the repository {checkpoint.owner}")
    if checkpoint.problem:
        lines.append(f"  UNUSABLE: {checkpoint.problem}")
    for disk in checkpoint.disks:
        dirty = f"{format_size(disk.dirty)} changed since, " if disk.dirty is not None else ""
        cost = f"at most {format_size(disk.memory)} of memory, {format_size(disk.stored)} in the image"
        lines.append(f"  {disk.target:<8} {dirty}{format_size(disk.recorded)} up to the next; its bitmap takes {cost}")
    return lines


@app.command("current")
def current(
    machine: options.Machine,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the newest checkpoint of a machine, the one that records."""
    from pullback.flows import checkpoints as flow

    output = Output(json, quiet, verbose)

    tree = run(_opened(machine, name, state_dir, "current", flow.listing), output)
    found = run(_newest(tree), output)
    output.result("checkpoint current", {"machine": tree.machine, "checkpoint": _values(found)}, [found.name])


async def _newest(tree: Tree) -> Checkpoint:
    return tree.require_current()


@app.command("parent")
def parent(
    machine: options.Machine,
    checkpoint: _Checkpoint,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the checkpoint before one."""
    from pullback.flows import checkpoints as flow

    output = Output(json, quiet, verbose)

    tree = run(_opened(machine, name, state_dir, "parent", flow.listing), output)
    found = run(_above(tree, checkpoint), output)
    output.result("checkpoint parent", {"machine": tree.machine, "checkpoint": _values(found)}, [found.name])


async def _above(tree: Tree, name: str) -> Checkpoint:
    return tree.require_parent(name)


# -- changing --------------------------------------------------------------------------------


@app.command("delete")
def delete(
    machine: options.Machine,
    checkpoint: _Checkpoint,
    children: Annotated[bool, typer.Option("--children", help="And all that come behind it.")] = False,
    children_only: Annotated[
        bool, typer.Option("--children-only", help="All that come behind it, but not itself.")
    ] = False,
    metadata: Annotated[
        bool, typer.Option("--metadata", help="Only what is written down about it; its bitmaps stay.")
    ] = False,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Delete a checkpoint. What changed since the others is not lost."""
    from pullback.flows import checkpoints as flow

    output = Output(json, quiet, verbose)

    done = run(
        _opened(
            machine,
            name,
            state_dir,
            "delete",
            lambda opened, places: flow.delete(
                opened,
                places,
                checkpoint,
                children=children,
                children_only=children_only,
                metadata_only=metadata,
            ),
        ),
        output,
    )
    values: dict[str, object] = {
        "machine": done.machine,
        "deleted": list(done.checkpoints),
        "metadata_only": done.metadata_only,
        "notes": _notes(output, done.notes),
    }
    what = "what was written down about checkpoint" if metadata else "checkpoint"
    lines = [f"{what} {gone} is deleted" for gone in done.checkpoints]
    output.result("checkpoint delete", values, [] if quiet else lines or ["there was nothing to delete"])


@app.command("redefine")
def redefine(
    machine: options.Machine,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="What `checkpoint info` gave, as XML or JSON; '-' is standard input.")
    ],
    no_validate: Annotated[
        bool, typer.Option("--no-validate", help="Also if its bitmaps are missing; it is only a note then.")
    ] = False,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Put back what was written down about a checkpoint, for instance on another host."""
    from pullback.flows import checkpoints as flow

    output = Output(json, quiet, verbose)

    document = run(_given(file), output)
    found = run(
        _opened(
            machine,
            name,
            state_dir,
            "redefine",
            lambda opened, places: flow.redefine(opened, places, document, validate=not no_validate),
        ),
        output,
    )
    values = {**_info_values(found), "notes": _notes(output, found.notes)}
    output.result("checkpoint redefine", values, [] if quiet else _info_lines(found))


# -- what changed ----------------------------------------------------------------------------


@app.command("changes")
def changes(
    machine: options.Machine,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The disk.")],
    since: Annotated[str, typer.Option("--since", metavar="CHECKPOINT", help="Where to begin.")],
    until: Annotated[
        str | None, typer.Option("--until", metavar="CHECKPOINT", help="Where to end; without it, now.")
    ] = None,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Print what changed on a disk between two checkpoints, or since one: a line `offset length` for each range."""
    from pullback.flows import checkpoints as flow

    output = Output(json, quiet, verbose)

    found = run(
        _opened(
            machine,
            name,
            state_dir,
            "changes",
            lambda opened, places: flow.changes(opened, places, target, since, until),
        ),
        output,
    )
    values: dict[str, object] = {
        "machine": found.machine,
        "target": found.target,
        "since": since,
        "until": until,
        "size": found.size,
        "granularity": found.granularity,
        "changed": sum(extent.length for extent in found.extents),
        "extents": [{"offset": extent.start, "length": extent.length} for extent in found.extents],
    }
    output.result("checkpoint changes", values, [f"{extent.start} {extent.length}" for extent in found.extents])
