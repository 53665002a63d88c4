"""What lasts, and the world around it: scratch, QEMU's end, other people's commands, other machines."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit import CLUSTER, Box, MakeBox
from lasting import TUESDAY, job, names, read
from mounts import Mount, freeze, thawed_at_the_end
from pullback import errors, state, sync
from pullback.flows.snapshots import How
from pullback.programs import qemu
from pullback.state import history
from pullback.units import KiB, MiB
from victim import eventually, running

pytestmark = pytest.mark.timeout(120)

PULL = {"mode": "pull", "disks": [{"name": "vda", "incremental": "monday"}]}
GUEST_SECONDS = 7.0


@pytest.fixture
def box(make_box: MakeBox) -> Box:
    """A machine with a checkpoint."""
    made = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=4 * MiB)
    made.write("vda", 0x11, 0, MiB)
    with opened(made) as machine:
        machine.checkpoint_create({"name": "monday"})
    return made


def opened(box: Box, places: Box | None = None) -> Any:
    """The machine by the library."""
    return sync.connect(f"qmp:{box.qmp}", state_dir=(places or box).directories.state)


def a_push(box: Box) -> dict[str, object]:
    """A push of its disk."""
    target = {"file": str(box.directory / "out")}
    return {"mode": "push", "disks": [{"name": "vda", "type": "file", "driver": "raw", "target": target}]}


def keepers(box: Box) -> list[int]:
    """Those of a machine's state directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "pullback.engine.keeping" in words and str(box.directories.state) in " ".join(words):
            found.append(int(process.name))
    return found


def take_room(directory: Path, leave: int) -> None:
    """Let only that be free."""
    status = os.statvfs(directory)
    with open(directory / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave)


def last(box: Box) -> history.EndedJob | None:
    """How the last job ended."""
    return history.load(box.directories.state, box.name)


def as_before(box: Box, changed: set[int]) -> None:
    """Nothing is left, the checkpoint is as it was and knows every change."""
    with opened(box) as machine:
        assert job(machine) is None
        assert names(machine) == ["monday"]
        extents = machine.changes("vda", since="monday").extents
        assert {c for e in extents for c in range(e.start // CLUSTER, (e.start + e.length) // CLUSTER)} == changed
    assert box.leftovers() == []


class Writer:
    """Writes of the guest, each of which must succeed; the longest wait is remembered."""

    def __init__(self, box: Box, first: int = 0) -> None:
        self._box = box
        self._first = first
        self.changed: set[int] = set()
        self.longest = 0.0

    def write(self) -> None:
        """One more."""
        cluster = (self._first + len(self.changed)) % 64
        begun = time.monotonic()
        self._box.write("vda", cluster + 1, cluster * CLUSTER, 4 * KiB)
        self.longest = max(self.longest, time.monotonic() - begun)
        self.changed.add(cluster)

    def until(self, done: Callable[[], bool], seconds: float) -> float:
        """Go on until that; gives how long it took."""
        begun = time.monotonic()
        while not done():
            assert time.monotonic() - begun < seconds
            self.write()
            time.sleep(0.05)
        return time.monotonic() - begun


# -- scratch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keeper_killed", [False, True])
def test_a_pull_goes_before_scratch_takes_the_hosts_last_room(box: Box, mount: Mount, keeper_killed: bool) -> None:
    directory, writer = mount.ext4(1536 * MiB), Writer(box)
    with opened(box) as machine:
        machine.backup_begin(PULL, TUESDAY, how=How(scratch=directory))
    eventually(lambda: keepers(box) != [], seconds=10, what="a keeper")
    if keeper_killed:
        os.kill(keepers(box)[0], signal.SIGKILL)
        eventually(lambda: keepers(box) == [], seconds=10, what="killed")
    take_room(directory, 900 * MiB)
    if keeper_killed:
        time.sleep(1)
        assert last(box) is None
        with opened(box) as machine:
            assert job(machine) is not None
    took = writer.until(lambda: last(box) is not None, 15)
    print(f"gone after {took:.1f} s; the guest waited at most {writer.longest * 1000:.0f} ms")
    ended = last(box)
    assert ended is not None
    assert "free" in str(ended.error)
    as_before(box, writer.changed)
    assert {path.name for path in directory.iterdir()} <= {"filler", "lost+found"}


@pytest.mark.parametrize("mode", ["push", pytest.param("pull", marks=pytest.mark.slow)])
def test_what_hangs_is_left_alone_until_it_answers_and_goes_then(box: Box, mount: Mount, mode: str) -> None:
    """In a push the guest writes meanwhile: the filter lets it go on after its deadline, and the snapshot is broken."""
    directory, writer = mount.ext4(1536 * MiB), Writer(box, first=10)  # not copied yet
    with opened(box) as machine:
        document = PULL if mode == "pull" else a_push(box)
        speed = None if mode == "pull" else 4 * KiB
        machine.backup_begin(document, TUESDAY, how=How(scratch=directory), speed=speed)
    with thawed_at_the_end(directory):
        freeze(directory)
        begun = time.monotonic()
        while time.monotonic() - begun < 10:
            if mode == "push" and not writer.changed:
                writer.write()
            asked = time.monotonic()
            there = [node["node-name"] for node in box.command("query-named-block-nodes", {"flat": True})]
            assert time.monotonic() - asked < 1.0
            assert any(name.endswith("-scr0") for name in there)
            time.sleep(0.2)
        assert last(box) is None
    eventually(lambda: last(box) is not None, seconds=20, what="gone")
    ended = last(box)
    assert ended is not None
    print(f"{ended.error}; the guest waited at most {writer.longest:.1f} s")
    assert "does not answer" in str(ended.error)
    assert mode == "pull" or 3.5 < writer.longest < GUEST_SECONDS
    as_before(box, writer.changed)
    assert not (box.directory / "out").exists()


# -- the end of QEMU -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "quit", "term"])
@pytest.mark.parametrize("mode", ["pull", "push"])
def test_when_qemu_ends_nothing_stays_on_disk(box: Box, mode: str, how: str) -> None:
    with opened(box) as machine:
        if mode == "pull":
            machine.backup_begin(PULL, TUESDAY)
        else:
            machine.backup_begin(a_push(box), TUESDAY, speed=4 * KiB)
        machine.export_start({"disks": [{"name": "vda", "exportname": "mine"}]})
    assert box.process is not None
    if how == "quit":
        box.quit()
    else:
        box.process.kill(signal.SIGKILL if how == "kill" else signal.SIGTERM)
        box.close()
    base = box.directories.state

    def left() -> list[Path]:
        found = [path for folder in ("jobs", "scratch", "run") for path in (base / folder).glob("*")]
        return [*found, *box.directory.glob("*out*")]

    eventually(lambda: not [path for path in left() if "export" not in told(path)], seconds=10, what=f"{left()}")
    eventually(lambda: last(box) is not None, seconds=5, what="told")
    ended = last(box)
    assert ended is not None
    assert ended.error == "the machine ended before it"
    box.start()
    with opened(box) as machine:
        assert machine.snapshot_list() == ()
        assert machine.export_list() == ()
    assert left() == []
    assert not (state.machine_directory(base, box.name) / "server.json").exists()


def told(path: Path) -> str:
    """What a record is of: exports of disks have no keeper, so they wait for the next connection."""
    record = path if path.suffix == ".json" else path.parent.parent / "jobs" / f"{path.name}.json"
    try:
        return "export" if '"kind": "export"' in record.read_text() else ""
    except FileNotFoundError:  # the keeper tidied it up between our look at the folder and this one
        return ""


# -- other people's commands -----------------------------------------------------------------


def test_a_server_that_somebody_else_stopped_is_not_told_any_more_and_can_be_started_again(box: Box) -> None:
    at = box.image()["vda"]
    with opened(box) as machine:
        machine.backup_begin(PULL, TUESDAY)
        box.command("nbd-server-stop")
        assert machine.export_list() == ()
        assert not machine.backup_abort().success
        found = machine.backup_begin(PULL, TUESDAY)
        assert read(found.exports[0]) == at
    box.command("nbd-server-stop")
    with opened(box) as machine:
        assert machine.backup_info().exports == ()
        machine.backup_abort()
        [served] = machine.export_start({"disks": [{"name": "vda"}]})
        assert read(served) == at
    box.command("nbd-server-stop")
    with opened(box) as machine:
        assert machine.export_list() == ()
    as_before(box, set())


def test_an_export_that_somebody_else_ended_is_not_told_any_more(box: Box) -> None:
    with opened(box) as machine:
        found = machine.backup_begin(PULL, TUESDAY)
    box.command("block-export-del", {"id": found.exports[0].id, "mode": "hard"})
    with opened(box) as machine:
        assert machine.backup_info().exports == ()
        machine.backup_abort()
    as_before(box, set())


def test_more_than_ten_exports_are_stopped_one_by_one(box: Box) -> None:
    """The id of the second begins that of the eleventh."""
    disks = [{"name": "vda", "exportname": f"e{number}"} for number in range(12)]
    with opened(box) as machine:
        for disk in disks:
            machine.export_start({"disks": [disk]})
        machine.export_stop(["e1"])
        assert {served.name for served in machine.export_list()} == {f"e{n}" for n in range(12)} - {"e1"}
        machine.export_stop()
    as_before(box, set())


def test_what_somebody_else_holds_is_removed_when_it_is_let_go(box: Box) -> None:
    """Whoever reads our scratch hinders us; the machine can be worked with meanwhile."""
    with opened(box) as machine:
        found = machine.backup_begin(PULL, TUESDAY)
    node = f"pullback-{found.job}-scr0"
    box.command("block-export-add", {"type": "nbd", "id": "mine", "node-name": node, "name": "mine"})
    box.write("vda", 0x12, 0, CLUSTER)
    with opened(box) as machine, pytest.raises(errors.CleanupIncomplete):
        machine.backup_abort()
    with opened(box) as machine:
        assert job(machine) is None
        assert "monday" in names(machine)
    box.command("block-export-del", {"id": "mine", "mode": "hard"})
    eventually(lambda: last(box) is not None, seconds=10, what="its keeper goes on")
    as_before(box, {0})


def test_a_reset_and_a_foreign_backup_job_leave_a_pull_as_it_is(box: Box) -> None:
    at = box.image()["vda"]
    with opened(box) as machine:
        found = machine.backup_begin(PULL, TUESDAY)
    box.command("system_reset")
    box.command("blockdev-add", {"driver": "null-co", "node-name": "sink", "size": 4 * MiB})
    box.command("blockdev-backup", {"job-id": "theirs", "device": "vda-format", "target": "sink", "sync": "full"})
    box.write("vda", 0x13, 0, MiB)
    assert read(found.exports[0]) == at
    with opened(box) as machine:
        machine.backup_abort()
    as_before(box, set(range(16)))
    assert running(box)


def test_a_migration_with_a_pull_open_fails_or_ends_and_the_pull_can_be_aborted(box: Box) -> None:
    with opened(box) as machine:
        machine.backup_begin(PULL, TUESDAY)
    box.command("migrate", {"uri": "exec:cat > /dev/null"})
    status: list[str] = []

    def over() -> bool:
        status.append(box.command("query-migrate").get("status", ""))
        return status[-1] in ("completed", "failed")

    eventually(over, seconds=30, what="migrated")
    print(status[-1], box.command("query-status")["status"])
    box.command("cont")
    with opened(box) as machine:
        machine.backup_abort()
    box.write("vda", 0x14, 0, CLUSTER)
    as_before(box, {0})


# -- other machines --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["db01", "web01"])
def test_a_second_machine_at_the_same_state_directory_keeps_its_own(box: Box, make_box: MakeBox, name: str) -> None:
    """Also one of the same name: what the other holds lives on."""
    other = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=MiB, name=name)
    at = box.image()["vda"]
    with opened(box) as machine:
        found = machine.backup_begin(PULL, TUESDAY)
    box.write("vda", 0x15, 0, MiB)
    with opened(other, box) as machine:
        assert job(machine) is None
        machine.snapshot_create({"name": "theirs", "disks": [{"name": "vda"}]})
        assert [snapshot.name for snapshot in machine.snapshot_list()] == ["theirs"]
    assert read(found.exports[0]) == at
    with opened(box) as machine:
        assert machine.backup_info().job == found.job
        assert machine.snapshot_list() == ()
        machine.backup_abort()
        assert names(machine) == ["monday"]
    with opened(other, box) as machine:
        assert [snapshot.name for snapshot in machine.snapshot_list()] == ["theirs"]
        machine.snapshot_delete("theirs")
    as_before(box, set(range(16)))
