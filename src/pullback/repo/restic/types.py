"""What the parts of the format have in common: kinds of blobs, and where a blob lies in a pack."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

#: Whatever holds bytes.
Buffer = bytes | bytearray | memoryview

#: Bytes of an id (SHA-256).
ID = 32


class Blob(IntEnum):
    """The two kinds of blobs, with their numbers in a pack's header ("Pack Format")."""

    #: A piece of a file.
    DATA = 0
    #: A directory.
    TREE = 1

    @property
    def word(self) -> str:
        """The kind's name in index files."""
        return self.name.lower()


class Entry(NamedTuple):
    """A blob in a pack ("Pack Format", "Indexing"). Lengths and offset in bytes."""

    #: SHA-256 of the plain content.
    id: bytes
    kind: Blob
    #: Where its sealed form starts in the pack.
    offset: int
    #: Of the sealed form.
    length: int
    #: Of the plain content if it is compressed, else 0.
    raw_length: int


#: Bytes that sealing adds: the initialisation vector and the authentication code, 16 each.
OVERHEAD = 32
