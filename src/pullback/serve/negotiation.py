"""What an NBD client and we agree upon before it reads: the disk, and how answers look.

Source: "The NBD protocol" (doc/proto.md), "Fixed newstyle negotiation". There is no TLS here: a client
that wants it is told that it is not supported.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from pullback.serve import protocol
from pullback.serve.disk import Disk
from pullback.serve.export import Export
from pullback.serve.protocol import Option, Reply

#: Options of one client: it has no reason for more.
_MOST_OPTIONS = 256
_CONTEXTS = (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """How the rest of the connection goes."""

    export: Export
    #: Are answers structured replies?
    structured: bool
    #: May it ask for block status?
    contexts: bool


def negotiate(client: socket.socket, exports: Mapping[str, Export]) -> Agreed | None:
    """Come to an agreement; None: the client ended well before.

    Raises `EOFError` and `OSError` if it goes away, `ValueError` if it does not speak the protocol.
    """
    client.sendall(protocol.GREETING)
    (flags,) = struct.unpack(">I", receive(client, 4))
    if flags & ~(protocol.FIXED_NEWSTYLE | protocol.NO_ZEROES):
        raise ValueError("unknown flags")
    state = _Negotiation(client, exports, padding=not flags & protocol.NO_ZEROES)
    for _ in range(_MOST_OPTIONS):
        magic, option, length = protocol.OPTION.unpack(receive(client, protocol.OPTION.size))
        if magic != protocol.OPTION_MAGIC or length > protocol.MAX_OPTION:
            raise ValueError("no option")
        data = receive(client, length)
        if option == Option.ABORT:
            client.sendall(protocol.option_reply(option, Reply.ACK))
            return None
        if (agreed := state.option(option, data)) is not None:
            return agreed
    raise ValueError("too many options")


def receive(client: socket.socket, length: int) -> bytes:
    """So many bytes. Raises `EOFError`."""
    content = bytearray(length)
    view = memoryview(content)
    at = 0
    while at < length:
        got = client.recv_into(view[at:])
        if not got:
            raise EOFError
        at += got
    return bytes(content)


class _Negotiation:
    """What was agreed upon until now."""

    def __init__(self, client: socket.socket, exports: Mapping[str, Export], *, padding: bool) -> None:
        self._client = client
        self._exports = exports
        self._padding = padding
        self._structured = False
        #: The export whose block status may be asked for.
        self._context_of: str | None = None

    def option(self, option: int, data: bytes) -> Agreed | None:
        """Answer an option; gives the agreement if it was the last."""
        if option == Option.EXPORT_NAME:
            return self._old(data)
        try:
            return self._new(option, data)
        except ValueError:  # also for what is no text
            self._client.sendall(protocol.option_reply(option, Reply.INVALID))
            return None

    def _new(self, option: int, data: bytes) -> Agreed | None:
        if option in (Option.INFO, Option.GO):
            return self._go(option, protocol.info_request(data))
        if option == Option.LIST and not data:
            names = b"".join(protocol.listed(option, name) for name in self._exports)
            self._client.sendall(names + protocol.option_reply(option, Reply.ACK))
        elif option == Option.STRUCTURED_REPLY and not data:
            self._structured = True
            self._client.sendall(protocol.option_reply(option, Reply.ACK))
        elif option in _CONTEXTS:
            self._context(option, data)
        elif option in (Option.LIST, Option.STRUCTURED_REPLY):
            raise ValueError("data where there is none")
        else:
            self._client.sendall(protocol.option_reply(option, Reply.UNSUPPORTED))
        return None

    def _find(self, name: str) -> tuple[str, Export] | None:
        """The disk of that name; the first one for a client that names none."""
        if not name:
            return next(iter(self._exports.items()))
        return (name, self._exports[name]) if name in self._exports else None

    def _go(self, option: int, name: str) -> Agreed | None:
        found = self._find(name)
        if found is None:
            self._client.sendall(protocol.option_reply(option, Reply.UNKNOWN, b"no such disk"))
            return None
        size, flags = found[1].size, self._flags(found[1])
        self._client.sendall(protocol.infos(option, size, flags) + protocol.option_reply(option, Reply.ACK))
        return self._agreed(*found) if option == Option.GO else None

    def _old(self, data: bytes) -> Agreed:
        """The way of old clients, which know no errors here."""
        found = self._find(data.decode())
        if found is None:
            raise EOFError
        self._client.sendall(protocol.export(found[1].size, self._flags(found[1]), padding=self._padding))
        return self._agreed(*found)

    def _flags(self, export: Export) -> int:
        return protocol.export_flags(structured=self._structured, writable=not isinstance(export, Disk))

    def _agreed(self, name: str, export: Export) -> Agreed:
        return Agreed(export=export, structured=self._structured, contexts=self._context_of == name)

    def _context(self, option: int, data: bytes) -> None:
        name, queries = protocol.context_request(data)
        setting = option == Option.SET_META_CONTEXT
        if setting:
            self._context_of = None
            if not self._structured:
                raise ValueError("structured replies first")
        found = self._find(name)
        if found is None:
            self._client.sendall(protocol.option_reply(option, Reply.UNKNOWN, b"no such disk"))
            return
        wanted = protocol.ALLOCATION in queries or (not setting and (not queries or "base:" in queries))
        if wanted and setting:
            self._context_of = found[0]
        answers = protocol.context(option) if wanted else b""
        self._client.sendall(answers + protocol.option_reply(option, Reply.ACK))
