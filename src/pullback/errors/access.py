"""There is no repository, the password is wrong, somebody else is at it, or nobody answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pullback.errors.root import Exit, PullbackError

# -- no repository ---------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class NoRepository(PullbackError):
    """Reading from a place where no repository is."""

    code: ClassVar[str] = "no-repository"
    exit_code: ClassVar[Exit] = Exit.NO_REPOSITORY
    sentence: ClassVar[str] = "There is no repository at {path}."
    remedy: ClassVar[str | None] = "Check -r, or make one: `pullback init` (a dir: one is made by its first backup)."
    path: str


@dataclass(kw_only=True, eq=False)
class NoPoints(PullbackError):
    """The repository is there, but holds no restore point."""

    code: ClassVar[str] = "no-restore-points"
    exit_code: ClassVar[Exit] = Exit.NO_REPOSITORY
    sentence: ClassVar[str] = "{path} holds no restore point{of_machine}."
    remedy: ClassVar[str | None] = "Make one: `pullback backup MACHINE`, with the same -r."
    path: str
    of_machine: str = ""


# -- the password ----------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class WrongPassword(PullbackError):
    """No key of the repository opens with the password."""

    code: ClassVar[str] = "wrong-password"
    exit_code: ClassVar[Exit] = Exit.WRONG_PASSWORD
    sentence: ClassVar[str] = "The password is wrong for the repository {path}."
    remedy: ClassVar[str | None] = (
        "Where it comes from: PULLBACK_PASSWORD_FILE, PULLBACK_PASSWORD_COMMAND, RESTIC_PASSWORD…"
    )
    path: str


# -- busy ------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class BusyError(PullbackError):
    """Somebody else is at it; `holder` says who and since when."""

    code: ClassVar[str] = "busy"
    exit_code: ClassVar[Exit] = Exit.BUSY
    sentence: ClassVar[str] = "Somebody else is at work on {what}: {holder}."
    remedy: ClassVar[str | None] = "Wait until that has ended."
    what: str
    holder: str


@dataclass(kw_only=True, eq=False)
class MonitorBusy(PullbackError):
    """The monitor accepts the connection but never greets: another client holds it."""

    code: ClassVar[str] = "monitor-busy"
    exit_code: ClassVar[Exit] = Exit.BUSY
    sentence: ClassVar[str] = (
        "{socket} accepts a connection but did not greet within {seconds:g} s: another client holds it."
    )
    remedy: ClassVar[str | None] = (
        "A QMP socket serves one client. Give QEMU a second one for Pullback: "
        "-qmp unix:/run/NAME-pullback.sock,server=on,wait=off"
    )
    socket: str
    seconds: float


@dataclass(kw_only=True, eq=False)
class NbdServerBusy(PullbackError):
    """QEMU's one NBD server was started by somebody else."""

    code: ClassVar[str] = "nbd-server-busy"
    exit_code: ClassVar[Exit] = Exit.BUSY
    sentence: ClassVar[str] = "QEMU's only NBD server is in use by somebody else ({detail})."
    remedy: ClassVar[str | None] = (
        "Stop it there (nbd-server-stop), or, if it is a private unix socket, share it: --nbd-server unix:/path/to.sock"
    )
    detail: str


@dataclass(kw_only=True, eq=False)
class DiskBusy(PullbackError):
    """A job of somebody else runs on the disk."""

    code: ClassVar[str] = "disk-busy"
    exit_code: ClassVar[Exit] = Exit.BUSY
    sentence: ClassVar[str] = "Disk {target} is in use by {holder}."
    remedy: ClassVar[str | None] = "Wait for it to end, or leave the disk out with --exclude {target}."
    target: str
    holder: str


# -- unreachable -----------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class UnreachableError(PullbackError):
    """The monitor's socket cannot be connected."""

    code: ClassVar[str] = "monitor-unreachable"
    sentence: ClassVar[str] = "Cannot connect to {socket}: {reason}."
    remedy: ClassVar[str | None] = (
        "Is the machine running? QEMU offers the socket with -qmp unix:/path/to.sock,server=on,wait=off"
    )
    socket: str
    reason: str


@dataclass(kw_only=True, eq=False)
class PermissionDenied(PullbackError):
    """A file or socket that this user may not open."""

    code: ClassVar[str] = "permission-denied"
    sentence: ClassVar[str] = "No permission to use {path}."
    remedy: ClassVar[str | None] = "Run as root, or as the user who owns it."
    path: str


@dataclass(kw_only=True, eq=False)
class NotQmp(PullbackError):
    """Something else than QMP answers at the socket."""

    code: ClassVar[str] = "not-qmp"
    sentence: ClassVar[str] = "{socket} does not speak QMP: {reason}."
    remedy: ClassVar[str | None] = "Name the socket of -qmp, not that of -monitor, a console or an agent."
    socket: str
    reason: str
