"""Reading blobs: few requests, each blob proven by its id, another copy tried where one is bad."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from pullback import errors
from pullback.extents import Extent, Mapped, between
from pullback.repo.digest import HashList, zero_hash
from pullback.repo.restic import blobs
from pullback.repo.restic.blobs import Plain, Scratch
from pullback.repo.restic.crypto import Key
from pullback.repo.restic.lookup import Place
from pullback.repo.restic.types import Blob, Entry
from pullback.repo.store import Kind, Store
from pullback.units import KiB, MiB

#: Bytes of one request at most.
SPAN = 8 * MiB
#: Bytes between two wanted blobs that are read along, rather than asked for apart.
_GAP = 128 * KiB
#: Trees are read by so many threads at most.
_TREE_THREADS = 16
#: As `blobs.decode`.
Decode = Callable[[Key, bytes | memoryview, Entry, str], Plain]
_LENGTH = "a chunk has another length than its place"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A blob, and where a copy of it lies."""

    #: The caller's number for it.
    number: int
    id: bytes
    place: Place


@dataclass(frozen=True, slots=True)
class Span:
    """Blobs that are read with one request."""

    pack: bytes
    extent: Extent
    wanted: tuple[Wanted, ...]


def spans(wanted: Sequence[Wanted]) -> Iterator[Span]:
    """Neighbours in one pack are read together."""
    group: list[Wanted] = []
    for one in sorted(wanted, key=lambda one: (one.place.pack, one.place.offset)):
        if group and not _near(group, one):
            yield _span(group)
            group = []
        group.append(one)
    if group:
        yield _span(group)


def _near(group: list[Wanted], one: Wanted) -> bool:
    first, last = group[0].place, group[-1].place
    gap = one.place.offset - (last.offset + last.length)
    length = one.place.offset + one.place.length - first.offset
    return one.place.pack == first.pack and gap <= _GAP and length <= SPAN


def _span(group: list[Wanted]) -> Span:
    first = group[0].place
    end = max(one.place.offset + one.place.length for one in group)
    return Span(first.pack, between(first.offset, end), tuple(group))


#: Gives the copies of a blob, the best first.
Find = Callable[[bytes, Blob], list[Place]]


class BlobReader:
    """Reads blobs of a repository. Thread-safe."""

    def __init__(self, store: Store, key: Key, find: Find) -> None:
        self._store = store
        self._key = key
        self._find = find

    def read(self, id: bytes, kind: Blob) -> bytes:
        """One blob. Raises `RepositoryDamaged` if no good copy is there."""
        [(_, plain)] = self.each([(0, id)], kind)
        return plain

    def each(self, asked: Sequence[tuple[int, bytes]], kind: Blob) -> Iterator[tuple[int, bytes]]:
        """Blobs by (number, id), in any order. Raises `RepositoryDamaged` at the first without a good copy."""
        for span in spans([self.locate(number, id, kind) for number, id in asked]):
            yield from self.span(span, kind)

    def locate(self, number: int, id: bytes, kind: Blob) -> Wanted:
        """Where a blob lies. Raises `RepositoryDamaged` if no index knows it."""
        places = self._find(id, kind)
        if not places:
            raise errors.RepositoryDamaged(file="index", problem=f"it does not know the blob {id.hex()}")
        return Wanted(number, id, places[0])

    def span(self, span: Span, kind: Blob) -> Iterator[tuple[int, bytes]]:
        """The blobs of a span by number, in the order of the pack. Raises `RepositoryDamaged` as `each` does."""
        yield from self._span(span, kind, blobs.decode)

    def span_into(self, span: Span, kind: Blob, scratch: Scratch) -> Iterator[tuple[int, bytes | bytearray]]:
        """`span`, but what it gives is valid only until the next is asked for."""
        yield from self._span(span, kind, partial(blobs.decode_into, scratch))

    def _span(self, span: Span, kind: Blob, decode: Decode[Plain]) -> Iterator[tuple[int, Plain]]:
        try:
            data = memoryview(self._fetch(span.pack, span.extent))
        except (errors.ObjectMissing, errors.ObjectDamaged, errors.RepositoryDamaged):
            for one in span.wanted:
                yield one.number, self._any(one, kind, decode)
            return
        for one in span.wanted:
            start = one.place.offset - span.extent.start
            try:
                plain = self._decode(one.id, one.place, data[start : start + one.place.length], decode)
            except errors.RepositoryDamaged:
                plain = self._any(one, kind, decode)
            yield one.number, plain

    def _any(self, one: Wanted, kind: Blob, decode: Decode[Plain]) -> Plain:
        """A blob of which the first copy may be bad: each alone."""
        failed: errors.PullbackError | None = None
        for place in self._find(one.id, kind):
            try:
                data = self._fetch(place.pack, Extent(place.offset, place.length))
                return self._decode(one.id, place, data, decode)
            except (errors.ObjectMissing, errors.ObjectDamaged, errors.RepositoryDamaged) as error:
                failed = failed or error
        where = f"data/{one.place.pack.hex()}"
        problem = failed.problem if isinstance(failed, errors.RepositoryDamaged) else "it is missing or too short"
        raise errors.RepositoryDamaged(file=where, problem=problem) from failed

    def _fetch(self, pack: bytes, extent: Extent) -> bytes:
        return self._store.read(Kind.DATA, pack.hex(), extent.start, extent.length)

    def _decode(self, id: bytes, place: Place, data: bytes | memoryview, decode: Decode[Plain]) -> Plain:
        return decode(self._key, data, place.entry(id), f"data/{place.pack.hex()}")

    def trees(self, ids: Sequence[bytes]) -> dict[bytes, bytes]:
        """Many trees at once."""
        wanted = sorted(set(ids))
        if len(wanted) <= 1:
            return {id: self.read(id, Blob.TREE) for id in wanted}
        workers = min(_TREE_THREADS, max(2, self._store.connections))
        step = -(-len(wanted) // workers)
        shares = [list(enumerate(wanted))[start : start + step] for start in range(0, len(wanted), step)]
        with ThreadPoolExecutor(workers, thread_name_prefix="trees") as pool:
            found = pool.map(lambda share: list(self.each(share, Blob.TREE)), shares)
            return {wanted[number]: plain for share in found for number, plain in share}


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks of a disk that one request reads."""

    span: Span
    #: By the number of a blob in the span: the chunks that it is the content of.
    chunks: Mapping[int, Sequence[int]]


class PointEndpoint:
    """A disk of a restore point as an `Endpoint`: its chunks, each proven by its id; zero chunks are holes."""

    def __init__(self, reader: BlobReader, hashes: HashList, *, name: str, connections: int) -> None:
        self.name = name
        self.size = hashes.size
        #: Each channel is a request of its own.
        self.channels = connections
        self.hashes = hashes
        self._reader = reader

    def extents(self, window: Extent) -> Iterator[Mapped]:
        """Chunks of zeroes, and the others."""
        end = min(window.end, self.size)
        start, kind = window.start, None
        for index in self.hashes.touched(between(window.start, end)) if end > window.start else ():
            block = self.hashes.block(index)
            zero = self.hashes.entry(index) == zero_hash(block.length)
            at = max(block.start, window.start)
            if kind is not None and zero != kind and at > start:
                yield Mapped(*between(start, at), zero=kind)
                start = at
            kind = zero
        if kind is not None:
            yield Mapped(*between(start, end), zero=kind)

    def batches(self, window: Extent) -> Iterator[Batch]:
        """All chunks in `window` (whole ones) but those of zeroes, roughly in the order of the disk.

        Chunks that lie side by side in a pack are asked for together wherever they are in the window,
        and equal ones once. Raises `EndpointFailed` for one that the index does not know.
        """
        return self.batches_of(self.hashes.touched(window))

    def batches_of(self, indexes: Iterable[int]) -> Iterator[Batch]:
        """The same for chunks by their indexes."""
        same: dict[bytes, list[int]] = {}
        for index in indexes:
            if (id := self._chunk(index)) is not None:
                same.setdefault(id, []).append(index)
        wanted = [self._locate(indexes[0], id) for id, indexes in same.items()]
        for span in sorted(spans(wanted), key=lambda span: min(one.number for one in span.wanted)):
            yield Batch(span, {one.number: same[one.id] for one in span.wanted})

    def _chunk(self, index: int) -> bytes | None:
        """The id of a chunk, unless it is of zeroes."""
        id = self.hashes.entry(index)
        assert id is not None
        return None if id == zero_hash(self.hashes.block(index).length) else id

    def _locate(self, index: int, id: bytes) -> Wanted:
        try:
            return self._reader.locate(index, id, Blob.DATA)
        except errors.RepositoryDamaged as error:
            raise self._failed(index, error) from error

    def fetch(self, batch: Batch, scratch: Scratch | None = None) -> Iterator[tuple[int, bytes | bytearray]]:
        """The chunks of a batch as (offset, content), each proven by its id. One request, if nothing is damaged.

        A content is valid until the next one is asked for, or, in a `scratch` of the caller's, as long as that
        says. Raises `EndpointFailed` where a chunk is missing or bad.
        """
        missing = dict(batch.chunks)
        scratch = scratch or Scratch(self.hashes.block_size)
        try:
            for number, plain in self._reader.span_into(batch.span, Blob.DATA, scratch):
                for index in missing[number]:
                    block = self.hashes.block(index)
                    if len(plain) != block.length:
                        raise errors.RepositoryDamaged(file="index", problem=_LENGTH)
                    yield block.start, plain
                del missing[number]
        except errors.RepositoryDamaged as error:
            # Blobs are given in the order of the span: the one that failed is the first that was not given.
            first = next(one.number for one in batch.span.wanted if one.number in missing)
            raise self._failed(first, error) from error

    def _failed(self, index: int, error: errors.RepositoryDamaged) -> errors.EndpointFailed:
        return errors.EndpointFailed(
            operation="Reading",
            endpoint=self.name,
            offset=self.hashes.block(index).start,
            reason=str(error).rstrip("."),
        )

    def channel(self) -> PointChannel:
        """A new channel."""
        return PointChannel(self._reader, self.hashes, self.name)

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> PointEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PointChannel:
    """Reads a disk of a restore point; for one thread."""

    def __init__(self, reader: BlobReader, hashes: HashList, name: str) -> None:
        self._reader = reader
        self._hashes = hashes
        self._name = name

    def read_into(self, offset: int, buffer: bytearray, length: int) -> None:
        """Fill `buffer[:length]`. Raises `EndpointFailed` where a chunk is missing or bad."""
        window = Extent(offset, length)
        asked = []
        with memoryview(buffer) as view:
            for index in self._hashes.touched(window):
                block, id = self._hashes.block(index), self._hashes.entry(index)
                assert id is not None
                if id == zero_hash(block.length):
                    start, end = max(block.start, offset), min(block.end, window.end)
                    view[start - offset : end - offset] = bytes(end - start)
                else:
                    asked.append((index, id))
            for index, plain in self._read(asked, window):
                block = self._hashes.block(index)
                start, end = max(block.start, offset), min(block.end, window.end)
                view[start - offset : end - offset] = memoryview(plain)[start - block.start : end - block.start]

    def _read(self, asked: list[tuple[int, bytes]], window: Extent) -> Iterator[tuple[int, bytes]]:
        try:
            for index, plain in self._reader.each(asked, Blob.DATA):
                if len(plain) != self._hashes.block(index).length:
                    raise errors.RepositoryDamaged(file="index", problem=_LENGTH)
                yield index, plain
        except errors.RepositoryDamaged as error:
            extent = self._blame(asked) or window
            raise errors.EndpointFailed(
                operation="Reading", endpoint=self._name, offset=extent.start, reason=str(error).rstrip(".")
            ) from error

    def _blame(self, asked: list[tuple[int, bytes]]) -> Extent | None:
        """The first chunk of those that cannot be read."""
        for index, id in asked:
            try:
                self._reader.read(id, Blob.DATA)
            except errors.PullbackError:
                return self._hashes.block(index)
        return None

    def write(self, offset: int, buffer: bytes | bytearray, start: int, length: int) -> None:
        """A restore point never changes."""
        raise NotImplementedError("a restore point is read-only")

    def zero(self, offset: int, length: int) -> None:
        """A restore point never changes."""
        raise NotImplementedError("a restore point is read-only")

    def trim(self, offset: int, length: int) -> None:
        """A restore point never changes."""
        raise NotImplementedError("a restore point is read-only")

    def flush(self) -> None:
        """Nothing is written."""

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> PointChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
