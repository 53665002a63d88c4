"""A very small repository in restic's format, in memory, and what each of its bytes is for.

One machine, two disks of a few chunks of 4 KiB, three restore points. `Small.touched` is the model:
it tells from the sound repository alone which disks, and which ranges of them, need a blob.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pullback import errors, extents, repo
from pullback.extents import Extent
from pullback.flows import reading
from pullback.model.backups import Level
from pullback.model.points import Mode, Point, PointDisk, PointRef
from pullback.progress import Cancel, Silent
from pullback.repo.restic import blobs, index, keys, layout, locking, packs, pending, trees, unpacked
from pullback.repo.restic.crypto import Key
from pullback.repo.restic.types import Blob, Entry
from pullback.repo.store import Kind
from pullback.repo.store.memory import MemoryStore
from pullback.transfer import FileEndpoint
from pullback.units import KiB

MACHINE = "web01"
PASSWORD = "x"
CHUNK = 4 * KiB
SIZES = {"vda": 5 * CHUNK, "vdb": 3 * CHUNK + 512}
START = datetime(2026, 11, 24, 6, 0, 18, tzinfo=UTC)
Content = dict[str, bytes]
#: Point and target ("": all of it) -> merged ranges.
Touched = dict[tuple[str, str], list[Extent]]


def chunk_of(seed: str, length: int = CHUNK) -> bytes:
    """A chunk that takes few bytes when it is compressed."""
    return (hashlib.sha256(seed.encode()).digest()[:8] * (length // 8 + 1))[:length]


def content_of(target: str, versions: Iterable[int]) -> bytes:
    """A disk, of which each chunk has that version; 0 is zeroes."""
    size = SIZES[target]
    parts = [
        chunk_of(f"{target} {number} {version}") if version else bytes(CHUNK) for number, version in enumerate(versions)
    ]
    return b"".join(parts)[:size].ljust(size, b"\0")


@contextmanager
def small() -> Iterator[None]:
    """While the block runs, disks are cut in small chunks, and locks are taken at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pending, "block_size_for", lambda size: CHUNK)
        patch.setattr(locking, "SETTLE", 0.0)
        yield


@dataclass
class Small:
    """The repository's files, and what was backed up."""

    store: MemoryStore
    #: Point -> what the disks held.
    contents: dict[str, Content] = field(default_factory=dict)

    @property
    def points(self) -> list[str]:
        """Ids, oldest first."""
        return list(self.contents)

    def harmed(self, kind: Kind, name: str, data: bytes | None) -> MemoryStore:
        """The same with another content of one file, or without it."""
        store = MemoryStore()
        store.connections = 1  # to begin threads takes most of the time
        store.files = dict(self.store.files)
        if data is None:
            del store.files[kind, name]
        else:
            store.files[kind, name] = data, datetime.now(UTC)
        return store

    def files(self) -> list[tuple[Kind, str, bytes]]:
        """Every file, locks aside."""
        return [(kind, name, data) for (kind, name), (data, _) in self.store.files.items() if kind is not Kind.LOCKS]

    # -- the model -----------------------------------------------------------------------------

    def look(self, caches: Path) -> Model:
        """What the sound repository holds."""
        with opened(self.store, caches) as repository:
            return Model(repository, self)


class Model:
    """Which blobs lie where, and who needs them; learned from the sound repository."""

    def __init__(self, repository: repo.ResticRepository, small: Small) -> None:
        self.small = small
        #: Pack -> what is in it.
        self.packs = {
            bytes.fromhex(name): packs.parse_pack(repository.key, data, name)
            for kind, name, data in small.files()
            if kind is Kind.DATA
        }
        #: Index file -> the packs that it lists.
        self.indexes = {
            name: index.parse(unpacked.open_file(repository.key, data, name, name), name).packs
            for kind, name, data in small.files()
            if kind is Kind.INDEX
        }
        #: A blob -> who needs it.
        self.users: dict[tuple[bytes, Blob], Touched] = {}
        for id, snapshot in repository.snapshots().items():
            assert not isinstance(snapshot, errors.PullbackError)
            self._point(repository, id, bytes.fromhex(snapshot.tree))

    def _uses(self, id: bytes, kind: Blob, point: str, target: str, extent: Extent | None) -> None:
        users = self.users.setdefault((id, kind), {})
        users.setdefault((point, target), []).extend([extent] if extent else [])

    def _point(self, repository: repo.ResticRepository, id: str, root: bytes) -> None:
        self._uses(root, Blob.TREE, id, "", None)
        for node in trees.parse(repository.reader.read(root, Blob.TREE), id):
            if node.name == layout.MANIFEST:
                assert node.content is not None
                self._uses(node.content, Blob.DATA, id, "", None)
                continue
            assert node.subtree is not None
            whole = Extent(0, SIZES[node.name])
            self._uses(node.subtree, Blob.TREE, id, node.name, whole)
            [segment] = trees.parse(repository.reader.read(node.subtree, Blob.TREE), id)
            assert segment.subtree is not None
            self._uses(segment.subtree, Blob.TREE, id, node.name, whole)
            [file] = trees.parse(repository.reader.read(segment.subtree, Blob.TREE), id)
            assert file.content is not None
            for number in range(len(file.content) // 32):
                extent = extents.between(number * CHUNK, min((number + 1) * CHUNK, whole.length))
                self._uses(file.content[number * 32 :][:32], Blob.DATA, id, node.name, extent)

    def touched(self, lost: Iterable[tuple[bytes, Blob]]) -> Touched:
        """Whom it hurts that these blobs are gone."""
        found: Touched = {}
        zeroes = {(repo.zero_hash(length), Blob.DATA) for length in (CHUNK, SIZES["vdb"] % CHUNK)}
        for blob in set(lost) - zeroes:  # to give zeroes, none need be read
            for key, ranges in self.users.get(blob, {}).items():
                found.setdefault(key, []).extend(ranges)
        whole = {point for point, target in found if not target}
        return {
            (point, target): list(extents.merge(sorted(ranges)))
            for (point, target), ranges in found.items()
            if not target or point not in whole
        }

    def hurt(self, kind: Kind, name: str, damage: Extent) -> Touched:
        """Whom it hurts if these bytes of a file are not what they were, or gone."""
        if kind is Kind.SNAPSHOTS:
            return {(name, ""): []}
        if kind is Kind.INDEX:
            others = {
                entry.id for other, listed in self.indexes.items() if other != name for _, e in listed for entry in e
            }
            entries = [entry for _, listed in self.indexes[name] for entry in listed if entry.id not in others]
        else:
            entries = [entry for entry in self.packs[bytes.fromhex(name)] if _overlap(entry, damage)]
        return self.touched((entry.id, entry.kind) for entry in entries)


def _overlap(entry: Entry, damage: Extent) -> bool:
    return entry.offset < damage.end and damage.start < entry.offset + entry.length


# -- making and using it -----------------------------------------------------------------------


def make(caches: Path) -> Small:
    """A new one: three points of two disks, with chunks that stay, change, become zero, and come back."""
    small = Small(MemoryStore())
    repo.create_repository(small.store, PASSWORD, caches=caches, cost=keys.Cost(2, 8, 1)).close()
    history = [
        {"vda": (1, 1, 0, 1, 0), "vdb": (1, 1, 1, 1)},
        {"vda": (1, 2, 0, 1, 2), "vdb": (1, 1, 1, 1)},
        {"vda": (1, 2, 0, 0, 1), "vdb": (2, 1, 1, 2)},
    ]
    for number, versions in enumerate(history):
        content = {target: content_of(target, numbers) for target, numbers in versions.items()}
        with opened(small.store, caches) as repository:
            point = backup(repository, content, small.contents, number)
        small.contents[point.id] = content
    return small


@contextmanager
def opened(store: MemoryStore, caches: Path) -> Iterator[repo.ResticRepository]:
    """The repository in a store."""
    with repo.open_repository(store, lambda: PASSWORD, caches=caches) as repository:
        yield repository


def backup(
    repository: repo.ResticRepository,
    content: Content,
    known: dict[str, Content],
    number: int,
    machine: str = MACHINE,
) -> Point:
    """A restore point of a machine whose disks hold `content`: what changed since the newest point, and what lacks."""
    listed = repository.listing(machine).points
    parent = listed[-1].id if listed else None
    with repository.writer(machine, command="test") as writer, writer.begin() as point:
        disks = [_disk(point, target, data, parent, known) for target, data in content.items()]
        made = Point(
            id="",
            machine=machine,
            created=START + timedelta(hours=number),
            level=Level.AUTO,
            pullback="0",
            qemu="7.2",
            engine="filter",
            pause=0.0,
            checkpoint=None,
            disks=tuple(disks),
        )
        return point.commit(made)


def _disk(
    point: repo.PendingSnapshot, target: str, data: bytes, parent: str | None, known: dict[str, Content]
) -> PointDisk:
    ref = PointRef(point=parent, target=target) if parent else None
    try:
        point.create(target, len(data), parent=ref)
    except errors.VerificationFailed:
        ref = None
        point.create(target, len(data))
    disk = point.disk(target)
    before = known[ref.point][target] if ref else None
    lacking = list(disk.lacking(Extent(0, len(data))))
    for block in map(disk.hashes.block, range(disk.hashes.count)):
        piece = bytearray(data[block.start : block.end])
        again = list(extents.intersect(lacking, [block]))
        if before is not None and not again and before[block.start : block.end] == piece:
            continue
        if not any(piece):
            disk.zeroed(block)
        else:
            disk.observe(block.start, piece, len(piece))
    sealed = disk.seal()
    return PointDisk(
        target=target,
        qdev=None,
        serial=None,
        source=None,
        source_format=None,
        size=sealed.size,
        mode=Mode.INCREMENTAL if ref else Mode.FULL,
        reason=None,
        parent=ref,
        mark=None,
        block_size=sealed.block_size,
        digest=sealed.digest,
        stored=sealed.stored,
        read=0,
    )


def restored(repository: repo.ResticRepository, found: Point, target: str, to: Path) -> bytes:
    """What a restore of a disk gives. Raises `VerificationFailed`."""
    disk = found.disk(target)
    try:
        with FileEndpoint(to, create=disk.size) as file:
            reading.prove(repository, found, disk, file, progress=Silent(), cancel=Cancel())
        return to.read_bytes()
    finally:
        to.unlink(missing_ok=True)


def scrubbed(repository: repo.ResticRepository, **scope: object) -> repo.Findings:
    """What a look at all of it finds."""
    return repo.scrub(
        repository,
        repo.Scope(**{"read_data": True} | scope),  # type: ignore[arg-type]
        progress=Silent(),
        cancel=Cancel(),
    )


def blob_of(key: Key, plain: bytes) -> blobs.EncodedBlob:
    """A blob that nobody needs."""
    return blobs.encode(key, plain)
