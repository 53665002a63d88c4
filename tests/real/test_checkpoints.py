"""Checkpoints by themselves, on real QEMU and on images of a machine that is off, against a model of all writes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from agents import agent
from kit import CLUSTER, SIZE, Box, MakeBox, last_json
from pullback import errors, state
from pullback.engine import tracking
from pullback.extents import Extent
from pullback.flows import checkpoints as flow
from pullback.flows import machines as machine_flow
from pullback.flows.opening import open_machine
from pullback.machine import Machine
from pullback.model import urls
from pullback.model.backups import Quiesce, Quiescing
from pullback.model.documents import checkpoint as documents
from pullback.model.documents.checkpoint import CheckpointDisk, CheckpointDocument
from pullback.model.points import Mode
from pullback.model.tree import Tree
from pullback.model.xml import checkpoint as xml
from pullback.programs import qemu, qemu_img
from pullback.state import checkpoints as saved
from pullback.units import KiB, MiB
from relay import Relay, Way
from victim import Victim, eventually, running

T = TypeVar("T")
Work = Callable[[Machine, state.Directories], Awaitable[T]]


def url(box: Box) -> urls.Machine:
    """The machine, running or off (QEMU removes its socket at its end)."""
    if box.qmp.exists():
        return urls.QmpMachine(socket=box.qmp)
    return urls.ImagesMachine(images=tuple(urls.Image(target=d.id, path=d.path) for d in box.disks))


def do(box: Box, work: Work[T], machine: urls.Machine | None = None) -> T:
    """Run `work` with the machine open."""

    async def run() -> T:
        async with open_machine(machine or url(box), box.directories, command="test", name="web01") as opened:
            return await work(opened, box.directories)

    return asyncio.run(run())


def create(box: Box, name: str | None = None, *disks: str, **options: Any) -> flow.Created:
    document = CheckpointDocument(name=name, disks=tuple(CheckpointDisk(name=disk) for disk in disks))
    return do(box, lambda machine, places: flow.create(machine, places, document, **options))


def tree(box: Box, **options: Any) -> Tree:
    return do(box, lambda machine, places: flow.listing(machine, places, **options))


def names(box: Box) -> list[str]:
    return [found.name for found in tree(box).checkpoints]


def info(box: Box, name: str, **options: Any) -> flow.Info:
    return do(box, lambda machine, places: flow.info(machine, places, name, **options))


def delete(box: Box, name: str, **options: Any) -> flow.Deleted:
    return do(box, lambda machine, places: flow.delete(machine, places, name, **options))


def redefine(box: Box, document: CheckpointDocument, **options: Any) -> flow.Info:
    return do(box, lambda machine, places: flow.redefine(machine, places, document, **options))


def changes(box: Box, target: str, since: str, until: str | None = None) -> list[tuple[int, int]]:
    found = do(box, lambda machine, places: flow.changes(machine, places, target, since, until))
    return [(extent.start, extent.length) for extent in found.extents]


def kept(box: Box) -> list[str]:
    """Documents on disk."""
    place = saved.directory(box.directories, "web01")
    return sorted(path.name for path in place.iterdir()) if place.is_dir() else []


@contextlib.contextmanager
def unchanged(box: Box) -> Iterator[None]:
    """Neither bitmaps nor documents are others when the block was left, and nothing else is left."""

    def look() -> object:
        bitmaps = {disk.id: sorted(b["name"] for b in box.checkpoints(disk.id)) for disk in box.disks}
        return bitmaps, kept(box)

    before = look()
    yield
    assert look() == before
    assert box.leftovers() == []


@dataclass
class History:
    """Every write and every checkpoint of a disk, in order: the model that bitmaps are compared with."""

    box: Box
    rolls: random.Random
    events: list[str | int] = field(default_factory=list)

    def write(self, disk: str = "vda", times: int = 3) -> None:
        """Some writes in random places."""
        for _ in range(times):
            granule = self.rolls.randrange(SIZE // CLUSTER)
            what = self.rolls.choice((self.box.zero, self.box.discard, None))
            if what is None:
                self.box.write(disk, self.rolls.randrange(1, 255), granule * CLUSTER + 512, 4 * KiB)
            else:
                what(disk, granule * CLUSTER, CLUSTER)
            self.events.append(granule)

    def checkpoint(self, name: str) -> None:
        create(self.box, name)
        self.events.append(name)

    def between(self, since: str, until: str | None = None) -> list[tuple[int, int]]:
        """What must have changed."""
        end = self.events.index(until) if until else len(self.events)
        granules = {event for event in self.events[self.events.index(since) : end] if isinstance(event, int)}
        merged: list[tuple[int, int]] = []
        for granule in sorted(granules):
            start, length = merged[-1] if merged else (-1, 0)
            if merged and start + length == granule * CLUSTER:
                merged[-1] = (start, length + CLUSTER)
            else:
                merged.append((granule * CLUSTER, CLUSTER))
        return merged


def is_exact(history: History, left: list[str]) -> None:
    """What changed since each that is left, and up to each next one, is what the model says; sizes too."""
    box = history.box

    async def work(machine: Machine, places: state.Directories) -> None:
        sized = await flow.listing(machine, places, sizes=True)
        for since, until in [*itertools.pairwise(left), *((name, None) for name in left)]:
            found = await flow.changes(machine, places, "vda", since, until)
            told = [(extent.start, extent.length) for extent in found.extents]
            assert told == history.between(since, until), (since, until)
            disk = sized.require(since).disk("vda")
            assert disk is not None
            assert disk.dirty == sum(length for _, length in history.between(since))

    do(box, work)


# -- making and looking ----------------------------------------------------------------------


def test_a_checkpoint_alone_tracks_every_disk_without_a_pause_and_leaves_nothing(box: Box) -> None:
    made = create(box, "monday")
    assert [disk.target for disk in made.info.checkpoint.disks] == ["vda", "vdb"]
    assert made.info.checkpoint.problem is None
    assert made.window.seconds == 0
    assert running(box)
    assert box.leftovers() == []
    assert kept(box) == ["monday.json"]
    box.write("vda", 0x11, 3 * CLUSTER + 1024, 2 * CLUSTER)
    assert changes(box, "vda", "monday") == [(3 * CLUSTER, 3 * CLUSTER)]
    assert changes(box, "vdb", "monday") == []
    assert changes(box, "vda", "monday", "monday") == []
    assert box.leftovers() == []


def test_defaults_are_a_name_from_the_time_all_disks_and_the_current_one_as_parent(box: Box) -> None:
    first, second = create(box), create(box)
    one, two = first.info.checkpoint, second.info.checkpoint
    assert first.info.document.creation_time is not None
    assert one.created is not None
    assert int(one.created.timestamp()) == first.info.document.creation_time
    assert int(one.name) == first.info.document.creation_time
    assert int(two.name) > int(one.name)
    assert (one.parent, two.parent) == (None, one.name)
    assert do(box, flow.current).name == two.name
    assert do(box, lambda machine, places: flow.parent(machine, places, two.name)).name == one.name
    with pytest.raises(errors.NoCheckpoint):
        do(box, lambda machine, places: flow.parent(machine, places, one.name))


def test_the_document_keeps_description_domain_and_the_machine(box: Box) -> None:
    domain = '<domain type="kvm"><name>web01</name></domain>'
    wish = CheckpointDocument(name="a", description="two\nlines ü", domain=domain, disks=(CheckpointDisk(name="vdb"),))
    do(box, lambda machine, places: flow.create(machine, places, wish))
    found = info(box, "a", sizes=True)
    assert found.document.description == "two\nlines ü"
    assert found.document.domain == domain
    assert [(disk.name, str(disk.checkpoint), disk.size) for disk in found.document.disks] == [
        ("vda", "no", None),
        ("vdb", "bitmap", 0),
    ]
    assert found.kept["name"] == "web01"
    disks = found.kept["disks"]
    assert isinstance(disks, list)
    assert [(disk["target"], disk["size"], disk["format"]) for disk in disks] == [
        ("vda", SIZE, "qcow2"),
        ("vdb", SIZE, "qcow2"),
    ]
    assert xml.parse(xml.serialise(found.document)) == found.document
    assert stat.S_IMODE(os.stat(saved.directory(box.directories, "web01") / "a.json").st_mode) == 0o600


def test_a_disk_is_named_by_its_image_too(box: Box) -> None:
    made = create(box, "a", str(box.disks[1].path))
    assert [disk.target for disk in made.info.checkpoint.disks] == ["vdb"]


def test_disks_that_cannot_be_tracked_are_left_out_or_refused_by_name(make_box: MakeBox) -> None:
    raw = qemu.Disk(id="vdb", path=Path("b.raw"), format="raw")
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), raw)
    made = create(box, "a")
    assert [disk.target for disk in made.info.checkpoint.disks] == ["vda"]
    assert made.info.notes == ("vdb is not tracked, because its format raw cannot hold bitmaps",)
    with pytest.raises(errors.Unsupported, match="vdb"):
        create(box, "b", "vda", "vdb")
    assert names(box) == ["a"]
    alone = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"))
    with pytest.raises(errors.Unsupported, match="no disk can be tracked"):
        create(alone, "a")


def test_the_tree_of_several_disks_is_asked_in_every_way(box: Box) -> None:
    create(box, "a")
    create(box, "b", "vda")
    create(box, "c", "vdb")
    create(box, "d")
    found = tree(box)
    assert [item.name for item in found.checkpoints] == ["a", "b", "c", "d"]
    assert [item.parent for item in found.checkpoints] == [None, "a", "b", "c"]
    assert [item.name for item in found.roots] == ["a"]
    assert [item.name for item in found.leaves] == ["d"]
    assert [item.name for item in found.descendants("b")] == ["c", "d"]
    assert [item.name for item in found.children("a")] == ["b"]
    assert found.current is not None
    assert found.current.name == "d"


# -- deleting --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_deleted_in_any_order_the_others_stay_exact(box: Box, seed: int) -> None:
    rolls = random.Random(seed)
    history = History(box, rolls)
    left = ["a", "b", "c", "d"]
    for name in left:
        history.checkpoint(name)
        history.write()
    is_exact(history, left)
    for name in rolls.sample(left, 3):
        delete(box, name)
        left.remove(name)
        history.write(times=1)
        assert names(box) == left
        is_exact(history, left)
    assert kept(box) == [f"{name}.json" for name in left]
    assert len(box.checkpoints("vda")) == len(box.checkpoints("vdb")) == 1
    assert box.leftovers() == []


def test_sizes_are_the_same_when_memory_allows_one_at_a_time(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(box, random.Random(9))
    for name in "abc":
        history.checkpoint(name)
        history.write()
    monkeypatch.setattr(tracking, "_MEMORY", 1)
    is_exact(history, ["a", "b", "c"])


def test_children_go_newest_first_and_in_one_piece(box: Box) -> None:
    history = History(box, random.Random(7))
    for name in "abcde":
        history.checkpoint(name)
        history.write()
    assert delete(box, "c", children_only=True).checkpoints == ("e", "d")
    is_exact(history, ["a", "b", "c"])
    assert delete(box, "b", children=True).checkpoints == ("c", "b")
    is_exact(history, ["a"])
    with pytest.raises(errors.UsageError):
        delete(box, "a", children=True, children_only=True)
    assert delete(box, "a", children_only=True).checkpoints == ()
    assert delete(box, "a").checkpoints == ("a",)
    assert names(box) == kept(box) == []
    assert box.checkpoints("vda") == []


def test_metadata_only_leaves_the_bitmaps(box: Box) -> None:
    history = History(box, random.Random(1))
    for name in "ab":
        history.checkpoint(name)
        history.write()
    delete(box, "a", metadata_only=True)
    assert kept(box) == ["b.json"]
    found = tree(box).require("a")
    assert (found.saved, found.problem) == (None, None)
    is_exact(history, ["a", "b"])


def test_the_children_of_one_that_is_deleted_get_its_parent(box: Box) -> None:
    create(box, "a", "vda")
    create(box, "b", "vdb")
    create(box, "c", "vda")
    delete(box, "b")
    assert [(item.name, item.parent) for item in tree(box).checkpoints] == [("a", None), ("c", "a")]
    [document] = [item.document for item in saved.load(box.directories, "web01").saved if item.name == "c"]
    assert document.parent == "a"


def test_deleting_what_a_backup_made_is_told_and_true(box: Box) -> None:
    box.write("vda", 0x11, 0, MiB)
    report = box.backup()
    assert report.point.checkpoint is not None
    create(box, "mine")
    done = delete(box, report.point.checkpoint)
    repository = report.point.checkpoint.split(".")[1]
    whole = f"the next backup to the repository {repository} reads it whole"
    assert done.notes == (f"vda: {whole}", f"vdb: {whole}")
    again = box.backup()
    assert {disk.mode for disk in again.point.disks} == {Mode.FULL}
    assert again.broken == ("vda", "vdb")
    assert box.restored() == box.image()
    assert "mine" in names(box)


def test_checkpoints_of_users_and_backups_live_side_by_side(box: Box) -> None:
    history = History(box, random.Random(5))
    history.checkpoint("a")
    history.write()
    box.backup()
    history.write()
    history.checkpoint("b")
    history.write()
    report = box.backup()
    assert {disk.mode for disk in report.point.disks} == {Mode.INCREMENTAL}
    history.write()
    is_exact(history, ["a", "b"])
    delete(box, "b")
    delete(box, "a")
    assert {disk.mode for disk in box.backup().point.disks} == {Mode.INCREMENTAL}
    assert box.restored() == box.image()


# -- refusals: nothing is changed ------------------------------------------------------------


HOSTILE = [".a", "-a", "a/b", "../a", "a b", "ä", "a\n", "x" * 151, "auto.1234.20260101T000000Z", "auto.x"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_name_is_refused_and_nothing_is_changed(box: Box, name: str) -> None:
    with unchanged(box), pytest.raises((errors.UsageError, errors.BadDocument)):
        do(box, lambda machine, places: flow.create(machine, places, documents.from_dict({"name": name})))


def test_documents_that_cannot_be_are_refused_and_nothing_is_changed(box: Box) -> None:
    create(box, "a")
    with unchanged(box):
        with pytest.raises(errors.CheckpointExists):
            create(box, "a")
        for disks in (("vdz",), ("vda", "vda"), ("/nowhere",)):
            with pytest.raises(errors.BadDocument):
                create(box, "b", *disks)
        for work in (
            lambda: delete(box, "b"),
            lambda: info(box, "b"),
            lambda: changes(box, "vda", "b"),
            lambda: changes(box, "vda", "a", "b"),
            lambda: delete(box, "../../a"),
        ):
            with pytest.raises(errors.NoCheckpoint):
                work()
        with pytest.raises(errors.UnknownDisk):
            changes(box, "vdz", "a")
    create(box, "c")
    with unchanged(box), pytest.raises(errors.CheckpointInconsistent, match="not newer"):
        changes(box, "vda", "c", "a")


def test_a_bitmap_in_use_makes_it_busy_and_nothing_is_changed(box: Box) -> None:
    for name in "abc":
        create(box, name)
    node = box.command("query-named-block-nodes", {"flat": True})
    [vda] = [n for n in node if n["drv"] == "qcow2" and n["file"] == str(box.disks[0].path)]
    [bitmap] = [b["name"] for b in box.checkpoints("vda") if b["name"].endswith("/b")]
    box.command("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(box.directory / "x.sock")}}})
    export = {"type": "nbd", "id": "foreign", "node-name": vda["node-name"], "name": "x", "bitmaps": [bitmap]}
    box.command("block-export-add", export)
    with unchanged(box):
        for work in (
            lambda: delete(box, "b"),
            lambda: delete(box, "c"),
            lambda: delete(box, "a", children=True),
            lambda: tree(box, sizes=True),
        ):
            with pytest.raises(errors.BusyError):
                work()
        with pytest.raises((errors.NbdServerBusy, errors.BusyError)):
            changes(box, "vda", "a")
        disk = tree(box).require("b").disk("vda")
        assert disk is not None
        assert disk.busy
    box.command("block-export-del", {"id": "foreign"})
    box.command("nbd-server-stop")
    delete(box, "b")
    assert names(box) == ["a", "c"]


def test_hostile_files_in_the_state_directory_are_told_and_passed_over(box: Box) -> None:
    create(box, "a")
    place = saved.directory(box.directories, "web01")
    good = json.loads((place / "a.json").read_text())
    for name, content in {
        "nonsense": b"\x00\xff{",
        "deep": b"[" * 100_000,
        "list": b"[]",
        "empty": b"",
        "other": json.dumps(good).encode(),
        "unknown": json.dumps({**good, "document": {"name": "unknown", "colour": 1}}).encode(),
        "elsewhere": json.dumps({"document": {"name": "elsewhere"}, "marks": {}, "machine": {"name": "db01"}}).encode(),
        "marks": json.dumps(
            {"document": {"name": "marks"}, "marks": {"vda": "/etc/passwd"}, "machine": {"name": "web01"}}
        ).encode(),
        "huge": json.dumps(
            {"document": {"name": "huge", "creation_time": 2**70}, "marks": {}, "machine": {"name": "web01"}}
        ).encode(),
    }.items():
        (place / f"{name}.json").write_bytes(content)
    os.mkfifo(place / "pipe.json")
    (place / "link.json").symlink_to("/etc/passwd")
    (place / "directory.json").mkdir()
    (place / "readme.txt").write_text("hello")
    found = tree(box)
    assert [item.name for item in found.checkpoints] == ["a"]
    assert len(found.notes) == 12
    assert all("is passed over" in note for note in found.notes)


def test_a_document_that_cannot_be_written_leaves_no_checkpoint(box: Box) -> None:
    place = saved.directory(box.directories, "web01")
    (place / "b.json").mkdir(parents=True)
    create(box, "a")
    before = [b["name"] for b in box.checkpoints("vda")]
    with pytest.raises(errors.CannotWrite):
        create(box, "b")
    assert [b["name"] for b in box.checkpoints("vda")] == before
    assert [b["recording"] for b in box.checkpoints("vda")] == [True]
    assert kept(box) == ["a.json", "b.json"]
    place.rename(place.with_name("away"))
    place.write_text("a file")
    with pytest.raises(errors.CannotWrite):
        create(box, "c")
    assert [b["name"] for b in box.checkpoints("vda")] == before


def test_a_document_may_name_any_time(box: Box) -> None:
    for seconds in (0, 2**40, 2**63 - 1):
        redefine(box, CheckpointDocument(name=f"t{seconds}", creation_time=seconds), validate=False)
    found = tree(box)
    assert [item.created is None for item in sorted(found.checkpoints, key=lambda item: int(item.name[1:]))] == [
        False,
        True,
        True,
    ]


# -- putting back ----------------------------------------------------------------------------


def test_a_lost_state_directory_costs_descriptions_only_and_redefine_brings_them_back(box: Box) -> None:
    history = History(box, random.Random(3))
    for name in "abc":
        history.checkpoint(name)
        history.write()
    texts = {name: xml.serialise(info(box, name, sizes=True).document) for name in "abc"}
    saved.clear(box.directories, "web01")
    found = tree(box)
    assert [(item.name, item.parent, item.created, item.problem) for item in found.checkpoints] == [
        ("a", None, None, None),
        ("b", "a", None, None),
        ("c", "b", None, None),
    ]
    is_exact(history, ["a", "b", "c"])
    for text in texts.values():
        redefine(box, xml.parse(text))
    assert [item.created is not None for item in tree(box).checkpoints] == [True, True, True]
    assert {name: xml.serialise(info(box, name, sizes=True).document) for name in "abc"} == texts
    assert tree(box).notes == ()


def test_redefining_without_the_bitmaps_is_refused_by_disk_or_is_a_note_only(box: Box) -> None:
    create(box, "a", "vda")
    document = CheckpointDocument(name="a", creation_time=1_500_000_000)
    with unchanged(box), pytest.raises(errors.CheckpointInconsistent, match="on disk vdb") as caught:
        redefine(box, document)
    assert caught.value.target == "vdb"
    made = redefine(box, document, validate=False)
    assert made.checkpoint.problem == "vdb: its bitmap is missing"
    lost = redefine(box, CheckpointDocument(name="lost", creation_time=1), validate=False)
    assert lost.checkpoint.metadata_only
    assert lost.checkpoint.problem == "none of its bitmaps is on the disks"
    with pytest.raises(errors.CheckpointExists):
        create(box, "lost")
    with pytest.raises(errors.CheckpointInconsistent):
        changes(box, "vda", "lost")
    assert delete(box, "lost").checkpoints == ("lost",)
    assert names(box) == ["a"]


def test_redefining_needs_name_and_time_and_no_circle(box: Box) -> None:
    redefine(box, CheckpointDocument(name="a", creation_time=1), validate=False)
    redefine(box, CheckpointDocument(name="b", creation_time=2, parent="a"), validate=False)
    for bad in (
        CheckpointDocument(name="x"),
        CheckpointDocument(creation_time=1),
        CheckpointDocument(name="a", creation_time=1, parent="b"),
        CheckpointDocument(name="a", creation_time=1, parent="a"),
    ):
        with pytest.raises(errors.BadDocument):
            redefine(box, bad, validate=False)
    assert [(item.name, item.parent) for item in tree(box).checkpoints] == [("a", None), ("b", "a")]


# -- start, stop, and death ------------------------------------------------------------------


def test_checkpoints_go_on_across_stop_and_start_and_can_be_made_while_it_is_off(box: Box) -> None:
    history = History(box, random.Random(4))
    history.checkpoint("running")
    history.write()
    box.quit()
    history.checkpoint("off")
    assert names(box) == ["running", "off"]
    assert changes(box, "vda", "running") == history.between("running")
    assert changes(box, "vda", "off") == []
    box.start()
    history.write()
    is_exact(history, ["running", "off"])
    history.checkpoint("again")
    history.write()
    box.quit()
    is_exact(history, ["running", "off", "again"])
    delete(box, "off")
    is_exact(history, ["running", "again"])
    for disk in box.disks:
        stored = qemu_img.info(disk.path, format="qcow2").bitmaps
        assert [bitmap.in_use for bitmap in stored] == [False, False]
    box.start()
    history.write()
    is_exact(history, ["running", "again"])
    assert box.leftovers() == []


def test_after_qemu_was_killed_the_checkpoints_are_told_unusable_and_can_be_deleted(box: Box) -> None:
    create(box, "a")
    box.quit()
    box.start()
    create(box, "b")
    box.kill()
    box.start()
    found = tree(box)
    a, b = found.require("a"), found.require("b")
    assert a.problem is not None
    assert "inconsistent" in a.problem
    assert b.problem == "none of its bitmaps is on the disks"  # made in the session that was killed
    assert found.current is None
    for work in (lambda: changes(box, "vda", "a"), lambda: create(box, "c")):
        with pytest.raises(errors.CheckpointInconsistent):
            work()
    disk = tree(box, sizes=True).require("a").disk("vda")
    assert disk is not None
    assert disk.dirty is None
    delete(box, "a", children=True)
    assert names(box) == kept(box) == []
    create(box, "c")
    box.write("vda", 1, 0, 512)
    assert changes(box, "vda", "c") == [(0, CLUSTER)]


KILLED = {
    "create": ["create", "--as", "new-{}"],
    "measure": ["list", "--size"],
    "show": ["changes", "vda", "--since", "base"],
    "delete": ["delete", "old-{}"],
}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=name, marks=[pytest.mark.slow] if name in ("measure", "show") else [])
        for name, words in KILLED.items()
    ],
)
def test_killed_at_any_changing_command_document_and_bitmaps_agree(box: Box, words: list[str]) -> None:
    create(box, "base")
    box.write("vda", 1, 0, CLUSTER)
    numbers = _changing(box, words)
    for number in ["whole", *numbers[:: 2 if len(numbers) > 4 else 1]]:
        if words[0] == "delete":
            create(box, f"old-{number}")
        if isinstance(number, int):
            _kill(box, words, number)
        with Relay(box.directory / "relay.sock", box.qmp) as relay:
            found = do(box, flow.listing, urls.QmpMachine(socket=relay.path))
        assert box.leftovers() == []
        assert found.notes == ()
        assert [item.name for item in found.checkpoints if item.problem or not item.saved] == []
        assert kept(box) == sorted(f"{item.name}.json" for item in found.checkpoints)
        assert changes(box, "vda", "base") == [(0, CLUSTER)]


def _changing(box: Box, words: list[str]) -> list[int]:
    """Numbers of the commands that change something, when it is left alone."""
    if words[0] == "delete":
        create(box, "old-whole")
    with Relay(box.directory / "relay.sock", box.qmp) as relay:
        said = box.cli("checkpoint", words[0], f"qmp:{relay.path}", *_named(words, "whole"))
        assert said.returncode == 0, said.stderr
    quiet = ("query-", "qom-get", "x-debug-", "qmp_capabilities")
    return [n for n, name in enumerate(relay.commands, 1) if not name.startswith(quiet)]


def _named(words: list[str], number: object) -> list[str]:
    return [word.format(number) for word in words[1:]]


def _kill(box: Box, words: list[str], number: int) -> None:
    place = f"qmp:{box.directory / 'relay.sock'}"
    victim = Victim(box, "checkpoint", words[0], place, *_named(words, number))
    victim.at(Way.COMMAND, number, victim.kill_all)
    with victim.relay, victim.started():
        code, said = victim.ended()
        assert victim.struck.is_set(), said
        assert code in (-9, 0), said


def test_untrack_removes_the_documents_too(box: Box) -> None:
    create(box, "a")
    redefine(box, CheckpointDocument(name="lost", creation_time=1), validate=False)
    request = machine_flow.Request(machine=url(box), directories=box.directories)
    assert asyncio.run(machine_flow.untrack(request)).documents == ("a", "lost")
    assert names(box) == kept(box) == []
    assert box.checkpoints("vda") == []


# -- quiescing -------------------------------------------------------------------------------


def test_the_guest_is_frozen_around_it_on_request_only(box: Box) -> None:
    path = box.directory / "agent"
    with agent(path, lambda command: {"return": 2}) as asked:
        create(box, "plain")
        assert asked.asked == []
        made = create(box, "quiet", quiescing=Quiescing(wish=Quiesce.REQUIRE, agent=path))
        assert made.window.frozen == 2
        assert [word for word in asked.asked if "sync" not in word] == [
            "guest-fsfreeze-freeze",
            "guest-fsfreeze-thaw",
        ]
    assert box.leftovers() == []


def test_without_the_agent_that_is_required_there_is_no_checkpoint(box: Box) -> None:
    with unchanged(box), pytest.raises(errors.QuiesceFailed):
        create(box, "a", quiescing=Quiescing(wish=Quiesce.REQUIRE))
    made = create(box, "b", quiescing=Quiescing(wish=Quiesce.TRY))
    assert made.info.notes == ("file systems were not frozen, because the machine has no guest agent that runs",)


def test_killed_while_the_guest_is_frozen_the_guard_thaws_it(box: Box) -> None:
    path = box.directory / "agent"
    with agent(path, lambda command: {"return": 1}) as asked:
        place = f"qmp:{box.directory / 'relay.sock'}"
        victim = Victim(box, "checkpoint", "create", place, "--as", "a", "--quiesce", "require", "--agent", path)
        victim.at_command("transaction", victim.kill)
        with victim.relay, victim.started():
            assert victim.ended()[0] == -9
            eventually(lambda: "guest-fsfreeze-thaw" in asked.asked, seconds=5, what="thawed")
            eventually(lambda: victim.jobs() == [], seconds=10, what="cleared")
    found = tree(box).require("a")
    assert (found.problem, found.saved is not None) == (None, True)
    assert box.leftovers() == []


# -- odd disks -------------------------------------------------------------------------------


def test_a_disk_in_an_iothread_of_odd_size_tells_its_changes(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2"), iothread="io0"), size=SIZE + 3 * 512)
    create(box, "a")
    box.write("vda", 1, SIZE, 3 * 512)
    assert changes(box, "vda", "a") == [(SIZE, 3 * 512)]
    disk = tree(box, sizes=True).require("a").disk("vda")
    assert disk is not None
    assert disk.dirty == CLUSTER  # QEMU counts whole granules
    assert running(box)


# -- the command line ------------------------------------------------------------------------


def test_the_command_line_from_making_to_deleting(box: Box) -> None:
    def cli(*words: object, code: int = 0) -> str:
        command, *rest = words
        done = box.cli("checkpoint", command, f"qmp:{box.qmp}", *rest)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    assert cli("create", "--as", "a", "--description", "first") == "checkpoint a of vda, vdb\n"
    box.write("vda", 1, 0, CLUSTER)
    document = box.directory / "b.xml"
    document.write_text("<domaincheckpoint><name>b</name><disks><disk name='vda'/></disks></domaincheckpoint>")
    assert cli("create", document) == "checkpoint b of vda\n"
    listed = cli("list", "--size", "--topological").splitlines()
    assert [line.split()[0] for line in listed] == ["checkpoint", "a", "b"]
    assert listed[2].endswith("current")
    assert "64.0 KiB" in listed[1]
    assert cli("list", "--tree") == "a\n  b  (current)\n"
    assert cli("parent", "b") == "a\n"
    assert cli("changes", "vda", "--since", "a", "--until", "b") == f"0 {CLUSTER}\n"
    text = cli("info", "a", "--xml", "--size")
    assert "<description>first</description>" in text
    assert cli("delete", "a", "--metadata").startswith("what was written down about checkpoint a")
    kept_text = box.directory / "a.xml"
    kept_text.write_text(text)
    cli("redefine", kept_text)
    assert last_json(cli("info", "a", "--json"))["checkpoint"]["description"] == "first"
    assert "exclude each other" in cli("list", "--leaves", "--no-leaves", code=2)
    assert "neither XML nor JSON" in cli("create", __file__, code=2)
    assert cli("delete", "a", "--children") == "checkpoint b is deleted\ncheckpoint a is deleted\n"
    assert cli("list") == "web01: no checkpoints\n"


def test_every_extent_is_a_value(box: Box) -> None:
    create(box, "a")
    box.write("vda", 1, CLUSTER, 512)
    found = do(box, lambda machine, places: flow.changes(machine, places, "vda", "a"))
    assert found.extents == (Extent(CLUSTER, CLUSTER),)
    assert (found.size, found.granularity) == (SIZE, CLUSTER)
