"""What is known of a repository here: files that can all be made again from it.

    CACHE/<repository id>/index/<index id>     a parsed index file (`lookup.Part`); index files never change
                          snapshots/<point id> its snapshot file's document
                          points/<point id>    its manifest
                          disks/<digest>       chunk ids and known zeroes of a disk, by its digest
                          journal/<random>     packs of a backup that runs, or was killed
                          damage               packs and index files that `verify` found to be bad

Nothing here is trusted further than it proves itself, and a cache that cannot be written only
makes us slower: no error leaves this module.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pullback.repo import files
from pullback.repo.digest import ENTRY, HashList
from pullback.repo.restic.lookup import Part
from pullback.repo.restic.types import Blob, Entry
from pullback.repo.restic.zeromap import ZeroMap
from pullback.units import MiB

_MAX_DISK = 64 * MiB
_MAX_MANIFEST = 16 * MiB
_MAX_LINE = 64 * MiB
_MAX_DAMAGE = 64 * MiB
_HEX = re.compile(r"[0-9a-f]{64}")
#: Bytes of chunk ids that are kept, the newest: an increment needs those of its parent only (32 MiB for 1 TiB).
_DISKS_KEPT = 1024 * MiB
_DAY = 86_400.0


class Cache:
    """The cache of one repository. Thread-safe: files are written whole."""

    def __init__(self, base: Path, repository: str) -> None:
        self.path = base / repository
        for name in ("index", "points", "snapshots", "disks", "journal"):
            with contextlib.suppress(OSError):
                (self.path / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    # -- the index ---------------------------------------------------------------------------

    def part(self, index: str) -> Part | None:
        """A parsed index file, or None."""
        with contextlib.suppress(OSError):
            return Part.load(self.path / "index" / index, index)
        return None

    def keep_part(self, index: str, part: Part) -> None:
        """Keep it."""
        with contextlib.suppress(OSError):
            part.save(self.path / "index" / index, index)

    def tidy(self, indexes: Iterable[str], points: Iterable[str]) -> None:
        """Forget what the repository no longer has."""
        kept_points = set(points)
        for folder, wanted in (("index", set(indexes)), ("points", kept_points), ("snapshots", kept_points)):
            for path in self._list(folder):
                if path.name not in wanted:
                    with contextlib.suppress(OSError):
                        path.unlink()
        left = _DISKS_KEPT
        for path in sorted(self._list("disks"), key=_modified, reverse=True):
            with contextlib.suppress(OSError):
                left -= path.stat().st_size
                if left < 0:
                    path.unlink()

    def _list(self, folder: str) -> list[Path]:
        try:
            return list((self.path / folder).iterdir())
        except OSError:
            return []

    # -- restore points ----------------------------------------------------------------------

    def manifest(self, point: str) -> bytes | None:
        """The manifest of a point, or None."""
        return self._proven(self.path / "points" / point, _MAX_MANIFEST)

    def keep_manifest(self, point: str, data: bytes) -> None:
        """Keep it."""
        self._write(self.path / "points" / point, data)

    def snapshot(self, name: str) -> bytes | None:
        """The document of a snapshot file, or None."""
        return self._proven(self.path / "snapshots" / name, _MAX_MANIFEST)

    def keep_snapshot(self, name: str, document: bytes) -> None:
        """Keep it."""
        self._write(self.path / "snapshots" / name, document)

    def disk(self, digest: str, *, size: int, chunk: int) -> tuple[HashList, ZeroMap] | None:
        """The chunk ids of the disk with that digest, and its known zeroes; or None."""
        data = self._proven(self.path / "disks" / digest, _MAX_DISK)
        count = -(-size // chunk) * ENTRY
        if data is None:
            return None
        try:
            hashes = HashList.decode(data[:count], size=size, block_size=chunk)
            if hashes.digest() != digest:
                return None
            return hashes, ZeroMap.decode(data[count:], size=size, chunk=chunk)
        except ValueError:
            return None

    def keep_disk(self, hashes: HashList, zeroes: ZeroMap) -> None:
        """Keep them."""
        self._write(self.path / "disks" / hashes.digest(), hashes.encode() + zeroes.encode())

    # -- damage ------------------------------------------------------------------------------

    def damage(self) -> tuple[frozenset[bytes], frozenset[str]]:
        """Ids of the packs, and names of the index files, that were found to be bad."""
        data = self._proven(self.path / "damage", _MAX_DAMAGE) or b'{"packs": [], "indexes": []}'
        try:
            found = json.loads(data)
            return frozenset(map(bytes.fromhex, found["packs"])), frozenset(map(str, found["indexes"]))
        except (ValueError, LookupError, TypeError, RecursionError):
            return frozenset(), frozenset()

    def keep_damage(self, packs: Iterable[bytes], indexes: Iterable[str]) -> None:
        """These, and no others, are bad: who writes shall not rely on them."""
        body = {"packs": sorted(pack.hex() for pack in packs), "indexes": sorted(indexes)}
        self._write(self.path / "damage", json.dumps(body).encode())

    # -- files that prove themselves ---------------------------------------------------------

    def _proven(self, path: Path, limit: int) -> bytes | None:
        with contextlib.suppress(OSError):
            data = files.read(path, limit=limit + ENTRY)
            if hashlib.sha256(data[ENTRY:]).digest() == data[:ENTRY]:
                with contextlib.suppress(OSError):
                    os.utime(path)
                return data[ENTRY:]
        return None

    def _write(self, path: Path, data: bytes) -> None:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):
            try:
                beside.write_bytes(hashlib.sha256(data).digest() + data)
                beside.rename(path)
            except OSError:
                beside.unlink(missing_ok=True)
                raise

    # -- the journal -------------------------------------------------------------------------

    def journal(self) -> Journal:
        """A new journal, for a backup that begins."""
        return Journal(self.path / "journal" / secrets.token_hex(8))

    @contextlib.contextmanager
    def left(self) -> Iterator[Iterator[tuple[bytes, tuple[Entry, ...]]]]:
        """The packs in the journals of killed backups, one by one. When the block is left well, the journals go."""
        with contextlib.ExitStack() as stack:
            paths = []
            for path in self._list("journal"):
                with contextlib.suppress(OSError):
                    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                    stack.callback(os.close, descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its backup still runs
                    paths.append(path)
            yield itertools.chain.from_iterable(map(_packs_in, paths))
            for path in paths:
                with contextlib.suppress(OSError):
                    path.unlink()


class Journal:
    """What a backup has uploaded and not yet put into an index: a context manager.

    A line is added after each pack; a killed backup's last line may be torn.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def add(self, pack: bytes, entries: Sequence[Entry]) -> None:
        """The pack is durable."""
        blobs = [[entry.id.hex(), int(entry.kind), entry.offset, entry.length, entry.raw_length] for entry in entries]
        text = json.dumps([pack.hex(), blobs])
        line = f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n".encode()
        # Uploads that were abandoned may come when we are closed, and the number of our descriptor is another file's.
        with self._lock, contextlib.suppress(OSError):
            if self._descriptor is not None:
                os.write(self._descriptor, line)

    def done(self) -> None:
        """All of it stands in an index: nobody need look here any more."""
        with contextlib.suppress(OSError):
            self._path.unlink()

    def close(self) -> None:
        """Let go of it; twice is fine."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _packs_in(path: Path) -> Iterator[tuple[bytes, tuple[Entry, ...]]]:
    """The packs in a journal, as far as it can be read."""
    with contextlib.suppress(OSError), files.opened(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        while line := file.readline(_MAX_LINE):
            yield from _packs(line)


def _packs(data: bytes) -> Iterator[tuple[bytes, tuple[Entry, ...]]]:
    """The whole lines of a journal."""
    for line in data.split(b"\n"):
        proof, _, text = line.partition(b" ")
        if hashlib.sha256(text).hexdigest()[:16].encode() != proof:
            continue
        try:
            pack, blobs = json.loads(text)
            entries = tuple(
                Entry(bytes.fromhex(id), Blob(kind), offset, length, raw) for id, kind, offset, length, raw in blobs
            )
            yield bytes.fromhex(pack), entries
        except (ValueError, TypeError):
            continue


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time() - _DAY
