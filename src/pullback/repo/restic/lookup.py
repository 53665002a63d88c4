"""The index in memory: where each blob lies, for millions of blobs.

restic's index files ("Indexing") are JSON, 150 bytes per blob. Each is parsed once to a `Part`, a
table of columns that is sorted by the first 8 bytes of the ids, and takes 49 bytes per blob:

    key   first 8 bytes of the id, as a number       rest  the other 24 bytes, as three numbers
    pack  row of `packs` | offset | length | raw_length | kind

A part can be kept in a file and mapped into memory again, so that only what is looked at is read.
An `Index` joins the keys of all parts into one sorted list at the first look-up (12 bytes per blob):
a look-up is a binary search there, then all 32 bytes are compared, as two ids may begin alike.

Blobs that are added while a backup runs go to a dict first, and from there to small parts. Whoever
looks up reads the dict, then the tuple of runs; whoever adds replaces the runs, then the dict. So
a look-up needs no lock and never misses a blob on its way from the one to the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import secrets
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pullback import errors
from pullback.repo.restic import documents
from pullback.repo.restic.types import ID, OVERHEAD, Blob, Buffer, Entry
from pullback.units import MiB

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers = npt.NDArray[np.uint64]
    Halves = npt.NDArray[np.uint32]
    Small = npt.NDArray[np.uint8]
    Rows = npt.NDArray[np.int64]
else:

    class _Numpy:
        """numpy, imported when it is first used: a third of a command's start, which many commands never need."""

        def __getattr__(self, name: str) -> Any:
            import numpy

            value = getattr(numpy, name)
            setattr(self, name, value)
            return value

    np = _Numpy()

#: Blobs that are added before they are made a part.
_FRESH = 8192
#: Ids that are looked up at once.
_BATCH = 1 << 16
#: Runs in which a look-up searches, before the small ones are joined.
_RUNS = 8
_MAX_LENGTH = (1 << 32) - 1
#: Bytes of the shortest entry in a pack's header.
_ENTRY_LEAST = 37
_KINDS = {kind.word: int(kind) for kind in Blob}
#: Magic, number 1 in this machine's byte order, blobs, packs, id of the index file, SHA-256 of the rest.
_HEADER = struct.Struct("=16sQQQ32s32s")
_MAGIC = b"pullback index 1"


class Place(NamedTuple):
    """Where a copy of a blob lies."""

    #: The pack's id.
    pack: bytes
    offset: int
    length: int
    #: Of the plain content if it is compressed, else 0.
    raw_length: int
    kind: Blob

    def entry(self, id: bytes) -> Entry:
        """The same as an entry of the pack, for the blob `id`."""
        return Entry(id, self.kind, self.offset, self.length, self.raw_length)


@dataclass(frozen=True, slots=True)
class Located:
    """Where each of some ids lies: arrays with one row per id."""

    #: The packs that occur.
    packs: list[bytes]
    #: Row of `packs`; -1 if the blob is missing.
    pack: Rows
    offset: Halves
    length: Halves
    raw_length: Halves


@dataclass(frozen=True, slots=True)
class Part:
    """What one index file lists, sorted by `key`. Never changed."""

    key: Numbers
    rest: Numbers
    pack: Halves
    offset: Halves
    length: Halves
    raw_length: Halves
    kind: Small
    #: Ids of the packs, one after another.
    packs: bytes

    def __len__(self) -> int:
        return len(self.key)

    @classmethod
    def of(cls, packs: Iterable[tuple[bytes, Sequence[Entry]]]) -> Part:
        """A part of these packs and what is in them."""
        listed = list(packs)
        entries = [entry for _, found in listed for entry in found]
        return _sorted_part(
            b"".join(entry.id for entry in entries),
            np.repeat(np.arange(len(listed), dtype=np.uint32), [len(found) for _, found in listed]),
            [np.array([entry[column] for entry in entries], dtype=np.uint32) for column in (2, 3, 4, 1)],
            b"".join(pack for pack, _ in listed),
        )

    @classmethod
    def parse(cls, data: Buffer, where: str) -> Part:
        """A part of the document of an index file. Raises `RepositoryDamaged` (its file is `where`)."""
        packs = documents.load(data, where).list("packs", [])
        try:
            return _parsed(packs)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise errors.RepositoryDamaged(file=where, problem="it lists an impossible blob") from error

    def save(self, path: Path, index_id: str) -> None:
        """Keep it in the file `path`, for the index file of that id. Raises `OSError`."""
        columns = [np.ascontiguousarray(column).tobytes() for column in self._columns()]
        body = b"".join([*columns, self.packs])
        digest = hashlib.sha256(body).digest()
        head = _HEADER.pack(_MAGIC, 1, len(self), len(self.packs) // ID, bytes.fromhex(index_id), digest)
        temporary = path.with_name(f".{secrets.token_hex(8)}")
        try:
            with open(temporary, "xb") as file:
                file.write(head)
                file.write(body)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    @classmethod
    def load(cls, path: Path, index_id: str) -> Part | None:
        """The part that was kept there for that index file; None if there is none, or it is damaged."""
        try:
            with open(path, "rb") as file:
                head = file.read(_HEADER.size)
                if len(head) < _HEADER.size:
                    return None
                magic, order, blobs, packs, id, digest = _HEADER.unpack(head)
                size = _HEADER.size + blobs * _ROW + packs * ID
                if (magic, order, id.hex()) != (_MAGIC, 1, index_id) or os.fstat(file.fileno()).st_size != size:
                    return None
                # Read, not mapped: pages that are only hashed shall not count as our memory.
                state = hashlib.sha256()
                while piece := file.read(MiB):
                    state.update(piece)
                if state.digest() != digest:
                    return None
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError:
            return None
        return _mapped_part(mapped, blobs)

    def entry(self, row: int) -> Entry:
        """What is in that row."""
        id = self.key[row].tobytes() + self.rest[row].tobytes()
        return Entry(id, Blob(self.kind[row]), *self._numbers(row))

    def place(self, row: int) -> Place:
        """Where the blob in that row lies."""
        return Place(self.pack_id(int(self.pack[row])), *self._numbers(row), Blob(self.kind[row]))

    def pack_id(self, number: int) -> bytes:
        """The id of a pack, by its row in `packs`."""
        return self.packs[number * ID : (number + 1) * ID]

    def pack_rows(self, wanted: frozenset[bytes]) -> Rows:
        """The rows of all blobs in the wanted packs."""
        alike = np.isin(_words(self.packs)[:, 0], _words(b"".join(wanted))[:, 0])
        numbers = [number for number in np.flatnonzero(alike).tolist() if self.pack_id(number) in wanted]
        return np.flatnonzero(np.isin(self.pack, numbers)) if numbers else np.empty(0, np.int64)

    def _numbers(self, row: int) -> tuple[int, int, int]:
        return int(self.offset[row]), int(self.length[row]), int(self.raw_length[row])

    def _columns(self) -> tuple[npt.NDArray[Any], ...]:
        return self.key, self.rest, self.pack, self.offset, self.length, self.raw_length, self.kind


#: The columns in a file, in their order: type (unsigned, bytes of a number), numbers in a row.
_COLUMNS = (("u8", 1), ("u8", 3), ("u4", 1), ("u4", 1), ("u4", 1), ("u4", 1), ("u1", 1))
_ROW = sum(int(kind[1:]) * width for kind, width in _COLUMNS)


def _mapped_part(mapped: mmap.mmap, blobs: int) -> Part:
    position = _HEADER.size
    columns: list[npt.NDArray[Any]] = []
    for kind, width in _COLUMNS:
        column = np.frombuffer(mapped, kind, blobs * width, position)
        columns.append(column.reshape(blobs, width) if width > 1 else column)
        position += column.nbytes
    key, rest, pack, offset, length, raw_length, kinds = columns
    return Part(key, rest, pack, offset, length, raw_length, kinds, mapped[position:])


def _parsed(packs: list[Any]) -> Part:
    """Checked by column rather than by blob, for the sake of speed."""
    listed = [pack["blobs"] or [] for pack in packs]
    blobs = [blob for found in listed for blob in found]
    kinds = [_KINDS[blob["type"]] for blob in blobs]
    columns = [
        _column([blob["offset"] for blob in blobs], 0),
        _column([blob["length"] for blob in blobs], OVERHEAD),
        _column([blob.get("uncompressed_length", 0) for blob in blobs], 0),
        np.array(kinds, dtype=np.uint32),
    ]
    numbers = np.repeat(np.arange(len(listed), dtype=np.uint32), [len(found) for found in listed])
    return _sorted_part(
        documents.join_ids([blob["id"] for blob in blobs]),
        numbers,
        columns,
        documents.join_ids([pack["id"] for pack in packs]),
    )


def _column(values: list[int], least: int) -> Halves:
    if not set(map(type, values)) <= {int} or not all(
        (least <= min(values), max(values) <= _MAX_LENGTH) if values else ()
    ):
        raise ValueError("not a length")
    return np.array(values, dtype=np.uint32)


def _sorted_part(ids: bytes, pack: Halves, columns: list[Halves], packs: bytes) -> Part:
    words = _words(ids)
    order = np.argsort(words[:, 0], kind="stable")
    offset, length, raw_length, kind = (column[order] for column in columns)
    return Part(
        np.ascontiguousarray(words[order, 0]),
        words[order, 1:],
        pack[order],
        offset,
        length,
        raw_length,
        kind.astype(np.uint8),
        packs,
    )


def _words(ids: Buffer) -> Numbers:
    """Ids as rows of four numbers, in this machine's byte order (only their equality means anything)."""
    if len(ids) % ID:
        raise ValueError("ids have 32 bytes each")
    return np.frombuffer(ids, np.uint64).reshape(-1, 4)


@dataclass(frozen=True, slots=True)
class _Run:
    """Sorted keys of some parts. `row` counts through all parts of the index (None: from `first` on)."""

    key: Numbers
    row: Halves | None
    first: int = 0

    def rows(self, positions: Rows) -> Rows:
        """Rows of the index at these positions of the run."""
        return positions + self.first if self.row is None else self.row[positions].astype(np.int64)


@dataclass(frozen=True, slots=True)
class _State:
    """What look-ups see: replaced as a whole, never changed (but for `alive`, where only ones become zeroes)."""

    parts: tuple[Part, ...] = ()
    #: Row of the index at which each part begins, and at last the number of rows.
    begins: Rows = field(default_factory=lambda: np.zeros(1, np.int64))
    runs: tuple[_Run, ...] = ()
    #: For each row: is it to be believed? None while all are.
    alive: Small | None = None
    #: Parts, from this one on, that are in no run yet.
    joined: int = 0

    @property
    def count(self) -> int:
        return int(self.begins[-1])

    def live(self) -> Iterator[tuple[Part, Rows | None]]:
        """Each part, and which of its rows are to be believed (None: all)."""
        for part, begin in zip(self.parts, self.begins.tolist(), strict=False):
            alive = None if self.alive is None else self.alive[begin : begin + len(part)]
            yield part, None if alive is None else np.flatnonzero(alive)

    def split(self, rows: Rows) -> Iterator[tuple[Part, Rows, Rows]]:
        """For each part: the positions in `rows` that belong to it, and its own rows there."""
        number = np.searchsorted(self.begins, rows, side="right") - 1
        order = np.argsort(number, kind="stable")
        bounds = np.searchsorted(number[order], np.arange(len(self.parts) + 1))
        for which in np.flatnonzero(np.diff(bounds)):
            mine = order[bounds[which] : bounds[which + 1]]
            yield self.parts[which], mine, rows[mine] - self.begins[which]


class Index:
    """All blobs of a repository. Any thread may call anything.

    A blob may have several copies. Data and trees are looked up apart, as restic does: a chunk that
    happens to be the text of a tree is stored once as each.
    """

    def __init__(self, parts: Iterable[Part] = ()) -> None:
        """Nothing is sorted before the first look-up."""
        self._lock = threading.RLock()
        self._state = _State()
        self._fresh: dict[tuple[bytes, int], list[Place]] = {}
        self._fresh_packs: dict[bytes, list[Entry]] = {}
        self._append(list(parts))

    def __len__(self) -> int:
        """How many places are listed, copies included."""
        with self._lock:
            alive = self._state.alive
            listed = self._state.count if alive is None else int(np.count_nonzero(alive))
            return listed + sum(map(len, self._fresh.values()))

    def add(self, pack: bytes, entries: Sequence[Entry]) -> None:
        """The pack with that id, and what is in it, is there too."""
        with self._lock:
            self._fresh_packs.setdefault(pack, []).extend(entries)
            for entry in entries:
                place = Place(pack, entry.offset, entry.length, entry.raw_length, entry.kind)
                self._fresh.setdefault((entry.id, int(entry.kind)), []).append(place)
            if len(self._fresh) >= _FRESH:
                self._flush()

    def exclude(self, *, packs: Iterable[bytes] = (), blobs: Iterable[bytes] = ()) -> None:
        """Forget what is known now of these packs, and of all copies of these blobs. `add` may bring them back."""
        bad_packs = frozenset(packs)
        bad_blobs = b"".join(blobs)
        with self._lock:
            self._flush()
            state = self._ready()
            alive = np.ones(state.count, np.uint8) if state.alive is None else state.alive.copy()
            for part, begin in zip(state.parts, state.begins.tolist(), strict=False):
                alive[part.pack_rows(bad_packs) + begin] = 0
            words = _words(bad_blobs)
            for kind in Blob:
                for _, rows in _matches(state, words, kind, every=True):
                    alive[rows] = 0
            self._replace(state, alive=alive)

    def contains(self, id: bytes, kind: Blob = Blob.DATA) -> bool:
        """Is there a copy of the blob?"""
        return bool(self.find(id, kind))

    def find(self, id: bytes, kind: Blob = Blob.DATA) -> list[Place]:
        """Where the blob's copies lie, the newest first; empty if there is none."""
        fresh = self._fresh.get((id, int(kind)), ())
        state = self._ready()
        places = list(reversed(fresh))
        [key, *rest] = _words(id)[0].tolist()
        for run in reversed(state.runs):
            position = int(np.searchsorted(run.key, np.uint64(key)))
            while position < len(run.key) and int(run.key[position]) == key:
                row = run.first + position if run.row is None else int(run.row[position])
                number = int(np.searchsorted(state.begins, row, side="right")) - 1
                part, own = state.parts[number], row - int(state.begins[number])
                if (
                    (state.alive is None or state.alive[row])
                    and part.kind[own] == kind
                    and part.rest[own].tolist() == rest
                ):
                    places.append(part.place(own))
                position += 1
        return list(dict.fromkeys(places))

    def missing(self, ids: Buffer, kind: Blob = Blob.DATA) -> list[int]:
        """The positions in `ids` (32 bytes each) of blobs that are not in the index."""
        fresh = self._fresh
        state = self._ready()
        lacking = np.ones(len(ids) // ID, np.bool_)
        whole = memoryview(ids)
        # All at once, the arrays in between would be larger than the index.
        for first in range(0, len(lacking), _BATCH):
            for positions, _ in _matches(state, _words(whole[first * ID : (first + _BATCH) * ID]), kind):
                lacking[first + positions] = False
        found: list[int] = np.flatnonzero(lacking).tolist()
        if not fresh or not found:
            return found
        view = memoryview(ids)
        return [n for n in found if (bytes(view[n * ID : (n + 1) * ID]), int(kind)) not in fresh]

    def locate(self, ids: Buffer, kind: Blob = Blob.DATA) -> Located:
        """Where one copy of each of `ids` (32 bytes each) lies."""
        with self._lock:
            self._flush()
            state = self._ready()
        row = np.full(len(ids) // ID, -1, np.int64)
        for positions, rows in _matches(state, _words(ids), kind):
            row[positions] = rows
        return _located(state, row)

    def pack_ids(self) -> set[bytes]:
        """Ids of all packs that have a blob in the index."""
        with self._lock:
            self._flush()
            state = self._state
        return {
            part.pack_id(number)
            for part, rows in state.live()
            # Not np.unique, whose first call imports numpy.ma for 40 ms: each backup comes by here.
            for number in np.flatnonzero(np.bincount(part.pack if rows is None else part.pack[rows])).tolist()
        }

    def pack_sizes(self) -> dict[bytes, int]:
        """The bytes that each pack has at least: its blobs and an entry for each in its header."""
        with self._lock:
            self._flush()
            state = self._state
        found: dict[bytes, int] = {}
        for part, live in state.live():
            rows = slice(None) if live is None else live
            pack, packs = part.pack[rows], len(part.packs) // ID
            count = np.bincount(pack, minlength=packs)
            length = np.bincount(pack, part.length[rows], minlength=packs).astype(np.int64)
            for number in np.flatnonzero(count).tolist():
                id = part.pack_id(number)
                least = int(length[number]) + _ENTRY_LEAST * int(count[number])
                found[id] = max(found.get(id, 0), least)
        return found

    def entries(self, pack: bytes) -> list[Entry]:
        """What is known to be in a pack, by offset."""
        with self._lock:
            self._flush()
            state = self._state
        found: set[Entry] = set()
        for part, live in state.live():
            rows = part.pack_rows(frozenset([pack]))
            rows = rows if live is None else np.intersect1d(rows, live)
            found.update(map(part.entry, rows.tolist()))
        return sorted(found, key=lambda entry: entry.offset)

    def packs(self) -> Iterator[tuple[bytes, list[Entry]]]:
        """Each pack and what is in it. A pack that several index files list comes more than once."""
        with self._lock:
            self._flush()
            state = self._state
        for part, live in state.live():
            rows = np.arange(len(part)) if live is None else live
            rows = rows[np.lexsort((part.offset[rows], part.pack[rows]))]
            for group in np.split(rows, np.flatnonzero(np.diff(part.pack[rows])) + 1):
                if len(group):
                    yield part.pack_id(int(part.pack[group[0]])), [part.entry(row) for row in group.tolist()]

    # -- changing it: under the lock ---------------------------------------------------------

    def _append(self, parts: list[Part]) -> None:
        with self._lock:
            state = self._state
            ends = np.cumsum([len(part) for part in parts], dtype=np.int64) + state.count
            if ends.size and ends[-1] > _MAX_LENGTH:
                raise ValueError("an index has at most 4 Gi entries")
            alive = state.alive
            if alive is not None:
                alive = np.concatenate([alive, np.ones(sum(map(len, parts)), np.uint8)])
            begins = np.concatenate([state.begins, ends])
            self._state = _State((*state.parts, *parts), begins, state.runs, alive, state.joined)

    def _flush(self) -> None:
        if self._fresh_packs:
            self._append([Part.of(self._fresh_packs.items())])
            self._ready()
            self._fresh, self._fresh_packs = {}, {}

    def _ready(self) -> _State:
        """The state, with all parts in runs."""
        state = self._state
        if state.joined == len(state.parts):
            return state
        with self._lock:
            state = self._state
            if state.joined == len(state.parts):  # another thread was faster
                return state
            first = int(state.begins[state.joined])
            keys = [part.key for part in state.parts[state.joined :]]
            run = _Run(keys[0], None, first) if len(keys) == 1 else _join([(key, None) for key in keys], first)
            runs = (*state.runs, run)
            if len(runs) > _RUNS:
                runs = (runs[0], _join([(run.key, run.rows(np.arange(len(run.key)))) for run in runs[1:]], 0))
            return self._replace(state, runs=runs)

    def _replace(self, state: _State, *, runs: tuple[_Run, ...] | None = None, alive: Small | None = None) -> _State:
        self._state = _State(
            state.parts,
            state.begins,
            state.runs if runs is None else runs,
            state.alive if alive is None else alive,
            len(state.parts),
        )
        return self._state


def _join(pieces: list[tuple[Numbers, Rows | None]], first: int) -> _Run:
    """One run of several sorted pieces, whose rows follow one another from `first` on unless they are given."""
    key = np.concatenate([piece for piece, _ in pieces])
    # A stable sort merges runs that are sorted already, which is faster than to sort anew.
    order = np.argsort(key, kind="stable")
    rows = [given for _, given in pieces if given is not None]
    row = np.concatenate(rows)[order] if rows else order + first
    return _Run(key[order], row.astype(np.uint32))


def _matches(state: _State, words: Numbers, kind: Blob, *, every: bool = False) -> Iterator[tuple[Rows, Rows]]:
    """Positions in `words` whose blob is known, with the row of one live copy; with `every`, of each copy in turn."""
    pending = np.arange(len(words))
    for run in reversed(state.runs):
        found = np.zeros(len(words), np.bool_)
        asked = pending
        at = np.searchsorted(run.key, words[asked, 0])
        while asked.size:
            inside = at < len(run.key)
            asked, at = asked[inside], at[inside]
            alike = run.key[at] == words[asked, 0]
            asked, at = asked[alike], at[alike]
            rows = run.rows(at)
            same = _same(state, rows, words[asked, 1:], kind)
            if same.any():
                yield asked[same], rows[same]
                found[asked[same]] = True
            # Others with the same key: copies that are not believed, the other kind, ids that begin alike.
            further = np.ones(len(asked), np.bool_) if every else ~same
            asked, at = asked[further], at[further] + 1
        if not every:
            pending = pending[~found[pending]]


def _same(state: _State, rows: Rows, rest: Numbers, kind: Blob) -> npt.NDArray[np.bool_]:
    """Which rows are alive, and hold that rest of an id and that kind?"""
    same = np.ones(len(rows), np.bool_) if state.alive is None else state.alive[rows] != 0
    for part, mine, own in state.split(rows):
        same[mine] &= (part.kind[own] == kind) & (part.rest[own] == rest[mine]).all(axis=1)
    return same


def _located(state: _State, row: Rows) -> Located:
    count = len(row)
    pack = np.full(count, -1, np.int64)
    columns = [np.zeros(count, np.uint32) for _ in range(3)]
    packs: list[bytes] = []
    known = np.flatnonzero(row >= 0)
    for part, mine, own in state.split(row[known]):
        at = known[mine]
        numbers, inverse = np.unique(part.pack[own], return_inverse=True)
        pack[at] = inverse + len(packs)
        packs += [part.pack_id(number) for number in numbers.tolist()]
        for column, source in zip(columns, (part.offset, part.length, part.raw_length), strict=True):
            column[at] = source[own]
    return Located(packs, pack, *columns)
