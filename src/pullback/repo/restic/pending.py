"""A restore point in restic's format while it is written: invisible until its snapshot file is there.

    begin       our lock ─► the indexes ─► each inherited chunk looked up (missing: read again)
    observe     chunks ─► packs, uploaded while reading goes on
    seal        a disk's trees, which follow from its chunk ids alone
    commit      packs durable ─► our lock still there? ─► index ─► snapshot file ─► still there?

Without our lock somebody may have pruned. Then a new lock is taken, and all that the point needs is
looked for; what is not there ends the backup, and a snapshot file that is there already goes again.

Whatever ends it before the snapshot file leaves packs that nothing refers to; the next backup from
here takes them over (`cache.Journal`), or `restic prune` removes them.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Protocol

from pullback import errors, extents
from pullback.extents import Extent
from pullback.model import points, texts
from pullback.model.description import Firmware
from pullback.model.points import Point, PointRef
from pullback.model.tpm import TpmState
from pullback.repo.digest import HashList, block_size_for, zero_hash
from pullback.repo.interface import Sealed
from pullback.repo.restic import trees
from pullback.repo.restic.cache import Cache
from pullback.repo.restic.crypto import Key
from pullback.repo.restic.layout import FIRMWARE, MANIFEST, RESERVED, TPM, root_tree, snapshot_of
from pullback.repo.restic.locking import RepositoryLock
from pullback.repo.restic.lookup import Index
from pullback.repo.restic.packer import Packer
from pullback.repo.restic.snapshots import Snapshot
from pullback.repo.restic.types import Blob
from pullback.repo.restic.zeromap import ZeroMap
from pullback.repo.store import Kind, Store
from pullback.repo.store.limit import Limiter
from pullback.units import MiB

#: Bytes of a firmware device, or of a file of the TPM's state, in one blob.
_LOOSE_CHUNK = MiB


class Home(Protocol):
    """What a pending point needs of its repository (`repository.Repository`)."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def store(self) -> Store:
        """Its files."""

    @property
    def key(self) -> Key:
        """Its master key."""

    @property
    def index(self) -> Index:
        """Where each blob lies."""

    @property
    def cache(self) -> Cache:
        """What is known of it here."""

    @property
    def compresses(self) -> bool:
        """May its blobs be compressed?"""

    def point(self, machine: str, identity: str) -> Point:
        """A point."""

    def hashes(self, point: Point, target: str) -> HashList:
        """The chunk ids of a disk of a point."""

    def fresh_index(self) -> Index:
        """The index as it is in the repository now."""

    def write_snapshot(self, snapshot: Snapshot) -> str:
        """Make a snapshot visible."""


class PendingDisk:
    """A disk being filled: see `flows.filling.Filling`. Called by the copier's threads."""

    def __init__(self, packer: Packer, hashes: HashList, zeroes: ZeroMap, parent: PointRef | None) -> None:
        self.hashes = hashes
        #: The copier writes nothing: `observe` takes the chunks.
        self.destination = None
        self.parent = parent
        self.zeroes = zeroes
        self.tree: bytes | None = None
        #: Ids of the disk's trees.
        self.trees = bytearray()
        self._packer = packer
        self._lock = threading.Lock()
        self._stored = 0
        self._zero_lengths: set[int] = set()
        self._lacking: tuple[Extent, ...] = ()
        self._told: Callable[[Sequence[Extent]], None] | None = None

    def lack(self, positions: Sequence[int]) -> None:
        """These chunks of the parent are not in the repository any more, or not good."""
        found = []
        for position in positions:
            block = self.hashes.block(position)
            if self.hashes.entry(position) == zero_hash(block.length):
                self._zero_lengths.add(block.length)  # needs no reading
            else:
                found.append(block)
        self._lacking = tuple(extents.merge(found))

    @property
    def lacked(self) -> int:
        """Bytes of the parent's chunks that must be read again."""
        return extents.total(self._lacking)

    def parent_zeroes(self, window: Extent) -> Iterator[Extent]:
        """What of `window` is known to read as zeroes in the parent."""
        return self.zeroes.zeroes(window)

    def lacking(self, window: Extent) -> Iterator[Extent]:
        """Chunks of the parent that must be read again."""
        return extents.clip(self._lacking, window)

    def when_durable(self, told: Callable[[Sequence[Extent]], None]) -> None:
        """Tell of chunks that are in the repository."""
        self._told = told

    def observe(self, offset: int, buffer: bytearray, length: int) -> None:
        """A whole chunk was read."""
        index = offset // self.hashes.block_size
        with memoryview(buffer) as view, view[:length] as chunk:
            id = hashlib.sha256(chunk).digest()
            self.zeroes.observe(offset, buffer, length)
            durable = partial(self._told, (Extent(offset, length),)) if self._told is not None else None
            stored = self._packer.put(Blob.DATA, chunk, id, durable=durable)
        self.hashes.set(index, id)
        with self._lock:
            self._stored += stored

    def zeroed(self, extent: Extent) -> None:
        """These whole chunks are zero now."""
        self.hashes.set_zero(extent)
        self.zeroes.zeroed(extent)
        last = self.hashes.block(self.hashes.count - 1)
        with self._lock:
            if extent.end > last.start:
                self._zero_lengths.add(last.length)
            if extent.start < last.start:
                self._zero_lengths.add(self.hashes.block_size)

    def seal(self) -> Sealed:
        """Store the chunks of zeroes and the trees. Raises `ValueError` while a chunk is unknown."""
        for length in self._zero_lengths:
            self._stored += self._packer.put(Blob.DATA, bytes(length), zero_hash(length))
        hashes = self.hashes
        for id, tree in trees.disk_trees(hashes.encode(), trees.Shape(hashes.size, hashes.block_size)):
            self._stored += self._packer.put(Blob.TREE, tree, id)
            self.trees += id
            self.tree = id  # the last one is the disk's own
        return Sealed(
            size=hashes.size,
            parent=self.parent,
            block_size=hashes.block_size,
            digest=hashes.digest(),
            stored=self._stored,
            files=None,
        )


class PendingPoint:
    """A point being written. Different disks may be worked on by different threads."""

    def __init__(self, repository: Home, machine: str, lock: RepositoryLock, limiter: Limiter | None = None) -> None:
        self.machine = machine
        self._repository = repository
        self._lock = lock
        self._packer = Packer(
            repository.store,
            repository.key,
            repository.index,
            repository.cache,
            compress=repository.compresses,
            guarded=lock.trusted,
            limiter=limiter,
        )
        self._disks: dict[str, PendingDisk] = {}
        #: Directories that are no disks: their files.
        self._folders: dict[str, list[trees.Node]] = {}
        #: Ids of what belongs to no disk.
        self._loose = {kind: bytearray() for kind in Blob}
        self._open = ExitStack()

    def __enter__(self) -> PendingPoint:
        self._open.enter_context(self._packer)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:  # nothing will come of it, so nobody waits for a server that does not answer
            self._repository.store.hurry()
        self._open.__exit__(kind, error, None)

    def create(self, target: str, size: int, *, parent: PointRef | None = None) -> None:
        """Begin a disk. Raises `VerificationFailed` if the parent's chunk ids cannot be had."""
        if not texts.is_target(target) or target in self._disks or target in RESERVED:
            raise ValueError(f"{target!r} cannot be a new disk of this point")
        chunk = block_size_for(size)
        if parent is None:
            self._disks[target] = PendingDisk(self._packer, HashList(size, chunk), ZeroMap(size, chunk), None)
            return
        try:
            hashes, zeroes = self._inherited(parent, size, chunk)
        except errors.UnknownPoint as error:
            problem = "it has just been removed from the repository"
            raise errors.VerificationFailed(point=parent.point, problem=problem) from error
        disk = PendingDisk(self._packer, hashes, zeroes, parent)
        disk.lack(self._repository.index.missing(hashes.encode()))
        self._disks[target] = disk

    def _inherited(self, parent: PointRef, size: int, chunk: int) -> tuple[HashList, ZeroMap]:
        point = self._repository.point(self.machine, parent.point)
        disk = point.disk(parent.target)
        if (disk.size, disk.block_size) != (size, chunk):
            problem = f"{parent.target} has another size there, or chunks of another size"
            raise errors.VerificationFailed(point=parent.point, problem=problem)
        known = self._repository.cache.disk(disk.digest, size=size, chunk=chunk)
        return known or (self._repository.hashes(point, parent.target), ZeroMap(size, chunk))

    def disk(self, target: str) -> PendingDisk:
        """A disk that was created, to be filled."""
        return self._disks[target]

    def keep_firmware(self, firmware: Firmware) -> None:
        """Store the bytes of a firmware device."""
        self._keep(FIRMWARE, firmware.name, firmware.data)

    def keep_tpm(self, state: TpmState) -> None:
        """Store the bytes of the TPM's state."""
        for file in state.files:
            self._keep(TPM, file.name, file.data)

    def _keep(self, folder: str, name: str, data: bytes) -> None:
        starts = range(0, len(data), _LOOSE_CHUNK)
        ids = b"".join(self._blob(Blob.DATA, data[start : start + _LOOSE_CHUNK]) for start in starts)
        self._folders.setdefault(folder, []).append(trees.file(name, ids, len(data)))

    # -- the end -----------------------------------------------------------------------------

    def upload(self) -> None:
        """Make durable what the disks have: all that may take long."""
        self._packer.upload()

    def stop(self, reason: BaseException) -> None:
        """Whoever waits here for uploads gets `reason` as an error; any thread may call it."""
        self._repository.store.hurry()
        self._packer.stop(reason)

    def commit(self, point: Point) -> Point:
        """Make the point visible; gives it with its id. See `interface.PendingPoint.commit`."""
        self._agree(point)
        repository = self._repository
        manifest = points.encode(replace(point, id="0" * 64))
        tree = self._store_root(manifest, point)
        self._packer.upload()
        safe = self._lock.trusted()
        if not safe:
            self._lock.renew()
            self._require_packs()  # an index shall not list what is gone
        self._packer.finish()
        if not safe:
            self._prove()
        identity = repository.write_snapshot(snapshot_of(point, tree, self._previous()))
        if not self._trusted():
            self._prove_after(identity)
        self._packer.committed()
        repository.cache.keep_manifest(identity, manifest)
        for disk in self._disks.values():
            repository.cache.keep_disk(disk.hashes, disk.zeroes)
        return replace(points.decode(manifest, name=identity, identity=identity), tags=point.tags)

    def _store_root(self, manifest: bytes, point: Point) -> bytes:
        """Manifest and root tree; gives the tree's id."""
        id = self._blob(Blob.DATA, manifest)
        node = trees.file(MANIFEST, id, len(manifest))
        subtrees = {target: disk.tree for target, disk in self._disks.items() if disk.tree is not None}
        for folder, nodes in self._folders.items():
            subtrees[folder] = self._blob(Blob.TREE, trees.encode(nodes))
        return self._blob(Blob.TREE, root_tree(node, subtrees, point.created))

    def _blob(self, kind: Blob, plain: bytes) -> bytes:
        id = hashlib.sha256(plain).digest()
        self._packer.put(kind, plain, id)
        self._loose[kind] += id
        return id

    def _previous(self) -> str | None:
        """The point that most of it was inherited from, for restic's `parent`."""
        return next((disk.parent.point for disk in self._disks.values() if disk.parent is not None), None)

    def _require_packs(self) -> None:
        """The packs of this run must be there."""
        there = {bytes.fromhex(stored.name) for stored in self._repository.store.list(Kind.DATA)}
        if not self._packer.packs() <= there:
            raise errors.RepositoryChanged(repository=self._repository.name)

    def _prove(self) -> None:
        """Somebody may have pruned: all that the point needs must still be there."""
        fresh = self._repository.fresh_index()  # knows only of packs that are there
        needed = [(kind, bytes(ids)) for kind, ids in self._loose.items()]
        needed += [(Blob.TREE, bytes(disk.trees)) for disk in self._disks.values()]
        needed += [(Blob.DATA, disk.hashes.encode()) for disk in self._disks.values()]
        if any(fresh.missing(ids, kind) for kind, ids in needed):
            raise errors.RepositoryChanged(repository=self._repository.name)

    def _trusted(self) -> bool:
        """Is our lock to be trusted? Who cannot ask does not know."""
        try:
            return self._lock.trusted()
        except errors.PullbackError:
            return False

    def _prove_after(self, identity: str) -> None:
        """The same when the point is visible. While somebody prunes who may not have seen it, nothing is proven."""
        try:
            self._lock.renew()
            self._prove()
        except BaseException as error:
            try:
                self._repository.store.delete(Kind.SNAPSHOTS, identity)
            except errors.PullbackError as left:
                error.add_note(
                    f"Restore point {identity[:8]} is visible all the same, and may lack data: it could not be "
                    f"removed ({str(left).rstrip('.')}). `pullback verify {identity[:8]}` tells what it is worth."
                )
            raise

    def _agree(self, point: Point) -> None:
        if point.machine != self.machine or point.id:
            raise ValueError("the point has another machine, or an id")
        if {disk.target for disk in point.disks} != set(self._disks):
            raise ValueError("the point's disks are not those that were made")
        for disk in point.disks:
            made = self._disks[disk.target]
            said = (disk.size, disk.block_size, disk.digest, disk.parent, disk.files)
            if made.tree is None or said != (
                made.hashes.size,
                made.hashes.block_size,
                made.hashes.digest(),
                made.parent,
                None,
            ):
                raise ValueError(f"the point says other things of {disk.target} than were sealed")
