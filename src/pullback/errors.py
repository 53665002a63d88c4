"""Every error that Pullback raises, grouped by what the caller can do next.

One root, `PullbackError`. A class carries a stable `code`, an exit code, a sentence (a template
over its facts) and, where there is a remedy, a hint. The facts are dataclass fields, so programs
read attributes and never parse sentences. The table in `docs/exit-codes.md` is generated from
this module (`python -m pullback.cli.exitcodes`), and a test keeps it true.

    PullbackError
     ├─ UsageError              the request is wrong: change it                         exit 2
     ├─ BusyError               somebody else is at it: wait, or ask them               exit 11
     ├─ NoRepository            nothing to work with at that place                      exit 10
     ├─ VerificationFailed      the data is not what was stored: do not use it          exit 13
     ├─ UnreachableError        the machine cannot be talked to: mend the connection    exit 1
     ├─ RefusedError            QEMU (or a program) said no: nothing was done           exit 1
     ├─ OutcomeUnknown          the answer never came: query before you retry           exit 1
     ├─ ResourceError           space or files are missing: make room                   exit 1
     ├─ SnapshotBroken          the frozen view died, the guest lives: run again        exit 1
     └─ Interrupted             a signal; everything was cleaned up                     exit 130/143
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import ClassVar


class Exit(enum.IntEnum):
    """Exit codes of the command line, each with its meaning as documentation."""

    DONE = 0, "done (also: a first backup, a new disk, a disk that cannot be tracked, each noted)"
    FAILED = 1, "failed; no restore point and no disk is left half made"
    USAGE = 2, "the command line, or what it names, is wrong"
    WARNED = 3, "done, but a chain that should have continued did not (`--strict` makes it 1); of `doctor`: warnings only"
    NO_REPOSITORY = 10, "there is no repository at that place"
    BUSY = 11, "locked or busy: another job, another client, another tool"
    WRONG_PASSWORD = 12, "the repository's password is wrong"
    VERIFICATION = 13, "verification failed: the stored data is damaged"
    INTERRUPTED = 130, "interrupted by Ctrl-C (SIGINT), cleaned up"
    TERMINATED = 143, "interrupted by SIGTERM, cleaned up"

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Exit:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member


@dataclass(kw_only=True, eq=False)
class PullbackError(Exception):
    """Root of all errors. `str()` is one sentence; `hint` a remedy or None; `facts()` the evidence."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[Exit] = Exit.FAILED
    sentence: ClassVar[str] = "Something failed."
    remedy: ClassVar[str | None] = None

    def facts(self) -> dict[str, object]:
        """The facts by name, as they were given."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        return self.sentence.format(**self.facts())

    @property
    def hint(self) -> str | None:
        """What the user can do about it, if there is anything."""
        return self.remedy.format(**self.facts()) if self.remedy else None

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.facts()))


def _rebuild(kind: type[PullbackError], facts: dict[str, object]) -> PullbackError:
    return kind(**facts)


# -- usage: change the request ---------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class UsageError(PullbackError):
    """The request itself is wrong; `problem` says how, as a sentence without its full stop."""

    code: ClassVar[str] = "usage"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "{problem}."
    problem: str


@dataclass(kw_only=True, eq=False)
class BadUrl(PullbackError):
    """A machine or repository name that cannot be understood."""

    code: ClassVar[str] = "bad-url"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "{url!r} does not name a {kind}: {problem}."
    remedy: ClassVar[str | None] = "{example}"
    url: str
    kind: str
    problem: str
    example: str


@dataclass(kw_only=True, eq=False)
class BadConfig(PullbackError):
    """The configuration file, or one that it names, breaks a rule; `key` says where: `machines.web01.scratch`."""

    code: ClassVar[str] = "bad-config"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "{path}: {key} {problem}."
    remedy: ClassVar[str | None] = "{way_out}"
    path: str
    key: str
    problem: str
    way_out: str


@dataclass(kw_only=True, eq=False)
class NotConfigured(PullbackError):
    """A machine or repository was named that the configuration does not have."""

    code: ClassVar[str] = "not-configured"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "There is no {kind} {name!r} in {path}."
    remedy: ClassVar[str | None] = "{known}"
    kind: str
    name: str
    path: str
    known: str


@dataclass(kw_only=True, eq=False)
class UnknownDisk(PullbackError):
    """A disk was asked for that the machine or the restore point does not have."""

    code: ClassVar[str] = "unknown-disk"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "There is no disk {target!r} in {where}."
    remedy: ClassVar[str | None] = "The disks there: {known}."
    target: str
    where: str
    known: str


@dataclass(kw_only=True, eq=False)
class NoDisks(PullbackError):
    """Nothing is left to back up after the selection."""

    code: ClassVar[str] = "no-disks"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "No disk of {machine} is to be backed up."
    remedy: ClassVar[str | None] = "`pullback info` shows the disks; name one with --disk to include it."
    machine: str


@dataclass(kw_only=True, eq=False)
class UnknownPoint(PullbackError):
    """No restore point answers to that name."""

    code: ClassVar[str] = "unknown-point"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "There is no restore point {point!r} in {repository}."
    remedy: ClassVar[str | None] = "`pullback list -r dir:{repository}` shows what is there."
    point: str
    repository: str


@dataclass(kw_only=True, eq=False)
class AmbiguousPoint(PullbackError):
    """A restore point's name fits several, or the machine must be named."""

    code: ClassVar[str] = "ambiguous-point"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "{point!r} fits more than one restore point: {candidates}."
    remedy: ClassVar[str | None] = "Give more of the id, or name the machine with --machine."
    point: str
    candidates: str


@dataclass(kw_only=True, eq=False)
class MachineUnnamed(PullbackError):
    """QEMU was started with neither -name nor -uuid, so restore points could be mixed up."""

    code: ClassVar[str] = "machine-unnamed"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "The QEMU behind {socket} has neither a name nor a uuid."
    remedy: ClassVar[str | None] = "Give it one for the repository: --name NAME (or start QEMU with -name)."
    socket: str


@dataclass(kw_only=True, eq=False)
class ImagesUnnamed(PullbackError):
    """A machine that is off is named by its images, and they do not say what it is called."""

    code: ClassVar[str] = "images-unnamed"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "Images do not say the name of their machine."
    remedy: ClassVar[str | None] = "Give the one that its restore points are filed under: --name NAME."


@dataclass(kw_only=True, eq=False)
class ImageUnusable(PullbackError):
    """A disk image that cannot be opened as it is."""

    code: ClassVar[str] = "image-unusable"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "The image {path} cannot be used: {reason}."
    remedy: ClassVar[str | None] = "{way_out}"
    path: str
    reason: str
    way_out: str = "Name a qcow2 or raw file, or a block device."


@dataclass(kw_only=True, eq=False)
class ForeignManager(PullbackError):
    """The QEMU process is under another manager, whose node names and jobs we would upset."""

    code: ClassVar[str] = "foreign-manager"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "The QEMU behind {socket} is managed by {manager}: its own monitor is not ours to use."
    remedy: ClassVar[str | None] = "Back it up through {manager} instead (virDomainBackupBegin)."
    socket: str
    manager: str


@dataclass(kw_only=True, eq=False)
class DestinationExists(PullbackError):
    """A restore would overwrite something."""

    code: ClassVar[str] = "destination-exists"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "{path} exists already."
    remedy: ClassVar[str | None] = "Choose another --to, or allow it with --force."
    path: str


@dataclass(kw_only=True, eq=False)
class NotARepository(PullbackError):
    """A directory that holds something which is not ours."""

    code: ClassVar[str] = "not-a-repository"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "{path} is not empty and is no Pullback directory ({problem})."
    remedy: ClassVar[str | None] = "Name an empty or new directory: -r dir:/path."
    path: str
    problem: str


@dataclass(kw_only=True, eq=False)
class RepositoryExists(PullbackError):
    """A repository was to be created where one is."""

    code: ClassVar[str] = "repository-exists"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "There is a repository at {path} already."
    remedy: ClassVar[str | None] = "Use it, or name another place."
    path: str


@dataclass(kw_only=True, eq=False)
class NoPassword(PullbackError):
    """An encrypted repository's password was not given."""

    code: ClassVar[str] = "no-password"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "No password is given for the repository {repository}."
    remedy: ClassVar[str | None] = (
        "Put it into a file that only you can read, and name that in PULLBACK_PASSWORD_FILE; "
        "or a command that prints it in PULLBACK_PASSWORD_COMMAND."
    )
    repository: str


@dataclass(kw_only=True, eq=False)
class PasswordUnavailable(PullbackError):
    """What was to give the password does not."""

    code: ClassVar[str] = "password-unavailable"
    sentence: ClassVar[str] = "{source} gives no password: {reason}."
    source: str
    reason: str


@dataclass(kw_only=True, eq=False)
class RepositoryTooNew(PullbackError):
    """The repository was written by a later Pullback."""

    code: ClassVar[str] = "repository-too-new"
    sentence: ClassVar[str] = "{path} has format {found}; this Pullback knows up to {known}."
    remedy: ClassVar[str | None] = "Use a newer Pullback."
    path: str
    found: int
    known: int


@dataclass(kw_only=True, eq=False)
class BadDocument(PullbackError):
    """An XML or JSON document (domainbackup, domaincheckpoint …) that breaks a rule; `field` says where."""

    code: ClassVar[str] = "bad-document"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "{document}: {field} {problem}."
    document: str
    field: str
    problem: str


@dataclass(kw_only=True, eq=False)
class InsecureExport(PullbackError):
    """TCP without TLS was asked for, and not by name."""

    code: ClassVar[str] = "insecure-export"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "An export at {address} without TLS would show the disks to whoever can connect."
    remedy: ClassVar[str | None] = "Give TLS credentials (--tls-x509, --tls-psk), or say --insecure if it is meant."
    address: str


@dataclass(kw_only=True, eq=False)
class ExportExists(PullbackError):
    """An export of that name is there already."""

    code: ClassVar[str] = "export-exists"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "There is an export {name!r} already."
    remedy: ClassVar[str | None] = "Stop it (`pullback export stop`), or give another name."
    name: str


@dataclass(kw_only=True, eq=False)
class NoExport(PullbackError):
    """There is no export of that name."""

    code: ClassVar[str] = "no-export"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "{machine} has no export {name!r}."
    remedy: ClassVar[str | None] = "`pullback export list` shows those that are there."
    machine: str
    name: str


@dataclass(kw_only=True, eq=False)
class SnapshotExists(PullbackError):
    """A snapshot of that name is there already."""

    code: ClassVar[str] = "snapshot-exists"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "{machine} has a snapshot {name!r} already."
    remedy: ClassVar[str | None] = "Delete it (`pullback snapshot delete`), or give another name."
    machine: str
    name: str


@dataclass(kw_only=True, eq=False)
class NoSnapshot(PullbackError):
    """There is no snapshot of that name."""

    code: ClassVar[str] = "no-snapshot"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "{machine} has no snapshot {name!r}."
    remedy: ClassVar[str | None] = "`pullback snapshot list` shows those that are there."
    machine: str
    name: str


@dataclass(kw_only=True, eq=False)
class NoJob(PullbackError):
    """No backup job runs on the machine (libvirt: VIR_ERR_NO_DOMAIN_BACKUP)."""

    code: ClassVar[str] = "no-job"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "No backup job runs on {machine}."
    remedy: ClassVar[str | None] = "`pullback job begin` starts one."
    machine: str


@dataclass(kw_only=True, eq=False)
class DestinationUnusable(PullbackError):
    """A push, or a restore, cannot write there."""

    code: ClassVar[str] = "destination-unusable"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "{place} cannot take disk {target}: {reason}."
    remedy: ClassVar[str | None] = "{way_out}"
    place: str
    target: str
    reason: str
    way_out: str = "Name another destination."


# -- no repository ---------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class NoRepository(PullbackError):
    """Reading from a place where no repository is."""

    code: ClassVar[str] = "no-repository"
    exit_code: ClassVar[Exit] = Exit.NO_REPOSITORY
    sentence: ClassVar[str] = "There is no repository at {path}."
    remedy: ClassVar[str | None] = "Check -r; `pullback backup` creates a dir: repository at its first run."
    path: str


@dataclass(kw_only=True, eq=False)
class NoPoints(PullbackError):
    """The repository is there, but holds no restore point."""

    code: ClassVar[str] = "no-restore-points"
    exit_code: ClassVar[Exit] = Exit.NO_REPOSITORY
    sentence: ClassVar[str] = "{path} holds no restore point{of_machine}."
    remedy: ClassVar[str | None] = "Make one with `pullback backup MACHINE -r dir:{path}`."
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


# -- refused and unknown ---------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class RefusedError(PullbackError):
    """QEMU answered a command with an error: the command did nothing."""

    code: ClassVar[str] = "qemu-refused"
    sentence: ClassVar[str] = "QEMU refused {command}: {reason}."
    command: str
    reason: str
    error_class: str = "GenericError"


@dataclass(kw_only=True, eq=False)
class OutcomeUnknown(PullbackError):
    """The connection was lost, or the deadline passed, before the answer came: it may have happened."""

    code: ClassVar[str] = "outcome-unknown"
    sentence: ClassVar[str] = "No answer to {command}: {reason}. Whether it happened is not known."
    remedy: ClassVar[str | None] = "Run the command again: it first finds and removes what is left."
    command: str
    reason: str


@dataclass(kw_only=True, eq=False)
class BadReply(PullbackError):
    """QEMU, an NBD server or a program answered something that the protocol does not allow."""

    code: ClassVar[str] = "bad-reply"
    sentence: ClassVar[str] = "{who} answered something unexpected: {problem}."
    who: str
    problem: str


@dataclass(kw_only=True, eq=False)
class Unsupported(PullbackError):
    """This QEMU, or this disk, cannot do what is needed."""

    code: ClassVar[str] = "unsupported"
    sentence: ClassVar[str] = "{what} cannot be done here: {reason}."
    remedy: ClassVar[str | None] = "{way_out}"
    what: str
    reason: str
    way_out: str = "`pullback info` shows what this QEMU can do."


@dataclass(kw_only=True, eq=False)
class ProgramFailed(PullbackError):
    """A program that we run ended with an error."""

    code: ClassVar[str] = "program-failed"
    sentence: ClassVar[str] = "{program} failed ({status}): {message}"
    program: str
    status: str
    message: str


@dataclass(kw_only=True, eq=False)
class ProgramMissing(PullbackError):
    """A program or library that we need is not installed."""

    code: ClassVar[str] = "program-missing"
    sentence: ClassVar[str] = "{program} is not installed."
    remedy: ClassVar[str | None] = "apt-get install {package}"
    program: str
    package: str


@dataclass(kw_only=True, eq=False)
class QuiesceFailed(PullbackError):
    """The guest's file systems had to be frozen, and could not be."""

    code: ClassVar[str] = "quiesce-failed"
    sentence: ClassVar[str] = "The guest's file systems cannot be frozen: {reason}."
    remedy: ClassVar[str | None] = "Is qemu-guest-agent running in the guest? Without it: --quiesce try, or no."
    reason: str


# -- stores of a repository ------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class StoreUnreachable(PullbackError):
    """The server, or the file system, of a repository does not answer, or not for long enough."""

    code: ClassVar[str] = "store-unreachable"
    sentence: ClassVar[str] = "The repository {store} cannot be reached: {reason}."
    remedy: ClassVar[str | None] = "Restore points in it are as they were. Run the command again when it answers."
    store: str
    reason: str


@dataclass(kw_only=True, eq=False)
class StoreRefused(PullbackError):
    """The server of a repository says no: credentials, bucket, rights."""

    code: ClassVar[str] = "store-refused"
    sentence: ClassVar[str] = "The repository {store} refused {what}: {reason}."
    remedy: ClassVar[str | None] = "{way_out}"
    store: str
    what: str
    reason: str
    way_out: str = "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and what they may do with the bucket."


@dataclass(kw_only=True, eq=False)
class StoreFailed(PullbackError):
    """Reading or writing a repository's file failed."""

    code: ClassVar[str] = "store-failed"
    sentence: ClassVar[str] = "{what} failed in the repository {store}: {reason}."
    store: str
    what: str
    reason: str


@dataclass(kw_only=True, eq=False)
class AlreadyStored(PullbackError):
    """A file that had to be new is in the repository already."""

    code: ClassVar[str] = "already-stored"
    exit_code: ClassVar[Exit] = Exit.BUSY
    sentence: ClassVar[str] = "The repository {store} has {name} already: somebody else was faster."
    store: str
    name: str


@dataclass(kw_only=True, eq=False)
class HookFailed(PullbackError):
    """A program of the user's that runs before a backup failed, so there was no backup."""

    code: ClassVar[str] = "hook-failed"
    sentence: ClassVar[str] = "The {hook} hook of {machine} failed: {problem}."
    remedy: ClassVar[str | None] = "Nothing was backed up. What the hook said stands above."
    hook: str
    machine: str
    problem: str


# -- resources -------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class ScratchSpace(PullbackError):
    """Too little room for scratch, before or during the job."""

    code: ClassVar[str] = "scratch-space"
    sentence: ClassVar[str] = "{path} has {free} free; scratch needs at least {needed} there."
    remedy: ClassVar[str | None] = "Make room, or name another directory with --scratch."
    path: str
    free: str
    needed: str


@dataclass(kw_only=True, eq=False)
class ScratchUnsuitable(PullbackError):
    """A scratch directory that could hang the guest, or that QEMU cannot use."""

    code: ClassVar[str] = "scratch-unsuitable"
    sentence: ClassVar[str] = "{path} cannot hold scratch: {reason}."
    remedy: ClassVar[str | None] = "Name a directory on a local file system with --scratch."
    path: str
    reason: str


@dataclass(kw_only=True, eq=False)
class DestinationFull(PullbackError):
    """The place where data goes has no room left."""

    code: ClassVar[str] = "destination-full"
    sentence: ClassVar[str] = "There is no room left for {path}."
    remedy: ClassVar[str | None] = "Make room there and run the command again: nothing was kept of this attempt."
    path: str


@dataclass(kw_only=True, eq=False)
class CannotWrite(PullbackError):
    """A file or directory of ours cannot be made or written."""

    code: ClassVar[str] = "cannot-write"
    sentence: ClassVar[str] = "Cannot write {path}: {reason}."
    path: str
    reason: str


@dataclass(kw_only=True, eq=False)
class EndpointFailed(PullbackError):
    """Reading or writing disk data failed."""

    code: ClassVar[str] = "io-failed"
    sentence: ClassVar[str] = "{operation} failed on {endpoint} at offset {offset}: {reason}."
    operation: str
    endpoint: str
    offset: int
    reason: str
    errno: int = 0


@dataclass(kw_only=True, eq=False)
class EndpointTimeout(PullbackError):
    """A disk's server did not answer in time."""

    code: ClassVar[str] = "io-timeout"
    sentence: ClassVar[str] = "{endpoint} did not answer within {seconds:g} s ({operation})."
    operation: str
    endpoint: str
    seconds: float


# -- the snapshot ----------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class SnapshotBroken(PullbackError):
    """The frozen view died (scratch failed) so that the guest could go on."""

    code: ClassVar[str] = "snapshot-broken"
    sentence: ClassVar[str] = (
        "The snapshot of disk {target} broke: {reason}. The guest was not hurt, the backup is void."
    )
    remedy: ClassVar[str | None] = "Run the backup again; give scratch more room or a faster place with --scratch."
    target: str
    reason: str


@dataclass(kw_only=True, eq=False)
class PushFailed(PullbackError):
    """The hypervisor could not copy a disk to its destination; all of the push is undone."""

    code: ClassVar[str] = "push-failed"
    sentence: ClassVar[str] = "Disk {target} could not be copied to {place}: {reason}."
    remedy: ClassVar[str | None] = "Nothing was kept of this attempt, and no checkpoint was lost. Run it again."
    target: str
    place: str
    reason: str


@dataclass(kw_only=True, eq=False)
class MachineGone(PullbackError):
    """QEMU ended, or its monitor was lost, in the middle of a job."""

    code: ClassVar[str] = "machine-gone"
    sentence: ClassVar[str] = "The machine {machine} went away: {reason}."
    remedy: ClassVar[str | None] = "Start it and run the command again."
    machine: str
    reason: str


@dataclass(kw_only=True, eq=False)
class CheckpointsNotStored(PullbackError):
    """Changed checkpoints could not be written into their image."""

    code: ClassVar[str] = "checkpoints-not-stored"
    sentence: ClassVar[str] = "The checkpoints of {path} could not be stored in it: {reason}."
    remedy: ClassVar[str | None] = (
        "No restore point is hurt. If they are lost, the next backup says so, and reads the disk whole."
    )
    path: str
    reason: str


@dataclass(kw_only=True, eq=False)
class OverlayNotCommitted(PullbackError):
    """An overlay is still on top of its disk; of what was copied into the image below, nothing is seen."""

    code: ClassVar[str] = "overlay-not-committed"
    sentence: ClassVar[str] = "The overlay {overlay} was not committed into {base}: {reason}."
    remedy: ClassVar[str | None] = "The machine runs on it as before. Try again when that is mended."
    overlay: str
    base: str
    reason: str


@dataclass(kw_only=True, eq=False)
class CleanupIncomplete(PullbackError):
    """Something of ours is still in QEMU, because removing it now would be dangerous or is refused."""

    code: ClassVar[str] = "cleanup-incomplete"
    sentence: ClassVar[str] = "Left in QEMU for now: {what}, because {reason}."
    remedy: ClassVar[str | None] = "The next run, or `pullback untrack MACHINE`, tries again."
    what: str
    reason: str


# -- checkpoints -----------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class NoCheckpoint(PullbackError):
    """No checkpoint of the machine has that name."""

    code: ClassVar[str] = "no-checkpoint"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "There is no checkpoint {checkpoint!r} of {machine}."
    remedy: ClassVar[str | None] = "`pullback checkpoint list` shows what is there."
    checkpoint: str
    machine: str


@dataclass(kw_only=True, eq=False)
class CheckpointExists(PullbackError):
    """A checkpoint of that name is there already."""

    code: ClassVar[str] = "checkpoint-exists"
    exit_code: ClassVar[Exit] = Exit.USAGE
    sentence: ClassVar[str] = "There is a checkpoint {checkpoint!r} of {machine} already."
    remedy: ClassVar[str | None] = "Choose another name, or delete that one first."
    checkpoint: str
    machine: str


@dataclass(kw_only=True, eq=False)
class CheckpointInconsistent(PullbackError):
    """A checkpoint is of no use on a disk: its bitmap there is missing, or cannot be trusted."""

    code: ClassVar[str] = "checkpoint-inconsistent"
    sentence: ClassVar[str] = "Checkpoint {checkpoint} cannot be used on disk {target}: {problem}."
    remedy: ClassVar[str | None] = "Read that disk whole, and delete the checkpoint."
    checkpoint: str
    target: str
    problem: str


# -- verification ----------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class VerificationFailed(PullbackError):
    """What is stored is not what was backed up."""

    code: ClassVar[str] = "verification-failed"
    exit_code: ClassVar[Exit] = Exit.VERIFICATION
    sentence: ClassVar[str] = "Restore point {point} is damaged: {problem}."
    remedy: ClassVar[str | None] = (
        "Do not use it. Which points are sound: `pullback verify --all`. Start afresh: `pullback backup --level full`."
    )
    point: str
    problem: str


@dataclass(kw_only=True, eq=False)
class RepositoryChanged(PullbackError):
    """Somebody removed from the repository, under our lock, what a new restore point was to rely on."""

    code: ClassVar[str] = "repository-changed"
    sentence: ClassVar[str] = "Data that this backup relies on was removed from the repository {repository} meanwhile."
    remedy: ClassVar[str | None] = (
        "Nothing was kept of this attempt, and no checkpoint was lost: run it again. "
        "`restic unlock --remove-all` is not for repositories that are in use."
    )
    repository: str


@dataclass(kw_only=True, eq=False)
class ObjectMissing(PullbackError):
    """A file of the repository is not there."""

    code: ClassVar[str] = "object-missing"
    exit_code: ClassVar[Exit] = Exit.VERIFICATION
    sentence: ClassVar[str] = "The repository {store} has no {name}."
    remedy: ClassVar[str | None] = "Which restore points are sound: `pullback verify --all`."
    store: str
    name: str


@dataclass(kw_only=True, eq=False)
class ObjectDamaged(PullbackError):
    """A file of the repository has not the size that it must have."""

    code: ClassVar[str] = "object-damaged"
    exit_code: ClassVar[Exit] = Exit.VERIFICATION
    sentence: ClassVar[str] = "{name} in the repository {store} is damaged: {problem}."
    remedy: ClassVar[str | None] = "Which restore points are sound: `pullback verify --all`."
    store: str
    name: str
    problem: str


@dataclass(kw_only=True, eq=False)
class RepositoryDamaged(PullbackError):
    """What a repository's file holds is not what was written; `file` is its place, such as "index/1f2e3d4c…"."""

    code: ClassVar[str] = "repository-damaged"
    exit_code: ClassVar[Exit] = Exit.VERIFICATION
    sentence: ClassVar[str] = "The repository's file {file} is damaged: {problem}."
    remedy: ClassVar[str | None] = "`pullback verify --read-data` tells which restore points it touches."
    file: str
    problem: str


@dataclass(kw_only=True, eq=False)
class DestinationDiffers(PullbackError):
    """What was restored does not read back as it was written."""

    code: ClassVar[str] = "destination-differs"
    exit_code: ClassVar[Exit] = Exit.VERIFICATION
    sentence: ClassVar[str] = "{place} does not give back what was written to it: {problem}."
    remedy: ClassVar[str | None] = "The restore point is sound: restore it to another place, and look after that one."
    place: str
    problem: str


# -- signals ---------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class Interrupted(PullbackError):
    """Ctrl-C; cleaned up."""

    code: ClassVar[str] = "interrupted"
    exit_code: ClassVar[Exit] = Exit.INTERRUPTED
    sentence: ClassVar[str] = "Interrupted; everything was cleaned up."


@dataclass(kw_only=True, eq=False)
class Terminated(PullbackError):
    """SIGTERM; cleaned up."""

    code: ClassVar[str] = "terminated"
    exit_code: ClassVar[Exit] = Exit.TERMINATED
    sentence: ClassVar[str] = "Terminated; everything was cleaned up."


def catalogue() -> list[type[PullbackError]]:
    """All error classes, in the order in which they are written here."""
    found = [PullbackError]
    for kind in found:
        found.extend(kind.__subclasses__())
    return found
