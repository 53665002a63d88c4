"""pullback prove: restore points are booted, and looked at."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback import errors
from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run
from pullback.errors import Exit

if TYPE_CHECKING:
    from pullback.flows import proving as flow
    from pullback.flows.proving import Sign


_All = Annotated[bool, typer.Option("--all", help="All restore points of the repository, one after the other.")]
_Newest = Annotated[bool, typer.Option("--newest", help="With --all: only the newest of each machine.")]
_AgentAnswers = Annotated[bool, typer.Option("--agent", help="Wait until the guest agent answers.")]
_ConsoleText = Annotated[
    list[str] | None,
    typer.Option(
        "--console-text", metavar="REGEX", help="Wait for this text on the first serial port. May be repeated."
    ),
]
_Run = Annotated[
    list[str] | None,
    typer.Option(
        "--run",
        metavar="COMMAND",
        help="Run this in the guest, through its agent, until it ends with status 0. May be repeated.",
    ),
]
_StillRunning = Annotated[
    float | None,
    typer.Option(
        "--still-running", metavar="SECONDS", min=1, help="Wait until it has run so long without a reset or panic."
    ),
]
_Fsck = Annotated[
    bool, typer.Option("--fsck", help="Have its file systems checked too, on copies, in a small machine of ours.")
]
_TimeLimit = Annotated[
    float, typer.Option("--time-limit", metavar="SECONDS", min=1, help="How long it may take to come up.")
]
_CpuLimit = Annotated[
    float | None,
    typer.Option("--cpu-limit", metavar="SECONDS", min=1, help="How much processor time it may take for that."),
]
_Reports = Annotated[
    Path | None,
    typer.Option("--report", metavar="DIR", help="Directory of the reports (default: reports/ in the state's)."),
]


def prove(
    point: options.Point = "latest",
    repository: options.Repository = None,
    all_points: _All = False,
    newest: _Newest = False,
    agent_answers: _AgentAnswers = False,
    console_text: _ConsoleText = None,
    command: _Run = None,
    still_running: _StillRunning = None,
    fsck: _Fsck = False,
    time_limit: _TimeLimit = 600,
    cpu_limit: _CpuLimit = None,
    reports: _Reports = None,
    disk: options.Disks = None,
    machine: options.MachineName = None,
    network: options.MachineNetwork = "none",
    memory: options.MachineMemory = None,
    cpus: options.MachineCpus = None,
    accel: options.Accelerator = None,
    plain: options.PlainHardware = False,
    firmware: options.FirmwareFile = None,
    kernel: options.KernelFile = None,
    initrd: options.InitrdFile = None,
    append: options.KernelWords = None,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Boot restore points in machines without a network, look whether they come up, and write reports with pictures."""
    output = Output(json, quiet, verbose)
    which = _Which(repository, point, all_points, newest, tuple(disk or ()), machine)
    signs = _SignWish(agent_answers, console_text or [], command or [], still_running, fsck, time_limit, cpu_limit)
    hardware = _HardwareWish(network, memory, cpus, accel, plain, firmware, kernel, initrd, append)
    request = run(_request(which, signs, hardware, reports, config, state_dir), output)
    with output.progress() as progress:
        found = run(_prove(request, which, progress, output), output)
    _finish(found, output)


@dataclass(frozen=True, slots=True)
class _Which:
    """The restore points, as the command line has them."""

    repository: str | None
    point: str
    everything: bool
    newest: bool
    disks: tuple[str, ...]
    machine: str | None


@dataclass(frozen=True, slots=True)
class _SignWish:
    """What is waited for, and how long."""

    agent: bool
    console: list[str]
    commands: list[str]
    steady: float | None
    fsck: bool
    seconds: float
    cpu: float | None


@dataclass(frozen=True, slots=True)
class _HardwareWish:
    """What is otherwise than the restore point has it."""

    network: str
    memory: str | None
    cpus: int | None
    accel: str | None
    plain: bool
    firmware: Path | None
    kernel: Path | None
    initrd: Path | None
    append: str | None


async def _prove(
    request: flow.Request, which: _Which, progress: flow.Progress, output: Output
) -> tuple[flow.Report | flow.Failure, ...]:
    from pullback.flows import proving as flow

    if not which.everything:
        return (await flow.prove(request, progress),)
    points = await flow.candidates(request, newest=which.newest)

    def told(outcome: flow.Report | flow.Failure) -> None:
        if not output.json and not output.quiet:
            progress.note(_lines(outcome)[0])

    return await flow.prove_all(request, points, progress, told=told)


# -- what is meant ---------------------------------------------------------------------------


async def _request(
    which: _Which,
    signs: _SignWish,
    hardware: _HardwareWish,
    reports: Path | None,
    config: Path | None,
    state_dir: Path | None,
) -> flow.Request:
    from pullback import state
    from pullback.flows import proving as flow

    if which.newest and not which.everything:
        raise errors.UsageError(problem="--newest goes with --all; without both, the newest point is `latest`")
    if which.everything and which.point != "latest":
        raise errors.UsageError(problem="--all is all points; leave POINT out")
    chosen = configured.repository(which.repository, configured.load(config), state=state_dir)
    guests = os.environ.get("PULLBACK_GUEST_CACHE")
    return flow.Request(
        repository=chosen.place,
        access=chosen.access,
        point=which.point,
        machine=which.machine,
        only=which.disks,
        signs=_signs(signs),
        limits=flow.Limits(seconds=signs.seconds, cpu=signs.cpu),
        wishes=_wishes(hardware),
        reports=reports.absolute() if reports else None,
        directories=state.directories(state_dir),
        guests=Path(guests) if guests else None,
    )


def _wishes(wish: _HardwareWish) -> flow.Wishes:
    from pullback import units
    from pullback.flows import booting
    from pullback.flows import proving as flow

    return flow.Wishes(
        network=booting.network(wish.network),
        accel=wish.accel,
        memory=units.parse_size(wish.memory) if wish.memory else None,
        cpus=wish.cpus,
        plain=wish.plain,
        kernel=_kernel(wish),
        bios=_there(wish.firmware),
    )


def _signs(wish: _SignWish) -> tuple[Sign, ...]:
    from pullback.flows.proving import Kind, Sign

    for text in wish.console:
        try:
            re.compile(text)
        except re.error as error:
            raise errors.UsageError(problem=f"{text!r} is no regular expression: {error}") from error
    steady = [f"{wish.steady:g}"] if wish.steady is not None else []
    return (
        *([Sign(kind=Kind.AGENT)] if wish.agent else []),
        *(Sign(kind=Kind.CONSOLE, text=text) for text in dict.fromkeys(wish.console)),
        *(Sign(kind=Kind.RUN, text=text) for text in dict.fromkeys(wish.commands)),
        *(Sign(kind=Kind.STEADY, text=text) for text in steady),
        *([Sign(kind=Kind.FSCK)] if wish.fsck else []),
    )


def _kernel(wish: _HardwareWish) -> flow.Kernel | None:
    from pullback.flows import proving as flow

    image = _there(wish.kernel)
    if image is None:
        if wish.initrd is not None or wish.append is not None:
            raise errors.UsageError(problem="--initrd and --append go with --kernel")
        return None
    return flow.Kernel(image=image, initrd=_there(wish.initrd), append=wish.append or "")


def _there(path: Path | None) -> Path | None:
    """An absolute path of a file that is there."""
    if path is not None and not path.is_file():
        raise errors.UsageError(problem=f"There is no file {path}")
    return path.absolute() if path is not None else None


# -- what is said ----------------------------------------------------------------------------


def _finish(found: tuple[flow.Report | flow.Failure, ...], output: Output) -> None:
    """The result, and the exit code: 13 if one did not come up, else that of the first that could not be tried."""
    from pullback.flows import proving as flow

    reports = [one for one in found if isinstance(one, flow.Report)]
    failures = [one for one in found if isinstance(one, flow.Failure)]
    bad = [one for one in reports if not one.proof.proven]
    lines = [] if output.quiet and not bad and not failures else [line for one in found for line in _lines(one)]
    output.result("prove", _document(reports, failures), lines)
    if bad:
        output.hint(f"see what it showed: {bad[0].directory / flow.PAGE}")
        raise SystemExit(int(Exit.VERIFICATION))
    if failures:
        raise SystemExit(int(failures[0].error.exit_code))


def _document(reports: list[flow.Report], failures: list[flow.Failure]) -> dict[str, object]:
    from pullback.flows.proving import document

    return {
        "proven": sum(one.proof.proven for one in reports),
        "not_proven": sum(not one.proof.proven for one in reports),
        "points": [{**document(one.proof), "report": str(one.directory)} for one in reports],
        "failed": [
            {"machine": one.machine, "point": one.point, "code": one.error.code, "message": str(one.error)}
            for one in failures
        ],
    }


def _lines(outcome: flow.Report | flow.Failure) -> list[str]:
    from pullback.flows import proving as flow
    from pullback.units import format_duration

    if isinstance(outcome, flow.Failure):
        return [f"{outcome.machine}: {outcome.point} could not be tried: {outcome.error}"]
    proof = outcome.proof
    up = proof.figures.up
    verdict = (
        f"came up in {format_duration(up)}" if proof.proven and up is not None else f"DID NOT COME UP: {proof.problem}"
    )
    lines = [f"{proof.machine}: {proof.point} {verdict}"]
    for seen in proof.seen:
        after = f" after {format_duration(seen.seconds)}" if seen.seconds is not None else ""
        lines.append(f"  {'yes' if seen.good else 'no ':<3} {seen.sign}{after}")
    lines += [f"  chosen because {proof.signs.why}"] if proof.signs.why else []
    lines += [f"  note: {note}" for note in proof.notes]
    return [*lines, f"  {outcome.directory / flow.PAGE}"]
