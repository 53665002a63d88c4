"""Schemas of documents, libvirt's own and ours, and documents made from them at random."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from pullback.model import xml

LIBVIRT = Path("/usr/share/libvirt/schemas")
OURS = Path(xml.__file__).parent / "schemas"
SAMPLES = Path(__file__).parent / "data" / "xml"
_RNG = "{http://relaxng.org/ns/structure/1.0}"
#: Definitions with a pattern of characters -> texts that match it.
_TEXTS = {
    "absFilePath": ["/srv/a", "/dev/vg/b – c", "/x/../y"],
    "dnsName": ["localhost", "backup-1.example.org"],
    "ipAddr": ["192.0.2.1", "2001:db8::1", "::"],
    "unsignedInt": ["0", "1", "10809", "00443"],
    "unsignedLong": ["0", "65536", "9223372036854775807"],
    "UUID": ["6ba7b8109dad11d180b400c04fd430c8", "6BA7B810-9dad-11d1-80b4-00c04fd430c8"],
    "checkpointName": ["monday", "-a.b", "1525889631", "_", "a" * 251],
}
_DISKS = ["vda", "hdc", "xvdb1", "ioemu:fda"]


def schema(name: str) -> etree.RelaxNG:
    """A schema, libvirt's own or ours."""
    return _compiled(_file(name))


def _file(name: str) -> Path:
    ours = OURS / f"{name}.rng"
    return ours if ours.exists() else _libvirts(name)


def _libvirts(name: str) -> Path:
    path = LIBVIRT / f"{name}.rng"
    if not path.exists():
        problem = f"{path} is missing: apt-get install libvirt0 (libvirt-common on Debian 13)"
        (pytest.fail if "CI" in os.environ else pytest.skip)(problem)
    return path


@functools.cache
def _compiled(path: Path) -> etree.RelaxNG:
    return etree.RelaxNG(etree.parse(path))


def complaint(text: str) -> str:
    """What the schema of a document has against it; empty if nothing."""
    root = etree.fromstring(text)
    rules = schema(str(root.tag))
    return "" if rules.validate(root) else str(rules.error_log.last_error)


class Maker:
    """Makes documents at random from the patterns of a schema."""

    def __init__(self, name: str, chance: random.Random) -> None:
        self._chance = chance
        self._count = 0
        self._definitions = _definitions(name)

    def document(self) -> etree._Element:
        """One document."""
        holder = etree.Element("holder")
        self._make(self._definitions["start"], holder)
        return holder[0]

    def _make(self, pattern: etree._Element, parent: etree._Element) -> None:
        kind = str(pattern.tag).removeprefix(_RNG)
        getattr(self, f"_make_{kind}")(pattern, parent)

    def _make_each(self, pattern: etree._Element, parent: etree._Element) -> None:
        for child in _patterns(pattern):
            self._make(child, parent)

    _make_define = _make_start = _make_group = _make_each

    def _make_interleave(self, pattern: etree._Element, parent: etree._Element) -> None:
        children = list(_patterns(pattern))
        self._chance.shuffle(children)
        for child in children:
            self._make(child, parent)

    def _make_choice(self, pattern: etree._Element, parent: etree._Element) -> None:
        self._make(self._chance.choice(list(_patterns(pattern))), parent)

    def _make_optional(self, pattern: etree._Element, parent: etree._Element) -> None:
        if self._chance.random() < 0.5:
            self._make_each(pattern, parent)

    def _make_zeroOrMore(self, pattern: etree._Element, parent: etree._Element) -> None:
        for _ in range(self._chance.choice([0, 0, 1, 3])):
            self._make_each(pattern, parent)

    def _make_oneOrMore(self, pattern: etree._Element, parent: etree._Element) -> None:
        self._make_each(pattern, parent)
        self._make_zeroOrMore(pattern, parent)

    def _make_ref(self, pattern: etree._Element, parent: etree._Element) -> None:
        name = pattern.get("name")
        if name == "diskTargetDev":
            _say(parent, self._chance.choice(_DISKS))
        elif name in _TEXTS:
            _say(parent, self._chance.choice(_TEXTS[name]))
        else:
            self._make(self._definitions[name], parent)

    def _make_element(self, pattern: etree._Element, parent: etree._Element) -> None:
        self._make_each(pattern, etree.SubElement(parent, pattern.get("name")))

    def _make_attribute(self, pattern: etree._Element, parent: etree._Element) -> None:
        holder = etree.Element("holder")
        self._make_each(pattern, holder)
        parent.set(pattern.get("name"), holder.text or self._word())

    def _make_value(self, pattern: etree._Element, parent: etree._Element) -> None:
        _say(parent, pattern.text)

    def _make_text(self, _: etree._Element, parent: etree._Element) -> None:
        _say(parent, self._word())

    def _make_grammar(self, _: etree._Element, parent: etree._Element) -> None:
        sample = etree.parse(SAMPLES / "checkpoint-told.xml").find("domain")
        assert sample is not None
        sample.tail = None
        parent.append(sample)

    def _word(self) -> str:
        # Different each time: libvirt's code refuses what its schema cannot, two labels of one model.
        self._count += 1
        return f"word{self._count}"


def _patterns(pattern: etree._Element) -> Iterator[etree._Element]:
    return (child for child in pattern if isinstance(child.tag, str))


def _say(parent: etree._Element, text: str) -> None:
    parent.text = text


@functools.cache
def _definitions(name: str) -> dict[str, etree._Element]:
    """All definitions that a schema sees, its own first."""
    found: dict[str, etree._Element] = {}
    waiting = [_libvirts(name)]
    while waiting:
        root = etree.parse(waiting.pop()).getroot()
        for entry in _patterns(root):
            found.setdefault(entry.get("name", "start"), entry)
        waiting += [LIBVIRT / include.get("href") for include in root.findall(f"{_RNG}include")]
    return found
