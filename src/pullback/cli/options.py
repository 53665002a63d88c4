"""Options that several commands share, with the same words everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Machine = Annotated[
    str,
    typer.Argument(
        metavar="MACHINE",
        help="A QEMU process, by its QMP socket (qmp:/run/web01.sock), or a machine that is off, by its images "
        "(images:vda=/srv/a.qcow2,vdb=raw:/srv/b.raw).",
    ),
]
Point = Annotated[
    str,
    typer.Argument(
        metavar="POINT",
        help="An id, the start of one, 'latest', or a date in local time (the last point not after it).",
    ),
]
Repository = Annotated[
    str,
    typer.Option(
        "--repository",
        "-r",
        metavar="REPO",
        envvar="PULLBACK_REPOSITORY",
        help="Where restore points are kept (dir:/path).",
    ),
]
MachineName = Annotated[
    str | None,
    typer.Option("--machine", metavar="NAME", help="The machine, where a repository holds several."),
]
Disks = Annotated[
    list[str] | None,
    typer.Option("--disk", "-d", metavar="TARGET", help="Only this disk (vda, sda, …). May be repeated."),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--name", metavar="NAME", help="The machine's name, instead of QEMU's -name or -uuid; needed for images."
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        envvar="PULLBACK_STATE_DIR",
        help="Directory of job records, locks and scratch (default: /var/lib/pullback, or the XDG ones).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes, no progress and no summary.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Where an error came from, too.")]
