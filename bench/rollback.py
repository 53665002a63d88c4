"""`make bench`, fourth part: rolling a disk back in place, against restoring all of it, interleaved.

The disk is that of bench/restic.py. Before each rollback --changed of it is overwritten through QEMU in pieces of
--piece at random places.

  rollback    `pullback rollback --no-safety` of the running machine, from start to end, synced, against `pullback
              restore` of the same restore point to a new qcow2, synced; and the bytes written against those of the
              chunks that were changed
  safe        the same with a restore point made before it, in the repository's format
  whole       the same without bitmaps (`pullback untrack` before): the disk is read and compared
  down        how long the machine's disks were out of its reach
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from pullback import units
from pullback.programs import qemu
from restic import Repositories
from run import Row

_CHUNK = units.MiB
_MOST_WRITTEN, _MOST_TIME = 1.2, 0.1


@dataclass
class Rollbacks(Repositories):
    """The same machine, changed and rolled back again and again."""

    piece: int = units.MiB
    point: str = ""
    down: dict[str, list[float]] = field(default_factory=dict)
    #: Bytes written, and bytes of the chunks that were changed.
    written: list[tuple[int, int]] = field(default_factory=list)

    @property
    def repository(self) -> str:
        """Where the restore point is."""
        return str(self.place / "ours")

    def _fill(self) -> None:
        super()._fill()
        self.raw.unlink()

    def scatter(self) -> int:
        """Overwrite pieces of the disk; gives the bytes of the chunks in which they lie."""
        generator = random.Random(self.seed + time.monotonic_ns())
        touched: set[int] = set()
        noise = self.place / "noise"
        for _ in range(self.changed // self.piece):
            offset = generator.randrange((self.size - self.piece) // (64 * units.KiB)) * 64 * units.KiB
            noise.write_bytes(generator.randbytes(self.piece))
            write = f"write -q -s {noise} {offset} {self.piece}"
            qemu.hmp(self.hmp, f'qemu-io -d /machine/peripheral/vda/virtio-backend "{write}"', timeout=60)
            touched |= set(range(offset // _CHUNK, -(-(offset + self.piece) // _CHUNK)))
        return len(touched) * _CHUNK

    def roll_back(self, name: str, *words: str) -> float:
        """Change the disk, and undo that; gives the seconds."""
        touched = self.scatter()
        if name == "whole":
            self.ours("untrack", "untrack", self.target)
        seconds, result = self.ours(name, "rollback", self.target, self.point, "-r", self.repository, *words)
        disks = result["disks"]
        assert isinstance(disks, list)
        self.down.setdefault(name, []).append(float(str(result["down_seconds"])))
        self.written.append((sum(disk["written"] + disk["zeroed"] for disk in disks), touched))
        return seconds

    def restore(self) -> float:
        """Restore all of it to a new image."""
        out = self.place / "out"
        words = ["restore", self.point, "-r", self.repository, "--to", str(out), "--format", "qcow2"]
        seconds, _ = self.ours("restore", *words)
        shutil.rmtree(out)
        return seconds


def rows(bench: Rollbacks) -> list[Row]:
    """All of them; each rollback is followed by a whole restore."""
    repository = bench.new("ours")
    _, made = bench.ours("backup", "backup", bench.target, "-r", repository)
    point = made["point"]
    assert isinstance(point, dict)
    bench.point = str(point["id"])
    found = []
    for name, words in (("rollback", ["--no-safety"]), ("safe", []), ("whole", ["--no-safety"])):
        ours, other = [], []
        for number in range(bench.rounds):
            ours.append(bench.roll_back(name, *words))
            other.append(bench.restore())
            print(f"  {name} {number}: {ours[-1]:.2f} s, restore {other[-1]:.2f} s", file=sys.stderr)
        found.append(Row(name, ours, other, "whole restore"))
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=units.parse_size, default="12G", help="the disk (default 12G)")
    parser.add_argument("--data", type=units.parse_size, default="8G", help="data on it (default 8G)")
    parser.add_argument("--changed", type=units.parse_size, default="64M", help="changed each time (default 64M)")
    parser.add_argument("--piece", type=units.parse_size, default="4M", help="of so many bytes each (default 4M)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the data")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: a temporary directory)")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pb-bench-", dir=words.dir) as place:
        bench = Rollbacks(
            Path(place), words.size, words.data, words.changed, words.rounds, words.seed, piece=words.piece
        )
        with bench.machine():
            found = rows(bench)
    for row in found:
        print(row)
    downs = ", ".join(f"{name} {statistics.median(seconds):.2f} s" for name, seconds in bench.down.items())
    print(f"down       {downs}")
    ratio = max(written / touched for written, touched in bench.written)
    print(f"written    {ratio:.3f} of the chunks changed, at most (wanted: {_MOST_WRITTEN})")
    times = [a / b for a, b in zip(found[0].ours, found[0].other, strict=True)]
    print(f"time       {statistics.median(times):.3f} of a whole restore (wanted: {_MOST_TIME})")
    peaks = ", ".join(f"{name} {peak / 1024:.0f}" for name, peak in bench.memory.items())
    print(f"memory     peak of the largest process, MiB: {peaks}")


if __name__ == "__main__":
    main()
