"""Instant restore against a start from the plain image, in turns: seconds until the guest's agent answers.

    restore point   `pullback boot`, from the start of that process
    plain image     DIR/start.sh: the same QEMU, the same devices, the disk that became whole

The guest mounts its file system and writes to it. Each line has the ratio of the medians, for a small disk and
for a sparse one of 8 TiB, from both kinds of repository. Must hold: at most 1.5, and the same for both sizes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pullback import repo, state, units
from pullback.engine import guestagent
from pullback.flows import backup
from pullback.flows.repositories import Access
from pullback.guest import build, disks, run
from pullback.model import urls
from pullback.programs import process, qemu
from pullback.repo.restic import keys
from pullback.repo.store.local import LocalStore

_PASSWORD = "correct horse"
_SECONDS = 180.0


@dataclass(frozen=True)
class Bench:
    """A restore point of a guest's disk."""

    place: Path
    small: build.SmallGuest
    repository: urls.Repository

    @property
    def environ(self) -> dict[str, str]:
        """Of `pullback`."""
        return os.environ | {"PULLBACK_STATE_DIR": str(self.place / "state"), "RESTIC_PASSWORD": _PASSWORD}

    def boot(self, to: Path) -> tuple[float, float]:
        """Seconds until the agent answers, and until the disk is whole. The machine is off then."""
        line = [sys.executable, "-m", "pullback.cli.main", "boot", "--json", "--to", str(to), "-r", self.repository.url]
        words = run.cmdline(run.Writer(), [qemu.Disk(id="vda", path=to)])
        line += ["--kernel", str(self.small.kernel), "--initrd", str(self.small.initrd), "--append", words]
        line += ["--memory", "192M", "--cpus", "1"]
        begun = time.monotonic()
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=self.environ) as command:
            assert command.stdout is not None
            facts = next(
                line["facts"] for text in command.stdout if (line := json.loads(text)).get("kind") == "machine-started"
            )
            with _ended(facts["pid"]):
                answered = _answered(Path(facts["agent"])) - begun
                command.stdout.read()
                command.wait(_SECONDS)
                return answered, time.monotonic() - begun

    def plain(self, to: Path) -> float:
        """Seconds until the agent answers of the machine that starts from its whole disk."""
        begun = time.monotonic()
        with subprocess.Popen([to / "start.sh"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as machine:
            try:
                agent = next((self.place / "state" / "run").glob("boot-*")) / "agent.sock"
                return _answered(agent) - begun
            finally:
                machine.kill()


def _answered(agent: Path) -> float:
    """When the agent answers."""

    async def ask() -> float:
        while True:
            with contextlib.suppress(guestagent.AgentFailed):
                async with guestagent.connect(agent):
                    return time.monotonic()
            await asyncio.sleep(0.01)

    return asyncio.run(asyncio.wait_for(ask(), _SECONDS))


@contextlib.contextmanager
def _ended(pid: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}/exe").exists():
            time.sleep(0.01)


def stored(place: Path, small: build.SmallGuest, kind: str, size: int) -> Bench:
    """A disk with a file system on its first 512 MiB, in a new repository."""
    disk = place / "vda.qcow2"
    disks.make(disk, 512 * units.MiB, filler=192 * units.MiB)
    process.run(["qemu-img", "resize", "-q", disk, str(size)], timeout=60)
    directories = state.directories(place / "state")
    access = Access(environ=dict(os.environ) | {"RESTIC_PASSWORD": _PASSWORD}, cache=directories.cache)
    path = place / "repository"
    found: urls.Repository = urls.DirectoryRepository(path=path)
    if kind == "restic":
        found = urls.ResticRepository(location=urls.LocalPlace(path=path))
        store = LocalStore.create(path)
        repo.create_repository(store, _PASSWORD, caches=access.caches, cost=keys.Cost(1024, 8, 1)).close()
    machine = urls.machine(f"images:vda={disk}")
    request = backup.Request(machine=machine, repository=found, access=access, directories=directories, name="bench")
    asyncio.run(backup.backup(request))
    return Bench(place, small, found)


def turns(bench: Bench, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Restore point, plain image, whole disk; the first round is not counted."""
    found: list[tuple[float, float, float]] = []
    for turn in range(rounds + 1):
        to = bench.place / f"vm{turn}"
        answered, whole = bench.boot(to)
        found.append((answered, bench.plain(to), whole))
        process.run(["rm", "-r", to, *(bench.place / "state" / "run").glob("boot-*")], timeout=60)
    booted, plain, filled = zip(*found[1:], strict=True)
    return list(booted), list(plain), list(filled)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of each line (default 7)")
    parser.add_argument("--kind", choices=("dir", "restic"), action="append", help="only this kind of repository")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: a temporary directory)")
    words = parser.parse_args()
    small = build.guest(Path(os.environ.get("PULLBACK_GUEST_CACHE", build.CACHE)))
    for kind in words.kind or ("dir", "restic"):
        for size in (units.GiB, 8 * units.TiB):
            with tempfile.TemporaryDirectory(prefix="pb-", dir=words.dir) as place:
                booted, plain, filled = turns(stored(Path(place), small, kind, size), words.rounds)
                point, image, whole = (statistics.median(times) for times in (booted, plain, filled))
                print(
                    f"{kind:<7} {units.format_size(size):>9}  restore point {point:5.2f} s  "
                    f"plain image {image:5.2f} s  ratio {point / image:4.2f}  whole after {whole:5.2f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
