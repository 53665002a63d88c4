"""NBD endpoints against real servers: contexts, bitmaps, big disks, limits, and the ways to refuse."""

from __future__ import annotations

import os
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pullback import errors
from pullback.extents import Extent, Mapped, total
from pullback.model.exports import NbdAddress
from pullback.programs import process, qemu_img, qemu_nbd
from pullback.testing.endpoints import nbdkit
from pullback.transfer import NbdEndpoint
from pullback.units import GiB, KiB, MiB, TiB

BITMAP = "qemu:dirty-bitmap:since"


@contextmanager
def qcow2(directory: Path, size: int, **options: object) -> Iterator[NbdEndpoint]:
    image = directory / "disk.qcow2"
    if not image.exists():
        qemu_img.create(image, size)
    with (
        qemu_nbd.serve(image, "qcow2", socket=directory / "s" / "nbd", writable=True) as address,
        NbdEndpoint(address, writable=True) as endpoint,
    ):
        yield endpoint


def with_bitmap(directory: Path) -> Path:
    """A disk of 8 TiB whose bitmap `since` has recorded three writes."""
    image = directory / "disk.qcow2"
    qemu_img.create(image, 8 * TiB)
    process.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", image, "since"], timeout=20)
    with qcow2(directory, 0) as endpoint, endpoint.channel() as channel:
        channel.write(0, bytearray(b"a" * 64 * KiB), 0, 64 * KiB)
        channel.write(5 * GiB + 64 * KiB, bytearray(b"b" * 128 * KiB), 0, 128 * KiB)
        channel.zero(8 * TiB - 512, 512)
    return image


def test_a_bitmap_of_a_huge_disk_tells_what_was_written_or_zeroed(tmp_path: Path) -> None:
    image = with_bitmap(tmp_path)
    with (
        qemu_nbd.serve(image, "qcow2", socket=tmp_path / "s" / "b", bitmaps=["since"]) as address,
        NbdEndpoint(address, contexts=[BITMAP]) as endpoint,
    ):
        dirty = list(endpoint.dirty(BITMAP, Extent(0, endpoint.size)))
        inside = list(endpoint.dirty(BITMAP, Extent(5 * GiB + 100 * KiB, 30 * KiB)))
    assert dirty == [
        Extent(0, 64 * KiB),
        Extent(5 * GiB + 64 * KiB, 128 * KiB),
        Extent(8 * TiB - 64 * KiB, 64 * KiB),
    ]
    assert inside == [Extent(5 * GiB + 100 * KiB, 30 * KiB)]


def test_allocation_and_bitmap_are_told_over_one_connection(tmp_path: Path) -> None:
    image = with_bitmap(tmp_path)
    with (
        qemu_nbd.serve(image, "qcow2", socket=tmp_path / "s" / "b", bitmaps=["since"], shared=1) as address,
        NbdEndpoint(address, contexts=[BITMAP]) as endpoint,
    ):
        assert endpoint.channels == 1
        both = zip(endpoint.extents(Extent(0, GiB)), endpoint.dirty(BITMAP, Extent(0, GiB)), strict=False)
        assert next(both) == (Mapped(0, 64 * KiB, False), Extent(0, 64 * KiB))
        with endpoint.channel() as channel:
            buffer = bytearray(512)
            channel.read_into(0, buffer, 512)
            assert buffer == b"a" * 512
        assert [mapped.zero for mapped in endpoint.extents(Extent(0, GiB))] == [False, True]


def test_a_bitmap_that_is_not_offered_is_refused_by_name(tmp_path: Path) -> None:
    qemu_img.create(tmp_path / "disk.qcow2", MiB)
    with (
        qemu_nbd.serve(tmp_path / "disk.qcow2", "qcow2", socket=tmp_path / "s" / "b") as address,
        pytest.raises(errors.Unsupported, match=BITMAP),
    ):
        NbdEndpoint(address, contexts=[BITMAP])


def test_a_server_without_contexts_has_all_data(tmp_path: Path) -> None:
    with (
        nbdkit(tmp_path / "nbd", "--no-sr", "memory", "size=3M") as (address, _),
        NbdEndpoint(address) as endpoint,
    ):
        assert list(endpoint.extents(Extent(MiB, GiB))) == [Mapped(MiB, 2 * MiB, False)]
        assert list(endpoint.extents(Extent(3 * MiB, MiB))) == []


def test_hundreds_of_thousands_of_extents_come_lazily_in_bounded_memory(tmp_path: Path) -> None:
    listing = tmp_path / "extents"
    listing.write_text("".join(f"{n * 4 * KiB} {4 * KiB} {'' if n % 2 else 'hole,zero'}\n" for n in range(250_000)))
    words = [
        "eval",
        f"get_size=echo {250_000 * 4 * KiB}",
        "pread=exit 1",
        f"extents=cat {listing}",
        "can_extents=exit 0",
    ]
    with nbdkit(tmp_path / "nbd", *words) as (address, _), NbdEndpoint(address) as endpoint:
        tracemalloc.start()
        count = sum(1 for _ in endpoint.extents(Extent(0, endpoint.size)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert count == 250_000
    assert peak < 40 * MiB


def test_a_zero_of_terabytes_is_sent_in_parts(tmp_path: Path) -> None:
    with qcow2(tmp_path, 5 * GiB) as endpoint, endpoint.channel() as channel:
        channel.write(5 * GiB - 512, bytearray(b"x" * 512), 0, 512)
        channel.zero(0, 5 * GiB)
        assert total(mapped.extent for mapped in endpoint.extents(Extent(0, 5 * GiB)) if not mapped.zero) == 0


def test_a_read_above_the_payload_limit_is_sent_in_parts(tmp_path: Path) -> None:
    with qcow2(tmp_path, 40 * MiB) as endpoint, endpoint.channel() as channel:
        data = bytearray(os.urandom(MiB)) * 40
        channel.write(0, data, 0, len(data))
        buffer = bytearray(len(data))
        channel.read_into(0, buffer, len(buffer))
    assert buffer == data


def test_zeroing_without_holes_allocates(tmp_path: Path) -> None:
    image = tmp_path / "raw"
    image.touch()
    os.truncate(image, 2 * MiB)
    with (
        qemu_nbd.serve(image, "raw", socket=tmp_path / "s" / "nbd", writable=True) as address,
        NbdEndpoint(address, writable=True) as endpoint,
        endpoint.channel() as channel,
    ):
        channel.zero(0, MiB, hole=True)
        assert image.stat().st_blocks == 0
        channel.zero(0, MiB, hole=False)
    assert image.stat().st_blocks * 512 == MiB


def test_writing_to_a_read_only_export_is_refused_at_opening(tmp_path: Path) -> None:
    with nbdkit(tmp_path / "nbd", "--readonly", "memory", "size=1M") as (address, _):
        with pytest.raises(errors.EndpointFailed, match="read-only"):
            NbdEndpoint(address, writable=True)
        with (
            NbdEndpoint(address) as endpoint,
            endpoint.channel() as channel,
            pytest.raises(errors.EndpointFailed, match="opened for reading"),
        ):
            channel.write(0, bytearray(512), 0, 512)


@pytest.mark.parametrize("export", ["nope", "ä % ?/#&=", "x" * 4000])
def test_an_unknown_export_is_told(tmp_path: Path, export: str) -> None:
    qemu_img.create(tmp_path / "disk.qcow2", MiB)
    with (
        qemu_nbd.serve(tmp_path / "disk.qcow2", "qcow2", socket=tmp_path / "s" / "b") as address,
        pytest.raises(errors.EndpointFailed) as caught,
    ):
        NbdEndpoint(NbdAddress(socket=address.socket, export=export))
    assert caught.value.operation == "connecting"
    assert caught.value.errno == 2


def test_a_socket_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.EndpointFailed, match="No such file") as caught:
        NbdEndpoint(NbdAddress(socket=tmp_path / "none"))
    assert caught.value.errno == 2


def test_a_missing_binding_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbd", None)
    with pytest.raises(errors.ProgramMissing) as caught:
        NbdEndpoint(NbdAddress(socket=tmp_path / "none"))
    assert "python3-libnbd" in str(caught.value.hint)


def test_a_closed_endpoint_refuses_and_leaves_no_descriptor(tmp_path: Path) -> None:
    with nbdkit(tmp_path / "nbd", "memory", "size=1M") as (address, _):
        before = len(os.listdir("/proc/self/fd"))
        endpoint = NbdEndpoint(address)
        channels = [endpoint.channel() for _ in range(4)]
        assert len(os.listdir("/proc/self/fd")) == before + 5
        endpoint.close()
        assert len(os.listdir("/proc/self/fd")) == before
        with pytest.raises(errors.EndpointFailed, match="closed"):
            channels[0].read_into(0, bytearray(512), 512)
        with pytest.raises(errors.EndpointFailed, match="closed"):
            list(endpoint.extents(Extent(0, MiB)))


def test_requests_leave_no_memory_behind(tmp_path: Path) -> None:
    """The binding leaks one reference per request when data is given as `nbd.Buffer` (1.14.2)."""
    with (
        nbdkit(tmp_path / "nbd", "memory", "size=1M") as (address, _),
        NbdEndpoint(address, writable=True) as endpoint,
        endpoint.channel() as channel,
    ):
        buffer = bytearray(4096)
        for _ in range(3):
            channel.read_into(0, buffer, 4096)
            channel.write(512, buffer, 512, 1024)
            channel.read_into(0, buffer, 100)
        assert sys.getrefcount(buffer) == 2
        buffer.extend(b"x")  # BufferError if anybody still looked at it


def test_the_address_as_a_uri_is_understood_by_other_clients(tmp_path: Path) -> None:
    directory = tmp_path / "a b%,&?#é"
    qemu_img.create(tmp_path / "disk.qcow2", MiB)
    with qemu_nbd.serve(tmp_path / "disk.qcow2", "qcow2", socket=directory / "s=;", export="vda / 1&2?é") as address:
        told = process.run(["nbdinfo", "--size", address.uri], timeout=20)
    assert told.strip() == str(MiB).encode()
