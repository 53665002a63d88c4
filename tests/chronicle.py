"""What disks and checkpoints must be after any history: bytes, and every change in order. Knows nothing of pullback.

A disk is its bytes and the list of all changes of it. A moment is a place in that list, so what changed
between two moments is a union of its entries; there is nothing here to merge, to delete or to re-number,
which is what the bitmaps behind checkpoints do and what is tested.

Two sets are kept of each change. `must`: granules that a client would miss if they were not told, because
their bytes were written, zeroed or discarded with effect. `may`: all that the request touched, also where a
discard had no effect (qcow2 discards whole clusters only, but QEMU marks what was asked for).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from storm import Operation

GRANULE = 65536
Granules = frozenset[int]


def granules(start: int, end: int) -> Granules:
    """Those that a range of bytes touches."""
    return frozenset(range(start // GRANULE, -(-end // GRANULE))) if start < end else frozenset()


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an answer about changes must hold, and what it may hold at most."""

    must: Granules
    may: Granules

    def complaint(self, told: Granules) -> str | None:
        """What is wrong with an answer, or None."""
        if missing := self.must - told:
            return f"changed and not told: {sorted(missing)}"
        if more := told - self.may:
            return f"told and not changed: {sorted(more)}"
        return None


@dataclass(frozen=True, slots=True)
class Change:
    """An entry of a disk's list. `size`: of the disk after it."""

    must: Granules
    may: Granules
    size: int


@dataclass(slots=True)
class Disk:
    """A disk: what it holds, and how it came to that."""

    target: str
    format: str
    content: bytearray
    changes: list[Change] = field(default_factory=list)

    @property
    def now(self) -> int:
        """This moment."""
        return len(self.changes)

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content)

    @property
    def lasting(self) -> bool:
        """Does it keep its bitmaps when QEMU ends?"""
        return self.format == "qcow2"

    def apply(self, operation: Operation) -> None:
        """A write, zeroes or a discard."""
        start, end = self.effective(operation)
        if start < end:
            self.content[start:end] = bytes([operation.value]) * (end - start)
        may = granules(operation.start, operation.start + operation.length)
        self.changes.append(Change(granules(start, end), may, self.size))

    def effective(self, operation: Operation) -> tuple[int, int]:
        """The range that it changes; empty where the end is not behind the start."""
        start, end = operation.start, operation.start + operation.length
        if operation.kind == "discard" and self.format == "qcow2":
            start = -(-start // GRANULE) * GRANULE
            end = end if end == self.size else end // GRANULE * GRANULE
        return start, end

    def resize(self, size: int) -> None:
        """The end goes, or zeroes come. Neither is told by any bitmap (see the module that uses this)."""
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))
        self.changes.append(Change(frozenset(), frozenset(), size))

    def between(self, since: int, until: int | None = None) -> Bounds:
        """What changed. Of what a shrink took away nothing is known any more, as in bitmaps."""
        must: set[int] = set()
        may: set[int] = set()
        for change in self.changes[since:until]:
            inside = granules(0, change.size)
            must = (must | change.must) & inside
            may = (may | change.may) & inside
        return Bounds(frozenset(must), frozenset(may))

    def resized(self, since: int, until: int | None = None) -> bool:
        """Was there another size between?"""
        sizes = {change.size for change in self.changes[max(since - 1, 0) : until]}
        return len(sizes) > 1


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint: its moment on each disk on which it is there."""

    name: str
    #: In the order of making.
    number: int
    at: dict[str, int]
    #: Its document is kept, so that it is listed even without a bitmap.
    documented: bool = True


@dataclass(slots=True)
class Instant:
    """A moment of several disks, that a snapshot or a job shows."""

    #: By target.
    content: dict[str, bytes]
    at: dict[str, int]
    #: The checkpoints that were there before it, by disk: name -> number.
    older: dict[str, dict[str, int]]
    #: Disks on which checkpoints were deleted since: what is told of changes may be more than they were.
    disturbed: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Chronicle:
    """All disks of a machine, its checkpoints, and the instants that are held."""

    disks: dict[str, Disk]
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    instants: dict[str, Instant] = field(default_factory=dict)
    made: int = 0

    def checkpoint(self, name: str, targets: Iterable[str], at: Mapping[str, int] | None = None, **more: bool) -> None:
        """One is made, now or at an instant."""
        self.made += 1
        moments = {target: at[target] if at else self.disks[target].now for target in targets}
        self.checkpoints[name] = Checkpoint(name, self.made, moments, **more)

    def freeze(self, name: str, targets: Iterable[str]) -> Instant:
        """An instant is held from now on."""
        targets = list(targets)
        made = Instant(
            content={target: bytes(self.disks[target].content) for target in targets},
            at={target: self.disks[target].now for target in targets},
            older={target: {known.name: known.number for known in self.on(target)} for target in targets},
        )
        self.instants[name] = made
        return made

    def on(self, target: str) -> list[Checkpoint]:
        """The checkpoints of a disk, oldest first."""
        found = (known for known in self.checkpoints.values() if target in known.at)
        return sorted(found, key=lambda known: known.number)

    def delete(self, name: str, targets: Iterable[str] | None = None) -> None:
        """A checkpoint goes, from all disks or some; without any it is gone."""
        gone = self.checkpoints[name]
        for target in list(gone.at if targets is None else set(targets) & set(gone.at)):
            del gone.at[target]
            for instant in self.instants.values():
                instant.disturbed.add(target)
        if targets is None or not (gone.at or gone.documented):
            del self.checkpoints[name]

    def later(self, name: str) -> set[str]:
        """Those made later that share a disk with it: they go with it, and no others may that are older."""
        first = self.checkpoints[name]
        return {
            known.name
            for known in self.checkpoints.values()
            if known.number > first.number and set(known.at) & set(first.at)
        }

    def shown(self, instant: Instant, target: str) -> list[Checkpoint]:
        """The checkpoints since which an instant can tell the changes of a disk."""
        older = instant.older[target]
        return [known for known in self.on(target) if older.get(known.name) == known.number]

    def told(self, instant: Instant, target: str, since: Checkpoint) -> Bounds:
        """What an export of an instant must tell of the changes since a checkpoint, as things are now."""
        disk = self.disks[target]
        bounds = disk.between(since.at[target], instant.at[target])
        if target in instant.disturbed:
            return Bounds(bounds.must, disk.between(since.at[target]).may)
        return bounds
