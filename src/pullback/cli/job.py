"""pullback job …: backup jobs that stay open, as `virsh backup-begin` starts them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from pullback import errors
from pullback.cli import lasting, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback import state
    from pullback.flows.events import Look
    from pullback.flows.jobs import DiskStats, Job, Stats
    from pullback.flows.opening import Opened, Work
    from pullback.flows.staying import At
    from pullback.model.documents.backup import BackupDocument
    from pullback.model.documents.checkpoint import CheckpointDocument
    from pullback.state.history import EndedJob

app = typer.Typer(
    help="Backup jobs that stay open: others read them (pull), or QEMU writes them (push), and they are ended.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


_Job = Annotated[
    str | None,
    typer.Argument(
        metavar="JOB", help="Its id, as `job begin` printed it: no other is meant, and it may have ended already."
    ),
]


# -- begin -----------------------------------------------------------------------------------


@app.command("begin")
def begin(
    machine: options.Machine,
    backup_file: Annotated[
        str, typer.Argument(metavar="BACKUP", help="A domainbackup, as XML or JSON; '-' is standard input.")
    ],
    checkpoint_file: Annotated[
        str | None,
        typer.Argument(metavar="CHECKPOINT", help="A domaincheckpoint to be made in the same instant; likewise."),
    ] = None,
    reuse_external: Annotated[
        bool,
        typer.Option("--reuse-external", help="Files of targets and scratch are there already, of the right size."),
    ] = False,
    speed: Annotated[
        str | None,
        typer.Option("--speed", metavar="BYTES", help="Of a push: limit each disk to so many bytes a second (10M)."),
    ] = None,
    scratch: options.Scratch = None,
    engine: options.Engine = None,
    quiesce: options.Quiesces = None,
    agent: options.Agent = None,
    mount_point: options.MountPoints = None,
    tls_x509: options.TlsX509 = None,
    tls_psk: options.TlsPsk = None,
    insecure: options.Insecure = False,
    max_connections: options.MaxConnections = None,
    owner: options.Owner = None,
    wait: options.Wait = False,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Begin a job, leave it open, and print how to read it. A machine has one job at a time.

    Of a machine that is off, and with --wait, the command stays. A pull that is interrupted then ends
    well; a push ends when all is copied, and is undone if it is interrupted before.
    """
    from pullback.flows import jobs as flow
    from pullback.flows import staying

    output = Output(json, quiet, verbose)
    tracked = checkpoint_file is not None
    place = run(lasting.at(machine, name, state_dir, "job begin", anonymous=not tracked), output)
    how = run(lasting.how(scratch, engine, quiesce, agent, mount_point, owner, wait=wait), output)
    access = run(lasting.access(tls_x509, tls_psk, max_connections, insecure=insecure), output)
    limit = run(_limit(speed), output)
    document, checkpoint = run(_documents(backup_file, checkpoint_file), output)

    async def work(opened: Opened, places: state.Directories) -> Job:
        return await flow.begin(
            opened, places, document, checkpoint, how=how, access=access, reuse=reuse_external, speed=limit
        )

    def told(made: Job) -> None:
        output.result("job begin", _values(made), _lines(made))

    thing = staying.a_job(place, work, document.mode, how.owner_token)
    lasting.stay(place, thing, output, told=told, wait=wait)


async def _limit(speed: str | None) -> int | None:
    """Bytes a second; None: no limit."""
    from pullback.units import parse_size

    return (parse_size(speed) or None) if speed is not None else None


async def _documents(backup: str, checkpoint: str | None) -> tuple[BackupDocument, CheckpointDocument | None]:
    from pullback.cli import inputs
    from pullback.model.documents import backup as backups
    from pullback.model.documents import checkpoint as checkpoints
    from pullback.model.xml import backup as backup_xml
    from pullback.model.xml import checkpoint as checkpoint_xml

    if backup == checkpoint == "-":
        raise errors.UsageError(problem="Standard input can be only one of the two documents")
    document = inputs.document(backup, backups.ROOT, xml=backup_xml.parse, values=backups.from_dict)
    if checkpoint is None:
        return document, None
    found = inputs.document(checkpoint, checkpoints.ROOT, xml=checkpoint_xml.parse, values=checkpoints.from_dict)
    return document, found


# -- info ------------------------------------------------------------------------------------


def _values(job: Job) -> dict[str, object]:
    from pullback.model.documents.backup import to_dict

    return {
        "machine": job.machine,
        "job": job.job,
        "mode": job.mode.value,
        "created": job.moment.isoformat(),
        "pause_seconds": round(job.pause, 6),
        "frozen_seconds": round(job.frozen_seconds, 6),
        "checkpoint": job.checkpoint,
        "exports": [lasting.export_values(served) for served in job.exports],
        "engines": dict(job.engines),
        "document": to_dict(job.document),
    }


def _lines(job: Job) -> list[str]:
    checkpoint = f", with checkpoint {job.checkpoint}" if job.checkpoint else ""
    lines = [f"{job.machine}: {job.mode} job {job.job} of {lasting.moment(job.moment)}{checkpoint}"]
    for disk in job.document.taking_part if job.document.mode == "push" else ():
        place = (disk.target.uri or disk.target.path) if disk.target else ""
        since = f" (changes since {disk.incremental})" if disk.incremental else ""
        lines.append(f"  {disk.name:<8} to {place}{since}")
    return lines + lasting.export_lines(job.exports)


@app.command("info")
def info(
    machine: options.Machine,
    as_xml: options.AsXml = False,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the job that is under way, and how to read it."""
    from pullback.flows import jobs as flow

    output = Output(json, quiet, verbose)
    place = run(lasting.at(machine, name, state_dir, "job info"), output)

    async def work(opened: Opened, _: state.Directories) -> Job:
        return await flow.info(opened)

    found = run(place.do(work), output)
    output.result("job info", _values(found), run(_xml(found), output) if as_xml else _lines(found))


async def _xml(job: Job) -> list[str]:
    from pullback.model.xml.backup import serialise

    return serialise(job.document).rstrip("\n").split("\n")


# -- stats -----------------------------------------------------------------------------------


@app.command("stats")
def stats(
    machine: options.Machine,
    follow: options.Follow = False,
    completed: Annotated[bool, typer.Option("--completed", help="How the last job ended, instead.")] = False,
    interval: options.Interval = 1.0,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show how far the job is: bytes copied (push), bytes that scratch takes (pull)."""
    output = Output(json, quiet, verbose)
    place = run(lasting.at(machine, name, state_dir, "job stats"), output)
    if completed:
        if follow:
            run(_refuse("--follow and --completed exclude each other"), output)
        machine_name, ended = run(place.do(_last), output)
    elif follow:
        machine_name, ended = run(_follow(place, interval, output), output)
    else:
        machine_name, found = run(place.do(_stats), output)
        output.result("job stats", _stats_values(machine_name, found), _stats_lines(machine_name, found))
        return
    output.result("job stats", _ended_values(machine_name, ended), _ended_lines(machine_name, ended))


async def _refuse(problem: str) -> None:
    raise errors.UsageError(problem=problem)


async def _stats(opened: Opened, _: state.Directories) -> tuple[str, Stats]:
    from pullback.flows import jobs as flow

    return opened.name, await flow.stats(opened)


async def _last(opened: Opened, places: state.Directories) -> tuple[str, EndedJob]:
    from pullback.flows import jobs as flow

    ended = flow.last(opened, places)
    if ended is None:
        raise errors.UsageError(problem=f"No job of {opened.name} has ended yet")
    return opened.name, ended


async def _follow(place: At, interval: float, output: Output) -> tuple[str, EndedJob]:
    """Tell what moves, until the job is over."""
    from pullback.flows import events

    _require_running(place)
    job = ""
    told: dict[str, DiskStats] = {}
    async for seen in events.running(_look(place), interval=interval):
        if seen.stats is not None and job in ("", seen.stats.job):
            job = seen.stats.job
            for disk in seen.stats.disks:
                if told.get(disk.target) != disk:
                    told[disk.target] = disk
                    finished = disk.status in ("concluded", "failed")
                    line = _disk_line(disk)
                    output.done(disk.target, disk.done, disk.total, finished=finished, human=line)
        else:
            return seen.machine, _how_it_ended(job, seen.ended)
    raise AssertionError("the last look has another job, or none")


def _look(place: At) -> Look:
    from pullback.flows import events

    return events.observing(place.url, place.directories, place.name)


def _require_running(place: At) -> None:
    if place.off:
        raise errors.UsageError(problem="The job of a machine that is off is followed by the command that began it")


def _how_it_ended(job: str, ended: EndedJob | None) -> EndedJob:
    if ended is None or ended.job != job:
        raise errors.OutcomeUnknown(command=f"job {job}", reason="it is over, and left no record")
    return ended


def _stats_values(machine: str, found: Stats) -> dict[str, object]:
    return {
        "machine": machine,
        "job": found.job,
        "mode": found.mode.value,
        "seconds": round(found.seconds, 3),
        "finished": found.finished,
        "disks": [
            {
                "target": disk.target,
                "status": disk.status,
                "done": disk.done,
                "total": disk.total,
                "bytes_per_second": disk.speed,
                "error": disk.error,
            }
            for disk in found.disks
        ],
    }


def _stats_lines(machine: str, found: Stats) -> list[str]:
    from pullback.units import format_duration

    head = f"{machine}: {found.mode} job {found.job}, since {format_duration(found.seconds)}"
    return [head, *(_disk_line(disk) for disk in found.disks)]


def _disk_line(disk: DiskStats) -> str:
    from pullback.units import format_size

    limit = f", at most {format_size(disk.speed)} a second" if disk.speed else ""
    error = f": {disk.error}" if disk.error else ""
    return f"  {disk.target:<8} {disk.status:<10} {format_size(disk.done)} of {format_size(disk.total)}{limit}{error}"


# -- wait ------------------------------------------------------------------------------------


@app.command("wait")
def wait(
    machine: options.Machine,
    job: _Job = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", min=0, help="No longer than this (exit code 11 then)."),
    ] = None,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Wait until a push has nothing left to copy. It does not end the job. Of a pull it returns at once."""
    output = Output(json, quiet, verbose)
    place = run(lasting.at(machine, name, state_dir, "job wait"), output)
    machine_name, found, ended = run(_wait(place, job, timeout), output)
    if ended is not None:
        output.result("job wait", _ended_values(machine_name, ended), _ended_lines(machine_name, ended))
        failed = not ended.success
    else:
        assert found is not None
        output.result("job wait", _stats_values(machine_name, found), _stats_lines(machine_name, found))
        failed = any(disk.status == "failed" for disk in found.disks)
    if failed:
        raise SystemExit(int(errors.Exit.FAILED))


async def _wait(place: At, wanted: str | None, timeout: float | None) -> tuple[str, Stats | None, EndedJob | None]:
    """How far it is at the end; or how it ended, if it did meanwhile."""
    from pullback.flows import events

    _require_running(place)
    deadline = None if timeout is None else time.monotonic() + timeout
    job = wanted
    async for seen in events.running(_look(place), interval=_WAIT_SECONDS, job=wanted):
        if seen.stats is None or job not in (None, seen.stats.job):
            return seen.machine, None, _how_it_ended(str(job), seen.ended)
        job = seen.stats.job
        if seen.stats.finished or seen.stats.mode == "pull":
            return seen.machine, seen.stats, None
        if deadline is not None and time.monotonic() >= deadline:
            raise errors.BusyError(what=seen.machine, holder=f"the push job {job} still copies")
    raise AssertionError("the last look has another job, or none")


_WAIT_SECONDS = 0.5


# -- the end ---------------------------------------------------------------------------------


def _ended_values(machine: str, ended: EndedJob) -> dict[str, object]:
    return {
        "machine": machine,
        "job": ended.job,
        "mode": ended.mode,
        "success": ended.success,
        "error": ended.error,
        "began": ended.began,
        "ended": ended.ended,
        "checkpoint": ended.checkpoint,
        "disks": dict(ended.disks),
        "document": dict(ended.document),
    }


def _ended_lines(machine: str, ended: EndedJob) -> list[str]:
    kept = f"; its checkpoint {ended.checkpoint} stays" if ended.checkpoint else ""
    if ended.success:
        return [f"{machine}: {ended.mode} job {ended.job} ended well{kept}"]
    return [f"{machine}: {ended.mode} job {ended.job} came to nothing: {ended.error}"]


async def _abort(opened: Opened, places: state.Directories) -> tuple[str, EndedJob]:
    from pullback.flows import jobs as flow

    return opened.name, await flow.abort(opened, places)


@app.command("end")
def end(
    machine: options.Machine,
    job: _Job = None,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """End the job well: its checkpoint stays. Exports and scratch of a pull go; the images of a push are complete."""
    from pullback.flows import jobs as flow

    output = Output(json, quiet, verbose)
    place = run(lasting.at(machine, name, state_dir, "job end"), output)

    async def work(opened: Opened, places: state.Directories) -> tuple[str, EndedJob]:
        return opened.name, await flow.end(opened, places, job=job)

    machine_name, ended = run(place.do(work), output)
    output.result("job end", _ended_values(machine_name, ended), [] if quiet else _ended_lines(machine_name, ended))
    if not ended.success:
        raise SystemExit(int(errors.Exit.FAILED))


@app.command("abort")
def abort(
    machine: options.Machine,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """End the job as if it had never been: what a push wrote goes, and its checkpoint is merged into the one before."""
    output = Output(json, quiet, verbose)
    place = run(lasting.at(machine, name, state_dir, "job abort"), output)
    machine_name, ended = run(place.do(_abort), output)
    output.result("job abort", _ended_values(machine_name, ended), [] if quiet else _ended_lines(machine_name, ended))


# -- steering --------------------------------------------------------------------------------


@app.command("speed")
def speed(
    machine: options.Machine,
    limit: Annotated[
        str, typer.Argument(metavar="BYTES", help="Bytes a second for each disk (10M, 1.5G); 0: no limit.")
    ],
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Limit the speed of a push that runs."""
    from pullback.flows import jobs as flow
    from pullback.units import format_size

    output = Output(json, quiet, verbose)
    rate = run(_limit(limit), output)
    place = run(lasting.at(machine, name, state_dir, "job speed"), output)

    async def work(opened: Opened, _: state.Directories) -> str:
        await flow.set_speed(opened, rate)
        return opened.name

    machine_name = run(place.do(work), output)
    line = f"{machine_name}: {f'at most {format_size(rate)} a second for each disk' if rate else 'no limit'}"
    output.result("job speed", {"machine": machine_name, "bytes_per_second": rate}, [] if quiet else [line])


@app.command("pause")
def pause(
    machine: options.Machine,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Let a push rest. The guest goes on, and scratch grows meanwhile."""
    from pullback.flows import jobs as flow

    output = Output(json, quiet, verbose)

    async def work(opened: Opened, _: state.Directories) -> str:
        await flow.pause(opened)
        return opened.name

    _steer(run(lasting.at(machine, name, state_dir, "job pause"), output), work, output, paused=True)


@app.command("resume")
def resume(
    machine: options.Machine,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Let a push go on."""
    from pullback.flows import jobs as flow

    output = Output(json, quiet, verbose)

    async def work(opened: Opened, _: state.Directories) -> str:
        await flow.resume(opened)
        return opened.name

    _steer(run(lasting.at(machine, name, state_dir, "job resume"), output), work, output, paused=False)


def _steer(place: At, work: Work[str], output: Output, *, paused: bool) -> None:
    machine = run(place.do(work), output)
    line = f"{machine}: the job {'rests' if paused else 'goes on'}"
    values: dict[str, object] = {"machine": machine, "paused": paused}
    output.result(f"job {'pause' if paused else 'resume'}", values, [] if output.quiet else [line])
