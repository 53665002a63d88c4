"""`domaincheckpoint` as XML.

    <domaincheckpoint>
      <name>monday</name>
      <description>before the upgrade</description>
      <parent>
        <name>sunday</name>
      </parent>
      <creationTime>1525889631</creationTime>
      <disks>
        <disk name='vda' checkpoint='bitmap' bitmap='monday' size='65536'/>
        <disk name='vdb' checkpoint='no'/>
      </disks>
      <domain type='kvm'>…</domain>
    </domaincheckpoint>

`domain` is kept as it is, down to its comments and white space (its canonical form, C14N, is the
same; quotes, and where name spaces stand among attributes, are the XML library's). The rules are in
`pullback.model.documents.checkpoint`.
"""

from __future__ import annotations

from lxml import etree

from pullback.model.documents.checkpoint import ROOT, CheckpointDocument, from_dict, to_dict
from pullback.model.documents.fields import Place
from pullback.model.xml import source
from pullback.model.xml.shapes import Kind, Shape, Sole, Text, Verbatim, Wrapped, printed, read, write

_DOMAIN = "domain"
_DISK = Shape(
    attributes={"name": Kind.TEXT, "checkpoint": Kind.TEXT, "bitmap": Kind.TEXT, "size": Kind.NUMBER},
)
_NAME = Shape(parts={"name": Text(key="name")})
_SHAPE = Shape(
    parts={
        "name": Text(key="name"),
        "description": Text(key="description", may_be_empty=True),
        "parent": Sole(key="parent", shape=_NAME, inner="name"),
        "creationTime": Text(key="creation_time", kind=Kind.NUMBER),
        "disks": Wrapped(key="disks", tag="disk", shape=_DISK),
        _DOMAIN: Verbatim(key="domain"),
    },
)


def parse(text: bytes | str) -> CheckpointDocument:
    """The document in `text`. Raises `BadDocument`, and nothing else, for whatever is wrong with it."""
    return from_dict(read(source.root(text, ROOT), _SHAPE, Place(document=ROOT)))


def serialise(document: CheckpointDocument, *, domain: bool = True) -> str:
    """The document as XML, which reads back equal; without the machine's description unless `domain`.

    Raises `BadDocument` if its values break a rule, among them a domain that is no such element.
    """
    document = from_dict(to_dict(document))
    inner = [_domain(document.domain)] if domain and document.domain is not None else []
    text = printed(write(ROOT, to_dict(document), _SHAPE), inner)
    # What is written can be read: description and domain together have the limit of a document.
    source.root(text, ROOT)
    return text


def _domain(text: str) -> etree._Element:
    place = Place(document=ROOT).at(_DOMAIN)
    element = source.read(text, place)
    if element.tag != _DOMAIN:
        raise place.bad("is no domain element")
    return element
