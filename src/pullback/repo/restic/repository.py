"""A repository in restic's format: opening it, and the restore points in it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pullback import errors
from pullback.model import points, tpm
from pullback.model.description import Firmware, with_data
from pullback.model.points import Point
from pullback.model.tpm import TpmState
from pullback.repo import selection
from pullback.repo.digest import HashList
from pullback.repo.interface import Damaged, Listing
from pullback.repo.restic import config, host, keys, layout, snapshots, trees, unpacked
from pullback.repo.restic.cache import Cache
from pullback.repo.restic.crypto import Key
from pullback.repo.restic.locking import RepositoryLock
from pullback.repo.restic.lookup import Index, Part, Place
from pullback.repo.restic.pending import PendingPoint
from pullback.repo.restic.reader import BlobReader, PointEndpoint
from pullback.repo.restic.snapshots import Snapshot
from pullback.repo.restic.types import Blob
from pullback.repo.store import Kind, Store, Stored
from pullback.repo.store.limit import Limiter
from pullback.units import MiB

_INDEX_THREADS = 8
#: Bytes of an index file: restic's have 8 MiB at most, before they are compressed.
_LARGE_INDEX = 16 * MiB


class Repository:
    """An open repository. Thread-safe. Its store belongs to it: a context manager closes both."""

    def __init__(self, store: Store, key: Key, settings: config.Config, caches: Path, *, key_name: str = "") -> None:
        """Use `open_repository` or `create_repository`."""
        self.store = store
        self.key = key
        self.config = settings
        #: The file of the key that opened it.
        self.key_name = key_name
        #: What messages call it.
        self.name = store.url
        #: 16 hex digits; names the owner of checkpoints.
        self.id = settings.id[:16]
        #: Each point stands alone.
        self.longest_chain: int | None = None
        self.compresses = settings.compresses
        self.cache = Cache(caches, settings.id)
        #: Files that could not be used, as clauses.
        self.problems: list[str] = []
        self._index: Index | None = None
        self._loading = threading.Lock()
        self._large = threading.Lock()
        #: What `fresh_index` left out, for those who read.
        self._doubtful: Index | None = None
        self.reader = BlobReader(store, key, self.find_blob)

    # -- the index ---------------------------------------------------------------------------

    @property
    def index(self) -> Index:
        """Where each blob lies; loaded at its first use."""
        with self._loading:
            if self._index is None:
                self._index = self._load_index()
            return self._index

    def fresh_index(self) -> Index:
        """The index as it is in the repository now, for those who write: without what `scrub` found to be bad.

        And without packs that are missing or too short. So what was in them is stored again. Those who
        read may still find something good in it, and prove what they read.
        """
        packs, bad = self.cache.damage()
        index = self._load_index(without=bad)
        if gone := self._gone(index):
            self.problems.append(f"{len(gone)} packs are missing or too short")
        doubtful = None
        if (lost := packs | gone) or bad:
            doubtful = self._load_index()  # once more: its files are in the cache by now
            index.exclude(packs=lost)
        with self._loading:
            self._index, self._doubtful = index, doubtful
        return index

    def find_blob(self, id: bytes, kind: Blob) -> list[Place]:
        """Where copies of a blob lie, also in what is not to be relied upon; that at last."""
        places, doubtful = self.index.find(id, kind), self._doubtful
        return places if doubtful is None else list(dict.fromkeys([*places, *doubtful.find(id, kind)]))

    def _gone(self, index: Index) -> frozenset[bytes]:
        """Packs that are not there, or shorter than what is to be in them."""
        # Listed after the indexes: whoever adds writes packs before they are indexed.
        there = {bytes.fromhex(stored.name): stored.size for stored in self.store.list(Kind.DATA)}
        return frozenset(pack for pack, size in index.pack_sizes().items() if there.get(pack, -1) < size)

    def _load_index(self, without: frozenset[str] = frozenset()) -> Index:
        files = sorted(
            (stored for stored in self.store.list(Kind.INDEX) if stored.name not in without),
            key=lambda stored: stored.name,
        )
        with ThreadPoolExecutor(_INDEX_THREADS, thread_name_prefix="index") as pool:
            parts = list(pool.map(self._part, files))
        return Index(part for part in parts if part is not None)

    def room_for(self, file: Stored) -> contextlib.AbstractContextManager[object]:
        """To be held while an index file is read: larger ones than programs make take memory one at a time."""
        return self._large if file.size > _LARGE_INDEX else contextlib.nullcontext()

    def _part(self, file: Stored) -> Part | None:
        """One index file, from the cache or the repository. A damaged one makes its blobs unknown."""
        name = file.name
        if (part := self.cache.part(name)) is not None:
            return part
        where = f"index/{name}"
        try:
            with self.room_for(file):
                data = self.store.read(Kind.INDEX, name)
                part = Part.parse(unpacked.open_file(self.key, data, name, where, limit=unpacked.MAX_INDEX), where)
        except errors.ObjectMissing:
            return None  # merged into another one meanwhile
        except (errors.RepositoryDamaged, errors.ObjectDamaged) as error:
            if (problem := f"{where} cannot be used: {str(error).rstrip('.')}") not in self.problems:
                self.problems.append(problem)
            return None
        self.cache.keep_part(name, part)
        return part

    # -- restore points ----------------------------------------------------------------------

    def snapshots(self) -> dict[str, Snapshot | errors.PullbackError]:
        """All snapshots of ours by id, and why others cannot be read."""
        names = sorted(stored.name for stored in self.store.list(Kind.SNAPSHOTS))
        with ThreadPoolExecutor(_INDEX_THREADS, thread_name_prefix="snapshots") as pool:
            read = dict(zip(names, pool.map(self._snapshot, names), strict=True))
        return {
            name: found
            for name, found in read.items()
            if found is not None and (isinstance(found, errors.PullbackError) or layout.is_point(found))
        }

    def _snapshot(self, name: str) -> Snapshot | errors.PullbackError | None:
        where = f"snapshots/{name}"
        try:
            document = self.cache.snapshot(name)
            if document is None:
                document = unpacked.open_file(self.key, self.store.read(Kind.SNAPSHOTS, name), name, where)
                self.cache.keep_snapshot(name, document)
            return snapshots.parse(document, where)
        except errors.ObjectMissing:
            return None  # forgotten meanwhile
        except (errors.RepositoryDamaged, errors.ObjectDamaged) as error:
            return error

    def machines(self) -> tuple[str, ...]:
        """The machines of which it keeps points, sorted."""
        found = self.snapshots().values()
        return tuple(sorted({snapshot.hostname for snapshot in found if isinstance(snapshot, Snapshot)}))

    def listing(self, machine: str) -> Listing:
        """The machine's points, oldest first."""
        return self._listing(machine, self.snapshots())

    def strays(self) -> tuple[Damaged, ...]:
        """Snapshot files of which not even the machine can be told."""
        return tuple(
            Damaged(machine="", id=name, created=datetime.fromtimestamp(0, UTC), problem=str(found).rstrip("."))
            for name, found in self.snapshots().items()
            if isinstance(found, errors.PullbackError)
        )

    def _listing(self, machine: str, found: dict[str, Snapshot | errors.PullbackError]) -> Listing:
        sound: list[Point] = []
        damaged: list[Damaged] = []
        for name, snapshot in found.items():
            if not isinstance(snapshot, Snapshot) or snapshot.hostname != machine:
                continue
            try:
                sound.append(self._point(name, snapshot))
            except (errors.VerificationFailed, errors.RepositoryTooNew) as error:
                problem = str(error).rstrip(".")
                damaged.append(Damaged(machine=machine, id=name, created=snapshot.when, problem=problem))
        return Listing(
            points=tuple(sorted(sound, key=lambda point: (point.created, point.id))),
            damaged=tuple(sorted(damaged, key=lambda one: one.created)),
        )

    def point(self, machine: str, identity: str) -> Point:
        """The point with exactly that id; raises `UnknownPoint`, `VerificationFailed`."""
        point = self._point(identity, self._existing(identity))
        if point.machine != machine:
            raise errors.UnknownPoint(point=identity, repository=self.name)
        return point

    def _existing(self, identity: str) -> Snapshot:
        return self._judged(identity, self.snapshots())

    def _judged(self, identity: str, snapshots: dict[str, Snapshot | errors.PullbackError]) -> Snapshot:
        found = snapshots.get(identity)
        if found is None:
            raise errors.UnknownPoint(point=identity, repository=self.name)
        if isinstance(found, errors.PullbackError):
            raise errors.VerificationFailed(point=identity, problem=str(found).rstrip(".")) from found
        return found

    def find(self, text: str = selection.LATEST, *, machine: str | None = None) -> Point:
        """The point that a user means; see `interface.Repository.find`."""
        found = self.snapshots()
        identity = self.identity(text, found, machine=machine)
        return self._point(identity, self._judged(identity, found))

    def identity(
        self, text: str, found: dict[str, Snapshot | errors.PullbackError], *, machine: str | None = None
    ) -> str:
        """The id of the point among `found` (`snapshots`) that a user means, be it damaged or not."""
        candidates = [
            selection.Candidate(machine=one.hostname, id=name, created=one.when)
            for name, one in found.items()
            if isinstance(one, Snapshot) and machine in (None, one.hostname)
        ]
        # One that cannot be read has no date, and perhaps no machine, but it has its id.
        lowest = datetime.min.replace(tzinfo=UTC)
        if selection.is_prefix(text):
            candidates += [
                selection.Candidate(machine=machine or "", id=name, created=lowest)
                for name, one in found.items()
                if not isinstance(one, Snapshot)
            ]
        return selection.choose(candidates, text, machine=machine, repository=self.name).id

    def _point(self, identity: str, snapshot: Snapshot) -> Point:
        """A point from its manifest. Raises `VerificationFailed`, `RepositoryTooNew`."""
        with _judging(identity):
            manifest = self.cache.manifest(identity)
            if manifest is None:
                node = layout.child(self._root(snapshot), layout.MANIFEST, f"snapshots/{identity}")
                manifest = b"".join(self._content(node))
                self.cache.keep_manifest(identity, manifest)
        point = points.decode(manifest, name=identity[:8], identity=identity)
        if point.machine != snapshot.hostname:
            raise errors.VerificationFailed(point=identity, problem="its manifest is of another machine")
        return replace(point, tags=layout.tags_of(snapshot))

    def _root(self, snapshot: Snapshot) -> bytes:
        return self.reader.read(bytes.fromhex(snapshot.tree), Blob.TREE)

    def _content(self, node: trees.Node) -> Iterator[bytes]:
        content = node.content or b""
        if len(content) > points.MAX_MANIFEST:
            raise errors.RepositoryDamaged(file=node.name, problem="it has too many pieces")
        for start in range(0, len(content), 32):
            yield self.reader.read(content[start : start + 32], Blob.DATA)

    # -- reading -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self, point: Point) -> Iterator[None]:
        """Keep the point's chunks from being pruned while the block runs, where a lock can be written."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(errors.PermissionDenied, errors.StoreRefused, errors.CannotWrite):
                stack.enter_context(self.lock())
            yield

    def lock(self, *, exclusive: bool = False) -> RepositoryLock:
        """A lock, to be held as a context manager."""
        return RepositoryLock(self.store, self.key, exclusive=exclusive, compress=self.compresses)

    def hashes(self, point: Point, target: str) -> HashList:
        """The chunk ids of a disk; raises `VerificationFailed` if they are not those of the manifest."""
        disk = point.disk(target)
        with _judging(point.id):
            shape = trees.Shape(disk.size, disk.block_size)
            root = self._root(self._existing(point.id))
            node = layout.child(root, target, f"snapshots/{point.id}")
            if node.subtree is None:
                raise errors.RepositoryDamaged(file=f"snapshots/{point.id}", problem=f"{target} is no directory in it")
            load = partial(self._tree, self._segments(node.subtree))
            ids = trees.read_disk(node.subtree, load, shape, f"the trees of {target}")
        hashes = HashList.decode(ids, size=disk.size, block_size=disk.block_size)
        if hashes.digest() != disk.digest:
            raise errors.VerificationFailed(point=point.id, problem=f"the chunks of {target} are not its digest's")
        return hashes

    def _segments(self, tree: bytes) -> dict[bytes, bytes]:
        """A disk's tree and all the trees below it, read at once."""
        top = self.reader.read(tree, Blob.TREE)
        below = [node.subtree for node in trees.parse(top, "a disk's tree") if node.subtree is not None]
        return {tree: top, **self.reader.trees(below)}

    def _tree(self, known: dict[bytes, bytes], tree: bytes) -> bytes:
        return known[tree] if tree in known else self.reader.read(tree, Blob.TREE)

    def endpoint(self, point: Point, target: str) -> PointEndpoint:
        """A disk of a point, to be read. Raises `VerificationFailed`."""
        name = f"restore point {point.id[:8]}, disk {target}"
        hashes = self.hashes(point, target)
        return PointEndpoint(self.reader, hashes, name=name, connections=self.store.connections)

    def firmware(self, point: Point) -> tuple[Firmware, ...]:
        """The firmware devices of a point with their bytes; raises `VerificationFailed`."""
        if not point.firmware:
            return ()
        where = f"snapshots/{point.id}"
        with _judging(point.id):
            load = self._loader(point, layout.FIRMWARE)
            try:
                return tuple(with_data(header, load(header.name)) for header in point.firmware)
            except ValueError as error:
                raise errors.RepositoryDamaged(file=where, problem=f"its firmware: {error}") from error

    def tpm(self, point: Point) -> TpmState | None:
        """The state of a point's TPM with its bytes; raises `VerificationFailed`."""
        if point.tpm is None:
            return None
        where = f"snapshots/{point.id}"
        with _judging(point.id):
            load = self._loader(point, layout.TPM)
            try:
                return tpm.with_data(point.tpm, lambda header: load(header.name))
            except ValueError as error:
                raise errors.RepositoryDamaged(file=where, problem=f"its TPM's state: {error}") from error

    def _loader(self, point: Point, folder: str) -> Callable[[str], bytes]:
        """What gives the content of a file in a directory of the point that is no disk."""
        where = f"snapshots/{point.id}"
        node = layout.child(self._root(self._existing(point.id)), folder, where)
        tree = self.reader.read(node.subtree or b"", Blob.TREE)
        return lambda name: b"".join(self._content(layout.child(tree, name, where)))

    # -- writing -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def writer(self, machine: str, *, command: str, limiter: Limiter | None = None) -> Iterator[Writer]:
        """Write points while others may do so too. Raises `BusyError` while somebody prunes."""
        with self.lock() as lock:
            self.fresh_index()
            yield Writer(self, machine, lock, limiter)

    def write_snapshot(self, snapshot: Snapshot) -> str:
        """Make a snapshot visible, durably; gives its id."""
        name, data = unpacked.seal_file(self.key, snapshots.encode(snapshot), compress=self.compresses)
        self.store.write(Kind.SNAPSHOTS, name, data)
        return name

    def tidy(self) -> None:
        """Forget in the cache what the repository no longer has."""
        self.cache.tidy(
            (stored.name for stored in self.store.list(Kind.INDEX)),
            (stored.name for stored in self.store.list(Kind.SNAPSHOTS)),
        )

    def close(self) -> None:
        """Let go of all; twice is fine."""
        self.store.close()

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Writer:
    """The right to add points of one machine, under a lock of ours."""

    def __init__(
        self, repository: Repository, machine: str, lock: RepositoryLock, limiter: Limiter | None = None
    ) -> None:
        self.machine = machine
        self._repository = repository
        self._lock = lock
        self._limiter = limiter

    def begin(self) -> PendingPoint:
        """A new point, to be used as a context manager."""
        return PendingPoint(self._repository, self.machine, self._lock, self._limiter)


@contextlib.contextmanager
def _judging(point: str) -> Iterator[None]:
    """What is damaged in the repository is damage of this point."""
    try:
        yield
    except (errors.RepositoryDamaged, errors.ObjectMissing, errors.ObjectDamaged) as error:
        raise errors.VerificationFailed(point=point, problem=str(error).rstrip(".")) from error


# -- opening ---------------------------------------------------------------------------------


def open_repository(store: Store, password: Callable[[], str], *, caches: Path) -> Repository:
    """Open the repository in `store`; below `caches` lies what is remembered of repositories.

    The password is asked for only when there is a repository.
    Raises `NoRepository`, `WrongPassword`, `RepositoryTooNew`, `RepositoryDamaged`.
    """
    try:
        sealed = store.read(Kind.CONFIG, "")
    except errors.ObjectMissing as error:
        raise errors.NoRepository(path=store.url) from error
    names = sorted(stored.name for stored in store.list(Kind.KEYS))[: keys.MAX_KEYS]
    if not names:
        raise errors.RepositoryDamaged(file="keys", problem="there is none")
    files, unread = _key_files(store, names)
    try:
        key_name, key = keys.open_any(files, password(), store.url)
    except (errors.WrongPassword, errors.NoRepository):
        if unread is not None:  # it may be the one
            raise unread from None
        raise
    return Repository(store, key, config.parse(key, sealed, store.url), caches, key_name=key_name)


def _key_files(store: Store, names: Sequence[str]) -> tuple[list[tuple[str, bytes]], errors.PullbackError | None]:
    """Name and content of those that can be read, and why the first of the others cannot."""
    files, unread = [], None
    for name in names:
        try:
            files.append((name, store.read(Kind.KEYS, name)))
        except errors.ObjectMissing:
            continue  # removed meanwhile
        except (errors.ObjectDamaged, errors.PermissionDenied) as error:
            unread = unread or error
    return files, unread


def create_repository(store: Store, password: str, *, caches: Path, cost: keys.Cost = keys.DEFAULT_COST) -> Repository:
    """Make a repository in an empty store. Raises `RepositoryExists` if one is there."""
    settings, key = config.new(), Key.random()
    name, data = new_key(password, key, cost)
    try:
        # The config last, and only if there is none: it is what makes a repository.
        store.write(Kind.KEYS, name, data)
        store.write(Kind.CONFIG, "", config.encode(key, settings), new=True)
    except errors.AlreadyStored as error:
        with contextlib.suppress(errors.PullbackError):
            store.delete(Kind.KEYS, name)
        raise errors.RepositoryExists(path=store.url) from error
    return Repository(store, key, settings, caches, key_name=name)


def new_key(password: str, key: Key, cost: keys.Cost) -> tuple[str, bytes]:
    """A file that opens the repository with `password`, made by us here and now: its name and content."""
    maker = keys.Maker(hostname=socket.gethostname(), username=host.user(), created=datetime.now(UTC))
    return keys.create(password, key, maker, cost=cost)
