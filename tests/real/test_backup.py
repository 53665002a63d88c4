"""Backup and restore of a real QEMU, byte for byte."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

import pytest

import kit
from kit import CLUSTER, Box, MakeBox
from pullback import errors
from pullback.flows import repositories
from pullback.model.backups import Fleecing, Level
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.units import KiB, MiB


@pytest.fixture(params=["dir", "restic"])
def make_box(make_box: MakeBox, request: pytest.FixtureRequest) -> MakeBox:
    """Everything here holds for both kinds of repository."""
    return partial(make_box, kind=request.param)


ENGINES = [Fleecing.FILTER, Fleecing.CLASSIC]


def modes(report: object) -> dict[str, Mode]:
    """How each disk was read."""
    return {disk.target: disk.mode for disk in report.point.disks}  # type: ignore[attr-defined]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_and_increments_restore_every_point_byte_for_byte(box: Box, engine: Fleecing) -> None:
    box.write("vda", 0x11, 1 * MiB, 2 * MiB + 4 * KiB)
    box.write("vdb", 0x22, 0, 512)
    moments = []
    for step in range(4):
        report = box.backup(fleecing=engine)
        moments.append((report.point.id, box.image()))
        box.write("vda", 0x30 + step, 256 * KiB * step, 100 * KiB)
        box.write("vdb", 0x40 + step, 7 * MiB + step * 512, 512)
        box.zero("vda", 2 * MiB + step * CLUSTER, CLUSTER)
    assert report.broken == ()
    assert modes(report) == {"vda": Mode.INCREMENTAL, "vdb": Mode.INCREMENTAL}
    for point, content in moments:
        assert box.restored(point) == content
    assert box.verify(all=True).damaged == ()
    assert box.leftovers() == []


def test_an_increment_reads_only_what_changed(box: Box) -> None:
    box.write("vda", 0x11, 0, 8 * MiB)
    first = box.backup()
    assert first.point.disk("vda").read == 8 * MiB
    box.write("vda", 0x12, 3 * MiB + 8 * KiB, 4 * KiB)
    second = box.backup()
    assert second.point.disk("vda").read == 1 * MiB
    assert second.point.disk("vda").stored < 1 * MiB
    assert box.restored() == box.image()


def test_zeroes_and_discards_that_replaced_data_are_restored_as_zeroes(box: Box) -> None:
    box.write("vda", 0x11, 0, 8 * MiB)
    box.backup()
    box.zero("vda", 1 * MiB, 2 * MiB)
    box.discard("vda", 4 * MiB, 1 * MiB + CLUSTER)
    report = box.backup()
    assert modes(report)["vda"] is Mode.INCREMENTAL
    assert box.restored() == box.image()


@pytest.mark.parametrize("style", list(qemu.Style))
@pytest.mark.parametrize("bus", [qemu.Bus.VIRTIO, qemu.Bus.SCSI, qemu.Bus.SATA, qemu.Bus.NVME])
def test_every_bus_and_style_of_disk_can_be_backed_up(make_box: MakeBox, bus: qemu.Bus, style: qemu.Style) -> None:
    box = make_box(qemu.Disk(id="disk0", path=Path("a.qcow2"), bus=bus, style=style))
    box.write("disk0", 0x11, 1 * MiB, 1 * MiB)
    box.backup()
    box.write("disk0", 0x12, 1 * MiB + 512, 512)
    report = box.backup()
    [target] = modes(report)
    assert modes(report)[target] is Mode.INCREMENTAL
    assert box.restored()[target] == box.image()["disk0"]
    assert box.leftovers() == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bus", [qemu.Bus.VIRTIO, qemu.Bus.SCSI])
def test_a_disk_in_an_iothread_survives_and_restores(make_box: MakeBox, bus: qemu.Bus, engine: Fleecing) -> None:
    box = make_box(qemu.Disk(id="disk0", path=Path("a.qcow2"), bus=bus, iothread="io1"))
    box.write("disk0", 0x11, 1 * MiB, 1 * MiB)
    box.backup(fleecing=engine)
    box.write("disk0", 0x12, 1 * MiB + 512, 512)
    report = box.backup(fleecing=engine)
    [target] = modes(report)
    assert modes(report)[target] is Mode.INCREMENTAL
    assert box.restored()[target] == box.image()["disk0"]
    assert box.leftovers() == []


@pytest.mark.parametrize("size", [512, 64 * KiB + 512, 3 * MiB + 1536])
def test_odd_sizes_work(make_box: MakeBox, size: int) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=size)
    box.write("vda", 0x11, size - 512, 512)
    box.backup()
    box.write("vda", 0x12, 0, 512)
    box.backup()
    assert box.restored() == box.image()


def test_a_raw_disk_is_read_whole_after_each_start_and_that_is_no_warning(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"))
    box.write("vda", 0x11, 0, 1 * MiB)
    box.backup()
    box.quit()
    box.start()
    box.write("vda", 0x12, 0, 1 * MiB)
    report = box.backup()
    assert modes(report) == {"vda": Mode.FULL}
    assert report.broken == ()
    assert "raw" in (report.point.disk("vda").reason or "")
    assert box.restored() == box.image()


def test_increments_go_on_over_a_clean_shutdown(box: Box) -> None:
    box.write("vda", 0x11, 0, 1 * MiB)
    box.backup()
    box.write("vda", 0x12, 0, 64 * KiB)
    box.quit()
    box.start()
    box.write("vda", 0x13, 1 * MiB, 64 * KiB)
    report = box.backup()
    assert modes(report) == {"vda": Mode.INCREMENTAL, "vdb": Mode.INCREMENTAL}
    assert box.restored() == box.image()


def test_after_a_kill_of_qemu_broken_bitmaps_are_removed_and_reported(box: Box) -> None:
    box.write("vda", 0x11, 0, 1 * MiB)
    box.backup()
    box.quit()
    box.start()
    box.kill()
    box.model["vda"] = bytearray(box.model["vda"])
    box.start()
    report = box.backup()
    assert modes(report) == {"vda": Mode.FULL, "vdb": Mode.FULL}
    assert report.broken == ("vda", "vdb")
    assert "inconsistent" in (report.point.disk("vda").reason or "")
    assert [b.get("inconsistent", False) for b in box.checkpoints("vda")] == [False]
    assert box.restored() == box.image()


def test_a_kill_in_the_session_that_made_the_checkpoint_loses_it_without_trace(box: Box) -> None:
    box.backup()
    box.kill()
    box.start()
    report = box.backup()
    assert report.broken == ("vda", "vdb")
    assert "not on the disk" in (report.point.disk("vda").reason or "")
    assert box.restored() == box.image()


def test_level_full_reads_everything_and_keeps_the_chain_going(box: Box) -> None:
    box.write("vda", 0x11, 0, 1 * MiB)
    box.backup()
    report = box.backup(level=Level.FULL)
    assert modes(report) == {"vda": Mode.FULL, "vdb": Mode.FULL}
    assert len(box.checkpoints("vda")) == 1
    box.write("vda", 0x12, 0, 64 * KiB)
    assert modes(box.backup())["vda"] is Mode.INCREMENTAL
    assert box.restored() == box.image()


def test_two_repositories_have_chains_of_their_own(box: Box) -> None:
    other = box.directory / "repo2"
    second = {"repository": kit.place_of(other, box.kind)}
    if box.kind == "restic":
        kit.make_repository(other, box.directory / "cache" / "repositories")
    box.write("vda", 0x11, 0, 1 * MiB)
    box.backup()
    box.write("vda", 0x12, 1 * MiB, 64 * KiB)
    box.backup(**second)
    assert len(box.checkpoints("vda")) == 2
    box.write("vda", 0x13, 2 * MiB, 64 * KiB)
    report = box.backup()
    assert modes(report)["vda"] is Mode.INCREMENTAL
    assert report.point.disk("vda").read == 2 * MiB
    assert box.restored() == box.image()
    report = box.backup(**second)
    assert report.point.disk("vda").read == 1 * MiB
    assert len(box.checkpoints("vda")) == 2


def test_a_disk_that_was_excluded_once_still_continues_its_chain(box: Box) -> None:
    box.write("vda", 0x11, 0, 1 * MiB)
    box.backup()
    box.write("vda", 0x12, 0, 64 * KiB)
    box.backup(only=("vdb",))
    report = box.backup()
    assert modes(report) == {"vda": Mode.INCREMENTAL, "vdb": Mode.INCREMENTAL}
    assert box.restored() == box.image()


def test_a_renamed_disk_keeps_its_chain_by_its_nonce(box: Box) -> None:
    box.write("vdb", 0x11, 0, 1 * MiB)
    box.backup()
    box.quit()
    box.disks = [box.disks[1]]
    box.disks = [qemu.Disk(id="vda", path=box.disks[0].path)]
    box.model["vda"] = box.model.pop("vdb")
    box.start()
    report = box.backup()
    assert report.point.disk("vda").mode is Mode.INCREMENTAL
    assert any("it was vdb before" in note for note in report.notes)
    assert box.restored()["vda"] == box.image()["vda"]


def test_a_new_disk_is_read_whole_without_a_warning(box: Box) -> None:
    both = box.disks
    box.quit()
    box.disks = both[:1]
    box.start()
    box.backup()
    box.quit()
    box.disks = both
    box.start()
    report = box.backup()
    assert modes(report) == {"vda": Mode.INCREMENTAL, "vdb": Mode.FULL}
    assert report.broken == ()


def test_a_grown_disk_is_read_whole_and_the_other_not(box: Box) -> None:
    box.write("vda", 0x11, 0, 1 * MiB)
    box.backup()
    box.command("block_resize", {"node-name": "vda-format", "size": 16 * MiB})
    box.model["vda"].extend(bytes(8 * MiB))
    report = box.backup()
    assert modes(report) == {"vda": Mode.FULL, "vdb": Mode.INCREMENTAL}
    assert report.broken == ("vda",)
    assert box.restored() == box.image()


@pytest.mark.parametrize("running", [True, False])
def test_a_disk_shrunk_and_grown_back_is_restored_with_its_zeroes(box: Box, running: bool) -> None:
    box.write("vda", 0x11, 0, 8 * MiB)
    box.backup()
    if running:
        box.command("block_resize", {"node-name": "vda-format", "size": 5 * MiB + 512 * KiB})
        box.command("block_resize", {"node-name": "vda-format", "size": 8 * MiB})
    else:
        box.quit()
        from pullback.programs import process

        path = box.disks[0].path
        process.run(["qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path, str(5 * MiB + 512 * KiB)], timeout=20)
        process.run(["qemu-img", "resize", "-q", "-f", "qcow2", path, str(8 * MiB)], timeout=20)
        box.start()
    start = 5 * MiB + 512 * KiB
    box.model["vda"][start:] = bytes(8 * MiB - start)
    report = box.backup()
    assert modes(report)["vda"] is Mode.INCREMENTAL
    assert box.restored() == box.image()


def test_a_machine_that_was_paused_stays_paused(box: Box) -> None:
    box.command("stop")
    report = box.backup()
    assert report.was_paused
    assert box.command("query-status")["status"] == "paused"
    box.backup()
    assert box.command("query-status")["status"] == "paused"


def test_a_failed_backup_leaves_no_gap(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    from pullback.flows import backup as flow

    box.write("vda", 0x11, 0, 1 * MiB)
    box.backup()
    box.write("vda", 0x12, 0, 64 * KiB)

    def broken(*_: object, **__: object) -> object:
        box.write("vda", 0x13, 2 * MiB, 64 * KiB)
        raise errors.DestinationFull(path="nowhere")

    with monkeypatch.context() as patch:
        patch.setattr(flow, "copy", broken)
        with pytest.raises(errors.DestinationFull):
            box.backup()
    assert box.leftovers() == []
    assert len(box.checkpoints("vda")) == 1
    report = box.backup()
    assert modes(report)["vda"] is Mode.INCREMENTAL
    assert box.restored() == box.image()


def test_untrack_removes_every_trace(box: Box) -> None:
    box.backup()
    box.command("block-dirty-bitmap-add", {"node": "vda-format", "name": "foreign"})
    done = box.cli("untrack", f"qmp:{box.qmp}")
    assert done.returncode == 0, done.stderr
    assert box.checkpoints("vda") == []
    nodes = box.command("query-named-block-nodes", {"flat": True})
    assert [b["name"] for n in nodes for b in n.get("dirty-bitmaps", [])] == ["foreign"]


def test_small_writes_into_new_clusters_are_not_read_again_and_again(box: Box) -> None:
    """Their clusters end in holes of the file, which no bitmap accounts for and the parent stores as data."""
    for number in range(4):
        box.write("vda", 0x11, number * 2 * MiB + 4 * KiB, 512)
    box.backup()
    box.quit()
    box.start()
    assert box.backup().point.disk("vda").read == 0
    assert box.restored() == box.image()


def test_a_point_keeps_how_the_machine_was_started_and_its_firmware_s_variables(make_box: MakeBox) -> None:
    disk = qemu.Disk(id="vda", path=Path("a.qcow2"))
    box = make_box(disk, start=False)
    variables = box.directory / "vars.fd"
    variables.write_bytes(b"\xff" * 4096 + b"BootOrder" + bytes(4 * MiB - 4105))
    box.extra = ["-drive", f"if=pflash,format=raw,file={variables}"]
    box.start()
    report = box.backup(tags=("before upgrade",))
    with repositories.opened(box.place, box.access) as repository:
        point = repository.find("latest")
        [kept] = repository.firmware(point)
    assert (kept.writable, kept.data) == (True, variables.read_bytes())
    assert point.description is not None
    assert any("vars.fd" in word for word in point.description.argv)
    assert (point.tags, point.host, point.id) == (("before upgrade",), socket.gethostname(), report.point.id)
    assert point.seconds is not None
    assert 0 < point.seconds < 60
    assert box.leftovers() == []
