"""Restoring into another machine that does not run: its disks, its checkpoints, and what must not happen."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kit import Box, MakeBox, last_json
from pullback import errors
from pullback.flows import restore as flow
from pullback.model import urls
from pullback.programs import qemu
from pullback.units import KiB, MiB

SIZE = 4 * MiB


def source(make_box: MakeBox, kind: str = "dir") -> Box:
    """A machine with a restore point of two disks with holes."""
    box = make_box(size=SIZE, kind=kind)
    box.scramble("vda", 1, 0, MiB)
    box.write("vda", 0x22, 3 * MiB, 64 * KiB)
    box.scramble("vdb", 2, MiB, 2 * MiB)
    box.backup()
    return box


def other(make_box: MakeBox, *disks: qemu.Disk, size: int = SIZE, **options: Any) -> Box:
    """Another machine whose disks hold something else, with a first backup of its own."""
    box = make_box(*disks, size=size, name="web02", start=False)
    box.start(paused=True)
    for disk in box.disks:
        box.scramble(disk.id, 77, 0, size)
    box.backup()
    return box


def restore(box: Box, to: Box, **options: Any) -> flow.Report:
    """From one machine's repository into the other."""
    request = flow.Request(
        repository=box.place,
        access=box.access,
        to=options.pop("url", urls.QmpMachine(socket=to.qmp)),
        directories=to.directories,
        force=options.pop("force", True),
        **options,
    )
    return asyncio.run(flow.restore(request))


def content(box: Box) -> dict[str, bytes]:
    """What a machine's images hold, seen from outside."""
    found = {}
    for disk in box.disks:
        raw = disk.path.with_suffix(".seen")
        command = ["qemu-img", "convert", "-U", "-f", disk.format, "-O", "raw", str(disk.path), str(raw)]
        subprocess.run(command, check=True, timeout=30)
        found[disk.id] = raw.read_bytes()
    return found


@pytest.mark.parametrize("kind", ["dir", "restic"])
def test_a_paused_machine_gets_the_disks_and_its_next_backup_is_an_exact_increment(
    make_box: MakeBox, kind: str
) -> None:
    box, to = source(make_box, kind), other(make_box)
    report = restore(box, to, check=True)
    assert [disk.place for disk in report.disks] == ["disk vda of web02", "disk vdb of web02"]
    assert to.command("query-status")["status"] == "prelaunch"
    assert to.leftovers() == []
    assert content(to) == box.image()
    to.model = {target: bytearray(data) for target, data in box.image().items()}
    to.write("vda", 0x33, 2 * MiB, 64 * KiB)
    second = to.backup()
    assert {plan.disk.target: plan.whole for plan in second.plans} == {"vda": False, "vdb": False}
    assert to.restored() == to.image()
    to.command("cont")
    assert to.command("query-status")["status"] == "running"


def test_a_machine_that_was_stopped_is_reset_because_its_memory_knows_other_disks(make_box: MakeBox) -> None:
    box, to = source(make_box), other(make_box)
    to.command("cont")
    to.command("stop")
    assert to.command("query-status")["status"] == "paused"
    restore(box, to)
    assert to.command("query-status")["status"] == "prelaunch"
    assert content(to) == box.image()


def test_a_machine_that_ends_at_a_reset_is_refused(make_box: MakeBox) -> None:
    box = source(make_box)
    to = make_box(size=SIZE, name="web02", start=False, extra=["-no-reboot"])
    to.start(paused=True)
    with pytest.raises(errors.DestinationUnusable, match="no-reboot"):
        restore(box, to)
    assert to.command("query-status")["status"] == "prelaunch"


@pytest.mark.parametrize("bus", [qemu.Bus.SCSI, qemu.Bus.NVME])
def test_disks_of_other_buses_and_names(make_box: MakeBox, bus: qemu.Bus) -> None:
    box = source(make_box)
    first, second = ("nvme0n1", "nvme1n1") if bus is qemu.Bus.NVME else ("sda", "sdb")
    disks = [qemu.Disk(id=name, path=Path(f"{name}.qcow2"), bus=bus) for name in (first, second)]
    to = make_box(*disks, size=SIZE + MiB, name="web02", start=False)
    to.start(paused=True)
    report = restore(box, to, disk_map={"vda": second, "vdb": first})
    assert [disk.behind for disk in report.disks] == [MiB, MiB]
    assert "its last 1.00 MiB were left alone" in report.notes[0]
    found = content(to)
    assert found[second][:SIZE] == box.image()["vda"]
    assert found[first][:SIZE] == box.image()["vdb"]


def test_a_machine_that_is_off_gets_the_disks(make_box: MakeBox) -> None:
    box, to = source(make_box), other(make_box)
    to.quit()
    images = ",".join(f"{disk.id}={disk.path}" for disk in to.disks)
    done = to.cli("restore", "-r", box.place.url, "--to", f"images:{images}", "--force", "--check", "--json")
    assert done.returncode == 0, done.stderr
    assert {disk["checked"] for disk in last_json(done.stdout)["disks"]} == {True}
    assert content(to) == box.image()
    to.model = {target: bytearray(data) for target, data in box.image().items()}
    to.start()
    second = to.backup()
    assert not any(plan.whole for plan in second.plans)
    assert to.restored() == to.image()


def test_one_disk_of_the_command_line(make_box: MakeBox) -> None:
    box, to = source(make_box), other(make_box)
    words = ("restore", "-r", box.place.url, "--to", f"qmp:{to.qmp}", "--disk", "vdb", "--disk-map", "vdb=vda")
    refused = to.cli(*words)
    assert (refused.returncode, "say --force" in refused.stderr) == (2, True), refused.stderr
    done = to.cli(*words, "--force")
    assert done.returncode == 0, done.stderr
    assert "disk vda of web02" in done.stdout
    found = content(to)
    assert found["vda"] == box.image()["vdb"]
    assert found["vdb"] == bytes(to.model["vdb"])


def test_a_configured_machine_by_its_name(make_box: MakeBox) -> None:
    box, to = source(make_box), other(make_box)
    config = to.directory / "config.toml"
    config.write_text(f'[machines.second]\nurl = "qmp:{to.qmp}"\n')
    words = ("restore", "-r", box.place.url, "--config", config, "--force")
    done = to.cli(*words, "--to", "machine:second")
    assert done.returncode == 0, done.stderr
    assert content(to) == box.image()
    done = to.cli(*words, "--to", "machine:third")
    assert (done.returncode, "There is no machine 'third'" in done.stderr) == (2, True), done.stderr


# -- what is refused -------------------------------------------------------------------------


def test_a_running_machine_is_never_written(make_box: MakeBox) -> None:
    box, to = source(make_box), other(make_box)
    to.command("cont")
    before = content(to)
    with pytest.raises(errors.DestinationUnusable, match="the machine is running") as caught:
        restore(box, to)
    assert "-S" in (caught.value.hint or "")
    assert to.command("query-status")["status"] == "running"
    assert content(to) == before
    assert to.leftovers() == []


def test_disks_that_do_not_fit_are_refused_and_the_machine_is_left_alone(make_box: MakeBox) -> None:
    box = source(make_box)
    to = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=SIZE - 512, name="web02", start=False)
    to.start(paused=True)
    for options, kind in (
        ({}, errors.UnknownDisk),
        ({"only": ("vda",)}, errors.DestinationUnusable),
        ({"disk_map": {"vdb": "vda"}}, errors.UsageError),
        ({"only": ("vda",), "disk_map": {"vdb": "vda"}}, errors.UsageError),
    ):
        with pytest.raises(kind):
            restore(box, to, **options)
    assert to.command("query-status")["status"] == "prelaunch"
    assert to.leftovers() == []


def test_a_damaged_point_leaves_the_machine_without_leftovers_and_says_what_it_holds(make_box: MakeBox) -> None:
    box, to = source(make_box), other(make_box)
    image = next(box.repository.glob("*/*/vda.qcow2"))
    data = bytearray(image.read_bytes())
    data[-100] ^= 1
    image.write_bytes(data)
    with pytest.raises(errors.VerificationFailed) as caught:
        restore(box, to)
    assert any("disk vda of web02 was overwritten in part" in note for note in caught.value.__notes__)
    assert to.command("query-status")["status"] == "prelaunch"
    assert to.leftovers() == []


# -- interrupted -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_an_interrupted_restore_lets_go_of_the_machine_and_never_lets_it_run(
    make_box: MakeBox, number: signal.Signals
) -> None:
    box, to = source(make_box), other(make_box)
    command = [sys.executable, "-m", "pullback.cli.main", "restore", "-r", box.place.url, "--to", f"qmp:{to.qmp}"]
    command += ["--force", "--limit-rate", "500K", "--state-dir", str(to.directory / "state")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        try:
            before = content(to)
            deadline = time.monotonic() + 30
            while content(to) == before:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            child.send_signal(number)
            code = child.wait(20)
        finally:
            child.kill()
    assert code == (143 if number == signal.SIGTERM else -number)
    assert to.command("query-status")["status"] in ("prelaunch", "paused")
    if number == signal.SIGKILL:
        to.cli("recover", f"qmp:{to.qmp}")
    assert to.leftovers() == []
    assert to.command("query-status")["status"] in ("prelaunch", "paused")
    restore(box, to, check=True)
    assert content(to) == box.image()
