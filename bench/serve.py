"""`make bench`, fourth part: a served restore point, against the same disk as a raw file in nbdkit, interleaved.

The disk is that of the third part: --data of the files of this very machine, a tenth of noise, holes between
them (with --simple that of the first: half noise, half one text). The repository is in restic's format (with
--dir-repository: `dir:`), on a local disk.

  serve       nbdcopy of a served disk to nothing, against nbdcopy of the raw file through nbdkit's file plugin;
              both with all files in the page cache, the server started anew for each
  cold        the same with no file in the page cache
  one         the same as "serve" through one connection
  random      a thousand reads of 4 KiB of data, one after another, of a new server, its files out of the
              page cache; against the raw file through nbdkit, out of the page cache too
  memory      the largest that the server became
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pullback import state, units
from pullback.extents import Extent, data
from pullback.flows import backup, serving
from pullback.flows.repositories import Access
from pullback.model import urls
from pullback.model.exports import NbdUri
from pullback.programs import process
from pullback.progress import Cancel
from pullback.repo import create_repository
from pullback.repo.store.local import LocalStore
from pullback.transfer import NbdEndpoint
from restic import Repositories
from run import Bench, Row

_PASSWORD = "bench"
_READS = 1000
_LENGTH = 4096


@dataclass
class Serving(Repositories):
    """The disk as a raw file, and in a repository."""

    kind: str = "restic"
    simple: bool = False
    peaks: list[int] = field(default_factory=list)

    @property
    def repository(self) -> urls.Repository:
        """Where its restore point is."""
        if self.kind == "dir":
            return urls.DirectoryRepository(path=self.place / "repo")
        return urls.ResticRepository(location=urls.LocalPlace(path=self.place / "repo"))

    @property
    def access(self) -> Access:
        """What opens it."""
        return Access(environ={"RESTIC_PASSWORD": _PASSWORD}, cache=self.place / "cache")

    @property
    def directories(self) -> state.Directories:
        """Pullback's own."""
        return state.directories(self.place / "state")

    async def prepare(self) -> None:
        """Make the disk, and a restore point of it."""
        if self.simple:
            Bench._fill(self)
            process.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.image, self.raw], timeout=3600)
        else:
            self._fill()
        if self.kind == "restic":
            store = LocalStore.create(self.place / "repo")
            create_repository(store, _PASSWORD, caches=self.access.caches).close()
        image = urls.Image(target="vda", path=self.image, format="qcow2")
        request = backup.Request(
            machine=urls.ImagesMachine(images=(image,)),
            repository=self.repository,
            access=self.access,
            directories=self.directories,
            name="bench",
        )
        await backup.backup(request)
        self.image.unlink()

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """The restore point, served; gives the disk's URI."""
        request = serving.Request(repository=self.repository, access=self.access, directories=self.directories)
        async with serving.serving(request, told=lambda trouble: print(trouble.message, file=sys.stderr)) as served:
            yield served.disks[0].uri
            self.peaks.append(sum(_peak(pid) for pid in served.pids))

    @asynccontextmanager
    async def raw_served(self) -> AsyncIterator[str]:
        """The raw file, served by nbdkit."""
        socket = self.place / "raw.sock"
        socket.unlink(missing_ok=True)
        argv: list[str | Path] = ["nbdkit", "-f", "-r", "-U", socket, "file", self.raw]
        with process.Child(argv) as child:
            child.wait_until(socket.exists, what="socket", timeout=30)
            yield f"nbd+unix:///?socket={socket}"

    def warm(self) -> None:
        """All files in the page cache."""
        for path in self.files():
            with path.open("rb") as file:
                while file.read(units.MiB):
                    pass

    def cold(self) -> None:
        """None in the page cache."""
        os.sync()
        for path in self.files():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def files(self) -> Iterator[Path]:
        """The raw file and the repository's."""
        yield self.raw
        yield from (path for path in sorted((self.place / "repo").rglob("*")) if path.is_file())


def _peak(pid: int) -> int:
    """VmHWM of a process, KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _copy(uri: str, words: Sequence[str]) -> float:
    begun = time.monotonic()
    subprocess.run([process.find("nbdcopy"), *words, uri, "null:"], check=True, timeout=3600)
    return time.monotonic() - begun


async def sequential(bench: Serving, name: str, *words: str, cold: bool = False) -> Row:
    """Copies to nothing, in turn."""
    ours, other = [], []
    prepare = bench.cold if cold else bench.warm
    for number in range(bench.rounds):
        async with bench.served() as uri:
            prepare()
            ours.append(await asyncio.to_thread(_copy, uri, words))
        async with bench.raw_served() as uri:
            prepare()
            other.append(await asyncio.to_thread(_copy, uri, words))
        print(f"  {name} {number}: served {ours[-1]:.2f} s, raw {other[-1]:.2f} s", file=sys.stderr)
    return Row(name, ours, other, "nbdkit file")


@contextmanager
def _endpoint(uri: str) -> Iterator[NbdEndpoint]:
    with NbdEndpoint(NbdUri(uri=uri), cancel=Cancel(), name="bench") as endpoint:
        yield endpoint


def _random(bench: Serving, uri: str) -> float:
    generator = random.Random(bench.seed)
    with _endpoint(uri) as endpoint, endpoint.channel() as channel:
        blocks = [
            at
            for found in data(endpoint.extents(Extent(0, endpoint.size)))
            for at in range(found.start, found.end, _LENGTH)
        ]
        places, buffer = generator.sample(blocks, _READS), bytearray(_LENGTH)
        begun = time.monotonic()
        for place in places:
            channel.read_into(place, buffer, _LENGTH)
        return time.monotonic() - begun


async def scattered(bench: Serving) -> Row:
    """Small reads with nothing in any cache, in turn."""
    ours, other = [], []
    for number in range(bench.rounds):
        async with bench.served() as uri:
            bench.cold()
            ours.append(await asyncio.to_thread(_random, bench, uri))
        async with bench.raw_served() as uri:
            bench.cold()
            other.append(await asyncio.to_thread(_random, bench, uri))
        print(f"  random {number}: served {ours[-1]:.2f} s, raw {other[-1]:.2f} s", file=sys.stderr)
    return Row("random", ours, other, "nbdkit file")


async def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=units.parse_size, default="8G", help="the disk (default 8G)")
    parser.add_argument("--data", type=units.parse_size, default="4G", help="data on it (default 4G)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the data")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: a temporary directory)")
    parser.add_argument("--dir-repository", action="store_true", help="a `dir:` repository instead of restic's format")
    parser.add_argument("--simple", action="store_true", help="the disk of the first part")
    parser.add_argument("--only", default="", help="rows, by their names, with commas between them")
    words = parser.parse_args()
    wanted = set(filter(None, words.only.split(","))) or {"serve", "cold", "one", "random"}
    with tempfile.TemporaryDirectory(prefix="pb-bench-", dir=words.dir) as place:
        bench = Serving(Path(place), words.size, words.data, 0, words.rounds, words.seed)
        bench.kind, bench.simple = "dir" if words.dir_repository else "restic", words.simple
        await bench.prepare()
        if "serve" in wanted:
            print(await sequential(bench, "serve"))
        if "cold" in wanted:
            print(await sequential(bench, "cold", cold=True))
        if "one" in wanted:
            print(await sequential(bench, "one", "--connections=1"))
        if "random" in wanted:
            print(await scattered(bench))
        print(f"memory     the server at most, MiB: {max(bench.peaks) / 1024:.0f}")


if __name__ == "__main__":
    asyncio.run(main())
