"""What `pullback doctor` looks at in a repository. It writes one lock, and removes it at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pullback import errors, repo
from pullback.flows.health import Check, Subject
from pullback.flows.repositories import Access, opened
from pullback.model import urls
from pullback.model.points import Point
from pullback.repo import unlocking
from pullback.units import GiB, MiB, format_size

#: Clocks that differ by this are worth a word: restore points are sorted, and kept, by their times.
_CLOCK = timedelta(minutes=1)
#: Free space of a directory's file system: less than this part, and less than this, is a warning.
_FREE_PART, _FREE_BYTES = 20, 10 * GiB
#: Less than this is a problem: a backup needs some packs.
_FREE_LEAST = 256 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A repository to be looked at."""

    #: What the user calls it.
    label: str
    place: urls.Repository
    access: Access


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What was found."""

    #: Its id, which owns checkpoints; None: it could not be opened.
    id: str | None
    checks: tuple[Check, ...]
    #: The newest point of each machine.
    newest: Mapping[str, Point]


def look(place: Place) -> Looked:
    """Look at it. Blocking."""
    subject = Subject(area="repository", subject=place.label)
    checks: list[Check] = []
    newest: dict[str, Point] = {}
    identity = None
    try:
        with opened(place.place, place.access) as repository:
            identity = repository.id
            checks.append(subject.ok("access", f"it can be opened ({place.place.url})"))
            checks += _points(subject, repository, newest)
            if isinstance(repository, repo.ResticRepository):
                checks += _restic(subject, repository)
    except errors.NoRepository as error:
        checks.append(_missing(subject, place, error))
    except errors.PullbackError as error:
        checks.append(subject.failed("access" if identity is None else "content", error))
    path = _local(place.place)
    if path is not None and path.is_dir():
        checks += _file_system(subject, path, writes=isinstance(place.place, urls.DirectoryRepository))
    return Looked(id=identity, checks=tuple(checks), newest=newest)


def _missing(subject: Subject, place: Place, error: errors.NoRepository) -> Check:
    if isinstance(place.place, urls.DirectoryRepository):
        return subject.warning("access", "there is none yet; the first backup makes it", None)
    return subject.problem("access", str(error).rstrip("."), f"`pullback init -r {place.label}` makes one.")


def _local(place: urls.Repository) -> Path | None:
    if isinstance(place, urls.DirectoryRepository):
        return place.path
    return place.location.path if isinstance(place.location, urls.LocalPlace) else None


def _points(subject: Subject, repository: repo.Repository, newest: dict[str, Point]) -> Iterator[Check]:
    damaged = list(repository.strays())
    count = 0
    for machine in repository.machines():
        listing = repository.listing(machine)
        count += len(listing.points)
        damaged += listing.damaged
        if listing.points:
            newest[machine] = listing.points[-1]
    if damaged:
        finding = f"{len(damaged)} restore point(s) cannot be used, such as {damaged[0].id}: {damaged[0].problem}"
        yield subject.problem("points", finding, "`pullback verify --all` tells what is sound.")
    else:
        yield subject.ok("points", f"{count} restore point(s) of {len(newest)} machine(s) are listed")


def _restic(subject: Subject, repository: repo.ResticRepository) -> Iterator[Check]:
    assert repository.index is not None  # loading it finds what of it is damaged
    for problem in repository.problems:
        yield subject.problem("index", problem, "`pullback verify --read-data`, then the next backup, mend it.")
    if not repository.compresses:
        remedy = "restic migrate upgrade_repo_v2"
        yield subject.warning("format", "it has version 1 of the format, which compresses nothing", remedy)
    yield from _locks(subject, repository)


def _locks(subject: Subject, repository: repo.ResticRepository) -> Iterator[Check]:
    try:
        found = unlocking.look(repository)
    except errors.PullbackError as error:
        yield subject.failed("writing", error)
        return
    yield subject.ok("writing", "a lock was written and removed")
    stale = [seen for seen in found.seen if seen.stale]
    if stale:
        finding = f"{len(stale)} lock(s) are left of dead processes: {stale[0].held}"
        yield subject.warning("locks", finding, f"`pullback unlock -r {subject.subject}` removes them.")
    for seen in found.seen:
        if not seen.stale and (seen.held.lock is None or seen.held.lock.exclusive):
            yield subject.warning("locks", f"nobody else can use it: {seen.held}", "Wait until that is through.")
    if not found.seen:
        yield subject.ok("locks", "nobody holds a lock")
    if abs(found.ahead) > _CLOCK:
        word = "ahead of" if found.ahead > timedelta(0) else "behind"
        seconds = f"{abs(found.ahead).total_seconds():.0f} s"
        yield subject.warning("clock", f"its clock is {seconds} {word} ours", "Set both by NTP.")


def _file_system(subject: Subject, path: Path, *, writes: bool) -> Iterator[Check]:
    if writes:
        if os.access(path, os.W_OK | os.X_OK):
            yield subject.ok("writing", "its directory can be written to")
        else:
            yield subject.problem("writing", "its directory cannot be written to", "Run as the user who owns it.")
    usage = shutil.disk_usage(path)
    finding = f"{format_size(usage.free)} of {format_size(usage.total)} are free"
    remedy = "Make room: `pullback forget --prune`, or a larger file system."
    if usage.free < _FREE_LEAST:
        yield subject.problem("room", finding, remedy)
    elif usage.free < min(_FREE_BYTES, usage.total // _FREE_PART):
        yield subject.warning("room", finding, remedy)
    else:
        yield subject.ok("room", finding)


def ages(place: Place, newest: Mapping[str, Point], machines: Sequence[str], limit: timedelta) -> Iterator[Check]:
    """Is there a recent point of each of these machines?"""
    subject = Subject(area="repository", subject=place.label)
    now = datetime.now(UTC)
    for machine in machines:
        if machine not in newest:
            finding = f"there is no restore point of {machine}"
            yield subject.warning("age", finding, "Is its backup run at all? systemctl list-timers")
            continue
        age = now - newest[machine].created
        finding = f"the newest point of {machine} is {_in_words(age)} old"
        if age > limit:
            yield subject.warning("age", finding, "Did its backups fail? journalctl -u 'pullback*'")
        elif age < -_CLOCK:
            yield subject.warning("age", f"the newest point of {machine} is of the future", "Is the clock right?")
        else:
            yield subject.ok("age", finding)


def _in_words(age: timedelta) -> str:
    hours = age / timedelta(hours=1)
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{max(hours, 0):.1f} hours"
