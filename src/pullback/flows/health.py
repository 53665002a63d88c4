"""What `pullback doctor` finds: values, and the checks of this host."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pullback import errors, state
from pullback.engine import scratch
from pullback.model.disks import Disk
from pullback.model.rollbacks import Phase
from pullback.programs import process, restic
from pullback.state import rollbacks
from pullback.units import format_size


class Status(StrEnum):
    """How it is."""

    OK = "ok"
    #: Backups work, but something should be mended, or known.
    WARNING = "warning"
    #: Something that is wanted does not work.
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    #: programs, configuration, directories, machine or repository.
    area: str
    #: Which one: a program, a directory, a machine, a repository.
    subject: str
    #: What was looked at, in one word that does not change between versions.
    name: str
    status: Status
    #: What was found, as a clause.
    finding: str
    #: What to do about it; None if there is nothing to do.
    remedy: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Makes the checks of one thing."""

    area: str
    subject: str

    def ok(self, name: str, finding: str) -> Check:
        """All is well."""
        return self._check(name, Status.OK, finding, None)

    def warning(self, name: str, finding: str, remedy: str | None = None) -> Check:
        """It works, but."""
        return self._check(name, Status.WARNING, finding, remedy)

    def problem(self, name: str, finding: str, remedy: str | None = None) -> Check:
        """It does not work."""
        return self._check(name, Status.PROBLEM, finding, remedy)

    def failed(self, name: str, error: errors.PullbackError) -> Check:
        """It failed like that."""
        return self.problem(name, str(error).rstrip("."), error.hint)

    def _check(self, name: str, status: Status, finding: str, remedy: str | None) -> Check:
        return Check(area=self.area, subject=self.subject, name=name, status=status, finding=finding, remedy=remedy)


# -- programs --------------------------------------------------------------------------------

#: What each is for, and whether backups of running machines need it.
_PROGRAMS = (
    ("setpriv", "every program that we start", True),
    ("qemu-img", "images and scratch", True),
    ("qemu-storage-daemon", "machines that are off", False),
    ("qemu-nbd", "looking into dir: repositories", False),
)
#: The first with the format's version 2.
_RESTIC = (0, 14)


def programs() -> Iterator[Check]:
    """The programs that we run."""
    for program, purpose, needed in _PROGRAMS:
        subject = Subject(area="programs", subject=program)
        try:
            said = process.run([program, "--version"], timeout=20).decode("utf-8", "replace")
        except errors.PullbackError as error:
            judge = subject.problem if needed else subject.warning
            yield judge("version", f"{str(error).rstrip('.')}; it is needed for {purpose}", error.hint)
            continue
        number = re.search(r"\d+(?:\.\d+)+", said)
        yield subject.ok("version", number[0] if number else "it is there")
    yield _restic()


def _restic() -> Check:
    subject = Subject(area="programs", subject="restic")
    try:
        found = restic.version()
    except errors.PullbackError as error:
        finding = f"{str(error).rstrip('.')}; it is needed for forget and copy"
        return subject.warning("version", finding, error.hint)
    number = ".".join(map(str, found))
    if found < _RESTIC:
        return subject.warning("version", f"{number} does not know this format", "Install restic 0.14 or newer.")
    return subject.ok("version", number)


# -- directories -----------------------------------------------------------------------------


def directories(found: state.Directories) -> Iterator[Check]:
    """Where we keep things."""
    for name, path in (("state", found.state), ("runtime", found.runtime), ("cache", found.cache)):
        yield _directory(name, path)
    yield from _interrupted_rollbacks(found)


def _interrupted_rollbacks(found: state.Directories) -> Iterator[Check]:
    """Disks that nobody may use until a rollback is finished."""
    subject = Subject(area="directories", subject=str(found.state))
    try:
        pending = [journal for journal in rollbacks.every(found.state) if journal.phase is Phase.WRITING]
    except errors.PullbackError as error:
        yield subject.failed("rollback", error)
        return
    yield from (subject.failed("rollback", rollbacks.pending(journal)) for journal in pending)


def _directory(name: str, path: Path) -> Check:
    subject = Subject(area="directories", subject=str(path))
    there = nearest(path)
    writable = os.access(there, os.W_OK | os.X_OK)
    if not there.is_dir() or not writable:
        remedy = "Run as root or as the user who owns it, or name another one with --state-dir."
        return subject.problem(name, f"the {name} directory cannot be written to", remedy)
    if there != path:
        return subject.ok(name, f"the {name} directory is made when it is needed")
    if path.stat().st_mode & stat.S_IWOTH:
        finding = f"every user can write to the {name} directory, and change what we believe"
        return subject.problem(name, finding, f"chmod 700 {path}")
    return subject.ok(name, f"the {name} directory can be used")


def nearest(path: Path) -> Path:
    """The path, or what of it is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def scratch_room(subject: Subject, directory: Path, disks: Sequence[Disk]) -> Check:
    """Is there a good place for the old blocks of these disks?"""
    there = nearest(directory)
    try:
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise errors.PermissionDenied(path=str(directory))
        scratch.judge(there, disks)
    except errors.PullbackError as error:
        return subject.failed("scratch", error)
    free, needed = format_size(scratch.free_bytes(there)), format_size(scratch.needed(disks))
    return subject.ok("scratch", f"scratch in {directory} has {free} free, and must keep {needed}")
