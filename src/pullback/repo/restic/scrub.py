"""Looking for damage in a repository: what is bad, what of it is lost, and which disks that touches.

    files      snapshots, keys, config, indexes: is each what its name says?
    walk       restore points: every tree, every chunk's place; does its pack exist, and is it long enough?
    packs      with `read_data`: each pack read, each blob proven
    judge      a bad blob of which another good copy exists is no loss
    locate     lost chunks ─► machines, points, disks, ranges

Snapshots are listed before the indexes, and those before the packs, so that what a backup adds
meanwhile is never missed. Bad packs and indexes are remembered in the local cache: the next backup
from here does not rely on them, and stores again what the live disks still hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from pullback import errors, extents
from pullback.extents import Extent, between
from pullback.progress import Cancel, Progress
from pullback.repo.digest import ENTRY, zero_hash
from pullback.repo.restic import blobs, config, keys, layout, packcheck, packs, snapshots, unpacked
from pullback.repo.restic.lookup import Index, Part, Place
from pullback.repo.restic.reader import BlobReader
from pullback.repo.restic.repository import Repository
from pullback.repo.restic.snapshots import Snapshot
from pullback.repo.restic.types import Blob, Entry
from pullback.repo.restic.walking import WalkedDisk, Walker
from pullback.repo.store import Kind, Stored
from pullback.repo.store.limit import Limiter
from pullback.units import MiB, format_size, parse_size

#: Ranges of one disk that are told.
MAX_RANGES = 1000
#: Bytes of packs in memory at a time (restic's have 16 MiB by default, 128 at most).
_ROOM = 128 * MiB
_WORKERS = 8
_DAMAGE = (errors.RepositoryDamaged, errors.ObjectMissing, errors.ObjectDamaged)
#: What the parts of the work are called towards `Progress`.
STRUCTURE, PACKS = "structure", "packs"
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A random part of the packs: one of the three is set."""

    percent: float | None = None
    packs: int | None = None
    size: int | None = None

    @classmethod
    def parse(cls, text: str) -> Sample:
        """`5%` of the packs, `10G` of them, or so many packs. Raises `UsageError`."""
        if match := _PERCENT.fullmatch(text.strip()):
            if not 0 < float(match[1]) <= 100:
                raise errors.UsageError(problem=f"{text!r} is no part of a repository")
            return cls(percent=float(match[1]))
        if text.strip().isdecimal() and text.isascii() and len(text) < 10:
            return cls(packs=int(text))
        return cls(size=parse_size(text))

    def choose(self, sizes: dict[bytes, int], chance: random.Random) -> set[bytes]:
        """The packs to be read, by id, of those with these sizes; at least one."""
        order = sorted(sizes)
        chance.shuffle(order)
        if self.percent is not None:
            return set(order[: max(1, math.ceil(len(order) * self.percent / 100))])
        if self.packs is not None:
            return set(order[: max(1, self.packs)])
        chosen: set[bytes] = set()
        total = 0
        for pack in order:
            if chosen and total + sizes[pack] > (self.size or 0):
                break
            chosen.add(pack)
            total += sizes[pack]
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What is looked at."""

    #: Ids of restore points; None: all (of `machine`, if that is named).
    points: frozenset[str] | None = None
    machine: str | None = None
    #: Targets of disks; empty: all.
    only: tuple[str, ...] = ()
    #: Read packs; otherwise only what can be known without.
    read_data: bool = False
    sample: Sample | None = None

    @property
    def whole(self) -> bool:
        """Is it the whole repository, with what no point needs?"""
        return self.points is None and self.machine is None and not self.only


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedDisk:
    """What was found about a disk of a restore point; target "" for the point as a whole."""

    machine: str
    point: str
    target: str
    #: Bytes of it whose content was proven.
    read: int = 0
    #: None: it is sound.
    problem: str | None = None
    #: Where it cannot be read: merged, at most `MAX_RANGES`.
    ranges: tuple[Extent, ...] = ()
    #: Ranges beyond those.
    more: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BadFile:
    """A file of the repository that is not what was written."""

    #: Its place: "data/1f2e…".
    file: str
    problem: str
    #: Blobs in it of which there is no good copy anywhere.
    lost: int = 0
    #: Bad blobs of which there is a good copy elsewhere.
    spared: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found."""

    disks: tuple[CheckedDisk, ...]
    files: tuple[BadFile, ...]
    #: Sentences about what is no damage of what was looked at.
    notes: tuple[str, ...] = ()
    packs_read: int = 0
    bytes_read: int = 0


def scrub(
    repository: Repository,
    scope: Scope,
    *,
    progress: Progress,
    cancel: Cancel,
    rate: int | None = None,
    chance: random.Random | None = None,
) -> Findings:
    """Look for damage; what is found is given, not raised.

    `rate`: bytes of packs that are read in a second at most. Raises `BusyError` while somebody
    prunes, and errors of the store as a whole.
    """
    with contextlib.ExitStack() as stack:
        # Where no lock can be written, nobody can prune from here either.
        with contextlib.suppress(errors.PermissionDenied, errors.StoreRefused, errors.CannotWrite):
            stack.enter_context(repository.lock())
        work = _Scrub(repository, scope, progress, cancel, chance or random.SystemRandom())
        return work.run(Limiter(rate) if rate else None)


@dataclass(slots=True)
class _Blobs:
    """What is known of blobs and their packs."""

    index: Index
    #: Bytes of each pack that is there.
    sizes: dict[bytes, int]
    #: Packs that were bad at an earlier look: another copy is preferred.
    marked: frozenset[bytes]
    #: Packs that what we look at needs.
    packs: set[bytes] = field(default_factory=set)
    #: A blob -> the packs in which it is bad.
    bad: dict[tuple[bytes, Blob], set[bytes]] = field(default_factory=dict)
    #: Blobs that no index knows.
    unknown: set[tuple[bytes, Blob]] = field(default_factory=set)
    #: Blobs without a good copy; known after `_judge`.
    lost: set[tuple[bytes, Blob]] = field(default_factory=set)

    def fits(self, place: Place) -> bool:
        """Is the pack there, and long enough?"""
        return place.offset + place.length <= self.sizes.get(place.pack, -1)

    def is_bad(self, id: bytes, kind: Blob, pack: bytes) -> None:
        """That copy of the blob is bad."""
        self.bad.setdefault((id, kind), set()).add(pack)


class _Scrub:
    """One run: the values that its steps share. The steps run in one thread, reading of packs in several."""

    def __init__(
        self, repository: Repository, scope: Scope, progress: Progress, cancel: Cancel, chance: random.Random
    ) -> None:
        self._repository = repository
        self._store = repository.store
        self._key = repository.key
        self._scope = scope
        self._progress = progress
        self._cancel = cancel
        self._chance = chance
        self._files: dict[str, str] = {}
        #: Bad files that concern us only where all of the repository is looked at, or if something is missing.
        self._asides: dict[str, str] = {}
        self._notes: list[str] = []
        self._disks: list[WalkedDisk] = []
        self._bad_indexes: set[str] = set()
        self._proven: set[bytes] = set()
        self._read = 0
        self._bytes = 0

    def run(self, limiter: Limiter | None) -> Findings:
        """All steps."""
        found = self._snapshots()
        self._settings()
        index = self._index()
        sizes = {bytes.fromhex(stored.name): stored.size for stored in self._store.list(Kind.DATA)}
        self._blobs = _Blobs(index, sizes, self._repository.cache.damage()[0])
        self._reader = BlobReader(self._store, self._key, index.find)
        self._walker = Walker(self._reader, self._needs, self._unreadable)
        self._walk(found)
        if self._scope.whole:
            self._measure()
        if self._scope.read_data:
            self._read_packs(limiter)
        self._judge()
        self._aside()
        checked = tuple(self._located())
        files = tuple(self._bad_files())
        self._remember()
        return Findings(
            disks=checked, files=files, notes=tuple(self._notes), packs_read=self._read, bytes_read=self._bytes
        )

    def _is_bad(self, file: str, problem: str) -> None:
        """A file is not what was written; the first word on it counts, unless a closer look follows."""
        self._files.setdefault(file, problem)

    def _aside(self) -> None:
        """Bad files of the repository: of concern where all of it is looked at, or something is missing."""
        for file, problem in self._asides.items():
            if self._scope.whole or (file.startswith(Kind.INDEX) and self._blobs.unknown):
                self._is_bad(file, problem)
            else:
                self._notes.append(f"{file} is damaged: {problem}; nothing that was looked at needs it")
        if self._blobs.unknown and not self._bad_indexes:
            self._is_bad(Kind.INDEX, f"it does not know {len(self._blobs.unknown)} blobs that restore points need")

    # -- files -------------------------------------------------------------------------------

    def _snapshots(self) -> dict[str, Snapshot]:
        """The snapshots that are meant, from the repository itself and not from the cache."""
        listed = sorted(stored.name for stored in self._store.list(Kind.SNAPSHOTS))
        names = [name for name in listed if self._scope.points is None or name in self._scope.points]
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="scrub") as pool:
            read = list(zip(names, pool.map(self._snapshot, names), strict=True))
        found = {}
        for name, snapshot in read:
            if isinstance(snapshot, Snapshot):
                if layout.is_point(snapshot) and self._scope.machine in (None, snapshot.hostname):
                    found[name] = snapshot
            elif snapshot is not None:
                self._stray(name, _problem(snapshot))
        return found

    def _snapshot(self, name: str) -> Snapshot | errors.PullbackError | None:
        where = f"snapshots/{name}"
        try:
            document = unpacked.open_file(self._key, self._store.read(Kind.SNAPSHOTS, name), name, where)
            return snapshots.parse(document, where)
        except errors.ObjectMissing:
            return None  # forgotten meanwhile
        except _DAMAGE as error:
            return error

    def _stray(self, name: str, problem: str) -> None:
        """A snapshot that cannot be read: the cache may know whose it is."""
        machine = "?"
        document = self._repository.cache.snapshot(name)
        if document is not None:
            with contextlib.suppress(errors.RepositoryDamaged):
                known = snapshots.parse(document, "cache")
                machine = known.hostname if layout.is_point(known) else ""
        if self._scope.machine not in (None, machine):
            self._asides[f"snapshots/{name}"] = problem
            return
        self._is_bad(f"snapshots/{name}", problem)
        if machine:
            self._disks.append(WalkedDisk(machine, name, "", problem=problem))

    def _settings(self) -> None:
        """Config and keys. Other people's keys are proven by their names; only their passwords open them."""
        try:
            config.parse(self._key, self._store.read(Kind.CONFIG, ""), self._repository.name)
        except _DAMAGE as error:
            self._is_bad("config", _problem(error))
        for stored in list(self._store.list(Kind.KEYS)):
            where = f"keys/{stored.name}"
            try:
                keys.describe(self._store.read(Kind.KEYS, stored.name), stored.name)
            except errors.ObjectMissing:
                continue
            except _DAMAGE as error:
                self._asides[where] = _problem(error)

    def _index(self) -> Index:
        """The index from the repository's own files."""
        files = sorted(self._store.list(Kind.INDEX), key=lambda stored: stored.name)
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="scrub") as pool:
            read = list(zip(files, pool.map(self._part, files), strict=True))
        for file, part in read:
            name = file.name
            if isinstance(part, errors.PullbackError):
                self._bad_indexes.add(name)
                self._asides[f"index/{name}"] = _problem(part)
        return Index(part for _, part in read if isinstance(part, Part))

    def _part(self, file: Stored) -> Part | errors.PullbackError | None:
        name, where = file.name, f"index/{file.name}"
        try:
            with self._repository.room_for(file):
                data = self._store.read(Kind.INDEX, name)
                if hashlib.sha256(data).hexdigest() == name and (part := self._repository.cache.part(name)) is not None:
                    return part  # made from these very bytes
                part = Part.parse(unpacked.open_file(self._key, data, name, where, limit=unpacked.MAX_INDEX), where)
        except errors.ObjectMissing:
            return None  # merged into another one meanwhile
        except _DAMAGE as error:
            return error
        self._repository.cache.keep_part(name, part)
        return part

    # -- the walk ----------------------------------------------------------------------------

    def _walk(self, found: dict[str, Snapshot]) -> None:
        self._progress.start(STRUCTURE, 0)
        # Those of a machine one after another: they share most of their trees.
        for name, snapshot in sorted(found.items(), key=lambda item: (item[1].hostname, item[1].when)):
            self._cancel.check()
            for disk in self._walker.walk(name, snapshot, self._scope.only).disks:
                self._disks.append(disk)
                self._progress.advance(STRUCTURE, disk.shape.size if disk.shape else 0)
        self._progress.finish(STRUCTURE)

    def _needs(self, ids: bytes, kind: Blob) -> None:
        """Is there a place for each of these blobs, in a pack that is there and long enough?"""
        known = self._blobs
        located = known.index.locate(ids, kind)
        rows = zip(located.pack.tolist(), located.offset.tolist(), located.length.tolist(), strict=True)
        for number, (row, offset, length) in enumerate(rows):
            id = ids[number * ENTRY : (number + 1) * ENTRY]
            if row < 0:
                known.unknown.add((id, kind))
                continue
            pack = located.packs[row]
            if pack in known.marked or offset + length > known.sizes.get(pack, -1):
                self._search(id, kind)
            else:
                known.packs.add(pack)

    def _search(self, id: bytes, kind: Blob) -> None:
        """The best copy of a blob whose first one is in doubt."""
        known = self._blobs
        places = known.index.find(id, kind)
        fitting = [place for place in places if known.fits(place)]
        if fitting:
            known.packs.add(min(fitting, key=lambda place: place.pack in known.marked).pack)
            return
        for place in places:
            known.is_bad(id, kind, place.pack)
            size = known.sizes.get(place.pack)
            self._is_bad(f"data/{place.pack.hex()}", "it is missing" if size is None else f"it has only {size} bytes")

    def _unreadable(self, id: bytes, kind: Blob, error: errors.PullbackError) -> None:
        """A tree or a manifest without a good copy."""
        for place in self._blobs.index.find(id, kind):
            self._blobs.is_bad(id, kind, place.pack)
            self._is_bad(f"data/{place.pack.hex()}", _problem(error))

    def _measure(self) -> None:
        """The size of every pack that the index knows tells whether it is whole."""
        known = self._blobs
        for pack, entries in known.index.packs():
            size = known.sizes.get(pack)
            problem = packcheck.size_problem(entries, size)
            if problem is None or (size is not None and self._is_whole(pack, size, entries)):
                continue
            self._is_bad(f"data/{pack.hex()}", problem)
            for entry in entries:
                if entry.offset + entry.length > (size or 0):
                    known.is_bad(entry.id, entry.kind, pack)

    def _is_whole(self, pack: bytes, size: int, entries: list[Entry]) -> bool:
        """Does the header agree with the size? (Nothing forbids an index file that lists a part of a pack.)"""
        name = pack.hex()
        try:
            tail = self._store.read(Kind.DATA, name, max(0, size - packs.TRAILER), min(size, packs.TRAILER))
            offset, length = packs.header_place(tail, size, name)
            sealed = self._store.read(Kind.DATA, name, offset, length)
            return set(entries) <= set(packs.parse_header(self._key, sealed, size, name))
        except _DAMAGE:
            return False

    # -- the packs ---------------------------------------------------------------------------

    def _read_packs(self, limiter: Limiter | None) -> None:
        known = self._blobs
        meant = known.sizes.keys() if self._scope.whole else known.packs & known.sizes.keys()
        wanted = {pack: known.sizes[pack] for pack in meant}
        if self._scope.sample is not None:
            wanted = {pack: wanted[pack] for pack in self._scope.sample.choose(wanted, self._chance)} if wanted else {}
        self._progress.start(PACKS, sum(wanted.values()))
        with _Reading(self._repository, known.sizes, limiter) as reading:
            for pack, entries in self._contents(wanted):
                self._cancel.check()
                for done in reading.submit(pack, entries):
                    self._take(done)
            for done in reading.rest():
                self._take(done)
        self._progress.finish(PACKS)

    def _contents(self, wanted: dict[bytes, int]) -> Iterator[tuple[bytes, list[Entry]]]:
        """The wanted packs, with what the index lists in each; at last those that it does not know."""
        seen: dict[bytes, int] = {}
        for pack, entries in self._blobs.index.packs():
            # Two index files may list the same pack; alike, if all is well.
            mark = hash(frozenset(entries))
            if pack in wanted and seen.get(pack) != mark:
                seen[pack] = mark
                yield pack, entries
        loose = [pack for pack in wanted if pack not in seen]
        if loose and not self._bad_indexes:
            self._notes.append(f"{len(loose)} packs are in no index (left by a backup that was killed, or just made)")
        yield from ((pack, []) for pack in loose)

    def _take(self, done: _Done) -> None:
        self._read += 1
        self._bytes += done.size
        self._progress.advance(PACKS, done.size)
        if done.verdict.problem is None:
            self._proven.add(done.pack)
            return
        self._files[f"data/{done.pack.hex()}"] = done.verdict.problem
        for entry in done.verdict.bad:
            self._blobs.is_bad(entry.id, entry.kind, done.pack)

    # -- what is lost ------------------------------------------------------------------------

    def _judge(self) -> None:
        """A blob is lost if none of its copies is good."""
        known = self._blobs
        known.lost |= known.unknown
        for (id, kind), inside in known.bad.items():
            self._cancel.check()
            places = known.index.find(id, kind)
            if not any(place.pack not in inside and self._is_good(id, kind, place) for place in places):
                known.lost.add((id, kind))

    def _is_good(self, id: bytes, kind: Blob, place: Place) -> bool:
        if place.pack in self._proven:
            return True
        where = f"data/{place.pack.hex()}"
        try:
            data = self._store.read(Kind.DATA, place.pack.hex(), place.offset, place.length)
            blobs.decode(self._key, data, place.entry(id), where)
        except _DAMAGE as error:
            self._is_bad(where, _problem(error))
            return False
        return True

    def _located(self) -> Iterator[CheckedDisk]:
        """Every disk, with the ranges that the lost chunks are in."""
        lost = {id for id, kind in self._blobs.lost if kind is Blob.DATA}
        lost -= self._lost_zeroes(lost)
        where: dict[bytes, tuple[int, ...]] = {}
        for disk in self._disks:
            self._cancel.check()
            if lost and disk.segments:
                self._locate(disk, lost, where)
            if lost.intersection(disk.content[at : at + ENTRY] for at in range(0, len(disk.content), ENTRY)):
                disk.problem = disk.problem or "some of it cannot be read"
            yield self._checked(disk)

    def _lost_zeroes(self, lost: set[bytes]) -> set[bytes]:
        """Chunks of zeroes among them: we need none to give zeroes, but restic does."""
        shapes = [disk.shape for disk in self._disks if disk.shape is not None]
        lengths = {shape.chunk for shape in shapes} | {shape.size % shape.chunk for shape in shapes} - {0}
        found = {zero for zero in map(zero_hash, lengths) if zero in lost}
        if found:
            self._notes.append(
                "a chunk of zeroes is lost: Pullback needs none, but restic cannot restore disks with such a chunk "
                "before the next backup stores it again"
            )
        return found

    def _locate(self, disk: WalkedDisk, lost: set[bytes], where: dict[bytes, tuple[int, ...]]) -> None:
        if not all(segment in where for segment in disk.segments):
            for number, ids in self._walker.segments(disk):
                if isinstance(ids, bytes):
                    positions = (at // ENTRY for at in range(0, len(ids), ENTRY) if ids[at : at + ENTRY] in lost)
                    where[disk.segments[number]] = tuple(positions)
        assert disk.shape is not None
        for number, segment in enumerate(disk.segments):
            for position in where.get(segment, ()):
                start = number * disk.shape.segment + position * disk.shape.chunk
                disk.lost.append(between(start, min(start + disk.shape.chunk, disk.shape.size)))

    def _checked(self, disk: WalkedDisk) -> CheckedDisk:
        ranges = list(extents.merge(sorted(disk.lost)))
        problem = disk.problem
        if ranges and problem is None:
            total = format_size(extents.total(ranges))
            problem = f"{total} in {len(ranges)} range(s) cannot be read, the first at offset {ranges[0].start}"
        proven = problem is None and self._scope.read_data and self._scope.sample is None and disk.shape is not None
        return CheckedDisk(
            machine=disk.machine,
            point=disk.point,
            target=disk.target,
            read=disk.shape.size - disk.zero if proven and disk.shape else 0,
            problem=problem,
            ranges=tuple(ranges[:MAX_RANGES]),
            more=max(0, len(ranges) - MAX_RANGES),
        )

    def _bad_files(self) -> Iterator[BadFile]:
        """Every bad file, with how many bad blobs it has."""
        counted: dict[str, list[int]] = {}
        for blob, inside in self._blobs.bad.items():
            for pack in inside:
                counted.setdefault(f"{Kind.DATA}/{pack.hex()}", [0, 0])[blob in self._blobs.lost] += 1
        for file, problem in sorted(self._files.items()):
            spared, lost = counted.get(file, (0, 0))
            yield BadFile(file=file, problem=problem, lost=lost, spared=spared)

    # -- for the next backup -----------------------------------------------------------------

    def _remember(self) -> None:
        """Bad packs and indexes are not to be relied upon by who writes; what was proven is good again."""
        before = self._repository.cache.damage()
        bad = {bytes.fromhex(file.removeprefix("data/")) for file in self._files if file.startswith("data/")}
        complete = self._scope.whole and self._scope.read_data and self._scope.sample is None
        marked = frozenset(bad if complete else (before[0] - self._proven) | bad)
        indexes = frozenset(self._bad_indexes)
        if (marked, indexes) != before:
            self._repository.cache.keep_damage(marked, indexes)


def _problem(error: errors.PullbackError) -> str:
    """What is wrong with the file that the error is about."""
    if isinstance(error, errors.RepositoryDamaged | errors.ObjectDamaged):
        return error.problem
    return "it is missing"


# -- reading packs -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Done:
    """A pack that was read."""

    pack: bytes
    size: int
    verdict: packcheck.PackVerdict


class _Reading:
    """Threads that read and prove packs; a context manager. In memory are at most `_ROOM` bytes, or one pack."""

    def __init__(self, repository: Repository, sizes: dict[bytes, int], limiter: Limiter | None) -> None:
        self._store = repository.store
        self._key = repository.key
        self._sizes = sizes
        self._limiter = limiter
        self._stop = threading.Event()
        self._room = _Room(_ROOM)
        self._workers = max(2, min(_WORKERS, repository.store.connections))
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="packs")
        self._running: list[Future[_Done]] = []

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def submit(self, pack: bytes, listed: list[Entry]) -> Iterator[_Done]:
        """Read one more; gives those that are done."""
        self._running.append(self._pool.submit(self._one, pack, listed))
        while len(self._running) > self._workers:
            yield self._running.pop(0).result()

    def rest(self) -> Iterator[_Done]:
        """All that are still under way."""
        while self._running:
            yield self._running.pop(0).result()

    def _one(self, pack: bytes, listed: list[Entry]) -> _Done:
        name, size = pack.hex(), self._sizes[pack]
        if self._limiter is not None and not self._limiter.take(size, self._stop):
            return _Done(pack, 0, packcheck.PackVerdict(None, (), 0))  # nobody asks any more
        with self._room.taken(size):
            try:
                data = self._store.read(Kind.DATA, name)
            except errors.ObjectMissing:
                return _Done(pack, 0, packcheck.PackVerdict("it is missing", tuple(listed), 0))
            except errors.ObjectDamaged as error:
                # Not all of the file can be read (a bad sector, or too large): some blobs may be.
                bad = tuple(entry for entry in listed if not self._alone(name, entry))
                return _Done(pack, size, packcheck.PackVerdict(error.problem, bad, len(listed) - len(bad)))
            return _Done(pack, size, packcheck.check(self._key, name, data, listed))

    def _alone(self, name: str, entry: Entry) -> bool:
        try:
            data = self._store.read(Kind.DATA, name, entry.offset, entry.length)
            blobs.decode(self._key, data, entry, f"data/{name}")
        except _DAMAGE:
            return False
        return True


class _Room:
    """Bytes that threads may hold together; one alone may hold more."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Hold so many while the block runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + count <= self._limit)
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()
