"""Looking for damage in a small repository in memory: what is found, what is told, what is remembered.

Flips and cuts of every file are in tests/faults/test_flips.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

import smallrepo
from pullback import errors, repo
from pullback.extents import Extent
from pullback.progress import Cancel, Silent
from pullback.repo.restic import keys, packcheck, packs, snapshots, unpacked
from pullback.repo.restic.crypto import Key
from pullback.repo.restic.types import Blob
from pullback.repo.store import Kind
from pullback.repo.store.memory import MemoryStore
from pullback.units import GiB
from smallrepo import CHUNK, MACHINE, Model, Small, opened, scrubbed


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


def scrub(store: MemoryStore, caches: Path, **scope: object) -> repo.Findings:
    with opened(store, caches) as repository:
        return scrubbed(repository, **scope)


def problems(found: repo.Findings) -> dict[tuple[str, str], list[Extent]]:
    return {(disk.point, disk.target): list(disk.ranges) for disk in found.disks if disk.problem is not None}


def pack_of(model: Model, kind: Blob) -> str:
    """A pack with blobs of that kind."""
    return next(pack.hex() for pack, entries in model.packs.items() if entries[0].kind is kind)


def test_in_a_sound_repository_nothing_is_found_and_all_is_read(small: Small, tmp_path: Path) -> None:
    found = scrub(small.store, tmp_path)
    assert (problems(found), found.files, found.notes) == ({}, (), ())
    stored = [data for kind, _, data in small.files() if kind is Kind.DATA]
    assert (found.packs_read, found.bytes_read) == (len(stored), sum(map(len, stored)))
    assert {disk.target for disk in found.disks} == {"vda", "vdb"}
    assert all(disk.read > 0 for disk in found.disks)


def test_without_read_data_no_pack_is_read_whole(small: Small, tmp_path: Path) -> None:
    found = scrub(small.store, tmp_path, read_data=False)
    assert (problems(found), found.files, found.packs_read) == ({}, (), 0)
    assert {disk.read for disk in found.disks} == {0}


@pytest.mark.parametrize("read_data", [True, False])
def test_a_pack_that_is_gone_is_located(small: Small, model: Model, tmp_path: Path, read_data: bool) -> None:
    for pack, entries in model.packs.items():
        store = small.harmed(Kind.DATA, pack.hex(), None)
        found = scrub(store, tmp_path / pack.hex(), read_data=read_data)
        assert [(bad.file, bad.problem) for bad in found.files] == [(f"data/{pack.hex()}", "it is missing")]
        assert found.files[0].lost == len({entry.id for entry in entries})
        assert problems(found) == model.touched((entry.id, entry.kind) for entry in entries)


def test_blobs_that_no_index_knows_are_told(small: Small, model: Model, tmp_path: Path) -> None:
    name = next(iter(model.indexes))
    found = scrub(small.harmed(Kind.INDEX, name, None), tmp_path, read_data=False)
    assert [bad.file for bad in found.files] == ["index"]
    assert problems(found) == model.hurt(Kind.INDEX, name, Extent(0, 1))


def test_a_lost_chunk_of_zeroes_hurts_no_restore_and_is_told(small: Small, model: Model, tmp_path: Path) -> None:
    zero = repo.zero_hash(CHUNK)
    [(pack, entry)] = [(pack, e) for pack, entries in model.packs.items() for e in entries if e.id == zero]
    data = bytearray(small.store.files[Kind.DATA, pack.hex()][0])
    data[entry.offset] ^= 1
    store = small.harmed(Kind.DATA, pack.hex(), bytes(data))
    with opened(store, tmp_path) as repository:
        found = scrubbed(repository)
        assert ([bad.lost for bad in found.files], problems(found)) == ([1], {})
        assert "zeroes" in found.notes[0]
        assert smallrepo.restored(repository, repository.find(small.points[0]), "vda", tmp_path / "disk")
        smallrepo.backup(repository, small.contents[small.points[-1]], small.contents, 9)
        assert scrubbed(repository).notes == ()  # another copy is there


def test_a_pack_with_another_length_is_found_without_reading_it(small: Small, model: Model, tmp_path: Path) -> None:
    name = pack_of(model, Blob.DATA)
    data = small.store.files[Kind.DATA, name][0]
    for number, harmed in enumerate([data[:-1], data + b"\0"]):
        found = scrub(small.harmed(Kind.DATA, name, harmed), tmp_path / str(number), read_data=False)
        assert [bad.file for bad in found.files] == [f"data/{name}"]
        assert f"instead of {len(data)}" in found.files[0].problem
        assert problems(found) == {}


def test_a_point_is_looked_at_alone(small: Small, model: Model, tmp_path: Path) -> None:
    newest, oldest = small.points[-1], small.points[0]
    [(id, _)] = [
        blob for blob, users in model.users.items() if blob[1] is Blob.DATA and set(users) == {(newest, "vdb")}
    ][:1]
    [(pack, entry)] = [(pack, e) for pack, entries in model.packs.items() for e in entries if e.id == id]
    data = bytearray(small.store.files[Kind.DATA, pack.hex()][0])
    data[entry.offset] ^= 1
    store = small.harmed(Kind.DATA, pack.hex(), bytes(data))
    assert scrub(store, tmp_path / "a", points=frozenset([oldest])).files == ()
    found = scrub(store, tmp_path / "b", points=frozenset([newest]))
    assert list(problems(found)) == [(newest, "vdb")]
    assert problems(scrub(store, tmp_path / "c", points=frozenset([newest]), only=("vda",))) == {}


def test_a_bad_index_that_no_looked_at_point_needs_is_a_note(small: Small, model: Model, tmp_path: Path) -> None:
    with opened(small.store, tmp_path / "writer2") as repository:
        other = smallrepo.backup(repository, {"vda": smallrepo.content_of("vda", (9, 9, 9, 9, 9))}, {}, 9, "db01")
    known = set(model.indexes)
    [name] = [name for kind, name, _ in small.files() if kind is Kind.INDEX and name not in known]
    store = small.harmed(Kind.INDEX, name, b"nonsense")
    found = scrub(store, tmp_path / "a", points=frozenset(small.points))
    assert found.files == ()
    assert len(found.notes) == 1
    found = scrub(store, tmp_path / "b", points=frozenset([other.id]))
    assert [bad.file for bad in found.files] == [f"index/{name}"]
    assert problems(found) == {(other.id, ""): []}


def test_damage_that_two_machines_share_is_told_of_both(small: Small, tmp_path: Path) -> None:
    content = small.contents[small.points[-1]]
    with opened(small.store, tmp_path / "writer2") as repository:
        other = smallrepo.backup(repository, content, {}, 9, "db01")
    model = small.look(tmp_path / "model")
    [(id, _)] = [blob for blob, users in model.users.items() if blob[1] is Blob.DATA and (other.id, "vdb") in users][:1]
    [pack] = [pack for pack, entries in model.packs.items() if any(entry.id == id for entry in entries)]
    found = scrub(small.harmed(Kind.DATA, pack.hex(), b""), tmp_path / "a")
    hurt = {(disk.machine, disk.point) for disk in found.disks if disk.problem is not None}
    assert {machine for machine, _ in hurt} == {MACHINE, "db01"}
    assert scrub(small.harmed(Kind.DATA, pack.hex(), b""), tmp_path / "b", machine="db01").disks[0].machine == "db01"


def test_a_blob_with_another_good_copy_is_spared(small: Small, model: Model, tmp_path: Path) -> None:
    name = pack_of(model, Blob.DATA)
    store = small.harmed(Kind.DATA, name, b"")
    with opened(store, tmp_path / "a") as repository:
        scrubbed(repository)
        healed = smallrepo.backup(repository, small.contents[small.points[-1]], small.contents, 9)
    found = scrub(store, tmp_path / "b")
    [bad] = found.files
    assert bad.file == f"data/{name}"
    assert bad.spared > 0
    assert (healed.id, "vda") not in problems(found)
    assert scrub(store, tmp_path / "a", points=frozenset([healed.id])).files == ()


def test_what_is_bad_is_remembered_for_writers_and_forgotten_when_it_is_good_again(
    small: Small, model: Model, tmp_path: Path
) -> None:
    name = pack_of(model, Blob.DATA)
    sound = small.store.files[Kind.DATA, name]
    store = small.harmed(Kind.DATA, name, b"")
    with opened(store, tmp_path) as repository:
        scrubbed(repository)
        assert repository.cache.damage() == (frozenset([bytes.fromhex(name)]), frozenset())
        store.files[Kind.DATA, name] = sound  # the disk was read wrongly, or somebody had a copy
        for point, content in small.contents.items():  # what is marked is still read, if it is good
            for target, data in content.items():
                assert smallrepo.restored(repository, repository.find(point), target, tmp_path / "disk") == data
        scrubbed(repository, read_data=False)
        assert repository.cache.damage()[0] == {bytes.fromhex(name)}
        scrubbed(repository)
        assert repository.cache.damage() == (frozenset(), frozenset())


def test_a_bad_index_that_the_cache_still_knows_is_found_and_not_relied_upon(small: Small, tmp_path: Path) -> None:
    caches = tmp_path / "writer"
    name = next(name for kind, name, _ in small.files() if kind is Kind.INDEX)
    store = small.harmed(Kind.INDEX, name, b"nonsense")
    with opened(store, caches) as repository:
        found = scrubbed(repository)
        assert [bad.file for bad in found.files] == [f"index/{name}"]
        point = smallrepo.backup(repository, small.contents[small.points[-1]], small.contents, 9)
    with opened(store, tmp_path / "other") as repository:
        assert smallrepo.restored(repository, repository.find(point.id), "vda", tmp_path / "disk")


def test_what_others_keep_in_a_repository_is_no_damage(small: Small, tmp_path: Path) -> None:
    store = small.harmed(Kind.LOCKS, "ab" * 32, b"unreadable")
    store.files[Kind.LOCKS, "ab" * 32] = b"unreadable", datetime(2020, 1, 1, tzinfo=UTC)
    maker = keys.Maker(hostname="elsewhere", username="somebody", created=datetime.now(UTC))
    name, data = keys.create("another password", Key.random(), maker, cost=keys.Cost(2, 8, 1))
    store.files[Kind.KEYS, name] = data, datetime.now(UTC)
    with opened(store, tmp_path) as repository:
        theirs = snapshots.Snapshot(time="2026-11-24T06:00:00Z", tree="ab" * 32, paths=("/home",), hostname="laptop")
        repository.write_snapshot(theirs)
        found = scrubbed(repository)
    assert (problems(found), found.files) == ({}, ())


def test_damaged_files_of_others_are_found(small: Small, tmp_path: Path) -> None:
    with opened(small.store, tmp_path / "a") as repository:
        theirs = snapshots.Snapshot(time="2026-11-24T06:00:00Z", tree="ab" * 32, paths=("/home",), hostname="laptop")
        name = repository.write_snapshot(theirs)
        other, sealed = unpacked.seal_file(repository.key, b"[]")
    store = small.harmed(Kind.SNAPSHOTS, name, small.store.files[Kind.SNAPSHOTS, name][0][:-1])
    store.files[Kind.KEYS, other] = sealed[1:], datetime.now(UTC)
    found = scrub(store, tmp_path / "b")
    assert sorted(bad.file for bad in found.files) == sorted([f"snapshots/{name}", f"keys/{other}"])


def test_packs_in_no_index_are_a_note(small: Small, tmp_path: Path) -> None:
    with opened(small.store, tmp_path) as repository:
        builder = packs.PackBuilder(repository.key, Blob.DATA)
        builder.add(smallrepo.blob_of(repository.key, b"left behind"))
        pack = builder.finish()
        small.store.write(Kind.DATA, pack.name, pack.data)
        found = scrubbed(repository)
    assert (problems(found), found.files) == ({}, ())
    assert "in no index" in found.notes[0]


def test_a_sample_reads_a_part_of_the_packs(small: Small, model: Model, tmp_path: Path) -> None:
    found = scrub(small.store, tmp_path, sample=repo.Sample(packs=2))
    assert found.packs_read == 2
    assert {disk.read for disk in found.disks} == {0}


def test_a_cancelled_scrub_stops(small: Small, tmp_path: Path) -> None:
    cancel = Cancel()
    cancel.cancel(errors.Interrupted())
    with opened(small.store, tmp_path) as repository, pytest.raises(errors.Interrupted):
        repo.scrub(repository, repo.Scope(read_data=True), progress=Silent(), cancel=cancel)


def test_a_store_that_cannot_be_reached_is_no_damage(small: Small, tmp_path: Path) -> None:
    class Gone(MemoryStore):
        def list(self, kind: Kind) -> Iterator[repo.Stored]:
            if kind is Kind.DATA:
                raise errors.StoreUnreachable(store="memory:", reason="as was asked for")
            return super().list(kind)

    store = Gone()
    store.files = dict(small.store.files)
    with opened(store, tmp_path) as repository, pytest.raises(errors.StoreUnreachable):
        scrubbed(repository)
    with opened(small.store, tmp_path) as repository:
        assert repository.cache.damage() == (frozenset(), frozenset())


# -- pure parts --------------------------------------------------------------------------------


def test_the_size_of_a_pack_follows_from_what_is_in_it(small: Small, model: Model) -> None:
    for pack, entries in model.packs.items():
        size = len(small.store.files[Kind.DATA, pack.hex()][0])
        assert packcheck.expected_size(entries) == size
        assert packcheck.size_problem(entries, size) is None
        assert packcheck.size_problem(entries, size - 1) is not None
        assert packcheck.size_problem(entries, None) == "it is missing"


def test_a_size_is_not_guessed_where_the_index_knows_a_part_only(model: Model) -> None:
    entries = next(entries for entries in model.packs.values() if len(entries) > 1)
    assert packcheck.expected_size(entries[1:]) is None
    assert packcheck.size_problem(entries[1:], 1 * GiB) is None


def test_a_pack_whose_index_lies_is_told(small: Small, model: Model, tmp_path: Path) -> None:
    name = pack_of(model, Blob.DATA)
    data = small.store.files[Kind.DATA, name][0]
    entries = model.packs[bytes.fromhex(name)]
    with opened(small.store, tmp_path) as repository:
        moved = [entries[0]._replace(offset=entries[0].offset + 1), *entries[1:]]
        verdict = packcheck.check(repository.key, name, data, moved)
        assert "the index tells" in (verdict.problem or "")
        assert verdict.bad == (moved[0],)
        assert packcheck.check(repository.key, name, data, entries).problem is None


@pytest.mark.parametrize(
    ("text", "sample"),
    [
        ("5%", repo.Sample(percent=5.0)),
        ("0.5 %", repo.Sample(percent=0.5)),
        ("12", repo.Sample(packs=12)),
        ("10G", repo.Sample(size=10 * GiB)),
    ],
)
def test_a_sample_can_be_said_in_three_ways(text: str, sample: repo.Sample) -> None:
    assert repo.Sample.parse(text) == sample


@pytest.mark.parametrize("text", ["", "0%", "101%", "half", "-3", "5%%"])
def test_other_words_for_a_sample_are_refused(text: str) -> None:
    with pytest.raises(errors.UsageError):
        repo.Sample.parse(text)


def test_a_sample_takes_as_much_as_it_says_and_at_least_one_pack() -> None:
    sizes = {bytes([number]) * 32: 10 for number in range(100)}
    chance = random.Random(1)
    assert len(repo.Sample(percent=5).choose(sizes, chance)) == 5
    assert len(repo.Sample(percent=0.01).choose(sizes, chance)) == 1
    assert len(repo.Sample(packs=7).choose(sizes, chance)) == 7
    assert len(repo.Sample(size=95).choose(sizes, chance)) == 9
    assert len(repo.Sample(size=1).choose(sizes, chance)) == 1
    assert repo.Sample(packs=7).choose(sizes, chance) != repo.Sample(packs=7).choose(sizes, chance)


def test_ranges_are_merged_over_segments_and_cut_at_the_end_of_the_disk(
    small: Small, model: Model, tmp_path: Path
) -> None:
    found = scrub(small.harmed(Kind.DATA, pack_of(model, Blob.TREE), None), tmp_path)
    whole = {disk.target: list(disk.ranges) for disk in found.disks if disk.target and disk.problem}
    assert all(ranges == [Extent(0, smallrepo.SIZES[target])] for target, ranges in whole.items())
    assert smallrepo.SIZES["vdb"] % CHUNK
