"""qemu-nbd: what it serves, who may connect, and how it ends."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pullback import errors
from pullback.extents import Extent
from pullback.model.exports import NbdAddress
from pullback.programs import process, qemu_img, qemu_nbd
from pullback.testing.endpoints import read_all
from pullback.transfer import NbdEndpoint
from pullback.units import KiB, MiB


@contextmanager
def opened(socket: Path, image: Path, format: str = "qcow2", writable: bool = False) -> Iterator[NbdEndpoint]:
    with (
        qemu_nbd.serve(image, format, socket=socket, writable=writable) as address,
        NbdEndpoint(address, writable=writable) as endpoint,
    ):
        yield endpoint


def fill(endpoint: NbdEndpoint, offset: int, letter: bytes) -> None:
    with endpoint.channel() as channel:
        channel.write(offset, bytearray(letter * 64 * KiB), 0, 64 * KiB)


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "private" / "nbd"


@pytest.mark.parametrize("name", ["a,b.raw", "nbd:unix:x", 'json:{"a"}', "with space\n", "ünï%s", "-f", "file:x"])
def test_any_file_name_is_taken_as_it_stands(tmp_path: Path, socket: Path, name: str) -> None:
    image = tmp_path / name
    image.write_bytes(b"q" * MiB)
    with opened(socket, image, "raw") as endpoint:
        assert read_all(endpoint) == b"q" * MiB


def test_a_relative_path_is_served(tmp_path: Path, socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("json:relative").write_bytes(b"q" * MiB)
    with opened(socket, Path("json:relative"), "raw") as endpoint:
        assert endpoint.size == MiB


def test_the_socket_is_private_and_goes_at_the_end(tmp_path: Path, socket: Path) -> None:
    qemu_img.create(tmp_path / "disk", MiB)
    with qemu_nbd.serve(tmp_path / "disk", "qcow2", socket=socket):
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    assert not socket.exists()


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    qemu_img.create(tmp_path / "disk", MiB)
    (tmp_path / "open").mkdir(mode=0o755)
    with (
        pytest.raises(errors.CannotWrite, match="open to other users"),
        qemu_nbd.serve(tmp_path / "disk", "qcow2", socket=tmp_path / "open" / "nbd"),
    ):
        pass


def test_a_socket_left_by_a_killed_server_is_replaced(tmp_path: Path, socket: Path) -> None:
    qemu_img.create(tmp_path / "disk", MiB)
    with process.Child(["nbdkit", "--foreground", "--unix", socket.parent.parent / "dead", "null"]) as child:
        child.wait_until((tmp_path / "dead").exists, what="socket", timeout=20)
        child.kill()
        child.wait(5)
    socket.parent.mkdir(mode=0o700)
    (tmp_path / "dead").rename(socket)
    with opened(socket, tmp_path / "disk") as endpoint:
        assert endpoint.size == MiB


def test_what_is_wrong_with_the_image_is_told(tmp_path: Path, socket: Path) -> None:
    (tmp_path / "disk").write_bytes(b"no qcow2" * 1000)
    with (
        pytest.raises(errors.ProgramFailed, match="not in qcow2 format"),
        qemu_nbd.serve(tmp_path / "disk", "qcow2", socket=socket),
    ):
        pass


def test_a_missing_image_is_told(tmp_path: Path, socket: Path) -> None:
    with (
        pytest.raises(errors.EndpointFailed, match="no such file"),
        qemu_nbd.serve(tmp_path / "disk", "qcow2", socket=socket),
    ):
        pass


def test_an_image_in_use_is_refused_unless_shared_by_force(tmp_path: Path, socket: Path) -> None:
    image = tmp_path / "disk"
    qemu_img.create(image, MiB)
    with opened(socket, image, writable=True) as writer:
        fill(writer, 0, b"w")
        second = socket.with_name("second")
        with pytest.raises(errors.ProgramFailed, match="lock"), qemu_nbd.serve(image, "qcow2", socket=second):
            pass
        with qemu_nbd.serve(image, "qcow2", socket=second, options={"force-share": True}) as address:
            NbdEndpoint(address).close()


def test_the_image_is_closed_and_free_at_the_end(tmp_path: Path, socket: Path) -> None:
    image = tmp_path / "disk"
    qemu_img.create(image, MiB, options="lazy_refcounts=on")
    with opened(socket, image, writable=True) as endpoint:
        fill(endpoint, 64 * KiB, b"z")
    process.run(["qemu-img", "check", "-f", "qcow2", image], timeout=20)  # takes the lock; clean


def test_a_graph_reads_through_the_backing_that_it_names_and_no_other(tmp_path: Path, socket: Path) -> None:
    base, evil, top = tmp_path / "base", tmp_path / "evil", tmp_path / "top"
    for image, letter in ((base, b"b"), (evil, b"e")):
        qemu_img.create(image, MiB)
        with opened(socket, image, writable=True) as endpoint:
            fill(endpoint, 0, letter)
            fill(endpoint, 64 * KiB, letter)
    qemu_img.create(top, MiB, backing="evil")
    with opened(socket, top, writable=True) as endpoint:
        fill(endpoint, 64 * KiB, b"t")
    graph = layer(top) | {"backing": layer(base) | {"backing": None}}
    with qemu_nbd.serve_graph(graph, socket=socket) as address, NbdEndpoint(address) as endpoint:
        content = read_all(endpoint)
    assert content == b"b" * 64 * KiB + b"t" * 64 * KiB + bytes(MiB - 128 * KiB)


def layer(image: Path) -> dict[str, object]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}


def test_an_image_that_cannot_be_closed_well_is_an_error(tmp_path: Path, socket: Path) -> None:
    """qemu-nbd says so on standard error alone: its exit status is 0 (tried, QEMU 7.2)."""
    qemu_img.create(tmp_path / "disk", MiB)
    broken = {
        "driver": "blkdebug",
        "image": {"driver": "file", "filename": str(tmp_path / "disk")},
        "inject-error": [{"event": "flush_to_os", "errno": 5}],
    }
    with (
        pytest.raises(errors.ProgramFailed, match="Failed to flush"),
        qemu_nbd.serve_graph({"driver": "qcow2", "file": broken}, socket=socket, writable=True) as address,
        NbdEndpoint(address, writable=True) as endpoint,
    ):
        fill(endpoint, 0, b"x")


def test_an_error_in_the_block_comes_before_errors_of_closing(tmp_path: Path, socket: Path) -> None:
    qemu_img.create(tmp_path / "disk", MiB)
    with pytest.raises(LookupError), qemu_nbd.serve(tmp_path / "disk", "qcow2", socket=socket):
        raise LookupError
    assert not socket.exists()


def test_many_clients_may_come_and_go(tmp_path: Path, socket: Path) -> None:
    qemu_img.create(tmp_path / "disk", MiB)
    with qemu_nbd.serve(tmp_path / "disk", "qcow2", socket=socket) as address:
        for _ in range(20):
            with NbdEndpoint(address) as endpoint:
                channels = [endpoint.channel() for _ in range(endpoint.channels)]
                assert len(channels) == 4
        assert list(endpoint_map(address)) == [True]
    assert os.listdir(socket.parent) == []


def endpoint_map(address: NbdAddress) -> Iterator[bool]:
    with NbdEndpoint(address) as endpoint:
        yield from (mapped.zero for mapped in endpoint.extents(Extent(0, MiB)))
