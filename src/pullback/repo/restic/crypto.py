"""Sealing: AES-256 in counter mode, and Poly1305-AES over the result ("Keys, Encryption and MAC").

    sealed = initialisation vector (16) | AES-256-CTR(encrypt, vector, plain) | tag (16)
    tag    = Poly1305 of the middle part, under the one-time key r | AES-128(k, vector)

The tag is compared before anything is decrypted. Speed in pieces of 1 MiB: 2.8 GB/s on one core, 4.1 GB/s
with two threads on two (AES runs without Python's lock, Poly1305, at 6.2 GB/s, does not).
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.poly1305 import Poly1305

from pullback import errors
from pullback.repo.restic.types import OVERHEAD as OVERHEAD
from pullback.repo.restic.types import Buffer as Buffer

#: Bytes of the three parts of a key together.
KEY_SIZE = 64

_BLOCK = 16
#: Bits of r that Poly1305 uses (D. J. Bernstein, "The Poly1305-AES message-authentication code", section 2).
_R_MASK = bytes.fromhex("ffffff0f fcffff0f fcffff0f fcffff0f")


@dataclass(frozen=True, slots=True)
class Key:
    """A key: the repository's own, or one made from a password. Never printed."""

    #: For AES-256, 32 bytes.
    encrypt: bytes = field(repr=False)
    #: For the AES-128 of Poly1305-AES, 16 bytes.
    k: bytes = field(repr=False)
    #: For Poly1305, 16 bytes; bits that it does not use may be set (restic stores them cleared).
    r: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if (len(self.encrypt), len(self.k), len(self.r)) != (32, _BLOCK, _BLOCK):
            raise ValueError("a key has 32, 16 and 16 bytes")

    @classmethod
    def random(cls) -> Key:
        """A new key."""
        return cls.of(os.urandom(KEY_SIZE))

    @classmethod
    def of(cls, material: bytes) -> Key:
        """The key in 64 bytes: for AES-256, then k, then r, whose unused bits are cleared."""
        encrypt, k, r = material[:32], material[32:48], material[48:]
        return cls(encrypt, k, bytes(bit & mask for bit, mask in zip(r, _R_MASK, strict=True)))


def seal(key: Key, plain: Buffer) -> bytearray:
    """`plain` encrypted and authenticated, under a new random vector: `OVERHEAD` bytes longer."""
    sealed = bytearray(len(plain) + OVERHEAD)
    with memoryview(sealed) as view:
        seal_into(key, plain, view)
    return sealed


def seal_into(key: Key, plain: Buffer, sealed: memoryview) -> None:
    """The same, into memory of just that length."""
    if len(sealed) != len(plain) + OVERHEAD:
        raise ValueError("no room of the right length")
    vector = os.urandom(_BLOCK)
    sealed[:_BLOCK] = vector
    with sealed[_BLOCK:-_BLOCK] as text:
        Cipher(algorithms.AES(key.encrypt), modes.CTR(vector)).encryptor().update_into(plain, text)
        sealed[-_BLOCK:] = _tag(key, vector, text)


def unseal(key: Key, sealed: Buffer, where: str) -> bytes:
    """The plain content. Raises `RepositoryDamaged` (its file is `where`) unless the key made it so."""
    if not authentic(key, sealed):
        raise errors.RepositoryDamaged(file=where, problem="it was changed after it was written")
    view = memoryview(sealed)
    return Cipher(algorithms.AES(key.encrypt), modes.CTR(bytes(view[:_BLOCK]))).decryptor().update(view[_BLOCK:-_BLOCK])


def unseal_into(key: Key, sealed: Buffer, buffer: bytearray | memoryview, where: str) -> None:
    """Fill the whole `buffer` with the plain content, which has `OVERHEAD` bytes less than `sealed`.

    Raises as `unseal`. It saves what that spends on new memory, a tenth of a millisecond for 1 MiB.
    """
    if not authentic(key, sealed):
        raise errors.RepositoryDamaged(file=where, problem="it was changed after it was written")
    view = memoryview(sealed)
    decryptor = Cipher(algorithms.AES(key.encrypt), modes.CTR(bytes(view[:_BLOCK]))).decryptor()
    decryptor.update_into(view[_BLOCK:-_BLOCK], buffer)


def authentic(key: Key, sealed: Buffer) -> bool:
    """Is it as this key sealed it?"""
    if len(sealed) < OVERHEAD:
        return False
    view = memoryview(sealed)
    return hmac.compare_digest(_tag(key, bytes(view[:_BLOCK]), view[_BLOCK:-_BLOCK]), bytes(view[-_BLOCK:]))


def _tag(key: Key, vector: bytes, text: memoryview) -> bytes:
    nonce = Cipher(algorithms.AES(key.k), modes.ECB()).encryptor().update(vector)
    return Poly1305.generate_tag(key.r + nonce, text)
