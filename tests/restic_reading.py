"""Every file of a repository in restic's format, decoded by our codec alone: for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pullback.repo.restic import blobs, config, crypto, index, keys, lockfile, packs, snapshots, trees, unpacked
from pullback.repo.restic.types import Blob, Entry


@dataclass
class Contents:
    """What is in a repository. Ids of files in hex, of blobs as bytes."""

    key: crypto.Key
    config: config.Config
    keys: dict[str, keys.KeyInfo] = field(default_factory=dict)
    packs: dict[str, list[Entry]] = field(default_factory=dict)
    data: dict[bytes, bytes] = field(default_factory=dict)
    trees: dict[bytes, bytes] = field(default_factory=dict)
    index: dict[str, index.IndexFile] = field(default_factory=dict)
    index_documents: dict[str, bytes] = field(default_factory=dict)
    snapshots: dict[str, snapshots.Snapshot] = field(default_factory=dict)
    locks: dict[str, lockfile.Lock] = field(default_factory=dict)

    def listing(self, tree: bytes, prefix: str = "") -> dict[str, bytes]:
        """All files below a tree, by path, with their content."""
        found: dict[str, bytes] = {}
        for node in trees.parse(self.trees[tree], "a tree"):
            if node.subtree is not None:
                found |= self.listing(node.subtree, f"{prefix}{node.name}/")
            elif node.content is not None:
                ids = [node.content[at : at + 32] for at in range(0, len(node.content), 32)]
                found[prefix + node.name] = b"".join(self.data[id] for id in ids)
        return found


def read(root: Path, password: str) -> Contents:
    """Decode all of the repository in the directory `root`."""
    files = {path.name: path.read_bytes() for path in sorted((root / "keys").iterdir())}
    _, key = keys.open_any(files.items(), password, str(root))
    found = Contents(key, config.parse(key, (root / "config").read_bytes(), str(root)))
    found.keys = {name: keys.describe(data, name) for name, data in files.items()}
    for path in sorted(path for path in (root / "data").rglob("*") if path.is_file()):
        _read_pack(found, path)
    for folder in ("index", "snapshots", "locks"):
        for path in sorted((root / folder).iterdir()) if (root / folder).exists() else ():
            _read_file(found, folder, path)
    return found


def _read_pack(found: Contents, path: Path) -> None:
    data = path.read_bytes()
    found.packs[path.name] = packs.parse_pack(found.key, data, path.name)
    for entry in found.packs[path.name]:
        sealed = data[entry.offset : entry.offset + entry.length]
        plain = blobs.decode(found.key, sealed, entry, path.name)
        (found.trees if entry.kind is Blob.TREE else found.data)[entry.id] = plain


def _read_file(found: Contents, folder: str, path: Path) -> None:
    where = f"{folder}/{path.name}"
    document = unpacked.open_file(found.key, path.read_bytes(), path.name, where)
    if folder == "index":
        found.index_documents[path.name] = document
        found.index[path.name] = index.parse(document, where)
    elif folder == "snapshots":
        found.snapshots[path.name] = snapshots.parse(document, where)
    else:
        found.locks[path.name] = lockfile.parse(document, where)
