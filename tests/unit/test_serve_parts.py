"""The parts of serving that are pure, or nearly: what is loaded ahead, holes, the cache, words between processes."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorysource import Memory
from pullback import errors, repo
from pullback.extents import Extent
from pullback.flows.servants import Mishap, _trouble
from pullback.serve import words
from pullback.serve.ahead import Ahead
from pullback.serve.blocks import Blocks
from pullback.serve.disk import Disk, Workers
from pullback.serve.holes import Holes
from pullback.serve.patience import Patience
from pullback.serve.source import Buffer
from pullback.units import KiB

CHUNK = 4 * KiB


def no_holes(index: int) -> int:
    """All blocks have data."""
    return index


def never() -> None:
    """For who asks for what is there."""
    raise AssertionError("it was there")


# -- loading ahead ---------------------------------------------------------------------------


def test_who_reads_in_order_gets_more_and_more_ahead() -> None:
    ahead = Ahead(1000, 16, no_holes)
    got = [ahead.asked(block) for block in range(100)]
    assert got[0] == range(0)  # nobody knows yet
    wanted = [block for part in got for block in part]
    assert wanted == sorted(set(wanted))
    assert max(wanted) >= 99 + 8
    assert all(part.stop <= number + 1 + 16 for number, part in enumerate(got) if part)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=60))
def test_never_more_ahead_than_allowed_nor_behind_the_end(blocks: list[int]) -> None:
    ahead = Ahead(1000, 16, no_holes)
    for block in blocks:
        part = ahead.asked(block)
        assert len(part) <= 16
        assert not part or block < part.start
        assert part.stop <= 1000


def test_scattered_reads_load_nothing_ahead() -> None:
    ahead = Ahead(100_000, 16, no_holes)
    chance = random.Random(1)
    assert sum(len(ahead.asked(chance.randrange(100_000))) for _ in range(500)) < 20


def test_several_readers_are_told_apart() -> None:
    ahead = Ahead(10_000, 16, no_holes)
    starts = (0, 2000, 4000, 6000)
    found = {start: 0 for start in starts}
    for step in range(50):
        for start in starts:
            found[start] += len(ahead.asked(start + step))
    assert all(count >= 50 for count in found.values())


def test_requests_out_of_order_are_one_reader() -> None:
    ahead = Ahead(1000, 16, no_holes)
    order = [number + step for number in range(0, 200, 4) for step in (2, 0, 3, 1)]
    assert sum(len(ahead.asked(block)) for block in order) >= 190


def test_a_hole_is_no_gap() -> None:
    def next_data(index: int) -> int:
        return 500 if 50 <= index < 500 else index

    ahead = Ahead(1000, 16, next_data)
    for block in range(50):
        ahead.asked(block)
    assert ahead.asked(500) or ahead.asked(501)


def test_a_cache_too_small_for_that_loads_nothing_ahead() -> None:
    ahead = Ahead(1000, 0, no_holes)
    assert all(ahead.asked(block) == range(0) for block in range(100))


# -- holes -----------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, CHUNK // 512), st.data())
def test_holes_are_those_of_the_hash_list(zero: list[bool], tail: int, data: st.DataObject) -> None:
    size = (len(zero) - 1) * CHUNK + tail * 512
    hashes = repo.HashList(size, CHUNK)
    for index, empty in enumerate(zero):
        length = hashes.block(index).length
        hashes.set(index, repo.zero_hash(length) if empty else bytes([index]) * 32)
    holes = Holes(hashes)
    assert [holes.zero(index) for index in range(len(zero))] == zero
    for index in range(len(zero) + 1):
        expected = next((at for at in range(index, len(zero)) if not zero[at]), len(zero))
        assert holes.next_data(index) == expected
    start = data.draw(st.integers(0, size - 1))
    window = Extent(start, data.draw(st.integers(1, size - start)))
    parts = list(holes.map(window))
    assert (parts[0].start, parts[-1].end) == (window.start, window.end)
    assert all(one.end == other.start for one, other in itertools.pairwise(parts))
    for part in parts:
        assert all(zero[at // CHUNK] == part.zero for at in range(part.start, part.end, 512))


# -- the cache -------------------------------------------------------------------------------


def test_the_cache_is_bounded_and_keeps_what_was_used_last() -> None:
    blocks = Blocks(4 * CHUNK)
    for number in range(10):
        key = bytes([number]) * 32
        [block] = blocks.claim([key])
        assert blocks.claim([key]) == []  # it is being loaded
        blocks.fill(block, blocks.buffer(CHUNK))
        first = blocks.hold(bytes(32), never)
        assert first is not None, "what is used all the time stays"
        blocks.release(first[0])
        assert blocks.kept <= 4 * CHUNK
    assert [number for number in range(10) if blocks.has(bytes([number]) * 32)] == [0, 7, 8, 9]


def test_what_is_held_stays_and_its_buffer_is_not_used_again() -> None:
    blocks = Blocks(2 * CHUNK)
    [block] = blocks.claim([b"a" * 32])
    blocks.fill(block, bytearray(b"a" * CHUNK))
    held = blocks.hold(b"a" * 32, never)
    assert held is not None
    assert held[1]
    for number in range(20):
        [other] = blocks.claim([bytes([number]) * 32])
        buffer = blocks.buffer(CHUNK)
        buffer[:] = b"x" * CHUNK
        blocks.fill(other, buffer)
    assert held[0].content == b"a" * CHUNK
    blocks.release(held[0])
    [other] = blocks.claim([b"z" * 32])
    blocks.fill(other, bytearray(CHUNK))
    assert blocks.kept <= 2 * CHUNK


def test_all_who_wait_hear_of_a_failure_and_the_next_tries_again() -> None:
    blocks = Blocks(CHUNK)
    [block] = blocks.claim([b"a" * 32])
    heard: list[str] = []
    for _ in range(5):
        held = blocks.hold(b"a" * 32, lambda: heard.append(str(block.error and block.error.code)))
        assert held == (block, False)
    blocks.fail(block, errors.EndpointFailed(operation="Reading", endpoint="x", offset=0, reason="bad"))
    assert heard == ["io-failed"] * 5
    assert blocks.hold(b"a" * 32, never) is None
    assert len(blocks.claim([b"a" * 32])) == 1


# -- a disk ----------------------------------------------------------------------------------


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(3)
    made.start()
    yield made
    made.close()


def _content(blocks: int, tail: int = 512) -> bytes:
    chance = random.Random(blocks)
    parts = [bytes(CHUNK) if chance.random() < 0.3 else chance.randbytes(CHUNK) for _ in range(blocks)]
    return b"".join(parts) + chance.randbytes(tail)


@pytest.mark.parametrize("limit", [2 * CHUNK, 64 * CHUNK])
def test_many_threads_read_what_is_there(workers: Workers, limit: int) -> None:
    source = Memory(_content(100), CHUNK)
    lost: list[object] = []
    disk = Disk("vda", source, Blocks(limit), workers, lambda *what: lost.append(what))
    wrong: list[int] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        at = 0
        for _ in range(150):
            length = chance.choice((1, 512, CHUNK, 3 * CHUNK + 7))
            at = at if chance.random() < 0.7 and at < disk.size else chance.randrange(disk.size)
            length = min(length, disk.size - at)
            buffer = bytearray(length)
            disk.read_into(at, memoryview(buffer))
            if buffer != source.content[at : at + length]:
                wrong.append(at)
            at += length

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (wrong, lost) == ([], [])


def test_each_block_is_loaded_once_however_many_ask(workers: Workers) -> None:
    source = Memory(_content(40), CHUNK)
    disk = Disk("vda", source, Blocks(100 * CHUNK), workers, lambda *what: None)

    def read() -> None:
        disk.read_into(0, memoryview(bytearray(disk.size)))

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(source.loaded) == sorted(set(source.loaded))


@pytest.mark.parametrize("together", [1, 4, 100])
def test_a_bad_block_is_lost_alone(workers: Workers, together: int) -> None:
    source = Memory(_content(40), CHUNK, bad=[7, 8, 20], together=together)
    source.bad = {index for index in source.bad if source.content[index * CHUNK : (index + 1) * CHUNK] != bytes(CHUNK)}
    assert source.bad
    lost: set[Extent] = set()
    disk = Disk("vda", source, Blocks(100 * CHUNK), workers, lambda target, extent, error: lost.add(extent))
    for index in range(40):
        buffer = bytearray(CHUNK)
        if index in source.bad:
            with pytest.raises(errors.EndpointFailed, match="bad"):
                disk.read_into(index * CHUNK, memoryview(buffer))
        else:
            disk.read_into(index * CHUNK, memoryview(buffer))
            assert buffer == source.content[index * CHUNK : (index + 1) * CHUNK]
    assert lost == {Extent(index * CHUNK, CHUNK) for index in source.bad}


def test_what_a_source_does_wrong_keeps_nobody_waiting(workers: Workers) -> None:
    class Broken(Memory):
        def _load(self, indexes: Sequence[int], buffer: Buffer) -> Iterator[tuple[int, bytearray]]:
            raise ZeroDivisionError("oh")

    disk = Disk("vda", Broken(b"x" * CHUNK, CHUNK), Blocks(CHUNK), workers, lambda *what: None)
    with pytest.raises(errors.EndpointFailed, match="ZeroDivisionError: oh"):
        disk.read_into(0, memoryview(bytearray(1)))


# -- words -----------------------------------------------------------------------------------


def _pair() -> tuple[words.Teller, int]:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    return words.Teller(writing), reading


def test_a_setup_goes_through_a_file_that_has_no_name() -> None:
    setup = words.Setup(
        repository="dir:/x", machine="web01", point="1f", targets=("vda",), lent={"key": "topsecret"},
        environ={"AWS_SECRET_ACCESS_KEY": "topsecret"}, caches="/c", directory="/d", cache=1, patient=True,
    )  # fmt: skip
    assert "topsecret" not in repr(setup)
    assert words.Setup.from_file(setup.to_file()) == setup


def test_each_damage_is_told_once() -> None:
    teller, reading = _pair()
    error = errors.EndpointFailed(operation="Reading", endpoint="x", offset=0, reason="bad\x1b[31m")
    for start in (0, 4096, 0):
        teller.damaged("vda", Extent(start, 4096), error)
    lines = os.read(reading, 9999).splitlines()
    troubles = [_trouble(words.word(line)) for line in lines]
    assert [(one.kind, one.target, one.extent) for one in troubles if one] == [
        (Mishap.DAMAGED, "vda", Extent(0, 4096)),
        (Mishap.DAMAGED, "vda", Extent(4096, 4096)),
    ]
    assert troubles[0] is not None
    assert "\x1b" not in troubles[0].message


def test_a_teller_never_waits() -> None:
    teller, reading = _pair()
    for _ in range(10_000):
        teller.notice("x" * 100)
    assert os.read(reading, 100)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"x",
        b"[]",
        b"{}",
        b'{"word": 1}',
        b'{"word": "damaged"}',
        b'{"word": "damaged", "start": "0"}',
        b"[" * 9999,
    ],
)
def test_what_is_no_word_is_nothing(line: bytes) -> None:
    assert _trouble(words.word(line)) is None


def test_a_failure_is_the_error_that_it_was() -> None:
    teller, reading = _pair()
    error = errors.VerificationFailed(point="1f", problem="its hash list is damaged")
    teller.failed(error)
    found = words.failure(words.word(os.read(reading, 9999)), "nbdkit")
    assert (type(found), str(found)) == (type(error), str(error))
    teller.failed(ZeroDivisionError("oh"))
    found = words.failure(words.word(os.read(reading, 9999)), "nbdkit")
    assert isinstance(found, errors.ProgramFailed)
    assert "ZeroDivisionError: oh" in str(found)
    assert isinstance(words.failure({"code": "unknown-disk", "facts": {"x": 1}}, "nbdkit"), errors.ProgramFailed)


# -- patience --------------------------------------------------------------------------------


def _away() -> errors.PullbackError:
    return errors.StoreUnreachable(store="/x", reason="gone")


def test_who_is_patient_waits_and_mends() -> None:
    teller, reading = _pair()
    mended: list[int] = []

    def work() -> str:
        if len(mended) < 2:
            raise _away()
        return "done"

    assert Patience(teller, patient=True).run(work, lambda: mended.append(1)) == "done"
    assert [words.word(line)["word"] for line in os.read(reading, 9999).splitlines()] == ["away", "back"]


def test_who_is_not_patient_gets_the_error_and_the_next_may_be_lucky() -> None:
    teller, reading = _pair()
    patience, mended = Patience(teller, patient=False), list[int]()

    def work() -> str:
        if not mended:
            raise _away()
        return "done"

    with pytest.raises(errors.StoreUnreachable):
        patience.run(work, lambda: mended.append(1))
    assert patience.run(work, lambda: None) == "done"
    assert [words.word(line)["word"] for line in os.read(reading, 9999).splitlines()] == ["away", "back"]


def test_damage_is_not_waited_for() -> None:
    teller, _ = _pair()

    def work() -> str:
        raise errors.ObjectDamaged(store="/x", name="data/ab", problem="short")

    with pytest.raises(errors.ObjectDamaged):
        Patience(teller, patient=True).run(work, lambda: None)
