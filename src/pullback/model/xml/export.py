"""`domainblockexport` as XML; form, rules and our reading are in `pullback.model.documents.export`."""

from __future__ import annotations

from pullback.model.documents.export import ROOT, ExportDocument, from_dict, to_dict
from pullback.model.documents.fields import Place
from pullback.model.xml import source
from pullback.model.xml.shapes import Kind, Many, One, Shape, printed, read, write

_ADDRESS = Shape(
    attributes={
        "type": Kind.TEXT,
        "host": Kind.TEXT,
        "port": Kind.NUMBER,
        "autoport": Kind.YES_NO,
        "socket": Kind.TEXT,
        "tls": Kind.YES_NO,
    }
)
_DISK = Shape(
    attributes={
        "name": Kind.TEXT,
        "exportname": Kind.TEXT,
        "snapshot": Kind.TEXT,
        "checkpoint": Kind.TEXT,
        "allcheckpoints": Kind.YES_NO,
        "readonly": Kind.YES_NO,
    }
)
_SHAPE = Shape(
    attributes={"type": Kind.TEXT},
    parts={"address": One(key="address", shape=_ADDRESS), "disk": Many(key="disks", shape=_DISK)},
)


def parse(text: bytes | str) -> ExportDocument:
    """The document in `text`. Raises `BadDocument`, and nothing else, for whatever is wrong with it."""
    return from_dict(read(source.root(text, ROOT), _SHAPE, Place(document=ROOT)))


def serialise(document: ExportDocument) -> str:
    """The document as XML, which reads back equal; `BadDocument` if its values break a rule."""
    return printed(write(ROOT, to_dict(from_dict(to_dict(document))), _SHAPE))
