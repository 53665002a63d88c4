"""pullback restore: disks of a restore point, written to files, devices, NBD servers or another machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pullback.config import Config
    from pullback.flows import restore as flow
    from pullback.flows.destinations import Place
    from pullback.flows.restore import Format
    from pullback.model import urls

#: A machine of the configuration, in --to: a name alone is a directory.
_CONFIGURED = "machine:"


_To = Annotated[
    list[str],
    typer.Option(
        "--to",
        metavar="DIR",
        help="Directory for the disks (DIR/vda.raw …), and for what the machine was besides. TARGET=PLACE, "
        "repeated, beside a directory or instead of one: a file (vda=/srv/a.qcow2), a block device "
        "(vda=/dev/vg/web01), an NBD server (vda=nbd://host/export). Of a single disk, a device or server "
        "alone is enough. Or another machine, which must not run: qmp:/run/other.sock, images:vda=/srv/a.qcow2, "
        "or machine:NAME for a configured one.",
    ),
]
_Format = Annotated[
    str, typer.Option(metavar="raw|qcow2", help="What files are written as whose name does not say it.")
]
_DiskMap = Annotated[
    list[str] | None,
    typer.Option(
        "--disk-map",
        metavar="TARGET=TARGET",
        help="With a machine in --to: a disk of the restore point, and the machine's that it goes to (vda=sda). "
        "May be repeated. Otherwise each goes to the one of the same name.",
    ),
]
_As = Annotated[
    str | None,
    typer.Option(
        "--as",
        metavar="NAME",
        help="With a directory: make it a copy that can run beside the original. Name, uuid and network "
        "addresses are new in what is written there; serial numbers of disks stay.",
    ),
]
_Force = Annotated[
    bool, typer.Option("--force", help="Overwrite files that are there, block devices, and disks of a machine.")
]
_Check = Annotated[bool, typer.Option("--check", help="At the end, read back what was written, and compare it.")]
_Discard = Annotated[
    bool,
    typer.Option(
        "--discard",
        help="First discard all that a block device, a server or a machine's disk holds, also behind the disk's "
        "end, so that space which is not needed is given back.",
    ),
]


def restore(
    to: _To,
    repository: options.Repository = None,
    point: options.Point = "latest",
    disk: options.Disks = None,
    format: _Format = "raw",
    machine: options.MachineName = None,
    disk_map: _DiskMap = None,
    as_name: _As = None,
    force: _Force = False,
    check: _Check = False,
    discard: _Discard = False,
    parallel: options.Parallel = None,
    limit_rate: options.LimitRate = None,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a restore point to files, devices, servers or another machine, each byte proven while it is written."""
    from pullback.flows import restore as flow

    output = Output(json, quiet, verbose)
    wish = _Wish(
        repository=repository,
        to=to,
        point=point,
        disks=disk or [],
        format=format,
        machine=machine,
        disk_map=disk_map or [],
        as_name=as_name,
        force=force,
        check=check,
        discard=discard,
        parallel=parallel,
        limit_rate=limit_rate,
        config=config,
        state_dir=state_dir,
    )
    request = run(_request(wish), output)
    with output.progress() as progress:
        report = run(flow.restore(request, progress), output)
    output.result("restore", _values(report), [] if quiet else _lines(report))


def _values(report: flow.Report) -> dict[str, object]:
    return {
        "point": report.point.id,
        "machine": report.point.machine,
        "created": report.point.created.isoformat(),
        "seconds": round(report.seconds, 3),
        "disks": [
            {
                "target": done.target,
                "path": done.place,
                "format": str(done.format),
                "size": done.size,
                "read": done.read,
                "digest": done.digest,
                "checked": done.checked,
            }
            for done in report.disks
        ],
        "files": [str(path) for path in report.files],
        "copy": None if report.identity is None else {"name": report.identity.name, "uuid": report.identity.uuid},
        "macs": [{"old": old, "new": new} for old, new in report.macs],
        "notes": list(report.notes),
    }


def _lines(report: flow.Report) -> list[str]:
    from pullback.units import format_duration, format_size

    lines = [f"{report.point.machine}: restored {report.point.id}"]
    for done in report.disks:
        lines.append(f"  {done.place}  {format_size(done.size)}, proven{', read back' if done.checked else ''}")
    lines += [f"  {path}" for path in report.files]
    if report.identity is not None:
        lines.append(f"  a copy: {report.identity.name}, uuid {report.identity.uuid}")
    return [*lines, f"  {format_duration(report.seconds)} in all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """The command line, as it stands."""

    repository: str | None
    to: list[str]
    point: str
    disks: list[str]
    format: str
    machine: str | None
    disk_map: list[str]
    as_name: str | None
    force: bool
    check: bool
    discard: bool
    parallel: int | None
    limit_rate: str | None
    config: Path | None
    state_dir: Path | None


async def _request(wish: _Wish) -> flow.Request:
    from pullback import state, units
    from pullback.flows import restore as flow

    known = configured.load(wish.config)
    chosen = configured.repository(wish.repository, known, state=wish.state_dir)
    to, elsewhere = _to(wish, known)
    return flow.Request(
        repository=chosen.place,
        access=chosen.access,
        to=to,
        elsewhere=elsewhere,
        disk_map=_disk_map(wish.disk_map),
        point=wish.point,
        machine=wish.machine,
        only=tuple(wish.disks),
        format=_format(wish.format),
        force=wish.force,
        check=wish.check,
        discard=wish.discard,
        copy_name=wish.as_name,
        parallel=wish.parallel or flow.PARALLEL,
        rate=units.parse_size(wish.limit_rate) if wish.limit_rate else None,
        directories=state.directories(wish.state_dir),
    )


def _to(wish: _Wish, known: Config) -> tuple[flow.To, Mapping[str, Place]]:
    """A directory with the disks that go elsewhere; the place of the only disk; places by target; or a machine."""
    from pullback import errors
    from pullback.flows import destinations

    if machine := _machine(wish, known):
        return machine, {}
    named = [destinations.targeted(text) for text in wish.to]
    places = dict(one for one in named if one is not None)
    others = [text for text, one in zip(wish.to, named, strict=True) if one is None]
    if len(others) > 1 or len(places) + len(others) != len(wish.to):
        raise errors.UsageError(
            problem="--to is one directory, or one place, or TARGET=PLACE for each disk, each target once"
        )
    if not others:
        if wish.disks:
            problem = "--to with TARGET=PLACE says already which disks are meant; leave --disk out"
            raise errors.UsageError(problem=problem)
        return places, {}
    [text] = others
    if destinations.names_itself(text):
        if places:
            raise errors.UsageError(problem=f"{text} is the place of one disk: say of which, TARGET={text}")
        return destinations.parse(text), {}
    return Path(text).absolute(), places


def _machine(wish: _Wish, known: Config) -> urls.Machine | None:
    """The machine that is meant, if one is."""
    from pullback import errors
    from pullback.model import urls

    meant = [text for text in wish.to if text.startswith(("qmp:", "images:", _CONFIGURED))]
    if not meant:
        return None
    if len(wish.to) > 1:
        raise errors.UsageError(problem=f"{meant[0]} in --to takes all disks: leave the other places out")
    if meant[0].startswith(_CONFIGURED):
        return known.machine(meant[0].removeprefix(_CONFIGURED)).place
    return urls.machine(meant[0])


def _disk_map(texts: list[str]) -> Mapping[str, str]:
    from pullback import errors
    from pullback.model.texts import is_target

    found: dict[str, str] = {}
    for text in texts:
        ours, equals, theirs = text.partition("=")
        if not (equals and is_target(ours) and is_target(theirs)) or ours in found or theirs in found.values():
            raise errors.UsageError(problem=f"{text!r} in --disk-map is not TARGET=TARGET, or a disk is there twice")
        found[ours] = theirs
    return found


def _format(text: str) -> Format:
    from pullback import errors
    from pullback.flows.restore import Format

    try:
        return Format(text)
    except ValueError as error:
        raise errors.UsageError(
            problem=f"{text!r} is no format that a disk can be written as; there are raw and qcow2"
        ) from error
