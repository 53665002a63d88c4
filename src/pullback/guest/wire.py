"""What is spoken with the reader: questions to it, frames from it (reader/read.pl has the layout).

Everything that comes is hostile. A frame is bounded, every field is checked, silence has a deadline.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pullback import errors
from pullback.model.texts import showable

#: Bytes of one frame; the reader's pieces of files have 256 KiB.
MAX_FRAME = 1 << 20
#: So often a wait looks whether it shall go on, in seconds.
_TICK = 0.1
_HEAD = 5
_WHO = "The reader"
_SHOWN = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame: its kind, a letter, and its data."""

    kind: str
    data: bytes

    def fields(self, count: int) -> list[bytes]:
        """The data as exactly `count` fields; raises `BadReply`."""
        found = self.data.split(b"\0")
        if len(found) != count:
            raise bad(f"a frame {self.kind!r} with {len(found)} fields")
        return found


class Refused(Exception):
    """The reader answered that it cannot; `number` is an errno of Linux, or 0."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number
        self.text = text


def bad(problem: str) -> errors.BadReply:
    """An answer that the protocol does not allow."""
    return errors.BadReply(who=_WHO, problem=problem)


def integer(field: bytes, *, high: int = (1 << 63) - 1, low: int = 0) -> int:
    """A number in decimal digits; raises `BadReply`."""
    text = field[1:] if low < 0 and field.startswith(b"-") else field
    if not text.isdigit() or len(text) > 19:
        raise bad(f"{shown(field)!r} in place of a number")
    value = -int(text) if text is not field else int(text)
    if not low <= value <= high:
        raise bad(f"the number {value}")
    return value


def shown(data: bytes) -> str:
    """Bytes from the reader as a text for people, not long and without control characters."""
    return showable(data[:_SHOWN].decode("utf-8", "backslashreplace"))


class Channel:
    """The socket to a reader. One question at a time; for one thread."""

    def __init__(self, connection: socket.socket, *, alive: Callable[[], None]) -> None:
        """`alive()` is called while nothing comes, and raises what the wait shall end with."""
        self._socket = connection
        self._socket.setblocking(False)
        self._alive = alive
        self._buffer = bytearray()
        #: Bytes received, for reports.
        self.received = 0

    def ask(self, verb: str, *words: str | bytes | int, seconds: float) -> Iterator[Frame]:
        """Ask, and give the answer's frames up to the last one, ".", with it.

        Raises `Refused` if the answer is no; `ProgramFailed` when nothing comes for `seconds`.
        """
        self._send(verb, words, seconds)
        while True:
            frame = self.frame(seconds)
            if frame.kind == "!":
                number, text = frame.fields(2)
                raise Refused(integer(number, high=4095), shown(text))
            yield frame
            if frame.kind == ".":
                return

    def frame(self, seconds: float) -> Frame:
        """The next frame."""
        head = self._take(_HEAD, seconds)
        length = int.from_bytes(head[:4], "big")
        if length > MAX_FRAME:
            raise bad(f"a frame of {length} bytes")
        return Frame(kind=chr(head[4]), data=self._take(length, seconds))

    def _send(self, verb: str, words: tuple[str | bytes | int, ...], seconds: float) -> None:
        parts = [verb.encode(), *(word if isinstance(word, bytes) else str(word).encode() for word in words)]
        assert not any(b"\0" in part for part in parts)
        question = b"\0".join(parts)
        data = len(question).to_bytes(4, "big") + question
        deadline = time.monotonic() + seconds
        while data:
            self._wait(select.POLLOUT, deadline, seconds)
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._gone(error.strerror or str(error)) from error

    def _take(self, length: int, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        while len(self._buffer) < length:
            self._wait(select.POLLIN, deadline, seconds)
            try:
                data = self._socket.recv(MAX_FRAME)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._gone(error.strerror or str(error)) from error
            if not data:
                raise self._gone("it ended")
            deadline = time.monotonic() + seconds
            self.received += len(data)
            self._buffer += data
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    def _wait(self, event: int, deadline: float, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        while not poll.poll(_TICK * 1000):
            self._alive()
            if time.monotonic() > deadline:
                raise errors.ProgramFailed(
                    program="the reader", status=f"nothing for {seconds:g} s", message="it does not answer"
                )
        self._alive()

    def _gone(self, reason: str) -> errors.ProgramFailed:
        for _ in range(20):  # who looks usually knows better why, as soon as the end can be seen
            self._alive()
            time.sleep(_TICK)
        return errors.ProgramFailed(program="the reader", status="ended", message=reason)
