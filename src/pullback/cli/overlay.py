"""pullback overlay …: external snapshots that carry checkpoints along."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pullback.cli import options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback.flows import overlays as flow
    from pullback.flows.opening import Work

T = TypeVar("T")

app = typer.Typer(
    help="Overlays: external snapshots of disks that carry their checkpoints along.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


async def _opened(machine: str, name: str | None, state_dir: Path | None, command: str, work: Work[T]) -> T:
    from pullback import state
    from pullback.flows.opening import on_machine
    from pullback.model import urls

    directories = state.directories(state_dir)
    url = urls.machine(machine)
    return await on_machine(url, directories, work, command=f"overlay {command}", name=name, anonymous=True)


@app.command("create")
def create(
    machine: options.Machine,
    target: Annotated[str | None, typer.Argument(metavar="TARGET", help="The disk.")] = None,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="The overlay, a new qcow2 file; without it, IMAGE.overlay-TIME.qcow2 beside the image."
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--disk", "-d", metavar="TARGET[=FILE]", help="One disk more, in the same instant. Repeatable."),
    ] = None,
    all_disks: Annotated[
        bool, typer.Option("--all", help="All disks that take part in backups, in one instant.")
    ] = False,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Put a new overlay on disks, at one instant: what is below stays as it is, and the checkpoints go on above."""
    from pullback.flows import overlays as flow

    output = Output(json, quiet, verbose)
    wishes = run(_wishes(target, file, more or [], everything=all_disks), output)
    made = run(
        _opened(machine, name, state_dir, "create", lambda opened, places: flow.create(opened, places, wishes)), output
    )
    for note in made.notes:
        output.note(note)
    values: dict[str, object] = {
        "machine": made.machine,
        "overlays": [asdict(overlay) | {"checkpoints": list(overlay.checkpoints)} for overlay in made.overlays],
        "notes": list(made.notes),
    }
    lines = [
        f"  {overlay.target:<8} writes to {overlay.path} now; {_carried(len(overlay.checkpoints))}"
        for overlay in made.overlays
    ]
    output.result("overlay create", values, [] if quiet else [f"{made.machine}:", *lines])


def _carried(count: int) -> str:
    return f"{count} checkpoint(s) go on in it" if count else "there was no checkpoint"


async def _wishes(
    target: str | None, file: Path | None, disks: list[str], *, everything: bool
) -> tuple[flow.Wish, ...]:
    from pullback import errors
    from pullback.flows import overlays as flow

    if everything and (target or disks):
        raise errors.UsageError(problem="--all and the names of disks exclude each other")
    if not (everything or target or disks):
        raise errors.UsageError(problem="Name a disk, or say --all")
    found = [flow.Wish(target=target, path=file)] if target else []
    for text in disks:
        name, _, path = text.partition("=")
        found.append(flow.Wish(target=name, path=Path(path) if path else None))
    return tuple(found)


@app.command("commit")
def commit(
    machine: options.Machine,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The disk.")],
    keep: Annotated[bool, typer.Option("--keep", help="Do not remove the overlay's file.")] = False,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Commit a disk's top overlay into the image below, which is the disk's image again. Its checkpoints go on."""
    from pullback.flows import overlays as flow

    output = Output(json, quiet, verbose)
    with output.progress() as progress:
        done = run(
            _opened(
                machine,
                name,
                state_dir,
                "commit",
                lambda opened, places: flow.commit(opened, places, target, keep=keep, progress=progress),
            ),
            output,
        )
    for note in done.notes:
        output.note(note)
    values: dict[str, object] = asdict(done) | {"checkpoints": list(done.checkpoints), "notes": list(done.notes)}
    fate = "was removed" if done.removed else "is not used any more: never start a machine on it"
    lines = [
        f"{done.target} writes to {done.image} now; {_carried(len(done.checkpoints))}",
        f"  {done.overlay} {fate}",
    ]
    output.result("overlay commit", values, [] if quiet else lines)
