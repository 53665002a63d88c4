"""Proving restore points: one that comes up, one that cannot, and what is left of each."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import diskmaker
import kit
from pullback import state
from pullback.flows import backup as backup_flow
from pullback.flows import proving as flow
from pullback.guest import build, disks, run
from pullback.guest.listening import Listener
from pullback.model import pictures, urls
from pullback.model.proofs import Kind, Sign
from pullback.programs import qemu
from pullback.units import KiB, MiB

pytestmark = pytest.mark.guest
_GUEST = "small-guest"


@dataclass(frozen=True)
class Kept:
    """A repository with a point of a machine that starts, and of one that cannot."""

    directory: Path
    kind: str
    small: build.SmallGuest

    @property
    def request(self) -> flow.Request:
        """For the machine that starts: its kernel was the host's, so it is given again."""
        disk = qemu.Disk(id="vda", path=Path("x"))
        append = run.cmdline(run.Writer(), [disk])
        return flow.Request(
            repository=kit.place_of(self.directory / "repo", self.kind),
            access=kit.access_of(self.directory),
            machine=_GUEST,
            wishes=flow.Wishes(kernel=flow.Kernel(image=self.small.kernel, initrd=self.small.initrd, append=append)),
            directories=state.directories(self.directory / "state"),
            guests=diskmaker.guest_cache(),
        )

    @property
    def empty(self) -> flow.Request:
        """For the one that cannot."""
        limits = flow.Limits(seconds=2)
        return replace(self.request, machine="empty", wishes=flow.Wishes(memory=64 * MiB, cpus=1), limits=limits)

    def cli(self, *words: object) -> subprocess.CompletedProcess[str]:
        """The command."""
        environ = {"PULLBACK_PASSWORD_FILE": str(kit.password_file(self.directory))}
        place = kit.place_of(self.directory / "repo", self.kind).url
        return kit.run_cli("prove", *words, "-r", place, state=self.directory / "state", environ=environ, timeout=120)

    def left(self) -> list[Path]:
        """Runtime files and overlays."""
        return [path for name in ("run", "scratch") for path in (self.directory / "state" / name).glob("*")]


def backed_up(place: Path, kind: str, machine: urls.Machine, name: str | None) -> None:
    request = backup_flow.Request(
        machine=machine,
        repository=kit.place_of(place / "repo", kind),
        access=kit.access_of(place),
        name=name,
        directories=state.directories(place / "state"),
    )
    asyncio.run(backup_flow.backup(request))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Kept]]:
    """Both kinds of repositories, from one guest that writes while it is backed up."""
    small = build.guest(diskmaker.guest_cache())
    base = tmp_path_factory.mktemp("p")
    places = {kind: Kept(base / kind, kind, small) for kind in ("dir", "restic")}
    for kind, one in places.items():
        one.directory.mkdir()
        if kind == "restic":
            kit.make_repository(one.directory / "repo", one.directory / "cache" / "repositories")
        (one.directory / "empty.raw").write_bytes(bytes(MiB))
        backed_up(one.directory, kind, urls.machine(f"images:vda=raw:{one.directory / 'empty.raw'}"), "empty")
    disks.make(base / "disk.qcow2", 128 * MiB, filler=4 * MiB)
    disk = qemu.Disk(id="vda", path=base / "disk.qcow2")
    with run.boot(small, run.Writer(), disks=[disk], directory=base, name=_GUEST) as guest:
        guest.wait_for_record(20)
        for kind, one in places.items():
            backed_up(one.directory, kind, urls.QmpMachine(socket=guest.qmp[0]), None)
    yield places
    shutil.rmtree(base)


def proven(request: flow.Request) -> flow.Report:
    return asyncio.run(flow.prove(request))


def seen(report: flow.Report) -> dict[Kind, Any]:
    return {one.sign.kind: one for one in report.proof.seen}


# -- one that comes up -----------------------------------------------------------------------


def test_a_point_that_comes_up_is_proven_by_all_that_was_asked_for(kept: dict[str, Kept]) -> None:
    signs = (
        Sign(kind=Kind.AGENT),
        Sign(kind=Kind.CONSOLE, text=r"^PB-RECORD \d+"),
        Sign(kind=Kind.RUN, text="echo $((6 * 7)); test -d /mnt/ring"),
        Sign(kind=Kind.STEADY, text="1"),
        Sign(kind=Kind.FSCK),
    )
    report = proven(replace(kept["restic"].request, signs=signs))
    proof = report.proof
    assert (proof.proven, proof.problem) == (True, None)
    found = seen(report)
    assert all(one.good and one.seconds > 0 for one in found.values())
    assert found[Kind.CONSOLE].said.startswith("PB-RECORD ")
    assert int(found[Kind.CONSOLE].said.split()[1]) > 20  # it went on where the backup was made
    assert found[Kind.RUN].said == "42\n"
    assert found[Kind.FSCK].said == "vda (ext4): sound"
    assert proof.system["kernel"] == kept["restic"].small.version
    assert proof.figures.up is not None
    assert proof.figures.up >= found[Kind.AGENT].seconds
    assert proof.figures.read > 64 * KiB
    assert proof.figures.written > 0
    assert proof.figures.fetched is not None
    assert proof.figures.read // 100 < proof.figures.fetched < 200 * MiB  # packed and compressed, and read ahead
    assert proof.figures.cpu > 0.5
    assert proof.network == "none"
    assert proof.no_picture == "the machine has no screen"
    assert sorted(os.listdir(report.directory)) == ["console.log", "report.html", "report.json"]
    assert b"PB-READY" in (report.directory / "console.log").read_bytes()
    assert kept["restic"].left() == []


@pytest.mark.slow
def test_without_a_wish_the_agents_answer_is_enough(kept: dict[str, Kept]) -> None:
    one = kept["dir"]
    kernel = one.request.wishes.kernel
    assert kernel is not None
    words = ("--kernel", kernel.image, "--initrd", kernel.initrd, "--append", kernel.append)
    done = one.cli("--machine", _GUEST, *words, "--report", one.directory / "reports", "--json")
    assert done.returncode == 0, done.stderr
    result = kit.last_json(done.stdout)
    [point] = result["points"]
    assert (result["proven"], result["not_proven"], result["failed"]) == (1, 0, [])
    assert point["any"] is True
    assert [sign["kind"] for sign in point["signs"] if sign["good"]] == ["agent"]
    written = json.loads((Path(point["report"]) / "report.json").read_text())
    assert written == {key: value for key, value in point.items() if key != "report"}
    assert Path(point["report"]).parent == one.directory / "reports" / _GUEST
    assert (Path(point["report"]).stat().st_mode & 0o777, one.left()) == (0o700, [])


# -- one that does not -----------------------------------------------------------------------


def test_a_point_that_does_not_come_up_is_told_with_its_picture(kept: dict[str, Kept]) -> None:
    one = kept["dir"]
    words = ("--memory", "64M", "--cpus", "1", "--time-limit", "2", "--fsck")
    done = one.cli("--machine", "empty", *words)
    assert done.returncode == 13
    assert "empty: " in done.stdout
    assert "DID NOT COME UP: neither the guest agent answers nor" in done.stdout
    assert "not within 2 s" in done.stdout
    [directory] = (one.directory / "state/reports/empty").iterdir()
    assert f"see what it showed: {directory / 'report.html'}" in done.stderr
    picture = (directory / "screen.png").read_bytes()
    assert pictures.is_png(picture)
    page = (directory / "report.html").read_text()
    assert "did not come up" in page
    assert "data:image/png;base64," in page
    assert "there is no file system that can be checked" in page
    assert one.left() == []


def test_all_are_tried_and_one_that_fails_decides(kept: dict[str, Kept]) -> None:
    """Both machines; and one that QEMU does not even start keeps the other from nothing."""
    one = kept["restic"]
    points = asyncio.run(flow.candidates(replace(one.empty, machine=None), newest=True))
    assert sorted(point.machine for point in points) == ["empty", _GUEST]
    told: list[object] = []
    limits = flow.Limits(seconds=1)
    request = replace(one.empty, limits=limits, signs=(Sign(kind=Kind.CONSOLE, text="never"),))
    found = asyncio.run(flow.prove_all(request, points, told=told.append))
    assert told == list(found)
    problems = [one.proof.problem or "" for one in found if isinstance(one, flow.Report)]
    assert len(problems) == 2
    assert all(text.startswith("not seen: 'never' on the console (not within 1 s") for text in problems)
    broken = replace(request, wishes=flow.Wishes(bios=one.directory / "password"))
    [failure] = asyncio.run(flow.prove_all(broken, points[:1], told=told.append))
    assert isinstance(failure, flow.Failure)
    assert failure.error.code == "program-failed"


def test_limits_end_it(kept: dict[str, Kept]) -> None:
    one = kept["restic"]
    never = (Sign(kind=Kind.CONSOLE, text="never"),)
    report = proven(replace(one.request, signs=never, limits=flow.Limits(seconds=60, cpu=0.5)))
    assert "not within 0.5 s of processor time" in (report.proof.problem or "")


@pytest.mark.parametrize(
    "words",
    [
        ("--newest",),
        ("--all", "1f2e3d4c"),
        ("--console-text", "("),
        ("--initrd", "/etc/hosts"),
    ],
)
def test_what_makes_no_sense_is_refused(kept: dict[str, Kept], words: tuple[str, ...]) -> None:
    done = kept["dir"].cli(*words, "--json")
    assert (done.returncode, kit.last_json(done.stdout)["code"]) == (2, "usage")


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGKILL, -signal.SIGKILL), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_who_is_ended_leaves_no_machine(kept: dict[str, Kept], signum: int, status: int) -> None:
    one = kept["dir"]
    environ = os.environ | {"PULLBACK_STATE_DIR": str(one.directory / "state")}
    words = [sys.executable, "-m", "pullback.cli.main", "prove", "--machine", "empty", "--memory", "64M"]
    running = subprocess.Popen([*words, "-r", f"dir:{one.directory / 'repo'}"], env=environ)
    try:
        machine = _machine_below(one.directory / "state/run")
        running.send_signal(signum)
        assert running.wait(30) == status
    finally:
        running.kill()
        running.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{machine}").exists():
        assert time.monotonic() < deadline, "QEMU lives on"
        time.sleep(0.05)
    if signum == signal.SIGTERM:  # it also removed what the killed one had left
        assert one.left() == []


def _machine_below(runtime: Path) -> int:
    """The QEMU whose monitor is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"qemu-system" in words[0] and any(os.fsencode(runtime) in word for word in words):
                return int(path.parent.name)
        time.sleep(0.05)
    raise AssertionError("no machine")


# -- a console that talks without end --------------------------------------------------------


def test_a_console_is_heard_within_bounds(tmp_path: Path) -> None:
    with Listener(tmp_path / "console") as listener:
        with open(tmp_path / "console", "wb") as console:
            for number in range(40):
                console.write(b"%08d" % number + b"x" * 65528)
        deadline = time.monotonic() + 20
        while listener.heard < 40 * 65536 and time.monotonic() < deadline:
            time.sleep(0.01)
        data = listener.data()
    assert data.startswith(b"00000000x")
    assert data.endswith(b"x" * 65528)
    assert b"00000039" in data
    assert b"bytes \xe2\x80\xa6]" in data
    assert len(data) < 1_100_000
