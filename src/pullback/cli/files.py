"""pullback files: what is on the disks of a restore point, listed and fetched."""

from __future__ import annotations

import base64
import enum
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import fail, run

if TYPE_CHECKING:
    from pullback.flows import files as flow
    from pullback.flows.files import Entry, LeftOut
    from pullback.model.points import Point

_TOLD = 5


class Action(enum.StrEnum):
    """What to do."""

    LS = "ls"
    GET = "get"


def files(
    point: options.Point = "latest",
    action: Annotated[
        Action, typer.Argument(metavar="ls|get", help="List what is there, or fetch it.", show_default=False)
    ] = Action.LS,
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH",
            help="A path of the guest (/etc/hosts), or one in a volume (vda1:/etc/hosts, group/volume:/srv). Without "
            "one, `ls` shows the volumes.",
        ),
    ] = None,
    repository: options.Repository = None,
    to_place: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="PLACE",
            help="Where `get` puts it: a file; a directory, which is made, or gets it below its name; NAME.tar, for "
            "an archive of a directory; - for standard output. Without it: the current directory.",
        ),
    ] = None,
    disk: options.Disks = None,
    machine: options.MachineName = None,
    replace_file: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Let this host's kernel mount the disks: faster, needs root, and a disk made to attack a kernel "
            "attacks this one.",
        ),
    ] = False,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List and fetch single files of a restore point, without root, and without trusting what is on its disks."""
    from pullback.flows import files as flow

    output = Output(json, quiet, verbose)
    request = run(_request(repository, point, machine, disk, path, trust, config, state_dir), output)
    if action is Action.GET:
        return _get(request, to_place, replace_file, output)
    with output.progress() as progress:
        if request.where is None:
            found = run(flow.show(request, progress), output)
            return output.result("files", _volumes(found), _volume_lines(found))
        listing = run(flow.ls(request, progress), output)
    for note in (*listing.notes, *_unread(listing)):
        output.note(note)
    output.result("files", _listing(listing), [_line(entry) for entry in listing.entries])
    return None


async def _request(
    repository: str | None,
    point: str,
    machine: str | None,
    disks: list[str] | None,
    path: str | None,
    trust: bool,
    config: Path | None,
    state_dir: Path | None,
) -> flow.Request:
    from pullback import state
    from pullback.flows import files as flow
    from pullback.model import filepaths

    chosen = configured.repository(repository, configured.load(config), state=state_dir)
    guests = os.environ.get("PULLBACK_GUEST_CACHE")
    return flow.Request(
        repository=chosen.place,
        access=chosen.access,
        point=point,
        machine=machine,
        only=tuple(disks or ()),
        where=filepaths.parse(path) if path else None,
        trust=trust,
        directories=state.directories(state_dir),
        guests=Path(guests) if guests else None,
    )


# -- get -------------------------------------------------------------------------------------


def _get(request: flow.Request, to: str | None, force: bool, output: Output) -> None:
    from pullback import errors
    from pullback.flows import files as flow

    if to == "-" and output.json:
        fail(errors.UsageError(problem="With --to - standard output is the file's, and has no room for --json"), output)
    with output.progress() as progress:
        fetched = run(flow.get(request, _destination(to), progress, force=force), output)
    for note in (*fetched.notes, *_left_out(fetched)):
        output.note(note)
    if lost := fetched.taken.unread:
        count = fetched.taken.unread_count
        fail(errors.FilesUnreadable(count=count, path=_shown(lost[0].path), reason=lost[0].reason), output)
    if fetched.place != "-":
        output.result("files", _fetched(fetched), [] if output.quiet else [_summary(fetched)])


def _destination(to: str | None) -> Path | BinaryIO | None:
    if to == "-":
        return sys.stdout.buffer
    return Path(to) if to is not None else None


def _left_out(fetched: flow.Fetched) -> list[str]:
    taken = fetched.taken
    told = [f"left out: {_shown(one.path)} ({one.reason})" for one in taken.left_out[:_TOLD]]
    more = taken.left_out_count - len(told)
    return [*told, f"left out: {more} more"] if more > 0 else told


def _summary(fetched: flow.Fetched) -> str:
    from pullback.units import format_duration, format_size

    taken = fetched.taken
    count = f"{taken.files} files, " if taken.files != 1 or taken.directories else ""
    return f"{fetched.place}: {count}{format_size(taken.size)} in {format_duration(fetched.seconds)}"


def _fetched(fetched: flow.Fetched) -> dict[str, object]:
    taken = fetched.taken
    return {
        **_point(fetched.point),
        "path": str(fetched.where),
        "to": fetched.place,
        "archive": fetched.archive,
        "files": taken.files,
        "directories": taken.directories,
        "links": taken.links,
        "size": taken.size,
        "left_out": _missed(taken.left_out),
        "left_out_count": taken.left_out_count,
        "seconds": round(fetched.seconds, 3),
        "notes": list(fetched.notes),
    }


def _missed(things: Sequence[LeftOut]) -> list[dict[str, object]]:
    return [{"path": _shown(one.path), "reason": one.reason} for one in things]


# -- ls --------------------------------------------------------------------------------------


def _point(point: Point) -> dict[str, object]:
    return {"point": point.id, "machine": point.machine, "created": point.created.isoformat()}


def _volumes(found: flow.Volumes) -> dict[str, object]:
    names = ("name", "kind", "size", "content", "label", "uuid", "table", "part_label", "part_uuid")
    rows = [
        {**{name: getattr(one.volume, name) for name in names}, "kind": str(one.volume.kind), "closed": one.closed}
        for one in found.volumes
    ]
    return {**_point(found.point), "volumes": rows}


def _volume_lines(found: flow.Volumes) -> list[str]:
    from pullback.units import format_size

    rows = [("VOLUME", "SIZE", "CONTENT", "LABEL")]
    for one in found.volumes:
        content = one.volume.content or "" if one.closed is None else one.closed
        rows.append((one.volume.name, format_size(one.volume.size), content, one.volume.label or ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}".rstrip() for row in rows]


def _listing(listing: flow.Listing) -> dict[str, object]:
    return {
        **_point(listing.point),
        "path": str(listing.where),
        "entries": [_entry(entry) for entry in listing.entries],
        "unread": [{"path": _shown(one.path), "reason": one.reason} for one in listing.unread],
        "notes": list(listing.notes),
    }


def _entry(entry: Entry) -> dict[str, object]:
    text = entry.name.decode("utf-8", "backslashreplace")
    moment = _moment(entry)
    return {
        "name": text,
        "raw": None if text.encode() == entry.name else base64.b64encode(entry.name).decode(),
        "kind": str(entry.type),
        "mode": f"{entry.mode:04o}",
        "uid": entry.uid,
        "gid": entry.gid,
        "size": entry.size,
        "changed": moment and moment.isoformat(),
        "target": entry.target.decode("utf-8", "backslashreplace") if entry.type == "link" else None,
    }


def _moment(entry: Entry) -> datetime | None:
    try:
        return datetime.fromtimestamp(entry.changed, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _line(entry: Entry) -> str:
    """As `ls -l` has it; what could upset a terminal is written in another way."""
    moment = _moment(entry)
    when = f"{moment.astimezone():%Y-%m-%d %H:%M}" if moment else "?"
    target = f" -> {_shown(entry.target)}" if entry.type == "link" else ""
    return f"{_mode(entry)} {entry.uid:>5} {entry.gid:>5} {entry.size:>12} {when:>16} {_shown(entry.name)}{target}"


def _mode(entry: Entry) -> str:
    import stat

    from pullback.flows.files import LETTERS

    return LETTERS[entry.type] + stat.filemode(entry.mode)[1:]


def _shown(name: bytes) -> str:
    from pullback.model.texts import showable

    return showable(name.decode("utf-8", "backslashreplace"))


def _unread(listing: flow.Listing) -> list[str]:
    return [f"cannot be read: {_shown(one.path)} ({one.reason})" for one in listing.unread[:_TOLD]]
