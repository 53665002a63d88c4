"""The index in memory: against a plain dict, with copies, ids that begin alike, and damaged caches."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.errors import RepositoryDamaged
from pullback.repo.restic import index, lookup
from pullback.repo.restic.lookup import Index, Part, Place
from pullback.repo.restic.types import Blob, Entry

NAME = "ab" * 32
Packs = list[tuple[bytes, list[Entry]]]


def blob_id(number: int) -> bytes:
    """Ids that nearly all begin alike: the first 8 bytes have three values only."""
    return bytes([number % 3]) * 8 + bytes(16) + number.to_bytes(8, "big")


entries = st.builds(
    Entry,
    st.integers(0, 20).map(blob_id),
    st.sampled_from(Blob),
    st.integers(0, 2**32 - 1),
    st.integers(32, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)
packs = st.lists(st.tuples(st.integers(0, 9).map(lambda n: bytes([n]) * 32), st.lists(entries, max_size=6)), max_size=4)
sources = st.lists(st.tuples(packs, st.sampled_from(["part", "add"])), max_size=14)


def places(listed: list[Packs], id: bytes, kind: Blob) -> set[Place]:
    """What an index of all these must find."""
    return {
        Place(pack, entry.offset, entry.length, entry.raw_length, entry.kind)
        for given_packs in listed
        for pack, found in given_packs
        for entry in found
        if (entry.id, entry.kind) == (id, kind)
    }


def built(given_sources: list[tuple[Packs, str]]) -> Index:
    """An index of them all, each come by its own way, with look-ups in between."""
    made = Index(Part.of(given_packs) for given_packs, how in given_sources if how == "part")
    for given_packs, how in given_sources:
        made.find(blob_id(0))
        if how == "add":
            for pack, found in given_packs:
                made.add(pack, found)
    return made


EVERY = b"".join(map(blob_id, range(22)))


@given(sources, st.sampled_from([1, 3, 8192]))
def test_the_index_finds_what_a_dict_finds(given_sources: list[tuple[Packs, str]], fresh: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "_FRESH", fresh)
        made = built(given_sources)
    listed = [given_packs for given_packs, _ in given_sources]
    for kind in Blob:
        expected = [places(listed, blob_id(number), kind) for number in range(22)]
        assert [set(made.find(blob_id(number), kind)) for number in range(22)] == expected
        assert [made.contains(blob_id(number), kind) for number in range(22)] == list(map(bool, expected))
        assert made.missing(EVERY, kind) == [number for number in range(22) if not expected[number]]
        located = made.locate(EVERY, kind)
        for number in range(22):
            row = int(located.pack[number])
            assert (row < 0) == (not expected[number])
            if row >= 0:
                offset, length, raw_length = (
                    int(column[number]) for column in (located.offset, located.length, located.raw_length)
                )
                assert Place(located.packs[row], offset, length, raw_length, kind) in expected[number]
    assert len(made) == sum(len(found) for given_packs in listed for _, found in given_packs)


@given(sources)
def test_the_index_tells_its_packs(given_sources: list[tuple[Packs, str]]) -> None:
    made = built(given_sources)
    expected: dict[bytes, set[Entry]] = {}
    for given_packs, _ in given_sources:
        for pack, found in given_packs:
            if found:
                expected.setdefault(pack, set()).update(found)
    assert made.pack_ids() == set(expected)
    for pack, found_there in expected.items():
        listed = made.entries(pack)
        assert set(listed) == found_there
        assert [entry.offset for entry in listed] == sorted(entry.offset for entry in listed)
    told: dict[bytes, set[Entry]] = {}
    for pack, there in made.packs():
        told.setdefault(pack, set()).update(there)
    assert told == expected


@given(sources, st.sets(st.integers(0, 9)), st.sets(st.integers(0, 20)), packs)
@settings(max_examples=40)
def test_what_is_excluded_is_gone_until_it_comes_again(
    given_sources: list[tuple[Packs, str]], bad_packs: set[int], bad_blobs: set[int], later: Packs
) -> None:
    made = built(given_sources)
    gone = {bytes([number]) * 32 for number in bad_packs}
    bad = {blob_id(number) for number in bad_blobs}
    made.exclude(packs=gone, blobs=bad)
    left = [
        [(pack, [entry for entry in found if entry.id not in bad]) for pack, found in given_packs if pack not in gone]
        for given_packs, _ in given_sources
    ]
    _same(made, left)
    for pack, found in later:
        made.add(pack, found)
    _same(made, [*left, later])


def test_all_copies_of_a_blob_are_excluded() -> None:
    copies = [(bytes([number]) * 32, [Entry(blob_id(1), Blob.DATA, number, 40, 0)]) for number in range(4)]
    made = Index([Part.of(copies[:2]), Part.of(copies[2:3])])
    made.add(*copies[3])
    assert len(made.find(blob_id(1))) == 4
    made.exclude(blobs=[blob_id(1)])
    assert made.find(blob_id(1)) == []
    assert made.missing(blob_id(1)) == [0]
    made.add(*copies[0])
    assert [place.pack for place in made.find(blob_id(1))] == [copies[0][0]]


def _same(made: Index, left: list[Packs]) -> None:
    for kind in Blob:
        expected = [places(left, blob_id(number), kind) for number in range(22)]
        assert [set(made.find(blob_id(number), kind)) for number in range(22)] == expected
        assert made.missing(EVERY, kind) == [number for number in range(22) if not expected[number]]
        lacking = [number for number, row in enumerate(made.locate(EVERY, kind).pack.tolist()) if row < 0]
        assert lacking == made.missing(EVERY, kind)
    assert made.pack_ids() == {pack for given_packs in left for pack, found in given_packs if found}


@given(packs)
@settings(max_examples=40)
def test_a_part_is_the_same_from_json_and_from_a_file(
    tmp_path_factory: pytest.TempPathFactory, given_packs: Packs
) -> None:
    path = tmp_path_factory.mktemp("cache") / NAME
    parsed = Part.parse(index.encode(given_packs), "x")
    parsed.save(path, NAME)
    loaded = Part.load(path, NAME)
    assert loaded is not None
    for part in (parsed, loaded):
        _same(Index([part]), [given_packs])


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A part in its file."""
    listed = [
        (bytes([9]) * 32, [Entry(os.urandom(32), Blob.DATA, 5, 100, 0), Entry(os.urandom(32), Blob.TREE, 105, 60, 90)])
    ]
    Part.of(listed).save(tmp_path / NAME, NAME)
    return tmp_path / NAME


def test_every_flip_and_every_truncation_of_a_kept_part_is_found(kept: Path) -> None:
    data = kept.read_bytes()
    assert Part.load(kept, NAME) is not None
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        kept.write_bytes(changed)
        assert Part.load(kept, NAME) is None
        kept.write_bytes(data[:at])
        assert Part.load(kept, NAME) is None
    kept.write_bytes(data + b"\0")
    assert Part.load(kept, NAME) is None


def test_a_kept_part_of_another_index_file_is_not_taken(kept: Path) -> None:
    assert Part.load(kept, "cd" * 32) is None
    assert Part.load(kept.with_name("absent"), NAME) is None


def test_a_part_that_cannot_be_kept_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(OSError):
        Part.of([]).save(tmp_path / NAME, NAME)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


BLOB = f'{{"id":"{NAME}","type":"data","offset":0,"length":40}}'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"data"', '"other"'),
        ('"data"', "[]"),
        ('"data"', "7"),
        ('"offset":0', '"offset":-1'),
        ('"offset":0', '"offset":4294967296'),
        ('"offset":0', '"offset":0.5'),
        ('"offset":0', '"offset":true'),
        ('"offset":0', '"offset":"0"'),
        ('"offset":0', '"offset":null'),
        ('"offset":0', '"other":0'),
        ('"length":40', '"length":31'),
        ('"length":40', '"length":40,"uncompressed_length":-1'),
        (f'"{NAME}"', f'"{NAME[2:]}  "'),
        (f'"{NAME}"', f'"{NAME[2:]}"'),
        (f'"{NAME}"', f'"{NAME[2:]}xx"'),
        (f'"{NAME}"', f'"{NAME.upper()}"'),
        (f'"{NAME}"', "7"),
        (f'"{NAME}"', str([NAME] * 64).replace("'", '"')),
        (BLOB, "[]"),
        (BLOB, "null"),
        (f"[{BLOB}]", "7"),
        (f"[{BLOB}]", '"text"'),
    ],
)
def test_an_impossible_blob_in_an_index_file_is_refused(old: str, new: str) -> None:
    text = f'{{"packs":[{{"id":"{"cd" * 32}","blobs":[{BLOB}]}}]}}'
    assert len(Part.parse(text.encode(), "x")) == 1
    changed = text.replace(old, new)
    assert changed != text
    for parse in (Part.parse, index.parse):
        with pytest.raises(RepositoryDamaged):
            parse(changed.encode(), "x")


def test_an_empty_index_knows_nothing() -> None:
    for made in (Index(), Index([Part.of([])]), Index([Part.parse(b"{}", "x")])):
        assert made.find(bytes(32)) == []
        assert made.missing(bytes(64)) == [0, 1]
        assert made.locate(bytes(64)).pack.tolist() == [-1, -1]
        assert (len(made), made.pack_ids(), made.missing(b"")) == (0, set(), [])


def test_look_ups_never_miss_a_blob_while_others_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_FRESH", 16)
    made = Index(
        [Part.of([(bytes([number]) * 32, [Entry(os.urandom(32), Blob.DATA, 0, 40, 0)])]) for number in range(3)]
    )
    added: list[bytes] = []
    done = threading.Event()
    lost: list[bytes] = []

    def look() -> None:
        while not done.is_set():
            for id in added[-40:]:
                if not made.find(id) or made.missing(id):
                    lost.append(id)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for thread in lookers:
        thread.start()
    for _ in range(3000):
        id = os.urandom(32)
        made.add(os.urandom(32), [Entry(id, Blob.DATA, 0, 40, 0)])
        added.append(id)
    done.set()
    for thread in lookers:
        thread.join()
    assert lost == []
    assert made.missing(b"".join(added)) == []
    assert len(made) == 3003
