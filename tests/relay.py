"""A relay on a monitor's socket: counts what passes, and strikes at the n-th message.

    pullback ──commands──▶ relay ──▶ QEMU
             ◀──replies───       ◀──

Only the first client is counted and struck (that is pullback); later ones (its guard, the next
run) pass untouched. Events pass untouched too, and are not counted.
"""

from __future__ import annotations

import contextlib
import enum
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

_SECONDS = 60.0


class Way(enum.Enum):
    """Which way a message goes."""

    COMMAND = "command"
    REPLY = "reply"


Message = dict[str, Any]
#: Asked for each counted message with its number (from 1). What it gives is sent back instead of a
#: command; None: the message passes.
Before = Callable[[Way, int, Message], Message | None]
#: Called when the message was passed on.
After = Callable[[Way, int, Message], None]


def refusal(message: Message) -> Message:
    """QEMU's answer when it refuses a command."""
    return {"id": message.get("id"), "error": {"class": "GenericError", "desc": "refused by the test"}}


class Relay:
    """Listens at `listen` while the block runs, and passes on to `target`."""

    def __init__(self, listen: Path, target: Path, *, before: Before | None = None, after: After | None = None) -> None:
        self.path = listen
        self._target = target
        self._before = before
        self._after = after
        self._server = socket.socket(socket.AF_UNIX)
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self._clients = 0
        #: Names of the commands of the first client, in order; replies are answers to them.
        self.commands: list[str] = []

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            upstream = socket.socket(socket.AF_UNIX)
            try:
                upstream.connect(str(self._target))
            except OSError:  # QEMU is gone
                client.close()
                upstream.close()
                continue
            self._clients += 1
            pair = _Pair(self, client, upstream, counted=self._clients == 1)
            self._open += [client, upstream]
            for work in (pair.commands, pair.replies):
                self._start(work)

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="relay", daemon=True)
        self._threads.append(thread)
        thread.start()

    def shut(self) -> None:
        """Nobody listens any more, as after the death of QEMU."""
        self.path.unlink(missing_ok=True)

    def drop(self) -> None:
        """Cut all connections."""
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def before(self, way: Way, number: int, message: Message) -> Message | None:
        """Ask the test."""
        return self._before(way, number, message) if self._before is not None else None

    def after(self, way: Way, number: int, message: Message) -> None:
        """Tell the test."""
        if self._after is not None:
            self._after(way, number, message)

    def __enter__(self) -> Relay:
        self.path.unlink(missing_ok=True)
        self._server.bind(str(self.path))
        self._server.listen(8)
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self.drop()
        deadline = time.monotonic() + _SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for end in [self._server, *self._open]:
            end.close()
        self.path.unlink(missing_ok=True)


class _Pair:
    """One client and its connection to QEMU: a thread for each way."""

    def __init__(self, relay: Relay, client: socket.socket, upstream: socket.socket, *, counted: bool) -> None:
        self._relay = relay
        self._client = client
        self._upstream = upstream
        self._counted = counted
        self._answering = threading.Lock()

    def commands(self) -> None:
        """From the client to QEMU."""
        number = 0
        with contextlib.suppress(OSError):
            for message in _documents(self._client):
                line = json.dumps(message).encode() + b"\n"
                if not self._counted or message.get("execute") == "qmp_capabilities":
                    self._upstream.sendall(line)
                    continue
                number += 1
                self._relay.commands.append(message["execute"])
                self._command(number, message, line)
        self._end()

    def _command(self, number: int, message: Message, line: bytes) -> None:
        instead = self._relay.before(Way.COMMAND, number, message)
        if instead is not None:
            self._answer(json.dumps(instead).encode() + b"\n")
        else:
            self._upstream.sendall(line)
        self._relay.after(Way.COMMAND, number, message)

    def replies(self) -> None:
        """From QEMU to the client."""
        number = -1  # the answer to qmp_capabilities is not counted
        with contextlib.suppress(OSError), self._upstream.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if not self._counted or not ({"return", "error"} & set(message)):
                    self._answer(line)
                    continue
                number += 1
                if number > 0:
                    self._relay.before(Way.REPLY, number, message)
                self._answer(line)
                if number > 0:
                    self._relay.after(Way.REPLY, number, message)
        self._end()

    def _answer(self, line: bytes) -> None:
        with self._answering:
            self._client.sendall(line)

    def _end(self) -> None:
        """One end is gone: QEMU's monitor must be free for the next client at once."""
        for end in (self._client, self._upstream):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _documents(stream: socket.socket) -> Iterator[Message]:
    """JSON objects one after the other: a client need not end them with a line."""
    decoder, text = json.JSONDecoder(), ""
    while part := stream.recv(65536):
        text += part.decode()
        while text := text.lstrip():
            try:
                message, end = decoder.raw_decode(text)
            except ValueError:
                break
            text = text[end:]
            yield message
