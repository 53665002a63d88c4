"""`make bench`, third part: repositories in restic's format, against restic itself, interleaved.

The disk has --data of the files of this very machine (and a tenth of noise) with holes between them.

  whole       `pullback backup` of a running machine into a new repository, against `restic backup` of the
              same disk as a raw file into a new repository; both synced
  increment   `pullback backup` after --changed was scattered in pieces of 64 KiB: seconds, and the bytes
              stored against those of the chunks touched, compressed
  unchanged   `pullback backup --level full` of the unchanged disk, against nbdcopy of an equal export to nothing
  restore     `pullback restore` to raw, against `restic restore`, synced
  memory      the largest process of ours in each of these, and the processor time of each and of QEMU
  s3          a backup through a proxy to a local S3 server, with 50 ms before each answer and without

With --chunks: the table of chunk sizes, measured on the writer alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pullback import units
from pullback.programs import process
from pullback.repo.digest import HashList
from pullback.repo.restic import packer, pending, repository
from pullback.repo.restic.zeromap import ZeroMap
from pullback.repo.store.local import LocalStore
from run import Bench, Row

_PASSWORD = "bench"
_PLACES = ("/usr", "/opt", "/var/lib", "/root", "/home")
_SMALLEST = 4096


@dataclass
class Bytes:
    """What the increments stored, and what the chunks that they touched take."""

    stored: list[int] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)


@dataclass
class Repositories(Bench):
    """The same machine as in the first part, with real data."""

    memory: dict[str, int] = field(default_factory=dict)
    #: Seconds of processor time of each run: its own, and QEMU's meanwhile.
    cpu: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def raw(self) -> Path:
        """The disk as a raw file, as it was at the beginning."""
        return self.place / "disk.raw"

    def _fill(self) -> None:
        generator, written, offset = random.Random(self.seed), 0, 0
        with self.raw.open("wb") as file:
            file.truncate(self.size)
            for content in _contents(generator, self.data):
                file.seek(offset)
                file.write(content)
                written += len(content)
                offset += -(-len(content) // _SMALLEST) * _SMALLEST
                if generator.random() < 0.01 and offset + (self.data - written) * 1.2 < self.size - units.GiB:
                    offset += generator.randrange(1, 32) * units.MiB
        process.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.raw, self.image], timeout=3600)

    def environ(self) -> dict[str, str]:
        """Passwords and caches of both programs. Ours may find its bytecode, as when it is installed."""
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return inherited | {
            "RESTIC_PASSWORD": _PASSWORD,
            "RESTIC_CACHE_DIR": str(self.place / "cache"),
            "PULLBACK_STATE_DIR": str(self.place / "state"),
        }

    def run(self, name: str, argv: list[str], environ: dict[str, str] | None = None) -> tuple[float, str]:
        """A program from start to end, synced; gives seconds and its output.

        Its memory, and the processor time that it and QEMU took, are noted under `name`.
        """
        os.sync()
        begun, machine = time.monotonic(), self._machine_cpu()
        with tempfile.TemporaryFile() as output:
            child = subprocess.Popen(argv, stdout=output, stderr=subprocess.PIPE, env=self.environ() | (environ or {}))
            assert child.stderr is not None
            peak = _Peak(child.pid)
            peak.start()
            complaint = child.stderr.read().decode()
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            text = output.read().decode()
        os.sync()
        seconds = time.monotonic() - begun
        if child.returncode not in (0, 3):
            raise SystemExit(f"{' '.join(argv)} failed:\n{complaint}")
        self.memory[name] = max(self.memory.get(name, 0), peak.kib)
        self.cpu.setdefault(name, []).append((used.ru_utime + used.ru_stime, self._machine_cpu() - machine))
        return seconds, text

    def _machine_cpu(self) -> float:
        """Seconds of processor time that QEMU took so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ours(self, name: str, *words: str, environ: dict[str, str] | None = None) -> tuple[float, dict[str, object]]:
        """Our program; gives seconds and its result."""
        seconds, text = self.run(name, [sys.executable, "-m", "pullback.cli.main", *words, "--json"], environ)
        result: dict[str, object] = json.loads(text.strip().splitlines()[-1])
        return seconds, result

    def new(self, name: str) -> str:
        """An empty repository."""
        path = self.place / name
        shutil.rmtree(path, ignore_errors=True)
        subprocess.run(["restic", "init", "-q", "-r", str(path)], check=True, env=self.environ())
        return str(path)

    @property
    def target(self) -> str:
        """The machine, as our commands name it."""
        return f"qmp:{self.place / 'qmp.sock'}"


class _Peak(threading.Thread):
    """Watches a program's memory. (What wait4 tells of it includes ours, from before it was another program.)"""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self.kib = 0

    def run(self) -> None:
        with contextlib.suppress(OSError, StopIteration):
            while True:
                line = next(line for line in self._status.read_text().splitlines() if line.startswith("VmHWM:"))
                self.kib = int(line.split()[1])
                time.sleep(0.05)


def _contents(generator: random.Random, total: int) -> Iterator[bytes]:
    """Files of this machine in random order, and noise: a tenth, and what the files lack."""
    left = total
    for path in _files(generator):
        if left <= total // 10:
            break
        try:
            content = path.read_bytes()[: left - total // 10]
        except OSError:
            continue
        left -= len(content)
        yield content
    while left > 0:
        piece = min(left, 8 * units.MiB)
        left -= piece
        yield generator.randbytes(piece)


def _files(generator: random.Random) -> list[Path]:
    found = []
    for place in _PLACES:
        for directory, _, names in os.walk(place):
            found += [os.path.join(directory, name) for name in names]
    generator.shuffle(found)
    return [path for path in map(Path, found) if not path.is_symlink() and path.is_file() and _large(path)]


def _large(path: Path) -> bool:
    try:
        return path.stat().st_size >= _SMALLEST
    except OSError:
        return False


# -- the rows --------------------------------------------------------------------------------


def whole(bench: Repositories) -> Row:
    """Whole backups into new repositories, in turn."""
    ours, other = [], []
    for number in range(bench.rounds):
        mine = bench.new("ours")
        ours.append(bench.ours("whole", "backup", bench.target, "-r", mine, "--level", "full")[0])
        theirs = bench.new("theirs")
        other.append(bench.run("restic backup", ["restic", "backup", "-q", "-r", theirs, str(bench.raw)])[0])
        print(f"  round {number}: pullback {ours[-1]:.2f} s, restic {other[-1]:.2f} s", file=sys.stderr)
    sizes = _size(bench.place / "ours"), _size(bench.place / "theirs")
    print(f"  stored: {sizes[0]} MiB, restic {sizes[1]} MiB, ratio {sizes[0] / sizes[1]:.3f}", file=sys.stderr)
    return Row("whole", ours, other, "restic backup")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) // units.MiB


def increment(bench: Repositories) -> tuple[Row, Bytes]:
    """Increments after scattered changes."""
    seconds, counted = [], Bytes()
    for _ in range(bench.rounds):
        before = _bytes(bench.place / "ours")
        bench.change()
        took, result = bench.ours("increment", "backup", bench.target, "-r", str(bench.place / "ours"))
        seconds.append(took)
        counted.stored.append(_bytes(bench.place / "ours") - before)
        point = result["point"]
        assert isinstance(point, dict)
        counted.touched.append(sum(disk["stored"] for disk in point["disks"]))
    return Row("increment", seconds), counted


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def unchanged(bench: Repositories) -> Row:
    """A whole read in which nothing is new, and nbdcopy of the same export to nothing, in turn."""
    ours, other = [], []
    for _ in range(bench.rounds):
        repository = str(bench.place / "ours")
        ours.append(bench.ours("unchanged", "backup", bench.target, "-r", repository, "--level", "full")[0])
        other.append(asyncio.run(_to_nothing(bench)))
    return Row("unchanged", ours, other, "nbdcopy to null:")


async def _to_nothing(bench: Repositories) -> float:
    async with bench._frozen() as source:
        begun = time.monotonic()
        await asyncio.to_thread(process.run, [process.find("nbdcopy"), source.uri, "null:"], timeout=3600)
        return time.monotonic() - begun


def restore(bench: Repositories) -> Row:
    """Restores of the same disk by both programs, in turn."""
    ours, other = [], []
    for _ in range(bench.rounds):
        out = bench.place / "out"
        mine = ["restore", "-r", str(bench.place / "ours"), "--to", str(out)]
        ours.append(bench.ours("restore", *mine)[0])
        shutil.rmtree(out)
        theirs = ["restic", "restore", "-q", "latest", "-r", str(bench.place / "theirs"), "--target", str(out)]
        other.append(bench.run("restic restore", theirs)[0])
        shutil.rmtree(out)
    return Row("restore", ours, other, "restic restore")


def s3(bench: Repositories) -> Row:
    """A whole backup to a local S3 server, with 50 ms before each answer and without, in turn."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import proxy
    import seaweed

    slow: list[float] = []
    quick: list[float] = []
    with ExitStack() as stack:
        server = stack.enter_context(seaweed.running())
        between = stack.enter_context(proxy.before(server.port))
        for number in range(bench.rounds):
            for delay, into in ((0.0, quick), (0.05, slow)):
                fault = proxy.Fault(seconds=delay)
                between.rule = partial(_always, fault)
                bucket = f"bench-{number}-{int(delay * 1000)}"
                server.make_bucket(bucket)
                url = server.place(bucket, port=between.port).url
                bench.run("init", ["restic", "init", "-q", "-r", url], server.environ)
                took, _ = bench.ours("s3", "backup", bench.target, "-r", url, "--level", "full", environ=server.environ)
                into.append(took)
    return Row("s3 +50 ms", slow, quick, "s3 without")


def _always(fault: Any, request: object) -> Any:
    return fault


# -- chunk sizes -----------------------------------------------------------------------------


def chunks(bench: Repositories) -> list[str]:
    """For several chunk sizes: the writer's speed, what is stored, and what a scattered increment stores."""
    lines = [
        "| chunk | whole, s | increment, s | whole stored, MiB | increment stored, MiB | index, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for size in (256 * units.KiB, 512 * units.KiB, units.MiB, 2 * units.MiB, 4 * units.MiB):
        lines.append(_chunk_row(bench, size))
    return lines


def _chunk_row(bench: Repositories, chunk: int) -> str:
    path = bench.place / "chunks"
    shutil.rmtree(path, ignore_errors=True)
    with repository.create_repository(LocalStore.create(path), _PASSWORD, caches=bench.place / "chunk-cache") as made:
        first = _timed(lambda: _write(bench, made, chunk, range(0, bench.size, chunk)))
        stored, trees = _bytes(path), _overhead(path)
        generator = random.Random(1)
        touched = sorted(
            {generator.randrange(bench.size // units.KiB // 64) * 64 * units.KiB // chunk for _ in range(256)}
        )
        second = _timed(lambda: _write(bench, made, chunk, [index * chunk for index in touched], flip=True))
        more = _bytes(path) - stored
    cells = [f"{chunk // units.KiB} KiB", f"{first:.1f}", f"{second:.1f}"]
    return f"| {' | '.join(cells + [f'{size / units.MiB:.1f}' for size in (stored, more, trees)])} |"


def _overhead(path: Path) -> int:
    return sum(file.stat().st_size for file in (path / "index").rglob("*") if file.is_file())


def _write(
    bench: Repositories, made: repository.Repository, chunk: int, offsets: Iterable[int], *, flip: bool = False
) -> None:
    """Chunks of the raw disk through the writer, in four threads as in a backup; `flip` makes each a new one."""
    store = packer.Packer(made.store, made.key, made.index, made.cache, compress=True)
    with store, bench.raw.open("rb") as raw:
        disk = pending.PendingDisk(store, HashList(bench.size, chunk), ZeroMap(bench.size, chunk), None)

        def one(offset: int) -> None:
            content = bytearray(os.pread(raw.fileno(), min(chunk, bench.size - offset), offset))
            content[0] ^= flip
            disk.observe(offset, content, len(content))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, offsets))
        store.finish()
    os.sync()


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
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the data")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: a temporary directory)")
    parser.add_argument("--chunks", action="store_true", help="the table of chunk sizes, and nothing else")
    parser.add_argument("--only", default="", help="rows, by their names, with commas between them")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pb-bench-", dir=words.dir) as place:
        bench = Repositories(Path(place), words.size, words.data, words.changed, words.rounds, words.seed)
        if words.chunks:
            bench._fill()
            print("\n".join(chunks(bench)))
            return
        with bench.machine():
            _rows(bench, set(filter(None, words.only.split(","))))


def _rows(bench: Repositories, only: set[str]) -> None:
    lines = []
    wanted = only or {"increment", "unchanged", "restore", "s3"}
    lines.append(str(whole(bench)))
    if "increment" in wanted:
        row, counted = increment(bench)
        lines.append(str(row))
        ratios = [a / b for a, b in zip(counted.stored, counted.touched, strict=True)]
        lines.append(f"{'':<10} stored in all against the chunks and trees of the disk: {max(ratios):.3f} at most")
    lines += [
        str(row(bench)) for name, row in (("unchanged", unchanged), ("restore", restore), ("s3", s3)) if name in wanted
    ]
    print("\n".join(lines))
    for name, taken in bench.cpu.items():
        own, machine = (statistics.median(column) for column in zip(*taken, strict=True))
        print(f"processor  {name}: {own:.1f} s, and QEMU {machine:.1f} s")
    peaks = ", ".join(f"{name} {peak / 1024:.0f}" for name, peak in bench.memory.items())
    print(f"memory     peak of the largest process, MiB: {peaks}")


if __name__ == "__main__":
    main()
