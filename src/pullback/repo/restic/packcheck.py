"""Is a pack what was written, and if not, which of its blobs are still good? Pure.

Three witnesses are heard: the file's name (its SHA-256), its header, and the index. Each blob then
speaks for itself: one that can be unsealed and has the hash that is its id is good, wherever it lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pullback import errors
from pullback.repo.restic import blobs, packs
from pullback.repo.restic.crypto import Key
from pullback.repo.restic.types import OVERHEAD, Entry

#: Bytes of a blob in a pack's header, uncompressed and compressed ("Pack Format").
_HEADER_ENTRY, _HEADER_PACKED = 37, packs.MAX_HEADER_ENTRY


@dataclass(frozen=True, slots=True)
class PackVerdict:
    """What was found about a pack."""

    #: What is wrong with the file, as a clause; None: it is what was written.
    problem: str | None
    #: Blobs, by header or index, that are not there.
    bad: tuple[Entry, ...]
    #: Blobs that were proven.
    good: int


def check(key: Key, name: str, data: bytes, listed: Iterable[Entry]) -> PackVerdict:
    """Judge the file `data` with the name `name`, in which the index lists these blobs."""
    where = f"data/{name}"
    problems = []
    if hashlib.sha256(data).hexdigest() != name:
        problems.append("its name is not the SHA-256 of its content")
    known = set(listed)
    try:
        header = set(packs.parse_pack(key, data, where))
    except errors.RepositoryDamaged as error:
        header = set()
        problems.append(f"its header cannot be used ({error.problem})")
    else:
        if known - header:
            problems.append(f"the index tells of {len(known - header)} blobs that its header does not")
    view = memoryview(data)
    every = sorted(known | header, key=lambda entry: (entry.offset, entry.id))
    bad = tuple(entry for entry in every if not _is_good(key, view, entry, where))
    if bad and not problems:
        problems.append(f"{len(bad)} of its blobs are not what their ids say")
    return PackVerdict("; ".join(problems) or None, bad, len(every) - len(bad))


def _is_good(key: Key, data: memoryview, entry: Entry, where: str) -> bool:
    try:
        blobs.decode(key, data[entry.offset : entry.offset + entry.length], entry, where)
    except errors.RepositoryDamaged:
        return False
    return True


def expected_size(entries: Sequence[Entry]) -> int | None:
    """Bytes that a pack with exactly these blobs has; None if they do not lie side by side from its beginning."""
    offset = 0
    for entry in sorted(set(entries), key=lambda entry: entry.offset):
        if entry.offset != offset:
            return None
        offset += entry.length
    header = sum(_HEADER_PACKED if entry.raw_length else _HEADER_ENTRY for entry in set(entries))
    return offset + header + OVERHEAD + packs.TRAILER


def size_problem(entries: Sequence[Entry], size: int | None) -> str | None:
    """What is wrong with a pack of `size` bytes (None: it is not there), which must hold these blobs; None: nothing."""
    if size is None:
        return "it is missing"
    expected = expected_size(entries)
    least = max((entry.offset + entry.length for entry in entries), default=0)
    if size < least or (expected is not None and size != expected):
        return f"it has {size} bytes instead of {expected or f'{least} at least'}"
    return None
