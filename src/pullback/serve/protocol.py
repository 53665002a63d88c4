"""The NBD protocol on the server's side: numbers and layouts. Pure.

Source: "The NBD protocol" (doc/proto.md of the reference implementation), sections "Newstyle negotiation",
"Transmission", "Structured reply", "Metadata querying". All numbers are big-endian.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pullback.units import KiB, MiB

#: What the server says first: two magic words, and that it is "fixed newstyle" and needs no padding.
GREETING = struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3)
#: Flags of the client's answer.
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
#: Before an option of the client: magic, option, length of its data.
OPTION = struct.Struct(">8sII")
OPTION_MAGIC = b"IHAVEOPT"
_OPTION_REPLY = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC = 0x3E889045565A9
#: Before the padding that an old client wants after its export was chosen.
_EXPORT = struct.Struct(">QH")
_PADDING = bytes(124)
#: A request: magic, flags, command, cookie, offset, length.
REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC = 0x25609513
_SIMPLE = struct.Struct(">IIQ")
_SIMPLE_MAGIC = 0x67446698
_CHUNK = struct.Struct(">IHHQI")
_CHUNK_MAGIC = 0x668E33EF
_DONE = 1
_OFFSET = struct.Struct(">Q")
_NUMBER = struct.Struct(">I")
_EXTENT = struct.Struct(">II")
#: Bytes of an option's data that are taken: an export's name has at most 4096 (and there are queries).
MAX_OPTION = 64 * KiB
#: Bytes of one read at most, as clients are told.
MAX_REQUEST = 32 * MiB
_BLOCK_SIZES = (1, 64 * KiB, MAX_REQUEST)
#: The only metadata context, and the number that it has.
ALLOCATION = "base:allocation"
ALLOCATION_ID = 1
HOLE_AND_ZERO = 3


class Option(enum.IntEnum):
    """What a client can ask for before it reads."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(enum.IntEnum):
    """Kinds of answers to options."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    UNSUPPORTED = (1 << 31) + 1
    INVALID = (1 << 31) + 3
    UNKNOWN = (1 << 31) + 6
    TOO_BIG = (1 << 31) + 9


class Command(enum.IntEnum):
    """What a client can ask for after that."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class Flag(enum.IntFlag):
    """Flags of requests."""

    #: It is to be durable when it is answered.
    FUA = 1
    NO_HOLE = 2
    REQUEST_ONE = 8


class Error(enum.IntEnum):
    """Numbers of errors on the wire."""

    NOT_PERMITTED = 1
    IO = 5
    INVALID = 22
    NO_SPACE = 28
    OVERFLOW = 75


class _Transmission(enum.IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256


class _Info(enum.IntEnum):
    EXPORT = 0
    BLOCK_SIZE = 3


class _Type(enum.IntEnum):
    """Kinds of chunks of a structured reply."""

    NONE = 0
    OFFSET_DATA = 1
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1


class Request(NamedTuple):
    """A request, as it stands on the wire."""

    magic: int
    flags: int
    command: int
    cookie: int
    offset: int
    length: int


# -- negotiation -----------------------------------------------------------------------------


def option_reply(option: int, kind: Reply, data: bytes = b"") -> bytes:
    """An answer to an option."""
    return _OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(data)) + data


_ANY = _Transmission.HAS_FLAGS | _Transmission.CAN_MULTI_CONN
_WRITABLE = (
    _Transmission.SEND_FLUSH | _Transmission.SEND_FUA | _Transmission.SEND_TRIM | _Transmission.SEND_WRITE_ZEROES
)


def export_flags(*, structured: bool, writable: bool) -> int:
    """What an export can do. What is written and flushed through one connection, all others see."""
    flags = _ANY | (_WRITABLE if writable else _Transmission.READ_ONLY)
    return int(flags | _Transmission.SEND_DF) if structured else int(flags)


def export(size: int, flags: int, *, padding: bool) -> bytes:
    """The answer to EXPORT_NAME, which has no other."""
    return _EXPORT.pack(size, flags) + (_PADDING if padding else b"")


def infos(option: int, size: int, flags: int) -> bytes:
    """The answers to INFO and GO, before the acknowledgement."""
    export_info = struct.pack(">HQH", _Info.EXPORT, size, flags)
    sizes = struct.pack(">HIII", _Info.BLOCK_SIZE, *_BLOCK_SIZES)
    return option_reply(option, Reply.INFO, export_info) + option_reply(option, Reply.INFO, sizes)


def listed(option: int, name: str) -> bytes:
    """One export, as an answer to LIST."""
    encoded = name.encode()
    return option_reply(option, Reply.SERVER, _NUMBER.pack(len(encoded)) + encoded)


def context(option: int) -> bytes:
    """Our metadata context, as an answer to LIST_META_CONTEXT and SET_META_CONTEXT."""
    return option_reply(option, Reply.META_CONTEXT, _NUMBER.pack(ALLOCATION_ID) + ALLOCATION.encode())


class Data:
    """The data of an option, taken from its front. Raises `ValueError` where it is too short, or no text."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, form: str = ">I") -> int:
        """A whole number."""
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(value)

    def text(self) -> str:
        """A text with its length before it."""
        return self._take(self.number()).decode()

    def end(self) -> None:
        """That was all."""
        if self._at != len(self._data):
            raise ValueError("something follows")

    def _take(self, length: int) -> bytes:
        part = self._data[self._at : self._at + length]
        if len(part) != length:
            raise ValueError("too short")
        self._at += length
        return part


def info_request(data: bytes) -> str:
    """The export that INFO or GO is about. Raises `ValueError`."""
    fields = Data(data)
    name = fields.text()
    for _ in range(fields.number(">H")):
        fields.number(">H")  # what the client wants to know: it is told all
    fields.end()
    return name


def context_request(data: bytes) -> tuple[str, list[str]]:
    """The export and the queries of LIST_META_CONTEXT or SET_META_CONTEXT. Raises `ValueError`."""
    fields = Data(data)
    name = fields.text()
    queries = [fields.text() for _ in range(fields.number())]
    fields.end()
    return name, queries


# -- answers to requests ---------------------------------------------------------------------


def simple(cookie: int, error: int = 0) -> bytes:
    """A simple reply; the data that was read follows."""
    return _SIMPLE.pack(_SIMPLE_MAGIC, error, cookie)


def data_head(cookie: int, offset: int, length: int) -> bytes:
    """A structured reply with all that was read, which follows."""
    head = _CHUNK.pack(_CHUNK_MAGIC, _DONE, _Type.OFFSET_DATA, cookie, _OFFSET.size + length)
    return head + _OFFSET.pack(offset)


def done(cookie: int) -> bytes:
    """A structured reply that it is done."""
    return _CHUNK.pack(_CHUNK_MAGIC, _DONE, _Type.NONE, cookie, 0)


def failed(cookie: int, error: int, message: str) -> bytes:
    """A structured reply that nothing can be given."""
    text = message.encode()[:1024]
    body = struct.pack(">IH", error, len(text)) + text
    return _CHUNK.pack(_CHUNK_MAGIC, _DONE, _Type.ERROR, cookie, len(body)) + body


def status(cookie: int, extents: Iterable[tuple[int, int]]) -> bytes:
    """A structured reply with (length, flags) of extents."""
    body: Sequence[bytes] = [_EXTENT.pack(length, flags) for length, flags in extents]
    head = _CHUNK.pack(_CHUNK_MAGIC, _DONE, _Type.BLOCK_STATUS, cookie, _NUMBER.size + _EXTENT.size * len(body))
    return b"".join([head, _NUMBER.pack(ALLOCATION_ID), *body])
