"""From chunks to packs by many threads at once: places, memory that is used again, and what fails on the way."""

from __future__ import annotations

import hashlib
import mmap
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pullback import errors, repo
from pullback.repo import Kind
from pullback.repo.restic import blobs, compression, crypto, keys, libzstd, packer, packs
from pullback.repo.restic.packer import Packer
from pullback.repo.restic.types import OVERHEAD, Blob
from pullback.repo.store.memory import MemoryStore
from pullback.testing.endpoints import expecting
from pullback.testing.stores import WrappedStore, failing
from pullback.units import KiB, MiB

KEY = crypto.Key.random()


# -- compressing -----------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("content", [b"x", b"words " * 1000, bytes(MiB), random.Random(1).randbytes(70_000)])
def test_the_systems_library_takes_whatever_holds_bytes(content: bytes, level: int) -> None:
    for given in (content, bytearray(content), memoryview(content), memoryview(bytearray(content))):
        packed = libzstd.compress(given, level)
        assert packed is not None
        assert compression.decompress(bytes(packed), len(content), "x") == content


@pytest.mark.parametrize("library", [True, False], ids=["libzstd", "without libzstd"])
def test_only_what_gets_shorter_is_compressed(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library:
        monkeypatch.setattr(libzstd, "_LIBRARY", None)
    noise = random.Random(1).randbytes(2000)
    assert blobs.packed(noise, 1) == (noise, 0)
    assert blobs.packed(b"words " * 1000, None) == (b"words " * 1000, 0)
    content, raw_length = blobs.packed(b"words " * 1000, 1)
    assert raw_length == 6000
    assert compression.decompress(bytes(content), raw_length, "x") == b"words " * 1000


def test_each_thread_compresses_for_itself() -> None:
    contents = [f"{number} ".encode() * 50_000 for number in range(16)]
    together = threading.Barrier(4)

    def work(content: bytes) -> bool:
        packed = libzstd.compress(content, 1)
        assert packed is not None
        together.wait(30)  # now all four hold one
        return compression.decompress(bytes(packed), len(content), "x") == content

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, contents))


# -- packs -----------------------------------------------------------------------------------


def test_a_pack_in_given_memory_has_just_so_much_room() -> None:
    builder = packs.PackBuilder(KEY, Blob.DATA, mmap.mmap(-1, 4 * KiB))
    made = 0
    while builder.fits(500):
        with builder.reserve(bytes([made]) * 32, 500, 0) as place:
            crypto.seal_into(KEY, bytes([made]) * (500 - OVERHEAD), place)
        made += 1
    assert made == (4 * KiB - OVERHEAD - packs.TRAILER) // (500 + packs.MAX_HEADER_ENTRY - 4)
    with pytest.raises(ValueError):
        builder.reserve(bytes(32), 4000, 0)
    pack = builder.finish()
    assert pack.data.readonly
    assert [entry.id[0] for entry in packs.parse_pack(KEY, pack.data, "x")] == list(range(made))


def test_what_is_sealed_must_fit_its_place() -> None:
    with pytest.raises(ValueError):
        crypto.seal_into(KEY, b"x", memoryview(bytearray(OVERHEAD)))


# -- many threads ----------------------------------------------------------------------------


@pytest.fixture(name="repository")
def new_repository(tmp_path: Path) -> Iterator[repo.ResticRepository]:
    """An empty one in memory, with packs of 64 KiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "PACK_SIZE", 64 * KiB)
        with repo.create_repository(MemoryStore(), "x", caches=tmp_path, cost=keys.Cost(2, 8, 1)) as made:
            yield made


@contextmanager
def packing(repository: repo.ResticRepository, store: repo.Store | None = None) -> Iterator[Packer]:
    """What packs for it, perhaps into another store."""
    with Packer(store or repository.store, repository.key, repository.index, repository.cache, compress=True) as made:
        yield made


def some(number: int) -> bytes:
    """A blob of a few bytes up to more than a pack has; some can be compressed."""
    generator = random.Random(number)
    length = generator.choice([1, 700, 5_000, 30_000, 90_000])
    return number.to_bytes(4, "big") + (generator.randbytes(length) if number % 3 else b"text" * (length // 4))


def put(packing: Packer, number: int) -> int:
    """Store that blob."""
    content = some(number)
    return packing.put(Blob(number % 2), memoryview(bytearray(content)), hashlib.sha256(content).digest())


def test_what_many_threads_put_can_be_read(repository: repo.ResticRepository) -> None:
    with packing(repository) as packs_of, ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(lambda number: put(packs_of, number % 400), range(800)))
        packs_of.upload()
        packs_of.finish()
        memory = {id(free) for free in packs_of._free}
        assert len(memory) == len(packs_of._free) <= packer.IN_FLIGHT // (64 * KiB)
    assert sum(1 for length in stored if length) == 400, "each once"
    reader = repository.reader
    for number in range(400):
        content = some(number)
        assert reader.read(hashlib.sha256(content).digest(), Blob(number % 2)) == content
    for stored_pack in repository.store.list(Kind.DATA):
        data = repository.store.read(Kind.DATA, stored_pack.name)
        assert hashlib.sha256(data).hexdigest() == stored_pack.name
        assert packs.parse_pack(repository.key, data, "x")


def test_memory_is_used_again_only_when_its_pack_is_stored(repository: repo.ResticRepository) -> None:
    """A store that takes what it is given only at the end of the call, when others have gone on."""
    go = threading.Semaphore(0)

    class Late(MemoryStore):
        def write(self, kind: Kind, name: str, data: bytes | bytearray | memoryview, *, new: bool = False) -> None:
            go.acquire(timeout=30)
            super().write(kind, name, data, new=new)

    late = Late()
    with packing(repository, late) as packs_of, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(put, packs_of, number) for number in range(200)]
        for _ in range(200):
            go.release()
        for one in waiting:
            one.result(60)
        go.release(100)
        packs_of.upload()
    for stored in late.list(Kind.DATA):
        assert hashlib.sha256(late.read(Kind.DATA, stored.name)).hexdigest() == stored.name


def test_a_blob_that_cannot_be_sealed_ends_the_packing(
    repository: repo.ResticRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place is empty, so no pack with it may be sent; and nobody waits for that pack."""
    real = crypto.seal_into

    def failing(key: crypto.Key, plain: bytes, sealed: memoryview) -> None:
        if bytes(plain[:4]) == (7).to_bytes(4, "big"):
            raise MemoryError
        real(key, plain, sealed)

    monkeypatch.setattr(crypto, "seal_into", failing)
    with expecting(MemoryError), packing(repository) as packs_of:
        put(packs_of, 1)
        with pytest.raises(MemoryError):
            put(packs_of, 7)
        packs_of.upload()
    assert list(repository.store.list(Kind.DATA)) == []


def test_an_upload_that_fails_ends_all_threads(repository: repo.ResticRepository) -> None:
    store = WrappedStore(repository.store, failing(1, "write"))
    with expecting(errors.StoreFailed), packing(repository, store) as packs_of, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(put, packs_of, number) for number in range(300)]
        found = [one.exception(60) for one in waiting]
        assert {type(error) for error in found} <= {type(None), errors.StoreFailed}
        packs_of.upload()
    assert list(repository.store.list(Kind.DATA)) == []
