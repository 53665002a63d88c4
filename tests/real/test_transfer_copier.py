"""The copier: what it copies, tells and flushes, and that nothing of it is left running."""

from __future__ import annotations

import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pullback import errors
from pullback.extents import Extent, between, data, merge, split, total, zeroes
from pullback.programs import process, qemu_img, qemu_nbd
from pullback.progress import Cancel
from pullback.testing.endpoints import MemoryEndpoint, nbdkit, patchy, read_all
from pullback.transfer import FileEndpoint, NbdEndpoint, Piece, Work, Zero, blocks, copy
from pullback.transfer.copier import runs
from pullback.units import KiB, MiB

SIZE = 9 * MiB + 70_001


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("copy-")] == []


def whole(size: int) -> Extent:
    return Extent(0, size)


def filled(size: int = SIZE) -> MemoryEndpoint:
    """A destination full of rubbish, so that a forgotten zero shows."""
    return MemoryEndpoint(b"\xff" * size)


def test_a_full_copy_is_equal_in_data_and_zeroes() -> None:
    source, destination = MemoryEndpoint(patchy(SIZE)), filled()
    result = copy(source, destination, blocks([whole(SIZE)]))
    assert destination.content == source.content
    assert result.read == SIZE == result.written + result.zeroed
    assert result.zeroed > 0


def test_known_zeroes_are_made_without_being_read() -> None:
    source, destination = MemoryEndpoint(patchy(SIZE)), filled()
    holes = [Zero(extent) for extent in zeroes(source.extents(whole(SIZE)))]
    work: list[Work] = [*holes, *blocks(data(source.extents(whole(SIZE))))]
    result = copy(source, destination, work)
    assert destination.content == source.content
    assert result.read == SIZE - total(zero.extent for zero in holes)


def test_an_empty_destination_is_sent_no_zeroes() -> None:
    source = MemoryEndpoint(patchy(SIZE))
    asked: list[str] = []
    destination = MemoryEndpoint(bytes(SIZE), before=lambda operation, offset, length: asked.append(operation))
    result = copy(source, destination, [Zero(Extent(0, 5)), *blocks([between(5, SIZE)])], skip_zeroes=True)
    assert destination.content[5:] == source.content[5:]
    assert "zero" not in asked
    assert result.skipped == SIZE - result.written


def test_only_the_ranges_to_write_are_written_while_the_whole_block_is_observed() -> None:
    source, destination = MemoryEndpoint(patchy(2 * MiB)), filled(2 * MiB)
    wanted = (Extent(10, 70_000), Extent(MiB - 1, 1))
    seen: list[tuple[int, bytes]] = []
    work = [Piece(Extent(0, MiB), wanted), Piece(Extent(MiB, MiB), ())]
    copy(
        source, destination, work, observe=lambda offset, buffer, length: seen.append((offset, bytes(buffer[:length])))
    )
    expected = bytearray(b"\xff" * 2 * MiB)
    for extent in wanted:
        expected[extent.start : extent.end] = source.content[extent.start : extent.end]
    assert destination.content == expected
    assert sorted(seen) == [(0, bytes(source.content[:MiB])), (MiB, bytes(source.content[MiB:]))]


def test_without_a_destination_blocks_are_only_observed() -> None:
    source = MemoryEndpoint(patchy(SIZE))
    digests: dict[int, bytes] = {}

    def observe(offset: int, buffer: bytearray, length: int) -> None:
        with memoryview(buffer) as view:
            digests[offset] = hashlib.sha256(view[:length]).digest()

    result = copy(source, None, blocks([whole(SIZE)]), observe=observe)
    assert result.written == result.zeroed == 0
    assert digests == {
        part.start: hashlib.sha256(source.content[part.start : part.end]).digest() for part in split([whole(SIZE)], MiB)
    }


def test_progress_adds_up_to_the_work() -> None:
    source, destination, advanced = MemoryEndpoint(patchy(SIZE)), filled(), list[int]()
    copy(source, destination, [Zero(Extent(0, MiB)), *blocks([between(MiB, SIZE)])], advance=advanced.append)
    assert sum(advanced) == SIZE


def test_ranges_are_settled_once_and_only_after_a_flush_behind_their_writes() -> None:
    source, lock = MemoryEndpoint(patchy(SIZE)), threading.Lock()
    unflushed: set[Extent] = set()
    flushed: set[Extent] = set()
    settled: list[Extent] = []

    def before(operation: str, offset: int, length: int) -> None:
        with lock:
            if operation == "flush":
                flushed.update(unflushed)
                unflushed.clear()
            else:
                unflushed.add(Extent(offset, length))

    def on_settled(ranges: Sequence[Extent]) -> None:
        with lock:
            covered = list(merge(sorted(flushed)))
            assert all(any(e.start >= c.start and e.end <= c.end for c in covered) for e in ranges)
        settled.extend(ranges)

    destination = MemoryEndpoint(bytes(SIZE), before=before)
    copy(source, destination, blocks([whole(SIZE)], 64 * KiB), settled=on_settled, settle_bytes=MiB)
    assert len(settled) >= 9
    assert total(settled) == SIZE
    assert list(merge(sorted(settled))) == [whole(SIZE)]


def test_a_copy_ends_with_a_flush_and_its_failure_counts() -> None:
    def before(operation: str, offset: int, length: int) -> None:
        if operation == "flush":
            raise errors.DestinationFull(path="there")

    with pytest.raises(errors.DestinationFull):
        copy(MemoryEndpoint(patchy(MiB)), MemoryEndpoint(bytes(MiB), before=before), blocks([whole(MiB)]))


def test_the_first_error_is_raised_and_the_others_stop_at_their_next_block() -> None:
    read: list[int] = []

    def before(operation: str, offset: int, length: int) -> None:
        read.append(offset)
        if offset == 3 * MiB:
            raise errors.EndpointFailed(operation=operation, endpoint="it", offset=offset, reason="bad", errno=5)
        time.sleep(0.005)

    source = MemoryEndpoint(bytes(200 * MiB), before=before)
    with pytest.raises(errors.EndpointFailed) as caught:
        copy(source, filled(200 * MiB), blocks([whole(200 * MiB)]))
    assert caught.value.offset == 3 * MiB
    assert len(read) < 20


@pytest.mark.parametrize("where", ["work", "observe", "settled", "advance"])
def test_an_error_of_the_caller_comes_back_to_it(where: str) -> None:
    def fail(*_: object) -> None:
        raise LookupError(where)

    def failing() -> Iterator[Work]:
        yield from blocks([whole(MiB)])
        raise LookupError(where)

    work = failing() if where == "work" else blocks([whole(4 * MiB)])
    with pytest.raises(LookupError, match=where):
        copy(
            MemoryEndpoint(patchy(4 * MiB)),
            filled(4 * MiB),
            work,
            observe=fail if where == "observe" else None,
            settled=fail if where == "settled" else None,
            advance=fail if where == "advance" else None,
        )


def test_a_piece_larger_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        copy(filled(2 * MiB), filled(2 * MiB), [Piece(whole(2 * MiB), ())])


def test_cancelling_stops_within_a_block_and_raises_the_reason() -> None:
    cancel, count = Cancel(), list[int]()

    def observe(offset: int, buffer: bytearray, length: int) -> None:
        count.append(offset)
        if len(count) == 10:
            cancel.cancel(errors.Interrupted())

    with pytest.raises(errors.Interrupted):
        copy(filled(300 * MiB), None, blocks([whole(300 * MiB)]), observe=observe, cancel=cancel)
    assert len(count) < 20


def test_work_is_pulled_only_as_fast_as_it_is_done() -> None:
    pulled, done = 0, 0
    ahead: list[int] = []

    def work() -> Iterator[Work]:
        nonlocal pulled
        for piece in blocks([whole(64 * MiB)], 64 * KiB):
            pulled += 1
            ahead.append(pulled - done)
            yield piece

    def advance(_: int) -> None:
        nonlocal done
        done += 1

    copy(filled(64 * MiB), None, work(), advance=advance, workers=3)
    assert pulled == 1024
    assert max(ahead) <= 4


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_ends_with_fewer_channels_than_workers_take_turns(channels: int) -> None:
    busy, most, lock = 0, 0, threading.Lock()

    def before(operation: str, offset: int, length: int) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.001)
        with lock:
            busy -= 1

    source = MemoryEndpoint(patchy(SIZE), channels=channels, before=before)
    destination = filled()
    copy(source, destination, blocks([whole(SIZE)], 256 * KiB))
    assert destination.content == source.content
    assert most <= channels


def test_runs_are_cut_at_units_of_the_disk_and_joined() -> None:
    content = bytearray(512 * KiB)
    content[200 * KiB] = 1
    base = 10 * 64 * KiB
    wanted = Extent(base + 5, 512 * KiB - 10)
    assert list(runs(content, base, wanted)) == [
        (between(base + 5, base + 192 * KiB), True),
        (between(base + 192 * KiB, base + 256 * KiB), False),
        (between(base + 256 * KiB, base + 512 * KiB - 5), True),
    ]


@pytest.mark.parametrize("size", [512, 64 * KiB - 512, 64 * KiB, MiB, 3 * MiB + 512, 5 * MiB + 64 * KiB])
def test_qcow2_to_qcow2_is_equal_for_every_size(size: int, tmp_path: Path) -> None:
    raw, image, copied = tmp_path / "raw", tmp_path / "from.qcow2", tmp_path / "to.qcow2"
    raw.write_bytes(patchy(size, seed=size))
    process.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], timeout=20)
    qemu_img.create(copied, size)
    with (
        qemu_nbd.serve(image, "qcow2", socket=tmp_path / "s" / "from") as here,
        qemu_nbd.serve(copied, "qcow2", socket=tmp_path / "s" / "to", writable=True) as there,
        NbdEndpoint(here) as source,
        NbdEndpoint(there, writable=True) as destination,
    ):
        copy(source, destination, blocks(data(source.extents(whole(size)))), skip_zeroes=True)
    process.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, copied], timeout=20)
    assert qemu_img.check(copied) is None


def test_a_file_is_restored_sparse(tmp_path: Path) -> None:
    size = 64 * MiB
    source = MemoryEndpoint(bytes(40 * MiB) + random.Random(4).randbytes(MiB) + bytes(size - 41 * MiB))
    target = tmp_path / "restored.raw"
    with FileEndpoint(target, create=size) as destination:
        copy(source, destination, blocks([whole(size)]))
        assert read_all(destination) == source.content
    assert os.stat(target).st_blocks * 512 < 3 * MiB


@pytest.mark.parametrize("limit", [64 * KiB, 100_000])
def test_no_read_crosses_a_multiple_of_the_request_limit(limit: int, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(patchy(SIZE))
    log = tmp_path / "log"
    words = ["--filter=log", "file", f"file={tmp_path / 'raw'}", f"logfile={log}"]
    with nbdkit(tmp_path / "nbd", *words) as (address, _), NbdEndpoint(address, request_limit=limit) as source:
        destination = filled()
        copy(source, destination, blocks([Extent(777, SIZE - 777)]))
    reads = re.findall(r" Read .*offset=0x(\w+) count=0x(\w+) \.\.\.", log.read_text())
    assert destination.content[777:] == (tmp_path / "raw").read_bytes()[777:]
    assert sum(int(count, 16) for _, count in reads) == SIZE - 777
    assert all(int(start, 16) // limit == (int(start, 16) + int(count, 16) - 1) // limit for start, count in reads)
