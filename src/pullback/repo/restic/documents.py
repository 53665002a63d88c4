"""JSON as restic writes and reads it: compact, and checked field by field before it is believed.

Go's encoder escapes <, > and & in texts, so that JSON can stand in HTML; so do we, to give the same
bytes. What is read may have any form: every value is checked for its type and its range.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from pullback import errors
from pullback.repo.restic.types import ID, Buffer

#: Characters of a text in a document (a path may be PATH_MAX long, tags are shorter).
MAX_TEXT = 1 << 16
#: Entries of a list of texts or ids, where nothing else bounds it.
MAX_LIST = 1 << 20

T = TypeVar("T")

_ID = re.compile(r"[0-9a-f]{64}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_INTEGER = (1 << 64) - 1
_HTML = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_IN_HTML = re.compile("[<>&\u2028\u2029]")


def dump(value: object) -> bytes:
    """`value` as Go's encoder writes it, without an end of line. Fields keep their order."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _IN_HTML.sub(lambda match: _HTML[match[0]], text).encode("utf-8", "replace")


def load(data: Buffer, where: str) -> Fields:
    """The JSON object in `data`. Raises `RepositoryDamaged` (its file is `where`) if it is none."""
    try:
        value = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise errors.RepositoryDamaged(file=where, problem="it is no JSON document") from error
    return Fields(value, where)


class Fields:
    """An object of a document. Every getter raises `RepositoryDamaged` if the field is not what it must be.

    A field that is absent or null gives `default`, if one is given.
    """

    __slots__ = ("_value", "where")

    def __init__(self, value: object, where: str) -> None:
        """`value` must be a JSON object."""
        self.where = where
        if not isinstance(value, dict):
            self.fail("an object is expected")
        self._value: dict[str, Any] = value

    def fail(self, problem: str) -> NoReturn:
        """Say what is wrong with the document."""
        raise errors.RepositoryDamaged(file=self.where, problem=problem)

    def text(self, name: str, default: str | None = None) -> str:
        """A text."""
        return self._typed(name, str, default, self._short)

    def integer(self, name: str, default: int | None = None, *, most: int = _MAX_INTEGER, least: int = 0) -> int:
        """A whole number between `least` and `most`."""
        return self._typed(name, int, default, lambda value: least <= value <= most)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        return self._typed(name, bool, default, lambda value: True)

    def identifier(self, name: str, default: str | None = None) -> str:
        """An id: 64 digits of lower case hex."""
        return self._typed(name, str, default, lambda value: bool(_ID.fullmatch(value)))

    def list(self, name: str, default: list[Any] | None = None, *, most: int = MAX_LIST) -> list[Any]:
        """A list of anything."""
        return self._typed(name, list, default, lambda value: len(value) <= most)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; empty if it is absent or null."""
        found = self.list(name, [])
        if not all(isinstance(entry, str) and self._short(entry) for entry in found):
            self.fail(f"{name} is no list of texts")
        return tuple(found)

    def object(self, name: str) -> Fields:
        """An object inside."""
        return Fields(self._value.get(name), self.where)

    def others(self, known: frozenset[str]) -> dict[str, Any]:
        """The fields that are not `known`, as they are."""
        return {name: value for name, value in self._value.items() if name not in known}

    def _typed(self, name: str, kind: type[T], default: T | None, fits: Callable[[T], bool]) -> T:
        value = self._value.get(name)
        if value is None and default is not None:
            return default
        # bool is a subclass of int: `type`, not `isinstance`.
        if type(value) is not kind or not fits(value):
            self.fail(f"its field {name} is missing or impossible")
        return value

    @staticmethod
    def _short(value: str) -> bool:
        # Half a surrogate pair is no text: it could not be printed, nor written again.
        return len(value) <= MAX_TEXT and (value.isascii() or not _SURROGATE.search(value))


def is_id(text: object) -> bool:
    """Is it an id as documents have it?"""
    return isinstance(text, str) and bool(_ID.fullmatch(text))


def join_ids(texts: list[Any]) -> bytes:
    """The ids in a list, as bytes one after another. Raises `ValueError` if one of them is none."""
    if not set(map(type, texts)) <= {str} or not set(map(len, texts)) <= {2 * ID}:
        raise ValueError("not an id")
    joined = "".join(texts)
    ids = bytes.fromhex(joined)
    if ids.hex() != joined:  # blanks, which fromhex skips, or capitals
        raise ValueError("not an id")
    return ids
