"""pullback events: what happens on a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pullback import errors
from pullback.cli import lasting, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback import state
    from pullback.flows.events import Event
    from pullback.flows.opening import Opened
    from pullback.flows.staying import At


def events(
    machine: options.Machine,
    follow: options.Follow = False,
    interval: options.Interval = 1.0,
    threshold: Annotated[
        int,
        typer.Option(
            "--threshold", metavar="PERCENT", min=1, max=100, help="Tell once of scratch above this part of a disk."
        ),
    ] = 50,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what there is on a machine (job, snapshots, exports, checkpoints), and with --follow what happens to it."""
    output = Output(json, quiet, verbose)
    place = run(lasting.at(machine, name, state_dir, "events"), output)
    if not follow:
        found = run(_now(place, threshold / 100), output)
        values: dict[str, object] = {"events": [_values(event) for event in found], "gone": False}
        output.result("events", values, [_line(event) for event in found] or ["there is nothing"])
        return
    run(_follow(place, interval, threshold / 100, output), output)
    output.result("events", {"events": [], "gone": True}, [])


async def _now(place: At, threshold: float) -> list[Event]:
    """What is there, as if it began now."""
    from pullback.flows import events as flow

    async def look(opened: Opened, places: state.Directories) -> flow.Seen:
        return await flow.look(opened, places)

    return flow.differences(flow.Seen(), await place.do(look), threshold=threshold, told=set())


async def _follow(place: At, interval: float, threshold: float, output: Output) -> None:
    """Until the machine is gone."""
    from pullback.flows import events as flow

    if place.off:
        raise errors.UsageError(problem="A machine that is off has no events: what is made of it ends with its command")
    look = flow.observing(place.url, place.directories, place.name)
    async for event in flow.follow(look, interval=interval, threshold=threshold):
        output.event(_values(event), _line(event))


def _values(event: Event) -> dict[str, object]:
    return {
        "kind": event.kind.value,
        "at": event.at.isoformat(),
        "subject": event.subject,
        "facts": dict(event.facts),
    }


def _line(event: Event) -> str:
    facts = "  ".join(f"{name}={_short(value)}" for name, value in event.facts.items() if value is not None)
    return f"{lasting.moment(event.at)}  {event.kind:<18}  {event.subject}  {facts}".rstrip()


def _short(value: object) -> str:
    if isinstance(value, list):  # the disks of a job
        return ",".join(f"{disk['target']}:{disk['done']}/{disk['total']}" for disk in value)
    return str(value)
