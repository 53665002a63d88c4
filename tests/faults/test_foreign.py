"""Other people's bitmaps, exports, jobs, overlays and filters on the same machine: left alone, and no reason to lie."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import Box, MakeBox, last_json
from pullback import errors
from pullback.flows import backup as flow
from pullback.model.backups import Fleecing
from pullback.model.exports import NbdAddress
from pullback.model.points import Mode
from pullback.programs import qemu, qemu_img
from pullback.progress import Silent
from pullback.units import KiB, MiB
from relay import Message, Relay, Way
from victim import Victim, eventually, running

SIZE = 4 * MiB


def one_disk(make_box: MakeBox, **options: object) -> Box:
    """A machine with one small disk."""
    disk = options.pop("disk", qemu.Disk(id="vda", path=Path("a.qcow2")))
    box = make_box(disk, size=SIZE, **options)
    box.write("vda", 0x11, 0, MiB)
    return box


def serve(box: Box, *, export: bool, writable: bool = False) -> Path:
    """A foreign NBD server, with or without an export of the disk; gives its socket."""
    socket = box.directory / "foreign" / "nbd.sock"
    socket.parent.mkdir(mode=0o700)
    box.command("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(socket)}}})
    if export:
        arguments: dict[str, object] = {"type": "nbd", "id": "foreign", "node-name": "vda-format", "writable": writable}
        box.command("block-export-add", arguments)
    return socket


def increment(box: Box, **changes: object) -> flow.Report:
    """The next backup continues the chain and restores exactly."""
    report = box.backup(**changes)
    assert report.broken == ()
    assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL}
    assert box.restored() == box.image()
    assert box.leftovers() == []
    assert running(box)
    return report


class During(Silent):
    """Does something while the disks are frozen."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def start(self, subject: str, total: int) -> None:
        """The copy of a disk begins."""
        self._act()


# -- bitmaps and exports ---------------------------------------------------------------------


def test_a_foreign_bitmap_is_left_alone(make_box: MakeBox) -> None:
    box = one_disk(make_box)
    box.command("block-dirty-bitmap-add", {"node": "vda-format", "name": "theirs", "persistent": True})
    box.backup()
    box.write("vda", 0x12, 2 * MiB, 128 * KiB)
    increment(box)
    nodes = box.command("query-named-block-nodes", {"flat": True})
    [theirs] = [b for node in nodes for b in node.get("dirty-bitmaps", []) if b["name"] == "theirs"]
    assert theirs["count"] == 128 * KiB
    assert theirs["recording"]
    box.quit()
    box.start()
    increment(box)


@pytest.mark.parametrize("export", [False, True])
def test_a_foreign_nbd_server_is_not_used_unless_it_is_named(make_box: MakeBox, export: bool) -> None:
    box = one_disk(make_box)
    box.backup()
    box.write("vda", 0x12, 0, 64 * KiB)
    socket = serve(box, export=export)
    with Relay(box.directory / "relay.sock", box.qmp) as relay:
        done = box.cli("backup", f"qmp:{relay.path}", "-r", f"dir:{box.repository}", "--json")
    assert done.returncode == 11, done.stderr
    assert last_json(done.stdout)["code"] == "nbd-server-busy"
    assert "stop" not in relay.commands, "found out before the machine is touched"
    assert box.leftovers() == []
    increment(box, nbd_server=socket)
    assert [item["id"] for item in box.command("query-block-exports")] == (["foreign"] if export else [])
    with pytest.raises(errors.RefusedError, match="already running"):
        box.command("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "/nowhere"}}})


def test_a_shared_server_that_others_may_connect_to_is_refused(make_box: MakeBox) -> None:
    box = one_disk(make_box)
    socket = serve(box, export=False)
    socket.chmod(0o777)
    socket.parent.chmod(0o755)
    box.directory.chmod(0o755)
    with pytest.raises(errors.UsageError, match="open to other users"):
        box.backup(nbd_server=socket)
    assert box.leftovers() == []


def test_a_second_writer_makes_us_undo_the_filter_in_the_same_pause_and_go_classic(make_box: MakeBox) -> None:
    """share-rw: QEMU refuses the filter only after the bitmaps have switched."""
    box = make_box(size=SIZE, start=False)
    shared = box.directory / "shared.qcow2"
    qemu_img.create(shared, SIZE)
    box.extra = (
        *("-blockdev", f"driver=qcow2,node-name=shared,file.driver=file,file.filename={shared}"),
        *("-device", "virtio-blk-pci,id=shared,drive=shared,share-rw=on"),
    )
    box.start()
    socket = box.directory / "foreign.sock"
    box.command("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(socket)}}})
    box.command("block-export-add", {"type": "nbd", "id": "w", "node-name": "shared", "writable": True})
    socket.parent.chmod(0o700)
    content = bytearray(SIZE)

    def write(value: int, start: int, length: int) -> None:
        uri = NbdAddress(socket=socket, export="shared").uri
        command = ["qemu-io", "-f", "raw", "-c", f"write -P {value} {start} {length}", uri]
        subprocess.run(command, check=True, capture_output=True, timeout=20)
        content[start : start + length] = bytes([value]) * length

    write(0x31, 0, MiB)
    for step in range(3):
        box.write("vda", 0x41 + step, step * MiB, 64 * KiB)
        write(0x32 + step, step * MiB + 512, 96 * KiB)
        report = box.backup(nbd_server=socket)
        assert report.point.engine == "classic, filter"
        assert any("vdc: classic" in note and "filter was refused" in note for note in report.notes)
        assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL if step else Mode.FULL}
        assert box.restored() == {**box.image(), "vdc": bytes(content)}
        assert box.leftovers() == []
        assert running(box)
    with pytest.raises(errors.Unsupported):
        box.backup(nbd_server=socket, fleecing=Fleecing.FILTER)
    assert box.leftovers() == []
    write(0x50, 3 * MiB, 512)
    assert box.backup(nbd_server=socket).broken == ()
    assert box.restored() == {**box.image(), "vdc": bytes(content)}


# -- jobs ------------------------------------------------------------------------------------


def test_beside_a_foreign_backup_job_ours_goes_classic_and_both_are_right(make_box: MakeBox) -> None:
    box = one_disk(make_box)
    box.backup()
    target = box.directory / "theirs.qcow2"
    qemu_img.create(target, SIZE)
    file = {"driver": "file", "filename": str(target)}
    box.command("blockdev-add", {"driver": "qcow2", "node-name": "theirs", "file": file, "backing": "vda-format"})
    job: dict[str, object] = {"job-id": "theirs", "device": "vda-format", "target": "theirs", "sync": "none"}
    box.command("blockdev-backup", job)
    theirs = box.image()["vda"]
    box.write("vda", 0x12, 0, 128 * KiB)
    report = increment(box)
    assert report.point.engine == "classic"
    assert any("somebody else" in note and "theirs" in note for note in report.notes)
    box.write("vda", 0x13, 64 * KiB, 128 * KiB)
    assert [item["id"] for item in box.command("query-jobs")] == ["theirs"]
    out = box.directory / "theirs.raw"
    socket = serve(box, export=False)
    box.command("block-export-add", {"type": "nbd", "id": "t", "node-name": "theirs"})
    uri = NbdAddress(socket=socket, export="theirs").uri
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(out)], check=True, timeout=20)
    assert out.read_bytes() == theirs
    box.command("nbd-server-stop")
    box.command("block-job-cancel", {"device": "theirs"})
    eventually(lambda: box.command("query-jobs") == [], seconds=10, what="the end of their job")
    assert increment(box).point.engine == "filter"


def test_a_disk_that_is_being_mirrored_is_busy(make_box: MakeBox) -> None:
    box = one_disk(make_box)
    box.backup()
    target = box.directory / "mirror.raw"
    target.write_bytes(bytes(SIZE))
    box.command("blockdev-add", {"driver": "file", "node-name": "copy", "filename": str(target)})
    job: dict[str, object] = {"job-id": "theirs", "device": "vda-format", "target": "copy", "sync": "full"}
    box.command("blockdev-mirror", job)
    done = box.cli("backup", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}", "--json")
    assert done.returncode == 11, done.stderr
    document = last_json(done.stdout)
    assert document["code"] == "disk-busy"
    assert "mirror" in document["message"]
    assert box.leftovers() == []
    box.command("block-job-cancel", {"device": "theirs"})
    eventually(lambda: box.command("query-jobs") == [], seconds=10, what="the end of their job")
    increment(box)


# -- overlays --------------------------------------------------------------------------------


def test_an_external_snapshot_between_two_backups_means_whole_with_the_reason(make_box: MakeBox) -> None:
    box = one_disk(make_box)
    box.backup()
    overlay = box.directory / "overlay.qcow2"
    snapshot: dict[str, object] = {"node-name": "vda-format", "snapshot-file": str(overlay)}
    box.command("blockdev-snapshot-sync", {**snapshot, "snapshot-node-name": "overlay"})
    box.write("vda", 0x12, 512, 64 * KiB)
    done = box.cli("backup", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}", "--json")
    assert done.returncode == 3, done.stderr
    assert any("external snapshot" in note for note in last_json(done.stdout)["notes"])
    assert box.restored() == box.image()
    box.write("vda", 0x13, 2 * MiB, 512)
    increment(box)


def test_an_overlay_put_on_top_of_our_filter_is_never_pulled_away(make_box: MakeBox) -> None:
    """The filter stays, and says so; when the overlay was committed the next run takes the filter out."""
    box = one_disk(make_box)
    box.backup()
    box.write("vda", 0x12, 0, 64 * KiB)
    overlay = box.directory / "overlay.qcow2"

    def top() -> str:
        nodes = box.command("query-named-block-nodes", {"flat": True})
        [ours] = [node["node-name"] for node in nodes if node["drv"] == "copy-before-write"]
        return str(ours)

    def act() -> None:
        snapshot: dict[str, object] = {"node-name": top(), "snapshot-file": str(overlay)}
        box.command("blockdev-snapshot-sync", {**snapshot, "snapshot-node-name": "overlay"})

    with pytest.raises(errors.PullbackError) as caught:
        asyncio.run(flow.backup(box.request(), During(act)))
    # QEMU put the overlay under our snapshot too, so it cannot be read any more.
    assert "overlay was put on top" in " ".join([str(caught.value), *caught.value.__notes__])
    assert running(box)
    box.write("vda", 0x13, 32 * KiB, 64 * KiB)
    done = box.cli("backup", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}", "--json")
    assert done.returncode == 1
    assert last_json(done.stdout)["code"] == "cleanup-incomplete"
    box.write("vda", 0x14, 2 * MiB, 64 * KiB)
    box.command("block-commit", {"job-id": "commit", "device": "overlay", "base-node": top()})
    eventually(lambda: box.command("query-jobs")[0]["status"] == "ready", seconds=10, what="commit")
    box.command("job-complete", {"id": "commit"})
    eventually(lambda: box.command("query-jobs") == [], seconds=10, what="the end of the commit")
    increment(box)
    box.write("vda", 0x15, 3 * MiB, 512)
    increment(box)


def test_a_temporary_machine_gets_no_checkpoints_and_says_so(make_box: MakeBox) -> None:
    box = one_disk(
        make_box, disk=qemu.Disk(id="vda", path=Path("a.qcow2"), style=qemu.Style.DRIVE), extra=("-snapshot",)
    )
    for value in (1, 2):
        box.write("vda", value, 0, 64 * KiB)
        done = box.cli("backup", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}", "--json")
        assert done.returncode == 0, done.stderr
        assert any("temporary overlay" in note for note in last_json(done.stdout)["notes"])
        assert box.restored() == box.image()
    nodes = box.command("query-named-block-nodes", {"flat": True})
    assert [b for node in nodes for b in node.get("dirty-bitmaps", [])] == []
    assert box.leftovers() == []


def test_a_filter_of_the_user_between_device_and_disk_stays_where_it_is(make_box: MakeBox) -> None:
    box = one_disk(make_box, extra=("-object", "throttle-group,id=group"))
    box.command(
        "blockdev-add",
        {"driver": "throttle", "node-name": "throttle", "throttle-group": "group", "file": "vda-format"},
    )
    path = "/machine/peripheral/vda/virtio-backend"
    box.command("qom-set", {"path": path, "property": "drive", "value": "throttle"})
    box.backup()
    box.write("vda", 0x12, 0, 64 * KiB)
    assert increment(box).point.engine == "filter"
    assert box.command("qom-get", {"path": path, "property": "drive"}) == "throttle"


# -- managers and ourselves ------------------------------------------------------------------


def test_a_machine_of_libvirt_is_refused(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2"), node="libvirt-1-format"), size=SIZE)
    done = box.cli("backup", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}", "--json")
    assert done.returncode == 2
    assert last_json(done.stdout)["code"] == "foreign-manager"
    assert "virDomainBackupBegin" in last_json(done.stdout)["hint"]


def test_a_second_pullback_is_told_who_works_there_and_since_when(make_box: MakeBox) -> None:
    box = one_disk(make_box)
    box.backup()
    held, go = threading.Event(), threading.Event()

    def hold(way: Way, number: int, message: Message) -> Message | None:
        if way is Way.COMMAND and message["execute"] == "block-export-add" and not held.is_set():
            held.set()
            go.wait(30)
        return None

    victim = Victim(box, before=hold)
    with victim.relay, victim.started():
        try:
            assert held.wait(20)
            for socket in (victim.relay.path, box.other):  # by its socket, and by its name
                done = box.cli("backup", f"qmp:{socket}", "-r", f"dir:{box.repository}2", "--json")
                assert done.returncode == 11, done.stderr
                message = last_json(done.stdout)["message"]
                assert f"process {victim.pid}" in message
                assert "since 20" in message
                assert "backup" in message
        finally:
            go.set()
        code, said = victim.ended()
    assert code == 0, said
    increment(box)


@pytest.mark.parametrize("how", ["block-commit", "qemu-img commit"])
@pytest.mark.parametrize("between", [False, True])
def test_a_foreign_commit_is_recorded_by_the_images_own_bitmap(make_box: MakeBox, how: str, between: bool) -> None:
    """So the next backup is an increment on the newest point that this image knows, and exact."""
    box = one_disk(make_box)
    first = box.backup().point
    overlay = box.directory / "overlay.qcow2"
    snapshot: dict[str, object] = {"node-name": "vda-format", "snapshot-file": str(overlay)}
    box.command("blockdev-snapshot-sync", {**snapshot, "snapshot-node-name": "overlay"})
    box.write("vda", 0x12, 512, 64 * KiB)
    box.zero("vda", 256 * KiB, 128 * KiB)
    if between:
        assert box.backup().broken == ("vda",)
        box.write("vda", 0x13, 3 * MiB, 512)
    if how == "block-commit":
        box.command("block-commit", {"job-id": "commit", "device": "overlay"})
        eventually(lambda: box.command("query-jobs")[0]["status"] == "ready", seconds=10, what="commit")
        box.write("vda", 0x14, 2 * MiB, 512)
        box.command("job-complete", {"id": "commit"})
        eventually(lambda: box.command("query-jobs") == [], seconds=10, what="the end of the commit")
    else:
        box.quit()
        subprocess.run(["qemu-img", "commit", "-q", "-f", "qcow2", str(overlay)], check=True, timeout=20)
        box.start()
    box.write("vda", 0x15, 2 * MiB + 64 * KiB, 512)
    parent = increment(box).point.disks[0].parent
    assert parent is not None
    assert parent.point == first.id
