"""Repositories of either kind with a restore point of given disks, for tests of what is done with it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import run_cli
from pullback import repo, state
from pullback.flows import backup as backup_flow
from pullback.flows import destinations
from pullback.flows import restore as flow
from pullback.flows.repositories import Access
from pullback.model import urls
from pullback.repo.restic import keys
from pullback.units import KiB, MiB

#: What is on a device before.
JUNK = 0xA5


@contextlib.contextmanager
def loop_device(image: Path, size: int) -> Iterator[Path]:
    """A block device full of junk; its image."""
    image.write_bytes(bytes([JUNK]) * size)
    done = subprocess.run(["losetup", "-f", "--show", image], check=True, capture_output=True, text=True, timeout=20)
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True, timeout=20)


def content_of(size: int, seed: int) -> bytes:
    """Data, equal chunks, holes of all sizes, and a last chunk that is short."""
    chance = random.Random(seed)
    data = bytearray(chance.randbytes(size))
    data[MiB : 2 * MiB] = data[:MiB]
    data[64 * KiB : 128 * KiB] = bytes(64 * KiB)
    data[300_000:300_100] = bytes(100)
    if size > 4 * MiB:
        data[2 * MiB : 3 * MiB] = bytes(MiB)
        data[3 * MiB : 4 * MiB] = b"compressible " * (MiB // 13) + bytes(MiB % 13)
    return bytes(data)


@dataclass(frozen=True)
class Stored:
    """A repository with one restore point."""

    directory: Path
    place: urls.Repository
    access: Access
    content: dict[str, bytes]

    def restore(self, to: Any, **options: Any) -> flow.Report:
        """In this process."""
        request = flow.Request(repository=self.place, access=self.access, to=to, **options)
        return asyncio.run(flow.restore(request))

    def one(self, place: str, **options: Any) -> flow.Restored:
        """Disk vda to a place."""
        [done] = self.restore({"vda": destinations.parse(place)}, **options).disks
        return done

    def cli(self, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """`pullback restore …` as a program."""
        return run_cli("restore", "-r", self.place.url, *words, state=self.directory / "state", **options)


def store(directory: Path, kind: str, content: dict[str, bytes]) -> Stored:
    """Back the disks up into a new repository."""
    access = Access(
        environ={"PULLBACK_CACHE_DIR": str(directory / "cache"), "RESTIC_PASSWORD": "secret"},
    )
    path = directory / "repo"
    place = urls.repository(f"dir:{path}" if kind == "dir" else str(path))
    if isinstance(place, urls.ResticRepository):
        with repo.create_store(place.location, environ=access.environ) as made:
            repo.create_repository(made, "secret", caches=access.caches, cost=keys.Cost(1024, 8, 1)).close()
    for target, data in content.items():
        (directory / f"{target}.img").write_bytes(data)
    images = ",".join(f"{target}=raw:{directory / target}.img" for target in content)
    request = backup_flow.Request(
        machine=urls.machine(f"images:{images}"),
        repository=place,
        access=access,
        name="web01",
        directories=state.directories(directory / "state"),
    )
    asyncio.run(backup_flow.backup(request))
    return Stored(directory, place, access, content)
