"""Blobs: plain content to what stands in a pack, and back ("Pack Format").

plain -> (zstd, if that makes it smaller) -> sealed;     id = SHA-256 of plain
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from pullback import errors
from pullback.repo.restic import compression, crypto
from pullback.repo.restic.types import Blob, Buffer, Entry


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
    if level is not None and compression.worth_compressing(plain):
        packed = compression.compress(plain, level)
        if len(packed) < len(plain):
            return EncodedBlob(known, kind, crypto.seal(key, packed), len(plain))
    return EncodedBlob(known, kind, crypto.seal(key, plain), 0)


def decode(key: crypto.Key, sealed: Buffer, entry: Entry, where: str) -> bytes:
    """The plain content of the blob that `entry` describes (its offset is not looked at).

    Raises `RepositoryDamaged` (its file is `where`) unless `sealed` is that blob, whole.
    """
    if len(sealed) != entry.length:
        raise errors.RepositoryDamaged(file=where, problem=f"a blob has {len(sealed)} bytes instead of {entry.length}")
    plain = crypto.unseal(key, sealed, where)
    if entry.raw_length:
        plain = compression.decompress(plain, entry.raw_length, where)
    if hashlib.sha256(plain).digest() != entry.id:
        raise errors.RepositoryDamaged(file=where, problem=f"the content of blob {entry.id.hex()} is another")
    return plain
