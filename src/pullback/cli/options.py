"""Options that several commands share, with the same words everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pullback.model.backups import Fleecing, Quiesce, Quiescing

Machine = Annotated[
    str,
    typer.Argument(
        metavar="MACHINE",
        help="A QEMU process, by its QMP socket (qmp:/run/web01.sock), or a machine that is off, by its images "
        "(images:vda=/srv/a.qcow2,vdb=raw:/srv/b.raw).",
    ),
]
Machines = Annotated[
    list[str],
    typer.Argument(
        metavar="MACHINE...",
        help="QEMU processes, by their QMP sockets (qmp:/run/web01.sock), machines that are off, by their images "
        "(images:vda=/srv/a.qcow2,vdb=raw:/srv/b.raw), or configured names.",
    ),
]
Point = Annotated[
    str,
    typer.Argument(
        metavar="POINT",
        help="An id, the start of one, 'latest', or a date in local time (the last point not after it).",
    ),
]
#: Where another argument follows.
PointFirst = Annotated[
    str,
    typer.Argument(
        metavar="POINT",
        help="An id, the start of one, 'latest', or a date in local time (the last point not after it).",
    ),
]
_REPOSITORY_HELP = (
    "Where restore points are kept: a repository in restic's format (/path, s3:https://host/bucket/prefix), a plain "
    "directory of images (dir:/path), or a configured name. Without it: PULLBACK_REPOSITORY, RESTIC_REPOSITORY, or "
    "what is configured."
)
Repository = Annotated[
    str | None,
    typer.Option("--repository", "-r", metavar="REPO", help=_REPOSITORY_HELP),
]
Repositories = Annotated[
    list[str] | None,
    typer.Option(
        "--repository",
        "-r",
        metavar="REPO",
        help=_REPOSITORY_HELP,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="The configuration (default: /etc/pullback/config.toml)."),
]
LimitRate = Annotated[
    str | None,
    typer.Option(
        "--limit-rate",
        metavar="RATE",
        help="So much a second at most (10M, 500K): of what a backup sends (to a dir: repository, of what it reads), "
        "of the disks that a restore writes, and of the data that verify reads.",
    ),
]
Parallel = Annotated[
    int | None,
    typer.Option(
        "--parallel",
        "-p",
        metavar="N",
        min=1,
        max=64,
        help="So many at a time: machines in a backup (otherwise 1), disks in a restore.",
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
Quiesces = Annotated[
    Quiesce | None,
    typer.Option(
        "--quiesce",
        help="Freeze the guest's file systems for the instant: no, try, or require. "
        "Without it a backup tries where a guest agent runs, and a checkpoint alone does not.",
    ),
]
Agent = Annotated[
    Path | None,
    typer.Option("--agent", metavar="SOCKET", help="The guest agent's unix socket, where QEMU does not tell it."),
]
MountPoints = Annotated[
    list[str] | None,
    typer.Option("--mount-point", "-F", metavar="PATH", help="Freeze only this file system. May be repeated."),
]
Scratch = Annotated[
    Path | None, typer.Option("--scratch", metavar="DIR", help="Where old blocks go meanwhile; on a local file system.")
]
Engine = Annotated[
    Fleecing | None,
    typer.Option("--engine", help="How to freeze; without it, the one that protects the guest best here."),
]
Owner = Annotated[
    int | None,
    typer.Option("--owner", metavar="PID", min=1, help="It ends when this process does, however that ends."),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait", help="Stay until Ctrl-C or SIGTERM, and end it then. A machine that is off is always stayed with."
    ),
]
TlsX509 = Annotated[
    Path | None,
    typer.Option(
        "--tls-x509",
        metavar="DIR",
        help="TLS by certificates, clients' too: ca-cert.pem, server-cert.pem and server-key.pem in this directory.",
    ),
]
TlsPsk = Annotated[
    Path | None,
    typer.Option("--tls-psk", metavar="DIR", help="TLS by keys that both ends know: keys.psk in this directory."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="TCP without TLS is meant: whoever can connect can read the disks.")
]
MaxConnections = Annotated[
    int | None,
    typer.Option(
        "--max-connections",
        metavar="N",
        min=1,
        max=(1 << 32) - 1,
        help="So many clients at a time; counts where this starts the server.",
    ),
]
ListenOn = Annotated[
    str | None, typer.Option("--listen", metavar="HOST[:PORT]", help="Serve on TCP; without a port, on a free one.")
]
SocketAt = Annotated[
    Path | None,
    typer.Option("--socket", metavar="PATH", help="Serve on this unix socket; without it, on a private one."),
]
Patient = Annotated[
    bool,
    typer.Option(
        "--patient", help="Readers wait for a repository that is away, instead of getting I/O errors after a time."
    ),
]
CacheSize = Annotated[
    str | None,
    typer.Option("--cache", metavar="SIZE", help="Keep so much of what was decoded, for all disks (otherwise 256M)."),
]
AsXml = Annotated[bool, typer.Option("--xml", help="As XML, with nothing left open.")]
Follow = Annotated[bool, typer.Option("--follow", help="Go on, and print what is new, until it is over.")]
Interval = Annotated[
    float, typer.Option("--interval", metavar="SECONDS", min=0.2, max=3600, help="With --follow: so often to look.")
]
Sizes = Annotated[bool, typer.Option("--size", help="Count exactly what changed since then, on each disk.")]
StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        envvar="PULLBACK_STATE_DIR",
        help="Directory of job records, locks and scratch (default: /var/lib/pullback, or the XDG ones).",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Do nothing; say what would be done, and why.")]
Points = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="POINT...",
        help="Restore points: ids, starts of them, 'latest', or dates in local time (the last point not after it).",
    ),
]
NewPasswordFile = Annotated[
    Path | None,
    typer.Option(
        "--new-password-file", metavar="FILE", help="The file that holds the new password; without it, you are asked."
    ),
]
MachineNetwork = Annotated[
    str,
    typer.Option(
        "--network",
        metavar="none|isolated|user|bridge=NAME",
        help="What its network cards are connected to: none; isolated (addresses, but no way out); user (through this "
        "host, nobody reaches it); or a bridge of this host.",
    ),
]
MachineMemory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Its memory here (2G), instead of what it had.")
]
MachineCpus = Annotated[
    int | None,
    typer.Option("--cpus", metavar="N", min=1, max=4096, help="Its processors here, instead of those that it had."),
]
Accelerator = Annotated[
    str | None,
    typer.Option("--accel", metavar="kvm|tcg", help="How its processors run; without it, KVM where it is real."),
]
PlainHardware = Annotated[
    bool,
    typer.Option("--plain", help="Devices that every QEMU has, where it does not start with those that it had."),
]
FirmwareFile = Annotated[
    Path | None,
    typer.Option(
        "--firmware", metavar="FILE", help="Firmware to start it with (-bios), where the restore point has none."
    ),
]
KernelFile = Annotated[
    Path | None,
    typer.Option("--kernel", metavar="FILE", help="A kernel to start it with, for a machine that had one of the host."),
]
InitrdFile = Annotated[Path | None, typer.Option("--initrd", metavar="FILE", help="The initramfs of that kernel.")]
KernelWords = Annotated[
    str | None,
    typer.Option("--append", metavar="WORDS", help="The command line of that kernel, instead of the saved one."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes, no progress and no summary.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Where an error came from, too.")]


def quiescing(wish: Quiesce | None, agent: Path | None, mount_points: Sequence[str] | None) -> Quiescing:
    """What `Quiesces`, `Agent` and `MountPoints` say together."""
    return Quiescing(wish=wish, agent=agent.absolute() if agent else None, mount_points=tuple(mount_points or ()))
