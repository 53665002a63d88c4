"""Reading XML text that may be hostile.

What is refused, always with `BadDocument`: more than 4 MiB; another encoding than UTF-8, UTF-16,
ISO-8859-1 or ASCII; a document type declaration, and with it every entity and external reference
(so entity bombs never reach the parser); a tag of more than 64 KiB or 256 attributes; elements deeper than 100; text
that is not well-formed.
Nothing is ever fetched. Comments, processing instructions and CDATA are fine.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

from lxml import etree

from pullback.model.documents.fields import Place, quoted
from pullback.units import KiB, MiB

#: Bytes (or characters) of a document. A domain with a hundred disks has about 100 KiB.
MAX_SIZE = 4 * MiB
#: Elements within each other. libvirt's own documents have about ten.
MAX_DEPTH = 100
#: Characters of a tag. An export's longest name, all of it in character references, is half as long.
MAX_TAG = 64 * KiB
#: Attributes of an element. libvirt's own have a dozen at most.
MAX_ATTRIBUTES = 256

#: Bytes of a parser's complaint that are shown.
_SHOWN = 200
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
#: The first character of a document without a byte order mark (XML 1.0, appendix F).
_STARTS = ((b"<\0", "utf-16-le"), (b"\0<", "utf-16-be"))
_DECLARED = re.compile(rb"""<\?xml[ \t\r\n][^>]{0,100}?encoding[ \t\r\n]*=[ \t\r\n]*["']([A-Za-z0-9._-]{1,40})["']""")
#: Sections in which mark-up has no meaning, by how they begin and end.
_SECTIONS = (("<!--", "-->"), ("<![CDATA[", "]]>"), ("<?", "?>"))
# A tag, with `>` allowed in quotes. Possessive, so that a bad one costs one pass.
_TAG = re.compile(r"""<(?:[^<>"']|"[^"<]*"|'[^'<]*')*+>""")
_QUOTED = re.compile(r""""[^"]*"|'[^']*'""")
_ENCODINGS = {"utf-8": "utf-8", "iso8859-1": "iso8859-1", "ascii": "ascii"}


def read(text: bytes | str, place: Place) -> etree._Element:
    """The root element of a document; `place` is what messages are about."""
    if len(text) > MAX_SIZE:
        raise place.bad(f"is longer than {MAX_SIZE} bytes")
    characters = text if isinstance(text, str) else _decoded(text, place)
    _screen(characters, place)
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


def _screen(text: str, place: Place) -> None:
    """Refuse what the parser should not see at all; one pass over the mark-up, whatever it is.

    Without it libxml2 2.9 takes quadratic time for `--` in comments (minutes for 2 MiB) and for the
    attributes of one element (27 s), and so does lxml for the latter.
    """
    position = 0
    while (position := text.find("<", position)) >= 0:
        position = _end(text, position, place)


def _end(text: str, start: int, place: Place) -> int:
    """Where the mark-up that begins at `start` ends."""
    for opening, closing in _SECTIONS:
        if text.startswith(opening, start):
            return _section_end(text, start + len(opening), closing, place)
    if text.startswith("<!", start):
        raise place.bad("has a document type declaration (DOCTYPE), which is never allowed")
    tag = _TAG.match(text, start)
    if tag is None:
        raise place.bad("is no well-formed XML (a tag does not end)")
    _check_tag(tag[0], place)
    return tag.end()


def _check_tag(tag: str, place: Place) -> None:
    if len(tag) > MAX_TAG:
        raise place.bad(f"has a tag of more than {MAX_TAG} characters")
    if len(tag) > MAX_ATTRIBUTES and len(_QUOTED.findall(tag)) > MAX_ATTRIBUTES:
        raise place.bad(f"has a tag with more than {MAX_ATTRIBUTES} attributes")


def _section_end(text: str, start: int, closing: str, place: Place) -> int:
    # In a comment `--` alone is an error already (XML 1.0, section 2.5).
    end = text.find("--" if closing == "-->" else closing, start)
    if end < 0 or not text.startswith(closing, end):
        raise place.bad(f"is no well-formed XML (there is no {closing} where one belongs)")
    return end + len(closing)


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
        # Not only useless here: with many `xml:id` it takes quadratic time.
        collect_ids=False,
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
