"""`domainblocksnapshot` as XML; form, rules and our reading are in `pullback.model.documents.snapshot`."""

from __future__ import annotations

from pullback.model.documents.fields import Place
from pullback.model.documents.snapshot import ROOT, SnapshotDocument, from_dict, to_dict
from pullback.model.xml import source
from pullback.model.xml.shapes import Kind, Many, Shape, Sole, Text, printed, read, write

_FLEECE = Shape(attributes={"file": Kind.TEXT})
_DISK = Shape(
    attributes={"name": Kind.TEXT, "type": Kind.TEXT},
    parts={"fleece": Sole(key="fleece", shape=_FLEECE, inner="file")},
)
_SHAPE = Shape(parts={"name": Text(key="name"), "disk": Many(key="disks", shape=_DISK)})


def parse(text: bytes | str) -> SnapshotDocument:
    """The document in `text`. Raises `BadDocument`, and nothing else, for whatever is wrong with it."""
    return from_dict(read(source.root(text, ROOT), _SHAPE, Place(document=ROOT)))


def serialise(document: SnapshotDocument) -> str:
    """The document as XML, which reads back equal; `BadDocument` if its values break a rule."""
    return printed(write(ROOT, to_dict(from_dict(to_dict(document))), _SHAPE))
