"""How much a restore point takes, and how much of that would be freed if it were forgotten.

Restore points share chunks. What no other point of the repository has is held by one alone: removing
that point lets `prune` free it. Points of other machines count as well, because chunks are stored once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

from pullback import errors
from pullback.model.points import Point
from pullback.progress import Cancel
from pullback.repo.digest import ENTRY, zero_hash
from pullback.repo.restic import trees
from pullback.repo.restic.repository import Repository
from pullback.repo.restic.snapshots import Snapshot
from pullback.repo.restic.types import Blob

_DAMAGE = (errors.RepositoryDamaged, errors.ObjectMissing, errors.ObjectDamaged)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Of one restore point. Sizes in bytes, as stored: compressed and sealed."""

    #: Of all disks, and how many of them are all zero.
    chunks: int
    zero_chunks: int
    #: Different ones.
    distinct: int
    #: That no other point has.
    alone: int
    #: Of the different ones, together.
    stored: int
    #: Of what no other point has, trees and manifest included.
    freed: int


@dataclass(frozen=True, slots=True)
class _Needs:
    """What a point needs: ids."""

    #: Trees of the root and of its directories.
    tops: frozenset[bytes]
    #: Trees of the disks' segments.
    segments: frozenset[bytes]
    #: Blobs of what is no disk: the manifest, the firmware's variables.
    others: frozenset[bytes]


def usage(repository: Repository, point: Point, *, cancel: Cancel) -> Usage:
    """Count; the trees of all points are read, as far as they differ.

    Raises `VerificationFailed` if this one is damaged.
    """
    found = repository.snapshots()
    own = found[point.id]
    assert isinstance(own, Snapshot)
    try:
        mine = _needs(repository, own)
        contents = dict(_contents(repository, sorted(mine.segments)))
    except _DAMAGE as error:
        raise errors.VerificationFailed(point=point.id, problem=str(error).rstrip(".")) from error
    theirs = _Needs(frozenset(), frozenset(), frozenset())
    for name, other in found.items():
        cancel.check()
        if name != point.id and isinstance(other, Snapshot):
            theirs = _joined(theirs, _needs_if_sound(repository, other))
    alone = set(_ids(contents[tree] for tree in mine.segments - theirs.segments))
    alone.difference_update(_ids(contents[tree] for tree in mine.segments & theirs.segments))
    for tree in theirs.segments - mine.segments:
        cancel.check()
        if not alone:
            break
        alone.difference_update(_ids([_content(repository, tree)]))
    every = [id for disk in point.disks for id in _ids([repository.hashes(point, disk.target).encode()])]
    distinct = set(every)
    zero = {zero_hash(disk.block_size) for disk in point.disks}
    lone_trees = (mine.tops | mine.segments) - theirs.tops - theirs.segments
    return Usage(
        chunks=len(every),
        zero_chunks=sum(id in zero for id in every),
        distinct=len(distinct),
        alone=len(alone),
        stored=_stored(repository, distinct, Blob.DATA),
        freed=_stored(repository, alone | (mine.others - theirs.others), Blob.DATA)
        + _stored(repository, lone_trees, Blob.TREE),
    )


def _needs(repository: Repository, snapshot: Snapshot) -> _Needs:
    root = bytes.fromhex(snapshot.tree)
    top = trees.parse(repository.reader.read(root, Blob.TREE), "its root")
    below = [node.subtree for node in top if node.subtree is not None]
    nodes = [node for data in repository.reader.trees(below).values() for node in trees.parse(data, "its trees")]
    return _Needs(
        tops=frozenset([root, *below]),
        segments=frozenset(node.subtree for node in nodes if node.subtree is not None),
        others=frozenset(_ids(node.content for node in (*top, *nodes) if node.content)),
    )


def _needs_if_sound(repository: Repository, snapshot: Snapshot) -> _Needs:
    """Nothing, of a point that cannot be read."""
    try:
        return _needs(repository, snapshot)
    except _DAMAGE:
        return _Needs(frozenset(), frozenset(), frozenset())


def _joined(one: _Needs, other: _Needs) -> _Needs:
    return _Needs(one.tops | other.tops, one.segments | other.segments, one.others | other.others)


def _contents(repository: Repository, segments: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    for tree, data in repository.reader.trees(segments).items():
        yield tree, b"".join(node.content or b"" for node in trees.parse(data, ""))


def _content(repository: Repository, tree: bytes) -> bytes:
    try:
        data = repository.reader.read(tree, Blob.TREE)
        return b"".join(node.content or b"" for node in trees.parse(data, ""))
    except _DAMAGE:
        return b""


def _ids(contents: Iterable[bytes]) -> Iterator[bytes]:
    for content in contents:
        for at in range(0, len(content), ENTRY):
            yield content[at : at + ENTRY]


def _stored(repository: Repository, ids: Set[bytes], kind: Blob) -> int:
    located = repository.index.locate(b"".join(ids), kind)
    return sum(length for row, length in zip(located.pack.tolist(), located.length.tolist(), strict=True) if row >= 0)
