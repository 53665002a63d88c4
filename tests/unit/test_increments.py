"""What an increment reads and writes, against a naive model that knows every sector.

A disk is a list of sectors; each is a value (0 is zero). The parent's content, the frozen disk's
content, what the bitmaps say and what the maps of holes say are drawn at random within what QEMU
guarantees; then the `Step` is carried out on the parent, and must give the frozen disk.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from pullback import extents
from pullback.extents import Extent, between
from pullback.flows import increments
from pullback.flows.increments import Step

BLOCK = 4


@dataclass(frozen=True, slots=True)
class Case:
    """A disk at two moments. Units are sectors."""

    parent: list[int]
    now: list[int]
    #: Sectors that the bitmaps call changed.
    dirty: set[int]
    #: Sectors known to be zero without reading, now and in the parent.
    holes: set[int]
    parent_holes: set[int]
    #: Sectors of a cluster.
    grain: int = 1

    @property
    def size(self) -> int:
        """Sectors."""
        return len(self.now)

    def step(self) -> Step:
        """What is to be done."""
        return increments.increment(
            spans(self.dirty),
            spans(self.holes),
            spans(self.parent_holes),
            between(0, self.size),
            block=BLOCK,
            size=self.size,
            grain=self.grain,
        )


def spans(sectors: set[int]) -> list[Extent]:
    """Sectors as extents."""
    return list(extents.merge(Extent(sector, 1) for sector in sorted(sectors)))


def sectors(stream: object) -> set[int]:
    """Extents as sectors."""
    assert isinstance(stream, tuple | list)
    return {sector for extent in stream for sector in range(extent.start, extent.end)}


@st.composite
def cases(draw: st.DrawFn, *, hidden: bool) -> Case:
    """Disks; `hidden` ones were shrunk and grown back: sectors became zero without a bit in the bitmap."""
    size = draw(st.integers(1, 3 * BLOCK + 2))
    values = st.lists(st.integers(0, 3), min_size=size, max_size=size)
    some = st.sets(st.integers(0, size - 1))
    parent, wanted = draw(values), draw(values)
    lost = draw(some) if hidden else set()
    dirty = {n for n in range(size) if parent[n] != wanted[n]} | draw(some)
    now = [0 if n in lost else wanted[n] for n in range(size)]
    dirty -= lost
    # A hole reads as zeroes; what was lost is one. A zero need not be a hole.
    holes = {n for n in draw(some) | lost if now[n] == 0}
    parent_holes = {n for n in draw(some) if parent[n] == 0}
    return Case(parent, now, dirty, holes, parent_holes)


def carried_out(case: Case, step: Step) -> tuple[list[int], set[int]]:
    """The parent with the step applied, and the blocks whose hashes are computed again."""
    disk, hashed = list(case.parent), {block.start // BLOCK for block in _split(step.zero_blocks)}
    for extent in step.zero:
        disk[extent.start : extent.end] = [0] * extent.length
    for block in step.blocks:
        hashed.add(block.read.start // BLOCK)
        for extent in block.write:
            assert block.read.start <= extent.start
            assert extent.end <= block.read.end
            disk[extent.start : extent.end] = case.now[extent.start : extent.end]
    for suspect in step.suspects:
        hashed.add(suspect.start // BLOCK)
        if case.parent[suspect.start : suspect.end] != case.now[suspect.start : suspect.end]:
            disk[suspect.start : suspect.end] = case.now[suspect.start : suspect.end]
    return disk, hashed


def _split(blocks: tuple[Extent, ...]) -> list[Extent]:
    return list(extents.split(blocks, BLOCK))


def changed_blocks(case: Case) -> set[int]:
    """Blocks whose content differs."""
    return {n // BLOCK for n in range(case.size) if case.parent[n] != case.now[n]}


@given(cases(hidden=False))
def test_an_increment_makes_the_parent_into_the_frozen_disk(case: Case) -> None:
    disk, _ = carried_out(case, case.step())
    assert disk == case.now


@given(cases(hidden=True))
def test_holes_that_no_bitmap_knows_are_found(case: Case) -> None:
    disk, _ = carried_out(case, case.step())
    assert disk == case.now


@given(cases(hidden=True))
def test_every_block_that_differs_is_hashed_again(case: Case) -> None:
    _, hashed = carried_out(case, case.step())
    assert changed_blocks(case) <= hashed


@given(cases(hidden=True))
def test_blocks_called_zero_are_zero(case: Case) -> None:
    step = case.step()
    assert all(case.now[n] == 0 for n in sectors(step.zero_blocks))
    assert sectors(step.zero) <= sectors(step.zero_blocks)
    # Known zeroes are not read.
    assert not sectors(step.zero_blocks) & sectors([block.read for block in step.blocks])


@given(cases(hidden=False))
def test_nothing_is_read_but_blocks_with_changes(case: Case) -> None:
    """Without hidden holes, a hole that the parent stores as zeroes may still be looked at."""
    step = case.step()
    assert {block.read.start // BLOCK for block in step.blocks} <= {n // BLOCK for n in case.dirty}
    near = {n // BLOCK for hole in case.holes - case.parent_holes - case.dirty for n in (max(0, hole - 1), hole)}
    assert {block.start // BLOCK for block in step.suspects} <= near


@st.composite
def regrown(draw: st.DrawFn) -> Case:
    """A disk of clusters of two sectors, shrunk and grown back over a backing file.

    The cut lies anywhere: whole clusters behind it are holes, and the rest of the cluster with the
    cut was zeroed by a write. Small writes left half clusters as holes elsewhere.
    """
    size = 2 * draw(st.integers(1, BLOCK + 3))
    values = st.lists(st.integers(0, 3), min_size=size, max_size=size)
    parent, cut = draw(values), draw(st.integers(0, size))
    now = [0 if n >= cut else parent[n] for n in range(size)]
    behind = {n for n in range(size) if n >= cut + cut % 2}
    if not any(parent[n] for n in behind):  # nothing that a map could show was lost: then nothing was
        now, behind = list(parent), set()
    halves = {n for n in draw(st.sets(st.integers(0, size - 1))) if now[n] == 0}
    return Case(parent, now, set(), behind | halves, set(), grain=2)


@given(regrown())
def test_a_disk_shrunk_anywhere_and_grown_back_is_found(case: Case) -> None:
    disk, hashed = carried_out(case, case.step())
    assert disk == case.now
    assert changed_blocks(case) <= hashed


def test_holes_smaller_than_a_cluster_cost_no_read() -> None:
    case = Case([1, 0, 1, 0], [1, 0, 1, 0], set(), {1, 3}, set(), grain=2)
    assert case.step() == Step(blocks=(), zero=(), zero_blocks=())


@given(cases(hidden=True))
def test_reads_are_whole_blocks_and_each_once(case: Case) -> None:
    step = case.step()
    reads = [*(block.read for block in step.blocks), *step.suspects]
    assert all(read == between(read.start, min(read.start + BLOCK, case.size)) for read in reads)
    assert all(read.start % BLOCK == 0 for read in reads)
    assert len({read.start for read in reads}) == len(reads)


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=3 * BLOCK + 2).flatmap(
        lambda now: st.tuples(st.just(now), st.sets(st.integers(0, len(now) - 1)))
    )
)
def test_a_whole_read_covers_all_data_and_hashes_everything(drawn: tuple[list[int], set[int]]) -> None:
    now, maybe = drawn
    holes = {n for n in maybe if now[n] == 0}
    size = len(now)
    step = increments.whole(spans(set(range(size)) - holes), between(0, size), block=BLOCK, size=size)
    written = sectors([extent for block in step.blocks for extent in block.write])
    assert {n for n in range(size) if now[n]} <= written
    assert all(now[n] == 0 for n in sectors(step.zero_blocks))
    everything = {block.read.start // BLOCK for block in step.blocks} | {n // BLOCK for n in sectors(step.zero_blocks)}
    assert everything == set(range(-(-size // BLOCK)))
    assert (step.zero, step.suspects) == ((), ())


@given(st.integers(0, 100), st.integers(1, 9), st.integers(1, 40))
def test_windows_cover_the_disk_and_are_cut_at_blocks(size: int, block: int, length: int) -> None:
    found = list(increments.windows(size, block, length))
    assert extents.total(found) == size
    assert all(window.start % block == 0 for window in found)
    assert [window.end for window in found[:-1]] == [window.start for window in found[1:]]
