"""Walking through restore points to find all that they need, going on where something is damaged.

snapshot ─► root tree ─► manifest
                     └─► disk ─► segments ─► ids of chunks

Restore points share most of their segments: each tree is read once, as long as it is remembered, and
whoever looks at chunks is given those of each segment once.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pullback import errors
from pullback.extents import Extent, between
from pullback.model import points
from pullback.model.points import Point, PointDisk
from pullback.repo.digest import ENTRY, zero_hash
from pullback.repo.restic import layout, trees
from pullback.repo.restic.reader import BlobReader
from pullback.repo.restic.snapshots import Snapshot
from pullback.repo.restic.types import Blob
from pullback.units import MiB

#: Bytes of segments that are remembered: those of a disk of 2 TiB.
_REMEMBERED = 64 * MiB
#: Trees that are asked for at once.
_BATCH = 64
_DAMAGE = (errors.RepositoryDamaged, errors.ObjectMissing, errors.ObjectDamaged)


@dataclass(slots=True)
class WalkedDisk:
    """A disk of a restore point, as far as its trees can be read."""

    machine: str
    #: The point's id.
    point: str
    #: "" for what concerns the point as a whole.
    target: str
    shape: trees.Shape | None = None
    #: The trees of its segments, in order.
    segments: tuple[bytes, ...] = ()
    #: Ranges whose chunks are not known, because a tree cannot be read.
    lost: list[Extent] = field(default_factory=list)
    #: Ids of all chunks of what is no disk.
    content: bytes = b""
    #: Bytes in chunks that are all zero.
    zero: int = 0
    #: What is wrong, as a clause.
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class WalkedPoint:
    """A restore point with its disks; those that are damaged as a whole have one without a target."""

    id: str
    #: None if the manifest cannot be used.
    point: Point | None
    disks: tuple[WalkedDisk, ...]


class Walker:
    """Walks through points; for one thread."""

    def __init__(
        self,
        reader: BlobReader,
        needs: Callable[[bytes, Blob], None],
        damaged: Callable[[bytes, Blob, errors.PullbackError], None],
    ) -> None:
        """`needs` hears of the ids that a point needs, `damaged` of a tree or manifest without a good copy."""
        self._reader = reader
        self._needs = needs
        self._damaged = damaged
        self._known: OrderedDict[bytes, bytes] = OrderedDict()
        self._bytes = 0
        self._told: set[bytes] = set()

    # -- a point -----------------------------------------------------------------------------

    def walk(self, identity: str, snapshot: Snapshot, only: Sequence[str] = ()) -> WalkedPoint:
        """All of a point, or some of its disks. Damage is in what is given, not raised."""
        whole = WalkedDisk(snapshot.hostname, identity, "")
        where = f"snapshots/{identity}"
        try:
            root = self._read(bytes.fromhex(snapshot.tree), Blob.TREE)
            nodes = {node.name: node for node in trees.parse(root, where)}
            point = self._manifest(nodes, identity, snapshot)
        except (*_DAMAGE, errors.VerificationFailed, errors.RepositoryTooNew) as error:
            whole.problem = clause(error)
            return WalkedPoint(identity, None, (whole,))
        disks = [disk for disk in point.disks if not only or disk.target in only]
        found = [self._disk(point, disk, nodes.get(disk.target)) for disk in disks]
        if not only:
            found += self._others(point, [node for name, node in nodes.items() if name != layout.MANIFEST])
        return WalkedPoint(identity, point, tuple(found))

    def _manifest(self, nodes: dict[str, trees.Node], identity: str, snapshot: Snapshot) -> Point:
        node = nodes.get(layout.MANIFEST)
        content = node.content if node is not None else None
        if not content or len(content) > points.MAX_MANIFEST:
            raise errors.RepositoryDamaged(file=f"snapshots/{identity}", problem=f"there is no {layout.MANIFEST} in it")
        data = b"".join(
            self._read(content[start : start + ENTRY], Blob.DATA) for start in range(0, len(content), ENTRY)
        )
        point = points.decode(data, name=identity[:8], identity=identity)
        if point.machine != snapshot.hostname:
            raise errors.VerificationFailed(point=identity, problem="its manifest is of another machine")
        return point

    def _read(self, id: bytes, kind: Blob) -> bytes:
        """One blob, of which `damaged` is told if it cannot be had."""
        self._needs(id, kind)
        try:
            return self._reader.read(id, kind)
        except _DAMAGE as error:
            self._damaged(id, kind, error)
            raise

    # -- a disk ------------------------------------------------------------------------------

    def _disk(self, point: Point, disk: PointDisk, node: trees.Node | None) -> WalkedDisk:
        found = WalkedDisk(point.machine, point.id, disk.target, trees.Shape(disk.size, disk.block_size))
        everything = [Extent(0, disk.size)]
        if node is None or node.subtree is None:
            found.problem, found.lost = f"there is no directory {disk.target} in it", everything
            return found
        try:
            found.segments = self._segment_ids(node.subtree, found)
        except _DAMAGE as error:
            found.problem, found.lost = clause(error), everything
            return found
        digest = hashlib.sha256()
        for number, ids in self.segments(found):
            if isinstance(ids, errors.PullbackError):
                found.lost.append(self._extent(found, number))
                found.problem = found.problem or clause(ids)
                continue
            digest.update(ids)
            found.zero += self._zeroes(found, number, ids)
            if found.segments[number] not in self._told:
                self._told.add(found.segments[number])
                self._needs(ids, Blob.DATA)
        if not found.lost and digest.hexdigest() != disk.digest:
            found.problem, found.lost = "its chunks are not those of its digest", everything
        return found

    def _segment_ids(self, tree: bytes, disk: WalkedDisk) -> tuple[bytes, ...]:
        assert disk.shape is not None
        where = f"the trees of {disk.target}"
        nodes = trees.parse(self._read(tree, Blob.TREE), where)
        if [node.name for node in nodes] != [f"{number:06}" for number in range(disk.shape.segments)]:
            raise errors.RepositoryDamaged(file=where, problem="the disk's segments are not those of its size")
        found = tuple(node.subtree for node in nodes if node.subtree is not None)
        if len(found) != len(nodes):
            raise errors.RepositoryDamaged(file=where, problem="a segment of the disk is no directory")
        return found

    def segments(self, disk: WalkedDisk) -> Iterator[tuple[int, bytes | errors.PullbackError]]:
        """The ids of the chunks of each segment, by its number, or why they cannot be had."""
        for first in range(0, len(disk.segments), _BATCH):
            numbers = range(first, min(first + _BATCH, len(disk.segments)))
            loaded = self._load([disk.segments[number] for number in numbers])
            for number in numbers:
                yield number, self._parsed(disk, number, loaded)

    def _load(self, wanted: Sequence[bytes]) -> dict[bytes, bytes | errors.PullbackError]:
        """Trees that are not remembered, at once; if that fails, one by one."""
        lacking = sorted({id for id in wanted if id not in self._known})
        fresh = [id for id in lacking if id not in self._told]
        if fresh:
            self._needs(b"".join(fresh), Blob.TREE)
        try:
            return dict(self._reader.trees(lacking))
        except _DAMAGE:
            return {id: self._one(id) for id in lacking}

    def _one(self, id: bytes) -> bytes | errors.PullbackError:
        try:
            return self._reader.read(id, Blob.TREE)
        except _DAMAGE as error:
            self._damaged(id, Blob.TREE, error)
            return error

    def _parsed(
        self, disk: WalkedDisk, number: int, loaded: dict[bytes, bytes | errors.PullbackError]
    ) -> bytes | errors.PullbackError:
        assert disk.shape is not None
        id, size = disk.segments[number], self._extent(disk, number).length
        ids = self._known.get(id)
        if ids is not None and len(ids) == -(-size // disk.shape.chunk) * ENTRY:
            self._known.move_to_end(id)
            return ids
        data = loaded.get(id) or self._one(id)
        if isinstance(data, errors.PullbackError):
            return data
        try:
            ids = trees.read_segment(data, size, disk.shape, f"the trees of {disk.target}")
        except errors.RepositoryDamaged as error:
            return error
        self._remember(id, ids)
        return ids

    def _remember(self, id: bytes, ids: bytes) -> None:
        if id not in self._known:
            self._bytes += len(ids)
        self._known[id] = ids
        while self._bytes > _REMEMBERED:
            _, old = self._known.popitem(last=False)
            self._bytes -= len(old)

    def _extent(self, disk: WalkedDisk, number: int) -> Extent:
        assert disk.shape is not None
        start = number * disk.shape.segment
        return between(start, min(start + disk.shape.segment, disk.shape.size))

    def _zeroes(self, disk: WalkedDisk, number: int, ids: bytes) -> int:
        assert disk.shape is not None
        zero = zero_hash(disk.shape.chunk)
        return sum(disk.shape.chunk for start in range(0, len(ids), ENTRY) if ids[start : start + ENTRY] == zero)

    # -- what else there is ------------------------------------------------------------------

    def _others(self, point: Point, nodes: Sequence[trees.Node]) -> list[WalkedDisk]:
        """Directories that are no disks, such as the firmware's variables: all their files must be there."""
        targets = {disk.target for disk in point.disks}
        found = []
        for folder, wanted in ((layout.FIRMWARE, point.firmware), (layout.TPM, point.tpm)):
            if wanted and folder not in {node.name for node in nodes}:
                problem = f"there is no directory {folder} in it"
                found.append(WalkedDisk(point.machine, point.id, folder, problem=problem))
        for node in nodes:
            if node.name in targets or node.subtree is None:
                continue
            other = WalkedDisk(point.machine, point.id, node.name)
            try:
                for entry in trees.parse(self._read(node.subtree, Blob.TREE), node.name):
                    if entry.content:
                        self._needs(entry.content, Blob.DATA)
                        other.content += entry.content
            except _DAMAGE as error:
                other.problem = clause(error)
            found.append(other)
        return found


def clause(error: errors.PullbackError) -> str:
    """An error's sentence, to go on behind a colon."""
    if isinstance(error, errors.VerificationFailed):
        return error.problem
    return str(error).rstrip(".")
