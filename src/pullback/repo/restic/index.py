"""Index files: which blob lies where in which pack ("Indexing").

    {"packs": [{"id": …, "blobs": [{"id": …, "type": "data", "offset": 0, "length": 38,
                                    "uncompressed_length": 511}, …]}, …]}

`uncompressed_length` is there for compressed blobs only. `supersedes` names files that this one
replaced; who replaces them deletes them too, so readers need not act on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pullback.repo.restic import documents
from pullback.repo.restic.types import OVERHEAD, Blob, Buffer, Entry

#: Blobs that we put in one file: 150 bytes of JSON each, and restic keeps files below 8 MiB.
BLOBS_PER_FILE = 50_000

_MAX_LENGTH = (1 << 32) - 1
_KINDS = {kind.word: kind for kind in Blob}


@dataclass(frozen=True, slots=True)
class IndexFile:
    """What an index file says."""

    #: A pack's id, and what is in it.
    packs: list[tuple[bytes, list[Entry]]]
    #: Names of index files that it replaced.
    supersedes: list[str]


def encode(packs: Iterable[tuple[bytes, Sequence[Entry]]], supersedes: Sequence[str] = ()) -> bytes:
    """The document for some packs and their blobs, with the end of line that restic puts."""
    listed = [{"id": pack.hex(), "blobs": [_blob(entry) for entry in entries]} for pack, entries in packs]
    head = {"supersedes": list(supersedes)} if supersedes else {}
    return documents.dump({**head, "packs": listed}) + b"\n"


def parse(data: Buffer, where: str) -> IndexFile:
    """What the document says. Raises `RepositoryDamaged`. For many blobs, `lookup.Part` is faster."""
    fields = documents.load(data, where)
    supersedes = fields.list("supersedes", [])
    if not all(map(documents.is_id, supersedes)):
        fields.fail("its field supersedes names no ids")
    return IndexFile([_pack(documents.Fields(pack, where)) for pack in fields.list("packs", [])], supersedes)


def _blob(entry: Entry) -> dict[str, object]:
    blob: dict[str, object] = {
        "id": entry.id.hex(),
        "type": entry.kind.word,
        "offset": entry.offset,
        "length": entry.length,
    }
    if entry.raw_length:
        blob["uncompressed_length"] = entry.raw_length
    return blob


def _pack(fields: documents.Fields) -> tuple[bytes, list[Entry]]:
    pack = bytes.fromhex(fields.identifier("id"))
    return pack, [_entry(documents.Fields(blob, fields.where)) for blob in fields.list("blobs", [])]


def _entry(fields: documents.Fields) -> Entry:
    kind = _KINDS.get(fields.text("type"))
    if kind is None:
        fields.fail("it has a blob of an unknown type")
    return Entry(
        bytes.fromhex(fields.identifier("id")),
        kind,
        fields.integer("offset", most=_MAX_LENGTH),
        fields.integer("length", least=OVERHEAD, most=_MAX_LENGTH),
        fields.integer("uncompressed_length", 0, most=_MAX_LENGTH),
    )
