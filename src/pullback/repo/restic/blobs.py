"""Blobs: plain content to what stands in a pack, and back ("Pack Format").

plain -> (zstd, if that makes it smaller) -> sealed;     id = SHA-256 of plain
"""

from __future__ import annotations

import hashlib
import threading
from typing import NamedTuple, TypeVar

from pullback import errors
from pullback.repo.restic import compression, crypto
from pullback.repo.restic.types import Blob, Buffer, Entry

Plain = TypeVar("Plain", bound=bytes | bytearray)


class EncodedBlob(NamedTuple):
    """A blob as it goes into a pack."""

    #: SHA-256 of the plain content.
    id: bytes
    kind: Blob
    #: What is stored.
    sealed: bytes | bytearray
    #: Of the plain content if it is compressed, else 0.
    raw_length: int


def encode(
    key: crypto.Key,
    plain: Buffer,
    kind: Blob = Blob.DATA,
    *,
    level: int | None = compression.LEVEL,
    id: bytes | None = None,
) -> EncodedBlob:
    """A blob of `plain`.

    With `level` None nothing is compressed: repositories of version 1 know no compression. `id` saves
    the hashing where the SHA-256 of `plain` is known.
    """
    known = hashlib.sha256(plain).digest() if id is None else id
    content, raw_length = packed(plain, level)
    return EncodedBlob(known, kind, crypto.seal(key, content), raw_length)


def packed(plain: Buffer, level: int | None) -> tuple[Buffer, int]:
    """What is to be sealed of `plain`, and its length if that is compressed, else 0.

    With `level` None nothing is compressed. The content is valid until this thread calls it again.
    """
    if level is not None and compression.worth_compressing(plain):
        small = compression.compress_briefly(plain, level)
        if small is not None:
            return small, len(plain)
    return plain, 0


def decode(key: crypto.Key, sealed: Buffer, entry: Entry, where: str) -> bytes:
    """The plain content of the blob that `entry` describes (its offset is not looked at).

    Raises `RepositoryDamaged` (its file is `where`) unless `sealed` is that blob, whole.
    """
    plain = _unsealed(key, sealed, entry, where)
    if entry.raw_length:
        plain = compression.decompress(plain, entry.raw_length, where)
    return _proven(plain, entry, where)


class Scratch:
    """A buffer for the content of one blob after another: new memory for each costs more than it seems."""

    def __init__(self, largest: int) -> None:
        """For blobs of up to so many bytes."""
        self.largest = largest
        self._buffer = bytearray()

    def of(self, size: int) -> bytearray:
        """The buffer, with just `size` bytes; what was in it is gone."""
        if len(self._buffer) != size:
            self._buffer = bytearray(size)
        return self._buffer


def decode_into(scratch: Scratch, key: crypto.Key, sealed: Buffer, entry: Entry, where: str) -> bytes | bytearray:
    """`decode`, but the content is valid only until `scratch` is used again."""
    inside = entry.length - crypto.OVERHEAD
    if inside <= 0 or max(inside, entry.raw_length) > scratch.largest:
        return decode(key, sealed, entry, where)
    _require_length(sealed, entry, where)
    content = scratch.of(entry.raw_length or inside)
    if entry.raw_length:
        packed = _PACKED.of(inside)
        crypto.unseal_into(key, sealed, packed, where)
        compression.decompress_into(packed, content, where)
    else:
        crypto.unseal_into(key, sealed, content, where)
    return _proven(content, entry, where)


class _Packed(threading.local):
    """Each thread's memory for what is unsealed and still compressed."""

    def __init__(self) -> None:
        self._room = bytearray()

    def of(self, size: int) -> memoryview:
        """So many bytes of it; what was in it is gone."""
        if len(self._room) < size:
            self._room = bytearray(size)
        return memoryview(self._room)[:size]


_PACKED = _Packed()


def _unsealed(key: crypto.Key, sealed: Buffer, entry: Entry, where: str) -> bytes:
    _require_length(sealed, entry, where)
    return crypto.unseal(key, sealed, where)


def _require_length(sealed: Buffer, entry: Entry, where: str) -> None:
    if len(sealed) != entry.length:
        raise errors.RepositoryDamaged(file=where, problem=f"a blob has {len(sealed)} bytes instead of {entry.length}")


def _proven(plain: Plain, entry: Entry, where: str) -> Plain:
    if hashlib.sha256(plain).digest() != entry.id:
        raise errors.RepositoryDamaged(file=where, problem=f"the content of blob {entry.id.hex()} is another")
    return plain
