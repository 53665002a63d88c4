"""An NBD server: many clients, many requests of each at once.

    accept ──► a thread for each connection:  negotiate ─► read requests ─► what is in the cache: answer
                                                                         └─ what is not: have it loaded, go on
               a second one for each:         answer what was loaded since, in the order in which it came

Disks that clients may write to are handled one request after another: they are passed on (`export.Writer`).

It is ours because the servers that there are would not do. nbdkit 1.32 (Debian 12) aborts when a client dies that
has more than one request under way (connections.c:402, "sock >= 0"; tried with its own plugins too), and all
other clients lose their server. QEMU's (tried with 7.2) drops a client at the first block that cannot be read,
instead of an I/O error for just that range, unless the client forbids structured replies. There is no TLS here:
`programs.tls_front`.

What a client sends is bounded: options, requests under way, and the time that it may take to negotiate.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pullback import errors
from pullback.extents import Extent, Mapped
from pullback.serve import negotiation, protocol
from pullback.serve.disk import Answer, Disk
from pullback.serve.export import Export, Writer
from pullback.serve.protocol import Command, Error, Flag, Request
from pullback.units import KiB, MiB

#: Connections at a time, if the user does not say how many.
MAX_CONNECTIONS = 128
#: Seconds that a client may take to negotiate.
_NEGOTIATION_SECONDS = 30.0
#: Requests of one connection that are worked on at a time, and their bytes.
_UNDER_WAY, _UNDER_WAY_BYTES = 64, 32 * MiB
#: Extents of one answer to a question about block status.
_MAX_EXTENTS = 8 * KiB
#: Pieces of an answer that are given to the kernel at once (IOV_MAX is 1024).
_MOST_PARTS = 512
#: Bytes that the kernel may hold of answers to one client.
_SEND_BUFFER = MiB
_BAD = "the client does not speak the protocol"


class Server:
    """Serves on a listening socket until the process ends."""

    def __init__(self, listener: socket.socket, exports: Mapping[str, Export], *, most: int | None = None) -> None:
        self._listener = listener
        self._exports = exports
        self._room = threading.BoundedSemaphore(most or MAX_CONNECTIONS)

    def run(self) -> None:
        """Accept clients, for ever."""
        self._listener.setblocking(True)
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # it went away before we came to it, or there are too many files
                threading.Event().wait(0.05)
                continue
            if not self._room.acquire(blocking=False):
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), name="client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            # What a client does wrong, or its end, is the end of its connection and nothing else.
            with client, contextlib.suppress(OSError, EOFError, ValueError, errors.PullbackError):
                _configure(client)
                client.settimeout(_NEGOTIATION_SECONDS)
                agreed = negotiation.negotiate(client, self._exports)
                client.settimeout(None)
                if agreed is not None:
                    _serve(client, agreed)
        finally:
            self._room.release()


def _configure(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    if client.family != socket.AF_UNIX:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _serve(client: socket.socket, agreed: negotiation.Agreed) -> None:
    wire = _Wire(client, structured=agreed.structured)
    if isinstance(agreed.export, Disk):
        _Reader(wire, agreed.export, contexts=agreed.contexts).run()
        return
    with agreed.export.connect() as writer:
        _Passing(wire, writer, agreed.export.size, contexts=agreed.contexts).run()


class _Wire:
    """What goes to and from a client that has chosen its disk. Any thread may answer."""

    def __init__(self, client: socket.socket, *, structured: bool) -> None:
        self.client = client
        self._structured = structured
        #: Held by whoever sends.
        self._sending = threading.Lock()
        self.broken = False

    def data(self, request: Request, parts: Iterable[memoryview]) -> bool:
        """Answer with what was read. All answers give False if the client is gone."""
        head = (
            protocol.data_head(request.cookie, request.offset, request.length)
            if self._structured
            else protocol.simple(request.cookie)
        )
        return self._send([memoryview(head), *parts])

    def done(self, request: Request) -> bool:
        """Answer that it is done."""
        answer = protocol.done(request.cookie) if self._structured else protocol.simple(request.cookie)
        return self._send([memoryview(answer)])

    def fail(self, request: Request, error: Error, message: str) -> bool:
        """Answer with an error."""
        if self._structured:
            return self._send([memoryview(protocol.failed(request.cookie, error, message))])
        return self._send([memoryview(protocol.simple(request.cookie, error))])

    def status(self, request: Request, parts: Iterable[Mapped]) -> bool:
        """Answer with block status."""
        most = 1 if request.flags & Flag.REQUEST_ONE else _MAX_EXTENTS
        found = []
        for part in parts:
            found.append((part.length, protocol.HOLE_AND_ZERO if part.zero else 0))
            if len(found) == most:
                break
        return self._send([memoryview(protocol.status(request.cookie, found))])

    def _send(self, parts: list[memoryview]) -> bool:
        with self._sending:
            if self.broken:
                return False
            try:
                self._send_all(parts)
            except OSError:
                self.broken = True
                with contextlib.suppress(OSError):
                    self.client.shutdown(socket.SHUT_RDWR)  # so that the first thread hears of it
                return False
        return True

    def _send_all(self, parts: list[memoryview]) -> None:
        while parts:
            sent = self.client.sendmsg(parts[:_MOST_PARTS])
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = parts[0][sent:]


def _problem(request: Request, size: int) -> tuple[Error, str] | None:
    """What is wrong with the range of a request."""
    if request.length == 0 or request.offset + request.length > size:
        return Error.INVALID, "it is not inside the disk"
    if request.command in (Command.READ, Command.WRITE) and request.length > protocol.MAX_REQUEST:
        return Error.OVERFLOW, "it is too long"
    return None


# -- disks that are only read ----------------------------------------------------------------


@dataclass(slots=True)
class _Reading:
    """A read that is under way."""

    request: Request
    #: What to send, when it is there.
    answer: Answer | None = None


class _Reader:
    """A client of a disk that is only read."""

    def __init__(self, wire: _Wire, disk: Disk, *, contexts: bool) -> None:
        self._wire = wire
        self._disk = disk
        self._contexts = contexts
        #: Reads that are to be answered by the second thread; None: the end.
        self._loaded: queue.SimpleQueue[_Reading | None] = queue.SimpleQueue()
        self._changed = threading.Condition(threading.Lock())
        self._under_way = 0
        self._bytes = 0

    def run(self) -> None:
        """Answer requests until the client goes, or does something wrong."""
        second = threading.Thread(target=self._answer_loaded, name="answers", daemon=True)
        second.start()
        try:
            for request in _requests(self._wire.client):
                if request.command == Command.DISCONNECT or not self._handle(request):
                    break
        finally:
            self._finish()
            self._loaded.put(None)
            second.join()

    def _handle(self, request: Request) -> bool:
        """Answer a request, or have it answered; False: the connection is of no use any more."""
        if request.command == Command.WRITE:
            _receive(self._wire.client, request.length)
        if request.command not in (Command.READ, Command.BLOCK_STATUS):
            return self._wire.fail(request, Error.NOT_PERMITTED, "it is read-only")
        if (problem := _problem(request, self._disk.size)) is not None:
            return self._wire.fail(request, *problem)
        if request.command == Command.READ:
            return self._read(request)
        if not self._contexts:
            return self._wire.fail(request, Error.INVALID, "no context was agreed upon")
        return self._wire.status(request, self._disk.map(Extent(request.offset, request.length)))

    def _read(self, request: Request) -> bool:
        self._begin(request.length)
        reading = _Reading(request)
        answer = reading.answer = self._disk.ask(request.offset, request.length, lambda: self._loaded.put(reading))
        if answer.is_there():
            return self._answer(reading)
        answer.call_when_there()
        return not self._wire.broken

    def _begin(self, length: int) -> None:
        """Wait until there is room for one more."""
        with self._changed:
            while self._under_way and (self._under_way >= _UNDER_WAY or self._bytes + length > _UNDER_WAY_BYTES):
                self._changed.wait()
            self._under_way += 1
            self._bytes += length

    def _finish(self) -> None:
        """Wait until nothing is under way."""
        with self._changed:
            while self._under_way:
                self._changed.wait()

    def _answer_loaded(self) -> None:
        while (reading := self._loaded.get()) is not None:
            self._answer(reading)

    def _answer(self, reading: _Reading) -> bool:
        """Send what was read, and let go of it."""
        request, answer = reading.request, reading.answer
        assert answer is not None
        try:
            if (error := answer.error) is not None:
                return self._wire.fail(request, Error.IO, str(error))
            return self._wire.data(request, answer.parts())
        finally:
            answer.release()
            with self._changed:
                self._under_way -= 1
                self._bytes -= request.length
                self._changed.notify()


# -- disks that clients may write to ---------------------------------------------------------


class _Passing:
    """A client whose requests are passed on, one after another."""

    def __init__(self, wire: _Wire, writer: Writer, size: int, *, contexts: bool) -> None:
        self._wire = wire
        self._writer = writer
        self._size = size
        self._contexts = contexts

    def run(self) -> None:
        """Answer requests until the client goes, or does something wrong."""
        for request in _requests(self._wire.client):
            if request.command == Command.DISCONNECT:
                return
            content = _receive(self._wire.client, request.length) if request.command == Command.WRITE else bytearray()
            try:
                if not self._handle(request, content):
                    return
            except errors.DestinationFull:
                if not self._wire.fail(request, Error.NO_SPACE, "no space is left"):
                    return
            except errors.PullbackError as error:
                if not self._wire.fail(request, Error.IO, str(error)):
                    return

    def _handle(self, request: Request, content: bytearray) -> bool:
        window = Extent(request.offset, request.length)
        if request.command == Command.FLUSH:
            self._writer.flush()
            return self._wire.done(request)
        if (problem := _problem(request, self._size)) is not None:
            return self._wire.fail(request, *problem)
        if request.command == Command.READ:
            return self._wire.data(request, [memoryview(self._writer.read(*window))])
        if request.command == Command.BLOCK_STATUS:
            if not self._contexts:
                return self._wire.fail(request, Error.INVALID, "no context was agreed upon")
            return self._wire.status(request, self._writer.map(window))
        return self._change(request, content)

    def _change(self, request: Request, content: bytearray) -> bool:
        offset, length = request.offset, request.length
        if request.command == Command.WRITE:
            self._writer.write(offset, content)
        elif request.command == Command.WRITE_ZEROES:
            self._writer.zero(offset, length, hole=not request.flags & Flag.NO_HOLE)
        elif request.command == Command.TRIM:
            self._writer.trim(offset, length)
        else:
            return self._wire.fail(request, Error.INVALID, "it is no command that is known")
        if request.flags & Flag.FUA:
            self._writer.flush()
        return self._wire.done(request)


# -- what comes from a client ----------------------------------------------------------------


def _requests(client: socket.socket) -> Iterator[Request]:
    """What the client asks, until it closes the connection. Raises `ValueError` for what is no request."""
    buffer = bytearray(protocol.REQUEST.size)
    while _filled(client, buffer):
        request = Request(*protocol.REQUEST.unpack(buffer))
        if request.magic != protocol.REQUEST_MAGIC:
            raise ValueError(_BAD)
        yield request


def _filled(client: socket.socket, buffer: bytearray) -> bool:
    """Fill the buffer; False at the end of the connection."""
    view, at = memoryview(buffer), 0
    while at < len(buffer):
        got = client.recv_into(view[at:])
        if not got:
            return False
        at += got
    return True


def _receive(client: socket.socket, length: int) -> bytearray:
    """The data of a write. Raises `EOFError`, `ValueError` if there is too much."""
    if length > protocol.MAX_REQUEST:
        raise ValueError(_BAD)
    content = bytearray(length)
    if not _filled(client, content):
        raise EOFError
    return content
