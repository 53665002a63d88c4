"""The request, or what it names, is wrong: change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pullback.errors.root import Exit, PullbackError

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
