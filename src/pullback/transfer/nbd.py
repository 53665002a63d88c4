"""Disks over NBD: libnbd's binding, with a deadline on every wait. The only importer of `nbd`.

The binding comes from the distribution (python3-libnbd; the oldest we meet is 1.14, Debian 12);
what later releases add is looked for, never assumed. Its synchronous calls wait for ever when a
server stops answering, so each request is started with an `aio_` call and polled to its end:

    aio_pread(memoryview) → cookie                    no copy: the kernel fills the caller's buffer
    poll(250 ms) … aio_command_completed(cookie)      until the deadline

Data is given as a plain memoryview, which is taken since 1.14. Not as `nbd.Buffer`: `from_bytearray`
copies, and with `from_buffer` each request leaks a reference to the memory behind it (python/handle.c,
nbd_internal_py_get_aio_view; measured: 4 MiB lost per copy, and for ever 200 bytes per request).

libnbd holds the buffer until the command is retired or the handle closed, so a connection with an
unfinished command is closed at once: after that nothing writes into the caller's memory any more
(tried against a stopped server, 1.14.2).
"""

from __future__ import annotations

import errno
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

from pullback import errors
from pullback.extents import Extent, Mapped, between, split
from pullback.model.exports import NbdAddress, NbdUri
from pullback.progress import Cancel
from pullback.transfer import status as block_status
from pullback.units import GiB, MiB

#: Seconds for one request; QEMU's own copy timeout for a guest's write is 4 s, a loaded disk needs more.
TIMEOUT_SECONDS = 60.0
#: Seconds for a flush: the server may have gigabytes in its page cache to write.
FLUSH_SECONDS = 900.0
#: Connections of one copy; more did not measure faster against qemu-nbd 7.2 on two cores.
CHANNELS = 4
#: Most bytes of data in one request where the server names no limit (NBD protocol, "Block size constraints").
_SAFE_PAYLOAD = 32 * MiB
#: Most bytes of one zero or trim: the wire allows 4 GiB, but a server that has to write zeroes must
#: be through within the deadline.
_LONGEST_ZERO = 1 * GiB
#: Most bytes that one block-status question covers with extended headers (NBD protocol, experimental
#: "Extended headers"; QEMU 8.2): the wire has 64 bits, but a reply should come within the deadline.
_LONGEST_WIDE_QUESTION = 1024 * GiB
#: How often a wait looks at the deadline, the cancel token and Python's signals.
_SLICE_SECONDS = 0.25
#: How long closing waits for the server to see our farewell.
_FAREWELL_SECONDS = 1.0
_STORING = frozenset({"write", "zero", "flush"})
#: Answers to a fast zero that mean "not fast" (NBD protocol, NBD_CMD_FLAG_FAST_ZERO: ENOTSUP).
_NOT_FAST = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})
_GONE = frozenset({errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.EPIPE})
_ZEROES = bytearray(1 * MiB)


def _binding() -> Any:
    """The module `nbd`; raises `ProgramMissing`. An extension built for another Python counts as missing."""
    try:
        return importlib.import_module("nbd")
    except ImportError as error:
        raise errors.ProgramMissing(program="libnbd's Python binding", package="python3-libnbd") from error


class _Connection:
    """One libnbd handle. Requests are serialised by its lock, so threads may share it."""

    def __init__(
        self,
        address: NbdAddress | NbdUri,
        name: str,
        *,
        contexts: Sequence[str],
        timeout: float,
        cancel: Cancel | None,
    ) -> None:
        self.nbd = _binding()
        self.name = name
        self._timeout = timeout
        self._cancel = cancel
        self._lock = threading.Lock()
        self._handle = self.nbd.NBD()
        try:
            self._configure(contexts)
            self._connect(self._start_of(address))
        except BaseException:
            self._handle = None
            raise

    def _start_of(self, address: NbdAddress | NbdUri) -> Callable[[Any], object]:
        """The call that starts to connect a handle.

        It holds no handle itself: it is in the traceback of whatever ends the connecting, and the socket
        of a handle that lives is open. QEMU waits in its main loop for a client that says nothing.
        """
        handle = self._handle
        if isinstance(address, NbdAddress):
            handle.set_export_name(address.export)
            path = str(address.socket)
            return lambda handle: handle.aio_connect_unix(path)
        if not handle.supports_uri():
            raise errors.Unsupported(
                what="Connecting to a URI", reason="this libnbd knows none", way_out="Use another build of it."
            )
        # Where certificates and keys are, which the user says himself.
        handle.set_uri_allow_local_file(True)
        uri = address.uri
        return lambda handle: handle.aio_connect_uri(uri)

    def _configure(self, contexts: Sequence[str]) -> None:
        for context in contexts:
            self._handle.add_meta_context(context)
        if hasattr(self._handle, "set_pread_initialize"):
            # A failed read fails the copy, so clearing the buffer before each one is wasted.
            self._handle.set_pread_initialize(False)

    def _connect(self, start: Callable[[Any], object]) -> None:
        deadline = time.monotonic() + self._timeout
        try:
            start(self._handle)
            self._wait(lambda: not self._handle.aio_is_connecting(), deadline, "connecting")
            if not self._handle.aio_is_ready():
                raise self._failed("connecting", 0, errno.ENOTCONN, "the server closed the connection")
        except self.nbd.Error as error:
            raise self._translate("connecting", 0, error) from error.with_traceback(None)

    def ask(self, method: str, *arguments: object) -> int:
        """What the server said of itself at connecting: `get_size`, `can_flush`, …; no I/O."""
        return int(getattr(self._open(), method)(*arguments))

    def plain_reads(self) -> int:
        """The flag that makes the server answer a read in one piece (NBD_CMD_FLAG_DF), if it knows it.

        Without it QEMU looks for holes in what it reads (nbd/server.c, nbd_co_send_sparse_read), but
        only if structured replies were negotiated, and then it knows the flag. libnbd takes the flag
        for a plain read only when it is told not to check flags.
        """
        handle = self._open()
        if not handle.can_df():
            return 0
        handle.set_strict_mode(handle.get_strict_mode() & ~self.nbd.STRICT_FLAGS)
        return int(self.nbd.CMD_FLAG_DF)

    def has(self, method: str) -> bool:
        """Does this release of the library have the call?"""
        return hasattr(self._open(), method)

    def request(self, operation: str, offset: int, start: Callable[[Any], int], timeout: float | None = None) -> None:
        """Start one command and wait for its end.

        Raises `EndpointTimeout` (the connection is closed then), `EndpointFailed`, `DestinationFull`.
        """
        seconds = self._timeout if timeout is None else timeout
        with self._lock:
            try:
                cookie = start(self._open())
                self._wait(lambda: self._handle.aio_command_completed(cookie), time.monotonic() + seconds, operation)
            except self.nbd.Error as error:
                raise self._translate(operation, offset, error) from error.with_traceback(None)
            except BaseException:
                self._handle = None  # closes it, and lets go of the caller's buffer
                raise

    def status(self, context: str, offset: int, length: int) -> block_status.Reply:
        """One question of `context`, one reply; with 64-bit lengths where libnbd (1.18 and later) has them."""
        replies: list[list[Any]] = []

        def keep(name: str, start: int, entries: list[Any], error: object) -> int:
            # An exception in here would be printed by the binding and lost: look at it afterwards.
            if name == context and start == offset:
                replies.append(entries)
            return 0

        wide = self.has("aio_block_status_64")
        call = "aio_block_status_64" if wide else "aio_block_status"
        self.request("block status", offset, lambda handle: getattr(handle, call)(length, offset, keep))
        if len(replies) != 1:
            raise errors.BadReply(who=self.name, problem=f"{len(replies)} block status replies for {context}")
        if wide:  # pairs already
            return iter(replies[0])
        flat = iter(replies[0])  # length, flags, length, flags, …: up to a million of them from nbdkit
        return zip(flat, flat, strict=True)

    def together(self, operation: str, starts: Sequence[tuple[int, Callable[[Any], int]]]) -> None:
        """Start several commands, given as (offset, start), and wait for the end of all.

        When one fails the connection is closed, because the others still write into the buffer.
        """
        with self._lock:
            deadline = time.monotonic() + self._timeout
            try:
                cookies = [(offset, start(self._open())) for offset, start in starts]
                for offset, cookie in cookies:
                    self._finish(operation, offset, cookie, deadline)
            except BaseException:
                self._handle = None
                raise

    def _finish(self, operation: str, offset: int, cookie: int, deadline: float) -> None:
        try:
            self._wait(lambda: self._handle.aio_command_completed(cookie), deadline, operation)
        except self.nbd.Error as error:
            raise self._translate(operation, offset, error) from error.with_traceback(None)

    def _wait(self, done: Callable[[], bool], deadline: float, operation: str) -> None:
        began = time.monotonic()
        while not done():
            if self._cancel is not None:
                self._cancel.check()
            left = deadline - time.monotonic()
            if left <= 0:
                raise errors.EndpointTimeout(
                    operation=operation, endpoint=self.name, seconds=round(deadline - began, 1)
                )
            self._handle.poll(int(min(left, _SLICE_SECONDS) * 1000) + 1)

    def _open(self) -> Any:
        if self._handle is None:
            raise self._failed("request", 0, errno.ENOTCONN, "the connection is closed")
        return self._handle

    def _translate(self, operation: str, offset: int, error: Any) -> errors.PullbackError:
        """The error of ours for a failed command; a lost connection is told apart, and closed."""
        if error.errnum == errno.ENOSPC and operation in _STORING:
            return errors.DestinationFull(path=self.name)
        if self._handle.aio_is_dead() or self._handle.aio_is_closed() or error.errnum in _GONE:
            connecting = operation == "connecting"
            self._handle = None
            if not connecting:
                return self._failed(operation, offset, errno.ENOTCONN, f"the server went away ({error.string})")
        return self._failed(operation, offset, error.errnum, _reason(error))

    def _failed(self, operation: str, offset: int, number: int, reason: str) -> errors.EndpointFailed:
        return errors.EndpointFailed(
            operation=operation, endpoint=self.name, offset=offset, reason=reason, errno=number
        )

    def close(self) -> None:
        """Say goodbye if the server listens, within a second; twice is fine."""
        with self._lock:
            handle, self._handle = self._handle, None
            if handle is not None and handle.aio_is_ready():
                with suppress(self.nbd.Error):
                    _farewell(handle)


def _farewell(handle: Any) -> None:
    handle.aio_disconnect()
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while not (handle.aio_is_closed() or handle.aio_is_dead()) and time.monotonic() < deadline:
        handle.poll(50)


def _reason(error: Any) -> str:
    """What the server or the kernel said, without libnbd's own words around it; or the errno in words."""
    text = str(error.string).split(": ", 1)[-1].rsplit("command failed: ", 1)[-1]
    return text or os.strerror(error.errnum or errno.EIO)


class NbdChannel:
    """A connection for data. Requests longer than the server takes are sent in parts."""

    def __init__(
        self,
        connection: _Connection,
        *,
        writable: bool,
        shared: bool,
        request_limit: int | None = None,
        copied: str | None = None,
    ) -> None:
        self._connection = connection
        self._copied = copied
        self._writable = writable
        self._shared = shared
        self._request_limit = request_limit
        self._size = connection.ask("get_size")
        self._payload = _payload(connection)
        self._read_flags = connection.plain_reads() if request_limit is not None else 0
        self._can_zero = bool(connection.ask("can_zero"))
        self._can_zero_fast = bool(connection.ask("can_fast_zero"))
        self._can_trim = bool(connection.ask("can_trim"))
        self._can_flush = bool(connection.ask("can_flush"))

    def read_into(self, offset: int, buffer: bytearray, length: int) -> None:
        """Fill `buffer[:length]` with the bytes from `offset`."""
        with memoryview(buffer) as view:
            if self._request_limit is None:
                self._read_parts(offset, view[:length])
            elif self._copied is None:
                self._read_small(offset, view[:length], self._request_limit)
            else:
                self._read_parts(offset, view[:length])
                self._read_again(offset, view[:length], self._request_limit, self._copied)

    def _read_parts(self, offset: int, view: memoryview) -> None:
        for part in split([Extent(offset, len(view))], self._payload):
            self._read(part.start, view[part.start - offset : part.end - offset])

    def _read(self, offset: int, view: memoryview) -> None:
        flags = self._read_flags
        self._connection.request("read", offset, lambda handle: handle.aio_pread(view, offset, flags=flags))

    def _read_again(self, offset: int, view: memoryview, limit: int, context: str) -> None:
        """What the context has by now may have been answered wrongly; the rest was right (`engine.fleece`)."""
        asked = block_status.walk(
            partial(self._connection.status, context),
            Extent(offset, len(view)),
            size=self._size,
            who=self._connection.name,
        )
        for part in block_status.dirty(asked):
            self._read_small(part.start, view[part.start - offset : part.end - offset], limit)

    def _read_small(self, offset: int, view: memoryview, limit: int) -> None:
        """No request crosses a multiple of `limit` bytes; all are in flight at once, so it costs little."""
        parts = split([Extent(offset, len(view))], limit)
        self._connection.together("read", [self._small(part, view, offset) for part in parts])

    def _small(self, part: Extent, view: memoryview, base: int) -> tuple[int, Callable[[Any], int]]:
        inside = view[part.start - base : part.end - base]
        return part.start, lambda handle: handle.aio_pread(inside, part.start, flags=self._read_flags)

    def write(self, offset: int, buffer: bytes | bytearray, start: int, length: int) -> None:
        """Write `buffer[start:start + length]` at `offset`."""
        self._check_store("write", offset, length)
        with memoryview(buffer) as view:
            for part in split([Extent(offset, length)], self._payload):
                self._write(part.start, view[start + part.start - offset : start + part.end - offset])

    def _write(self, offset: int, view: memoryview) -> None:
        self._connection.request("write", offset, lambda handle: handle.aio_pwrite(view, offset))

    def zero(self, offset: int, length: int, *, hole: bool = True) -> None:
        """Make the range read as zeroes; `hole`: the server may deallocate it.

        A server without NBD_CMD_WRITE_ZEROES gets zeroes written.
        """
        self._check_store("zero", offset, length)
        if not self._can_zero:
            self._write_zeroes(offset, length)
            return
        flags = 0 if hole else self._connection.nbd.CMD_FLAG_NO_HOLE
        for part in split([Extent(offset, length)], _LONGEST_ZERO):
            self._zero(part, flags)

    def _zero(self, part: Extent, flags: int) -> None:
        self._connection.request(
            "zero", part.start, lambda handle: handle.aio_zero(part.length, part.start, flags=flags)
        )

    def zero_quickly(self, offset: int, length: int) -> bool:
        """Make the range read as zeroes if the server promises to be faster than by writing them.

        False where it does not: then nothing of the range was done, or a part of it.
        """
        self._check_store("zero", offset, length)
        if not self._can_zero_fast:
            return False
        try:
            for part in split([Extent(offset, length)], _LONGEST_ZERO):
                self._zero(part, self._connection.nbd.CMD_FLAG_FAST_ZERO)
        except errors.EndpointFailed as error:
            if error.errno in _NOT_FAST:
                return False
            raise
        return True

    def trim(self, offset: int, length: int) -> None:
        """Tell that the range is not needed any more; nothing where the server does not know trim."""
        self._check_store("trim", offset, length)
        if self._can_trim:
            for part in split([Extent(offset, length)], _LONGEST_ZERO):
                self._trim(part)

    def _trim(self, part: Extent) -> None:
        self._connection.request("trim", part.start, lambda handle: handle.aio_trim(part.length, part.start))

    def prefetch(self, offset: int, length: int) -> None:
        """Have the server read the range without sending it (NBD_CMD_CACHE).

        QEMU then keeps in an overlay what it had to read from below (nbd/server.c, do_nbd_cmd_cache). Raises
        `Unsupported` where the server does not know it.
        """
        if not self._connection.ask("can_cache"):
            raise errors.Unsupported(what="Reading ahead", reason=f"{self._connection.name} does not offer it")
        for part in split([Extent(offset, length)], self._payload):
            self._prefetch(part)

    def _prefetch(self, part: Extent) -> None:
        self._connection.request("read", part.start, lambda handle: handle.aio_cache(part.length, part.start))

    def flush(self) -> None:
        """Make durable all writes that were answered, on any channel (multi-conn promises that)."""
        if self._can_flush:
            self._connection.request("flush", 0, lambda handle: handle.aio_flush(), FLUSH_SECONDS)

    def _write_zeroes(self, offset: int, length: int) -> None:
        for part in split([Extent(offset, length)], len(_ZEROES)):
            self.write(part.start, _ZEROES, 0, part.length)

    def _check_store(self, operation: str, offset: int, length: int) -> None:
        """Refuse here what libnbd would send, or would report as ENOSPC although no space is short."""
        if not self._writable:
            raise self._refused(operation, offset, errno.EROFS, "it was opened for reading")
        if offset < 0 or offset + length > self._size:
            raise self._refused(operation, offset, errno.EINVAL, "beyond the end of the disk")

    def _refused(self, operation: str, offset: int, number: int, reason: str) -> errors.EndpointFailed:
        return errors.EndpointFailed(
            operation=operation, endpoint=self._connection.name, offset=offset, reason=reason, errno=number
        )

    def close(self) -> None:
        """End the connection, unless it is the endpoint's own; twice is fine."""
        if not self._shared:
            self._connection.close()

    def __enter__(self) -> NbdChannel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _name(address: NbdAddress | NbdUri) -> str:
    return address.uri if isinstance(address, NbdUri) else f"export {address.export!r} at {address.socket}"


def _payload(connection: _Connection) -> int:
    """Most bytes of data in one request to this server."""
    limit = connection.ask("get_block_size", connection.nbd.SIZE_MAXIMUM)
    return min(limit, _SAFE_PAYLOAD) if limit > 0 else _SAFE_PAYLOAD


class NbdEndpoint:
    """An NBD export as an `Endpoint`, with a connection of its own for asking and one per channel.

    A server that does not promise a common view to several connections (NBD_FLAG_CAN_MULTI_CONN)
    gets a single connection, which the channel shares.

    `contexts` are metadata contexts (`qemu:dirty-bitmap:NAME`) that must be there: `Unsupported`
    otherwise. `timeout` is for one request, in seconds. `cancel` is looked at while waiting too,
    so that an interrupt does not wait for a server that hangs. `name` is what messages call it.
    `request_limit`: no read may cross a multiple of so many bytes, and every read is answered by
    the server's plain read path, without its look at holes (both for a defect of certain QEMUs).
    `copied`: the metadata context that tells, after a read that did cross one, what of it to read
    again without crossing; so only little must be read in small pieces.

    Raises `EndpointFailed` (errno ENOENT: no such socket or export; EROFS: `writable` asked of a
    read-only export), `EndpointTimeout`, `ProgramMissing`.
    """

    def __init__(
        self,
        address: NbdAddress | NbdUri,
        *,
        contexts: Sequence[str] = (),
        timeout: float = TIMEOUT_SECONDS,
        writable: bool = False,
        channels: int = CHANNELS,
        cancel: Cancel | None = None,
        name: str | None = None,
        request_limit: int | None = None,
        copied: str | None = None,
    ) -> None:
        self._address = address
        self._copied = copied
        self._name = name or _name(address)
        self._timeout = timeout
        self._cancel = cancel
        self._writable = writable
        self._request_limit = request_limit
        self._lent: list[_Connection] = []
        #: What each channel must be told by the server too.
        self._told = [copied] if copied is not None else []
        contexts = [*contexts, *self._told]
        self._control = self._connect([block_status.ALLOCATION, *contexts])
        try:
            self._look(contexts, channels)
        except BaseException:
            self._control.close()
            raise

    def _look(self, contexts: Sequence[str], channels: int) -> None:
        self._size = self._control.ask("get_size")
        self._channels = channels if self._control.ask("can_multi_conn") else 1
        wide = self._control.has("aio_block_status_64")
        extended = wide and bool(self._control.ask("get_extended_headers_negotiated"))
        self._longest_question = _LONGEST_WIDE_QUESTION if extended else block_status.MAX_QUESTION
        self._mapped = bool(self._control.ask("can_meta_context", block_status.ALLOCATION))
        for context in contexts:
            self._require(context)
        if self._writable and self._control.ask("is_read_only"):
            raise errors.EndpointFailed(
                operation="opening for writing",
                endpoint=self._name,
                offset=0,
                reason="the export is read-only",
                errno=errno.EROFS,
            )

    def _connect(self, contexts: Sequence[str]) -> _Connection:
        return _Connection(self._address, self._name, contexts=contexts, timeout=self._timeout, cancel=self._cancel)

    def _require(self, context: str) -> None:
        if not self._control.ask("can_meta_context", context):
            raise errors.Unsupported(
                what=f"Asking for {context}",
                reason=f"{self._name} does not offer that metadata context",
                way_out="Export the disk together with its bitmap (nbdinfo --map shows what is offered).",
            )

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @property
    def channels(self) -> int:
        """How many channels may be open at a time: 1 without multi-conn."""
        return self._channels

    @property
    def flushes(self) -> bool:
        """Can the server be told to make durable what was written?"""
        return bool(self._control.ask("can_flush"))

    @property
    def trims(self) -> bool:
        """Can it be told that content is not needed any more?"""
        return bool(self._control.ask("can_trim"))

    def extents(self, window: Extent) -> Iterator[Mapped]:
        """The allocation of `window`; all of it is data where the server does not offer base:allocation."""
        if self._mapped:
            return block_status.mapped(self.status(block_status.ALLOCATION, window))
        inside = between(window.start, min(window.end, self._size))
        return iter([Mapped(*inside, zero=False)] if inside.length > 0 else [])

    def status(self, context: str, window: Extent) -> Iterator[block_status.Status]:
        """The extents of `window` with the flags that `context` gives them; lazy, see `block_status.walk`.

        Raises `BadReply` for an answer that the protocol forbids.
        """
        self._require(context)
        return block_status.walk(
            partial(self._control.status, context),
            window,
            size=self._size,
            who=self._name,
            longest=self._longest_question,
        )

    def dirty(self, context: str, window: Extent) -> Iterator[Extent]:
        """What of `window` the bitmap behind `context` (`qemu:dirty-bitmap:NAME`) has as changed."""
        return block_status.dirty(self.status(context, window))

    def channel(self) -> NbdChannel:
        """A new channel."""
        shared = self._channels == 1
        connection = self._control if shared else self._connect(self._told)
        if not shared:
            self._lent.append(connection)
        if connection.ask("get_size") != self._size:
            raise errors.BadReply(who=self._name, problem="another size of the disk on another connection")
        return NbdChannel(
            connection, writable=self._writable, shared=shared, request_limit=self._request_limit, copied=self._copied
        )

    def close(self) -> None:
        """End all connections, also those of the channels; twice is fine."""
        for connection in [*self._lent, self._control]:
            connection.close()

    def __enter__(self) -> NbdEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
