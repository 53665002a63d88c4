"""The algebra on extents, against sets of single bytes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pullback import extents
from pullback.extents import Extent, Mapped

END = 60
RAW = st.lists(st.builds(Extent, st.integers(0, END), st.integers(0, 12)), max_size=12).map(sorted)
STREAM = RAW.map(lambda raw: list(extents.merge(raw)))
#: Sorted and disjoint, but neighbours may touch, as cut streams do.
TOUCHING = st.sets(st.integers(0, END), max_size=12).map(
    lambda cuts: [extents.between(a, b) for n, (a, b) in enumerate(pairwise(sorted(cuts))) if n % 3]
)
UNIT = st.integers(1, 9)


def members(stream: Iterable[Extent]) -> set[int]:
    return {byte for extent in stream for byte in range(extent.start, extent.end)}


def assert_sorted_and_disjoint(stream: list[Extent]) -> None:
    assert all(extent.length > 0 for extent in stream)
    assert all(left.end <= right.start for left, right in pairwise(stream))


@given(RAW)
def test_merge_keeps_the_bytes_and_joins_what_touches(raw: list[Extent]) -> None:
    merged = list(extents.merge(raw))
    assert members(merged) == members(raw)
    assert all(left.end < right.start for left, right in pairwise(merged))


@given(STREAM, st.builds(Extent, st.integers(0, END), st.integers(0, END)))
def test_clip_keeps_what_is_inside(stream: list[Extent], window: Extent) -> None:
    assert members(extents.clip(stream, window)) == members(stream) & members([window])


@given(STREAM | TOUCHING, STREAM | TOUCHING)
def test_intersect_is_the_bytes_in_both(left: list[Extent], right: list[Extent]) -> None:
    both = list(extents.intersect(left, right))
    assert members(both) == members(left) & members(right)
    assert_sorted_and_disjoint(both)


@given(STREAM | TOUCHING, STREAM | TOUCHING)
def test_subtract_is_the_bytes_in_the_first_alone(left: list[Extent], right: list[Extent]) -> None:
    rest = list(extents.subtract(left, right))
    assert members(rest) == members(left) - members(right)
    assert_sorted_and_disjoint(rest)


@given(STREAM | TOUCHING, STREAM | TOUCHING)
def test_union_is_the_bytes_in_either(left: list[Extent], right: list[Extent]) -> None:
    either = list(extents.union(left, right))
    assert members(either) == members(left) | members(right)
    assert_sorted_and_disjoint(either)


@given(STREAM, UNIT)
def test_align_out_grows_to_whole_units_within_the_disk(stream: list[Extent], unit: int) -> None:
    limit = END + 12
    grown = list(extents.align_out(stream, unit, limit))
    units = {byte // unit for byte in members(stream)}
    assert members(grown) == {byte for byte in range(limit) if byte // unit in units}
    assert_sorted_and_disjoint(grown)


@given(STREAM, UNIT)
def test_align_in_shrinks_to_the_units_that_lie_inside_one_extent(stream: list[Extent], unit: int) -> None:
    inside = list(extents.align_in(stream, unit))
    have = members(stream)
    whole = {byte for byte in have if all(b in have for b in range(byte // unit * unit, byte // unit * unit + unit))}
    assert members(inside) == whole
    assert all(extent.start % unit == 0 and extent.length % unit == 0 for extent in inside)


@given(STREAM, UNIT)
def test_split_crosses_no_multiple_of_the_unit(stream: list[Extent], unit: int) -> None:
    cut = list(extents.split(stream, unit))
    assert members(cut) == members(stream)
    assert all(extent.start // unit == (extent.end - 1) // unit for extent in cut)


@given(STREAM)
def test_total_counts_the_bytes(stream: list[Extent]) -> None:
    assert extents.total(stream) == len(members(stream))


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=12))
def test_data_and_zeroes_share_the_disk_out(runs: list[tuple[int, bool]]) -> None:
    stream, start = [], 0
    for length, zero in runs:
        stream.append(Mapped(start, length, zero))
        start += length
    data, zeroes = list(extents.data(stream)), list(extents.zeroes(stream))
    assert members(data) | members(zeroes) == set(range(start))
    assert not members(data) & members(zeroes)
    assert members(zeroes) == members(mapped.extent for mapped in stream if mapped.zero)


def test_streams_are_lazy() -> None:
    endless = (Extent(start, 1) for start in range(0, 2**60, 2))
    every_third = (Extent(start, 1) for start in range(0, 2**60, 3))
    both = extents.intersect(extents.union(endless, []), every_third)
    assert [next(both) for _ in range(3)] == [Extent(0, 1), Extent(6, 1), Extent(12, 1)]
