"""The format against the installed restic: what it writes we read, and what we write it accepts.

Everything is written and read by the codec alone, as files in a directory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import restic_reading
from pullback.repo.restic import blobs, config, crypto, index, keys, packs, snapshots, times, trees, unpacked
from pullback.repo.restic.types import Blob, Entry

pytestmark = pytest.mark.skipif(shutil.which("restic") is None, reason="restic is not installed")
PASSWORD = "correct horse"
KiB = 1024
CHEAP = keys.Cost(1 << 10, 8, 1)
NOW = datetime(2026, 11, 24, 6, 0, 18, 250_000, tzinfo=UTC)


def dumped(repository: Path, *words: object, password: str = PASSWORD) -> bytes:
    """What restic prints; it must succeed."""
    argv = ["restic", "--no-cache", "-r", str(repository), *map(str, words)]
    env = {**os.environ, "RESTIC_PASSWORD": password}
    done = subprocess.run(argv, capture_output=True, env=env, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def restic(repository: Path, *words: object, password: str = PASSWORD) -> str:
    """The same, as text."""
    return dumped(repository, *words, password=password).decode()


@dataclass
class Written:
    """A repository that we write: a snapshot of one disk, in segments of 64 KiB and chunks of 4 KiB."""

    root: Path
    version: int
    key: crypto.Key = field(default_factory=crypto.Key.random)
    packs: list[tuple[bytes, list[Entry]]] = field(default_factory=list)

    def put(self, folder: str, name: str, data: bytes) -> None:
        """A file."""
        path = self.root / folder / (name[:2] if folder == "data" else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def create(self) -> None:
        """Key, config, and the folders that restic wants to see."""
        for folder in ("data", "index", "keys", "locks", "snapshots"):
            (self.root / folder).mkdir(parents=True)
        maker = keys.Maker(hostname="h", username="u", created=NOW)
        self.put("keys", *keys.create(PASSWORD, self.key, maker, cost=CHEAP))
        (self.root / "config").write_bytes(config.encode(self.key, config.new(self.version)))

    def pack(self, kind: Blob, plains: list[bytes]) -> list[bytes]:
        """A pack of these blobs; gives their ids."""
        builder = packs.PackBuilder(self.key, kind)
        level = 1 if self.version > 1 else None
        ids = []
        for plain in plains:
            blob = blobs.encode(self.key, plain, kind, level=level)
            if blob.id not in ids:
                builder.add(blob)
            ids.append(blob.id)
        made = builder.finish()
        self.put("data", made.name, bytes(made.data))
        self.packs.append((made.id, list(made.entries)))
        return ids

    def snapshot(self, disk: bytes, **words: Any) -> str:
        """A snapshot of the disk `vda`; gives its id."""
        shape = trees.Shape(len(disk), 4 * KiB, 64 * KiB)
        ids = self.pack(Blob.DATA, [disk[at : at + shape.chunk] for at in range(0, len(disk), shape.chunk)])
        manifest = b'{"disks": ["vda"]}\n'
        [manifest_id] = self.pack(Blob.DATA, [manifest])
        made = list(trees.disk_trees(b"".join(ids), shape))
        nodes = [
            trees.directory("vda", made[-1][0]),
            trees.file("pullback.json", manifest_id, len(manifest)),
        ]
        *_, root = self.pack(Blob.TREE, [*(tree for _, tree in made), trees.encode(nodes)])
        self.put("index", *self._sealed(index.encode(self.packs)))
        document = snapshots.encode(
            snapshots.Snapshot(
                time=times.write(NOW),
                tree=root.hex(),
                paths=("/pullback/web01",),
                hostname="web01",
                username="root",
                tags=("pullback", "weekly <&>"),
                program_version="pullback 0.1",
                **words,
            )
        )
        name, data = self._sealed(document)
        self.put("snapshots", name, data)
        return name

    def _sealed(self, document: bytes) -> tuple[str, bytes]:
        return unpacked.seal_file(self.key, document, compress=self.version > 1)


def disk() -> bytes:
    """A disk of 200 000 bytes: random, text, zeroes, and a short last chunk."""
    noise = os.urandom(80_000)
    return (noise + b"some text, again and again. " * 2000 + bytes(100_000))[:200_000]


@pytest.fixture(scope="module", params=[1, 2])
def written(request: pytest.FixtureRequest) -> Iterator[tuple[Written, bytes, str]]:
    """A repository that we wrote, the disk in it, and the snapshot's id. Nobody changes it."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Written(Path(scratch) / "repo", request.param)
        made.create()
        content = disk()
        yield made, content, made.snapshot(content)


def test_restic_finds_nothing_wrong_with_what_we_write(written: tuple[Written, bytes, str]) -> None:
    assert "no errors were found" in restic(written[0].root, "check", "--read-data")


def test_restic_shows_our_snapshot(written: tuple[Written, bytes, str]) -> None:
    made, _, id = written
    shown = restic(made.root, "snapshots")
    for word in (id[:8], "web01", "/pullback/web01", "weekly <&>"):
        assert word in shown


def test_restic_lists_our_files(written: tuple[Written, bytes, str]) -> None:
    listed = restic(written[0].root, "--quiet", "ls", "latest").splitlines()
    assert [line for line in listed if line.startswith("/")] == [
        "/pullback.json",
        "/vda",
        *(path for number in range(4) for path in (f"/vda/{number:06}", f"/vda/{number:06}/000000")),
    ]


def test_restic_restores_our_disk(written: tuple[Written, bytes, str], tmp_path: Path) -> None:
    made, content, id = written
    restic(made.root, "restore", id, "--target", tmp_path)
    assert b"".join(path.read_bytes() for path in sorted(tmp_path.glob("vda/*/*"))) == content


def test_restic_dumps_a_segment_of_our_disk(written: tuple[Written, bytes, str]) -> None:
    made, content, _ = written
    assert dumped(made.root, "dump", "latest", "/vda/000001/000000") == content[64 * KiB : 128 * KiB]
    assert restic(made.root, "dump", "latest", "/pullback.json") == '{"disks": ["vda"]}\n'


def test_restic_changes_our_repository_and_we_read_it(tmp_path: Path) -> None:
    """Another snapshot, another password, tags, forget and prune; then all is decoded again."""
    made = Written(tmp_path / "repo", 2)
    made.create()
    content = disk()
    gone, kept = made.snapshot(content), made.snapshot(content[::-1])
    restic(made.root, "tag", "--add", "kept", kept)
    restic(made.root, "forget", "--prune", gone)
    restic(made.root, "check", "--read-data")
    found = restic_reading.read(made.root, PASSWORD)
    [(name, snapshot)] = found.snapshots.items()
    assert name != kept
    assert (snapshot.original, snapshot.tags) == (kept, ("pullback", "weekly <&>", "kept"))
    files = found.listing(bytes.fromhex(snapshot.tree))
    assert b"".join(files[path] for path in sorted(files) if path.startswith("vda/")) == content[::-1]
    segments = next(node for node in trees.parse(found.trees[bytes.fromhex(snapshot.tree)], "") if node.subtree)
    assert segments.subtree is not None
    shape = trees.Shape(len(content), 4 * KiB, 64 * KiB)
    ids = trees.read_disk(segments.subtree, found.trees.__getitem__, shape, "")
    assert b"".join(found.data[ids[at : at + 32]] for at in range(0, len(ids), 32)) == content[::-1]


def test_we_read_what_restic_writes(tmp_path: Path) -> None:
    """restic's own chunks of a file, its trees, two passwords, and a lock while it is held."""
    repository, source = tmp_path / "repo", tmp_path / "source"
    content = os.urandom(3_000_000) + bytes(3_000_000)
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "disk").write_bytes(content)
    (source / "fifo").symlink_to("/nowhere")
    restic(repository, "init", "--repository-version", "2")
    restic(repository, "backup", source, "--compression", "max")
    argv = ["restic", "--no-cache", "-r", str(repository), "backup", "--stdin", "--quiet"]
    env = {**os.environ, "RESTIC_PASSWORD": PASSWORD}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, env=env) as process:
        assert process.stdin is not None
        while not any(len(path.name) == 64 for path in (repository / "locks").iterdir()):
            assert process.poll() is None
        found = restic_reading.read(repository, PASSWORD)
        process.stdin.close()
    [lock] = found.locks.values()
    assert (lock.pid, lock.exclusive, lock.uid) == (process.pid, False, os.getuid())
    [snapshot] = found.snapshots.values()
    files = found.listing(bytes.fromhex(snapshot.tree))
    assert [data for path, data in files.items() if path.endswith("deep/er/disk")] == [content]
    assert all(trees.encode(trees.parse(tree, "")) == tree for tree in found.trees.values())
    assert config.irreducible(found.config.polynomial)


def test_a_second_key_of_ours_opens_the_repository_for_restic(tmp_path: Path) -> None:
    made = Written(tmp_path / "repo", 2)
    made.create()
    maker = keys.Maker(hostname="<other>", username="ü", created=NOW)
    made.put("keys", *keys.create("second", made.key, maker, cost=CHEAP))
    assert restic(made.root, "key", "list", password="second").count("2026-11-24") == 2
