"""The public library on real machines: snapshots, exports and jobs, read by other programs."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import pullback
from kit import Box, MakeBox, last_json
from pullback import errors, state, sync
from pullback.flows import library
from pullback.model.backups import Fleecing
from pullback.model.documents.backup import Mode
from pullback.programs import qemu
from pullback.state import history
from pullback.units import KiB, MiB

pytestmark = pytest.mark.timeout(120)
#: Another can stand beside it: of snapshots with the filter a disk has one.
STACKED = pullback.How(fleecing=Fleecing.CLASSIC)


@pytest.fixture
def box(make_box: MakeBox) -> Box:
    """A machine with a qcow2 and a raw disk, some data on both."""
    made = make_box(qemu.Disk(path=Path("a.qcow2"), id="vda"), qemu.Disk(path=Path("b.raw"), id="vdb", format="raw"))
    made.write("vda", 0x11, 0, MiB)
    made.write("vdb", 0x21, 2 * MiB, MiB)
    return made


def opened(box: Box) -> AbstractContextManager[sync.Machine]:
    """The machine by the library."""
    return sync.connect(f"qmp:{box.qmp}", state_dir=box.directories.state)


@contextmanager
def off(box: Box) -> Iterator[sync.Machine]:
    """Its images, when it is off."""
    images = ",".join(f"{disk.id}={disk.path}" for disk in box.disks)
    with sync.connect(f"images:{images}", name=box.name, state_dir=box.directories.state) as machine:
        yield machine


def run(*words: object) -> str:
    """A program's output."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def converted(uri: str, to: Path) -> bytes:
    """An export, read by qemu-img, which asks for holes first."""
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, to)
    return to.read_bytes()


def copied(uri: str, to: Path) -> bytes:
    """An export, read by nbdcopy (in large requests, several at a time)."""
    run("nbdcopy", uri, to)
    return to.read_bytes()


def dirty(uri: str, context: str) -> list[tuple[int, int]]:
    """The dirty ranges that nbdinfo sees."""
    rows = [line.split() for line in run("nbdinfo", f"--map=qemu:dirty-bitmap:{context}", uri).splitlines()]
    return [(int(row[0]), int(row[1])) for row in rows if row and row[2] == "1"]


def names(machine: sync.Machine) -> list[str]:
    """Its checkpoints."""
    return [checkpoint.name for checkpoint in machine.checkpoint_list().checkpoints]


def until(done: Callable[[], bool], seconds: float = 15) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


# -- jobs: pull ------------------------------------------------------------------------------


def test_a_pull_is_read_by_other_programs_and_lasts_when_its_maker_has_gone(box: Box, tmp_path: Path) -> None:
    with opened(box) as machine:
        machine.checkpoint_create({"name": "monday"})
    box.write("vda", 0x12, MiB, 64 * KiB)
    box.zero("vda", 64 * KiB, 64 * KiB)
    at = box.image()
    with opened(box) as machine:
        disks = [{"name": "vda", "incremental": "monday"}, {"name": "vdb"}]
        job = machine.backup_begin({"mode": "pull", "disks": disks}, {"name": "tuesday"})
    box.write("vda", 0x13, 0, 2 * MiB)
    box.write("vdb", 0x23, 0, 8 * MiB)
    uris = {served.target: served.uri for served in job.exports}
    for target, uri in uris.items():
        assert copied(uri, tmp_path / target) == at[target]
        assert converted(uri, tmp_path / "again") == at[target]
    assert dirty(uris["vda"], "backup-vda") == [(64 * KiB, 64 * KiB), (MiB, 64 * KiB)]
    with opened(box) as machine:
        again = machine.backup_info()
        assert again.job == job.job
        assert again.exports == job.exports
        assert again.document.mode is Mode.PULL
        assert machine.backup_stats().disks[0].done > 0
        with pytest.raises(errors.BusyError, match=job.job):
            machine.backup_begin({"mode": "pull"})
        ended = machine.backup_end()
        assert ended.success
        assert names(machine) == ["monday", "tuesday"]
        with pytest.raises(errors.NoJob):
            machine.backup_info()
        assert machine.backup_last() == ended
    assert box.leftovers() == []


def test_an_aborted_job_leaves_the_checkpoints_as_they_were_and_loses_no_change(box: Box) -> None:
    with opened(box) as machine:
        machine.checkpoint_create({"name": "monday"})
        machine.backup_begin({"mode": "pull", "disks": [{"name": "vda"}]}, {"name": "tuesday"})
    box.write("vda", 0x14, 3 * MiB, 64 * KiB)
    with opened(box) as machine:
        assert not machine.backup_abort().success
        assert names(machine) == ["monday"]
        assert [(e.start, e.length) for e in machine.changes("vda", since="monday").extents] == [(3 * MiB, 64 * KiB)]
    assert box.leftovers() == []


@pytest.mark.parametrize(
    ("document", "checkpoint", "error", "words"),
    [
        ({"mode": "pull", "incremental": "never"}, None, errors.CheckpointInconsistent, "not on the disk"),
        ({"mode": "pull", "disks": [{"name": "vdz"}]}, None, errors.BadDocument, "vdz"),
        ({"mode": "pull", "server": {"name": "127.0.0.1"}}, {"name": "x"}, errors.InsecureExport, "TLS"),
        ({"mode": "pull"}, {"name": "a/b"}, errors.BadDocument, "name"),
        ({"mode": "pull", "colour": "red"}, None, errors.BadDocument, "colour"),
        (
            "<domainbackup><disks><disk name='vda' type='file'><target file='/nowhere/x'><encryption format='luks'>"
            "<secret type='passphrase' usage='u'/></encryption></target></disk></disks></domainbackup>",
            {"name": "x"},
            errors.Unsupported,
            "encryption",
        ),
        (
            "<domainbackup mode='pull'><server transport='unix' socket='/nowhere/s'/><disks><disk name='vda'>"
            "<scratch file='/nowhere/x'><seclabel model='selinux'><label>a:b:c:s0</label></seclabel></scratch></disk>"
            "</disks></domainbackup>",
            None,
            errors.Unsupported,
            "label",
        ),
        ("<domainbackup mode='pull'><!DOCTYPE x></domainbackup>", None, errors.BadDocument, "DOCTYPE"),
        (
            {"mode": "push", "disks": [{"name": "vda", "type": "file", "target": {"file": "/nowhere/x"}}]},
            {"name": "x"},
            errors.PullbackError,
            "nowhere",
        ),
    ],
)
def test_a_job_that_cannot_be_is_refused_and_changes_nothing(
    box: Box, document: Any, checkpoint: Any, error: type[Exception], words: str
) -> None:
    with opened(box) as machine:
        with pytest.raises(error, match=words):
            machine.backup_begin(document, checkpoint)
        assert names(machine) == []
        assert machine.export_list() == ()
    assert box.leftovers() == []


def test_xml_as_virsh_takes_it_begins_a_job(box: Box) -> None:
    backup = """<domainbackup mode='pull'><server transport='unix' socket='{}'/>
      <disks><disk name='vda' backup='yes' exportname='first'/><disk name='vdb' backup='no'/></disks></domainbackup>"""
    socket = box.directory / "mine.sock"
    with opened(box) as machine:
        job = machine.backup_begin(backup.format(socket), "<domaincheckpoint><name>one</name></domaincheckpoint>")
        assert job.exports[0].uri == f"nbd+unix:///first?socket={socket}"
        assert "export-size: 8388608" in run("nbdinfo", job.exports[0].uri)
        machine.backup_end()
    assert not socket.exists()


# -- jobs: push ------------------------------------------------------------------------------


def push_document(directory: Path, *targets: str, **more: str) -> dict[str, object]:
    """Push these disks to qcow2 files."""
    files = {target: {"file": str(directory / f"{target}.out")} for target in targets}
    disks = [{"name": name, "type": "file", "driver": "qcow2", "target": file} for name, file in files.items()]
    return {"mode": "push", **more, "disks": disks}


def image(path: Path, directory: Path) -> bytes:
    """What an image holds."""
    run("qemu-img", "convert", "-O", "raw", path, directory / "plain")
    return (directory / "plain").read_bytes()


def test_a_push_holds_what_a_pull_of_the_same_instant_shows(box: Box, tmp_path: Path) -> None:
    at = box.image()
    with opened(box) as machine:
        snapshot = machine.snapshot_create({"name": "same", "disks": [{"name": "vda"}, {"name": "vdb"}]}, how=STACKED)
        exports = machine.export_start({"disks": [{"name": t, "snapshot": snapshot.name} for t in ("vda", "vdb")]})
        machine.backup_begin(push_document(tmp_path, "vda", "vdb"), {"name": "tuesday"})
    box.write("vda", 0x15, 0, 4 * MiB)
    box.write("vdb", 0x25, 0, 4 * MiB)
    with opened(box) as machine:
        try:
            ended = machine.backup_wait(timeout=30)
            assert ended is not None
        except errors.NoJob:  # the keeper was there first
            ended = machine.backup_last()
        assert ended is not None
        assert ended.success, ended
        for served in exports:
            pulled = copied(served.uri, tmp_path / "pulled")
            assert pulled == at[served.target]
            assert image(tmp_path / f"{served.target}.out", tmp_path) == pulled
        machine.snapshot_delete("same")
        assert names(machine) == ["tuesday"]
    assert box.leftovers() == []


def test_a_push_ends_by_itself_when_nobody_waits(box: Box, tmp_path: Path) -> None:
    with opened(box) as machine:
        machine.checkpoint_create({"name": "monday"})
    box.write("vda", 0x16, 5 * MiB, 64 * KiB)
    with opened(box) as machine:
        machine.backup_begin(push_document(tmp_path, "vda", incremental="monday"), {"name": "tuesday"})
    until(lambda: history.load(box.directories.state, box.name) is not None)
    with opened(box) as machine:
        last = machine.backup_last()
        assert last is not None
        assert last.success
        assert last.disks["vda"] == {"done": 64 * KiB, "total": 64 * KiB}
        assert names(machine) == ["monday", "tuesday"]
    assert box.leftovers() == []


def test_a_slow_push_is_seen_paused_hurried_and_aborted_by_others(box: Box, tmp_path: Path) -> None:
    with opened(box) as machine:
        machine.backup_begin(push_document(tmp_path, "vda", "vdb"), {"name": "tuesday"}, speed=128 * KiB)
    with opened(box) as machine:
        machine.backup_pause()
        assert {disk.status for disk in machine.backup_stats().disks} == {"paused"}
        with pytest.raises(errors.BusyError):
            machine.backup_end()
        machine.backup_resume()
        machine.backup_set_speed(64 * KiB)
        assert {disk.speed for disk in machine.backup_stats().disks} == {64 * KiB}
        assert not machine.backup_abort().success
        assert names(machine) == []
    assert list(tmp_path.glob("*.out")) == []
    assert box.leftovers() == []


# -- snapshots and exports -------------------------------------------------------------------


def test_several_snapshots_each_show_their_own_instant(box: Box, tmp_path: Path) -> None:
    """All are classic here; where they are not, the second is refused by name."""
    instants = {}
    for number in range(3):
        box.write("vda", 0x30 + number, number * MiB, 2 * MiB)
        instants[f"s{number}"] = box.image()["vda"]
        with opened(box) as machine:
            document = {"name": f"s{number}", "disks": [{"name": "vda"}]}
            machine.snapshot_create(document, {"name": f"c{number}"}, how=pullback.How(fleecing=Fleecing.CLASSIC))
    box.write("vda", 0x40, 0, 8 * MiB)
    with opened(box) as machine:
        assert [snapshot.name for snapshot in machine.snapshot_list()] == list(instants)
        with pytest.raises(errors.SnapshotExists):
            machine.snapshot_create({"name": "s1", "disks": [{"name": "vda"}]})
        wishes = [{"name": "vda", "snapshot": name, "allcheckpoints": True} for name in instants]
        for served in machine.export_start({"disks": wishes}):
            assert copied(served.uri, tmp_path / "x") == instants[str(served.snapshot)]
    uri = served.uri
    assert dirty(uri, "c0") == [(MiB, 3 * MiB)]
    assert dirty(uri, "c1") == [(2 * MiB, 2 * MiB)]
    with opened(box) as machine:
        machine.snapshot_delete("s0")  # the oldest first
        assert copied(uri, tmp_path / "x") == instants["s2"]
        for name in ("s1", "s2"):
            machine.snapshot_delete(name)
        with pytest.raises(errors.NoSnapshot):
            machine.snapshot_info("s0")
        assert names(machine) == ["c0", "c1", "c2"]
    assert box.leftovers() == []


def test_a_snapshot_goes_with_its_owner_and_its_checkpoint_stays(box: Box) -> None:
    owner = subprocess.Popen(["sleep", "60"])
    try:
        with opened(box) as machine:
            machine.snapshot_create(None, {"name": "monday"}, how=pullback.How(owner=owner.pid))
    finally:
        owner.kill()
        owner.wait()
    until(lambda: box.leftovers() == [], 10)
    with opened(box) as machine:
        assert names(machine) == ["monday"]


def test_a_killed_keeper_is_replaced_by_the_next_connection(box: Box) -> None:
    with opened(box) as machine:
        machine.snapshot_create({"name": "s", "disks": [{"name": "vda"}]})
    until(lambda: keepers(box) != [])
    os.kill(keepers(box)[0], signal.SIGKILL)
    until(lambda: keepers(box) == [])
    with opened(box) as machine:
        assert [snapshot.name for snapshot in machine.snapshot_list()] == ["s"]
    until(lambda: keepers(box) != [])
    with opened(box) as machine:
        machine.snapshot_delete("s")
    until(lambda: keepers(box) == [])


def keepers(box: Box) -> list[int]:
    """The keepers of a machine."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "pullback.engine.keeping" in words and str(box.directories.state) in " ".join(words):
            found.append(int(process.name))
    return found


def test_when_qemu_dies_the_keeper_removes_what_is_left_on_disk(box: Box) -> None:
    with opened(box) as machine:
        machine.snapshot_create({"name": "s", "disks": [{"name": "vda"}]})
        machine.export_start({"disks": [{"name": "vda", "snapshot": "s"}]})
    box.kill()
    base = box.directories.state
    until(lambda: [p for folder in ("jobs", "scratch", "run") for p in (base / folder).glob("*")] == [])
    assert not (state.machine_directory(base, box.name) / "server.json").exists()


def test_chosen_scratch_files_are_used_and_removed_and_existing_ones_are_refused(box: Box, tmp_path: Path) -> None:
    chosen = tmp_path / "old-blocks"
    document = {"name": "s", "disks": [{"name": "vda", "fleece": str(chosen)}]}
    with opened(box) as machine:
        snapshot = machine.snapshot_create(document)
        assert snapshot.disks[0].scratch == str(chosen)
        assert chosen.stat().st_mode & 0o777 == 0o600
        machine.snapshot_delete("s")
        assert not chosen.exists()
        chosen.write_text("mine")
        with pytest.raises(errors.DestinationExists):
            machine.snapshot_create(document)
    assert chosen.read_text() == "mine"
    assert box.leftovers() == []


def test_a_pre_made_scratch_image_is_used_and_left_and_must_be_empty(box: Box, tmp_path: Path) -> None:
    made = tmp_path / "made.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", made, "8M")
    at = box.image()["vda"]
    disk = {"name": "vda", "driver": "qcow2", "scratch": {"file": str(made)}}
    with opened(box) as machine:
        job = machine.backup_begin({"mode": "pull", "disks": [disk]}, reuse=True)
        box.write("vda", 0x17, 0, MiB)
        assert copied(job.exports[0].uri, tmp_path / "x") == at
        machine.backup_end()
        assert made.exists()
        with pytest.raises(errors.ScratchUnsuitable, match="not empty"):
            machine.backup_begin({"mode": "pull", "disks": [disk]}, reuse=True)
    assert box.leftovers() == []


def test_a_disk_under_a_guest_is_exported_for_reading_only(box: Box, tmp_path: Path) -> None:
    with opened(box) as machine:
        with pytest.raises(errors.DiskBusy):
            machine.export_start({"disks": [{"name": "vda", "readonly": False}]})
        assert machine.export_list() == ()
        [served] = machine.export_start({"disks": [{"name": "vda"}]})
        with pytest.raises(errors.ExportExists):
            machine.export_start({"disks": [{"name": "vda"}]})
    with opened(box) as machine:
        assert machine.export_list() == (served,)
        assert converted(served.uri, tmp_path / "x") == box.image()["vda"]
        with pytest.raises(errors.NoExport):
            machine.export_stop(["other"])
        machine.export_stop([served.name])
    assert box.leftovers() == []


def test_a_machine_that_is_off_serves_and_takes_writes_and_stays_incremental(box: Box, tmp_path: Path) -> None:
    with opened(box) as machine:
        machine.checkpoint_create({"name": "monday"})
    box.write("vda", 0x18, 6 * MiB, 64 * KiB)
    box.quit()
    with off(box) as machine:
        document = {"mode": "pull", "disks": [{"name": "vda", "incremental": "monday"}]}
        job = machine.backup_begin(document, {"name": "tuesday"})
        assert dirty(job.exports[0].uri, "backup-vda") == [(6 * MiB, 64 * KiB)]
        assert copied(job.exports[0].uri, tmp_path / "x") == box.image()["vda"]
        machine.backup_end()
        [served] = machine.export_start({"disks": [{"name": "vda", "readonly": False}]})
        run("qemu-io", "-f", "raw", "-c", "write -P 0x55 1M 64k", served.uri)
        machine.export_stop()
        changed = machine.changes("vda", since="tuesday").extents
        assert [(extent.start, extent.length) for extent in changed] == [(MiB, 64 * KiB)]
    box.model["vda"][MiB : MiB + 64 * KiB] = b"\x55" * (64 * KiB)
    with off(box) as machine:
        machine.backup_begin(push_document(tmp_path, "vda"), {"name": "wednesday"})
        ended = machine.backup_wait(timeout=30)
        assert ended is not None
        assert ended.success
        machine.backup_begin({"mode": "pull"}, {"name": "thursday"})
        machine.backup_abort()
        assert names(machine) == ["monday", "tuesday", "wednesday"]
    assert image(tmp_path / "vda.out", tmp_path) == bytes(box.model["vda"])


# -- the two faces ---------------------------------------------------------------------------


def test_the_face_without_asyncio_has_every_call_with_the_same_arguments() -> None:
    there = {n: f for n, f in inspect.getmembers(library.Machine, callable) if not n.startswith("_")}
    here = {n: f for n, f in inspect.getmembers(sync.Machine, callable) if not n.startswith("_")}
    assert set(here) == set(there)
    for name, call in there.items():
        wanted = inspect.signature(call).parameters
        assert list(inspect.signature(here[name]).parameters) == list(wanted), name
        for parameter in wanted.values():
            mine = inspect.signature(here[name]).parameters[parameter.name]
            assert (mine.kind, mine.default) == (parameter.kind, parameter.default), name


def test_the_asynchronous_face_tells_events_as_they_come(box: Box) -> None:
    async def work() -> list[str]:
        heard = []
        async with pullback.connect(f"qmp:{box.qmp}", state_dir=box.directories.state) as machine:
            events = machine.events(interval=0.05)
            await machine.backup_begin({"mode": "pull", "disks": [{"name": "vda"}]}, {"name": "monday"})
            async for event in events:
                heard.append(str(event.kind))
                if event.kind == "export-started":
                    await machine.backup_end()
                if event.kind == "job-completed":
                    return heard
        return heard

    heard = asyncio.run(asyncio.wait_for(work(), 30))
    assert {"job-started", "checkpoint-created", "export-started", "export-stopped", "job-completed"} <= set(heard)


def test_another_pullback_gets_busy_while_a_program_holds_the_machine(box: Box) -> None:
    with opened(box), pytest.raises(errors.BusyError, match="a program"), opened(box):
        pass


def test_the_library_is_loaded_when_it_is_asked_for() -> None:
    code = "import sys, pullback; assert 'pullback.flows' not in sys.modules; pullback.connect; pullback.sync"
    run(sys.executable, "-c", code)


# -- recover ---------------------------------------------------------------------------------


def test_recover_shows_what_lasts_and_ends_it_when_told(box: Box) -> None:
    with opened(box) as machine:
        machine.checkpoint_create({"name": "monday"})
        machine.backup_begin({"mode": "pull", "disks": [{"name": "vda"}]}, {"name": "tuesday"})
        machine.export_start({"disks": [{"name": "vdb"}]})
    shown = last_json(box.cli("recover", f"qmp:{box.qmp}", "--json").stdout)
    assert sorted(one["kind"] for one in shown["adopted"]) == ["export", "pull"]
    assert shown["exports"] == ["vda", "vdb"]
    assert not shown["ended"]
    assert last_json(box.cli("recover", f"qmp:{box.qmp}", "--end", "--json").stdout)["ended"]
    assert box.leftovers() == []
    with opened(box) as machine:
        assert names(machine) == ["monday"]


def test_recover_of_a_machine_that_is_gone_removes_its_files(box: Box) -> None:
    with opened(box) as machine:
        snapshot = machine.snapshot_create({"name": "s", "disks": [{"name": "vda"}]})
    until(lambda: keepers(box) != [])
    os.kill(keepers(box)[0], signal.SIGKILL)  # who would remove them
    box.kill()
    done = box.cli("recover", f"qmp:{box.qmp}", "--json")
    shown = last_json(done.stdout)
    assert (done.returncode, shown["running"], shown["cleared"]) == (0, False, [snapshot.job])
    assert not Path(str(snapshot.disks[0].scratch)).exists()
    assert box.cli("recover", f"qmp:{box.qmp}").returncode == 1  # nothing is known of it any more


def test_untrack_ends_what_lasts_too(box: Box) -> None:
    with opened(box) as machine:
        machine.backup_begin({"mode": "pull"}, {"name": "tuesday"}, how=STACKED)
        machine.snapshot_create({"name": "s", "disks": [{"name": "vda"}]}, {"name": "wednesday"})
    assert box.cli("untrack", f"qmp:{box.qmp}").returncode == 0
    assert box.leftovers() == []
    with opened(box) as machine:
        assert names(machine) == []


# -- beside backups --------------------------------------------------------------------------


def test_a_backup_beside_a_snapshot_is_right_and_beside_a_job_is_refused(box: Box, tmp_path: Path) -> None:
    box.backup()
    at = box.image()
    with opened(box) as machine:
        machine.snapshot_create({"name": "s", "disks": [{"name": "vda"}, {"name": "vdb"}]}, how=STACKED)
        exports = machine.export_start({"disks": [{"name": "vda", "snapshot": "s"}, {"name": "vdb", "snapshot": "s"}]})
    box.write("vda", 0x19, 3 * MiB, MiB)
    report = box.backup()
    assert report.broken == ()
    assert box.restored() == box.image()
    for served in exports:
        assert copied(served.uri, tmp_path / "x") == at[served.target]
    with opened(box) as machine:
        machine.snapshot_delete("s")
        machine.backup_begin({"mode": "pull"})
    with pytest.raises(errors.BusyError, match="pull job"):
        box.backup()
    with opened(box) as machine:
        machine.backup_end()
    box.write("vda", 0x1A, 4 * MiB, 64 * KiB)
    assert box.backup().broken == ()
    assert box.restored() == box.image()
    assert box.leftovers() == []


def test_a_snapshot_of_a_disk_under_the_filter_is_refused_by_name(box: Box, tmp_path: Path) -> None:
    """A push holds its disks with the filter where it can: one filter a disk."""
    with opened(box) as machine:
        machine.backup_begin(push_document(tmp_path, "vda"), speed=64 * KiB)
        held = machine.snapshot_list()
        with pytest.raises(errors.DiskBusy, match="vda"):
            machine.snapshot_create({"name": "s", "disks": [{"name": "vda"}]})
        machine.snapshot_create({"name": "other", "disks": [{"name": "vdb"}]})
        machine.backup_abort()
        assert held == ()
        machine.snapshot_delete("other")
    assert box.leftovers() == []


def test_a_program_that_holds_the_machine_still_lets_go_of_what_must_not_stay(box: Box) -> None:
    owner = subprocess.Popen(["sleep", "60"])
    with opened(box) as machine:
        machine.backup_begin({"mode": "pull"}, {"name": "monday"}, how=pullback.How(owner=owner.pid))
        owner.kill()
        owner.wait()
        until(lambda: machine.backup_last() is not None)
        ended = machine.backup_last()
        assert ended is not None
        assert "has ended" in str(ended.error)
        with pytest.raises(errors.NoJob):
            machine.backup_end()
        assert not machine.backup_end(job=ended.job).success
        assert names(machine) == []
    assert box.leftovers() == []


def test_of_many_exports_of_a_machine_that_is_off_only_the_named_one_is_stopped(box: Box) -> None:
    """Ids are told apart whole: the first is how the eleventh begins."""
    box.quit()
    with off(box) as machine:
        machine.snapshot_create({"name": "s", "disks": [{"name": "vda"}]})
        wishes = [{"name": "vda", "snapshot": "s", "exportname": f"e{number}"} for number in range(12)]
        machine.export_start({"disks": wishes})
        machine.export_stop(["e1"])
        assert [served.name for served in machine.export_list()] == [f"e{n}" for n in range(12) if n != 1]


def test_ctrl_c_without_asyncio_waits_until_the_call_has_cleaned_up() -> None:
    code = """
import asyncio, os, signal, threading
from pullback import sync

cleaned = []

async def work():
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.5)
        cleaned.append(True)

loop = sync._Loop()
threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()  # a second one does not cut it short
try:
    loop.run(work())
except KeyboardInterrupt:
    print("interrupted", cleaned)
loop.close()
"""
    assert run(sys.executable, "-c", code) == "interrupted [True]\n"
