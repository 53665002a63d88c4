"""Every command is refused once: the backup fails with a sentence (or does without), and nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kit import Box, MakeBox
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.units import KiB, MiB
from relay import Message, Relay, Way, refusal
from victim import Victim, eventually, running

_QUERIES = ("query-", "qom-get", "x-debug-")
_PER_BOX = 24
Pick = Callable[[list[str]], list[int]]


def one_disk(make_box: MakeBox, bus: qemu.Bus, iothread: str | None) -> Box:
    """A machine with a restore point."""
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2"), bus=bus, iothread=iothread), size=2 * MiB)
    box.write("vda", 0x11, 0, MiB)
    box.backup()
    return box


def script(box: Box) -> list[str]:
    """The commands of an increment."""
    box.write("vda", 0x12, 0, 64 * KiB)
    with Relay(box.directory / "relay.sock", box.qmp) as relay:
        done = box.cli("backup", f"qmp:{relay.path}", "-r", f"dir:{box.repository}")
        assert done.returncode == 0, done.stderr
    return relay.commands


def refused_at(box: Box, wanted: int) -> None:
    """Refuse the n-th command, then prove that nothing was lost."""
    box.write("vda", wanted % 250 + 1, (wanted % 8) * 64 * KiB + 512, 64 * KiB)

    def refuse(way: Way, number: int, message: Message) -> Message | None:
        return refusal(message) if way is Way.COMMAND and number == wanted else None

    victim = Victim(box, before=refuse)
    with victim.relay, victim.started():
        code, said = victim.ended(60)
        name = victim.relay.commands[wanted - 1]
        where = f"{wanted} ({name}): {said}"
        assert code in (0, 1, 3, 11), where
        assert "Traceback" not in said, where
        assert code in (0, 3) or "pullback: " in said, where
        eventually(lambda: running(box), seconds=3, what=where)
    if "Left in QEMU" not in said and "refused by the test" not in said.partition("also:")[2]:
        assert [item for item in box.leftovers() if ".partial-" not in item] == [], where
    box.write("vda", wanted % 250 + 2, 1 * MiB, 512)
    report = box.backup()
    assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL}, where
    assert report.broken == (), where
    [content] = box.restored().values()
    assert content == box.image()["vda"], where
    assert box.leftovers() == [], where


def sweep(make_box: MakeBox, pick: Pick, bus: qemu.Bus = qemu.Bus.VIRTIO, iothread: str | None = None) -> None:
    """Refuse each of the picked commands."""
    numbers = pick(script(one_disk(make_box, bus, iothread)))
    for count, number in enumerate(numbers):
        if count % _PER_BOX == 0:
            box = one_disk(make_box, bus, iothread)
        refused_at(box, number)


def changing(commands: list[str]) -> list[int]:
    """Numbers of the commands that change something."""
    return [n for n, name in enumerate(commands, 1) if not name.startswith(_QUERIES)]


@pytest.mark.timeout(300)
def test_a_changing_command_may_be_refused(make_box: MakeBox) -> None:
    sweep(make_box, lambda commands: changing(commands)[::4])


@pytest.mark.timeout(300)
def test_a_changing_command_may_be_refused_for_a_disk_in_an_iothread(make_box: MakeBox) -> None:
    sweep(make_box, lambda commands: changing(commands)[1::6], qemu.Bus.SCSI, "io1")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("bus", "iothread"), [(qemu.Bus.VIRTIO, None), (qemu.Bus.SCSI, "io1")])
@pytest.mark.parametrize("part", range(4))
def test_every_command_may_be_refused(make_box: MakeBox, part: int, bus: qemu.Bus, iothread: str | None) -> None:
    sweep(make_box, lambda commands: list(range(1, len(commands) + 1))[part::4], bus, iothread)
