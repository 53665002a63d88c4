"""Servers that fail, hang, die or lie, disks that are full, and copies that are told to stop."""

from __future__ import annotations

import signal
import socket as sockets
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pullback import errors
from pullback.endpoint import Endpoint
from pullback.extents import Extent
from pullback.model.exports import NbdAddress
from pullback.programs import process, qemu_nbd
from pullback.progress import Cancel
from pullback.testing.endpoints import MemoryEndpoint, nbdkit, patchy
from pullback.transfer import FileEndpoint, NbdEndpoint, Result, Work, blocks, copy
from pullback.units import KiB, MiB

SIZE = 64 * MiB
#: A disk of 8 MiB with one bad block at 3 MiB. nbdkit's eval: $3 is the count, $4 the offset.
BAD_BLOCK = (
    "eval",
    "get_size=echo 8388608",
    'pread=if [ $4 -eq 3145728 ]; then echo "EIO bad sector" >&2; exit 1; fi; head -c $3 /dev/zero',
)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("copy-")] == []


@contextmanager
def serving(directory: Path, *words: str, **options: object) -> Iterator[tuple[NbdEndpoint, process.Child]]:
    with ExitStack() as stack:
        address, child = stack.enter_context(nbdkit(directory / "nbd", *words))
        yield stack.enter_context(NbdEndpoint(address, **options)), child  # type: ignore[arg-type]


def copy_all(source: Endpoint, *, destination: Endpoint | None = None, observe: Callable[..., None]) -> Result:
    return copy(source, destination, blocks([Extent(0, source.size)]), observe=observe)


def stop(child: process.Child) -> None:
    """Stop it, and wait until all its threads stand still: SIGSTOP does not act at once."""
    child.kill(signal.SIGSTOP)
    tasks = [task / "stat" for task in Path(f"/proc/{child.pid}/task").iterdir()]
    deadline = time.monotonic() + 5
    while any(task.read_text().rsplit(")", 1)[1].split()[0] != "T" for task in tasks):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def nothing(*_: object) -> None:
    pass


class At:
    """Calls `act` once, at the n-th block that is read."""

    def __init__(self, block: int, act: Callable[[], None]) -> None:
        self._left = block
        self._act = act
        self._lock = threading.Lock()

    def __call__(self, *_: object) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._act()


def test_a_read_error_is_told_with_its_offset_and_errno(tmp_path: Path) -> None:
    with serving(tmp_path, *BAD_BLOCK) as (source, _), pytest.raises(errors.EndpointFailed) as caught:
        copy_all(source, observe=nothing)
    assert (caught.value.operation, caught.value.offset, caught.value.errno) == ("read", 3 * MiB, 5)
    assert caught.value.reason == "Input/output error"


def test_after_a_read_error_the_connection_reads_on(tmp_path: Path) -> None:
    with serving(tmp_path, *BAD_BLOCK) as (source, _), source.channel() as channel:
        with pytest.raises(errors.EndpointFailed):
            channel.read_into(3 * MiB, bytearray(512), 512)
        buffer = bytearray(b"x" * 512)
        channel.read_into(4 * MiB, buffer, 512)
        assert buffer == bytes(512)


def test_a_server_that_is_killed_is_said_to_have_gone_away(tmp_path: Path) -> None:
    words = ("--filter=delay", "memory", f"size={SIZE}", "delay-read=5ms")
    with serving(tmp_path, *words) as (source, child), pytest.raises(errors.EndpointFailed) as caught:
        copy_all(source, observe=At(9, child.kill))
    assert caught.value.errno == 107
    assert "went away" in caught.value.reason


def test_a_stopped_server_costs_no_more_than_the_timeout(tmp_path: Path) -> None:
    with serving(tmp_path, "memory", f"size={SIZE}", timeout=0.6) as (source, child):
        began = time.monotonic()
        with pytest.raises(errors.EndpointTimeout, match="read"):
            copy_all(source, observe=At(9, lambda: stop(child)))
        assert 0.5 < time.monotonic() - began < 5
        child.kill(signal.SIGCONT)


def test_a_stopped_destination_costs_no_more_than_the_timeout(tmp_path: Path) -> None:
    with serving(tmp_path, "memory", f"size={SIZE}", timeout=0.6, writable=True) as (destination, child):
        source = MemoryEndpoint(b"x" * SIZE)
        with pytest.raises(errors.EndpointTimeout, match="write"):
            copy_all(source, destination=destination, observe=At(9, lambda: stop(child)))
        child.kill(signal.SIGCONT)


def times_out(act: Callable[[], None]) -> bool:
    """Keeps no traceback, whose frames would hold the buffer."""
    try:
        act()
    except errors.EndpointTimeout:
        return True
    return False


def test_after_a_timeout_the_buffer_is_ours_alone_and_the_connection_closed(tmp_path: Path) -> None:
    with serving(tmp_path, "memory", "size=1M", timeout=0.2) as (source, child), source.channel() as channel:
        stop(child)
        buffer = bytearray(b"x" * MiB)
        assert times_out(lambda: channel.read_into(0, buffer, MiB))
        child.kill(signal.SIGCONT)
        time.sleep(0.1)
        assert buffer == b"x" * MiB
        buffer.extend(b"y")  # BufferError if libnbd still held it
        with pytest.raises(errors.EndpointFailed, match="closed"):
            channel.read_into(0, buffer, 512)


def test_connecting_to_a_stopped_server_has_a_deadline(tmp_path: Path) -> None:
    with nbdkit(tmp_path / "nbd", "memory", "size=1M") as (address, child):
        stop(child)
        with pytest.raises(errors.EndpointTimeout, match="connecting"):
            NbdEndpoint(address, timeout=0.3)
        child.kill(signal.SIGCONT)


def test_asking_a_stopped_server_has_a_deadline(tmp_path: Path) -> None:
    with serving(tmp_path, "memory", "size=1M", timeout=0.3) as (source, child):
        stop(child)
        with pytest.raises(errors.EndpointTimeout, match="block status"):
            list(source.extents(Extent(0, MiB)))
        child.kill(signal.SIGCONT)


def test_closing_against_a_stopped_server_ends(tmp_path: Path) -> None:
    with nbdkit(tmp_path / "nbd", "memory", "size=1M") as (address, child):
        endpoint = NbdEndpoint(address)
        stop(child)
        began = time.monotonic()
        endpoint.close()
        assert time.monotonic() - began < 3
        child.kill(signal.SIGCONT)


def test_cancelling_does_not_wait_for_a_server_that_hangs(tmp_path: Path) -> None:
    cancel = Cancel()
    with serving(tmp_path, "memory", f"size={SIZE}", cancel=cancel) as (source, child):
        stop(child)
        threading.Timer(0.2, lambda: cancel.cancel(errors.Terminated())).start()
        began = time.monotonic()
        with pytest.raises(errors.Terminated):
            copy(source, None, blocks([Extent(0, MiB)]), cancel=cancel)
        assert time.monotonic() - began < 5
        child.kill(signal.SIGCONT)


def test_a_full_destination_is_called_full_by_its_name(tmp_path: Path) -> None:
    words = ("full", "size=8M")
    with serving(tmp_path, *words, writable=True, name="/backups/vda") as (destination, _):
        with pytest.raises(errors.DestinationFull) as caught:
            copy_all(MemoryEndpoint(patchy(8 * MiB)), destination=destination, observe=nothing)
        assert caught.value.path == "/backups/vda"


def test_a_failed_flush_fails_the_copy(tmp_path: Path) -> None:
    words = ("eval", "get_size=echo 1048576", "pread=exit 1", "pwrite=cat >/dev/null", "can_write=exit 0")
    flush = ("can_flush=exit 0", 'flush=echo "EIO lost writes" >&2; exit 1')
    with serving(tmp_path, *words, *flush, writable=True) as (destination, _):
        with pytest.raises(errors.EndpointFailed, match="flush") as caught:
            copy_all(MemoryEndpoint(b"x" * MiB), destination=destination, observe=nothing)
        assert caught.value.errno == 5


FULL_DISK = """
    import subprocess, sys
    from pathlib import Path
    from pullback import errors
    from pullback.extents import Extent
    from pullback.programs import qemu_img, qemu_nbd
    from pullback.testing.endpoints import MemoryEndpoint
    from pullback.transfer import FileEndpoint, NbdEndpoint, blocks, copy

    here = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", here], check=True)
    source = MemoryEndpoint(b"x" * 8 * 1024**2)
    work = lambda: blocks([Extent(0, source.size)])
    try:
        with FileEndpoint(here / "raw", create=source.size) as destination:
            copy(source, destination, work())
    except errors.DestinationFull as error:
        print("file:", error)
    (here / "raw").unlink()
    qemu_img.create(here / "qcow2", source.size)
    try:
        with (
            qemu_nbd.serve(here / "qcow2", "qcow2", socket=here / "s" / "nbd", writable=True) as address,
            NbdEndpoint(address, writable=True, name="the image") as destination,
        ):
            copy(source, destination, work())
    except errors.DestinationFull as error:
        print("nbd:", error)
"""


def test_a_full_file_system_is_told_through_files_and_through_qemu_nbd(tmp_path: Path) -> None:
    """In a mount namespace of its own, so that no privilege is needed and nothing stays mounted."""
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", sys.executable, "-c", textwrap.dedent(FULL_DISK), tmp_path],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        check=False,
    )
    assert done.stdout.splitlines() == [
        f"file: There is no room left for {tmp_path}/raw.",
        "nbd: There is no room left for the image.",
    ], done.stderr


def test_a_file_that_is_cut_short_meanwhile_is_no_hole(tmp_path: Path) -> None:
    image = tmp_path / "raw"
    image.write_bytes(patchy(4 * MiB))
    with FileEndpoint(image) as source:
        with image.open("r+b") as file:
            file.truncate(MiB)
        with pytest.raises(errors.EndpointFailed, match="cut short"):
            list(source.extents(Extent(0, source.size)))
        with pytest.raises(errors.EndpointFailed, match="ends here"):
            copy_all(source, observe=nothing)


def test_creating_a_file_where_one_is_refuses(tmp_path: Path) -> None:
    (tmp_path / "raw").touch()
    with pytest.raises(errors.DestinationExists):
        FileEndpoint(tmp_path / "raw", create=MiB)


@pytest.mark.parametrize("name", ["missing/raw", "."])
def test_a_file_that_cannot_be_opened_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.EndpointFailed, match="open failed"):
        FileEndpoint(tmp_path / name, writable=True)


@contextmanager
def talking(path: Path, *said: bytes) -> Iterator[NbdAddress]:
    """A server that says these words to each client, and nothing more."""
    with sockets.socket(sockets.AF_UNIX) as listener, ExitStack() as clients:
        listener.bind(str(path))
        listener.listen()

        def talk() -> None:
            try:
                while True:
                    client = clients.enter_context(listener.accept()[0])
                    for words in said:
                        client.sendall(words)
                    if not said or said[-1] == b"":
                        client.close()
            except OSError:
                return

        thread = threading.Thread(target=talk)
        thread.start()
        yield NbdAddress(socket=path)
        listener.shutdown(sockets.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize("said", [[b"SSH-2.0-OpenSSH\r\n" * 30], [b"\0" * 4096], [b"NBDMAGIC", b""], []])
def test_who_does_not_speak_nbd_is_an_error(tmp_path: Path, said: Sequence[bytes]) -> None:
    with talking(tmp_path / "s", *said) as address, pytest.raises(errors.EndpointFailed, match="connecting"):
        NbdEndpoint(address, timeout=5)


def test_who_greets_and_then_says_nothing_is_timed_out(tmp_path: Path) -> None:
    with (
        talking(tmp_path / "s", b"NBDMAGICIHAVEOPT\0\3") as address,
        pytest.raises(errors.EndpointTimeout),
    ):
        NbdEndpoint(address, timeout=0.3)


def test_an_unaligned_end_survives_the_way_through_qemu(tmp_path: Path) -> None:
    """QEMU rounds a raw file's size up to 512; what lies behind the file's end reads as zeroes."""
    content = patchy(3 * MiB + 777)
    (tmp_path / "raw").write_bytes(content)
    with (
        qemu_nbd.serve(tmp_path / "raw", "raw", socket=tmp_path / "s" / "nbd") as address,
        NbdEndpoint(address) as source,
    ):
        destination = MemoryEndpoint(b"\xff" * source.size)
        copy_all(source, destination=destination, observe=nothing)
    assert source.size == 3 * MiB + 1024
    assert destination.content == content + bytes(1024 - 777)


def test_errors_leave_the_work_unpulled(tmp_path: Path) -> None:
    pulled: list[int] = []

    def work() -> Iterator[Work]:
        for piece in blocks([Extent(0, 8 * MiB)], 64 * KiB):
            pulled.append(piece.read.start)
            yield piece

    with serving(tmp_path, *BAD_BLOCK) as (source, _), pytest.raises(errors.EndpointFailed):
        copy(source, None, work())
    assert len(pulled) < 8 * 16
