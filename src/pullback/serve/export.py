"""What the server offers under a name: a disk that is only read, or one that clients may write to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from pullback.extents import Extent, Mapped
from pullback.serve.disk import Disk


class Writer(AbstractContextManager["Writer"], Protocol):
    """A client's own way to a disk that can be written to; used by one thread. All raise `PullbackError`."""

    def read(self, offset: int, length: int) -> bytearray:
        """The bytes from `offset`."""

    def write(self, offset: int, content: bytearray) -> None:
        """Write `content` at `offset`."""

    def zero(self, offset: int, length: int, *, hole: bool) -> None:
        """Make a range read as zeroes, by a `hole` if that may be."""

    def trim(self, offset: int, length: int) -> None:
        """A range is not needed any more."""

    def flush(self) -> None:
        """Make durable what was written, by whomever."""

    def map(self, window: Extent) -> Iterator[Mapped]:
        """What of `window` is known to be zero."""


class Writable(Protocol):
    """A disk that clients may write to."""

    @property
    def size(self) -> int:
        """Bytes."""

    def connect(self) -> Writer:
        """For a new client."""


Export = Disk | Writable
