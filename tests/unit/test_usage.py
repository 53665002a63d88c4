"""How much restore points take, and what of it they have alone: against a model of a small repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import smallrepo
from pullback import errors, repo
from pullback.progress import Cancel
from pullback.repo.restic.types import Blob
from pullback.repo.store import Kind
from smallrepo import Model, Small, opened


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[None]:
    with smallrepo.small():
        yield


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return smallrepo.make(tmp_path / "writer")


@pytest.fixture
def model(small: Small, tmp_path: Path) -> Model:
    return small.look(tmp_path / "model")


def alone(model: Model, point: str) -> set[tuple[bytes, Blob]]:
    return {blob for blob, users in model.users.items() if {user for user, _ in users} == {point}}


def test_what_a_point_has_alone_is_what_no_other_needs(small: Small, model: Model, tmp_path: Path) -> None:
    lengths = {(entry.id, entry.kind): entry.length for entries in model.packs.values() for entry in entries}
    with opened(small.store, tmp_path) as repository:
        for point in small.points:
            found = repo.usage(repository, repository.find(point), cancel=Cancel())
            mine = alone(model, point)
            assert found.freed == sum(lengths[blob] for blob in mine)
            manifest = {blob for blob in mine if model.users[blob].get((point, "")) == [] and blob[1] is Blob.DATA}
            assert found.alone == len({blob for blob in mine if blob[1] is Blob.DATA} - manifest)


def test_chunks_are_counted(small: Small, tmp_path: Path) -> None:
    with opened(small.store, tmp_path) as repository:
        found = repo.usage(repository, repository.find(small.points[0]), cancel=Cancel())
    # vda has three chunks with data and two of zeroes; the last chunk of vdb is short.
    assert (found.chunks, found.zero_chunks, found.distinct) == (9, 2, 8)


def test_another_machine_with_the_same_chunks_leaves_nothing_alone(small: Small, tmp_path: Path) -> None:
    newest = small.points[-1]
    with opened(small.store, tmp_path) as repository:
        smallrepo.backup(repository, small.contents[newest], {}, 9, "db01")
        assert repo.usage(repository, repository.find(newest), cancel=Cancel()).alone == 0


def test_a_damaged_point_cannot_be_counted_and_another_can(small: Small, model: Model, tmp_path: Path) -> None:
    [root, *_] = [
        id for (id, kind), users in model.users.items() if kind is Blob.TREE and (small.points[0], "") in users
    ]
    pack = next(pack for pack, entries in model.packs.items() if any(entry.id == root for entry in entries))
    store = small.harmed(Kind.DATA, pack.hex(), None)
    with opened(small.store, tmp_path / "a") as repository:
        point = repository.find(small.points[0])
    with opened(store, tmp_path / "b") as repository, pytest.raises(errors.VerificationFailed):
        repo.usage(repository, point, cancel=Cancel())
