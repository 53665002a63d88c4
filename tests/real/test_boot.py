"""Instant restore: the machine runs at once, its disks become whole, and nothing that happens meanwhile is lost."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import swtpm
from booted import Command, Place, alive, booting, wait_gone
from kit import Box, MakeBox, last_json
from pullback import errors
from pullback.flows import booting as booting_flow
from pullback.flows import bootmachine
from pullback.model import hardware
from pullback.programs import qemu
from pullback.units import KiB, MiB

pytestmark = pytest.mark.timeout(120)
SIZE = 6 * MiB
#: At this rate a disk takes a second.
SLOW = ("--limit-rate", "3M")


def box_of(make: MakeBox, kind: str, **options: object) -> Box:
    """A machine with two disks full of what cannot be compressed, but for a hole, backed up; it is off then."""
    box = make(kind=kind, size=SIZE, **options)
    for seed, disk in enumerate(box.disks):
        box.scramble(disk.id, seed, 0, 2 * MiB)
        box.scramble(disk.id, seed + 9, 3 * MiB + 64 * KiB, MiB + 512)
    box.backup()
    box.quit()
    return box


@pytest.fixture(params=["restic", "dir"])
def place(request: pytest.FixtureRequest, make_box: MakeBox) -> Iterator[Place]:
    """A restore point in each kind of repository."""
    with booting(box_of(make_box, request.param)) as found:
        yield found


@pytest.fixture
def one(make_box: MakeBox) -> Iterator[Place]:
    """The same in a `dir:` repository, where the kind makes no difference."""
    with booting(box_of(make_box, "dir")) as found:
        yield found


def model(place: Place) -> dict[str, bytes]:
    """What the restore point holds."""
    return place.box.image()


def mode(path: Path) -> int:
    """Permissions."""
    return stat.S_IMODE(path.stat().st_mode)


# -- the machine, and its disks --------------------------------------------------------------


def test_it_runs_at_once_and_what_it_writes_while_its_disks_are_filled_is_kept(place: Place) -> None:
    command = place.boot(*SLOW)
    facts = command.started()
    pid = place.runs(facts)
    assert "errors" not in place.io(facts, "vda", "read -v 0 512")
    expected = {target: bytearray(content) for target, content in model(place).items()}
    for target, offset, length in [("vda", MiB + 5 * KiB, 96 * KiB), ("vdb", 4 * MiB, MiB), ("vdb", 5 * MiB, 512)]:
        place.io(facts, target, f"write -q -P 0x5a {offset} {length}")
        expected[target][offset : offset + length] = b"\x5a" * length
    place.io(facts, "vda", f"discard -q 0 {128 * KiB}")
    expected["vda"][: 128 * KiB] = bytes(128 * KiB)
    report = command.done()
    assert (report["filled"], report["runs"]) == (True, True)
    assert {target: place.content(target) for target in expected} == {k: bytes(v) for k, v in expected.items()}
    assert alive(pid)
    nodes = place.qmp(facts, "query-named-block-nodes", {"flat": True})
    assert {node["node-name"] for node in nodes if node["node-name"].startswith("disk-")} == {
        "disk-0", "disk-0-file", "disk-1", "disk-1-file",
    }  # fmt: skip
    assert place.qmp(facts, "query-block-exports") == []
    place.io(facts, "vda", "write -q -P 7 0 4096")  # the disks live on
    place.off(facts)
    for target in expected:
        place.check(target)
    assert place.content("vda")[:4096] == b"\x07" * 4096
    assert sorted(os.listdir(place.to)) == ["console.log", "qemu.log", "start.sh", "vda.qcow2", "vdb.qcow2"]
    assert (mode(place.to), mode(place.to / "vda.qcow2"), mode(place.to / "start.sh")) == (0o700, 0o600, 0o700)


def test_afterwards_it_is_a_machine_like_any_other(one: Place) -> None:
    """It is backed up, and the increment is the next of its chain in the repository."""
    command = one.boot()
    facts = command.started()
    one.runs(facts)
    command.done()
    done = one.box.cli("backup", facts["monitor"], "-r", one.box.place.url, "--json")
    assert done.returncode in (0, 3), done.stderr
    one.io(facts, "vdb", f"write -q -P 9 {MiB} {64 * KiB}")
    done = one.box.cli("backup", facts["monitor"], "-r", one.box.place.url, "--json")
    assert done.returncode == 0, done.stderr
    assert {disk["mode"] for disk in last_json(done.stdout)["point"]["disks"]} == {"incremental"}
    expected = bytearray(model(one)["vdb"])
    expected[MiB : MiB + 64 * KiB] = b"\x09" * (64 * KiB)
    assert one.box.restored()["vdb"] == bytes(expected)


def test_a_backup_while_its_disks_are_filled_is_exact(one: Place) -> None:
    command = one.boot(*SLOW)
    facts = command.started()
    one.runs(facts)
    one.io(facts, "vda", "write -q -P 3 0 4096")
    done = one.box.cli("backup", facts["monitor"], "-r", one.box.place.url, "--json")
    assert done.returncode in (0, 3), done.stderr
    expected = b"\x03" * 4096 + model(one)["vda"][4096:]
    assert one.box.restored() == {"vda": expected, "vdb": model(one)["vdb"]}
    assert command.done()["filled"]
    assert one.content("vda") == expected


@pytest.mark.slow
def test_the_script_starts_it_again_from_its_whole_disks(one: Place) -> None:
    facts = (command := one.boot()).started()
    one.runs(facts)
    command.done()
    one.off(facts)
    (one.box.repository).rename(one.box.directory / "gone")
    again = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", one.to / "start.sh"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    one.pids.append(again.pid)
    deadline = time.monotonic() + 30
    while not Path(facts["monitor"].removeprefix("qmp:")).is_socket():
        assert again.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert one.qmp(facts, "query-name") == {"name": "web01"}
    one.qmp(facts, "quit")
    assert again.wait(30) == 0


# -- interruptions ---------------------------------------------------------------------------


def test_killed_anywhere_the_same_command_goes_on(place: Place) -> None:
    _interrupted(place, signal.SIGKILL, -9)


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_interrupted_it_says_what_waits_and_the_same_command_goes_on(one: Place, number: int, code: int) -> None:
    said = _interrupted(one, number, code)
    assert "web01 was left running; what it reads of its restore point waits until `pullback boot` is run" in said


def _interrupted(place: Place, number: int, code: int) -> str:
    command = place.boot(*SLOW)
    facts = command.started()
    pid = place.runs(facts)
    command.past("vda", MiB)
    assert command.kill(number) == code
    assert alive(pid)
    again = place.boot()
    assert again.started() | {"started_after": 0} == facts | {"resumed": True, "started_after": 0}
    assert again.done()["filled"]
    assert {target: place.content(target) for target in model(place)} == model(place)
    return command.stderr()


def test_a_read_of_the_machine_waits_while_we_are_away(one: Place) -> None:
    """No error, and the right data in the end."""
    command = one.boot(*SLOW)
    facts = command.started()
    one.runs(facts)
    command.past("vda", MiB)
    command.kill()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        reading = pool.submit(one.io, facts, "vdb", f"read -P 0 {5 * MiB} 4096")
        time.sleep(1)
        assert not reading.done()
        again = one.boot()
        assert again.started()["resumed"]
        assert reading.result(60) == ""
    assert again.done()["filled"]
    # What `qemu-io` says of a success goes to QEMU's own output.
    said = (one.to / "qemu.log").read_text()
    assert "read 4096/4096 bytes at offset 5242880" in said
    assert "ailed" not in said


def test_a_machine_that_dies_is_filled_all_the_same(one: Place) -> None:
    command = one.boot(*SLOW)
    facts = command.started()
    pid = one.runs(facts)
    one.io(facts, "vda", "write -q -P 3 0 4096")
    one.io(facts, "vda", "flush")
    command.past("vda", MiB)
    os.kill(pid, signal.SIGKILL)
    report = command.done()
    assert (report["filled"], report["runs"]) == (True, False)
    assert "web01 has ended; its disks are filled all the same" in command.notes()
    assert one.content("vda") == b"\x03" * 4096 + model(one)["vda"][4096:]
    assert one.content("vdb") == model(one)["vdb"]
    for target in model(one):
        one.check(target)


def test_after_the_death_of_both_the_same_command_starts_it_again(one: Place) -> None:
    command = one.boot(*SLOW, "--as", "copy")
    facts = command.started()
    pid = one.runs(facts)
    one.io(facts, "vda", "write -q -P 3 0 4096")
    one.io(facts, "vda", "flush")
    command.past("vda", MiB)
    os.kill(pid, signal.SIGKILL)
    command.kill()
    wait_gone(pid)
    again = one.boot("--as", "copy")
    new = again.started()
    assert one.runs(new) != pid
    assert not new["resumed"]
    assert new["words"] == facts["words"]
    assert again.end()["runs"], again.stderr()
    assert one.content("vda") == b"\x03" * 4096 + model(one)["vda"][4096:]


def test_a_restore_point_that_does_not_answer_for_a_while(one: Place) -> None:
    """As when its repository is away: everybody waits, nobody is told of an error."""
    command = one.boot(*SLOW)
    one.runs(command.started())
    stopped = servers(command)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)
    assert command.process.poll() is None
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    assert command.done()["filled"]
    assert {target: one.content(target) for target in model(one)} == model(one)


def servers(command: Command) -> list[int]:
    """The processes that serve the restore point."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == command.process.pid and "servant" in (place / "cmdline").read_text():
                found.append(int(place.name))
    assert found
    return found


@pytest.mark.slow
def test_a_server_that_dies_is_started_again(one: Place) -> None:
    command = one.boot(*SLOW)
    facts = command.started()
    one.runs(facts)
    command.past("vda", MiB)
    for pid in servers(command):
        os.kill(pid, signal.SIGKILL)
    assert command.done()["filled"]
    assert any("is served again" in note for note in command.notes())
    assert {target: one.content(target) for target in model(one)} == model(one)


# -- what is wished for ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_rate_is_kept(one: Place) -> None:
    command = one.boot("--limit-rate", "4M")
    one.runs(command.started())
    begun = time.monotonic()
    report = command.end()
    data = sum(disk["data"] for disk in report["disks"])
    assert time.monotonic() - begun >= data / (4 * MiB) - 2


def test_a_copy_has_an_identity_of_its_own_and_no_network(one: Place) -> None:
    extra = ("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,mac=52:54:00:00:00:01,id=net0")
    one.box.extra = ("-uuid", "6c1e7b0e-8b5c-4f2f-9d1f-0d6b7f9a3c11", *extra)
    one.box.start()
    one.box.backup()
    one.box.quit()
    plain, copy = one.boot(), one.boot("--as", "twin", to=one.box.directory / "twin")
    facts = [plain.started(), copy.started()]
    for found in facts:
        one.runs(found)
    assert [one.qmp(found, "query-name")["name"] for found in facts] == ["web01", "twin"]
    uuids = [one.qmp(found, "query-uuid")["UUID"] for found in facts]
    assert uuids[0] == "6c1e7b0e-8b5c-4f2f-9d1f-0d6b7f9a3c11"
    assert uuids[1] != uuids[0]
    cards = [[word for word in found["words"] if word.startswith("virtio-net-pci")] for found in facts]
    assert "mac=52:54:00:00:00:01" in cards[0][0]
    assert "mac=52:54:00:00:00:01" not in cards[1][0]
    assert not any("netdev" in word for found in facts for word in found["words"])


def test_its_tpm_and_its_firmware_have_what_they_had(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("vda.qcow2")), start=False, size=MiB)
    state, variables = box.directory / "tpm", box.directory / "vars.fd"
    state.mkdir()
    with swtpm.alone("--tpmstate", f"dir={state}") as tpm:
        tpm.keep(b"sealed")
        tpm.shutdown()
    code = box.directory / "code.fd"
    code.write_bytes(bytes(192 * KiB) + qemu.halting_firmware())
    variables.write_bytes(bytes(range(256)) * 512)
    flash = [
        "-drive",
        f"if=pflash,format=raw,readonly=on,file={code}",
        "-drive",
        f"if=pflash,format=raw,file={variables}",
    ]
    with swtpm.beside(state) as words:
        machine = qemu.Machine(name="web01", disks=box.disks, qmp=[box.qmp, box.other], extra=[*words, *flash])
        box.process = qemu.start(machine)
        box.backup()
        box.quit()
    with booting(box) as place:
        command = place.boot(halt=False)
        facts = command.started()
        place.runs(facts)
        command.done()
        assert [item for item in facts["left_out"] if not item["of_host"]] == []
        assert place.qmp(facts, "query-tpm")[0]["model"] == "tpm-crb"
        assert (place.to / "firmware/pflash1.fd").read_bytes() == variables.read_bytes()
        nodes = {node["node-name"]: node for node in place.qmp(facts, "query-named-block-nodes", {"flat": True})}
        assert (nodes["flash-0"]["ro"], nodes["flash-1"]["ro"]) == (True, False)
        place.off(facts)
        with swtpm.alone("--tpmstate", f"dir={place.to / 'tpm'}") as tpm:
            assert tpm.kept(6) == b"sealed"


def test_somebody_else_may_start_it(one: Place) -> None:
    command = one.boot("--no-start", *SLOW)
    facts = command.until(kind="machine-ready")["facts"]
    assert facts["pid"] is None
    machine = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", one.to / "start.sh"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    one.pids.append(machine.pid)
    report = command.done()
    assert (report["filled"], report["runs"]) == (True, True)
    assert {target: one.content(target) for target in model(one)} == model(one)
    one.qmp(facts, "quit")
    machine.wait(30)


def test_detached_it_ends_when_the_machine_runs_and_goes_on_behind(one: Place) -> None:
    command = one.boot("--detach", *SLOW)
    report = command.done()
    assert (report["filled"], report["runs"]) == (False, True)
    one.runs(report)
    assert "boot.json" in os.listdir(one.to)
    deadline = time.monotonic() + 60
    while (one.to / "boot.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert {target: one.content(target) for target in model(one)} == model(one)
    assert last_json((one.to / "boot.log").read_text())["filled"]


@pytest.mark.slow
def test_only_some_disks(one: Place) -> None:
    command = one.boot("--disk", "vdb")
    facts = command.started()
    one.runs(facts)
    assert [disk["target"] for disk in command.end()["disks"]] == ["vdb"]
    assert [node for node in facts["words"] if "vda" in node] == []


# -- what goes wrong -------------------------------------------------------------------------


def test_files_that_are_there_are_not_touched(one: Place) -> None:
    one.to.mkdir()
    (one.to / "vdb.qcow2").write_text("mine")
    error = one.boot().end()
    assert (error["code"], error["exit_code"]) == ("destination-unusable", 2)
    assert (one.to / "vdb.qcow2").read_text() == "mine"
    assert os.listdir(one.to) == ["vdb.qcow2"]


def test_a_machine_that_does_not_start_leaves_nothing(one: Place) -> None:
    (one.box.directory / "short").write_bytes(bytes(1000))
    error = one.boot("--firmware", one.box.directory / "short", halt=False).end()
    assert error["code"] == "program-failed"
    assert not one.to.exists()
    assert list((one.box.directory / "state" / "run").glob("boot-*")) == []


def test_more_memory_than_there_is_is_refused() -> None:
    found = hardware.standard("web01", ["vda"], architecture=qemu.architecture())
    with pytest.raises(errors.NotEnoughMemory):
        bootmachine.require_memory(replace(found, memory=1 << 46))


@pytest.mark.slow
def test_a_second_command_on_the_same_machine_is_busy(one: Place) -> None:
    command = one.boot("--limit-rate", "100K")
    one.runs(command.started())
    error = one.boot().end()
    assert (error["code"], error["exit_code"]) == ("busy", 11)
    assert command.process.poll() is None


@pytest.mark.slow
def test_another_point_is_not_mixed_into_a_machine(one: Place) -> None:
    command = one.boot(*SLOW)
    one.runs(command.started())
    command.kill()
    error = one.boot("20200101T000000Z-00000000").end()
    assert (error["code"], error["exit_code"]) == ("usage", 2)


def test_a_damaged_range_is_an_io_error_just_there(one: Place) -> None:
    """Everything else becomes whole; the command stays with the machine, and ends with it: 13."""
    [image] = one.box.repository.glob("*/*/vda.qcow2")
    stored = bytearray(image.read_bytes())
    at = stored.index(model(one)["vda"][MiB + 8192 : MiB + 8192 + 64])
    stored[at] ^= 1
    image.write_bytes(stored)
    command = one.boot()
    facts = command.started()
    one.runs(facts)
    while not any("needs this command as long as it runs" in note for note in command.notes()):
        command.until(type="note")
    assert "ailed" not in (one.to / "qemu.log").read_text()
    for target, start in [("vda", 0), ("vdb", MiB), ("vda", MiB)]:
        one.io(facts, target, f"read {start} {MiB}")
    said = [line for line in (one.to / "qemu.log").read_text().splitlines() if "read" in line]
    assert [line.partition(":")[2].strip() for line in said if "failed" in line] == ["Input/output error"]
    assert len([line for line in said if line.startswith("read 1048576/1048576 bytes")]) == 2
    assert command.process.poll() is None
    one.qmp(facts, "quit")
    error = command.end()
    assert (error["code"], error["exit_code"]) == ("verification-failed", 13)
    assert "of vda (the first at offset 1048576) are damaged in the repository" in error["message"]
    assert one.content("vdb") == model(one)["vdb"]


@pytest.mark.parametrize("text", ["tap", "bridge", "bridge=../x", "user=1", "bridge=a,b", "bridge="])
def test_networks_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(errors.UsageError):
        booting_flow.network(text)
