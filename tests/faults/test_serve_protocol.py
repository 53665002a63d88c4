"""Our NBD server and clients that are old, wrong or hostile: each gets what it must, and hurts nobody else."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

import memorysource
from pullback.units import KiB, MiB
from serverkit import until

CHUNK = 64 * KiB
CONTENT = random.Random(1).randbytes(5 * CHUNK) + bytes(CHUNK) + random.Random(2).randbytes(CHUNK + 512)
_OPTION_REPLY = 0x3E889045565A9


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a server with one disk, whose last but one block is bad."""
    place = tmp_path_factory.mktemp("p") / "s"
    with memorysource.disk(memorysource.Memory(CONTENT, CHUNK, bad=[6])) as disk:
        memorysource.serve({"vda": disk}, place, most=20)
        yield place


class Client:
    """Bytes on the wire."""

    def __init__(self, path: Path, flags: int = 3) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        assert self.take(18) == b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
        self.socket.sendall(struct.pack(">I", flags))

    def take(self, length: int) -> bytes:
        """So many bytes; fewer if the server closes the connection."""
        got = b""
        while len(got) < length and (more := self.socket.recv(length - len(got))):
            got += more
        return got

    def option(self, option: int, data: bytes = b"", magic: bytes = b"IHAVEOPT") -> None:
        """Send an option."""
        self.socket.sendall(struct.pack(">8sII", magic, option, len(data)) + data)

    def reply(self) -> tuple[int, bytes]:
        """The kind of an answer to an option, and its data."""
        magic, _, kind, length = struct.unpack(">QIII", self.take(20))
        assert magic == _OPTION_REPLY
        return kind, self.take(length)

    def ask(self, command: int, offset: int, length: int, data: bytes = b"", flags: int = 0, cookie: int = 7) -> None:
        """Send a request."""
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + data)

    def simple(self) -> int:
        """The error of a simple reply."""
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        assert (magic, cookie) == (0x67446698, 7)
        return int(error)

    def closed(self) -> bool:
        """Did the server close the connection?"""
        try:
            return self.take(1) == b""
        except ConnectionResetError:
            return True

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def info(name: bytes) -> bytes:
    """The data of INFO or GO."""
    return struct.pack(">I", len(name)) + name + struct.pack(">H", 0)


def old(path: Path, flags: int = 3) -> Client:
    """An old client that has chosen the disk, without structured replies."""
    client = Client(path, flags)
    client.option(1, b"vda")
    size, transmission = struct.unpack(">QH", client.take(10))
    assert size == len(CONTENT)
    assert transmission & 3 == 3  # read-only
    return client


def sound(path: Path) -> None:
    """The server still serves."""
    handle = nbd.NBD()
    handle.set_export_name("vda")
    handle.connect_unix(str(path))
    assert handle.pread(KiB, 100) == CONTENT[100 : 100 + KiB]
    handle.shutdown()


# -- negotiation -----------------------------------------------------------------------------


def test_an_old_client_gets_padding_and_simple_replies(path: Path) -> None:
    with old(path, flags=1) as client:
        assert client.take(124) == bytes(124)
        client.ask(0, 5 * CHUNK - 100, CHUNK + 100)
        assert client.simple() == 0
        assert client.take(CHUNK + 100) == CONTENT[5 * CHUNK - 100 : 6 * CHUNK]
        client.ask(2, 0, 0)
        assert client.closed()


def test_a_client_that_names_no_export_gets_the_first(path: Path) -> None:
    with Client(path) as client:
        client.option(7, info(b""))
        assert [client.reply()[0] for _ in range(3)] == [3, 3, 1]


def test_answers_to_options(path: Path) -> None:
    with Client(path) as client:
        client.option(3)
        assert client.reply() == (2, struct.pack(">I", 3) + b"vda")
        assert client.reply() == (1, b"")
        for option, data, kind in (
            (5, b"", 1),  # TLS
            (99, b"x" * 1000, 1),
            (3, b"x", 3),
            (8, b"x", 3),
            (6, b"", 3),
            (6, info(b"vda") + b"x", 3),
            (6, info(b"\xff"), 3),
            (6, struct.pack(">I", 1 << 31) + b"vda", 3),
            (7, info(b"vdb"), 6),
            (10, struct.pack(">I", 3) + b"vda" + struct.pack(">I", 0), 3),  # structured replies first
            (9, b"\0\0", 3),
            (9, struct.pack(">I", 3) + b"vdb" + struct.pack(">I", 0), 6),
            (9, struct.pack(">I", 3) + b"vda" + struct.pack(">I", 1 << 30), 3),
        ):
            client.option(option, data)
            assert client.reply()[0] == (1 << 31) + kind, (option, data)
        client.option(2)
        assert client.reply() == (1, b"")
        assert client.closed()


@pytest.mark.parametrize("sent", ["flags", "magic", "long", "unknown name", "many", "nothing"])
def test_who_does_not_speak_the_protocol_is_left(path: Path, sent: str) -> None:
    with Client(path, flags=0xFFFF if sent == "flags" else 3) as client:
        if sent == "magic":
            client.option(3, magic=b"XHAVEOPT")
        elif sent == "long":
            client.socket.sendall(struct.pack(">8sII", b"IHAVEOPT", 6, 1 << 31))
        elif sent == "unknown name":
            client.option(1, b"vdb")
        elif sent == "many":
            for _ in range(256):
                client.option(99)
                client.reply()
        elif sent == "nothing":
            client.socket.shutdown(socket.SHUT_WR)
        assert client.closed()
    sound(path)


# -- requests --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "offset", "length", "error"),
    [
        (0, len(CONTENT), 1, 22),
        (0, 1 << 63, 1 << 20, 22),
        (0, 0, 0, 22),
        (0, 0, 33 * MiB, 22),
        (1, 0, 512, 1),
        (3, 0, 0, 1),
        (4, 0, 512, 1),
        (6, 0, 512, 1),
        (7, 0, 512, 22),  # no context was agreed upon
        (99, 0, 512, 1),
        (0, 6 * CHUNK, 1, 5),
        (0, 5 * CHUNK, CHUNK + 1, 5),
    ],
)
def test_what_cannot_be_is_an_error_and_the_connection_goes_on(
    path: Path, command: int, offset: int, length: int, error: int
) -> None:
    with old(path) as client:
        client.ask(command, offset, length, data=b"x" * length if command == 1 else b"")
        assert client.simple() == error
        client.ask(0, 10, 20)
        assert client.simple() == 0
        assert client.take(20) == CONTENT[10:30]


@pytest.mark.parametrize("sent", [b"x" * 28, struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 1 << 30)])
def test_what_is_no_request_ends_the_connection(path: Path, sent: bytes) -> None:
    with old(path) as client:
        client.socket.sendall(sent)
        assert client.closed()
    sound(path)


def test_many_requests_at_once_are_all_answered(path: Path) -> None:
    handle = nbd.NBD()
    handle.set_export_name("vda")
    handle.connect_unix(str(path))
    chance, under_way = random.Random(3), []
    for _ in range(500):
        offset = chance.randrange(6 * CHUNK - 1)
        length = chance.randrange(1, min(6 * CHUNK - offset, 3 * CHUNK) + 1)
        buffer = nbd.Buffer(length)
        under_way.append((handle.aio_pread(buffer, offset), buffer, offset, length))
    for cookie, buffer, offset, length in under_way:
        while not handle.aio_command_completed(cookie):
            handle.poll(10_000)
        assert buffer.to_bytearray() == CONTENT[offset : offset + length]
    handle.shutdown()


def test_junk_hurts_nobody(path: Path) -> None:
    chance = random.Random(4)
    for number in range(150):
        with Client(path) if number % 2 else old(path) as client:
            junk = bytearray(chance.randbytes(chance.randrange(1, 300)))
            if number % 2 and chance.random() < 0.7:
                junk[:8] = b"IHAVEOPT"
                junk[8:16] = struct.pack(">II", chance.randrange(12), chance.randrange(200))
            elif chance.random() < 0.7:
                junk[:8] = struct.pack(">IHH", 0x25609513, 0, chance.randrange(9))
            try:
                client.socket.sendall(junk)
                client.socket.shutdown(socket.SHUT_WR)
                while client.socket.recv(65536):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                pass
    sound(path)


def test_no_more_clients_than_allowed_and_room_again(path: Path) -> None:
    clients = [old(path) for _ in range(15)]
    extra = [socket.socket(socket.AF_UNIX) for _ in range(10)]
    for one in extra:
        one.settimeout(20)
        one.connect(str(path))
    heard = [_first(one) for one in extra]
    assert heard.count(b"") >= 4
    for one in (*extra, *(client.socket for client in clients)):
        one.close()

    def again() -> bool:
        try:
            sound(path)
        except nbd.Error:
            return False
        return True

    until(again, "room")


def _first(one: socket.socket) -> bytes:
    try:
        return one.recv(1)
    except ConnectionResetError:
        return b""
