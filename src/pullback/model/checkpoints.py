"""Checkpoints as algebra: one bitmap per checkpoint and disk, only the newest recording.

    time ──●────────●────────●──────── now
           k        l        m
           [   k   ][   l   ][   m ▶        each bitmap holds the writes since its checkpoint,
                                            up to the next one; m still records

    changes since k      = k ∪ l ∪ m (frozen in the transaction)
    changes between k, m = k ∪ l
    delete l             : k and l become one bitmap, under k's name

A bitmap's name rebuilds the chain from the images alone:

    pullback/<first>-<last>/<nonce>/<checkpoint name>

`first`-`last` are the steps it covers (each new checkpoint is one step; a merge joins ranges), and
the nonce is a random mark, so that a name used again is never taken for the old one. Names have at
most 255 bytes: the limit of QEMU's bitmap migration (QAPI BitmapMigrationBitmapAlias).
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from pullback import errors
from pullback.model.disks import Bitmap

PREFIX = "pullback/"
NAME_LIMIT = 255
#: Bytes per bit. All bitmaps that are merged must have the same (QEMU 7.2 wants it so);
#: 64 KiB is QEMU's own default for qcow2, and the cluster of copy-before-write.
GRANULARITY = 65536
_STEP_LIMIT = 2**53
_BITMAP = re.compile(r"pullback/(\d{1,16})-(\d{1,16})/([0-9a-f]{16})/(.+)")
_CHECKPOINT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What a bitmap's name says: which checkpoint, and the steps it covers."""

    name: str
    nonce: str
    first: int
    last: int

    @property
    def bitmap(self) -> str:
        """The bitmap's name."""
        return f"{PREFIX}{self.first}-{self.last}/{self.nonce}/{self.name}"


def parse(bitmap: str) -> Mark | None:
    """The mark in a bitmap's name, or None if the bitmap is not ours."""
    match = _BITMAP.fullmatch(bitmap)
    if match is None or len(bitmap.encode()) > NAME_LIMIT or not _CHECKPOINT.fullmatch(match[4]):
        return None
    mark = Mark(name=match[4], nonce=match[3], first=int(match[1]), last=int(match[2]))
    # Not by another spelling of a number either: a mark must give the bitmap's name back.
    return mark if mark.first <= mark.last < _STEP_LIMIT and mark.bitmap == bitmap else None


def check_name(name: str) -> str:
    """`name` if it may name a checkpoint (libvirt's rule: A-Za-z0-9_.-, no dot first), else `UsageError`."""
    if not _CHECKPOINT.fullmatch(name) or len(name) > 150:
        raise errors.UsageError(problem=f"{name!r} cannot name a checkpoint (letters, digits, '_', '-', '.')")
    return name


def automatic_name(repository: str, moment: datetime) -> str:
    """Name of a checkpoint that a backup makes for its repository, its owner."""
    return f"auto.{repository}.{moment.astimezone(UTC):%Y%m%dT%H%M%SZ}"


def owner(name: str) -> str | None:
    """Id of the repository that owns an automatic checkpoint, or None if a user made it."""
    parts = name.split(".")
    return parts[1] if len(parts) == 3 and parts[0] == "auto" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A checkpoint of a disk: its mark and its bitmap."""

    mark: Mark
    bitmap: Bitmap


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """What deleting a checkpoint does on one disk, in one transaction.

    `add` (recording or not) is made, `sources` are merged into it, then all of `remove` go.
    Without an older neighbour there is nothing to merge into: `add` is None.
    """

    add: Mark | None
    recording: bool
    sources: tuple[str, ...]
    remove: tuple[str, ...]
    #: `add` is stored in the image, as what is merged into it was.
    persistent: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The checkpoints of one disk, oldest first, as its bitmaps show them."""

    links: tuple[Link, ...] = ()
    #: Why the chain is worthless, or None if it is sound.
    problem: str | None = None

    @property
    def newest(self) -> Link | None:
        """The one that records."""
        return self.links[-1] if self.links else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all its bitmaps."""
        return tuple(link.mark.bitmap for link in self.links)

    def find(self, nonce: str) -> Link | None:
        """The checkpoint with that nonce."""
        return next((link for link in self.links if link.mark.nonce == nonce), None)

    def next_mark(self, name: str) -> Mark:
        """The mark of a new checkpoint behind the newest."""
        step = self.newest.mark.last + 1 if self.newest else 1
        mark = Mark(name=check_name(name), nonce=secrets.token_hex(8), first=step, last=step)
        if len(mark.bitmap.encode()) > NAME_LIMIT:
            raise errors.UsageError(problem=f"The checkpoint name {name!r} is too long")
        return mark

    def since(self, mark: Mark) -> tuple[Link, ...] | str:
        """The bitmaps whose union is all changes since `mark`, or a sentence why there is none.

        A range that grew (neighbours merged into it) is still good; one that shrank is not ours.
        """
        if self.problem:
            return self.problem
        found = self.find(mark.nonce)
        if found is None:
            return "its last checkpoint is not on the disk"
        if found.mark.first != mark.first or found.mark.last < mark.last:
            return "the checkpoint on the disk covers other steps than recorded"
        return self.links[self.links.index(found) :]

    def between(self, older: Mark, newer: Mark) -> tuple[Link, ...] | str:
        """The bitmaps whose union is what changed between two checkpoints, or why there is none."""
        tail = self.since(older)
        if isinstance(tail, str):
            return tail
        nonces = [link.mark.nonce for link in tail]
        if newer.nonce not in nonces:
            return f"{newer.name} is not newer than {older.name} on this disk"
        return tail[: nonces.index(newer.nonce)]

    def deletion(self, nonce: str) -> Merge | None:
        """How to delete a checkpoint without losing another's changes; None if it is not there."""
        found = self.find(nonce)
        if found is None:
            return None
        index = self.links.index(found)
        if self.problem or index == 0:
            return Merge(add=None, recording=False, sources=(), remove=(found.mark.bitmap,))
        return _join(self.links[index - 1], found)


def _join(older: Link, link: Link) -> Merge:
    a, b = older.mark, link.mark
    joined = Mark(name=a.name, nonce=a.nonce, first=a.first, last=b.last)
    both = (a.bitmap, b.bitmap)
    return Merge(
        add=joined,
        recording=link.bitmap.recording,
        sources=both,
        remove=both,
        persistent=link.bitmap.persistent,
    )


def chain(bitmaps: Iterable[Bitmap]) -> Chain:
    """The chain that a disk's bitmaps make; foreign bitmaps are passed over."""
    marked = ((parse(bitmap.name), bitmap) for bitmap in bitmaps)
    links = sorted(
        (Link(mark=mark, bitmap=bitmap) for mark, bitmap in marked if mark is not None),
        key=lambda link: (link.mark.first, link.mark.last),
    )
    return Chain(links=tuple(links), problem=_problem(links))


def _problem(links: list[Link]) -> str | None:
    """Why these bitmaps cannot be trusted. After an unclean stop QEMU marks them inconsistent."""
    if any(link.bitmap.inconsistent for link in links):
        return "its bitmaps are inconsistent (the machine was stopped uncleanly)"
    if len({link.mark.nonce for link in links}) != len(links):
        return "two checkpoints on the disk have the same mark"
    pairs = list(itertools.pairwise(links))
    if any(older.mark.last + 1 != newer.mark.first for older, newer in pairs):
        return "a checkpoint is missing between two others"
    if any(link.bitmap.recording for link in links[:-1]):
        return "an older checkpoint is recording"
    if links and not links[-1].bitmap.recording:
        return "its newest checkpoint is not recording"
    if len({link.bitmap.granularity for link in links}) > 1:
        return "its checkpoints differ in granularity"
    return None
