"""What libvirt's own schemas accept is accepted, and what is printed they accept.

The documents come from the schemas themselves: a small generator walks the RELAX NG patterns and
makes documents at random, so that no reading of ours stands between.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from pullback import errors
from pullback.model.xml import backup, checkpoint, export, snapshot
from xmlkit import SAMPLES, Maker, complaint, schema

_ROOMS: dict[str, ModuleType] = {
    "backup": backup,
    "checkpoint": checkpoint,
    "snapshot": snapshot,
    "export": export,
}

# -- our samples -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.xml")), ids=lambda path: str(path.stem))
def test_a_sample_is_accepted_by_schema_and_reader_and_so_is_what_is_printed(path: Path) -> None:
    room = _ROOMS[path.stem.split("-")[0]]
    text = path.read_bytes()
    assert complaint(text.decode().removeprefix('<?xml version="1.0" encoding="UTF-8"?>\n')) == ""
    found = room.parse(text)
    printed = room.serialise(found)
    assert complaint(printed) == ""
    assert room.parse(printed) == found


# -- documents made from a schema ------------------------------------------------------------


@pytest.mark.parametrize("name", ["domainbackup", "domaincheckpoint"])
@settings(max_examples=150)
@given(seed=st.integers(0, 2**64))
def test_what_libvirts_schema_allows_is_read_and_printed_again(name: str, seed: int) -> None:
    room = _ROOMS[name.removeprefix("domain")]
    text = etree.tostring(Maker(name, random.Random(seed)).document(), encoding="unicode")
    assert complaint(text) == ""
    found = room.parse(text)
    printed = room.serialise(found)
    assert complaint(printed) == ""
    assert room.parse(printed) == found


def test_the_maker_makes_every_element_and_attribute_of_the_schema() -> None:
    seen: set[str] = set()
    for seed in range(300):
        for element in Maker("domainbackup", random.Random(seed)).document().iter():
            seen |= {str(element.tag), *(f"{element.tag}@{key}" for key in element.attrib)}
    assert {"label", "ivgen@hash", "cipher@mode", "secret@uuid", "scratch@dev", "target@dev", "server@socket"} <= seen
    assert {"disk@exportbitmap", "disk@incremental", "incremental", "seclabel@labelskip", "driver@type"} <= seen


# -- and what it refuses ---------------------------------------------------------------------

#: Refusals of ours where the schema has no objection, each because libvirt, Linux or QEMU would refuse later.
_NARROWER = re.compile(
    r"no checkpoint's name|no absolute path|is longer than|character that is not allowed|is empty|stands twice"
    r"|no whole number|is none of|neither yes nor no|more than 251 characters|neither a host's name|disk's target"
    r"|no UUID|is not (luks|qemu)|text where none belongs"
)
#: Elements and attributes that only a later libvirt, or only its output, or only we have.
_WIDER = re.compile(r"transport=\"fd\"| index=\"")


@settings(max_examples=300)
@given(seed=st.integers(0, 2**64), name=st.sampled_from(["domainbackup", "domaincheckpoint"]))
def test_a_document_with_a_change_is_judged_as_libvirts_schema_judges_it(seed: int, name: str) -> None:
    chance = random.Random(seed)
    root = Maker(name, chance).document()
    _disturb(root, chance)
    text = etree.tostring(root, encoding="unicode")
    allowed = complaint(text) == "" if root.tag == name else False
    room = _ROOMS[name.removeprefix("domain")]
    printed, problem = _judged(room, text)
    assert not (allowed and problem) or _NARROWER.search(problem), (problem, text)
    assert problem or complaint(printed) == "" or _may_be_wider(printed), (complaint(printed), text)


def _judged(room: ModuleType, text: str) -> tuple[str, str]:
    """What is printed of a document, or why it is refused."""
    try:
        return room.serialise(room.parse(text)), ""
    except errors.BadDocument as error:
        return "", error.problem


def _may_be_wider(printed: str) -> bool:
    # Disks of other buses; a pull without a server, which `effective` refuses.
    names = re.findall(r"<disk name=\"([^\"]*)\"", printed)
    foreign = not all(re.fullmatch(r"(ioemu:)?(fd|hd|sd|vd|xvd|ubd)[a-zA-Z0-9_]+|/.+", name) for name in names)
    return bool(_WIDER.search(printed)) or foreign or "<server" not in printed


def _disturb(root: etree._Element, chance: random.Random) -> None:
    """Change one thing: take an element or attribute away, double it, rename it, move it, or give it another text."""
    places = [element for element in root.iter() if isinstance(element.tag, str) and "domain" not in _path(element)]
    element = chance.choice(places)
    other = chance.choice(places)
    match chance.randrange(6):
        case 0 if element is not root:
            element.getparent().remove(element)
        case 1 if element is not root:
            element.addnext(etree.fromstring(etree.tostring(element, with_tail=False)))
        case 2:
            element.tag = str(other.tag)
        case 3:
            element.attrib.update(other.attrib)
        case 4 if element.attrib:
            del element.attrib[chance.choice(list(element.attrib))]
        case _:
            _other_text(element, chance)


def _other_text(element: etree._Element, chance: random.Random) -> None:
    text = chance.choice(["", " ", "yes", "no", "push", "full", "fd", "-1", "relative", "C:\\x", "/", " a ", "..", "ä"])
    if element.attrib:
        element.set(chance.choice(list(element.attrib)), text)
    else:
        element.text = text


def _path(element: etree._Element) -> list[str]:
    return [str(above.tag) for above in element.iterancestors()] + [str(element.tag)]


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("<domainblocksnapshot><disk name='vda'/><name>a</name><disk name='/b'/></domainblocksnapshot>", True),
        ("<domainblocksnapshot><name>a</name></domainblocksnapshot>", False),
        ("<domainblocksnapshot><disk name='vda' type='block'/></domainblocksnapshot>", False),
        ("<domainblocksnapshot><disk name='vda'><fleece file='a'/></disk></domainblocksnapshot>", False),
        ("<domainblockexport type='nbd'><disk name='vda'/><address host='::1' port='0'/></domainblockexport>", True),
        ("<domainblockexport><address host='::1'/></domainblockexport>", False),
        ("<domainblockexport><disk name='vda'/><address type='unix' host='a'/></domainblockexport>", False),
        ("<domainblockexport><disk name='vda' readonly='true'/></domainblockexport>", False),
    ],
)
def test_our_own_schemas_and_readers_agree(text: str, ok: bool) -> None:
    root = etree.fromstring(text)
    room = _ROOMS[str(root.tag).removeprefix("domainblock")]
    assert schema(str(root.tag)).validate(root) is ok
    if ok:
        room.parse(text)
    else:
        with pytest.raises(errors.BadDocument):
            room.parse(text)
