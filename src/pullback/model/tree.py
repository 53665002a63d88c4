"""The machine's checkpoints as one tree, from the bitmaps of its disks and the saved documents. Pure.

    vda   monday ── tuesday ── wednesday ▶          a chain of bitmaps on each disk (`checkpoints`)
    vdb   monday ───────────── wednesday ▶
    saved monday, tuesday, wednesday, lost           documents: time, description, parent, marks

    tree  monday ── tuesday ── wednesday             lost: a document without bitmaps

The bitmaps are the truth. What they tell of the order holds; the documents add what no bitmap knows.
A checkpoint has one name on all its disks and another nonce on each. A document names its bitmaps,
so that it is never taken for the document of a later checkpoint of the same name. Without any
document the tree is what the bitmaps tell: the same checkpoints, without descriptions.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from pullback import errors
from pullback.model import checkpoints
from pullback.model.checkpoints import Chain, Link, Mark
from pullback.model.disks import Bitmap, Disk
from pullback.model.documents.checkpoint import CheckpointDocument

#: Bits of a word, and levels, of QEMU's bitmaps in memory (util/hbitmap.c, HBITMAP_LEVELS on 64 bits).
_WORD, _LEVELS = 64, 7
#: Bytes of an entry of a bitmap's table, and of one in the directory (QEMU docs/interop/qcow2.txt).
_TABLE_ENTRY, _DIRECTORY_ENTRY = 8, 24
_METADATA_ONLY = "none of its bitmaps is on the disks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What is kept on disk about a checkpoint, beside its bitmaps."""

    document: CheckpointDocument
    #: Target -> name of the bitmap, as they were when the document was made.
    marks: Mapping[str, str]
    #: The machine at that moment, for people and for a later restore (JSON values).
    machine: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        assert self.document.name is not None, "only documents with a name are saved"
        return self.document.name


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDisk:
    """A checkpoint on one disk."""

    target: str
    mark: Mark
    #: Bytes that one bit stands for.
    granularity: int
    #: Bytes marked in its own steps: since it, up to the next one.
    recorded: int
    #: It notices new writes: it is the newest on its disk.
    recording: bool
    #: A job or an export uses its bitmap.
    busy: bool
    #: Bytes of QEMU's memory that the bitmap takes at most: what never had a bit is not touched.
    memory: int
    #: Bytes that it takes in its image at most; 0 if it is not stored there.
    stored: int
    #: Why it is of no use on this disk, or None.
    problem: str | None = None
    #: Bytes changed since it, exactly; None if that was not asked.
    dirty: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A named moment of a machine since which changes are tracked."""

    name: str
    #: UTC; None if nobody knows.
    created: datetime | None = None
    description: str | None = None
    #: Name of the one before it.
    parent: str | None = None
    disks: tuple[CheckpointDisk, ...] = ()
    #: Id of the repository whose backup made it, or None.
    owner: str | None = None
    #: Why it cannot be relied on, or None.
    problem: str | None = None
    saved: Saved | None = None

    @property
    def metadata_only(self) -> bool:
        """Is there a document, and no bitmap?"""
        return not self.disks

    @property
    def recording(self) -> bool:
        """Does one of its bitmaps notice new writes?"""
        return any(disk.recording for disk in self.disks)

    def disk(self, target: str) -> CheckpointDisk | None:
        """Its part on a disk; should there be two, the one that can be relied on, or the newer."""
        found = [disk for disk in self.disks if disk.target == target]
        return next((disk for disk in found if disk.problem is None), found[-1] if found else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """All checkpoints of a machine."""

    machine: str = ""
    #: Parents before children; among those that nothing orders, the older first.
    checkpoints: tuple[Checkpoint, ...] = ()
    #: What else should be known: documents that are of no use.
    notes: tuple[str, ...] = ()

    def find(self, name: str) -> Checkpoint | None:
        """The checkpoint of that name."""
        return next((found for found in self.checkpoints if found.name == name), None)

    def require(self, name: str) -> Checkpoint:
        """The checkpoint of that name; `NoCheckpoint` if there is none."""
        found = self.find(name)
        if found is None:
            raise errors.NoCheckpoint(checkpoint=name, machine=self.machine)
        return found

    @property
    def current(self) -> Checkpoint | None:
        """The newest: the one whose bitmaps record."""
        return next((found for found in reversed(self.checkpoints) if found.recording), None)

    def require_current(self) -> Checkpoint:
        """The newest; `NoCheckpoint` if none records."""
        if self.current is None:
            raise errors.NoCheckpoint(checkpoint="current", machine=self.machine)
        return self.current

    def require_parent(self, name: str) -> Checkpoint:
        """The one before; `NoCheckpoint` above a root."""
        above = self.parent(name)
        if above is None:
            raise errors.NoCheckpoint(checkpoint=f"parent of {name}", machine=self.machine)
        return above

    @property
    def roots(self) -> tuple[Checkpoint, ...]:
        """Those without a parent."""
        return tuple(found for found in self.checkpoints if found.parent is None)

    @property
    def leaves(self) -> tuple[Checkpoint, ...]:
        """Those without children."""
        parents = {found.parent for found in self.checkpoints}
        return tuple(found for found in self.checkpoints if found.name not in parents)

    def parent(self, name: str) -> Checkpoint | None:
        """The one before; None for a root."""
        above = self.require(name).parent
        return None if above is None else self.require(above)

    def children(self, name: str) -> tuple[Checkpoint, ...]:
        """Those right behind it."""
        self.require(name)
        return tuple(found for found in self.checkpoints if found.parent == name)

    def descendants(self, name: str) -> tuple[Checkpoint, ...]:
        """All behind it, parents first."""
        self.require(name)
        below = {name}
        found = []
        for checkpoint in self.checkpoints:
            if checkpoint.parent in below:
                below.add(checkpoint.name)
                found.append(checkpoint)
        return tuple(found)

    def select(
        self,
        *,
        roots: bool = False,
        leaves: bool | None = None,
        start: str | None = None,
        descendants: bool = False,
    ) -> tuple[Checkpoint, ...]:
        """Some of them, parents first.

        `start`: its children, or all its `descendants`; else all, or only the `roots`. `leaves`:
        only those without children (True), or only those with some (False).
        """
        if start is None:
            chosen = self.roots if roots else self.checkpoints
        else:
            chosen = self.descendants(start) if descendants else self.children(start)
        if leaves is None:
            return chosen
        ends = {found.name for found in self.leaves}
        return tuple(found for found in chosen if (found.name in ends) is leaves)


# -- what a bitmap costs ---------------------------------------------------------------------


def memory(size: int, granularity: int) -> int:
    """Bytes that a bitmap of a disk of `size` bytes takes in QEMU's memory at most."""
    bits = -(-size // granularity)
    total = 0
    for _ in range(_LEVELS):
        bits = max(-(-bits // _WORD), 1)
        total += bits * _WORD // 8
    return total


def stored(size: int, granularity: int, cluster: int) -> int:
    """Bytes that a bitmap takes in a qcow2 image at most: its clusters of bits, their table, its directory entry."""
    data = -(-size // granularity // 8)
    clusters = -(-data // cluster)
    table = -(-clusters * _TABLE_ENTRY // cluster)
    return (clusters + table) * cluster + _DIRECTORY_ENTRY


# -- building --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Draft:
    """A checkpoint in the making."""

    name: str
    disks: list[CheckpointDisk] = field(default_factory=list)
    saved: Saved | None = None
    problems: list[str] = field(default_factory=list)
    #: Names of those right before it on one of its disks.
    before: set[str] = field(default_factory=set)

    @property
    def created(self) -> datetime | None:
        seconds = self.saved.document.creation_time if self.saved else None
        return _automatic_time(self.name) if seconds is None else _moment(seconds)

    @property
    def rank(self) -> tuple[bool, float, str]:
        """Place among those that nothing else orders."""
        created = self.created
        return created is None, created.timestamp() if created else 0.0, self.name


def build(disks: Sequence[Disk], saved: Iterable[Saved] = (), *, machine: str = "") -> Tree:
    """The tree of a machine with these disks, and these documents about it."""
    chains = {disk.target: checkpoints.chain(disk.bitmaps) for disk in disks}
    drafts: dict[str, _Draft] = {}
    for disk in disks:
        _gather(disk, chains[disk.target], drafts)
    notes = []
    for document in saved:
        note = _join(document, disks, chains, drafts)
        if note:
            notes.append(note)
    return Tree(machine=machine, checkpoints=_finished(_ordered(drafts), drafts), notes=tuple(notes))


def _gather(disk: Disk, chain: Chain, drafts: dict[str, _Draft]) -> None:
    """Add one disk's bitmaps."""
    before: str | None = None
    for link in chain.links:
        draft = drafts.setdefault(link.mark.name, _Draft(link.mark.name))
        draft.disks.append(_on_disk(disk, chain, link))
        if before is not None and before != draft.name:
            draft.before.add(before)
        before = draft.name


def _on_disk(disk: Disk, chain: Chain, link: Link) -> CheckpointDisk:
    bitmap: Bitmap = link.bitmap
    granularity = max(bitmap.granularity, 1)
    return CheckpointDisk(
        target=disk.target,
        mark=link.mark,
        granularity=bitmap.granularity,
        recorded=min(bitmap.count, disk.size),
        recording=bitmap.recording,
        busy=bitmap.busy,
        memory=memory(disk.size, granularity),
        stored=stored(disk.size, granularity, disk.cluster) if bitmap.persistent else 0,
        problem=chain.problem,
    )


def _join(saved: Saved, disks: Sequence[Disk], chains: Mapping[str, Chain], drafts: dict[str, _Draft]) -> str | None:
    """Join a document to its bitmaps; a sentence if it is not theirs."""
    name = saved.name
    draft = drafts.get(name)
    if draft is None:
        drafts[name] = _Draft(name, saved=saved, problems=[_METADATA_ONLY + _why(saved, disks)])
        return None
    marks = {target: mark for target, bitmap in saved.marks.items() if (mark := checkpoints.parse(bitmap)) is not None}
    by_nonce = {mark.nonce: mark for mark in marks.values()}
    if not any(found.mark.nonce in by_nonce for found in draft.disks):
        return f"the document of {name} is of another checkpoint of that name"
    draft.saved = saved
    draft.disks = [_compared(found, by_nonce.get(found.mark.nonce)) for found in draft.disks]
    for tracked in saved.document.tracked:
        mark = marks.get(tracked.name)
        if mark is None or not any(chain.find(mark.nonce) for chain in chains.values()):
            draft.problems.append(_missing(tracked.name, mark, disks))
    return None


def _compared(found: CheckpointDisk, mark: Mark | None) -> CheckpointDisk:
    """What is on a disk, with what its document says against it. The nonce proves which it is, whatever its target."""
    if found.problem:
        return found
    if mark is None:
        return replace(found, problem="it is another checkpoint of that name")
    if found.mark.first != mark.first or found.mark.last < mark.last:
        return replace(found, problem="its bitmap covers other steps than recorded")
    return found


def _missing(target: str, mark: Mark | None, disks: Sequence[Disk]) -> str:
    """What is wrong with a disk of a document that has no bitmap."""
    if mark is not None and any(_is_buried(disk, mark.nonce) for disk in disks):
        return f"{target}: its bitmap lies in a backing image (an external snapshot was made)"
    there = any(disk.target == target for disk in disks)
    return f"{target}: its bitmap is missing" if there else f"{target}: there is no such disk now"


def _is_buried(disk: Disk, nonce: str) -> bool:
    found = (checkpoints.parse(name) for name in disk.buried)
    return any(mark is not None and mark.nonce == nonce for mark in found)


def _why(saved: Saved, disks: Sequence[Disk]) -> str:
    """More about a document whose bitmaps are nowhere."""
    marks = [mark for bitmap in saved.marks.values() if (mark := checkpoints.parse(bitmap)) is not None]
    buried = any(_is_buried(disk, mark.nonce) for disk in disks for mark in marks)
    return ": they lie in backing images (an external snapshot was made)" if buried else ""


# -- order -----------------------------------------------------------------------------------


def _ordered(drafts: Mapping[str, _Draft]) -> list[str]:
    """All names, each behind those that its bitmaps, or else its document, put before it.

    Bitmaps of one disk cannot disagree; those of several can, after names were used again, and
    documents can say anything. What stands in the way of an order is passed over, documents first.
    """
    waits = {name: set(draft.before) | _document_parent(draft, drafts) for name, draft in drafts.items()}
    behind: dict[str, set[str]] = {}
    for name, before in waits.items():
        for other in before:
            behind.setdefault(other, set()).add(name)
    ready = [(drafts[name].rank, name) for name, before in waits.items() if not before]
    heapq.heapify(ready)
    order: list[str] = []
    while len(order) < len(drafts):
        if not ready:
            ready = [(drafts[name].rank, name) for name in _unblocked(waits, drafts)]
            heapq.heapify(ready)
        _, name = heapq.heappop(ready)
        order.append(name)
        waits.pop(name, None)
        for other in behind.get(name, ()):
            if other in waits and name in waits[other]:
                waits[other].discard(name)
                if not waits[other]:
                    heapq.heappush(ready, (drafts[other].rank, other))
    return order


def _document_parent(draft: _Draft, drafts: Mapping[str, _Draft]) -> set[str]:
    parent = draft.saved.document.parent if draft.saved else None
    return {parent} if parent is not None and parent in drafts and parent != draft.name else set()


def _unblocked(waits: dict[str, set[str]], drafts: Mapping[str, _Draft]) -> list[str]:
    """The order goes round in a circle: forget the documents' word, and if that is not enough, one disk's."""
    for name in waits:
        waits[name] &= drafts[name].before
    free = [name for name, before in waits.items() if not before]
    if free:
        return free
    name = _in_a_circle(waits)
    drafts[name].problems.append("its disks disagree about what came before it")
    waits[name] = set()
    return [name]


def _in_a_circle(waits: Mapping[str, set[str]]) -> str:
    """One of a circle: going back from anywhere, one comes round."""
    name = min(waits)
    seen: set[str] = set()
    while name not in seen:
        seen.add(name)
        name = min(waits[name])
    return name


def _finished(order: Sequence[str], drafts: Mapping[str, _Draft]) -> tuple[Checkpoint, ...]:
    place = {name: index for index, name in enumerate(order)}
    return tuple(_checkpoint(drafts[name], _parent(drafts[name], drafts, place)) for name in order)


def _parent(draft: _Draft, drafts: Mapping[str, _Draft], place: Mapping[str, int]) -> str | None:
    """The last of those right before it; for what only the document can tell, the document's."""
    candidates = draft.before | _document_parent(draft, drafts)
    earlier = [name for name in candidates if place[name] < place[draft.name]]
    return max(earlier, key=place.__getitem__, default=None)


def _checkpoint(draft: _Draft, parent: str | None) -> Checkpoint:
    disks = _told_apart(draft.disks)
    problems = [*draft.problems, *(f"{disk.target}: {disk.problem}" for disk in disks if disk.problem)]
    return Checkpoint(
        name=draft.name,
        created=draft.created,
        description=draft.saved.document.description if draft.saved else None,
        parent=parent,
        disks=disks,
        owner=checkpoints.owner(draft.name),
        problem="; ".join(dict.fromkeys(problems)) or None,
        saved=draft.saved,
    )


def _told_apart(disks: Sequence[CheckpointDisk]) -> tuple[CheckpointDisk, ...]:
    """Two of one name on a disk, and no document to tell which is meant: neither can be relied on."""
    sound = [disk.target for disk in disks if disk.problem is None]
    twice = {target for target in sound if sound.count(target) > 1}
    return tuple(
        replace(disk, problem="it has two checkpoints of that name") if disk.target in twice else disk for disk in disks
    )


def with_sizes(tree: Tree, sizes: Mapping[tuple[str, str], int]) -> Tree:
    """The tree with the exact bytes changed since each checkpoint, by (target, nonce)."""

    def sized(disk: CheckpointDisk) -> CheckpointDisk:
        return replace(disk, dirty=sizes.get((disk.target, disk.mark.nonce)))

    found = (replace(item, disks=tuple(map(sized, item.disks))) for item in tree.checkpoints)
    return replace(tree, checkpoints=tuple(found))


def _automatic_time(name: str) -> datetime | None:
    """The time in the name that a backup gives (`checkpoints.automatic_name`)."""
    if checkpoints.owner(name) is None:
        return None
    try:
        return datetime.strptime(name.rpartition(".")[2], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def _moment(seconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):  # a document may say any number
        return None
