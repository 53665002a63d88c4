"""`make bench`: Pullback against nbdcopy, in one run, on the same data, interleaved.

Absolute times on a shared machine are noise; what counts are the ratios, pair by pair, and their
median. Rows:

  whole      `pullback backup --level full` as a program, start to end, of a disk with --data of data,
             against `nbdcopy --flush` from an equal frozen export to a new qcow2 through qemu-nbd,
             both ending with everything synced
  increment  `pullback backup` of --changed scattered over the disk: seconds, start included
  unchanged  the same with nothing changed
  restore    `pullback restore` to raw, against `qemu-img convert` of the same image, synced
  pause      how long the machine stood still, as it was reported by every backup above
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pullback import state, units
from pullback.engine import qemu as engine
from pullback.flows import planning
from pullback.model.backups import DiskRequest, SnapshotRequest
from pullback.model.exports import NbdAddress
from pullback.programs import process, qemu, qemu_img, qemu_nbd

_CHUNK = units.MiB
_SOCKET = "qmp.sock"


@dataclass
class Bench:
    """One run of the benchmark: where it works, and what was measured."""

    place: Path
    size: int
    data: int
    changed: int
    rounds: int
    seed: int
    pauses: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    #: QEMU's process.
    pid: int = 0

    @property
    def image(self) -> Path:
        """The machine's disk."""
        return self.place / "disk.qcow2"

    @property
    def hmp(self) -> Path:
        """The monitor that injects writes."""
        return self.place / "hmp.sock"

    @contextmanager
    def machine(self) -> Iterator[None]:
        """A machine whose CPU idles, on a disk with `data` bytes of data."""
        self._fill()
        disk = qemu.Disk(id="vda", path=self.image)
        machine = qemu.Machine(name="bench", idle=True, disks=[disk], qmp=[self.place / _SOCKET], hmp=self.hmp)
        with qemu.start(machine) as process:
            self.pid = process.pid
            yield

    def _fill(self) -> None:
        """Half random, half text-like, in runs of 1 to 16 MiB with holes between them."""
        raw = self.place / "disk.raw"
        generator = random.Random(self.seed)
        text = (b"the quick brown fox jumps over the lazy dog %d\n" * 32768)[:_CHUNK]
        with raw.open("wb") as file:
            file.truncate(self.size)
            offset = written = 0
            while written < self.data:
                run = min(generator.randint(1, 16) * _CHUNK, self.data - written)
                file.seek(offset)
                for _ in range(run // _CHUNK):
                    file.write(generator.randbytes(_CHUNK) if generator.random() < 0.5 else text)
                written += run
                offset += run + generator.randint(0, 2) * (self.size - self.data) * run // self.data // 2
        process.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, self.image], timeout=3600)
        raw.unlink()

    def change(self) -> None:
        """Scattered writes of 64 KiB, `changed` bytes in all."""
        generator = random.Random(self.seed + time.monotonic_ns())
        for _ in range(self.changed // (64 * units.KiB)):
            offset = generator.randrange(self.size // (64 * units.KiB)) * 64 * units.KiB
            write = f"write -q -P {generator.randint(1, 255)} {offset} 64k"
            qemu.hmp(self.hmp, f'qemu-io -d /machine/peripheral/vda/virtio-backend "{write}"')

    def backup(self, repository: Path, *words: str) -> float:
        """Our program, start to end; gives its seconds."""
        argv = [sys.executable, "-m", "pullback.cli.main", "backup", f"qmp:{self.place / _SOCKET}"]
        argv += ["-r", f"dir:{repository}", "--json", "--state-dir", str(self.place / "state"), *words]
        begun = time.monotonic()
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=3600)
        seconds = time.monotonic() - begun
        if done.returncode not in (0, 3):
            raise SystemExit(f"backup failed:\n{done.stderr}")
        self.pauses.append(json.loads(done.stdout.strip().splitlines()[-1])["pause_seconds"])
        self.peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
        return seconds

    def nbdcopy(self) -> float:
        """nbdcopy from an equal frozen export of the same machine to a new qcow2, synced."""
        return asyncio.run(self._nbdcopy())

    async def _nbdcopy(self) -> float:
        target = self.place / "nbdcopy.qcow2"
        target.unlink(missing_ok=True)
        async with self._frozen() as source:
            begun = time.monotonic()
            qemu_img.create(target, self.size)
            with qemu_nbd.serve(target, "qcow2", socket=self.place / "nbd" / "out.sock", writable=True) as address:
                argv = [process.find("nbdcopy"), "--flush", source.uri, address.uri]
                await asyncio.to_thread(process.run, argv, timeout=3600)
            state.sync_file(target)
            return time.monotonic() - begun

    @asynccontextmanager
    async def _frozen(self) -> AsyncIterator[NbdAddress]:
        directories = state.directories(self.place / "state")
        async with engine.connect(self.place / _SOCKET, directories, command="bench") as machine:
            chosen = planning.select(await machine.disks(), machine=machine.name, only=(), exclude=())
            request = SnapshotRequest(
                job=secrets.token_hex(4),
                disks=tuple(DiskRequest(disk=disk) for disk in chosen),
                scratch=directories.scratch,
            )
            async with machine.snapshot(request) as snapshot:
                address = snapshot.disks[0].export.data
                assert isinstance(address, NbdAddress)
                yield address


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    ours: list[float]
    other: list[float] = field(default_factory=list)
    peer: str = ""

    def __str__(self) -> str:
        ours = f"{statistics.median(self.ours):7.2f} s"
        if not self.other:
            return f"{self.name:<10} {ours}"
        ratios = [a / b for a, b in zip(self.ours, self.other, strict=True)]
        return (
            f"{self.name:<10} {ours}   {self.peer} {statistics.median(self.other):7.2f} s   "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
        )


def whole(bench: Bench) -> Row:
    """Full backups and nbdcopy in turn."""
    ours, other = [], []
    for number in range(bench.rounds + 1):
        repository = bench.place / "whole"
        shutil.rmtree(repository, ignore_errors=True)
        os.sync()
        ours.append(bench.backup(repository, "--level", "full"))
        os.sync()
        other.append(bench.nbdcopy())
        print(f"  round {number}: pullback {ours[-1]:.2f} s, nbdcopy {other[-1]:.2f} s", file=sys.stderr)
    (bench.place / "nbdcopy.qcow2").unlink()
    return Row("whole", ours[1:], other[1:], "nbdcopy --flush")  # the first pair warms up


def increments(bench: Bench) -> tuple[Row, Row]:
    """Increments on the chain that `whole` left."""
    repository, changed, unchanged = bench.place / "whole", [], []
    for _ in range(bench.rounds):
        bench.change()
        changed.append(bench.backup(repository))
        unchanged.append(bench.backup(repository))
    return Row("increment", changed), Row("unchanged", unchanged)


def restore(bench: Bench) -> Row:
    """Restore to raw, and qemu-img convert of the same chain to raw, synced."""
    out, ours, other = bench.place / "out", [], []
    point = sorted((bench.place / "whole" / "bench").glob("2*"))[-1]
    for _ in range(bench.rounds):
        ours.append(_timed(lambda: _restore(bench, out)))
        shutil.rmtree(out)
        other.append(_timed(lambda: _convert(point / "vda.qcow2", bench.place / "convert.raw")))
        (bench.place / "convert.raw").unlink()
    return Row("restore", ours, other, "qemu-img convert")


def _restore(bench: Bench, out: Path) -> None:
    argv = [
        sys.executable,
        "-m",
        "pullback.cli.main",
        "restore",
        "-r",
        f"dir:{bench.place / 'whole'}",
        "--to",
        str(out),
    ]
    subprocess.run(argv, check=True, capture_output=True, timeout=3600)


def _convert(source: Path, target: Path) -> None:
    process.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", source, target], timeout=3600)
    state.sync_file(target)


def _timed(work: Callable[[], None]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=units.parse_size, default="8G", help="the disk (default 8G)")
    parser.add_argument("--data", type=units.parse_size, default="4G", help="data on it (default 4G)")
    parser.add_argument(
        "--changed", type=units.parse_size, default="16M", help="changed for an increment (default 16M)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--seed", type=int, default=1, help="of the data")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: a temporary directory)")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pb-bench-", dir=words.dir) as place:
        bench = Bench(Path(place), words.size, words.data, words.changed, words.rounds, words.seed)
        print(
            f"making a disk of {units.format_size(bench.size)} with {units.format_size(bench.data)} …", file=sys.stderr
        )
        with bench.machine():
            rows = [whole(bench), *increments(bench), restore(bench)]
    for row in rows:
        print(row)
    print(f"{'pause':<10} {statistics.median(bench.pauses) * 1000:7.1f} ms  (max {max(bench.pauses) * 1000:.1f} ms)")
    print(f"{'memory':<10} {max(bench.peaks) / 1024:7.0f} MiB peak of the largest process")


if __name__ == "__main__":
    main()
