"""pullback boot: a machine starts from a restore point at once, and its disks are filled behind it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback import errors
from pullback.cli import configured, detaching, options
from pullback.cli.output import Output
from pullback.cli.running import run
from pullback.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pullback.flows import booting as flow
    from pullback.model.hardware import Network
    from pullback.progress import Progress

_Directory = Annotated[
    Path,
    typer.Option("--to", metavar="DIR", help="Directory of the machine's disks from now on; on a local file system."),
]
_CopyAs = Annotated[
    str | None,
    typer.Option(
        "--as", metavar="NAME", help="Make it a copy that may run beside the original: new name, uuid and addresses."
    ),
]
_NoStart = Annotated[
    bool, typer.Option("--no-start", help="Do not start it: print the command, and wait until somebody does.")
]
_Detach = Annotated[
    bool,
    typer.Option("--detach", help="End when the machine runs; the rest goes on in the background, see DIR/boot.log."),
]
_FillAfter = Annotated[
    float | None,
    typer.Option(
        "--fill-after", metavar="SECONDS", min=0, help="Leave it alone for so long, while it boots (otherwise 10)."
    ),
]


def boot(
    to_directory: _Directory,
    repository: options.Repository = None,
    point: options.Point = "latest",
    disk: options.Disks = None,
    machine: options.MachineName = None,
    copy_as: _CopyAs = None,
    network: options.MachineNetwork = "none",
    memory: options.MachineMemory = None,
    cpus: options.MachineCpus = None,
    accel: options.Accelerator = None,
    plain: options.PlainHardware = False,
    firmware: options.FirmwareFile = None,
    kernel: options.KernelFile = None,
    initrd: options.InitrdFile = None,
    append: options.KernelWords = None,
    no_start: _NoStart = False,
    detach: _Detach = False,
    fill_after: _FillAfter = None,
    limit_rate: options.LimitRate = None,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Start a machine from a restore point at once, while its disks are filled in the background."""
    output = Output(json, quiet, verbose)
    wish = _Wish(
        repository=repository,
        point=point,
        disks=tuple(disk or ()),
        machine=machine,
        to=to_directory,
        name=copy_as,
        network=network,
        memory=memory,
        cpus=cpus,
        accel=accel,
        plain=plain,
        firmware=firmware,
        kernel=kernel,
        initrd=initrd,
        append=append,
        start=not no_start,
        detach=detach,
        fill_after=fill_after,
        limit_rate=limit_rate,
        config=config,
        state_dir=state_dir,
    )
    request = run(_request(wish), output)
    parent = detaching.begin() if detach else None
    with _progress(output, detach) as progress:
        report = run(_boot(request, progress, output, parent), output)
    _finish(report, output)


@contextlib.contextmanager
def _progress(output: Output, detach: bool) -> Iterator[Progress]:
    """Bars are drawn only where they can be seen to the end."""
    if detach:
        yield _Notes(output)
        return
    with output.progress() as progress:
        yield progress


class _Notes(Silent):
    """Sentences only."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def note(self, message: str) -> None:
        """On standard error, which is a log later."""
        self._output.note(message)


async def _boot(
    request: flow.Request, progress: Progress, output: Output, parent: detaching.Parent | None
) -> flow.Report:
    from pullback.flows import booting as flow

    def told(started: flow.Started) -> None:
        if not output.json:
            # Above the bars, not between them.
            for line in _started_lines(started):
                progress.note(line) if not output.quiet else None
        else:
            output.event(_event(started), "")
        if parent is not None:
            output.result("boot", _values(started) | {"filled": False, "runs": True, "disks": _disks(started)}, [])
            parent.leave(request.to / "boot.log")

    return await flow.boot(request, progress, told=told)


# -- what is said ----------------------------------------------------------------------------


def _event(started: flow.Started) -> dict[str, object]:
    return {
        "kind": "machine-started" if started.pid else "machine-ready",
        "at": datetime.now(UTC).isoformat(),
        "subject": "machine",
        "facts": _values(started),
    }


def _values(started: flow.Started) -> dict[str, object]:
    return {
        "point": started.point.id,
        "machine": started.name,
        "created": started.point.created.isoformat(),
        "pid": started.pid,
        "resumed": started.resumed,
        "monitor": f"qmp:{started.monitor}",
        "agent": str(started.agent) if started.agent else None,
        "screen": str(started.screen) if started.screen else None,
        "console": str(started.console),
        "script": str(started.script),
        "words": list(started.words),
        "accel": started.accel,
        "network": started.network,
        "left_out": [{"what": item.what, "why": item.why, "of_host": item.of_host} for item in started.left_out],
        "started_after": round(started.seconds, 3),
    }


def _disks(started: flow.Started) -> list[dict[str, object]]:
    return [
        {"target": target, "path": str(path), "size": started.point.disk(target).size, "data": None}
        for target, path in started.images.items()
    ]


def _started_lines(started: flow.Started) -> Iterator[str]:
    from pullback.units import format_duration

    if started.pid is None:
        yield f"{started.name}: can be started from {started.point.id}; whoever does it runs {started.script}"
    elif started.resumed:
        yield f"{started.name}: runs already, as process {started.pid}"
    else:
        after = format_duration(started.seconds)
        yield f"{started.name}: started from {started.point.id} after {after}, as process {started.pid}"
    yield f"  monitor  qmp:{started.monitor}"
    if started.agent:
        yield f"  agent    {started.agent}"
    if started.screen:
        yield f"  screen   {started.screen} (VNC)"
    yield f"  console  {started.console}"
    yield f"  network  {started.network}"
    for item in started.left_out:
        if not item.of_host:
            yield f"  left out: {item}"


def _finish(report: flow.Report, output: Output) -> None:
    from pullback.units import format_duration, format_size

    started = report.started
    disks: list[dict[str, object]] = [
        {"target": disk.target, "path": str(disk.path), "size": disk.size, "data": disk.data} for disk in report.disks
    ]
    values = _values(started) | {"filled": True, "runs": report.runs, "disks": disks}
    lines = [f"{started.name}: whole, and {'runs on' if report.runs else 'off'}; the repository is not needed any more"]
    for disk in report.disks:
        lines.append(f"  {disk.path}  {format_size(disk.size)}, {format_size(disk.data)} of data")
    lines.append(f"  {format_duration(report.seconds)} in all; {started.script} starts it again")
    output.result("boot", values, [] if output.quiet else lines)


# -- what is meant ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """The command line, as it stands."""

    repository: str | None
    point: str
    disks: tuple[str, ...]
    machine: str | None
    to: Path
    name: str | None
    network: str
    memory: str | None
    cpus: int | None
    accel: str | None
    plain: bool
    firmware: Path | None
    kernel: Path | None
    initrd: Path | None
    append: str | None
    start: bool
    detach: bool
    fill_after: float | None
    limit_rate: str | None
    config: Path | None
    state_dir: Path | None


async def _request(wish: _Wish) -> flow.Request:
    from pullback import state, units
    from pullback.flows import booting as flow

    if wish.detach and not wish.start:
        raise errors.UsageError(problem="--detach ends when the machine runs, and --no-start does not start it")
    chosen = configured.repository(wish.repository, configured.load(wish.config), state=wish.state_dir)
    return flow.Request(
        repository=chosen.place,
        access=chosen.access,
        point=wish.point,
        machine=wish.machine,
        only=wish.disks,
        to=wish.to.absolute(),
        wishes=flow.Wishes(
            network=network_of(wish.network),
            accel=wish.accel,
            memory=units.parse_size(wish.memory) if wish.memory else None,
            cpus=wish.cpus,
            name=wish.name,
            plain=wish.plain,
            kernel=_kernel(wish),
            bios=_there(wish.firmware),
        ),
        start=wish.start,
        fill_after=flow.FILL_AFTER if wish.fill_after is None else wish.fill_after,
        rate=units.parse_size(wish.limit_rate) if wish.limit_rate else None,
        directories=state.directories(wish.state_dir),
    )


def network_of(text: str) -> Network:
    """What `--network` says."""
    from pullback.flows import booting as flow

    return flow.network(text)


def _kernel(wish: _Wish) -> flow.Kernel | None:
    from pullback.flows import booting as flow

    if wish.kernel is None:
        if wish.initrd is not None or wish.append is not None:
            raise errors.UsageError(problem="--initrd and --append go with --kernel")
        return None
    image = _there(wish.kernel)
    assert image is not None
    return flow.Kernel(image=image, initrd=_there(wish.initrd), append=wish.append)


def _there(path: Path | None) -> Path | None:
    """An absolute path of a file that is there."""
    if path is None:
        return None
    if not path.is_file():
        raise errors.UsageError(problem=f"There is no file {path}")
    return path.absolute()
