"""The interface of everything that holds a disk's bytes: an NBD export, a file, a restore point.

An `Endpoint` is opened once; each worker thread takes a `Channel` of its own from it. So a copy
from any endpoint to any other is one piece of code (`transfer.copier`), and backup, restore and
verify are that copier with different ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from pullback.extents import Extent, Mapped


class Channel(AbstractContextManager["Channel"], Protocol):
    """One connection to an endpoint, used by one thread at a time.

    Errors: `EndpointFailed` (the request failed; `errno` says why), `EndpointTimeout`.
    """

    def read_into(self, offset: int, buffer: bytearray, length: int) -> None:
        """Fill `buffer[:length]` with the bytes from `offset`."""

    def write(self, offset: int, buffer: bytes | bytearray, start: int, length: int) -> None:
        """Write `buffer[start:start + length]` at `offset`."""

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeroes, by a hole where that is possible."""

    def trim(self, offset: int, length: int) -> None:
        """Tell that the range is not needed any more (its content is undefined afterwards)."""

    def flush(self) -> None:
        """Make durable all that was written, through any channel, before this call."""

    def close(self) -> None:
        """End the connection; twice is fine."""


class Endpoint(AbstractContextManager["Endpoint"], Protocol):
    """A disk's bytes at offsets 0 … size-1."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def channels(self) -> int:
        """How many channels may be open at a time (1 = no parallel use)."""

    def extents(self, window: Extent) -> Iterator[Mapped]:
        """The allocation of `window`: sorted, without gaps, what reads as zeroes marked."""

    def channel(self) -> Channel:
        """A new channel."""

    def close(self) -> None:
        """Release everything; twice is fine."""
