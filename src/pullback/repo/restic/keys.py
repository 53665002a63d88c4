"""Key files: the repository's key, sealed under a password ("Keys, Encryption and MAC").

    {"created": …, "username": …, "hostname": …, "kdf": "scrypt", "N": …, "r": …, "p": …,
     "salt": base64 of 64 bytes, "data": base64 of the sealed key}

    64 bytes of scrypt(password, salt) = a key, which seals {"mac": {"k": …, "r": …}, "encrypt": …}

A repository may have several, each for a password of its own. Who can write there can ask for a
costly scrypt: memory and work are bounded before it starts.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from pullback import errors
from pullback.repo.restic import crypto, documents, times
from pullback.repo.restic.types import Buffer
from pullback.units import MiB

#: Bytes of a key file that are looked at.
MAX_FILE = MiB
#: Key files of a repository that are tried (as restic does).
MAX_KEYS = 20

_SALT = 64
_MAX_MEMORY = 1024 * MiB
#: N times r times p: 50 times what restic asks for, about a quarter of a minute.
_MAX_WORK = 1 << 26


@dataclass(frozen=True, slots=True)
class Cost:
    """What scrypt costs: N·r·128 bytes of memory, and time in proportion to N·r·p."""

    n: int
    r: int
    p: int

    @property
    def bearable(self) -> bool:
        """Within our bounds, and allowed by RFC 7914, section 6?"""
        memory = 128 * self.r * (self.n + self.p)
        return (
            self.n > 1
            and self.n & (self.n - 1) == 0
            and self.r > 0
            and self.p > 0
            and memory <= _MAX_MEMORY
            and self.n * self.r * self.p <= _MAX_WORK
        )


#: 32 MiB and about 0.3 s, much like what restic finds for itself.
DEFAULT_COST = Cost(1 << 15, 8, 4)


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What a key file tells without its password."""

    #: The file's name, which is the key's id.
    name: str
    hostname: str
    username: str
    #: RFC 3339.
    created: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Maker:
    """Who makes a key, and when."""

    hostname: str
    username: str
    #: With a zone.
    created: datetime


def create(password: str, key: crypto.Key, maker: Maker, *, cost: Cost = DEFAULT_COST) -> tuple[str, bytes]:
    """A key file that opens with `password` and holds `key`: its name and content."""
    if not cost.bearable:
        raise ValueError("scrypt with that cost cannot be borne")
    salt = os.urandom(_SALT)
    inner = {"mac": {"k": _base64(key.k), "r": _base64(key.r)}, "encrypt": _base64(key.encrypt)}
    data = documents.dump(
        {
            "created": times.write(maker.created),
            "username": maker.username,
            "hostname": maker.hostname,
            "kdf": "scrypt",
            "N": cost.n,
            "r": cost.r,
            "p": cost.p,
            "salt": _base64(salt),
            "data": _base64(crypto.seal(_derive(password, salt, cost), documents.dump(inner))),
        }
    )
    return hashlib.sha256(data).hexdigest(), data


def describe(data: Buffer, name: str) -> KeyInfo:
    """What the key file `name` tells. Raises `RepositoryDamaged`."""
    fields = _checked(data, name)
    return KeyInfo(name, fields.text("hostname", ""), fields.text("username", ""), fields.text("created", ""))


def unlock(data: Buffer, password: str, name: str) -> crypto.Key | None:
    """The repository's key from the key file `name`; None if the password does not open it.

    Raises `RepositoryDamaged` if the file is not what its name says, or is no key file. It takes as
    long as scrypt does, without Python's lock.
    """
    fields = _checked(data, name)
    if fields.text("kdf") != "scrypt":
        fields.fail(f"its key is derived by {fields.text('kdf')[:20]!r}, which is not known")
    cost = Cost(*(fields.integer(field, most=1 << 32) for field in ("N", "r", "p")))
    if not cost.bearable:
        fields.fail("its scrypt would cost too much, or is not allowed")
    derived = _derive(password, _binary(fields, "salt"), cost)
    sealed = _binary(fields, "data")
    if not crypto.authentic(derived, sealed):
        return None
    inner = documents.load(crypto.unseal(derived, sealed, fields.where), fields.where)
    mac = inner.object("mac")
    try:
        return crypto.Key(_binary(inner, "encrypt"), _binary(mac, "k"), _binary(mac, "r"))
    except ValueError:
        inner.fail("its key has another length")


def open_any(files: Iterable[tuple[str, Buffer]], password: str, repository: str) -> tuple[str, crypto.Key]:
    """The name of the first of the key files (name and content) that the password opens, and the key in it.

    Raises `WrongPassword` if none opens, `NoRepository` if there is none, and `RepositoryDamaged` if
    none opens and one is damaged.
    """
    damaged: errors.RepositoryDamaged | None = None
    name = None
    for count, (name, data) in enumerate(files):
        if count >= MAX_KEYS:
            break
        try:
            key = unlock(data, password, name)
        except errors.RepositoryDamaged as error:
            damaged = damaged or error
            continue
        if key is not None:
            return name, key
    if damaged is not None:
        raise damaged
    if name is None:
        raise errors.NoRepository(path=repository)
    raise errors.WrongPassword(path=repository)


def _checked(data: Buffer, name: str) -> documents.Fields:
    where = f"keys/{name}"
    if len(data) > MAX_FILE or hashlib.sha256(data).hexdigest() != name:
        raise errors.RepositoryDamaged(file=where, problem="its name is not the SHA-256 of its content")
    return documents.load(data, where)


def _derive(password: str, salt: bytes, cost: Cost) -> crypto.Key:
    material = hashlib.scrypt(
        password.encode("utf-8", "surrogateescape"),
        salt=salt,
        n=cost.n,
        r=cost.r,
        p=cost.p,
        maxmem=(1 << 31) - 2,  # as much as Python lets us say; `bearable` bounds it
        dklen=crypto.KEY_SIZE,
    )
    return crypto.Key.of(material)


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


def _binary(fields: documents.Fields, name: str) -> bytes:
    try:
        return base64.b64decode(fields.text(name), validate=True)
    except (binascii.Error, ValueError):
        fields.fail(f"its field {name} is no base64")
