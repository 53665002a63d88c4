"""Elements to the JSON form and back, by a table of what each element may hold.

A `Shape` is such a table. Reading refuses what is not in it: libvirt applies its schema to every
backup and checkpoint document that it takes (since these exist), so what it would refuse is refused
here too, by name; a misspelt element never silently changes a backup. Order among elements does not
matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from lxml import etree

from pullback.errors import BadDocument
from pullback.model.documents.fields import Place, label, quoted
from pullback.model.xml.source import elements, text_of

_NUMBER = re.compile(r"[0-9]{1,30}", re.ASCII)
_BLANK = " \t\r\n"


class Kind(Enum):
    """What a text in XML is in JSON."""

    TEXT = "text"
    NUMBER = "whole number"
    YES_NO = "yes or no"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """`<incremental>monday</incremental>`: a key with the element's text."""

    key: str
    kind: Kind = Kind.TEXT
    #: An element without text says nothing (libvirt reads it so); otherwise the text is just empty.
    may_be_empty: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """`<label>a</label><label>b</label>`: a key with a list of texts."""

    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class One:
    """`<server …/>`: a key with one object."""

    key: str
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Many:
    """`<disk …/><disk …/>`: a key with a list of objects."""

    key: str
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapped:
    """`<disks><disk …/></disks>`: a key with a list of objects, of which there is one at least."""

    key: str
    tag: str
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Sole:
    """`<driver type='qcow2'/>` or `<parent><name>x</name></parent>`: a key with the one text in there."""

    key: str
    #: With the one attribute or the one child.
    shape: Shape
    #: The key that stands for it in that shape.
    inner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verbatim:
    """`<domain>…</domain>`: a key with the element's own text, which is not judged."""

    key: str


Part = Text | Texts | One | Many | Wrapped | Sole | Verbatim


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What an element may hold; attributes have their own names as keys."""

    attributes: Mapping[str, Kind] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)


# -- reading ---------------------------------------------------------------------------------


def read(element: etree._Element, shape: Shape, place: Place) -> dict[str, object]:
    """The JSON form of an element."""
    _refuse_text(element, place)
    values = _attributes(element, shape, place)
    seen: set[str] = set()
    for child in elements(element):
        tag = str(child.tag)
        part = shape.parts.get(tag)
        if part is None:
            raise _unknown(child, place)
        if tag in seen and not isinstance(part, Many | Texts):
            raise place.at(part.key).bad("stands twice")
        seen.add(tag)
        _read_part(child, part, place, values)
    return values


def _refuse_text(element: etree._Element, place: Place) -> None:
    if text_of(element).strip(_BLANK) or any(child.tag is etree.Entity for child in element):
        raise place.bad("has text where none belongs")


def _attributes(element: etree._Element, shape: Shape, place: Place) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, text in element.attrib.items():
        name = str(key)
        kind = shape.attributes.get(name)
        if kind is None:
            raise place.bad(f"has an attribute that is unknown there: {quoted(name)}")
        values[name] = _value(str(text), kind, place.at(name))
    return values


def _value(text: str, kind: Kind, place: Place) -> object:
    if kind is Kind.NUMBER:
        if not _NUMBER.fullmatch(text):
            raise place.bad("is no whole number")
        return int(text)
    if kind is Kind.YES_NO:
        if text not in ("yes", "no"):
            raise place.bad("is neither yes nor no")
        return text == "yes"
    return text


def _read_part(child: etree._Element, part: Part, place: Place, values: dict[str, object]) -> None:
    """Put what a child says under its key."""
    here = place.at(part.key)
    match part:
        case Text():
            values.update(_read_text(child, part, here))
        case Texts():
            _list(values, part.key).append(_only_text(child, here))
        case One():
            values[part.key] = read(child, part.shape, here)
        case Many():
            found = _list(values, part.key)
            found.append(read(child, part.shape, _item(child, part.key, len(found), place)))
        case Wrapped():
            values[part.key] = _read_wrapped(child, part, place)
        case Sole():
            values[part.key] = _read_sole(child, part, here)
        case Verbatim():
            values[part.key] = verbatim(child)


def _list(values: dict[str, object], key: str) -> list[object]:
    found = values.setdefault(key, [])
    assert isinstance(found, list)
    return found


def _item(child: etree._Element, key: str, index: int, place: Place) -> Place:
    return place.item(key, label({"name": child.get("name")}, index))


def _read_text(child: etree._Element, part: Text, place: Place) -> dict[str, object]:
    text = _only_text(child, place)
    if not text and part.may_be_empty:
        return {}
    return {part.key: _value(text, part.kind, place)}


def _only_text(child: etree._Element, place: Place) -> str:
    if child.attrib or any(isinstance(inner.tag, str) or inner.tag is etree.Entity for inner in child):
        raise place.bad("holds more than text")
    return text_of(child)


def _read_wrapped(child: etree._Element, part: Wrapped, place: Place) -> list[dict[str, object]]:
    here = place.at(part.key)
    _refuse_text(child, here)
    _attributes(child, Shape(), here)
    found: list[dict[str, object]] = []
    for item in elements(child):
        if item.tag != part.tag:
            raise _unknown(item, here)
        found.append(read(item, part.shape, _item(item, part.key, len(found), place)))
    if not found:
        raise here.bad("is empty")
    return found


def _unknown(child: etree._Element, place: Place) -> BadDocument:
    return place.bad(f"has an element that is unknown there: {quoted(str(child.tag))}")


def _read_sole(child: etree._Element, part: Sole, place: Place) -> object:
    values = read(child, part.shape, place)
    if part.inner not in values:
        raise place.bad("is incomplete")
    return values[part.inner]


def verbatim(element: etree._Element) -> str:
    """An element's own text."""
    text: str = etree.tostring(element, encoding="unicode", with_tail=False)
    return text


# -- writing ---------------------------------------------------------------------------------


def write(tag: str, values: Mapping[str, object], shape: Shape) -> etree._Element:
    """The element that the JSON form stands for; `values` passed `from_dict` before."""
    element = etree.Element(tag)
    for name, kind in shape.attributes.items():
        if name in values:
            element.set(name, _text(values[name], kind))
    for child_tag, part in shape.parts.items():
        if part.key in values:
            element.extend(_write_part(child_tag, part, values[part.key]))
    return element


def _text(value: object, kind: Kind) -> str:
    if kind is Kind.YES_NO:
        return "yes" if value else "no"
    return str(value)


def _write_part(tag: str, part: Part, value: object) -> list[etree._Element]:
    match part:
        case Text():
            return [_texted(tag, _text(value, part.kind))]
        case Texts():
            return [_texted(tag, str(text)) for text in _sequence(value)]
        case One():
            return [write(tag, _object(value), part.shape)]
        case Many():
            return [write(tag, _object(item), part.shape) for item in _sequence(value)]
        case Wrapped():
            wrapper = etree.Element(tag)
            wrapper.extend(write(part.tag, _object(item), part.shape) for item in _sequence(value))
            return [wrapper]
        case Sole():
            return [write(tag, {part.inner: value}, part.shape)]
        case Verbatim():
            return []


def _texted(tag: str, text: str) -> etree._Element:
    element = etree.Element(tag)
    element.text = text
    return element


def _sequence(value: object) -> Sequence[object]:
    assert isinstance(value, list)
    return value


def _object(value: object) -> Mapping[str, object]:
    assert isinstance(value, dict)
    return value


def printed(root: etree._Element, verbatims: Sequence[etree._Element] = ()) -> str:
    """The text of a document, indented by two spaces; `verbatims` come last in it, as they are."""
    etree.indent(root)
    for element in verbatims:
        _append(root, element)
    text: str = etree.tostring(root, encoding="unicode")
    return text + "\n"


def _append(root: etree._Element, element: etree._Element) -> None:
    if len(root):
        root[-1].tail = "\n  "
    else:
        root.text = "\n  "
    element.tail = "\n"
    root.append(element)
