"""What lasts is whole or not at all: snapshots, jobs and exports, with their maker killed or refused anywhere."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kit import CLUSTER, Box, MakeBox
from lasting import TUESDAY, dirty, job, names, read
from pullback import errors, sync
from pullback.programs import qemu
from pullback.units import MiB
from victim import eventually, running
from zygote import Order, Told, Zygote, zygote

SIZE = 2 * MiB
_PATIENCE = 15.0


@pytest.fixture
def fork(short_dir: Path) -> Iterator[Zygote]:
    """Makes processes that die."""
    with zygote(short_dir) as made:
        yield made


@dataclass
class Stage:
    """A machine with a checkpoint `monday`, and what has changed since."""

    box: Box
    fork: Zygote
    changed: dict[str, set[int]] = field(default_factory=lambda: {"vda": set(), "vdb": set()})
    count: int = 0
    #: The disks at the instant of what was made last.
    at: dict[str, bytes] = field(default_factory=dict)
    #: Clusters that had changed then.
    then: dict[str, set[int]] = field(default_factory=dict)
    #: The call that was struck said that it did it.
    done: bool = False

    def open(self) -> Any:
        """The machine by the library; a guard that is at work is waited for."""
        return sync.connect(f"qmp:{self.box.qmp}", state_dir=self.box.directories.state)

    def order(self, call: str, *words: Any, **more: Any) -> Order:
        """That call."""
        options = more.pop("options", {})
        state = str(self.box.directories.state)
        return Order(socket=str(self.box.qmp), state=state, call=call, words=list(words), options=options, **more)

    def write(self) -> None:
        """Something new on each disk."""
        self.count += 1
        for disk in self.box.disks:
            cluster = (self.count * 3) % (SIZE // CLUSTER)
            self.box.write(disk.id, self.count % 250 + 1, cluster * CLUSTER + 512, 512)
            self.changed[disk.id].add(cluster)

    def now(self) -> None:
        """Remember this instant."""
        self.at = self.box.image()
        self.then = {disk: set(clusters) for disk, clusters in self.changed.items()}

    @property
    def out(self) -> Path:
        """Where pushes go."""
        return self.box.directory / "out"


def prepared(make_box: MakeBox, fork: Zygote, *disks: qemu.Disk) -> Stage:
    """A machine with two disks."""
    box = make_box(*disks, size=SIZE)
    stage = Stage(box, fork)
    for disk in box.disks:
        box.write(disk.id, 0x11, 0, MiB)
    with stage.open() as machine:
        machine.checkpoint_create({"name": "monday"})
    stage.out.mkdir()
    return stage


# -- the calls -------------------------------------------------------------------------------

DISKS = [{"name": "vda"}, {"name": "vdb"}]
SNAPSHOT = {"name": "s", "disks": DISKS}
PULL = {"mode": "pull", "disks": [{"name": "vda", "incremental": "monday"}, {"name": "vdb"}]}
EXPORTS = {
    "disks": [
        {"name": "vda", "snapshot": "s", "exportname": "first", "checkpoint": "monday"},
        {"name": "vdb", "snapshot": "s", "exportname": "second"},
        {"name": "vdb", "exportname": "third"},
    ]
}


def push(stage: Stage) -> dict[str, object]:
    """A push of both disks to files."""
    return {
        "mode": "push",
        "incremental": "monday",
        "disks": [
            {"name": name, "type": "file", "driver": "raw", "target": {"file": str(stage.out / name)}}
            for name in ("vda", "vdb")
        ],
    }


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call that is struck."""

    order: Callable[[Stage], Order]
    #: Makes what the call works on.
    before: Callable[[Stage, sync.Machine], object] = lambda stage, machine: None
    #: Looks at what there is, and takes it away again.
    after: Callable[[Stage, sync.Machine], None]


def no_tuesday(machine: sync.Machine) -> None:
    """Back to where it began."""
    if "tuesday" in names(machine):
        machine.checkpoint_delete("tuesday")


def pull_whole(stage: Stage, machine: sync.Machine) -> bool:
    """Is there a pull, and all of it?"""
    found = job(machine)
    if found is None:
        assert machine.export_list() == ()
        return False
    assert {served.target for served in found.exports} == {"vda", "vdb"}
    for served in found.exports:
        assert read(served) == stage.at[served.target]
        assert not served.contexts or dirty(served) == stage.then[served.target]
    assert names(machine) == ["monday", "tuesday"]
    return True


def pull_begun(stage: Stage, machine: sync.Machine) -> None:
    """All or nothing."""
    there = pull_whole(stage, machine)
    assert there or not stage.done
    if there:
        machine.backup_abort()
    assert names(machine) == ["monday"]


def pull_ended(stage: Stage, machine: sync.Machine) -> None:
    """There, or gone with the checkpoint left."""
    there = pull_whole(stage, machine)
    assert not (there and stage.done)
    if there:
        machine.backup_end()
    assert names(machine) == ["monday", "tuesday"]
    last = machine.backup_last()
    assert last is not None
    assert last.success
    machine.checkpoint_delete("tuesday")


def pull_aborted(stage: Stage, machine: sync.Machine) -> None:
    """There, or as if it had never been."""
    there = pull_whole(stage, machine)
    assert not (there and stage.done)
    if there:
        machine.backup_abort()
    assert names(machine) == ["monday"]
    last = machine.backup_last()
    assert last is not None
    assert last.error == "it was aborted"


def pushed(stage: Stage, machine: sync.Machine) -> None:
    """Complete files and a checkpoint, or neither."""
    if job(machine) is not None:
        with contextlib.suppress(errors.NoJob):  # the keeper was there first
            machine.backup_wait(timeout=20)
    there = {path.name for path in stage.out.iterdir()}
    assert there in ({"vda", "vdb"}, set())
    assert there or not stage.done
    assert names(machine) == (["monday", "tuesday"] if there else ["monday"])
    for name in there:
        content = (stage.out / name).read_bytes()
        for cluster in stage.then[name]:
            piece = slice(cluster * CLUSTER, (cluster + 1) * CLUSTER)
            assert content[piece] == stage.at[name][piece]
        (stage.out / name).unlink()
    no_tuesday(machine)


def push_aborted(stage: Stage, machine: sync.Machine) -> None:
    """Nothing is left, or it still runs."""
    if job(machine) is not None:
        assert not stage.done
        assert {one.status for one in machine.backup_stats().disks} <= {"running", "pending"}
        machine.backup_abort()
    assert list(stage.out.iterdir()) == []
    assert names(machine) == ["monday"]


def snapshot_made(stage: Stage, machine: sync.Machine) -> None:
    """With its checkpoint, or without either."""
    there = machine.snapshot_list()
    assert there or not stage.done
    assert names(machine) == (["monday", "tuesday"] if there else ["monday"])
    if there:
        for served in machine.export_start({"disks": EXPORTS["disks"][:2]}):
            assert read(served) == stage.at[served.target]
        machine.snapshot_delete("s")
        machine.checkpoint_delete("tuesday")


def snapshot_deleted(stage: Stage, machine: sync.Machine) -> None:
    """There with its exports, or gone with them."""
    there = machine.snapshot_list()
    assert not (there and stage.done)
    served = [one for one in machine.export_list() if one.snapshot]
    assert len(served) == (2 if there else 0)
    for one in served:
        assert read(one) == stage.at[one.target]
    if there:
        machine.snapshot_delete("s")
    machine.export_stop()


def exported(stage: Stage, machine: sync.Machine) -> None:
    """All three, or none."""
    served = machine.export_list()
    assert {one.name for one in served} in ({"first", "second", "third"}, set())
    assert served or not stage.done
    assert [one.name for one in machine.snapshot_list()] == ["s"]
    for one in served:
        assert read(one) == (stage.at if one.snapshot else stage.box.image())[one.target]
        assert not one.contexts or dirty(one) == stage.then[one.target]
    for one in served or machine.export_start(EXPORTS):
        assert read(one) == (stage.at if one.snapshot else stage.box.image())[one.target]
    machine.export_stop()
    machine.snapshot_delete("s")


def stopped(stage: Stage, machine: sync.Machine) -> None:
    """What is listed is there."""
    assert not (stage.done and machine.export_list())
    for one in machine.export_list():
        assert read(one) == (stage.at if one.snapshot else stage.box.image())[one.target]
    machine.export_stop()
    machine.snapshot_delete("s")


def with_exports(stage: Stage, machine: sync.Machine) -> None:
    """A snapshot and exports of it, and of a disk."""
    machine.snapshot_create(SNAPSHOT)
    machine.export_start(EXPORTS)


CASES = {
    "snapshot": Case(order=lambda stage: stage.order("snapshot_create", SNAPSHOT, TUESDAY), after=snapshot_made),
    "pull": Case(order=lambda stage: stage.order("backup_begin", PULL, TUESDAY), after=pull_begun),
    "push": Case(order=lambda stage: stage.order("backup_begin", push(stage), TUESDAY), after=pushed),
    "pull end": Case(
        before=lambda stage, machine: machine.backup_begin(PULL, TUESDAY),
        order=lambda stage: stage.order("backup_end"),
        after=pull_ended,
    ),
    "pull abort": Case(
        before=lambda stage, machine: machine.backup_begin(PULL, TUESDAY),
        order=lambda stage: stage.order("backup_abort"),
        after=pull_aborted,
    ),
    "push end": Case(
        before=lambda stage, machine: machine.backup_begin(push(stage), TUESDAY),
        order=lambda stage: stage.order("backup_wait", options={"timeout": 20}),
        after=pushed,
    ),
    "push abort": Case(
        before=lambda stage, machine: machine.backup_begin(push(stage), TUESDAY, speed=4096),
        order=lambda stage: stage.order("backup_abort"),
        after=push_aborted,
    ),
    "export": Case(
        before=lambda stage, machine: machine.snapshot_create(SNAPSHOT),
        order=lambda stage: stage.order("export_start", EXPORTS),
        after=exported,
    ),
    "export stop": Case(before=with_exports, order=lambda stage: stage.order("export_stop"), after=stopped),
    "delete": Case(
        before=with_exports, order=lambda stage: stage.order("snapshot_delete", "s"), after=snapshot_deleted
    ),
}


# -- striking --------------------------------------------------------------------------------


def struck(stage: Stage, case: Case, **how: Any) -> Told:
    """The call with that happening to it, and the proof that it was whole or nothing."""
    stage.write()
    stage.now()
    with stage.open() as machine:
        case.before(stage, machine)
    order = case.order(stage)
    changes = {name: getattr(order, name) for name in Order.__dataclass_fields__} | how
    told = stage.fork.run(Order(**changes))
    where = f"{how}: {told.commands[-3:]} {told.code} {told.said}"
    print(where)
    assert "Traceback" not in told.said, where
    assert how or told.code == 0, where
    stage.done = told.code == 0
    stage.write()
    if not how.get("all"):  # else the next connection lets it go on
        eventually(lambda: running(stage.box), seconds=3, what=f"{where}: running again")
    proven(stage, case, where)
    return told


def proven(stage: Stage, case: Case, where: str) -> None:
    """Afterwards a new connection finds it so."""
    connected(stage, lambda machine: case.after(stage, machine))
    assert running(stage.box), where
    with stage.open() as machine:
        for disk in stage.box.disks:
            extents = machine.changes(disk.id, since="monday").extents
            found = {c for e in extents for c in range(e.start // CLUSTER, (e.start + e.length) // CLUSTER)}
            assert found == stage.changed[disk.id], where
    # A keeper may just be asking scratch for an answer.
    eventually(lambda: stage.box.leftovers() == [], seconds=3, what=f"{where}: {stage.box.leftovers()}")
    assert list(stage.out.iterdir()) == [], where


def connected(stage: Stage, work: Callable[[sync.Machine], None]) -> None:
    """Connect as soon as a guard lets us, and do it."""
    held: list[str] = []

    def tried() -> bool:
        try:
            with stage.open() as machine:
                work(machine)
            return True
        except (errors.MonitorBusy, errors.BusyError) as error:
            held.append(str(error))
            return False

    eventually(tried, seconds=_PATIENCE, what="connected")


_QUERIES = ("query-", "qom-get", "qom-list", "x-debug-")


def picked(commands: list[str], how: str) -> list[int]:
    """Where to strike. To die around a query is to die after the last change."""
    changing = [n for n, name in enumerate(commands, 1) if not name.startswith(_QUERIES)]
    if how != "refuse":
        return [1, *changing]
    return [n for n, name in enumerate(commands, 1) if name != "qom-get" or n % 8 == 0]


def sweep(stage: Stage, case: Case, **how: Any) -> int:
    """Strike at each of them."""
    numbers = picked(struck(stage, case).commands, how["how"])
    for number in numbers:
        told = struck(stage, case, number=number, **how)
        assert told.code in (0, 1, 143, -signal.SIGKILL), told
        killed = how["how"] != "refuse" and how.get("signal", signal.SIGKILL) == signal.SIGKILL
        assert told.code != 0 or not killed or number > len(told.commands), told  # a signal may come when all is done
    return len(numbers)


WAYS: dict[str, dict[str, Any]] = {
    "killed before": {"how": "before"},
    "killed after": {"how": "after"},
    "killed with the guard": {"how": "after", "all": True},
    "refused": {"how": "refuse"},
    "terminated": {"how": "after", "signal": signal.SIGTERM},
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", list(CASES))
def test_struck_somewhere_it_is_whole_or_not_at_all(make_box: MakeBox, fork: Zygote, name: str) -> None:
    """At two places each, in ways that take turns; at every command, see below."""
    stage, index = prepared(make_box, fork), list(CASES).index(name)
    length = len(struck(stage, CASES[name]).commands)
    ways = list(WAYS.values())
    for turn, place in enumerate((0.35, 0.75)):
        struck(stage, CASES[name], number=int(length * place), **ways[(index + 2 * turn) % len(ways)])


@pytest.mark.timeout(300)
def test_a_push_of_a_disk_in_an_iothread_is_whole_or_not_at_all(make_box: MakeBox, fork: Zygote) -> None:
    stage = in_iothread(make_box, fork)
    length = len(struck(stage, CASES["push"]).commands)
    for turn, how in enumerate(list(WAYS.values())[:4]):
        struck(stage, CASES["push"], number=int(length * (0.45 + 0.1 * turn)), **how)


def in_iothread(make_box: MakeBox, fork: Zygote) -> Stage:
    """A machine with one disk in an iothread and one without."""
    first = qemu.Disk(id="vda", path=Path("a.qcow2"), iothread="io1")
    return prepared(make_box, fork, first, qemu.Disk(id="vdb", path=Path("b.qcow2")))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", list(CASES))
def test_struck_at_every_command_it_is_whole_or_not_at_all(
    make_box: MakeBox, fork: Zygote, name: str, way: str
) -> None:
    stage = prepared(make_box, fork)
    count = sweep(stage, CASES[name], **WAYS[way])
    print(f"{name}, {way}: {count} commands")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", list(WAYS))
def test_a_push_in_an_iothread_struck_at_every_command(make_box: MakeBox, fork: Zygote, way: str) -> None:
    stage = in_iothread(make_box, fork)
    count = sweep(stage, CASES["push"], **WAYS[way])
    print(f"{way}: {count} commands")
