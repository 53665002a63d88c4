"""The machine-wide tree of checkpoints, against a history of what was made and deleted on several disks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback import errors
from pullback.model import checkpoints, tree
from pullback.model.checkpoints import Mark
from pullback.model.disks import Bitmap, Bus, Disk
from pullback.model.documents.checkpoint import CheckpointDisk, CheckpointDocument
from pullback.model.tree import Saved, Tree
from pullback.units import GiB, KiB, MiB, TiB

TARGETS = ("vda", "vdb", "vdc")


def disk(target: str, *bitmaps: Bitmap, buried: tuple[str, ...] = ()) -> Disk:
    return Disk(target=target, bus=Bus.VIRTIO, qdev=target, node=target, size=GiB, bitmaps=bitmaps, buried=buried)


def bitmap(name: str, nonce: int, first: int, last: int | None = None, **changes: object) -> Bitmap:
    mark = Mark(name=name, nonce=f"{nonce:016x}", first=first, last=last or first)
    made = Bitmap(name=mark.bitmap, granularity=65536, count=0, recording=False, persistent=True)
    return replace(made, **changes)  # type: ignore[arg-type]


def chained(target: str, *names: str, nonce: int = 0) -> Disk:
    """A disk with sound checkpoints of these names, oldest first."""
    found = [bitmap(name, nonce + step, step) for step, name in enumerate(names, 1)]
    return disk(target, *found[:-1], *(replace(last, recording=True) for last in found[-1:]))


def document(
    name: str, *disks: Disk, created: int = 0, parent: str | None = None, extra: tuple[str, ...] = ()
) -> Saved:
    """A document that lists these disks with their bitmaps of that name, and `extra` targets without any."""
    marks = {
        found.target: link.mark.bitmap
        for found in disks
        for link in checkpoints.chain(found.bitmaps).links
        if link.mark.name == name
    }
    listed = tuple(CheckpointDisk(name=target, bitmap=name) for target in (*marks, *extra))
    whole = CheckpointDocument(name=name, creation_time=created, parent=parent, disks=listed, description=f"the {name}")
    return Saved(document=whole, marks=marks)


def names(found: Tree) -> list[str]:
    return [item.name for item in found.checkpoints]


def parents(found: Tree) -> dict[str, str | None]:
    return {item.name: item.parent for item in found.checkpoints}


# -- what the bitmaps tell -------------------------------------------------------------------


def test_one_chain_is_one_line() -> None:
    found = tree.build([chained("vda", "c", "a", "b")])
    assert parents(found) == {"c": None, "a": "c", "b": "a"}
    assert names(found) == ["c", "a", "b"]
    assert found.current is not None
    assert found.current.name == "b"
    assert [item.problem for item in found.checkpoints] == [None] * 3


def test_no_disks_no_tree() -> None:
    found = tree.build([])
    assert (found.checkpoints, found.roots, found.leaves, found.current) == ((), (), (), None)
    with pytest.raises(errors.NoCheckpoint):
        found.require("a")


def test_what_one_disk_lacks_another_puts_in_its_place() -> None:
    found = tree.build([chained("vda", "a", "b", "d"), chained("vdb", "a", "c", "d", nonce=100)])
    assert parents(found) == {"a": None, "b": "a", "c": "a", "d": "c"}
    assert [item.name for item in found.leaves] == ["b", "d"]
    assert [item.name for item in found.descendants("a")] == ["b", "c", "d"]


def test_documents_order_what_no_disk_has_in_common() -> None:
    vda, vdb = chained("vda", "x"), chained("vdb", "a", nonce=100)
    saved = [document("x", vda, created=5), document("a", vdb, created=9, parent="x")]
    assert parents(tree.build([vda, vdb], saved)) == {"x": None, "a": "x"}
    by_time = [document("x", vda, created=5), document("a", vdb, created=3)]
    assert names(tree.build([vda, vdb], by_time)) == ["a", "x"]


def test_the_bitmaps_are_believed_more_than_documents() -> None:
    vda = chained("vda", "a", "b")
    saved = [document("a", vda, created=9, parent="b"), document("b", vda, created=1)]
    found = tree.build([vda], saved)
    assert parents(found) == {"a": None, "b": "a"}
    assert [item.problem for item in found.checkpoints] == [None, None]


def test_documents_in_a_circle_make_no_circle() -> None:
    saved = [document("a", parent="b", extra=("vda",)), document("b", parent="a", extra=("vda",))]
    found = tree.build([disk("vda")], saved)
    assert sorted(names(found)) == ["a", "b"]
    assert len(found.roots) == 1


def test_disks_that_disagree_are_told() -> None:
    found = tree.build([chained("vda", "a", "b"), chained("vdb", "b", "a", nonce=100)])
    assert sorted(names(found)) == ["a", "b"]
    assert ["disagree" in (item.problem or "") for item in found.checkpoints].count(True) == 1


def test_an_automatic_checkpoint_has_its_owner_and_its_time_in_its_name() -> None:
    found = tree.build([chained("vda", "auto.0123abcd.20260102T030405Z")]).checkpoints[0]
    assert found.owner == "0123abcd"
    assert found.created is not None
    assert found.created.isoformat() == "2026-01-02T03:04:05+00:00"
    odd = tree.build([chained("vda", "auto.0123abcd.yesterday")]).checkpoints[0]
    assert (odd.owner, odd.created) == ("0123abcd", None)


# -- what is wrong ---------------------------------------------------------------------------


def test_an_inconsistent_disk_is_named_and_the_others_stay_good() -> None:
    vda, vdb = chained("vda", "a"), chained("vdb", "a", nonce=100)
    wreck = replace(vdb, bitmaps=(replace(vdb.bitmaps[0], inconsistent=True, recording=False),))
    found = tree.build([vda, wreck]).require("a")
    assert found.problem is not None
    assert found.problem.startswith("vdb: its bitmaps are inconsistent")
    good, bad = found.disk("vda"), found.disk("vdb")
    assert good is not None
    assert good.problem is None
    assert bad is not None
    assert bad.problem is not None


def test_a_bitmap_that_a_document_lists_and_that_is_gone_is_told() -> None:
    vda = chained("vda", "a")
    found = tree.build([vda, disk("vdb")], [document("a", vda, extra=("vdb", "vdc"))]).require("a")
    assert found.problem == "vdb: its bitmap is missing; vdc: there is no such disk now"


def test_a_bitmap_in_a_backing_image_is_told_so() -> None:
    vda = chained("vda", "a")
    covered = disk("vda", buried=(vda.bitmaps[0].name,))
    found = tree.build([covered], [document("a", vda)]).require("a")
    assert found.metadata_only
    assert "external snapshot" in str(found.problem)
    both = [vda, chained("vdb", "a", nonce=100)]
    half = tree.build([covered, both[1]], [document("a", *both)]).require("a")
    assert half.problem == "vda: its bitmap lies in a backing image (an external snapshot was made)"


def test_a_document_without_any_bitmap_is_metadata_only() -> None:
    found = tree.build([chained("vda", "b")], [document("a", created=1)]).require("a")
    assert (found.metadata_only, found.problem) == (True, "none of its bitmaps is on the disks")
    assert found.description == "the a"


def test_the_document_of_an_earlier_checkpoint_of_the_name_does_not_apply() -> None:
    old, new = chained("vda", "a"), chained("vda", "a", nonce=500)
    found = tree.build([new], [document("a", old, created=1)])
    assert found.notes == ("the document of a is of another checkpoint of that name",)
    assert (found.require("a").saved, found.require("a").problem, found.require("a").created) == (None, None, None)


def test_a_bitmap_of_the_name_that_the_document_does_not_know_is_not_relied_on() -> None:
    vda, stranger = chained("vda", "a"), chained("vdb", "a", nonce=500)
    found = tree.build([vda, stranger], [document("a", vda)]).require("a")
    assert found.problem == "vdb: it is another checkpoint of that name"
    good = found.disk("vda")
    assert good is not None
    assert good.problem is None


def test_a_disk_that_moved_to_another_target_is_still_known_by_its_nonce() -> None:
    before = chained("vda", "a")
    found = tree.build([replace(before, target="vdc")], [document("a", before)]).require("a")
    assert found.problem is None
    assert [item.target for item in found.disks] == ["vdc"]


def test_a_range_that_grew_is_good_and_one_that_shrank_is_not() -> None:
    grown = disk("vda", bitmap("a", 1, 1, 3, recording=True))
    shrunk = disk("vda", bitmap("a", 1, 1, 1, recording=True))
    saved = document("a", disk("vda", bitmap("a", 1, 1, 2, recording=True)))
    assert tree.build([grown], [saved]).require("a").problem is None
    assert tree.build([shrunk], [saved]).require("a").problem == "vda: its bitmap covers other steps than recorded"


def test_two_of_a_name_on_one_disk_are_told_apart_by_the_document_only() -> None:
    twice = chained("vda", "a", "a")
    found = tree.build([twice]).require("a")
    assert found.problem == "vda: it has two checkpoints of that name"
    first = Saved(
        document=CheckpointDocument(name="a", disks=(CheckpointDisk(name="vda"),)),
        marks={"vda": twice.bitmaps[0].name},
    )
    told = tree.build([twice], [first]).require("a")
    part = told.disk("vda")
    assert part is not None
    assert (part.problem, part.mark.first) == (None, 1)
    assert told.problem == "vda: it is another checkpoint of that name"


# -- asking ----------------------------------------------------------------------------------


@pytest.fixture
def branched() -> Tree:
    """a ─ b ─ d, a ─ c, and e alone."""
    disks = [chained("vda", "a", "b", "d"), chained("vdb", "a", "c", nonce=100), chained("vdc", "e", nonce=200)]
    return tree.build(disks)


def test_every_selection(branched: Tree) -> None:
    def chosen(**options: object) -> list[str]:
        return [item.name for item in branched.select(**options)]  # type: ignore[arg-type]

    assert chosen() == ["a", "b", "c", "d", "e"]
    assert chosen(roots=True) == ["a", "e"]
    assert chosen(leaves=True) == ["c", "d", "e"]
    assert chosen(leaves=False) == ["a", "b"]
    assert chosen(roots=True, leaves=True) == ["e"]
    assert chosen(start="a") == ["b", "c"]
    assert chosen(start="a", descendants=True) == ["b", "c", "d"]
    assert chosen(start="a", descendants=True, leaves=True) == ["c", "d"]
    with pytest.raises(errors.NoCheckpoint):
        chosen(start="z")


# -- what a bitmap costs ---------------------------------------------------------------------


def test_a_bitmap_of_a_large_disk_costs_a_bit_for_each_granule() -> None:
    assert 2 * MiB < tree.memory(TiB, 64 * KiB) < 2.1 * MiB
    assert tree.stored(TiB, 64 * KiB, 64 * KiB) == 2 * MiB + 64 * KiB + 24
    assert tree.memory(1, 64 * KiB) == 7 * 8
    assert tree.stored(1, 64 * KiB, 64 * KiB) == 2 * 64 * KiB + 24


# -- random histories ------------------------------------------------------------------------


@dataclass
class World:
    """Disks with bitmaps as QEMU would keep them, documents, and the names in the order of their making."""

    bitmaps: dict[str, list[Bitmap]]
    saved: dict[str, Saved]
    order: list[str]
    nonces: int = 0

    def disks(self) -> list[Disk]:
        return [disk(target, *found) for target, found in self.bitmaps.items()]

    def tree(self) -> Tree:
        return tree.build(self.disks(), self.saved.values())

    def create(self, targets: list[str]) -> None:
        name = f"c{len(self.order)}-{self.nonces}"
        before = self.tree().current
        for target in targets:
            bitmaps = self.bitmaps[target]
            chain = checkpoints.chain(bitmaps)
            self.nonces += 1
            mark = replace(chain.next_mark(name), nonce=f"{self.nonces:016x}")
            bitmaps[:] = [replace(found, recording=False) for found in bitmaps]
            bitmaps.append(Bitmap(name=mark.bitmap, granularity=65536, count=0, recording=True, persistent=True))
        self.order.append(name)
        made = document(name, *self.disks(), created=100, parent=before.name if before else None)
        self.saved[name] = made

    def delete(self, name: str) -> None:
        found = self.tree()
        for part in found.require(name).disks:
            bitmaps = self.bitmaps[part.target]
            merge = checkpoints.chain(bitmaps).deletion(part.mark.nonce)
            assert merge is not None
            bitmaps[:] = [item for item in bitmaps if item.name not in merge.remove]
            if merge.add is not None:
                bitmaps.append(
                    Bitmap(
                        name=merge.add.bitmap, granularity=65536, count=0, recording=merge.recording, persistent=True
                    )
                )
        for kept in [self.saved[child.name] for child in found.children(name)]:
            if kept.document.parent == name:
                above = replace(kept.document, parent=found.require(name).parent)
                self.saved[kept.name] = replace(kept, document=above)
        del self.saved[name]
        self.order.remove(name)


EVENTS = st.lists(
    st.one_of(
        st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
        st.integers(0, 20),
    ),
    max_size=14,
)


def played(events: list[list[str] | int]) -> World:
    world = World({target: [] for target in TARGETS}, {}, [])
    for event in events:
        if isinstance(event, list):
            world.create(event)
        elif world.order:
            world.delete(world.order[event % len(world.order)])
    return world


@given(EVENTS)
def test_whatever_was_made_and_deleted_the_tree_is_the_history(events: list[list[str] | int]) -> None:
    world = played(events)
    found = world.tree()
    assert names(found) == world.order
    assert list(parents(found).values()) == [None, *world.order[:-1]][: len(world.order)]
    assert all(item.problem is None and item.saved is not None for item in found.checkpoints)
    assert (found.current.name if found.current else None) == (world.order[-1] if world.order else None)
    assert found.notes == ()


@given(EVENTS)
def test_without_documents_nothing_but_words_and_unrelated_order_is_lost(events: list[list[str] | int]) -> None:
    world = played(events)
    found = tree.build(world.disks())
    assert sorted(names(found)) == sorted(world.order)
    assert all(item.problem is None for item in found.checkpoints)
    place = {name: index for index, name in enumerate(names(found))}
    for target in TARGETS:
        links = [link.mark.name for link in checkpoints.chain(world.bitmaps[target]).links]
        assert links == sorted(links, key=place.__getitem__)
    assert all(item.parent is None or place[item.parent] < place[item.name] for item in found.checkpoints)


_NAMES = st.sampled_from("abcde")
_WILD = st.lists(
    st.builds(
        bitmap,
        _NAMES,
        st.integers(0, 5),
        st.integers(1, 5),
        st.none(),
        recording=st.booleans(),
        inconsistent=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda found: found.name,
)


@given(
    st.lists(_WILD, max_size=3),
    st.lists(st.tuples(_NAMES, st.none() | _NAMES, st.integers(0, 2**62)), max_size=5, unique_by=lambda item: item[0]),
)
def test_nonsense_gives_a_tree_too(disks: list[list[Bitmap]], documents: list[tuple[str, str | None, int]]) -> None:
    made = [disk(target, *bitmaps) for target, bitmaps in zip(TARGETS, disks, strict=False)]
    saved = [document(name, *made, created=created, parent=parent) for name, parent, created in documents]
    found = tree.build(made, saved)
    there = {mark.name for item in made for b in item.bitmaps if (mark := checkpoints.parse(b.name))}
    assert set(names(found)) == there | {name for name, _, _ in documents}
    assert len(set(names(found))) == len(found.checkpoints)
    place = {name: index for index, name in enumerate(names(found))}
    assert all(item.parent is None or place[item.parent] < place[item.name] for item in found.checkpoints)
    for item in found.checkpoints:
        found.descendants(item.name)
