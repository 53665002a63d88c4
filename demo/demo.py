"""`make demo`: the main job on a real machine, from nothing to the proof.

Builds the small guest from distribution packages, boots it with a writer running, makes a full
backup and two increments while it writes, restores each point, proves each restore, and boots a
second machine from a restored disk. Ends with a table of what was done and how long it took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pullback.guest import build, disks, run
from pullback.programs import qemu
from pullback.units import MiB, format_duration, format_size

DISK_SIZE = 1024 * MiB
FILLER = 192 * MiB


@dataclass
class Demo:
    """The demo's directory, and the rows of its table."""

    place: Path
    rows: list[tuple[str, str, float]] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Console(highlight=False))

    @contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        """Time a step; what is put into the list becomes its result in the table."""
        self.console.print(f"[dim]…[/dim] {what}")
        result: list[str] = []
        begun = time.monotonic()
        yield result
        self.rows.append((what, "; ".join(result), time.monotonic() - begun))

    def pullback(self, *words: object) -> dict[str, Any]:
        """Run the command as a user would; gives its JSON result."""
        argv = [sys.executable, "-m", "pullback.cli.main", *map(str, words), "--json"]
        environment = os.environ | {"PULLBACK_STATE_DIR": str(self.place / "state")}
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False, timeout=300)
        if done.returncode != 0:
            raise SystemExit(f"`pullback {words[0]}` ended with {done.returncode}:\n{done.stderr}")
        document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return document

    def table(self) -> Table:
        """What was done."""
        table = Table("step", "what came out", "time", title="pullback demo")
        for what, result, seconds in self.rows:
            table.add_row(what, result, format_duration(seconds))
        return table


@dataclass(frozen=True)
class Moment:
    """A restore point, and what the guest had believed durable right before it."""

    point: str
    record: int
    digest: str


def main() -> None:
    """All steps."""
    with tempfile.TemporaryDirectory(prefix="pb-demo-") as place:
        demo = Demo(Path(place))
        with demo.step("build the small guest") as result:
            small = build.guest()
            result.append(f"Linux {small.version}")
        with demo.step("make its disk") as result:
            disks.make(demo.place / "vda.qcow2", DISK_SIZE, filler=FILLER)
            result.append(f"{format_size(DISK_SIZE)}, ext4, {format_size(FILLER)} of files")
        moments = back_up(demo, small)
        for moment in moments:
            restore(demo, moment)
        boot_again(demo, small, demo.place / moments[-1].point / "vda.raw")
        demo.console.print(demo.table())


def back_up(demo: Demo, small: build.SmallGuest) -> list[Moment]:
    """Boot, and back up three times while the guest writes."""
    disk = qemu.Disk(id="vda", path=demo.place / "vda.qcow2")
    machine = demo.place / "machine"
    machine.mkdir()
    moments = []
    with run.boot(small, run.Writer(), disks=[disk], directory=machine, name="demo") as guest:
        with demo.step("boot it, a writer runs") as result:
            guest.wait_ready()
            guest.wait_for_record(25)
            result.append(f"QEMU {qemu.acceleration()}")
        for name in ("full backup", "increment", "increment"):
            record = guest.last_record()
            with demo.step(f"{name} while it writes") as result:
                report = demo.pullback("backup", f"qmp:{guest.qmp[0]}", "-r", f"dir:{demo.place / 'repo'}")
                [stored] = report["point"]["disks"]
                result.append(f"{format_size(stored['read'])} read, {format_size(stored['stored'])} stored")
                result.append(f"machine stood still {format_duration(report['pause_seconds'])}")
            moments.append(Moment(report["point"]["id"], record, stored["digest"]))
            guest.wait_for_record(guest.last_record() + 25)
        if errors := guest.io_errors():
            raise SystemExit(f"the guest saw I/O errors: {errors}")
        with demo.step("shut it down") as result:
            result.append(f"{guest.last_record()} records written, no I/O error seen")
            guest.power_off()
            guest.wait_off()
    return moments


def restore(demo: Demo, moment: Moment) -> None:
    """Restore a point and prove it three ways."""
    with demo.step(f"restore {moment.point} and prove it") as result:
        out = demo.place / moment.point
        done = demo.pullback("restore", moment.point, "-r", f"dir:{demo.place / 'repo'}", "--to", out)
        [disk] = done["disks"]
        if disk["digest"] != moment.digest:
            raise SystemExit("the restored digest differs from that of the backup")
        verdict = disks.check(out / "vda.raw")
        if verdict.problem or verdict.last_record < moment.record:
            raise SystemExit(f"the restored disk is not what it was: {verdict}, durable before: {moment.record}")
        result.append(f"digest equal, file system clean, records 1–{verdict.last_record} intact (≥ {moment.record})")


def boot_again(demo: Demo, small: build.SmallGuest, image: Path) -> None:
    """A second machine starts from a restored disk and checks it from within."""
    with demo.step("boot a second machine from the last one") as result:
        machine = demo.place / "second"
        machine.mkdir()
        disk = qemu.Disk(id="vda", path=image, format="raw")
        with run.boot(small, run.Check(), disks=[disk], directory=machine, name="demo2") as guest:
            last = guest.wait_for_check()
            guest.wait_off()
        result.append(f"it found records 1–{last} intact")


if __name__ == "__main__":
    main()
