"""Where the files of a repository are: one small interface, and the names that restic gives to files.

Source: restic's design document, "References / Design", section "Repository Layout" (the default
layout). Everything but `config` is named by the SHA-256 of its content, so files never change.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self

from pullback.units import MiB

#: Bytes: a file above this size is read in parts only. restic's largest packs have 128 MiB.
MAX_WHOLE = 256 * MiB
_NAME = re.compile("[0-9a-f]{64}", re.ASCII)


class Kind(enum.StrEnum):
    """The kinds of files; the value is the directory that restic keeps them in (`config` is a file)."""

    CONFIG = "config"
    KEYS = "keys"
    LOCKS = "locks"
    SNAPSHOTS = "snapshots"
    INDEX = "index"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that is there."""

    #: 64 hexadecimal digits; empty for the config.
    name: str
    #: Bytes.
    size: int
    #: When it was written, by the store's clock.
    modified: datetime


def path_of(kind: Kind, name: str) -> str:
    """Where a file is, below the repository: `data/ab/ab…`, `keys/…`, `config` (whose name is empty).

    Raises `ValueError` for what is no name: names come out of files that others may have written.
    """
    if kind is Kind.CONFIG:
        if name:
            raise ValueError(f"the config has no name, and {name!r} is given")
        return kind.value
    if not is_name(name):
        raise ValueError(f"{name!r} is not the name of a file in {kind.value}")
    return f"data/{name[:2]}/{name}" if kind is Kind.DATA else f"{kind.value}/{name}"


def is_name(name: str) -> bool:
    """Is it 64 small hexadecimal digits?"""
    return _NAME.fullmatch(name) is not None


class Store(Protocol):
    """A repository's files. Every call blocks; threads share a store.

    What goes wrong is raised as errors of `pullback.errors`: `ObjectMissing` and `ObjectDamaged` for
    one file; `StoreUnreachable`, `StoreRefused`, `StoreFailed`, `DestinationFull`,
    `PermissionDenied` for the whole. What may pass by itself was retried before.
    """

    @property
    def url(self) -> str:
        """The repository's name, as restic has it."""

    @property
    def connections(self) -> int:
        """How many calls at once make sense."""

    def list(self, kind: Kind) -> Iterator[Stored]:
        """Every file of a kind, in any order. Files with other names than ours are left out."""

    def read(self, kind: Kind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset`, or all from there on.

        Raises `ObjectMissing`; and `ObjectDamaged` if the file is shorter than that, or if all of it
        was asked for and that is more than `MAX_WHOLE`.
        """

    def write(self, kind: Kind, name: str, data: bytes | bytearray | memoryview, *, new: bool = False) -> None:
        """Store a file, wholly or not at all; durable when this returns.

        A file that is there is replaced. With `new` it must not be there (`AlreadyStored`): of
        several who try, one succeeds.
        """

    def size(self, kind: Kind, name: str) -> int:
        """Bytes of a file; raises `ObjectMissing`."""

    def delete(self, kind: Kind, name: str) -> None:
        """Remove a file; one that is not there is fine."""

    def tidy(self) -> None:
        """Remove what killed writers left behind, if it is a day old."""

    def hurry(self) -> None:
        """Somebody wants to end: from now on what fails fails at once, instead of being tried again."""

    def close(self) -> None:
        """Let go of everything; calls that wait in other threads end with an error. Twice is fine."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
