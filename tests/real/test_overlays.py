"""Overlays put on and committed by us: every next backup is an increment and exact, from any checkpoint."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit import CLUSTER, Box, MakeBox, last_json
from mounts import Mount
from pullback import errors
from pullback.extents import Extent
from pullback.flows import backup as flow
from pullback.flows import checkpoints as checkpoint_flow
from pullback.flows import overlays
from pullback.flows.opening import Opened, on_machine
from pullback.flows.overlays import Wish
from pullback.model import urls
from pullback.model.documents.checkpoint import CheckpointDocument
from pullback.model.overlays import Committed
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.units import MiB
from relay import Message, Relay, Way, refusal
from storm import Storm
from victim import Victim, eventually, running

SIZE = 4 * MiB


def one(make_box: MakeBox, **options: Any) -> Box:
    """A machine with one small disk and a restore point."""
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2"), **options), size=SIZE)
    box.write("vda", 0x11, 0, 2 * MiB)
    box.backup()
    return box


def work(box: Box, doing: Callable[[Opened], object]) -> object:
    """Something on the open machine."""

    async def inside(machine: Opened, _: object) -> object:
        return await doing(machine)  # type: ignore[misc]

    return asyncio.run(on_machine(urls.QmpMachine(socket=box.qmp), box.directories, inside, command="a test"))


def create(box: Box, *wishes: Wish) -> overlays.Created:
    """Overlays on these disks, or on all."""
    made = work(box, lambda machine: overlays.create(machine, box.directories, wishes))
    assert isinstance(made, overlays.Created)
    return made


def commit(box: Box, target: str = "vda", *, keep: bool = False) -> Committed:
    """Commit a disk's overlay."""
    done = work(box, lambda machine: overlays.commit(machine, box.directories, target, keep=keep))
    assert isinstance(done, Committed)
    return done


def checkpoint(box: Box, name: str) -> None:
    """A checkpoint of the user's."""
    document = CheckpointDocument(name=name)
    work(box, lambda machine: checkpoint_flow.create(machine, box.directories, document))


def changes(box: Box, since: str, target: str = "vda") -> list[Extent]:
    """What changed since a checkpoint."""
    found = work(box, lambda machine: checkpoint_flow.changes(machine, box.directories, target, since))
    assert isinstance(found, checkpoint_flow.Changes)
    return list(found.extents)


def increment(box: Box) -> flow.Report:
    """The next backup continues all chains, is exact, and leaves nothing."""
    report = box.backup()
    assert report.broken == ()
    assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL}, report.notes
    assert list(box.restored().values()) == list(box.image().values())
    assert box.leftovers() == []
    assert running(box)
    return report


def root(box: Box, target: str = "vda") -> str:
    """The file that a disk's device writes to."""
    for record in box.command("query-block"):
        if target in record["qdev"].split("/"):
            return str(record["inserted"]["file"])
    raise AssertionError(target)


def restart_on(box: Box, **paths: Path | str) -> None:
    """A clean end, and a start on other images."""
    box.quit()
    box.disks = [replace(disk, path=Path(paths.get(disk.id, disk.path))) for disk in box.disks]
    box.start()


# -- create and commit -----------------------------------------------------------------------


@pytest.mark.parametrize("iothread", [pytest.param(None, marks=pytest.mark.slow), "io1"])
def test_tracking_goes_on_over_create_restart_and_commit(make_box: MakeBox, iothread: str | None) -> None:
    box = one(make_box, iothread=iothread)
    base = box.disks[0].path
    base.chmod(0o640)
    box.write("vda", 0x12, CLUSTER, CLUSTER)  # before the overlay: its bit must come along
    made = create(box, Wish(target="vda"))
    [overlay] = made.overlays
    assert (overlay.backing, len(overlay.checkpoints)) == (str(base), 1)
    assert root(box) == overlay.path
    assert overlay.path.startswith(str(base.with_name("a.overlay-")))
    assert Path(overlay.path).stat().st_mode & 0o777 == 0o640
    box.write("vda", 0x13, 3 * MiB, 512)
    report = increment(box)
    assert report.point.disks[0].read == 2 * MiB, "the two blocks that changed"
    box.write("vda", 0x14, 0, 512)
    restart_on(box, vda=overlay.path)
    box.zero("vda", MiB, CLUSTER)
    increment(box)
    box.write("vda", 0x15, 2 * MiB, 3 * CLUSTER)
    box.discard("vda", 0, CLUSTER)
    done = commit(box)
    assert (done.image, done.removed) == (str(base), True), done.notes
    assert root(box) == str(base)
    assert not Path(overlay.path).exists()
    box.write("vda", 0x16, 3 * MiB, 512)
    report = increment(box)
    assert report.point.disks[0].read == 3 * MiB, "no block more than what changed"
    restart_on(box, vda=base)
    box.write("vda", 0x17, 5 * CLUSTER, 512)
    increment(box)
    assert box.verify(all=True).damaged == ()


def test_changes_are_exact_from_any_checkpoint_over_two_overlays_and_back(make_box: MakeBox) -> None:
    box = one(make_box)
    writes: dict[str, list[int]] = {}

    def write(cluster: int) -> None:
        box.write("vda", 0x20 + cluster % 64, cluster * CLUSTER + 512, 512)
        for clusters in writes.values():
            clusters.append(cluster)

    def mark(name: str) -> None:
        checkpoint(box, name)
        writes[name] = []

    def whole(start: int, length: int) -> range:
        return range(start // CLUSTER, (start + length) // CLUSTER)

    def exact() -> None:
        for name, clusters in writes.items():
            told = {number for start, length in changes(box, name) for number in whole(start, length)}
            assert told == set(clusters), name

    mark("k")
    write(1)
    mark("l")
    write(2)
    create(box, Wish(target="vda"))
    write(3)
    exact()
    mark("m")
    write(4)
    create(box, Wish(target="vda", path=box.directory / "second.qcow2"))
    write(5)
    mark("n")
    write(6)
    exact()
    commit(box)
    write(7)
    exact()
    work(box, lambda machine: checkpoint_flow.delete(machine, box.directories, "m"))
    del writes["m"]
    commit(box)
    write(8)
    exact()
    increment(box)
    box.quit()
    box.start()
    exact()
    with pytest.raises(errors.UsageError, match="is no overlay"):
        commit(box)


def test_several_disks_get_their_overlays_at_one_instant_or_none_does(make_box: MakeBox) -> None:
    box = make_box(size=SIZE)
    box.backup()
    for disk in box.disks:
        box.write(disk.id, 0x21, MiB, CLUSTER)
    taken = box.directory / "taken.qcow2"
    taken.write_bytes(b"precious")
    with pytest.raises(errors.DestinationExists):
        create(box, Wish(target="vda"), Wish(target="vdb", path=taken))
    assert taken.read_bytes() == b"precious"
    assert list(box.directory.glob("*overlay*")) == []
    assert [root(box, disk.id) for disk in box.disks] == [str(disk.path) for disk in box.disks]
    increment(box)
    made = create(box)
    assert [overlay.target for overlay in made.overlays] == ["vda", "vdb"]
    for disk in box.disks:
        box.write(disk.id, 0x22, 2 * MiB, 512)
    increment(box)
    assert [commit(box, disk.id).removed for disk in box.disks] == [True, True]
    box.write("vdb", 0x23, 0, 512)
    increment(box)


def test_who_goes_back_to_the_image_below_finds_a_chain_that_is_true_of_it(make_box: MakeBox) -> None:
    box = one(make_box)
    base = box.disks[0].path
    box.write("vda", 0x12, 0, 512)
    create(box)
    before = box.image()["vda"]
    box.write("vda", 0x13, 2 * MiB, MiB)
    increment(box)
    restart_on(box, vda=base)
    box.model["vda"] = bytearray(before)
    increment(box)


@pytest.mark.parametrize("iothread", [None, "io1"])
def test_a_writer_that_never_rests_loses_no_bit_over_create_and_commit(make_box: MakeBox, iothread: str | None) -> None:
    """Writes race the transaction, the merge and the pivot. (QEMU drops the guest's discards while it commits.)"""
    box = one(make_box, iothread=iothread)
    for seed in range(2):
        with Storm(box, seed):
            create(box)
        increment(box)
        with Storm(box, seed + 10, kinds=("write", "zero")) as storm:
            eventually(lambda: storm.count > 5, seconds=10, what="some writes")
            assert commit(box).removed
        increment(box)


# -- what is refused, and what goes wrong ----------------------------------------------------


def start_slow_commit(box: Box) -> Victim:
    """`overlay commit` behind a relay, of an overlay that holds data."""
    create(box)
    box.write("vda", 0x31, 0, SIZE)
    return Victim(box, "overlay", "commit", f"qmp:{box.directory / 'relay.sock'}", "vda", "--json")


def test_a_commit_that_is_killed_leaves_the_overlay_on_top_and_the_next_run_ends_its_job(make_box: MakeBox) -> None:
    box = one(make_box)
    victim = start_slow_commit(box)
    top = root(box)
    victim.at_command("block-commit", victim.kill_all)
    with victim.relay, victim.started():
        victim.ended()
    with Relay(victim.relay.path, box.qmp) as relay:
        assert box.cli("info", f"qmp:{relay.path}").returncode == 0
    assert box.command("query-jobs") == []
    assert root(box) == top
    box.write("vda", 0x32, MiB, 512)
    increment(box)
    assert commit(box).removed
    box.write("vda", 0x33, 0, 512)
    increment(box)


@pytest.mark.parametrize("name", ["transaction", "job-complete", "query-named-block-nodes"])
def test_a_commit_that_is_refused_something_leaves_the_overlay_on_top(make_box: MakeBox, name: str) -> None:
    box = one(make_box)
    seen: list[str] = []

    def refuse(way: Way, number: int, message: Message) -> Message | None:
        if way is Way.COMMAND:
            seen.append(str(message["execute"]))
            ready = "block-commit" in seen
            if ready and message["execute"] == name:
                return refusal(message)
        return None

    create(box)
    box.write("vda", 0x31, 0, SIZE)
    victim = Victim(box, "overlay", "commit", f"qmp:{box.directory / 'relay.sock'}", "vda", "--json", before=refuse)
    top = root(box)
    with victim.relay, victim.started():
        code, said = victim.ended()
    assert code == 1, said
    assert box.command("query-jobs") == []
    assert root(box) == top
    box.write("vda", 0x32, MiB, 512)
    increment(box)
    assert commit(box).removed
    increment(box)


def test_a_commit_without_room_says_so_and_undoes_itself(make_box: MakeBox, mount: Mount) -> None:
    """The image below is on a file system that is full."""
    place = mount.tmpfs(8 * MiB)
    box = make_box(qemu.Disk(id="vda", path=place / "a.qcow2"), size=32 * MiB)
    box.write("vda", 0x11, 0, MiB)
    box.backup()
    create(box, Wish(target="vda", path=box.directory / "overlay.qcow2"))
    box.write("vda", 0x12, 0, 16 * MiB)
    increment(box)
    with pytest.raises(errors.OverlayNotCommitted, match="No space left"):
        commit(box)
    assert box.command("query-jobs") == []
    assert root(box) == str(box.directory / "overlay.qcow2")
    box.write("vda", 0x13, 0, 512)
    increment(box)


def test_ctrl_c_in_a_commit_leaves_everything_as_it_was(make_box: MakeBox) -> None:
    box = one(make_box)
    victim = start_slow_commit(box)
    top = root(box)
    victim.at_command("block-commit", lambda: victim.signal(signal.SIGINT))
    with victim.relay, victim.started():
        code, _ = victim.ended()
    assert code == 130
    assert box.command("query-jobs") == []
    assert root(box) == top
    increment(box)


def test_overlays_are_refused_while_something_is_at_work_on_the_disk(make_box: MakeBox) -> None:
    box = one(make_box)
    made = box.cli("snapshot", "create", f"qmp:{box.qmp}", "--as", "held")
    assert made.returncode == 0, made.stderr
    for words in (["overlay", "create"], ["overlay", "commit"]):
        done = box.cli(*words, f"qmp:{box.qmp}", "vda", "--json")
        assert done.returncode == 11, done.stdout
        assert last_json(done.stdout)["code"] == "disk-busy"
    assert box.cli("snapshot", "delete", f"qmp:{box.qmp}", "held").returncode == 0
    target = box.directory / "mirror.raw"
    target.write_bytes(bytes(SIZE))
    box.command("blockdev-add", {"driver": "file", "node-name": "copy", "filename": str(target)})
    box.command("blockdev-mirror", {"job-id": "theirs", "device": "vda-format", "target": "copy", "sync": "full"})
    with pytest.raises(errors.DiskBusy, match="mirror job theirs"):
        create(box)
    box.command("block-job-cancel", {"device": "theirs"})
    eventually(lambda: box.command("query-jobs") == [], seconds=10, what="the end of their job")
    with pytest.raises(errors.UnknownDisk):
        create(box, Wish(target="vdz"))
    assert list(box.directory.glob("*overlay*")) == []
    increment(box)


def test_the_command_line_creates_commits_and_keeps(make_box: MakeBox) -> None:
    box = make_box(size=SIZE)
    assert box.cli("overlay", "create", f"qmp:{box.qmp}").returncode == 2
    second = box.directory / "second.qcow2"
    words = ["overlay", "create", f"qmp:{box.qmp}", "vda", "--disk", f"vdb={second}", "--json"]
    done = box.cli(*words)
    assert done.returncode == 0, done.stderr
    assert [overlay["target"] for overlay in last_json(done.stdout)["overlays"]] == ["vda", "vdb"]
    assert root(box, "vdb") == str(second)
    done = box.cli("overlay", "commit", f"qmp:{box.qmp}", "vdb", "--keep")
    assert done.returncode == 0, done.stderr
    assert "never start a machine on it" in done.stdout
    assert second.exists()
    done = box.cli("overlay", "commit", f"qmp:{box.qmp}", "vda", "--json")
    assert last_json(done.stdout)["removed"] is True


# -- other disks, and machines that are off --------------------------------------------------


def test_a_raw_disk_gets_an_overlay_whose_checkpoints_are_stored(make_box: MakeBox) -> None:
    """What is known of a raw disk while QEMU runs goes on in an overlay that keeps it."""
    box = one(make_box, format="raw")
    base = box.disks[0].path
    box.write("vda", 0x12, MiB, 512)
    [overlay] = create(box).overlays
    assert len(overlay.checkpoints) == 1
    box.write("vda", 0x13, 2 * MiB, 512)
    increment(box)
    box.disks = [replace(disk, format="qcow2") for disk in box.disks]
    restart_on(box, vda=overlay.path)
    box.write("vda", 0x14, 0, 512)
    increment(box)
    assert commit(box).image == str(base)
    box.write("vda", 0x15, 3 * MiB, 512)
    increment(box)


def test_an_overlay_over_a_stopped_image_goes_on_with_its_checkpoints(make_box: MakeBox) -> None:
    box = one(make_box)
    base = box.disks[0].path
    box.write("vda", 0x12, 0, 512)
    box.quit()
    overlay = box.directory / "overlay.qcow2"
    done = box.cli("overlay", "create", f"images:vda={base}", "vda", overlay, "--name", "web01", "--json")
    assert done.returncode == 0, done.stderr
    assert len(last_json(done.stdout)["overlays"][0]["checkpoints"]) == 1
    refused = box.cli("overlay", "commit", f"images:vda=qcow2:{overlay}", "vda", "--name", "web01", "--json")
    assert refused.returncode == 1
    assert last_json(refused.stdout)["code"] == "unsupported"
    box.disks = [replace(box.disks[0], path=overlay)]
    box.start()
    box.write("vda", 0x13, MiB, 512)
    increment(box)
    assert commit(box).image == str(base)
    box.write("vda", 0x14, 2 * MiB, 512)
    increment(box)
