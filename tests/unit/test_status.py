"""Replies to extents, against a model that looks at single bytes; hostile replies included."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback import errors
from pullback.extents import Extent, Mapped
from pullback.transfer import status

FLAGS = st.integers(min_value=0, max_value=3)
DISK = st.lists(FLAGS, min_size=1, max_size=60)


def walk(ask: status.Ask, window: Extent, size: int, longest: int = 7) -> list[status.Status]:
    return list(status.walk(ask, window, size=size, who="the server", longest=longest))


class Server:
    """Answers about a disk whose every byte has its flags; cuts its replies as `cuts` says."""

    def __init__(self, disk: Sequence[int], cuts: Sequence[int]) -> None:
        self.disk = disk
        self.cuts = list(cuts)
        self.asked: list[tuple[int, int]] = []

    def __call__(self, offset: int, length: int) -> status.Reply:
        """Extents of 1 to 5 bytes, one or more of them, perhaps beyond what was asked."""
        self.asked.append((offset, length))
        reply: list[tuple[int, int]] = []
        for cut in [self.cuts.pop() if self.cuts else 1 for _ in range(self.cuts.pop() if self.cuts else 1)]:
            run = self._run(offset, cut)
            if run == 0:
                break
            reply.append((run, self.disk[offset]))
            offset += run
        return reply

    def _run(self, offset: int, most: int) -> int:
        run = 0
        while run < most and offset + run < len(self.disk) and self.disk[offset + run] == self.disk[offset]:
            run += 1
        return run


CUTS = st.lists(st.integers(min_value=1, max_value=5), max_size=80)


@given(disk=DISK, cuts=CUTS, start=st.integers(0, 70), length=st.integers(0, 80))
def test_each_byte_of_the_window_gets_its_flags_once(disk: list[int], cuts: list[int], start: int, length: int) -> None:
    found = walk(Server(disk, cuts), Extent(start, length), len(disk))
    told = {byte: flags for extent, flags in found for byte in range(extent.start, extent.end)}
    assert told == {byte: disk[byte] for byte in range(start, min(start + length, len(disk)))}
    assert sum(extent.length for extent, _ in found) == len(told)


@given(disk=DISK, cuts=CUTS)
def test_neighbours_differ_in_flags_and_touch(disk: list[int], cuts: list[int]) -> None:
    found = walk(Server(disk, cuts), Extent(0, len(disk)), len(disk))
    for (left, left_flags), (right, right_flags) in pairwise(found):
        assert left.end == right.start
        assert left_flags != right_flags


@given(disk=DISK, cuts=CUTS, longest=st.integers(1, 9))
def test_no_question_is_longer_than_allowed_or_reaches_beyond_the_window(
    disk: list[int], cuts: list[int], longest: int
) -> None:
    server = Server(disk, cuts)
    walk(server, Extent(0, len(disk)), len(disk), longest)
    assert all(0 < length <= longest and offset + length <= len(disk) for offset, length in server.asked)


@given(
    replies=st.lists(st.lists(st.tuples(st.integers(-3, 2**64), st.integers(-1, 2**64)), max_size=4), max_size=40),
    size=st.integers(1, 50),
)
def test_hostile_replies_end_in_an_error_or_in_a_full_cover(replies: list[list[tuple[int, int]]], size: int) -> None:
    asked = 0

    def ask(offset: int, length: int) -> status.Reply:
        nonlocal asked
        asked += 1
        return replies.pop() if replies else []

    try:
        found = walk(ask, Extent(0, size), size)
    except errors.BadReply:
        assert asked <= size
        return
    assert sum(extent.length for extent, _ in found) == size


@pytest.mark.parametrize("reply", [[], [(0, 0)], [(4, 0), (0, 0)], [(9, 0)], [(-1, 0)], [(4, -1)], [(8, 0), (1, 0)]])
def test_a_reply_without_progress_or_beyond_the_disk_is_refused(reply: status.Reply) -> None:
    with pytest.raises(errors.BadReply):
        walk(lambda offset, length: reply, Extent(0, 8), 8)


def test_the_walk_is_lazy() -> None:
    asked: list[int] = []

    def ask(offset: int, length: int) -> status.Reply:
        asked.append(offset)
        return [(1, offset % 2)]

    stream = status.walk(ask, Extent(0, 2**43), size=2**43, who="the server")
    assert [next(stream) for _ in range(3)] == [(Extent(0, 1), 0), (Extent(1, 1), 1), (Extent(2, 1), 0)]
    assert len(asked) <= 5


def test_a_huge_disk_takes_few_questions() -> None:
    asked: list[int] = []

    def ask(offset: int, length: int) -> status.Reply:
        asked.append(offset)
        return [(length, 0)]

    size = 8 * 2**40
    assert list(status.walk(ask, Extent(0, size), size=size, who="the server")) == [(Extent(0, size), 0)]
    assert len(asked) == 2049


def test_only_the_zero_bit_says_zero() -> None:
    stream = [(Extent(0, 1), 0), (Extent(1, 1), 1), (Extent(2, 1), 2), (Extent(3, 1), 3)]
    assert list(status.mapped(stream)) == [Mapped(0, 2, False), Mapped(2, 2, True)]


def test_dirty_looks_at_the_lowest_bit_and_joins() -> None:
    stream = [(Extent(0, 4), 1), (Extent(4, 4), 3), (Extent(8, 4), 2), (Extent(12, 4), 1)]
    assert list(status.dirty(stream)) == [Extent(0, 8), Extent(12, 4)]
