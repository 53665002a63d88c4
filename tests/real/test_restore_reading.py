"""How chunks are read for a restore: few requests, equal ones once, and another copy where one is bad."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pullback import errors, repo
from pullback.extents import Extent
from pullback.repo import Kind
from pullback.repo.restic import blobs, compression, libzstd
from pullback.repo.restic.crypto import Key
from pullback.repo.restic.types import Entry
from pullback.repo.store.local import LocalStore
from pullback.testing.endpoints import expecting
from pullback.testing.stores import WrappedStore
from pullback.units import MiB
from stored import content_of, store

KEY = Key.random()


class Counting(WrappedStore):
    """Counts the reads of packs."""

    def __init__(self, store: repo.Store) -> None:
        self.reads = 0
        super().__init__(store, self._count)

    def _count(self, operation: str, kind: Kind, name: str) -> None:
        self.reads += operation == "read" and kind is Kind.DATA


@contextmanager
def disk_of(content: bytes, directory: Path) -> Iterator[tuple[repo.PointEndpoint, Counting]]:
    """The content as the disk of a restore point, and the store that it is read from."""
    found = store(directory, "restic", {"vda": content})
    counting = Counting(LocalStore.open(directory / "repo"))
    with (
        repo.open_repository(counting, lambda: "secret", caches=found.access.caches) as repository,
        repository.endpoint(repository.find(), "vda") as endpoint,
    ):
        yield endpoint, counting


def fetched(endpoint: repo.PointEndpoint) -> dict[int, bytes]:
    """All its chunks by offset."""
    found: dict[int, bytes] = {}
    for batch in endpoint.batches(Extent(0, endpoint.size)):
        for offset, content in endpoint.fetch(batch):
            assert offset not in found
            found[offset] = bytes(content)
    return found


# -- decompressing ---------------------------------------------------------------------------


def entry(blob: blobs.EncodedBlob) -> Entry:
    """Where it would lie."""
    return Entry(blob.id, blob.kind, 0, len(blob.sealed), blob.raw_length)


@pytest.mark.parametrize("library", [True, False], ids=["libzstd", "without libzstd"])
def test_blobs_are_decoded_into_a_buffer(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library:
        monkeypatch.setattr(libzstd, "_LIBRARY", None)
    scratch = blobs.Scratch(MiB)
    for content in (content_of(MiB, 1), b"words " * 1000, bytes(MiB), b"x", b"ab" * MiB):
        blob = blobs.encode(KEY, content)
        assert blobs.decode_into(scratch, KEY, blob.sealed, entry(blob), "x") == content


def test_here_is_a_libzstd_and_it_is_used() -> None:
    content = b"words " * 1000
    buffer = bytearray(len(content))
    assert libzstd.decompress_into(compression.compress(content), buffer)
    assert buffer == content
    assert libzstd.decompress_into(memoryview(compression.compress(content)), buffer)


@pytest.mark.parametrize("library", [True, False], ids=["libzstd", "without libzstd"])
def test_what_is_no_frame_of_that_length_is_damage(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library:
        monkeypatch.setattr(libzstd, "_LIBRARY", None)
    content = b"words " * 1000
    frame = compression.compress(content)
    for bad, size in [
        (b"", 5),
        (b"no frame", 8),
        (frame[:-1], len(content)),
        (frame + b"x", len(content)),
        (frame + frame, len(content)),
        (frame + frame, 2 * len(content)),
        (frame, len(content) - 1),
        (frame, len(content) + 1),
    ]:
        with expecting(errors.RepositoryDamaged):
            compression.decompress_into(bad, bytearray(size), "x")


def test_a_wrong_byte_anywhere_is_noticed() -> None:
    content = b"words and words " * 50
    blob = blobs.encode(KEY, content)
    scratch = blobs.Scratch(MiB)
    for place in range(0, len(blob.sealed), 3):
        sealed = bytearray(blob.sealed)
        sealed[place] ^= 0x10
        with expecting(errors.RepositoryDamaged):
            blobs.decode_into(scratch, KEY, sealed, entry(blob), "x")
    other = entry(blob)._replace(id=hashlib.sha256(b"other").digest())
    with expecting(errors.RepositoryDamaged):
        blobs.decode_into(scratch, KEY, blob.sealed, other, "x")


# -- batches ---------------------------------------------------------------------------------


def test_chunks_in_any_order_come_with_few_requests(tmp_path: Path) -> None:
    content = random.Random(3).randbytes(24 * MiB + 512)
    with disk_of(content, tmp_path) as (endpoint, counting):
        before = counting.reads
        found = fetched(endpoint)
        assert counting.reads - before <= 5
    assert b"".join(found[offset] for offset in sorted(found)) == content


def test_equal_chunks_are_read_once_and_zeroes_never(tmp_path: Path) -> None:
    one, two = random.Random(4).randbytes(MiB), random.Random(5).randbytes(MiB)
    content = one * 3 + bytes(2 * MiB) + two + one + bytes(512)
    with disk_of(content, tmp_path) as (endpoint, counting):
        before = counting.reads
        found = fetched(endpoint)
        assert counting.reads - before == 1
    assert found == {0: one, MiB: one, 2 * MiB: one, 5 * MiB: two, 6 * MiB: one}


def test_a_window_is_enough(tmp_path: Path) -> None:
    content = random.Random(6).randbytes(6 * MiB)
    with disk_of(content, tmp_path) as (endpoint, _):
        window = Extent(2 * MiB, 3 * MiB)
        offsets = [offset for batch in endpoint.batches(window) for offset, _ in endpoint.fetch(batch)]
    assert sorted(offsets) == [2 * MiB, 3 * MiB, 4 * MiB]


def test_a_chunk_without_a_good_copy_is_told_with_its_place_on_the_disk(tmp_path: Path) -> None:
    content = random.Random(7).randbytes(5 * MiB)
    with disk_of(content, tmp_path) as (endpoint, _):
        [batch] = endpoint.batches(Extent(0, endpoint.size))
        bad = batch.span.wanted[2]
        path = tmp_path / "repo" / "data" / bad.place.pack.hex()[:2] / bad.place.pack.hex()
        data = bytearray(path.read_bytes())
        data[bad.place.offset + 100] ^= 1
        path.chmod(0o600)
        path.write_bytes(data)
        given: list[int] = []
        with pytest.raises(errors.EndpointFailed) as caught:
            given.extend(offset for offset, _ in endpoint.fetch(batch))
        assert caught.value.offset == bad.number * MiB
        assert given == [one.number * MiB for one in batch.span.wanted[:2]]
        path.unlink()
        with pytest.raises(errors.EndpointFailed, match="missing"):
            list(endpoint.fetch(batch))
