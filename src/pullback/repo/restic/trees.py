"""Trees: directories as blobs of JSON ("Trees and Data"), and a disk as a directory of segments.

    vda/                 the disk's tree: one directory per segment
    vda/000000/          a segment's tree: one file
    vda/000000/000000    its content: the ids of the segment's chunks

A segment is a directory of its own so that restore points share the tree of a segment that did not
change. The metadata of our nodes is fixed, hence trees are a function of the chunks' ids alone.

The bytes are those that restic's own encoder gives for the same nodes (an id is of the bytes): fields
in its order, empty ones left out, nodes by name, names quoted as Go quotes them, "\\n" at the end.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pullback import errors
from pullback.repo.restic import documents
from pullback.repo.restic.types import ID, Buffer
from pullback.units import GiB, MiB

#: Bytes of a tree that are looked at. Ours have 70 KB; a directory of a million files, 256 MiB, is no disk.
MAX_TREE = 256 * MiB
#: Bytes of a disk in one segment.
SEGMENT = GiB
#: The time of all that we make.
EPOCH = "1970-01-01T00:00:00Z"

_DIRECTORY_BIT = 1 << 31
_DIRECTORY_MODE = _DIRECTORY_BIT | 0o700
_FILE_MODE = 0o600
_MAX_NAME = 4096
_QUOTED = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|([abfnrtv\\\"]))")
_SHORT = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"'}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """An entry of a directory. Ids are bytes; times are RFC 3339."""

    #: Bytes that are no UTF-8 are kept as Python does in file names (surrogateescape).
    name: str
    #: "file", "dir", "symlink", "fifo", …
    type: str
    #: Permissions, and Go's bits for the type.
    mode: int = 0
    mtime: str = EPOCH
    atime: str = EPOCH
    ctime: str = EPOCH
    uid: int = 0
    gid: int = 0
    user: str = ""
    group: str = ""
    inode: int = 0
    device_id: int = 0
    #: Bytes.
    size: int = 0
    links: int = 0
    linktarget: str = ""
    #: Of a file: the ids of its blobs, one after another; else None.
    content: bytes | None = None
    #: Of a directory: the id of its tree.
    subtree: bytes | None = None


def file(name: str, content: bytes, size: int) -> Node:
    """A file of `size` bytes, whose blobs' ids are `content` (32 bytes each)."""
    return Node(name=name, type="file", mode=_FILE_MODE, size=size, links=1, content=content)


def directory(name: str, subtree: bytes) -> Node:
    """A directory, whose tree is `subtree`."""
    return Node(name=name, type="dir", mode=_DIRECTORY_MODE, subtree=subtree)


def encode(nodes: Sequence[Node]) -> bytes:
    """The tree of these nodes, in the order of their names. Raises `ValueError` if two have the same name."""
    ordered = sorted(nodes, key=lambda node: _raw(node.name))
    if len({node.name for node in ordered}) < len(ordered):
        raise ValueError("two entries of a directory have the same name")
    return b'{"nodes":[' + b",".join(map(_encode_node, ordered)) + b"]}\n"


def parse(data: Buffer, where: str) -> list[Node]:
    """The nodes of a tree, in its order. Raises `RepositoryDamaged`, also for names that lead elsewhere."""
    if len(data) > MAX_TREE:
        raise errors.RepositoryDamaged(file=where, problem="it is too long for a tree")
    fields = documents.load(data, where)
    nodes = [_parse_node(documents.Fields(node, where)) for node in fields.list("nodes", [])]
    if len({node.name for node in nodes}) < len(nodes):
        fields.fail("two entries of a directory have the same name")
    return nodes


def tree_id(tree: Buffer) -> bytes:
    """A tree's id."""
    return hashlib.sha256(tree).digest()


def _encode_node(node: Node) -> bytes:
    optional = {"user": node.user, "group": node.group, "inode": node.inode, "device_id": node.device_id}
    more = {"size": node.size, "links": node.links, "linktarget": node.linktarget}
    head = {
        "name": _quote(node.name),
        "type": node.type,
        **({"mode": node.mode} if node.mode else {}),
        "mtime": node.mtime,
        "atime": node.atime,
        "ctime": node.ctime,
        "uid": node.uid,
        "gid": node.gid,
        **{name: value for name, value in (optional | more).items() if value},
    }
    content = b"null" if node.content is None else _id_list(node.content)
    subtree = b"" if node.subtree is None else b',"subtree":"%s"' % node.subtree.hex().encode("ascii")
    return documents.dump(head)[:-1] + b',"content":' + content + subtree + b"}"


def _id_list(ids: bytes) -> bytes:
    if len(ids) % ID:
        raise ValueError("ids have 32 bytes each")
    return b'["' + ids.hex("|", ID).replace("|", '","').encode("ascii") + b'"]' if ids else b"[]"


def _parse_node(fields: documents.Fields) -> Node:
    kind = fields.text("type")
    node = Node(
        name=_unquote(fields.text("name")),
        type=kind,
        mode=fields.integer("mode", 0),
        mtime=fields.text("mtime", EPOCH),
        atime=fields.text("atime", EPOCH),
        ctime=fields.text("ctime", EPOCH),
        uid=fields.integer("uid", 0),
        gid=fields.integer("gid", 0),
        user=fields.text("user", ""),
        group=fields.text("group", ""),
        inode=fields.integer("inode", 0),
        device_id=fields.integer("device_id", 0),
        size=fields.integer("size", 0),
        links=fields.integer("links", 0),
        linktarget=fields.text("linktarget", ""),
        content=_parse_ids(fields) if kind == "file" else None,
        subtree=bytes.fromhex(fields.identifier("subtree")) if kind == "dir" else None,
    )
    if not node.name or len(node.name) > _MAX_NAME or "/" in node.name or "\0" in node.name or node.name in (".", ".."):
        fields.fail("it has a name that is none")
    return node


def _parse_ids(fields: documents.Fields) -> bytes:
    try:
        return documents.join_ids(fields.list("content", []))
    except ValueError:
        fields.fail("the content of a file has an id that is none")


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _quote(name: str) -> str:
    """A name between Go's quotes (strconv.Quote), which restic writes without the quotes themselves."""
    return "".join(map(_quote_character, name))


def _quote_character(character: str) -> str:
    for letter, meant in _SHORT.items():
        if character == meant:
            return f"\\{letter}"
    code = ord(character)
    if character.isprintable():
        return character
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _unquote(name: str) -> str:
    """The name that was quoted; what is no quotation stays as it is."""
    return _QUOTED.sub(_unquote_match, name) if "\\" in name else name


def _unquote_match(match: re.Match[str]) -> str:
    if match[1]:
        return bytes.fromhex(match[1]).decode("utf-8", "surrogateescape")
    if match[4]:
        return _SHORT[match[4]]
    code = int(match[2] or match[3], 16)
    return chr(code) if code <= 0x10FFFF else "\N{REPLACEMENT CHARACTER}"


# -- disks -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """How a disk is cut. All in bytes."""

    #: Of the disk; its last chunk may be short.
    size: int
    #: Of a chunk.
    chunk: int
    #: Of a segment, a multiple of the chunk.
    segment: int = SEGMENT

    def __post_init__(self) -> None:
        if self.size <= 0 or self.chunk <= 0 or self.segment <= 0 or self.segment % self.chunk:
            raise ValueError("a disk is cut in segments of whole chunks")

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.size // self.chunk)

    @property
    def segments(self) -> int:
        """How many segments there are."""
        return -(-self.size // self.segment)

    @property
    def chunks_per_segment(self) -> int:
        """How many chunks a segment has (the last one may have less)."""
        return self.segment // self.chunk


def segment_tree(ids: Buffer, size: int) -> bytes:
    """The tree of a segment of `size` bytes, whose chunks' ids are `ids` (32 bytes each)."""
    return encode([file("000000", bytes(ids), size)])


def disk_trees(ids: Buffer, shape: Shape) -> Iterator[tuple[bytes, bytes]]:
    """Id and bytes of each tree that a disk needs: segments first (equal ones once), the disk's own last.

    `ids` are those of all chunks, in order. Raises `ValueError` unless there are as many as the shape says.
    """
    if len(ids) != shape.chunks * ID:
        raise ValueError("a disk needs an id for each of its chunks")
    view = memoryview(ids)
    step = shape.chunks_per_segment * ID
    seen: set[bytes] = set()
    nodes = []
    for number in range(shape.segments):
        size = min(shape.segment, shape.size - number * shape.segment)
        tree = segment_tree(view[number * step : (number + 1) * step], size)
        id = tree_id(tree)
        nodes.append(directory(f"{number:06}", id))
        if id not in seen:
            seen.add(id)
            yield id, tree
    tree = encode(nodes)
    yield tree_id(tree), tree


def read_disk(tree: bytes, load: Callable[[bytes], Buffer], shape: Shape, where: str) -> bytes:
    """The ids of all chunks of a disk, in order, from its tree's id.

    `load` gives the bytes of a tree by its id. Raises `RepositoryDamaged` (its file is `where`) unless
    the trees are exactly those of a disk of that shape.
    """
    segments = parse(load(tree), where)
    if [node.name for node in segments] != [f"{number:06}" for number in range(shape.segments)]:
        raise errors.RepositoryDamaged(file=where, problem="the disk's segments are not those of its size")
    known: dict[bytes, bytes] = {}
    parts = []
    for number, node in enumerate(segments):
        if node.subtree is None:
            raise errors.RepositoryDamaged(file=where, problem="a segment of the disk is no directory")
        size = min(shape.segment, shape.size - number * shape.segment)
        if node.subtree not in known or size < shape.segment:
            known[node.subtree] = read_segment(load(node.subtree), size, shape, where)
        parts.append(known[node.subtree])
    return b"".join(parts)


def read_segment(data: Buffer, size: int, shape: Shape, where: str) -> bytes:
    """The ids of the chunks of a segment of `size` bytes, from its tree. Raises `RepositoryDamaged`."""
    nodes = parse(data, where)
    if len(nodes) != 1 or nodes[0].size != size or nodes[0].content is None:
        raise errors.RepositoryDamaged(file=where, problem="a segment of the disk is not one file of its size")
    if len(nodes[0].content) != -(-size // shape.chunk) * ID:
        raise errors.RepositoryDamaged(file=where, problem="a segment of the disk has not as many chunks as it needs")
    return nodes[0].content
