"""Copying restore points to another repository, by restic: what is there already is not sent again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from pullback import errors, repo
from pullback.flows.managing import Managed, managed, program
from pullback.flows.repositories import Access, require_restic
from pullback.flows.threads import blocking
from pullback.model import urls
from pullback.progress import Cancel, Progress, Silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.Repository
    access: Access = field(default_factory=Access)
    target: urls.Repository
    target_access: Access = field(default_factory=Access)
    #: Points as users name them; empty: all.
    points: tuple[str, ...] = ()
    #: One machine only; None: all.
    machine: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """A restore point that is in both repositories now."""

    machine: str
    created: datetime
    id: str
    #: Its id in the other repository.
    copy: str
    #: It was there before.
    already: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was copied, oldest first."""

    points: tuple[Copied, ...]
    #: Bytes that the other repository has more.
    stored: int
    seconds: float


async def copy(request: Request, progress: Progress | None = None) -> Report:
    """Do it. Raises `UsageError` for one repository twice, `NoPoints`, and the errors of `programs.restic`."""
    begun = time.monotonic()
    reason = "its points are images, and restic's format has other files"
    way_out = "Copy the directory as a whole, while no backup runs; or back up to both repositories (-r twice)."
    source = require_restic(request.repository, "copy", reason, way_out)
    target = require_restic(request.target, "copy", reason, way_out)
    cancel = Cancel()
    work = partial(_copy, request, source, target, progress or Silent(), cancel)
    points, stored = await blocking(work, cancel=cancel)
    return Report(points=points, stored=stored, seconds=time.monotonic() - begun)


def _copy(
    request: Request,
    place: urls.ResticRepository,
    target_place: urls.ResticRepository,
    progress: Progress,
    cancel: Cancel,
) -> tuple[tuple[Copied, ...], int]:
    environ = _environ(place, request.access.environ, target_place, request.target_access.environ)
    with managed(place, request.access, cancel) as source, managed(target_place, request.target_access, cancel) as to:
        if source.repository.config.id == to.repository.config.id:
            raise errors.UsageError(problem=f"{place.url} and {target_place.url} are one repository")
        chosen = _chosen(request, source.repository)
        before = _copies(to.repository)
        missing = [id for id, snapshot in chosen.items() if _origin(id, snapshot) not in before]
        size = _size(to.repository)
        if missing:
            progress.note(f"copying {len(missing)} restore point(s): restic does, point by point")
            access = Access(environ=environ, cache=request.target_access.cache)
            heard = _Counter(progress, len(missing))
            program(to.entry, access, cancel).copy_from(source.entry, missing, on_line=heard.line)
        after = _copies(to.repository)
        copied = [_copied(id, chosen[id], before, after, to) for id in chosen]
        return tuple(sorted(copied, key=lambda one: (one.created, one.id))), max(0, _size(to.repository) - size)


class _Counter:
    """Tells how many points are through, by what restic prints."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def line(self, text: str) -> None:
        """A line of restic's."""
        if text.startswith("snapshot ") and text.rstrip().endswith(" saved"):
            self._done += 1
            self._progress.note(f"{self._done} of {self._total} copied")


def _chosen(request: Request, repository: repo.ResticRepository) -> dict[str, repo.Snapshot]:
    found = repository.snapshots()
    wanted = {repository.identity(text, found, machine=request.machine) for text in request.points}
    chosen = {}
    for id, snapshot in found.items():
        if request.points and id not in wanted:
            continue
        if isinstance(snapshot, errors.PullbackError):
            if request.points:
                raise errors.VerificationFailed(point=id, problem=str(snapshot).rstrip(".")) from snapshot
            continue
        if request.machine in (None, snapshot.hostname):
            chosen[id] = snapshot
    if not chosen:
        raise errors.NoPoints(path=repository.name, of_machine=f" of {request.machine}" if request.machine else "")
    return chosen


def _origin(id: str, snapshot: repo.Snapshot) -> str:
    """The id that it had first: a copy, and one whose tags were changed, tells it."""
    return snapshot.original or id


def _copies(repository: repo.ResticRepository) -> dict[str, str]:
    """The points of a repository by the id that they had first."""
    found = repository.snapshots().items()
    return {_origin(id, snapshot): id for id, snapshot in found if isinstance(snapshot, repo.Snapshot)}


def _copied(
    id: str, snapshot: repo.Snapshot, before: Mapping[str, str], after: Mapping[str, str], to: Managed
) -> Copied:
    origin = _origin(id, snapshot)
    if origin not in after:
        raise errors.StoreFailed(store=to.repository.name, what=f"copying {id[:8]}", reason="restic did not copy it")
    return Copied(machine=snapshot.hostname, created=snapshot.when, id=id, copy=after[origin], already=origin in before)


def _size(repository: repo.ResticRepository) -> int:
    return sum(stored.size for stored in repository.store.list(repo.Kind.DATA))


def _environ(
    source: urls.ResticRepository, environ: Mapping[str, str], target: urls.ResticRepository, other: Mapping[str, str]
) -> dict[str, str]:
    """What restic is given: it knows one set of keys for buckets, for both repositories."""
    keys, other_keys = _keys(environ), _keys(other)
    if not isinstance(source.location, urls.S3Place):
        return dict(other)
    if isinstance(target.location, urls.S3Place) and keys != other_keys:
        raise errors.Unsupported(
            what="A copy between buckets with different keys",
            reason="restic takes one set of keys for both",
            way_out="Use keys that may read the one and write the other, in both environment files.",
        )
    return {name: value for name, value in other.items() if name not in other_keys} | keys


def _keys(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith("AWS_")}
