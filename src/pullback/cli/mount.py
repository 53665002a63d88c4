"""pullback mount: the disks of a restore point as files."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import configured, lasting, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback.flows import mounting as flow


def mount(
    point: options.PointFirst,
    directory: Annotated[
        Path,
        typer.Argument(  # not looked at here: what a killed process left there cannot even be read
            metavar="DIR", readable=False, help="Where the files are shown: an empty directory, made if needed."
        ),
    ],
    repository: options.Repository = None,
    disk: options.Disks = None,
    patient: options.Patient = False,
    cache_size: options.CacheSize = None,
    machine: options.MachineName = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the disks of a restore point as files, read-only, until Ctrl-C, SIGTERM or `fusermount3 -u DIR`."""
    output = Output(json, quiet, verbose)

    async def request() -> flow.Request:
        from pullback import state
        from pullback.flows import mounting as flow

        chosen = configured.repository(repository, configured.load(None), state=state_dir)
        return flow.Request(
            repository=chosen.place,
            access=chosen.access,
            directory=directory.absolute(),
            point=point,
            machine=machine,
            only=tuple(disk or ()),
            directories=state.directories(state_dir),
            patient=patient,
            cache=lasting.cache_size(cache_size),
        )

    run(_stay(run(request(), output), output), output)


async def _stay(request: flow.Request, output: Output) -> None:
    """Show, and say what happens, until we are told to end: that is the good end."""
    from pullback.flows import mounting as flow
    from pullback.flows.servants import Trouble

    def told(trouble: Trouble) -> None:
        lasting.tell_trouble(trouble, output)

    with output.progress() as progress:
        async with flow.mounting(request, progress, told=told) as mounted:
            output.note("it stays until this command ends: Ctrl-C, SIGTERM or fusermount3 -u ends both")
            output.result("mount", _values(mounted), _lines(mounted))
            try:
                await mounted.ended()
            except asyncio.CancelledError:
                lasting.use_up()


def _values(mounted: flow.Mounted) -> dict[str, object]:
    return {
        "point": mounted.point.id,
        "machine": mounted.point.machine,
        "created": mounted.point.created.isoformat(),
        "directory": str(mounted.directory),
        "files": [{"path": str(file.path), "size": file.size, "target": file.target} for file in mounted.files],
    }


def _lines(mounted: flow.Mounted) -> list[str]:
    from pullback.units import format_size

    lines = [f"{mounted.point.machine}: restore point {mounted.point.id}"]
    return lines + [f"  {file.path}  {format_size(file.size)}" for file in mounted.files]
