"""Two small repositories that restic 0.14 made (tests/vectors/restic), read by our codec, and written again."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

import restic_reading
from pullback import errors
from pullback.repo.restic import index, keys, lockfile, lookup, snapshots, trees, unpacked
from pullback.repo.restic.types import Blob
from restic_reading import Contents

VECTORS = Path(__file__).parents[1] / "vectors" / "restic"


@pytest.fixture(scope="module", params=["v1", "v2"])
def version(request: pytest.FixtureRequest) -> str:
    """Each of the two."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def told(version: str) -> dict[str, Any]:
    """What restic says of the repository."""
    found: dict[str, Any] = json.loads((VECTORS / f"told-{version}.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def contents(version: str) -> Contents:
    """What we say of it. Everything is decoded, and every blob's id is checked on the way."""
    return restic_reading.read(VECTORS / version, "vector")


def test_the_key_is_the_one_that_restic_shows(contents: Contents, told: dict[str, Any]) -> None:
    parts = [told["masterkey"]["encrypt"], told["masterkey"]["mac"]["k"], told["masterkey"]["mac"]["r"]]
    assert [contents.key.encrypt, contents.key.k, contents.key.r] == [base64.b64decode(part) for part in parts]


def test_another_password_is_wrong_and_no_damage(version: str) -> None:
    [path] = (VECTORS / version / "keys").iterdir()
    with pytest.raises(errors.WrongPassword):
        keys.open_any([(path.name, path.read_bytes())], "Vector", "here")


def test_config_is_what_restic_shows(contents: Contents, told: dict[str, Any], version: str) -> None:
    assert told["config"] == {
        "version": contents.config.version,
        "id": contents.config.id,
        "chunker_polynomial": f"{contents.config.polynomial:x}",
    }
    assert contents.config.compresses == (version == "v2")


def test_trees_are_what_restic_shows(contents: Contents, told: dict[str, Any]) -> None:
    assert {id.hex(): tree.decode() for id, tree in contents.trees.items()} == told["trees"]


def test_trees_are_written_with_the_bytes_that_restic_wrote(contents: Contents) -> None:
    assert len(contents.trees) >= 5
    for id, tree in contents.trees.items():
        again = trees.encode(trees.parse(tree, "a tree"))
        assert again == tree
        assert trees.tree_id(again) == id


def test_data_is_what_restic_shows(contents: Contents, told: dict[str, Any]) -> None:
    assert {id.hex(): len(plain) for id, plain in contents.data.items()} == told["data"]


def test_packs_have_what_the_index_says(contents: Contents) -> None:
    listed = {pack.hex(): sorted(entries) for file in contents.index.values() for pack, entries in file.packs}
    assert listed == {name: sorted(entries) for name, entries in contents.packs.items()}


def test_index_files_are_written_with_the_bytes_that_restic_wrote(contents: Contents) -> None:
    for name, document in contents.index_documents.items():
        parsed = contents.index[name]
        assert index.encode(parsed.packs, parsed.supersedes) == document


def test_every_blob_is_found_where_it_lies(contents: Contents) -> None:
    found = lookup.Index(lookup.Part.parse(text, name) for name, text in contents.index_documents.items())
    for name, entries in contents.packs.items():
        for entry in entries:
            [place] = found.find(entry.id, entry.kind)
            assert (place.pack.hex(), place.entry(entry.id)) == (name, entry)
            assert not found.contains(entry.id, Blob(1 - entry.kind))


def test_snapshots_are_what_restic_shows(contents: Contents, told: dict[str, Any]) -> None:
    assert {name: json.loads(snapshots.encode(found)) for name, found in contents.snapshots.items()} == told["snapshot"]


def test_locks_are_what_restic_shows(contents: Contents, told: dict[str, Any]) -> None:
    assert {name: json.loads(lockfile.encode(found)) for name, found in contents.locks.items()} == told["lock"]


def test_documents_are_written_with_the_bytes_that_restic_wrote(contents: Contents, version: str) -> None:
    for folder in ("snapshots", "locks"):
        for path in (VECTORS / version / folder).iterdir():
            document = unpacked.open_file(contents.key, path.read_bytes(), path.name, path.name)
            parsed = snapshots.parse(document, "") if folder == "snapshots" else lockfile.parse(document, "")
            again = snapshots.encode(parsed) if isinstance(parsed, snapshots.Snapshot) else lockfile.encode(parsed)
            assert again == document


def test_the_files_are_there_with_their_names(contents: Contents) -> None:
    first, second = sorted(contents.snapshots.values(), key=lambda snapshot: snapshot.when)
    assert first.tags == ("first",)
    files = {path.rpartition("source/")[2]: data for path, data in contents.listing(bytes.fromhex(first.tree)).items()}
    assert files == {
        "empty": b"",
        "below/zeroes": bytes(20_000),
        "below/text": b"All work and no play makes Jack a dull boy.\n" * 40,
        "below/counted": bytes(number * number % 251 for number in range(2000)),
        "<&>": b"<&>",
        'quo"ted\\': b'quo"ted\\',
        "größer": "größer".encode(),
        "tab\there": b"tab\there",
        "latin-\udce9": b"latin-\xe9",
    }
    assert (second.hostname, second.tags) == ("h", ("a", "b"))
    assert contents.listing(bytes.fromhex(second.tree)) == {"stdin": b"from standard input\n"}
