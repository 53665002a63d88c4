"""Space, files, stores or disks fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pullback.errors.root import Exit, PullbackError

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
class NotEnoughMemory(PullbackError):
    """A machine that is to start here had more memory than this host has free."""

    code: ClassVar[str] = "not-enough-memory"
    sentence: ClassVar[str] = "{machine} had {wanted} of memory, and this host has {free} free."
    remedy: ClassVar[str | None] = "Say how much it is to have here: --memory."
    machine: str
    wanted: str
    free: str


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
