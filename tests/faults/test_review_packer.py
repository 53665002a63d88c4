"""Blobs that look alike, packs that are known to be bad, and indexes that would be too large."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import pytest

import smallrepo
from pullback import errors, repo
from pullback.repo import Kind
from pullback.repo.restic import index, keys, packer, pending, trees, unpacked
from pullback.repo.store.memory import MemoryStore
from pullback.units import KiB
from smallrepo import CHUNK, PASSWORD, backup, chunk_of, opened, restored, small


@pytest.fixture(name="store")
def new_store(tmp_path: Path) -> MemoryStore:
    """One with an empty repository."""
    store = MemoryStore()
    repo.create_repository(store, PASSWORD, caches=tmp_path, cost=keys.Cost(2, 8, 1)).close()
    return store


def test_a_disk_may_end_with_the_text_of_a_tree(store: MemoryStore, tmp_path: Path) -> None:
    large = 64 * KiB
    piece = chunk_of("a", large)
    id = hashlib.sha256(piece).digest()
    made = ((count, trees.segment_tree(id * count, count * large)) for count in range(1, 600))
    count, tree = next((count, tree) for count, tree in made if len(tree) % 512 == 0)
    assert len(tree) < large
    content = {"vda": piece * count, "vdb": tree}
    with small(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pending, "block_size_for", lambda size: large)
        with opened(store, tmp_path) as repository:
            backup(repository, content, {}, 0)
        with opened(store, tmp_path / "elsewhere") as repository:
            point = repository.find()
            for target, data in content.items():
                assert restored(repository, point, target, tmp_path / "out") == data


def killed(store: MemoryStore, caches: Path, *, disk: int = 2) -> dict[str, bytes]:
    """A backup that was killed when its chunks had been sent; what the disk held."""
    with (
        contextlib.suppress(ZeroDivisionError),
        opened(store, caches) as repository,
        repository.writer(smallrepo.MACHINE, command="test") as writer,
        writer.begin() as point,
    ):
        point.create("vda", disk * CHUNK)
        for number in range(disk):
            point.disk("vda").observe(number * CHUNK, bytearray(chunk_of(f"{number}")), CHUNK)
        point.upload()
        raise ZeroDivisionError
    return {"vda": b"".join(chunk_of(f"{number}") for number in range(disk))}


def test_a_pack_that_verify_found_bad_is_not_taken_over(store: MemoryStore, tmp_path: Path) -> None:
    with small():
        content = killed(store, tmp_path)
        [name] = [name for kind, name in store.files if kind is Kind.DATA]
        data, when = store.files[Kind.DATA, name]
        store.files[Kind.DATA, name] = bytes([data[0] ^ 1]) + data[1:], when
        with opened(store, tmp_path) as repository:
            repository.cache.keep_damage([bytes.fromhex(name)], [])
        with opened(store, tmp_path) as repository:
            point = backup(repository, content, {}, 0)
            assert restored(repository, point, "vda", tmp_path / "out") == content["vda"]


def test_a_pack_in_two_journals_is_taken_over_once(store: MemoryStore, tmp_path: Path) -> None:
    with small():
        content = killed(store, tmp_path)
        with opened(store, tmp_path) as repository:
            [journal] = (repository.cache.path / "journal").iterdir()
            journal.with_name("copy").write_bytes(journal.read_bytes())
            backup(repository, content, {}, 0)
            listed = [
                pack
                for (kind, name), (data, _) in store.files.items()
                if kind is Kind.INDEX
                for pack, _ in index.parse(unpacked.open_file(repository.key, data, name, name), name).packs
            ]
    assert len(listed) == len(set(listed))


def test_no_index_file_is_too_large_even_if_the_lock_was_lost(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer, "INDEX_BLOBS", 4)
    monkeypatch.setattr(packer, "PACK_SIZE", 1)
    with small(), opened(store, tmp_path) as repository:
        with repository.writer(smallrepo.MACHINE, command="test") as writer, writer.begin() as point:
            for stored in list(store.list(Kind.LOCKS)):
                store.delete(Kind.LOCKS, stored.name)
            point.create("vda", 42 * CHUNK)
            for number in range(42):
                point.disk("vda").observe(number * CHUNK, bytearray(chunk_of(f"{number}")), CHUNK)
            point.upload()
            point._packer.finish()
        sizes = [
            sum(
                len(entries)
                for _, entries in index.parse(unpacked.open_file(repository.key, data, name, name), name).packs
            )
            for (kind, name), (data, _) in store.files.items()
            if kind is Kind.INDEX
        ]
    assert sum(sizes) == 42
    assert max(sizes) <= 4


def test_a_lock_that_stumbled_and_was_there_all_the_time_is_trusted(store: MemoryStore, tmp_path: Path) -> None:
    real, failing = store.list, [True]

    def stumbling(kind: Kind):  # type: ignore[no-untyped-def]
        if kind is Kind.LOCKS and failing:
            failing.clear()
            raise errors.StoreFailed(store="it", what="listing", reason="EIO")
        return real(kind)

    with small(), opened(store, tmp_path) as repository, repository.lock() as lock:
        store.list = stumbling  # type: ignore[method-assign]
        with pytest.raises(errors.StoreFailed):
            lock._renewed()
        assert lock._renewed()
        assert lock.trusted()
    assert not lock.trusted()
