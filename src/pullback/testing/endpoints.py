"""The contract of `pullback.endpoint.Endpoint` as a test suite, and a disk in memory.

Whoever writes an endpoint derives a test class from `EndpointContract` and says how to make one:

    class TestMine(EndpointContract):
        @contextmanager
        def make(self, content):
            with MyEndpoint(content) as endpoint:
                yield endpoint
"""

from __future__ import annotations

import errno
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

from pullback import errors
from pullback.endpoint import Channel, Endpoint
from pullback.extents import Extent, Mapped, split
from pullback.model.exports import NbdAddress
from pullback.programs import process, qemu_nbd
from pullback.units import KiB, MiB

#: Called before each request of a `MemoryEndpoint` with its name, offset and length; may raise or wait.
Before = Callable[[str, int, int], None]


class MemoryEndpoint:
    """A disk in memory: an `Endpoint` without an outside. Threads may share it.

    `before` sees each request (`read`, `write`, `zero`, `trim`, `flush`) and may raise in its place.
    """

    def __init__(
        self, content: bytes, *, name: str = "memory", channels: int = 4, before: Before | None = None
    ) -> None:
        self.content = bytearray(content)
        self._name = name
        self._channels = channels
        self._before = before
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content)

    @property
    def channels(self) -> int:
        """As given."""
        return self._channels

    def extents(self, window: Extent) -> Iterator[Mapped]:
        """What is zero, in units of 4 KiB."""
        for part in split([Extent(window.start, min(window.end, self.size) - window.start)], 4 * KiB):
            yield Mapped(*part, zero=not any(self.content[part.start : part.end]))

    def channel(self) -> MemoryChannel:
        """A new channel."""
        return MemoryChannel(self)

    def request(self, operation: str, offset: int, length: int, act: Callable[[], None]) -> None:
        """One request of a channel; beyond the end it fails as a server's would (EINVAL)."""
        if self._before is not None:
            self._before(operation, offset, length)
        if offset < 0 or offset + length > self.size:
            raise errors.EndpointFailed(
                operation=operation,
                endpoint=self._name,
                offset=offset,
                reason="beyond the end",
                errno=errno.EINVAL,
            )
        with self._lock:
            act()

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> MemoryEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MemoryChannel:
    """A channel of a `MemoryEndpoint`."""

    def __init__(self, endpoint: MemoryEndpoint) -> None:
        self._endpoint = endpoint

    def read_into(self, offset: int, buffer: bytearray, length: int) -> None:
        """Fill `buffer[:length]`."""

        def act() -> None:
            buffer[:length] = self._endpoint.content[offset : offset + length]

        self._endpoint.request("read", offset, length, act)

    def write(self, offset: int, buffer: bytes | bytearray, start: int, length: int) -> None:
        """Take `buffer[start:start + length]`."""
        self._put("write", offset, bytes(buffer[start : start + length]))

    def zero(self, offset: int, length: int) -> None:
        """Fill with zeroes."""
        self._put("zero", offset, bytes(length))

    def trim(self, offset: int, length: int) -> None:
        """Fill with a pattern, so that nobody takes trim for zero."""
        self._put("trim", offset, b"\xdb" * length)

    def _put(self, operation: str, offset: int, data: bytes) -> None:
        def act() -> None:
            self._endpoint.content[offset : offset + len(data)] = data

        self._endpoint.request(operation, offset, len(data), act)

    def flush(self) -> None:
        """Nothing is cached."""
        self._endpoint.request("flush", 0, 0, lambda: None)

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> MemoryChannel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def patchy(size: int, seed: int = 1) -> bytes:
    """`size` bytes with runs of random data and of zeroes between 1 byte and 300 KiB."""
    chance = random.Random(seed)
    content = bytearray()
    while len(content) < size:
        length = chance.choice([1, 511, 4096, 65536, 100_000, 300_000])
        content += chance.randbytes(length) if chance.random() < 0.5 else bytes(length)
    return bytes(content[:size])


def read_all(endpoint: Endpoint) -> bytes:
    """The whole content, read in one channel."""
    content, buffer = bytearray(), bytearray(MiB)
    with endpoint.channel() as channel:
        for part in split([Extent(0, endpoint.size)], MiB):
            channel.read_into(part.start, buffer, part.length)
            content += buffer[: part.length]
    return bytes(content)


@contextmanager
def expecting(kind: type[BaseException]) -> Iterator[None]:
    """The block must raise `kind`."""
    try:
        yield
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


@contextmanager
def nbdkit(socket: Path, *words: str | Path) -> Iterator[tuple[NbdAddress, process.Child]]:
    """The NBD server nbdkit while the block runs: `words` name filters, the plugin and its parameters.

    A second server beside QEMU's, and one that can be told to misbehave (its error, delay,
    noextents, multi-conn, blocksize-policy filters).
    """
    socket.unlink(missing_ok=True)
    with process.Child(["nbdkit", "--foreground", "--unix", socket, *words]) as child:
        child.wait_until(lambda: qemu_nbd.answers(socket), what="answer on its socket", timeout=20)
        yield NbdAddress(socket=socket), child


class EndpointContract(ABC):
    """What every endpoint must do. The tests are run by pytest, in a derived class named `Test…`."""

    #: Bytes: an odd number of KiB, a multiple of `unit`.
    size = 3 * MiB + 5 * KiB + 512
    #: May it be written?
    writable = True

    @abstractmethod
    def make(self, content: bytes) -> AbstractContextManager[Endpoint]:
        """An open endpoint that holds `content`, closed with the block."""

    @contextmanager
    def _open(self) -> Iterator[tuple[Endpoint, bytes]]:
        content = patchy(self.size)
        with self.make(content) as endpoint:
            yield endpoint, content

    @contextmanager
    def _written(self, act: Callable[[Channel], None]) -> Iterator[tuple[bytes, bytearray]]:
        """What the disk holds after `act` and a flush, and what it held before (to be changed as expected)."""
        with self._open() as (endpoint, content):
            with endpoint.channel() as channel:
                act(channel)
                channel.flush()
            yield read_all(endpoint), bytearray(content)

    def test_the_size_is_that_of_the_content(self) -> None:
        with self._open() as (endpoint, content):
            assert endpoint.size == len(content)

    def test_it_has_a_name_and_at_least_one_channel(self) -> None:
        with self._open() as (endpoint, _):
            assert endpoint.name
            assert endpoint.channels >= 1

    def test_everything_reads_back(self) -> None:
        with self._open() as (endpoint, content):
            assert read_all(endpoint) == content

    def test_any_range_reads_back_and_the_rest_of_the_buffer_is_left_alone(self) -> None:
        chance = random.Random(2)
        with self._open() as (endpoint, content), endpoint.channel() as channel:
            for _ in range(30):
                start = chance.randrange(self.size - 1)
                length = chance.randrange(1, min(self.size - start, 300_000) + 1)
                buffer = bytearray(b"x" * (length + 3))
                channel.read_into(start, buffer, length)
                assert buffer == content[start : start + length] + b"xxx"

    def test_reading_beyond_the_end_fails(self) -> None:
        with self._open() as (endpoint, _), endpoint.channel() as channel, expecting(errors.EndpointFailed):
            channel.read_into(self.size - 512, bytearray(1024), 1024)

    def test_a_failed_request_leaves_the_channel_usable(self) -> None:
        with self._open() as (endpoint, content), endpoint.channel() as channel:
            with expecting(errors.EndpointFailed):
                channel.read_into(self.size, bytearray(512), 512)
            buffer = bytearray(512)
            channel.read_into(0, buffer, 512)
            assert buffer == content[:512]

    def test_extents_cover_the_window_in_order_without_gaps(self) -> None:
        with self._open() as (endpoint, _):
            for window in _windows(self.size):
                _check_cover(list(endpoint.extents(window)), window, self.size)

    def test_what_is_said_to_be_zero_reads_as_zeroes(self) -> None:
        with self._open() as (endpoint, content):
            for mapped in endpoint.extents(Extent(0, self.size)):
                assert not mapped.zero or not any(content[mapped.start : mapped.end])

    def test_several_channels_read_in_parallel(self) -> None:
        with self._open() as (endpoint, content), ThreadPoolExecutor(endpoint.channels) as pool:
            found = pool.map(lambda _: read_all(endpoint), range(endpoint.channels))
            assert all(each == content for each in found)

    def test_closing_twice_is_fine(self) -> None:
        with self._open() as (endpoint, _):
            channel = endpoint.channel()
            channel.close()
            channel.close()
            endpoint.close()
            endpoint.close()

    def test_what_is_written_reads_back_and_its_surroundings_stay(self) -> None:
        if not self.writable:
            return
        data = bytearray(random.Random(3).randbytes(200_000))
        with self._written(lambda channel: channel.write(70_001, data, 17, 150_003)) as (after, expected):
            expected[70_001 : 70_001 + 150_003] = data[17 : 17 + 150_003]
            assert after == expected

    def test_zeroed_ranges_read_as_zeroes_and_their_surroundings_stay(self) -> None:
        if not self.writable:
            return
        with self._written(lambda channel: channel.zero(65_001, 1_500_007)) as (after, expected):
            expected[65_001 : 65_001 + 1_500_007] = bytes(1_500_007)
            assert after == expected

    def test_the_last_bytes_can_be_written_and_zeroed(self) -> None:
        if not self.writable:
            return

        def act(channel: Channel) -> None:
            channel.write(self.size - 1024, bytearray(b"e" * 512), 0, 512)
            channel.zero(self.size - 512, 512)

        with self._written(act) as (after, expected):
            expected[-1024:] = b"e" * 512 + bytes(512)
            assert after == expected

    def test_trim_leaves_the_surroundings(self) -> None:
        if not self.writable:
            return
        with self._written(lambda channel: channel.trim(MiB, MiB)) as (after, expected):
            assert after[:MiB] == expected[:MiB]
            assert after[2 * MiB :] == expected[2 * MiB :]

    def test_writing_beyond_the_end_fails(self) -> None:
        if not self.writable:
            return
        with self._open() as (endpoint, content):
            with endpoint.channel() as channel, expecting(errors.EndpointFailed):
                channel.write(self.size - 512, bytearray(1024), 0, 1024)
            assert read_all(endpoint)[:-512] == content[:-512]

    def test_what_one_channel_wrote_another_reads(self) -> None:
        if not self.writable:
            return
        with self._open() as (endpoint, _):
            if endpoint.channels < 2:
                return
            with endpoint.channel() as one, endpoint.channel() as other:
                one.write(4096, bytearray(b"w" * 4096), 0, 4096)
                buffer = bytearray(4096)
                other.read_into(4096, buffer, 4096)
                assert buffer == b"w" * 4096


def _windows(size: int) -> Sequence[Extent]:
    return [
        Extent(0, size),
        Extent(0, 2 * size),
        Extent(65_000, 70_001),
        Extent(size - 700, 700),
        Extent(size, 512),
        Extent(512, 0),
    ]


def _check_cover(found: Sequence[Mapped], window: Extent, size: int) -> None:
    offset = window.start
    for mapped in found:
        assert mapped.start == offset
        assert mapped.length > 0
        offset = mapped.end
    assert offset == max(window.start, min(window.end, size))
