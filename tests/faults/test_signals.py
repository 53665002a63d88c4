"""SIGTERM and Ctrl-C at any moment: cleaned up by ourselves, soon, and without a gap."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import Box, MakeBox
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.units import KiB, MiB
from relay import Message, Relay, Way
from storm import device
from victim import Victim, running

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
PROMISE = 10.0
_QUERIES = ("query-", "qom-get", "x-debug-")


def prove(box: Box, *, committed: bool = False) -> None:
    """Nothing is left, the checkpoint is merged back, and the next increment has no gap.

    After a commit the new checkpoint is needed, and the older one may not have been released yet.
    """
    assert running(box)
    assert box.leftovers() == []
    assert len(box.checkpoints("vda")) == 1 or committed
    box.write("vda", 0x13, 2 * MiB, 512)
    report = box.backup()
    assert report.broken == ()
    assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL}
    assert box.restored()["vda"] == box.image()["vda"]
    assert len(box.checkpoints("vda")) == 1


def one_disk(make_box: MakeBox, size: int = 4 * MiB, extra: tuple[str, ...] = ()) -> Box:
    """A machine with a restore point and a change since."""
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=size, extra=extra)
    box.write("vda", 0x11, 0, size)
    box.backup()
    box.write("vda", 0x12, 0, size - 512)
    return box


def slow_disk(make_box: MakeBox) -> Box:
    """A machine whose disk gives 5 MiB a second: 16 MiB have changed on it."""
    box = one_disk(make_box, 16 * MiB, ("-object", f"throttle-group,id=slow,x-bps-read={5 * MiB}"))
    box.command(
        "blockdev-add", {"driver": "throttle", "node-name": "slow", "throttle-group": "slow", "file": "vda-format"}
    )
    box.command("qom-set", {"path": device(box, "vda"), "property": "drive", "value": "slow"})
    return box


def children(pid: int, program: str) -> list[int]:
    """Children of a process that run a program."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            name, ppid = (
                (entry / "comm").read_text().strip(),
                int((entry / "stat").read_text().split(")")[1].split()[1]),
            )
            if ppid == pid and name == program:
                found.append(int(entry.name))
    return found


def exports_ready(victim: Victim, strike: Callable[[], None]) -> None:
    """Call `strike` when the copy has begun."""
    victim.at_command("block-export-add", strike, way=Way.REPLY, occurrence=2)


@pytest.mark.parametrize("number", list(CODES))
def test_a_signal_in_the_middle_of_the_copy_cleans_up_within_ten_seconds(
    make_box: MakeBox, number: signal.Signals
) -> None:
    box = slow_disk(make_box)
    victim = Victim(box)
    copying = threading.Event()
    exports_ready(victim, copying.set)
    with victim.relay, victim.started():
        assert copying.wait(20)
        time.sleep(0.7)
        begun = time.monotonic()
        victim.signal(number)
        code, said = victim.ended()
        took = time.monotonic() - begun
    print(f"{number.name}: ended after {took:.2f} s")
    assert code == CODES[number], said
    assert took < PROMISE
    prove(box)


def test_a_signal_while_the_destination_hangs_cleans_up_too(make_box: MakeBox) -> None:
    box = one_disk(make_box)
    victim = Victim(box)
    copying = threading.Event()
    exports_ready(victim, copying.set)
    with victim.relay, victim.started():
        assert copying.wait(20)
        deadline = time.monotonic() + 10
        while not (servers := children(victim.pid, "qemu-nbd")) and time.monotonic() < deadline:
            time.sleep(0.001)
        for server in servers:
            os.kill(server, signal.SIGSTOP)
        assert servers, "the copy was over too soon to be caught"
        time.sleep(0.5)
        begun = time.monotonic()
        victim.signal(signal.SIGTERM)
        code, said = victim.ended()
        took = time.monotonic() - begun
    print(f"destination hanging: ended after {took:.2f} s")
    assert code == 143, said
    assert took < PROMISE
    prove(box)


def test_a_second_signal_does_not_cut_the_cleaning_short(make_box: MakeBox) -> None:
    box = slow_disk(make_box)
    victim = Victim(box)
    copying = threading.Event()
    exports_ready(victim, copying.set)
    with victim.relay, victim.started():
        assert copying.wait(20)
        time.sleep(0.5)
        for _ in range(5):
            victim.signal(signal.SIGTERM)
            time.sleep(0.01)
        code, said = victim.ended()
    assert code == 143, said
    prove(box)


def test_a_signal_inside_a_long_pause_ends_the_pause_in_good_order(make_box: MakeBox) -> None:
    box = one_disk(make_box)

    def slowly(way: Way, number: int, message: Message) -> Message | None:
        time.sleep(0.03)
        return None

    victim = Victim(box, before=slowly)
    victim.at_command("stop", lambda: victim.signal(signal.SIGTERM))
    begun = time.monotonic()
    with victim.relay, victim.started():
        code, said = victim.ended(60)
    assert code == 143, said
    assert time.monotonic() - begun < 30
    prove(box)


def points(box: Box) -> set[Path]:
    """The restore points that can be seen."""
    return set(box.repository.glob("*/[!.]*/manifest.json"))


def sweep(make_box: MakeBox, pick: Callable[[list[int]], list[int]], *, changing: bool) -> None:
    """A signal at each of the picked commands."""
    box = one_disk(make_box, MiB * 3)
    with Relay(box.directory / "relay.sock", box.qmp) as relay:
        assert box.cli("backup", f"qmp:{relay.path}", "-r", f"dir:{box.repository}").returncode == 0
    numbers = [n for n, name in enumerate(relay.commands, 1) if not (changing and name.startswith(_QUERIES))]
    for count, number in enumerate(pick(numbers)):
        box.write("vda", count % 250 + 1, 512, 64 * KiB)
        before = points(box)
        victim = Victim(box)
        victim.at(Way.COMMAND, number, lambda victim=victim: victim.signal(signal.SIGTERM))  # type: ignore[misc]
        with victim.relay, victim.started():
            code, said = victim.ended()
        assert victim.struck.is_set()
        assert code in (143, 0), f"{number}: {said}"
        assert "also:" not in said, f"{number}: {said}"
        prove(box, committed=points(box) != before)


def test_a_signal_at_any_changing_command_leaves_nothing(make_box: MakeBox) -> None:
    sweep(make_box, lambda numbers: numbers[::3], changing=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(3))
def test_a_signal_at_every_command_leaves_nothing(make_box: MakeBox, part: int) -> None:
    sweep(make_box, lambda numbers: numbers[part::3], changing=False)
