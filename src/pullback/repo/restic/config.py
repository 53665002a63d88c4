"""The file `config`: the repository's version, id, and the polynomial of restic's chunker ("Repository Format").

    {"version": 2, "id": 64 hex digits, "chunker_polynomial": hex}

We cut disks in pieces of a fixed size and need no polynomial, but restic refuses a repository whose
polynomial is reducible. The file is sealed, never compressed, so that older programs can read it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from pullback import errors
from pullback.repo.restic import crypto, documents
from pullback.repo.restic.types import Buffer
from pullback.units import MiB

#: Versions that we read and write. Version 1 has no compression.
OLDEST, NEWEST = 1, 2
#: The degree of the chunker's polynomial.
DEGREE = 53
#: Bytes of the file that are looked at.
MAX_FILE = MiB
#: The file's name.
NAME = "config"


@dataclass(frozen=True, slots=True)
class Config:
    """What `config` says."""

    version: int
    #: 64 hex digits, the same in all copies of the repository.
    id: str
    #: Bit i is the coefficient of x^i, over the field of two elements.
    polynomial: int

    @property
    def compresses(self) -> bool:
        """May blobs and files be compressed?"""
        return self.version >= 2


def new(version: int = NEWEST) -> Config:
    """A config with a new id and polynomial."""
    return Config(version, secrets.token_hex(32), random_polynomial())


def encode(key: crypto.Key, config: Config) -> bytes:
    """The file."""
    document = {"version": config.version, "id": config.id, "chunker_polynomial": f"{config.polynomial:x}"}
    return bytes(crypto.seal(key, documents.dump(document)))


def parse(key: crypto.Key, data: Buffer, repository: str) -> Config:
    """What the file says.

    Raises `RepositoryTooNew` for a later version (`repository` is named), `RepositoryDamaged` otherwise.
    """
    if len(data) > MAX_FILE:
        raise errors.RepositoryDamaged(file=NAME, problem="it is too long")
    fields = documents.load(crypto.unseal(key, data, NAME), NAME)
    version = fields.integer("version", least=OLDEST)
    if version > NEWEST:
        raise errors.RepositoryTooNew(path=repository, found=version, known=NEWEST)
    try:
        polynomial = int(fields.text("chunker_polynomial")[:17], 16)
    except ValueError:
        fields.fail("its polynomial is no number")
    return Config(version, fields.identifier("id"), polynomial)


def random_polynomial() -> int:
    """A random irreducible polynomial of degree `DEGREE`: one in 53 is, so it is found in a few milliseconds."""
    while True:
        polynomial = secrets.randbits(DEGREE) | 1 << DEGREE | 1
        if irreducible(polynomial):
            return polynomial


def irreducible(polynomial: int) -> bool:
    """Is the polynomial over the field of two elements irreducible? Rabin's test.

    M. O. Rabin, "Probabilistic algorithms in finite fields" (1980): f of degree n is irreducible if it
    divides x^(2^n) - x, and for each prime factor p of n has no common factor with x^(2^(n/p)) - x.
    """
    degree = polynomial.bit_length() - 1
    if degree < 1:
        return False
    powers = {degree // prime for prime in _prime_factors(degree)}
    x = _remainder(0b10, polynomial)
    power = x
    for exponent in range(1, degree + 1):
        power = _remainder(_square(power), polynomial)
        if exponent in powers and _common_factor(power ^ x, polynomial) != 1:
            return False
    return power == x


def _prime_factors(number: int) -> set[int]:
    return {p for p in range(2, number + 1) if number % p == 0 and all(p % q for q in range(2, p))}


def _square(polynomial: int) -> int:
    """Over two elements, (a + b)² = a² + b²: every exponent is doubled."""
    return int(f"{polynomial:b}", 4)


def _remainder(polynomial: int, divisor: int) -> int:
    length = divisor.bit_length()
    while (excess := polynomial.bit_length() - length) >= 0:
        polynomial ^= divisor << excess
    return polynomial


def _common_factor(one: int, other: int) -> int:
    while other:
        one, other = other, _remainder(one, other)
    return one
