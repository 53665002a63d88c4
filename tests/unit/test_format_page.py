"""docs/format.md says what the code does: fields of the manifest both ways, the example, and the numbers."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pullback.model import points, tpm
from pullback.model.backups import Level
from pullback.model.checkpoints import Mark
from pullback.model.description import Description, FirmwareHeader, ImageAt, Kind
from pullback.model.points import ImageFiles, Mode, Point, PointDisk, PointRef
from pullback.model.tpm import Backend, TpmFileHeader, TpmHeader, Version
from pullback.repo.digest import block_size_for, zero_hash
from pullback.repo.restic import layout, lockfile, locking, packer, snapshots, trees
from pullback.units import GiB, MiB, TiB

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def point(files: ImageFiles | None = None) -> Point:
    """A restore point with something in every field."""
    mark = Mark(name="auto.3e9f66064e9dd944.20261124T060018Z", nonce="1f2e3d4c5b6a7988", first=3, last=3)
    disk = PointDisk(
        target="vda",
        qdev="vda",
        serial="1",
        source="/srv/a.qcow2",
        source_format="qcow2",
        size=8 * GiB,
        mode=Mode.INCREMENTAL,
        reason=None,
        parent=PointRef(point="c5" * 32, target="vda"),
        mark=mark,
        block_size=MiB,
        digest="9b" * 32,
        stored=1,
        read=1,
        files=files,
    )
    return Point(
        id="0" * 64,
        machine="web01",
        created=datetime(2026, 11, 24, tzinfo=UTC),
        level=Level.AUTO,
        pullback="1",
        qemu="7.2",
        engine="filter",
        pause=0.1,
        checkpoint=mark.name,
        disks=(disk,),
        description=Description(
            kind=Kind.IMAGES, version="7.2", images=(ImageAt(target="vda", path="/srv/a.qcow2", format="qcow2"),)
        ),
        firmware=(FirmwareHeader(name="pflash1", writable=True, size=1, sha256="7d" * 32),),
        tpm=TpmHeader(
            version=Version.TPM_2_0,
            backend=Backend.DIR,
            encrypted=False,
            files=(TpmFileHeader(name="tpm2-00.permall", size=1, sha256="7d" * 32),),
        ),
    )


def manifest() -> dict[str, Any]:
    """Its manifest."""
    found: dict[str, Any] = json.loads(points.encode(point()))
    return found


def told(table: str) -> set[str]:
    """The keys in a table of the page."""
    match = re.search(rf"<!-- fields: {table} -->\n\n((?:\|.*\n)+)", PAGE)
    assert match, table
    return {key for row in match[1].splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])}


def parts() -> dict[str, set[str]]:
    """The keys that the code writes, by table."""
    whole = manifest()
    disk = whole["disks"][0]
    both: dict[str, Any] = points.document(point(ImageFiles(image="a", hashes="b", structure="7d" * 32)))
    with_files: dict[str, Any] = both["disks"][0]
    return {
        "point": set(whole),
        "disk": set(disk),
        "parent": set(disk["parent"]),
        "mark": set(disk["mark"]),
        "description": set(whole["description"]),
        "image": set(whole["description"]["images"][0]),
        "firmware": set(whole["firmware"][0]),
        "tpm": set(whole["tpm"]),
        "tpmfile": set(whole["tpm"]["files"][0]),
        "directory": set(both) - set(whole) | set(with_files) - set(disk),
    }


@pytest.mark.parametrize("table", sorted(parts()))
def test_the_page_has_every_field_that_is_written_and_no_other(table: str) -> None:
    assert told(table) == parts()[table]


def example() -> bytes:
    """The manifest on the page."""
    match = re.search(r"<!-- example -->\n```json\n(.*?)```", PAGE, re.DOTALL)
    assert match
    return match[1].encode()


def test_the_example_is_a_manifest_just_as_it_would_be_written() -> None:
    found = points.decode(example(), name="the example", identity="0" * 64)
    assert points.encode(found) == example()


def test_the_checksum_is_made_as_the_page_says() -> None:
    body = json.loads(example())
    said = body.pop("sha256")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == said


def test_chunks_have_the_sizes_of_the_table() -> None:
    rows = re.findall(r"^\| up to (\d+) TiB \| (\d+) MiB \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for disk, chunk in rows:
        assert block_size_for(int(disk) * TiB) == int(chunk) * MiB
        assert int(disk) == 256 or block_size_for(int(disk) * TiB + 512) == 2 * int(chunk) * MiB
    assert f"{points.MAX_BLOCKS:,} chunks".replace(",", " ") in PAGE


def test_the_chunk_of_zeroes_has_the_id_of_the_page() -> None:
    assert f"`{zero_hash(MiB).hex()}`" in PAGE


def test_nodes_are_as_the_table_says() -> None:
    [file] = json.loads(trees.encode([trees.file("000000", b"\0" * 32, MiB)]))["nodes"]
    [directory] = json.loads(trees.encode([trees.directory("000000", b"\0" * 32)]))["nodes"]
    rows = re.findall(
        r"^\| (`.*`) \| (.*) \| (.*) \|$", PAGE[PAGE.index("### Nodes") : PAGE.index("### The digest")], re.M
    )
    keys = {key for row in rows for key in re.findall(r"`(\w+)`", row[0])}
    assert keys | {"name"} == set(file) | set(directory)
    cells = {row[0]: row[1:] for row in rows}
    assert [int(cell.split()[0]) for cell in cells["`mode`"]] == [file["mode"], directory["mode"]]
    assert cells["`mtime`, `atime`, `ctime`"][0] == f"`{file['mtime']}`"
    assert file["content"] == ["0" * 64]
    assert directory["content"] is None


def test_the_snapshot_has_the_fields_of_the_table() -> None:
    made = layout.snapshot_of(replace(point(), tags=("nightly",)), b"\0" * 32, "c5" * 32)
    rows = PAGE[PAGE.index("## The snapshot file") : PAGE.index("**A snapshot is")]
    keys = {
        key for row in rows.splitlines() if row.startswith("| `") for key in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    written = set(json.loads(snapshots.encode(replace(made, uid=1, gid=1, username="root"))))
    assert keys == written | {"original"}
    assert made.paths == ("/pullback/web01",)
    assert made.tags == ("pullback", "nightly")


@pytest.mark.parametrize(
    "sentence",
    [
        f"Each segment has {trees.SEGMENT // GiB} GiB",
        f"packs, {packer.PACK_SIZE // MiB} MiB each",
        f"after each {packer.INDEX_BLOBS:,} blobs".replace(",", " "),
        f"younger than {locking.TRUSTED / 60:.0f} minutes",
        f"every\n{locking.REFRESH / 60:.0f} minutes",
        f"older than {lockfile.STALE_AFTER.seconds // 60} minutes is stale",
        f"at most {points.MAX_MANIFEST // MiB} MiB",
        f"1 to {points.MAX_DISKS} of them",
        f"| `format` | {points.FORMAT} |",
        f"| `minor` | {points.MINOR} |",
        layout.MANIFEST,
        f"+-- {layout.FIRMWARE}/",
        f"+-- {layout.TPM}/",
        f"`{tpm.SINGLE}`",
        f"at most {tpm.MAX_FILE // MiB} MiB each",
    ],
)
def test_numbers_and_names_are_those_of_the_code(sentence: str) -> None:
    assert " ".join(sentence.split()) in " ".join(PAGE.split())
