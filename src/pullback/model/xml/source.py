"""Reading XML text that may be hostile.

What is refused, always with `BadDocument`: more than 4 MiB; another encoding than UTF-8, UTF-16,
ISO-8859-1 or ASCII; a document type declaration, and with it every entity and external reference
(so entity bombs never reach the parser); elements deeper than 100; text that is not well-formed.
Nothing is ever fetched. Comments, processing instructions and CDATA are fine.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

from lxml import etree

from pullback.model.documents.fields import Place, quoted
from pullback.units import MiB

#: Bytes (or characters) of a document. A domain with a hundred disks has about 100 KiB.
MAX_SIZE = 4 * MiB
#: Elements within each other. libvirt's own documents have about ten.
MAX_DEPTH = 100

#: Bytes of a parser's complaint that are shown.
_SHOWN = 200
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
#: The first character of a document without a byte order mark (XML 1.0, appendix F).
_STARTS = ((b"<\0", "utf-16-le"), (b"\0<", "utf-16-be"))
_DECLARED = re.compile(rb"""<\?xml[ \t\r\n][^>]{0,100}?encoding[ \t\r\n]*=[ \t\r\n]*["']([A-Za-z0-9._-]{1,40})["']""")
_ENCODINGS = {"utf-8": "utf-8", "iso8859-1": "iso8859-1", "ascii": "ascii"}


def read(text: bytes | str, place: Place) -> etree._Element:
    """The root element of a document; `place` is what messages are about."""
    if len(text) > MAX_SIZE:
        raise place.bad(f"is longer than {MAX_SIZE} bytes")
    characters = text if isinstance(text, str) else _decoded(text, place)
    if _declares_type(characters):
        raise place.bad("has a document type declaration (DOCTYPE), which is never allowed")
    root = _parsed(characters, place)
    _check_depth(root, place)
    return root


def root(text: bytes | str, tag: str) -> etree._Element:
    """The root element of a document of the kind `tag`."""
    place = Place(document=tag)
    found = read(text, place)
    if found.tag != tag:
        raise place.bad(f"begins with {quoted(str(found.tag))}")
    return found


def _decoded(text: bytes, place: Place) -> str:
    try:
        return _unmarked(text, place)
    except UnicodeError:
        raise place.bad("is not in the encoding that it declares (UTF-8 by default)") from None


def _unmarked(text: bytes, place: Place) -> str:
    for mark, encoding in _BOMS:
        if text.startswith(mark):
            return text[len(mark) :].decode(encoding)
    for start, encoding in _STARTS:
        if text.startswith(start):
            return text.decode(encoding)
    declared = _DECLARED.match(text)
    return text.decode(_encoding(declared[1].decode(), place) if declared else "utf-8")


def _encoding(name: str, place: Place) -> str:
    try:
        return _ENCODINGS[codecs.lookup(name).name]
    except LookupError:
        raise place.bad(f"has an encoding that is not read: {quoted(name)}") from None


def _declares_type(text: str) -> bool:
    """Is there a DOCTYPE? It can only stand before the root element, among comments and instructions."""
    position = 0
    while (position := text.find("<", position)) >= 0:
        for opening, closing in (("<!--", "-->"), ("<?", "?>")):
            if text.startswith(opening, position):
                end = text.find(closing, position + len(opening))
                break
        else:
            return text.startswith("<!", position)
        if end < 0:
            return False
        position = end
    return False


def _parsed(text: str, place: Place) -> etree._Element:
    # The encoding given here overrules the declared one: the text was decoded already. libxml2's own
    # limits (`huge_tree`) stay on.
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        attribute_defaults=False,
        huge_tree=False,
    )
    try:
        return etree.fromstring(text.encode("utf-8"), parser)
    except (etree.XMLSyntaxError, UnicodeError, ValueError) as error:
        raise place.bad(f"is no well-formed XML ({quoted(str(error)[:_SHOWN])})") from error


def _check_depth(root: etree._Element, place: Place) -> None:
    level = [root]
    for _ in range(MAX_DEPTH):
        level = [child for element in level for child in element]
        if not level:
            return
    raise place.bad(f"has more than {MAX_DEPTH} elements within each other")


def elements(parent: etree._Element) -> Iterator[etree._Element]:
    """The child elements, without comments, instructions and the like."""
    return (child for child in parent if isinstance(child.tag, str))


def text_of(element: etree._Element) -> str:
    """All text directly in an element; comments and instructions in it are passed over."""
    return (element.text or "") + "".join(child.tail or "" for child in element)
