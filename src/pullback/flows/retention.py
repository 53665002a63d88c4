"""Forgetting restore points, by a rule or by name, and removing the data that nothing needs any more.

restic decides, and restic removes. But it is asked for a plan first, and told the ids of our points
from it: so what others keep in the same repository is never touched, whatever it is called, and the
newest point of a machine stays, because the next increment builds on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any

from pullback import errors, repo, units
from pullback.flows.managing import Managed, managed
from pullback.flows.repositories import Access, require_restic
from pullback.flows.threads import blocking
from pullback.model import urls
from pullback.model.retention import Keep
from pullback.progress import Cancel, Progress, Silent

#: Ids that are handed to restic at once: 65 bytes each, of the 2 MiB that Linux takes.
_BATCH = 10_000
_WOULD_FREE = re.compile(r"^total prune: .* / ([0-9.]+) (B|KiB|MiB|GiB|TiB)$", re.MULTILINE)
_UNITS = {"B": 1, "KiB": units.KiB, "MiB": units.MiB, "GiB": units.GiB, "TiB": 1024 * units.GiB}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for: `points` by name, or a rule."""

    repository: urls.Repository
    access: Access = field(default_factory=Access)
    #: One machine only; None: all.
    machine: str | None = None
    points: tuple[str, ...] = ()
    keep: Keep = field(default_factory=Keep)
    #: Points with one of these tags are kept besides.
    keep_tags: tuple[str, ...] = ()
    prune: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A restore point, and why it is kept or goes."""

    id: str
    #: None: it cannot be read.
    created: datetime | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The points of a machine that were judged, oldest first."""

    #: "" for points so damaged that it cannot be told.
    machine: str
    kept: tuple[Judged, ...] = ()
    removed: tuple[Judged, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was done; with `dry_run`, what would be."""

    groups: tuple[Group, ...]
    dry_run: bool
    pruned: bool
    #: Bytes that the repository has less; of a dry run, what restic expects. None: nothing was pruned, or not known.
    freed: int | None
    #: Sentences that the user should read.
    notes: tuple[str, ...]

    @property
    def removed(self) -> tuple[str, ...]:
        """Ids of all points that go."""
        return tuple(point.id for group in self.groups for point in group.removed)


async def forget(request: Request, progress: Progress | None = None) -> Report:
    """Do it.

    Raises `UsageError` for a rule that keeps nothing, `Unsupported` for a `dir:` repository, `NoPoints`,
    `UnknownPoint`, `AmbiguousPoint`, `BusyError`, and the errors of `programs.restic`. A repository with a
    snapshot that cannot be read is not pruned (`RepositoryDamaged`).
    """
    reason = "it keeps chains of images, each of which builds on the one before"
    way_out = "`pullback backup --level full` begins a new chain; a repository made by `pullback init` has none."
    place = require_restic(request.repository, "forget", reason, way_out)
    if not request.points and not request.keep and not request.keep_tags:
        problem = "Nothing says what to keep: --keep-last N and the like, `keep` in the configuration, or name points"
        raise errors.UsageError(problem=problem)
    cancel = Cancel()
    return await blocking(partial(_forget, request, place, progress or Silent(), cancel), cancel=cancel)


def _forget(request: Request, place: urls.ResticRepository, progress: Progress, cancel: Cancel) -> Report:
    with managed(place, request.access, cancel) as opened:
        found = opened.repository.snapshots()
        groups = _named(request, opened.repository, found) if request.points else _planned(request, opened, found)
        unread = {id: error for id, error in found.items() if isinstance(error, errors.PullbackError)}
        report = Report(groups=groups, dry_run=request.dry_run, pruned=False, freed=None, notes=())
        report = replace(report, notes=tuple(_notes(report, unread, found)))
        for note in report.notes:
            progress.note(note)
        left = [error for id, error in unread.items() if id not in report.removed]
        if request.prune and left:
            left[0].add_note("Nothing was pruned, because restic must read every snapshot for that.")
            raise left[0]
        if request.dry_run:
            return replace(report, freed=_expected(opened, report, unread) if request.prune else None)
        return _done(request, opened, report, unread)


# -- what goes -------------------------------------------------------------------------------

_Found = Mapping[str, repo.Snapshot | errors.PullbackError]


def _named(request: Request, repository: repo.ResticRepository, found: _Found) -> tuple[Group, ...]:
    """The points that the user names, damaged ones too."""
    ids = {repository.identity(text, dict(found), machine=request.machine) for text in request.points}
    groups: dict[str, list[Judged]] = {}
    for id in sorted(ids):
        snapshot = found[id]
        machine, created = "", None
        if isinstance(snapshot, repo.Snapshot):
            machine, created = snapshot.hostname, snapshot.when
        groups.setdefault(machine, []).append(Judged(id=id, created=created, reasons=("it is named",)))
    return tuple(Group(machine=machine, removed=_in_order(groups[machine])) for machine in sorted(groups))


def _planned(request: Request, opened: Managed, found: _Found) -> tuple[Group, ...]:
    """What restic's rules make of our points."""
    ours = {
        id: one
        for id, one in found.items()
        if isinstance(one, repo.Snapshot) and request.machine in (None, one.hostname)
    }
    if not ours:
        of_machine = f" of {request.machine}" if request.machine else ""
        raise errors.NoPoints(path=opened.repository.name, of_machine=of_machine)
    words = [*request.keep.words(), *(f"--keep-tag={tag}" for tag in request.keep_tags)]
    if request.machine is not None:
        words.append(f"--host={request.machine}")
    plan = opened.program.run_json("forget", "--dry-run", "--no-lock", "--group-by=host,paths", *words)
    groups = [_group(part, ours) for part in _objects(plan, "the plan")]
    return tuple(sorted((group for group in groups if group is not None), key=lambda group: group.machine))


def _group(part: Mapping[str, Any], ours: Mapping[str, repo.Snapshot]) -> Group | None:
    """One of restic's groups; None if it is not of our points. What restic saw and we did not is left alone."""
    keep = [str(one.get("id")) for one in _objects(part.get("keep"), "what it keeps")]
    why = _objects(part.get("reasons"), "its reasons")
    # In the order of what is kept; 0.14 says no ids here.
    reasons = {id: tuple(map(str, one.get("matches") or ())) for id, one in zip(keep, why, strict=False)}
    kept = set(keep) & ours.keys()
    removed = {str(one.get("id")) for one in _objects(part.get("remove"), "what it removes")} & ours.keys()
    if not kept and not removed:
        return None
    newest = max(kept | removed, key=lambda id: (ours[id].when, id))
    if newest in removed:
        reasons[newest] = ("the newest of its machine",)
    kept, removed = kept | {newest}, removed - {newest}
    judged = {
        id: Judged(id=id, created=ours[id].when, reasons=reasons.get(id) or ("no rule keeps it",))
        for id in kept | removed
    }
    return Group(
        machine=ours[newest].hostname,
        kept=_in_order(judged[id] for id in kept),
        removed=_in_order(judged[id] for id in removed),
    )


def _in_order(points: Iterable[Judged]) -> tuple[Judged, ...]:
    return tuple(sorted(points, key=lambda point: (point.created.timestamp() if point.created else 0.0, point.id)))


def _objects(value: object, what: str) -> list[Mapping[str, Any]]:
    found: Sequence[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, dict) for item in found):
        raise errors.BadReply(who="restic", problem=f"{what} is not what it was")
    return list(found)


def _notes(report: Report, unread: Mapping[str, errors.PullbackError], found: _Found) -> Iterable[str]:
    gone = frozenset(report.removed)
    for group in report.groups:
        left = [one for id, one in found.items() if id not in gone and isinstance(one, repo.Snapshot)]
        newest = max((point.created for point in group.removed if point.created), default=None)
        later = [one for one in left if one.hostname == group.machine and newest is not None and one.when > newest]
        if newest is not None and not later:
            yield f"the newest point of {group.machine} goes: its next backup reads all of its disks"
    for id in unread.keys() - gone:
        yield f"a snapshot cannot be read and was not judged; `pullback forget {id[:16]}` removes it"


# -- doing it --------------------------------------------------------------------------------


def _done(request: Request, opened: Managed, report: Report, unread: Mapping[str, errors.PullbackError]) -> Report:
    before = _size(opened.repository.store) if request.prune else 0
    sound = [id for id in report.removed if id not in unread]
    bad = [id for id in report.removed if id in unread]
    repo.unlocking.bury(opened.repository)  # restic knows a dead process by its age only
    if bad:  # restic cannot name what it cannot read
        with opened.repository.lock(exclusive=True):
            for id in bad:
                opened.repository.store.delete(repo.Kind.SNAPSHOTS, id)
    batches = [sound[start : start + _BATCH] for start in range(0, len(sound), _BATCH)]
    for batch in batches[:-1]:
        opened.program.run("forget", *batch)
    if batches:  # the last one with prune under the same lock
        opened.program.run("forget", *(["--prune"] if request.prune else []), *batches[-1])
    elif request.prune:
        opened.program.run("prune")
    _require_gone(opened.repository, report.removed)
    freed = max(0, before - _size(opened.repository.store)) if request.prune else None
    return replace(report, pruned=request.prune, freed=freed)


def _require_gone(repository: repo.ResticRepository, ids: Sequence[str]) -> None:
    """restic only warns of one that it cannot remove."""
    left = set(ids) & {stored.name for stored in repository.store.list(repo.Kind.SNAPSHOTS)}
    if left:
        what = f"forgetting {sorted(left)[0][:8]}"
        raise errors.StoreFailed(store=repository.name, what=what, reason="restic did not remove it")


def _size(store: repo.Store) -> int:
    kinds = (repo.Kind.DATA, repo.Kind.INDEX, repo.Kind.SNAPSHOTS)
    return sum(stored.size for kind in kinds for stored in store.list(kind))


def _expected(opened: Managed, report: Report, unread: Mapping[str, errors.PullbackError]) -> int | None:
    """What restic says that pruning would free; None if it says nothing that is understood, or must not be asked."""
    ids = [id for id in report.removed if id not in unread][:_BATCH]
    if len(ids) < len(report.removed):
        return None
    words = ["forget", "--prune", *ids] if ids else ["prune"]
    told = _WOULD_FREE.search(opened.program.run(*words, "--dry-run", "--no-lock"))
    return round(float(told[1]) * _UNITS[told[2]]) if told else None
