"""The chain of checkpoints, against a naive model: all writes, with their times."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback import errors
from pullback.model import checkpoints
from pullback.model.checkpoints import Chain, Mark
from pullback.model.disks import Bitmap

NONCE = "0123456789abcdef"


class Disk:
    """Bitmaps as QEMU would keep them, and beside them every write with its time."""

    def __init__(self) -> None:
        self.bits: dict[str, set[int]] = {}
        self.recording: set[str] = set()
        self.time = 0
        self.writes: list[tuple[int, int]] = []
        #: Checkpoint's mark as it was made -> its time.
        self.made: dict[Mark, int] = {}

    def chain(self) -> Chain:
        """What the bitmaps show."""
        return checkpoints.chain(
            Bitmap(name=name, granularity=65536, count=len(bits), recording=name in self.recording)
            for name, bits in self.bits.items()
        )

    def write(self, sector: int) -> None:
        """A guest's write."""
        self.time += 1
        self.writes.append((self.time, sector))
        for name in self.recording:
            self.bits[name].add(sector)

    def checkpoint(self) -> None:
        """A new one."""
        self.time += 1
        mark = self.chain().next_mark(f"c{self.time}")
        self.recording.clear()
        self.bits[mark.bitmap] = set()
        self.recording.add(mark.bitmap)
        self.made[mark] = self.time

    def delete(self, index: int) -> None:
        """Delete one of the checkpoints, as the algebra says."""
        if not self.made:
            return
        mark = sorted(self.made, key=lambda mark: self.made[mark])[index % len(self.made)]
        del self.made[mark]
        merge = self.chain().deletion(mark.nonce)
        assert merge is not None
        if merge.add is not None:
            self.bits[merge.add.bitmap] = set().union(*(self.bits[name] for name in merge.sources))
            if merge.recording:
                self.recording.add(merge.add.bitmap)
        for name in merge.remove:
            del self.bits[name]
            self.recording.discard(name)

    def written(self, begin: int, end: int) -> set[int]:
        """The truth."""
        return {sector for time, sector in self.writes if begin < time <= end}

    def union(self, links: object) -> set[int]:
        """What bitmaps say together."""
        assert isinstance(links, tuple), links
        return set().union(*(self.bits[link.mark.bitmap] for link in links))


WRITE = st.tuples(st.just("write"), st.integers(0, 9))
DELETE = st.tuples(st.just("delete"), st.integers(0, 9))
STEPS = st.lists(st.one_of(WRITE, st.tuples(st.just("checkpoint"), st.none()), DELETE), max_size=40)


def played(steps: list[tuple[str, int | None]]) -> Disk:
    """A disk after those steps."""
    disk = Disk()
    for step, number in steps:
        if step == "checkpoint":
            disk.checkpoint()
        elif step == "write":
            disk.write(number or 0)
        else:
            disk.delete(number or 0)
    return disk


@given(STEPS)
def test_changes_since_any_checkpoint_are_exactly_the_writes_since_then(steps: list[tuple[str, int | None]]) -> None:
    disk = played(steps)
    chain = disk.chain()
    assert chain.problem is None
    assert len(chain.links) == len(disk.made)
    for mark, time in disk.made.items():
        assert disk.union(chain.since(mark)) == disk.written(time, disk.time)


@given(STEPS)
def test_changes_between_any_two_are_exactly_the_writes_between(steps: list[tuple[str, int | None]]) -> None:
    disk = played(steps)
    chain = disk.chain()
    for older, begin in disk.made.items():
        for newer, end in disk.made.items():
            found = chain.between(older, newer)
            if begin <= end:
                assert disk.union(found) == disk.written(begin, end)
            else:
                assert isinstance(found, str)


@given(STEPS)
def test_only_the_newest_records_and_ranges_touch(steps: list[tuple[str, int | None]]) -> None:
    disk = played(steps)
    links = disk.chain().links
    assert [link.bitmap.recording for link in links] == [False] * (len(links) - 1) + [True] * bool(links)
    assert all(older.mark.last + 1 == newer.mark.first for older, newer in itertools.pairwise(links))


@given(STEPS)
def test_a_backup_that_failed_and_was_taken_back_left_no_gap(steps: list[tuple[str, int | None]]) -> None:
    disk = played(steps)
    disk.checkpoint()
    before = dict(disk.made)
    disk.checkpoint()
    [new] = set(disk.made) - set(before)
    disk.write(3)
    disk.delete(sorted(disk.made, key=lambda mark: disk.made[mark]).index(new))
    disk.write(5)
    for mark, time in before.items():
        assert disk.union(disk.chain().since(mark)) == disk.written(time, disk.time)


# -- chains that cannot be trusted -----------------------------------------------------------


def bitmap(first: int, last: int, *, nonce: str = "", **changes: object) -> Bitmap:
    """A bitmap of ours."""
    name = Mark(name="c", nonce=nonce or f"{first:016x}", first=first, last=last).bitmap
    return replace(Bitmap(name=name, granularity=65536, count=0, recording=False), **changes)  # type: ignore[arg-type]


LAST = bitmap(3, 3, recording=True)


@pytest.mark.parametrize(
    ("bitmaps", "problem"),
    [
        ([bitmap(1, 2), LAST], None),
        ([LAST], None),
        ([], None),
        ([bitmap(1, 1), LAST], "missing between"),
        ([bitmap(1, 3), LAST], "missing between"),
        ([bitmap(1, 2, inconsistent=True), LAST], "inconsistent"),
        ([bitmap(1, 2, recording=True), LAST], "older checkpoint is recording"),
        ([bitmap(1, 2), bitmap(3, 3)], "not recording"),
        ([bitmap(1, 2, nonce=NONCE), bitmap(3, 3, nonce=NONCE, recording=True)], "same mark"),
        ([bitmap(1, 2, granularity=512), LAST], "granularity"),
    ],
)
def test_a_chain_that_cannot_be_trusted_says_why(bitmaps: list[Bitmap], problem: str | None) -> None:
    chain = checkpoints.chain(bitmaps)
    if problem is None:
        assert chain.problem is None
        return
    assert problem in (chain.problem or "")
    assert chain.since(chain.links[0].mark) == chain.problem
    merge = chain.deletion(chain.links[-1].mark.nonce)
    assert merge is not None
    assert merge.add is None


def test_foreign_bitmaps_are_passed_over() -> None:
    foreign = Bitmap(name="virtnbdbackup.0", granularity=512, count=7, inconsistent=True)
    assert checkpoints.chain([foreign, LAST]) == checkpoints.chain([LAST])


def test_a_name_used_again_is_not_taken_for_the_old_one() -> None:
    disk = Disk()
    disk.checkpoint()
    [old] = disk.made
    other = replace(old, nonce=NONCE)
    assert disk.chain().since(other) == "its last checkpoint is not on the disk"


def test_a_range_that_shrank_is_not_ours() -> None:
    recorded = Mark(name="c", nonce=f"{1:016x}", first=1, last=2)
    chain = checkpoints.chain([bitmap(1, 1, recording=True)])
    assert chain.since(recorded) == "the checkpoint on the disk covers other steps than recorded"


def test_what_is_not_there_cannot_be_deleted() -> None:
    assert checkpoints.chain([LAST]).deletion(NONCE) is None


# -- names -----------------------------------------------------------------------------------


@given(st.text(max_size=300))
def test_a_hostile_name_is_never_ours(text: str) -> None:
    mark = checkpoints.parse(text)
    assert mark is None or mark.bitmap == text


@given(
    name=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,149}", fullmatch=True),
    first=st.integers(0, 2**53 - 1),
    more=st.integers(0, 1000),
)
def test_every_name_that_we_make_is_read_back_and_short_enough(name: str, first: int, more: int) -> None:
    mark = Mark(name=checkpoints.check_name(name), nonce=NONCE, first=first, last=min(first + more, 2**53 - 1))
    assert checkpoints.parse(mark.bitmap) == mark
    assert len(mark.bitmap.encode()) <= checkpoints.NAME_LIMIT


@pytest.mark.parametrize(
    "name",
    [
        "pullback/1-1/0123456789abcdef/",
        "pullback/2-1/0123456789abcdef/c",
        "pullback/01-1/0123456789abcdef/c",
        "pullback/\u0661-1/0123456789abcdef/c",
        "pullback/1-1/0123456789ABCDEF/c",
        "pullback/1-1/0123/c",
        "pullback/1-1/0123456789abcdef/.c",
        "pullback/1-1/0123456789abcdef/c/d",
        "pullback/1-1/0123456789abcdef/c\n",
        "pullback/1-9999999999999999/0123456789abcdef/c",
        "pullback/1-1/0123456789abcdef/" + "c" * 250,
        "Pullback/1-1/0123456789abcdef/c",
        " pullback/1-1/0123456789abcdef/c",
    ],
)
def test_a_name_that_is_nearly_ours_is_not(name: str) -> None:
    assert checkpoints.parse(name) is None


@pytest.mark.parametrize("name", ["", ".c", "a/b", "ä", "a b", "-c", "c" * 151, "c\n"])
def test_a_bad_checkpoint_name_is_refused(name: str) -> None:
    with pytest.raises(errors.UsageError):
        checkpoints.check_name(name)


def test_an_automatic_name_tells_its_owner() -> None:
    name = checkpoints.automatic_name("755e342bd54fe80e", datetime(2026, 11, 24, 7, 2, 50, tzinfo=UTC))
    assert name == "auto.755e342bd54fe80e.20261124T070250Z"
    assert checkpoints.check_name(name) == name
    assert checkpoints.owner(name) == "755e342bd54fe80e"
    assert checkpoints.owner("before-upgrade") is None
    assert checkpoints.owner("auto.mine") is None
