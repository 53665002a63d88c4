"""How a line of `--json` is described: for docs/commands.md and for the tests."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.StrEnum):
    """What a value is."""

    TEXT = "string"
    INTEGER = "integer"
    NUMBER = "number"
    FLAG = "true or false"
    TEXTS = "list of strings"
    OBJECT = "object"
    OBJECTS = "list of objects"
    #: Keys are data: targets, ids.
    MAP = "object by name"


@dataclass(frozen=True, slots=True)
class Field:
    """A member of an object."""

    name: str
    kind: Kind
    meaning: str
    #: Members of the object, or of each object in the list; for a map, one field that describes its values.
    inside: tuple[Field, ...] = ()
    #: May be null.
    optional: bool = False
    #: A string that is one of these.
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A line of output: an object with these members."""

    title: str
    fields: tuple[Field, ...]


T, I, N, F = Kind.TEXT, Kind.INTEGER, Kind.NUMBER, Kind.FLAG  # noqa: E741
TARGET = Field("target", T, "the disk")
NOTES = Field("notes", Kind.TEXTS, "sentences for people")
MACHINE = Field("machine", T, "the machine's name")
MODES = ("full", "incremental")


def result(command: str, title: str, *fields: Field) -> Document:
    """A result of a command: what all have, and its own members."""
    head = (
        Field("type", T, "`result`", words=("result",)),
        Field("command", T, f"`{command}`", words=(command,)),
    )
    return Document(title, (*head, *fields))
