"""The small guest, and the QEMU it runs in: what other tests and the demo rely on."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pullback import errors
from pullback.guest import build, cpio, disks, modules, packages, records, run, turns, vmlinux
from pullback.programs import qemu, qemu_img
from pullback.units import GiB, KiB, MiB

INSIDE = Path(build.__file__).parent / "inside"


@pytest.fixture(scope="module")
def small() -> build.SmallGuest:
    """The guest, from the usual cache."""
    return build.guest(Path(os.environ.get("PULLBACK_GUEST_CACHE", build.CACHE)))


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory whose path is short enough for sockets."""
    path = tmp_path_factory.mktemp("g")
    yield path
    shutil.rmtree(path)


def raw_disk(place: Path, id: str, *, bus: qemu.Bus = qemu.Bus.VIRTIO, iothread: str | None = None) -> qemu.Disk:
    path = place / f"{id}.raw"
    qemu_img.create(path, 64 * MiB, format="raw")
    return qemu.Disk(id=id, path=path, format="raw", bus=bus, iothread=iothread)


def file_disk(place: Path, *, size: int = 256 * MiB, filler: int = 8 * MiB) -> qemu.Disk:
    path = place / "disk.qcow2"
    disks.make(path, size, filler=filler)
    return qemu.Disk(id="disk0", path=path)


# -- values: no guest ------------------------------------------------------------------------


def record(number: int) -> bytes:
    head = b"%010d %010d %08x " % (number, 1_700_000_000, 0xC0FFEE)
    return head + b"%08x\n" % zlib.crc32(head)


def test_records_are_read_up_to_a_torn_end() -> None:
    content = b"".join(record(number) for number in range(1, 101)) + record(101)[:17]
    assert records.parse(content) == records.Records(last=100, problem=None)


@pytest.mark.parametrize(
    ("at", "byte", "problem"),
    [(40 * 7 + 3, b"9", "record 8 has a wrong checksum"), (40 * 2, b"\0", "record 3 is no record")],
)
def test_a_damaged_record_is_named(at: int, byte: bytes, problem: str) -> None:
    content = bytearray(b"".join(record(number) for number in range(1, 11)))
    content[at : at + 1] = byte
    found = records.parse(bytes(content))
    assert found == records.Records(last=at // 40, problem=problem)


def test_a_missing_record_is_a_gap() -> None:
    content = b"".join(record(number) for number in (1, 2, 4, 5))
    assert records.parse(content) == records.Records(last=2, problem="record 3 is numbered 4")


def write_turn(image: Path, number: int) -> None:
    with image.open("r+b") as disk:
        spacing = disk.seek(0, 2) // turns.SLOTS // 4096 * 4096
        disk.seek(number % turns.SLOTS * spacing)
        mark = b"PBTURN %016d" % number
        disk.write(mark.ljust(4096 - len(mark), b"\0") + mark)


def test_turns_without_a_gap_are_found_and_a_lost_one_is_named(tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    qemu_img.create(image, 4 * MiB, format="raw")
    assert turns.read(image) == turns.Turns(newest=0, problems=())
    for number in range(1, 301):
        write_turn(image, number)
    assert turns.read(image) == turns.Turns(newest=300, problems=())
    write_turn(image, 299 - turns.SLOTS)  # as if the write of 299 had been lost
    assert turns.read(image).problems == ("counter 299 is missing; 43 stands there",)


def test_modules_come_after_what_they_need() -> None:
    objects = {"a": b"\0depends=b,c-d\0", "b": b"\0depends=\0softdep=pre: e\0", "c_d": b"\0depends=b\0", "e": b""}
    found = modules.ordered(["a", "not-there"], objects.get)
    assert [module.name for module in found] == ["e", "b", "c_d", "a"]


def test_only_libraries_and_the_kernel_follow_from_a_package() -> None:
    listing = """\
kernel
  Depends: linux-image-6.1.0-9-cloud-amd64
linux-image-6.1.0-9-cloud-amd64
  Depends: kmod
 |Depends: initramfs-tools
  Depends: <linux-initramfs-tool>
agent
  PreDepends: init-system-helpers
 |Depends: liba
  Depends: libb
  Depends: libc6:i386
liba
  Depends: libz1
"""
    found = packages.closure(["kernel", "agent"], listing)
    assert found == ["agent", "kernel", "liba", "libz1", "linux-image-6.1.0-9-cloud-amd64"]


def test_an_archive_is_read_by_cpio(tmp_path: Path) -> None:
    archive = cpio.archive([cpio.file("a/b/c", b"content", executable=True), cpio.link("l", "a/b/c")])
    subprocess.run(["cpio", "-id", "--quiet"], cwd=tmp_path, input=archive, check=True)
    assert (tmp_path / "l").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "a/b/c").stat().st_mode) == 0o755


def test_what_is_no_kernel_has_no_elf_kernel_in_it() -> None:
    assert vmlinux.extract(bytes(4096), lambda format, stream: stream) is None


@pytest.mark.parametrize("path", sorted(INSIDE.glob("*.pl")), ids=lambda path: path.name)
def test_programs_of_the_guest_are_strict_perl(path: Path) -> None:
    # The guest has no strict.pm, so this is where a misspelt variable is found.
    done = subprocess.run(["perl", "-Mstrict", "-Mwarnings", "-c", path], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("syntax OK")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["init", "agent", "shutdown"])
def test_scripts_of_the_guest_are_valid(name: str) -> None:
    subprocess.run(["sh", "-n", INSIDE / name], check=True)


def test_devices_are_named_as_the_guest_names_them() -> None:
    kinds = [qemu.Bus.SATA, qemu.Bus.VIRTIO, qemu.Bus.NVME, qemu.Bus.SCSI, qemu.Bus.VIRTIO, qemu.Bus.NVME]
    some = [qemu.Disk(id=f"d{number}", path=Path("x"), bus=bus) for number, bus in enumerate(kinds)]
    names = [run.device(some, disk.id) for disk in some]
    assert names == ["/dev/sdb", "/dev/vda", "/dev/nvme0n1", "/dev/sda", "/dev/vdb", "/dev/nvme1n1"]
    with pytest.raises(errors.UnknownDisk):
        run.device(some, "other")


def test_a_mode_becomes_words_of_the_kernel() -> None:
    some = [qemu.Disk(id=id, path=Path("x")) for id in ("one", "two")]
    words = run.cmdline(run.Turns(a="two", b="one", first=7), some).split()
    assert {"pb.mode=turns", "pb.a=/dev/vdb", "pb.b=/dev/vda", "pb.first=7"} <= set(words)
    assert "pb.length" not in run.cmdline(run.Load(), some)


def test_hardware_virtualization_needs_a_flag_on_x86() -> None:
    assert qemu.hardware_virtualization("x86_64", "flags\t\t: fpu vmx sse\n")
    assert qemu.hardware_virtualization("x86_64", "flags\t\t: fpu svm\n")
    assert not qemu.hardware_virtualization("x86_64", "flags\t\t: fpu sse\nbugs\t: itlb_multihit vmx\n")
    assert qemu.hardware_virtualization("aarch64", "")


def values_of(words: list[str], option: str) -> list[str]:
    return [words[index + 1] for index, word in enumerate(words) if word == option]


def test_a_machine_becomes_a_command_line() -> None:
    machine = qemu.Machine(
        name="a,b",
        disks=[
            qemu.Disk(id="d0", path=Path("/x,y.qcow2"), iothread="io", serial="S0"),
            qemu.Disk(id="d1", path=Path("/x,y.raw"), format="raw", style=qemu.Style.DRIVE, bus=qemu.Bus.SCSI),
        ],
        qmp=[Path("/q0"), Path("/q1")],
        memory=64 * MiB,
    )
    words = qemu.argv(machine, program="qemu", accel="tcg")
    assert words[0] == "qemu"
    assert values_of(words, "-name") == ["guest=a,,b"]
    assert values_of(words, "-m") == ["64M"]
    assert values_of(words, "-object") == ["iothread,id=io"]
    assert values_of(words, "-mon") == ["chardev=qmp0,mode=control", "chardev=qmp1,mode=control"]
    assert values_of(words, "-drive") == ["file=/x,,y.raw,if=none,id=d1-drive,format=raw,discard=unmap,readonly=off"]
    nodes = [json.loads(value)["node-name"] for value in values_of(words, "-blockdev")]
    assert nodes == ["d0-file", "d0-format"]
    devices = [json.loads(value) for value in values_of(words, "-device")]
    assert devices[-2:] == [
        {"driver": "virtio-blk-pci", "id": "d0", "drive": "d0-format", "serial": "S0", "iothread": "io"},
        {"driver": "scsi-hd", "bus": "controller-scsi.0", "scsi-id": 0, "id": "d1", "drive": "d1-drive"},
    ]


# -- QEMU without a guest --------------------------------------------------------------------


class Qmp:
    """Just enough of QMP for these tests."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rw")
        self.events: list[str] = []
        self._stream.readline()
        self("qmp_capabilities")

    def __call__(self, command: str) -> object:
        self._stream.write(json.dumps({"execute": command}) + "\n")
        self._stream.flush()
        while "return" not in (answer := json.loads(self._stream.readline())):
            self.events.append(answer["event"])
        return answer["return"]

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._socket.close()


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("type", ["q35", "pc"])
def test_an_idle_machine_has_all_disks_and_costs_nothing(place: Path, type: str) -> None:
    buses = [bus for bus in qemu.Bus if (bus, type) != (qemu.Bus.IDE, "q35")]
    some = [raw_disk(place, bus.value, bus=bus) for bus in buses]
    machine = qemu.Machine(
        idle=True, type=type, disks=some, qmp=[place / "q0", place / "q1"], hmp=place / "hmp", name="idle"
    )
    with qemu.start(machine) as running, Qmp(machine.qmp[0]) as first, Qmp(machine.qmp[1]) as second:
        begin = processor_seconds(running.pid)
        for command in ("stop", "cont"):
            first(command)
        assert second("query-status") == {"status": "running", "running": True} | _singlestep(second)
        assert first.events == ["STOP", "RESUME"]
        listing = qemu.hmp(place / "hmp", "info block")
        assert all(disk.path.name in listing for disk in some)
        time.sleep(0.5)
        assert processor_seconds(running.pid) - begin < 0.2
        second("quit")
        assert running.wait(10) == 0


def _singlestep(monitor: Qmp) -> dict[str, object]:
    """QEMU before 9.0 still has this member in its status."""
    status = monitor("query-status")
    assert isinstance(status, dict)
    return {name: value for name, value in status.items() if name == "singlestep"}


def test_a_machine_that_cannot_start_says_why(place: Path) -> None:
    missing = qemu.Disk(id="d", path=place / "missing.qcow2")
    with pytest.raises(errors.ProgramFailed, match="No such file"):
        qemu.start(qemu.Machine(idle=True, disks=[missing], qmp=[place / "q"]))


def test_a_locked_image_is_found_at_the_start(place: Path) -> None:
    disk = raw_disk(place, "d")
    machine = qemu.Machine(idle=True, disks=[disk], qmp=[place / "q0"])
    other = qemu.Machine(idle=True, disks=[disk], qmp=[place / "q1"])
    with qemu.start(machine), pytest.raises(errors.ProgramFailed, match="lock"):
        qemu.start(other)


# -- the guest -------------------------------------------------------------------------------


@pytest.mark.guest
def test_the_guest_comes_from_the_cache_at_once(small: build.SmallGuest) -> None:
    begin = time.monotonic()
    assert build.guest(small.kernel.parent.parent) == small
    assert time.monotonic() - begin < 0.2


@pytest.mark.guest
def test_two_may_build_at_once_and_need_no_network(
    small: build.SmallGuest, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = place / f"packages-{small.version}"
    root.symlink_to(small.kernel.parent.parent / root.name)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    found: list[build.SmallGuest] = []
    builders = [threading.Thread(target=lambda: found.append(build.guest(place))) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(100)
    assert found[0] == found[1]
    assert found[0].initrd.read_bytes() == small.initrd.read_bytes()
    assert sorted(path.name for path in place.iterdir()) == [found[0].kernel.parent.name, "lock", root.name]


@pytest.mark.guest
def test_records_survive_power_off_and_power_failure(small: build.SmallGuest, place: Path) -> None:
    disk = file_disk(place)
    with run.boot(small, run.Writer(interval=5), disks=[disk], directory=place) as guest:
        guest.wait_ready()
        guest.wait_for_record(40)
        guest.power_off()
        clean = guest.last_record()
        assert guest.io_errors() == []
    assert disks.check(disk.path, format="qcow2") == disks.Verdict(last_record=clean, problem=None)

    with run.boot(small, run.Writer(interval=5), disks=[disk], directory=place) as guest:
        assert guest.wait_for_check() == clean
        durable = guest.wait_for_record(clean + 40)
        guest.kill()
        said = guest.last_record()
    verdict = disks.check(disk.path, format="qcow2")
    assert verdict.problem is None
    assert durable <= said <= verdict.last_record <= said + 1

    with run.boot(small, run.Check(), disks=[disk], directory=place) as guest:
        assert guest.wait_for_check() == verdict.last_record
        guest.wait_off()


@pytest.mark.guest
def test_damage_is_found_on_the_host_and_in_the_guest(small: build.SmallGuest, place: Path) -> None:
    disk = file_disk(place)
    with run.boot(small, run.Writer(interval=5), disks=[disk], directory=place) as guest:
        guest.wait_for_record(120)  # more than the first of three blocks of records
        guest.power_off()
    raw = place / "damaged.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk.path, raw], check=True)
    content = raw.read_bytes()
    at = content.rindex(b"\n0000000105 ") + 15
    with raw.open("r+b") as image:
        image.seek(at)
        image.write(b"X")
    assert disks.check(raw) == disks.Verdict(last_record=104, problem="record 105 is no record")
    damaged = qemu.Disk(id="disk0", path=raw, format="raw")
    with (
        run.boot(small, run.Check(), disks=[damaged], directory=place) as guest,
        pytest.raises(errors.ProgramFailed, match="record 105 is damaged"),
    ):
        guest.wait_for_check()


@pytest.mark.guest
@pytest.mark.parametrize("bus", [qemu.Bus.VIRTIO, qemu.Bus.SCSI, qemu.Bus.NVME])
def test_turns_alternate(small: build.SmallGuest, place: Path, bus: qemu.Bus) -> None:
    # Raw images: a write that the guest saw complete is in the file, whenever QEMU is killed.
    iothread = None if bus is qemu.Bus.NVME else "io"
    a, b = raw_disk(place, "a", iothread="io"), raw_disk(place, "b", bus=bus, iothread=iothread)
    with run.boot(small, run.Turns(a="a", b="b"), disks=[a, b], directory=place) as guest:
        line = guest.console.wait_until(r"^PB-TURN (\d+) rate=", lambda match: int(match[1]) > turns.SLOTS, 60)
        told = int(line[1])
        guest.kill()
        assert guest.io_errors() == []
    first, second = turns.read(a.path), turns.read(b.path)
    assert first.problems == second.problems == ()
    assert second.newest >= told
    assert first.newest - second.newest in (0, 1)


@pytest.mark.guest
def test_load_on_an_iothread_disk_is_without_errors(small: build.SmallGuest, place: Path) -> None:
    disk = raw_disk(place, "d", bus=qemu.Bus.SCSI, iothread="io")
    mode = run.Load(start=16 * MiB, length=16 * MiB, jobs=2)
    with run.boot(small, mode, disks=[disk], directory=place) as guest:
        guest.console.wait_for_line(r"^PB-LOAD job=1 writes=\d+", 60)
        assert guest.io_errors() == []
        assert 0 < guest.slowest_write() < 30
        guest.power_off()
    content = disk.path.read_bytes()
    assert any(content[16 * MiB : 32 * MiB])
    assert not any(content[: 16 * MiB])
    assert not any(content[32 * MiB :])


@pytest.mark.guest
def test_failing_io_is_told(small: build.SmallGuest, place: Path) -> None:
    rules = place / "rules"
    rules.write_text('[inject-error]\nevent = "none"\niotype = "write"\nerrno = "5"\n')
    image = Path(f"blkdebug:{rules}:{raw_disk(place, 'd').path}")
    disk = qemu.Disk(id="d", path=image, format="raw", style=qemu.Style.DRIVE)
    with run.boot(small, run.Load(jobs=1), disks=[disk], directory=place) as guest:
        guest.console.wait_for_line(r"^PB-IOERROR /dev/vda offset \d+: Input/output error", 60)
        guest.console.wait_for_line(r"^PB-IOERROR kernel: .*I/O error, dev vda", 60)
        assert len(guest.io_errors()) >= 2


@pytest.mark.guest
def test_the_agent_answers_and_shuts_down(small: build.SmallGuest, place: Path) -> None:
    with run.boot(small, run.Idle(), disks=[], directory=place) as guest:
        guest.wait_ready()
        with socket.socket(socket.AF_UNIX) as agent:
            agent.settimeout(30)
            agent.connect(str(guest.agent))
            agent.sendall(b'{"execute":"guest-sync","arguments":{"id":42}}\n')
            assert json.loads(agent.makefile().readline()) == {"return": 42}
            agent.sendall(b'{"execute":"guest-shutdown"}\n')
            guest.wait_off()


def test_a_disk_is_made_with_its_filler_and_is_clean(place: Path) -> None:
    disk = file_disk(place, size=1 * GiB, filler=32 * MiB)
    assert qemu_img.info(disk.path).virtual_size == 1 * GiB
    assert disk.path.stat().st_blocks * 512 > 32 * MiB
    assert disks.check(disk.path, format="qcow2") == disks.Verdict(last_record=0, problem=None)


def test_a_damaged_file_system_is_a_problem(place: Path) -> None:
    disks.make(place / "d.raw", 64 * MiB, filler=1 * MiB, format="raw")
    with (place / "d.raw").open("r+b") as image:
        image.seek(4 * KiB)  # group descriptors
        image.write(os.urandom(4 * KiB))
    assert disks.check(place / "d.raw").problem is not None
