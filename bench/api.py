"""`make bench`, second part: the API's own times, on a machine with two disks whose CPU idles.

  transaction   QMP's `transaction` of a pull with a checkpoint on both disks, in QEMU
  begin         `backup_begin` of that, in a program that holds the machine (connection included)
  job begin     `pullback job begin`, a process from start to end
  checkpoints   writes to a disk with 100 checkpoints against an equal one with one, in turns (ratio)

The last is measured with `qemu-img bench -w` through exports of a storage daemon: a guest's write takes the
same path below its device, and a processor that is emulated would hide the difference.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pullback import sync, units
from pullback.engine.monitor import Monitor
from pullback.programs import process, qemu, qemu_img

_BACKUP = "<domainbackup mode='pull'/>"
_CHECKPOINT = "<domaincheckpoint/>"
_WRITES, _WRITE = 20000, 64 * units.KiB


class Machine:
    """A machine with two disks, and the ways to begin a job on it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.disks = [qemu.Disk(id=name, path=place / f"{name}.qcow2") for name in ("vda", "vdb")]
        for disk in self.disks:
            qemu_img.create(disk.path, 16 * units.GiB)
        self.socket = place / "qmp.sock"

    @property
    def state(self) -> Path:
        """Pullback's own files."""
        return self.place / "state"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While the block runs."""
        with qemu.start(qemu.Machine(name="bench", idle=True, disks=self.disks, qmp=[self.socket])):
            yield

    def begin(self) -> float:
        """Seconds of a connection with `backup_begin`."""
        begun = time.monotonic()
        with sync.connect(f"qmp:{self.socket}", state_dir=self.state) as machine:
            machine.backup_begin(_BACKUP, _CHECKPOINT)
        return time.monotonic() - begun

    def job_begin(self) -> float:
        """Seconds of the command."""
        for name, text in (("b.xml", _BACKUP), ("c.xml", _CHECKPOINT)):
            (self.place / name).write_text(text)
        words = ["job", "begin", f"qmp:{self.socket}", self.place / "b.xml", self.place / "c.xml"]
        argv = [sys.executable, "-m", "pullback.cli.main", *words, "--state-dir", self.state]
        begun = time.monotonic()
        subprocess.run([str(word) for word in argv], check=True, capture_output=True, timeout=60)
        return time.monotonic() - begun

    def end(self) -> None:
        """End the job, and forget its checkpoint."""
        with sync.connect(f"qmp:{self.socket}", state_dir=self.state) as machine:
            ended = machine.backup_end()
            machine.checkpoint_delete(str(ended.checkpoint))


@contextlib.contextmanager
def transactions() -> Iterator[list[float]]:
    """Seconds of each QMP transaction with a checkpoint in it, while the block runs."""
    times: list[float] = []
    real = Monitor.transaction

    @functools.wraps(real)
    async def timed(self: Monitor, actions: list[dict[str, object]]) -> None:
        begun = time.monotonic()
        await real(self, actions)
        if any(action["type"] == "blockdev-backup" for action in actions):
            times.append(time.monotonic() - begun)

    Monitor.transaction = timed  # type: ignore[method-assign]
    try:
        yield times
    finally:
        Monitor.transaction = real  # type: ignore[method-assign]


def begins(place: Path, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds of the transaction, of `backup_begin`, and of the command."""
    machine = Machine(place)
    library, command = [], []
    with machine.running(), transactions() as times:
        for _ in range(rounds + 1):
            library.append(machine.begin())
            machine.end()
            command.append(machine.job_begin())
            machine.end()
    return times[1:], library[1:], command[1:]  # the first warms up


def checkpoints(place: Path, rounds: int, number: int) -> list[float]:
    """Ratios of the times of writes: a disk with `number` checkpoints against one with one, in turns."""
    images = {name: place / f"{name}.qcow2" for name in ("vda", "vdb")}
    for image in images.values():
        process.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, "2G"], timeout=60
        )
    uri = "images:" + ",".join(f"{name}={path}" for name, path in images.items())
    with sync.connect(uri, name="many", state_dir=place / "many") as machine:
        for index in range(number):
            disks = [{"name": "vda"}] + ([{"name": "vdb"}] if index == 0 else [])
            machine.checkpoint_create({"name": f"c{index}", "disks": disks})
        exports = machine.export_start({"disks": [{"name": name, "readonly": False} for name in images]})
        many, one = (served.uri for served in exports)
        ratios = []
        for turn in range(rounds + 1):
            first = (many, one) if turn % 2 else (one, many)
            times = {address: _write(address) for address in first}
            ratios.append(times[many] / times[one])
        machine.export_stop()
    return ratios[1:]


def _write(uri: str) -> float:
    argv = ["qemu-img", "bench", "-w", "-f", "raw", "-c", str(_WRITES), "-s", str(_WRITE), "-d", "16", uri]
    begun = time.monotonic()
    process.run(argv, timeout=600)
    return time.monotonic() - begun


def _row(name: str, seconds: list[float]) -> str:
    median = statistics.median(seconds) * 1000
    return f"{name:<12} {median:7.1f} ms  ({min(seconds) * 1000:.1f} … {max(seconds) * 1000:.1f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default 9)")
    parser.add_argument("--checkpoints", type=int, default=100, help="on the disk that is written to (default 100)")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: a temporary directory)")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pb-bench-", dir=words.dir) as place:
        transaction, library, command = begins(Path(place), words.rounds)
        for name, seconds in (("transaction", transaction), ("begin", library), ("job begin", command)):
            print(_row(name, seconds))
    with tempfile.TemporaryDirectory(prefix="pb-bench-", dir=words.dir) as place:
        ratios = checkpoints(Path(place), words.rounds, words.checkpoints)
        print(f"{'checkpoints':<12} ratio {statistics.median(ratios):.3f}  ({min(ratios):.3f} … {max(ratios):.3f})")


if __name__ == "__main__":
    main()
