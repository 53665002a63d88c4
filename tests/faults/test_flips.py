"""Every byte of a small repository flipped, every file cut at every length: found, located, and healed.

`make test` tries some, chosen by a fixed seed; `make fuzz` all of them.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import smallrepo
from pullback import errors
from pullback.extents import Extent, between
from pullback.repo.store import Kind
from pullback.repo.store.memory import MemoryStore
from smallrepo import Model, Small, Touched

_SOME = 60
#: Each takes some minutes.
_SHARES = 9


class Damage(NamedTuple):
    """A file, and what is done to it."""

    kind: Kind
    name: str
    #: Where it is flipped or cut.
    at: int
    cut: bool

    def applied(self, data: bytes) -> bytes:
        """The file afterwards."""
        if self.cut:
            return data[: self.at]
        return data[: self.at] + bytes([data[self.at] ^ (1 << self.at % 8)]) + data[self.at + 1 :]

    def extent(self, length: int) -> Extent:
        """The bytes that are not what they were."""
        return between(self.at, length) if self.cut else Extent(self.at, 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """One for all tests, so that the shares of the long one add up to every byte."""
    with smallrepo.small():
        return smallrepo.make(tmp_path_factory.mktemp("writer"))


@pytest.fixture
def model(small: Small, tmp_path: Path) -> Model:
    return small.look(tmp_path)


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[None]:
    with smallrepo.small():
        yield


def every_damage(small: Small) -> Iterator[Damage]:
    for kind, name, data in small.files():
        for at in range(len(data)):
            yield Damage(kind, name, at, cut=False)
            yield Damage(kind, name, at, cut=True)


def some_damage(small: Small) -> list[Damage]:
    """As many of each kind of file, at random places."""
    chance = random.Random(4)
    by_kind: dict[Kind, list[Damage]] = {}
    for damage in every_damage(small):
        by_kind.setdefault(damage.kind, []).append(damage)
    return [damage for found in by_kind.values() for damage in chance.sample(found, _SOME // len(by_kind))]


def test_some_bytes_flipped_and_some_files_cut_are_found_located_and_healed(
    small: Small, model: Model, short_dir: Path
) -> None:
    for damage in some_damage(small):
        try_damage(small, model, damage, short_dir)


@pytest.mark.slow
@pytest.mark.parametrize("share", range(_SHARES))
def test_every_byte_flipped_and_every_file_cut_is_found_located_and_healed(
    small: Small, model: Model, short_dir: Path, share: int
) -> None:
    for damage in itertools.islice(every_damage(small), share, None, _SHARES):
        try_damage(small, model, damage, short_dir)


def try_damage(small: Small, model: Model, damage: Damage, place: Path) -> None:
    data = small.store.files[damage.kind, damage.name][0]
    store = small.harmed(damage.kind, damage.name, damage.applied(data))
    try:
        if damage.kind in (Kind.CONFIG, Kind.KEYS):
            refuse(store, place / "caches")
            return
        hurt = model.hurt(damage.kind, damage.name, damage.extent(len(data)))
        find(store, damage, hurt, place / "caches")
        restore(store, small, hurt, place)
        heal(store, small, place)
    except BaseException as error:
        error.add_note(f"{damage} of {len(data)} bytes")
        raise
    finally:
        for used in place.iterdir():
            shutil.rmtree(used)


def refuse(store: MemoryStore, caches: Path) -> None:
    """Without config or key nothing can be opened, and that is said."""
    with pytest.raises(errors.RepositoryDamaged) as caught, smallrepo.opened(store, caches):
        pass
    assert caught.value.exit_code is errors.Exit.VERIFICATION
    assert caught.value.file.startswith(("config", "keys/"))


def find(store: MemoryStore, damage: Damage, hurt: Touched, caches: Path) -> None:
    """It is found in the file where it is, and the disks and ranges that need these bytes are told, no others."""
    with smallrepo.opened(store, caches) as repository:
        found = smallrepo.scrubbed(repository)
    assert [file.file for file in found.files] == [f"{damage.kind}/{damage.name}"]
    located = {(disk.point, disk.target): list(disk.ranges) for disk in found.disks if disk.problem is not None}
    assert located == hurt
    machines = {disk.machine for disk in found.disks}
    assert machines <= {smallrepo.MACHINE, "?"}
    assert "?" not in machines or damage.kind is Kind.SNAPSHOTS


def restore(store: MemoryStore, small: Small, hurt: Touched, place: Path) -> None:
    """A restore that needs it fails, each other one gives every byte."""
    with smallrepo.opened(store, place / "restorer") as repository:
        for id, content in small.contents.items():
            if (id, "") in hurt:
                with pytest.raises(errors.VerificationFailed):
                    repository.find(id)
                continue
            point = repository.find(id)
            for target, data in content.items():
                if (id, target) in hurt:
                    with pytest.raises(errors.VerificationFailed):
                        smallrepo.restored(repository, point, target, place / "restorer" / "disk")
                else:
                    assert smallrepo.restored(repository, point, target, place / "restorer" / "disk") == data


def heal(store: MemoryStore, small: Small, place: Path) -> None:
    """The next backup stores again what the live disks still hold, and relies on nothing that is bad."""
    content = small.contents[small.points[-1]]
    with smallrepo.opened(store, place / "caches") as repository:
        point = smallrepo.backup(repository, content, small.contents, len(small.points))
    with smallrepo.opened(store, place / "caches") as repository:
        found = smallrepo.scrubbed(repository, points=frozenset([point.id]))
    assert [disk for disk in found.disks if disk.problem] == []
    assert found.files == ()
    with smallrepo.opened(store, place / "other") as repository:
        for target, data in content.items():
            assert smallrepo.restored(repository, repository.find(point.id), target, place / "other" / "disk") == data
