"""Files that are one sealed document each: index, snapshot, lock ("Unpacked Data Format").

    plain = "{" or "[" and the rest of a JSON document | 2, and the document compressed by zstd

A file's name is its SHA-256.
"""

from __future__ import annotations

import hashlib

from pullback import errors
from pullback.repo.restic import compression, crypto
from pullback.repo.restic.types import Buffer
from pullback.units import MiB

#: Bytes of a document: of an index, whose files restic keeps below 8 MiB each, but other programs may not.
MAX_INDEX = 256 * MiB
#: Bytes of any other document.
MAX_DOCUMENT = 16 * MiB

_COMPRESSED = 2
_LEVEL = 3


def seal_file(key: crypto.Key, document: bytes, *, compress: bool = True) -> tuple[str, bytes]:
    """Name and content of the file that holds `document` (JSON). Version 1 does not compress.

    Each call gives another file, for the sake of its random vector.
    """
    if not document.startswith((b"{", b"[")):
        raise ValueError("a document is an object or a list")
    plain = bytes([_COMPRESSED]) + compression.compress(document, _LEVEL) if compress else document
    data = bytes(crypto.seal(key, plain))
    return hashlib.sha256(data).hexdigest(), data


def open_file(key: crypto.Key, data: Buffer, name: str, where: str, *, limit: int = MAX_DOCUMENT) -> bytes:
    """The document in the file `name`, of at most `limit` bytes.

    Raises `RepositoryDamaged` (its file is `where`) unless name and seal fit, and it is a document.
    """
    if len(data) > limit or hashlib.sha256(data).hexdigest() != name:
        raise errors.RepositoryDamaged(file=where, problem="its name is not the SHA-256 of its content")
    plain = crypto.unseal(key, data, where)
    if plain[:1] in (b"{", b"["):
        return plain
    if plain[:1] != bytes([_COMPRESSED]):
        raise errors.RepositoryDamaged(file=where, problem="its encoding is not known")
    return compression.decompress_document(memoryview(plain)[1:], limit, where)
