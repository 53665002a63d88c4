"""Reading the JSON form: one object's keys, each taken once and checked; and writing it.

In the JSON form a key that is absent, or null, means "not said". Texts are strings, sizes and times
whole numbers, yes and no are true and false. Unknown keys are refused: a misspelt key must not
silently change a backup.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import TypeVar

from pullback.errors import BadDocument
from pullback.model.texts import showable

#: The highest whole number in a document: libvirt reads times and sizes as signed 64 bit.
MAX_INTEGER = (1 << 63) - 1
#: Characters of an unknown name that a message repeats.
_SHOWN = 80
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_E = TypeVar("_E", bound=StrEnum)
_T = TypeVar("_T")
#: What is wrong with a text, or None if nothing is.
Rule = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place in a document, for messages: `disks[vda].target.file`."""

    #: The root element's name.
    document: str
    path: str = ""

    def at(self, key: str) -> Place:
        """The place of `key` in here."""
        return Place(document=self.document, path=f"{self.path}.{key}" if self.path else key)

    def item(self, key: str, label: str) -> Place:
        """The place of one thing in the list `key`."""
        return self.at(f"{key}[{label}]")

    def bad(self, problem: str) -> BadDocument:
        """The error that says so of this place."""
        field = showable(self.path) or "the document"
        return BadDocument(document=self.document, field=field, problem=problem)


def quoted(text: str) -> str:
    """A hostile text, short and harmless, in quotes."""
    return f"{showable(text[:_SHOWN])!r}"


def label(value: object, index: int) -> str:
    """How messages call the item of a list: by its name if it has a plain one, else by its number from 0."""
    name = value.get("name") if isinstance(value, dict) else None
    return name if isinstance(name, str) and _LABEL.fullmatch(name) else str(index)


class Fields:
    """The keys of one JSON object; `end` refuses what nobody took."""

    def __init__(self, values: object, place: Place) -> None:
        if not isinstance(values, dict):
            raise place.bad("is no object")
        self._values: dict[object, object] = values
        self._left = {key for key, value in values.items() if value is not None}
        self.place = place

    def bad(self, key: str, problem: str) -> BadDocument:
        """The error that says so of `key`."""
        return self.place.at(key).bad(problem)

    def has(self, key: str) -> bool:
        """Is something said of `key`?"""
        return self._values.get(key) is not None

    def end(self) -> None:
        """Refuse keys that nobody took."""
        for key in self._left:
            raise self.bad(str(key)[:_SHOWN], "is unknown there")

    def need(self, key: str, value: _T | None) -> _T:
        """`value`, which was read from `key` and must be there."""
        if value is None:
            raise self.bad(key, "is missing")
        return value

    def flag(self, key: str) -> bool | None:
        """True or false."""
        value = self._take(key)
        if value is None or isinstance(value, bool):
            return value
        raise self.bad(key, "is neither true nor false")

    def integer(self, key: str, high: int = MAX_INTEGER) -> int | None:
        """A whole number from 0 to `high`."""
        value = self._take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
            raise self.bad(key, f"is no whole number from 0 to {high}")
        return value

    def text(self, key: str, rule: Rule) -> str | None:
        """A text that `rule` allows."""
        value = self._take(key)
        return None if value is None else _checked(value, rule, self.place.at(key))

    def choice(self, key: str, kind: type[_E]) -> _E | None:
        """One of the words of `kind`."""
        value = self._take(key)
        if value is None:
            return None
        words = [member.value for member in kind]
        if not isinstance(value, str) or value not in words:
            raise self.bad(key, f"is none of {', '.join(words)}")
        return kind(value)

    def word(self, key: str, only: str) -> None:
        """The word `only`, if anything."""
        value = self._take(key)
        if value is not None and value != only:
            raise self.bad(key, f"is not {only}")

    def inner(self, key: str) -> Fields | None:
        """The object at `key`."""
        value = self._take(key)
        return None if value is None else Fields(value, self.place.at(key))

    def items(self, key: str) -> list[Fields]:
        """The objects of the list at `key`; empty if there is none."""
        return [Fields(value, self.place.item(key, label(value, index))) for index, value in self._list(key)]

    def texts(self, key: str, rule: Rule) -> tuple[str, ...]:
        """The texts of the list at `key`; empty if there is none."""
        return tuple(_checked(value, rule, self.place.item(key, str(index))) for index, value in self._list(key))

    def _list(self, key: str) -> Iterable[tuple[int, object]]:
        value = self._take(key)
        if value is not None and not isinstance(value, list):
            raise self.bad(key, "is no list")
        return enumerate(value or [])

    def _take(self, key: str) -> object:
        self._left.discard(key)
        return self._values.get(key)


def _checked(value: object, rule: Rule, place: Place) -> str:
    if not isinstance(value, str):
        raise place.bad("is no text")
    problem = rule(value)
    if problem:
        raise place.bad(problem)
    return value


def plain(value: object) -> dict[str, object]:
    """A value (a dataclass) as JSON: its fields by name, without those that say nothing."""
    if not dataclasses.is_dataclass(value):
        raise TypeError(f"{value!r} is no dataclass")
    pairs = ((field.name, _plain(getattr(value, field.name))) for field in dataclasses.fields(value))
    return {name: given for name, given in pairs if given is not None}


def _plain(value: object) -> object:
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value] or None
    return plain(value) if dataclasses.is_dataclass(value) else value
