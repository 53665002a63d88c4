"""Rolling a machine's own disks back: on every bus, running and off, in both kinds of repository."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import rolling
from jsonkit import mismatches
from kit import Box, MakeBox, last_json
from pullback import errors
from pullback.cli import documents
from pullback.engine import exports, monitor, swap
from pullback.flows import rollback as flow
from pullback.model import rollbacks as values
from pullback.model import urls
from pullback.model.exports import NbdAddress
from pullback.model.rollbacks import After
from pullback.programs import qemu, storage_daemon
from pullback.progress import Silent
from pullback.transfer import NbdEndpoint
from pullback.units import KiB, MiB
from victim import eventually, running

BOTH = pytest.mark.parametrize("kind", ["dir", "restic"])
#: One of them as a rule.
RESTIC = pytest.mark.parametrize("kind", [pytest.param("dir", marks=pytest.mark.slow), "restic"])


def went_back(box: Box, image: dict[str, bytes]) -> None:
    """The disks are as they were then, nothing is left, and the model says so from now on."""
    for target, wanted in image.items():
        assert rolling.content(box, target) == wanted, target
        box.model[target][:] = wanted
    assert box.leftovers() == []
    assert list((box.directory / "state" / "rollbacks").glob("*")) == []


def goes_on(box: Box) -> None:
    """The next backup is an increment, and exact."""
    first = box.disks[0].id
    box.write(first, 211, 3 * MiB + 512, 70 * KiB)
    report = box.backup()
    assert report.broken == ()
    assert all(disk.parent is not None for disk in report.point.disks), report.notes
    assert box.restored() == box.image()


@BOTH
def test_a_running_machine_goes_back_and_its_next_backup_is_an_increment(make_box: MakeBox, kind: str) -> None:
    box = make_box(kind=kind)
    box.scramble("vda", 1, 0, 3 * MiB)
    box.write("vdb", 2, MiB, 2 * MiB)
    point = box.backup().point
    before = box.image()
    box.write("vda", 3, MiB, 64 * KiB)
    box.zero("vda", 2 * MiB, MiB)
    box.write("vdb", 4, 5 * MiB, 100_000)
    box.backup()
    box.write("vda", 5, 7 * MiB, 512)
    box.discard("vdb", MiB, MiB)

    report = rolling.roll(box, point.id)

    by_target = {disk.target: disk for disk in report.disks}
    assert all(disk.by_bitmaps for disk in report.disks)
    # One chunk was zeroed and comes back, one was written; one had been nothing, and is that again.
    assert (by_target["vda"].changed, by_target["vda"].data, by_target["vda"].zeroes) == (3 * MiB, 2 * MiB, MiB)
    assert by_target["vdb"].changed == 2 * MiB
    assert report.after is After.RUN
    assert box.command("query-status")["status"] == "running"
    went_back(box, before)
    goes_on(box)
    box.quit()
    rolling.checked(box)


@BOTH
def test_a_machine_that_is_off_goes_back(make_box: MakeBox, kind: str) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a")), qemu.Disk(id="vdb", path=Path("b"), format="raw"), kind=kind)
    box.scramble("vda", 1, 0, 3 * MiB)
    box.scramble("vdb", 2, MiB, MiB)
    point = box.backup().point
    before = box.image()
    box.write("vda", 3, MiB, 64 * KiB)
    box.write("vdb", 3, 6 * MiB, 64 * KiB)
    box.backup()
    box.quit()
    report = rolling.roll(box, point.id[:20], **rolling.off(box))
    assert {disk.target: disk.by_bitmaps for disk in report.disks} == {"vda": True, "vdb": False}
    assert {disk.target: disk.changed for disk in report.disks} == {"vda": MiB, "vdb": MiB}
    for target, wanted in before.items():
        assert rolling.content(box, target) == wanted
        box.model[target][:] = wanted
    rolling.checked(box)
    box.start()
    again = box.backup()
    assert {disk.target: disk.parent is not None for disk in again.point.disks} == {"vda": True, "vdb": False}
    assert box.restored() == box.image()


def on_every_bus() -> list[Any]:
    """Each bus and style, the traps' list."""
    found: list[tuple[qemu.Bus, qemu.Style, str | None]] = []
    found += [(bus, style, None) for bus in qemu.Bus for style in qemu.Style]
    found += [(bus, style, "io0") for bus in (qemu.Bus.VIRTIO, qemu.Bus.SCSI) for style in qemu.Style]
    often = {(qemu.Bus.VIRTIO, qemu.Style.DRIVE), (qemu.Bus.SCSI, qemu.Style.DRIVE)}
    return [
        pytest.param(
            *one,
            id="-".join([one[0].value, one[1].value, one[2] or "main"]),
            marks=[] if one[1] is qemu.Style.BLOCKDEV or one[:2] in often else [pytest.mark.slow],
        )
        for one in found
    ]


@pytest.mark.parametrize(("bus", "style", "iothread"), on_every_bus())
def test_disks_on_every_bus_go_back(make_box: MakeBox, bus: qemu.Bus, style: qemu.Style, iothread: str | None) -> None:
    box = make_box(qemu.Disk(id="d", path=Path("d.qcow2"), bus=bus, style=style, iothread=iothread), size=2 * MiB)
    node = box.command("query-block")[0]["inserted"]["node-name"]
    box.write("d", 1, 0, MiB)
    box.backup()
    before = box.image()
    foreign = {"node": node, "name": "somebody's", "persistent": True}
    box.command("block-dirty-bitmap-add", foreign)
    box.write("d", 2, 64 * KiB, 64 * KiB)
    report = rolling.roll(box)
    assert [disk.changed for disk in report.disks] == [MiB]
    block = box.command("query-block")[0]["inserted"]
    assert block["node-name"] == node
    theirs = next(one for one in block["dirty-bitmaps"] if one["name"] == "somebody's")
    assert theirs["recording"]
    assert theirs["count"] >= MiB  # what we wrote counts like a guest's
    went_back(box, before)
    box.write("d", 7, 0, 64 * KiB)
    again = box.backup()
    assert again.broken == ()
    assert list(box.restored().values()) == list(box.image().values())


def test_a_usb_disk_and_a_throttled_one_go_back(make_box: MakeBox, short_dir: Path) -> None:
    file = {"driver": "file", "filename": str(short_dir / "u.qcow2"), "node-name": "u-file"}
    format = {"driver": "qcow2", "file": "u-file", "node-name": "u-format"}
    throttle = {"driver": "throttle", "throttle-group": "slow", "file": "u-format", "node-name": "u-slow"}
    words = ["-object", "throttle-group,id=slow,x-iops-total=100000"]
    for node in (file, format, throttle):
        words += ["-blockdev", json.dumps(node)]
    words += ["-device", "qemu-xhci,id=xhci", "-device", "usb-storage,id=u,bus=xhci.0,drive=u-slow"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", short_dir / "u.qcow2", "2M"], check=True)
    box = make_box(qemu.Disk(id="vda", path=Path("a")), extra=words, size=2 * MiB)
    qdev = next(one["qdev"] for one in box.command("query-block") if "/u" in one["qdev"])
    qemu.hmp(box.hmp, f'qemu-io -d {qdev} "write -P 9 0 1M"')
    box.backup()
    qemu.hmp(box.hmp, f'qemu-io -d {qdev} "write -P 8 0 1M"')
    report = rolling.roll(box)
    assert {disk.target: disk.changed for disk in report.disks} == {"vda": 0, "sda": MiB}
    assert box.restored()["sda"] == bytes([9]) * MiB + bytes(MiB)
    assert box.backup().broken == ()
    assert box.restored()["sda"] == bytes([9]) * MiB + bytes(MiB)
    roots = [one["inserted"]["node-name"] for one in box.command("query-block") if one["qdev"] == qdev]
    assert roots == ["u-slow"]
    assert box.leftovers() == []


def test_what_the_guest_has_meanwhile_fails_every_request(short_dir: Path) -> None:
    """In a storage daemon, where it can be written to from outside."""

    async def serve(daemon: Path) -> None:
        async with monitor.connect(daemon) as qmp:
            await qmp.execute("blockdev-add", swap.placeholder("hold", 8 * MiB))
            address = {"type": "unix", "data": {"path": str(short_dir / "nbd.sock")}}
            await qmp.execute("nbd-server-start", {"addr": address})
            await exports.add_nbd(qmp, id="hold", node="hold", name="hold", writable=True)

    with storage_daemon.start(short_dir / "qmp.sock") as daemon:
        daemon.wait_ready()
        asyncio.run(serve(daemon.qmp))
        address = NbdAddress(socket=short_dir / "nbd.sock", export="hold")
        with NbdEndpoint(address, writable=True) as endpoint, endpoint.channel() as channel:
            assert endpoint.size == 8 * MiB
            with pytest.raises(errors.EndpointFailed, match="No space left"):
                channel.read_into(0, bytearray(4096), 4096)
            with pytest.raises(errors.EndpointFailed, match="No space left"):
                channel.trim(0, MiB)
            with pytest.raises(errors.DestinationFull):
                channel.write(0, bytes(4096), 0, 4096)
            with pytest.raises(errors.DestinationFull):
                channel.zero(0, MiB)
            with pytest.raises(errors.DestinationFull):
                channel.flush()


@pytest.mark.parametrize("style", list(qemu.Style))
def test_while_disks_are_held_the_guest_has_placeholders(make_box: MakeBox, style: qemu.Style) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a"), style=style), qemu.Disk(id="vdb", path=Path("b"), style=style))
    box.write("vda", 1, 0, MiB)
    box.backup()
    box.write("vda", 2, 0, MiB)
    seen: list[object] = []

    class Looking(Silent):
        def start(self, subject: str, total: int) -> None:
            if subject == "vda write":
                blocks = [one["inserted"] for one in box.command("query-block")]
                seen.extend((one["drv"], one["image"]["virtual-size"]) for one in blocks)
                seen.append(box.command("query-status")["status"])

    rolling.roll(box, progress=Looking())
    assert seen == [("blkdebug", 8 * MiB), ("blkdebug", 8 * MiB), "prelaunch"]
    assert box.leftovers() == []


class Continuing:
    """Somebody continues the machine at a chosen moment, on another monitor."""

    def __init__(self, box: Box, subject: str) -> None:
        self._box, self._subject = box, subject
        self.seen: list[str] = []

    def start(self, subject: str, total: int) -> None:
        if subject == self._subject:
            self._box.command("cont")
            self.seen.append(subject)
            eventually(lambda: not running(self._box), seconds=5, what="the machine stopped again")

    def advance(self, subject: str, done: int) -> None:
        pass

    def finish(self, subject: str) -> None:
        pass

    def note(self, message: str) -> None:
        self.seen.append(message)


@pytest.mark.parametrize("moment", ["vda compare", "vda write", "vdb check"])
def test_a_machine_that_somebody_continues_is_stopped_and_reset_again(box: Box, moment: str) -> None:
    box.scramble("vda", 1, 0, 2 * MiB)
    box.backup()
    before = box.image()
    for disk in ("vda", "vdb"):
        box.write(disk, 2, 0, 64 * KiB)
    somebody = Continuing(box, moment)
    report = rolling.roll(box, progress=somebody, after=After.HELD)
    assert somebody.seen == [moment]
    assert "reset again" in report.notes[-1]
    assert box.command("query-status")["status"] == "prelaunch"
    went_back(box, before)


@pytest.mark.parametrize("after", list(After))
def test_what_becomes_of_the_machine_is_as_asked_for(box: Box, after: After) -> None:
    box.write("vda", 1, 0, 64 * KiB)
    box.backup()
    before = box.image()
    box.write("vda", 2, 0, 64 * KiB)
    assert rolling.roll(box, after=after).after is after
    if after is After.QUIT:
        assert box.process is not None
        assert box.process.wait(10) == 0
        assert rolling.content(box, "vda") == before["vda"]
        rolling.checked(box)
        box.process.close()
        box.start()
        went_back(box, before)
        goes_on(box)
        return
    assert box.command("query-status")["status"] == {After.RUN: "running", After.HELD: "prelaunch"}[after]
    went_back(box, before)


def test_a_machine_that_stood_still_stands_still_afterwards(box: Box) -> None:
    box.write("vda", 1, 0, 64 * KiB)
    box.backup()
    box.command("stop")
    assert rolling.roll(box).after is After.HELD
    assert box.command("query-status")["status"] == "prelaunch"
    assert rolling.roll(box, after=After.RUN).after is After.RUN
    assert box.command("query-status")["status"] == "running"


@pytest.mark.parametrize("words", [["-no-reboot"], ["-action", "panic=none,reboot=shutdown"]])
def test_a_qemu_that_ends_at_a_reset_goes_back_only_to_end(make_box: MakeBox, words: list[str]) -> None:
    box = make_box(extra=words)
    box.write("vda", 1, 0, 64 * KiB)
    box.backup()
    before = box.image()
    box.write("vda", 2, 0, 64 * KiB)
    with pytest.raises(errors.Unsupported, match="ends at a reset"):
        rolling.roll(box)
    assert box.command("query-status")["status"] == "running"
    rolling.roll(box, after=After.QUIT)
    assert box.process is not None
    assert box.process.wait(10) == 0
    assert rolling.content(box, "vda") == before["vda"]


# -- what differs ----------------------------------------------------------------------------


@RESTIC
def test_without_bitmaps_the_whole_disk_is_compared_and_only_what_differs_is_written(
    make_box: MakeBox, kind: str
) -> None:
    box = make_box(kind=kind)
    box.scramble("vda", 1, 0, 4 * MiB)
    point = box.backup().point
    before = box.image()
    box.write("vda", 3, MiB, 512)
    box.write("vdb", 3, 4 * MiB, 512)
    assert box.cli("untrack", f"qmp:{box.qmp}").returncode == 0
    report = rolling.roll(box, point.id)
    assert [(disk.by_bitmaps, disk.changed) for disk in report.disks] == [(False, MiB), (False, MiB)]
    assert all(disk.reason for disk in report.disks)
    went_back(box, before)


def test_a_raw_disk_that_shrank_and_grew_back_goes_back_whole(make_box: MakeBox) -> None:
    """Its bitmap tells nothing of it; the holes do."""
    box = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"), qemu.Disk(id="vdb", path=Path("b.qcow2")))
    for target in ("vda", "vdb"):
        box.scramble(target, 1, 0, 8 * MiB)
    box.backup()
    before = box.image()
    for disk in box.disks:
        for size in (5 * MiB + 4096, 8 * MiB):
            box.command("block_resize", {"node-name": disk.node_name, "size": size})
    report = rolling.roll(box)
    assert all(disk.by_bitmaps for disk in report.disks)
    assert {disk.target: disk.changed for disk in report.disks} == {"vda": 3 * MiB, "vdb": 3 * MiB}
    for target, wanted in before.items():
        assert rolling.content(box, target) == wanted, target


def test_zeroes_come_back_as_holes(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"))
    box.scramble("vda", 1, 0, MiB)
    box.backup()
    box.scramble("vda", 2, 4 * MiB, 4 * MiB)
    allocated = box.disks[0].path.stat().st_blocks * 512
    rolling.roll(box)
    assert box.disks[0].path.stat().st_blocks * 512 <= allocated - 4 * MiB


def test_a_disk_over_a_backing_file_goes_back(make_box: MakeBox, short_dir: Path) -> None:
    base = short_dir / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "8M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -q -P 77 0 8M", "-f", "qcow2", base], check=True)
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), start=False)
    box.disks[0].path.unlink()
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(box.disks[0].path)]
    subprocess.run(words, check=True)
    box.model["vda"][:] = bytes([77]) * 8 * MiB
    box.start()
    box.zero("vda", MiB, 2 * MiB)
    box.backup()
    before = box.image()
    box.write("vda", 5, 0, 4 * MiB)
    rolling.roll(box)
    went_back(box, before)
    goes_on(box)


# -- the safety point ------------------------------------------------------------------------


@RESTIC
def test_the_machine_as_it_was_is_kept_and_can_be_gone_back_to(make_box: MakeBox, kind: str) -> None:
    box = make_box(kind=kind)
    box.scramble("vda", 1, 0, 2 * MiB)
    point = box.backup().point
    then = box.image()
    box.scramble("vda", 2, MiB, 2 * MiB)
    now = box.image()
    report = rolling.roll(box, safety=True)
    assert report.point == point.id
    assert report.safety is not None
    assert report.safety.tags == (values.SAFETY_TAG,)
    went_back(box, then)
    assert box.restored(report.safety.id) == now
    # The latest is still the same: what was made for safety is not meant.
    assert rolling.roll(box, safety=True).point == point.id
    rolling.roll(box, report.safety.id)
    went_back(box, now)
    goes_on(box)


# -- only chosen disks, and refusals ---------------------------------------------------------


def test_only_the_named_disk_goes_back(box: Box) -> None:
    for disk in ("vda", "vdb"):
        box.write(disk, 1, 0, MiB)
    box.backup()
    then = box.image()
    for disk in ("vda", "vdb"):
        box.write(disk, 2, 0, MiB)
    report = rolling.roll(box, only=("vdb",))
    assert [disk.target for disk in report.disks] == ["vdb"]
    went_back(box, {"vda": bytes(box.model["vda"]), "vdb": then["vdb"]})
    goes_on(box)


def refused(box: Box, kind: type[errors.PullbackError], match: str, **changes: Any) -> None:
    """It is, and nothing was done."""
    before = box.image()
    status = box.command("query-status")["status"]
    with pytest.raises(kind, match=match):
        rolling.roll(box, **changes)
    assert box.command("query-status")["status"] == status
    assert {target: rolling.content(box, target) for target in before} == before
    assert box.leftovers() == []
    assert list((box.directory / "state" / "rollbacks").glob("*")) == []


def test_a_disk_of_another_size_is_refused(box: Box) -> None:
    box.backup()
    box.command("block_resize", {"node-name": "vda-format", "size": 9 * MiB})
    box.model["vda"].extend(bytes(MiB))
    refused(box, errors.DisksDiffer, "vda has 9437184 bytes, and had 8388608")


def test_other_disks_than_the_points_are_refused_unless_named(make_box: MakeBox) -> None:
    box = make_box()
    box.backup(only=("vda",))
    refused(box, errors.DisksDiffer, "does not have its disk vdb")
    refused(box, errors.UnknownDisk, "vdb", only=("vdb",))
    rolling.roll(box, only=("vda",))
    box.backup()
    box.quit()
    alone = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")))
    alone.directory.joinpath("repo").symlink_to(box.repository)
    refused(alone, errors.DisksDiffer, "has no disk vdb")


def test_disks_that_changed_their_places_are_refused(make_box: MakeBox) -> None:
    box = make_box()
    box.backup()
    box.quit()
    first, second = box.disks
    first.path.rename(box.directory / "x")
    second.path.rename(first.path)
    (box.directory / "x").rename(second.path)
    box.start()
    refused(box, errors.DisksDiffer, "changed their places")


def test_another_machines_point_is_refused(make_box: MakeBox) -> None:
    box = make_box()
    point = box.backup(name="db01").point
    refused(box, errors.NoPoints, "no restore point of web01")
    refused(box, errors.NoPoints, "no restore point of web01", point=point.id)
    box.backup()
    refused(box, errors.UnknownPoint, point.id, point=point.id)


def test_what_holds_a_disk_is_told(box: Box) -> None:
    box.backup()
    with Mirroring(box):
        refused(box, errors.DiskBusy, "mirror")
    done = box.cli("snapshot", "create", f"qmp:{box.qmp}")
    assert done.returncode == 0, done.stderr
    before = box.command("query-status")
    with pytest.raises(errors.BusyError, match="the snapshot snapshot-"):
        rolling.roll(box)
    assert box.command("query-status") == before


class Mirroring:
    """Somebody's mirror job on vda."""

    def __init__(self, box: Box) -> None:
        self._box = box

    def __enter__(self) -> None:
        arguments: dict[str, object] = {
            "job-id": "theirs",
            "device": "vda-format",
            "target": str(self._box.directory / "mirror.qcow2"),
            "format": "qcow2",
            "sync": "full",
        }
        self._box.command("drive-mirror", arguments)

    def __exit__(self, *_: object) -> None:
        self._box.command("block-job-cancel", {"device": "theirs", "force": True})


def test_who_only_reads_a_disk_is_no_hindrance(box: Box) -> None:
    box.write("vda", 1, 0, MiB)
    box.backup()
    before = box.image()
    box.write("vda", 2, 0, MiB)
    node = {"driver": "raw", "node-name": "theirs", "file": "vda-format", "read-only": True}
    box.command("blockdev-add", node)
    rolling.roll(box)
    box.command("blockdev-del", {"node-name": "theirs"})
    went_back(box, before)


def test_a_foreign_nbd_server_is_respected(box: Box) -> None:
    box.backup()
    address = {"type": "unix", "data": {"path": str(box.directory / "theirs.sock")}}
    box.command("nbd-server-start", {"addr": address})
    before = box.command("query-status")
    with pytest.raises(errors.NbdServerBusy):
        rolling.roll(box)
    assert box.command("query-status") == before
    box.command("nbd-server-stop")
    rolling.roll(box)


def test_too_little_room_for_staging_is_told_first(box: Box, mount: Any) -> None:
    box.scramble("vda", 1, 0, 6 * MiB)
    point = box.backup().point
    box.scramble("vda", 2, 0, 6 * MiB)
    box.backup()
    small = mount.tmpfs(8 * MiB)
    refused(box, errors.StagingSpace, "8.00 MiB", point=point.id, staging=small)
    assert list(small.iterdir()) == []
    other = box.directory / "elsewhere"
    rolling.roll(box, point.id, staging=other)
    assert list(other.iterdir()) == []


# -- the command line ------------------------------------------------------------------------


@RESTIC
def test_a_dry_run_tells_how_much_and_why_and_does_nothing(make_box: MakeBox, kind: str) -> None:
    box = make_box(kind=kind)
    box.scramble("vda", 1, 0, 3 * MiB)
    point = box.backup().point
    box.scramble("vda", 2, 0, 2 * MiB)
    box.backup()
    box.write("vda", 3, 7 * MiB, 512)
    place = box.repository if kind == "restic" else f"dir:{box.repository}"
    words = ["rollback", f"qmp:{box.qmp}", point.id, "-r", place, "--dry-run"]
    done = box.cli(*words, "--json")
    assert done.returncode == 0, done.stderr
    found = last_json(done.stdout)
    assert mismatches(found, documents.RESULTS["rollback"][1].fields) == []
    vda, vdb = found["disks"]
    assert (vda["by_bitmaps"], vda["bytes"], vda["written_since"]) == (True, 3 * MiB, MiB)
    assert (vdb["bytes"], vdb["written_since"]) == (0, 0)
    assert box.command("query-status")["status"] == "running"
    assert len(box.points()) == 2
    assert box.leftovers() == []
    assert "3.00 MiB of 8.00 MiB" in box.cli(*words).stdout
    box.cli("untrack", f"qmp:{box.qmp}")
    assert "found by reading it whole, because" in box.cli(*words).stdout


def test_the_command_says_what_it_did(box: Box) -> None:
    box.write("vda", 1, 0, MiB)
    box.backup()
    before = box.image()
    box.write("vda", 2, 0, MiB)
    done = box.cli("rollback", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}", "--json", "--limit-rate", "100M")
    assert done.returncode == 0, done.stderr
    found = last_json(done.stdout)
    assert mismatches(found, documents.RESULTS["rollback"][0].fields) == []
    assert found["safety"] == box.points()[-1].id
    went_back(box, before)
    box.write("vda", 2, 0, MiB)
    done = box.cli("rollback", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}", "--after", "held", "--no-safety")
    assert "it is held" in done.stdout
    assert box.cli("rollback", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}", "--abandon").returncode == 2


def test_a_machine_that_is_off_has_no_afterwards(box: Box) -> None:
    box.backup()
    box.quit()
    with pytest.raises(errors.UsageError, match="is off"):
        rolling.roll(box, after=After.RUN, **rolling.off(box))


def test_the_command_to_finish_names_everything() -> None:
    images = urls.ImagesMachine(images=(urls.Image(target="vda", path=Path("/a,b"), format="raw"),))
    place = urls.DirectoryRepository(path=Path("/r"))
    said = flow.command_for(images, "web01", "20261124T060018Z-1f2e3d4c", place)
    assert said == "pullback rollback images:vda=raw:/a,,b --name web01 20261124T060018Z-1f2e3d4c -r dir:/r"
