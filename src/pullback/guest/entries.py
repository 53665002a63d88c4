"""What the reader tells of files: entries of directories and their content, as values. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from pullback.guest import wire

#: Bytes of a name: NAME_MAX is 255 characters, which NTFS counts in UTF-16.
MAX_NAME = 1024
#: Bytes of a path, and of a link's target: more than PATH_MAX.
MAX_PATH = 1 << 16
_MAX_ID = (1 << 32) - 1
_MAX_TIME = 1 << 40


class Type(StrEnum):
    """What an entry is."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    CHARACTER_DEVICE = "character device"
    BLOCK_DEVICE = "block device"
    PIPE = "pipe"
    SOCKET = "socket"
    UNKNOWN = "unknown"


#: The letter of each, as `ls` has it; a file's is "-".
LETTERS = {
    Type.FILE: "-",
    Type.DIRECTORY: "d",
    Type.LINK: "l",
    Type.CHARACTER_DEVICE: "c",
    Type.BLOCK_DEVICE: "b",
    Type.PIPE: "p",
    Type.SOCKET: "s",
    Type.UNKNOWN: "?",
}
_TYPES = {letter.encode(): type for type, letter in LETTERS.items()} | {b"f": Type.FILE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A thing with a name. Nothing of it is to be believed, but each value is within its bounds."""

    type: Type
    #: One component: neither empty nor "." nor "..", without "/"; or, at the root of an answer, the path asked for.
    name: bytes
    #: Permissions, with the bits for setuid, setgid and sticky.
    mode: int
    uid: int
    gid: int
    #: Bytes.
    size: int
    #: When it was changed, in seconds since 1970.
    changed: int
    #: Names that it has.
    links: int
    #: The number of a device node (major and minor together).
    node: int
    #: Where a link leads.
    target: bytes = b""
    #: The position, among all entries of this answer counted from 1, of the same file under an earlier name; or 0.
    same: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Bytes of the file before it."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """Zeroes of the file before it."""

    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The file before it is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Up:
    """The directory that was begun last is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """Something that could not be read: a directory, an entry, or the file before it, which ends with this."""

    path: bytes
    reason: str


Item = Entry | Data | Hole | Whole | Up | Unread


def parse(frame: wire.Frame, *, root: bool = False) -> Item:
    """One frame of an answer to `list` or `tree`. `root`: its name may be any path. Raises `BadReply`."""
    match frame.kind:
        case "E":
            return _entry(frame, root)
        case "D":
            if not frame.data:
                raise wire.bad("no bytes where some are announced")
            return Data(data=frame.data)
        case "Z":
            if len(frame.data) != 8:
                raise wire.bad("a hole without a length")
            return Hole(length=int.from_bytes(frame.data, "big"))
        case "e":
            return Whole()
        case "u":
            return Up()
        case "W":
            _, path, reason = frame.fields(3)
            return Unread(path=path[:MAX_PATH], reason=wire.shown(reason))
    raise wire.bad(f"a frame of kind {frame.kind!r}")


def _entry(frame: wire.Frame, root: bool) -> Entry:
    kind, mode, uid, gid, size, changed, links, node, name, target, same = frame.fields(11)
    if not root and not is_name(name):
        raise wire.bad(f"an entry named {wire.shown(name)!r}")
    if len(name) > MAX_PATH or len(target) > MAX_PATH:
        raise wire.bad("a name that is too long")
    return Entry(
        type=_TYPES.get(kind, Type.UNKNOWN),
        name=name,
        mode=wire.integer(mode, high=0o7777),
        uid=wire.integer(uid, high=_MAX_ID),
        gid=wire.integer(gid, high=_MAX_ID),
        size=wire.integer(size),
        changed=wire.integer(changed, low=-_MAX_TIME, high=_MAX_TIME),
        links=wire.integer(links, high=_MAX_ID),
        node=wire.integer(node),
        target=target,
        same=wire.integer(same),
    )


def is_name(name: bytes) -> bool:
    """Is it one component of a path, and nothing that leads elsewhere?"""
    return 0 < len(name) <= MAX_NAME and b"/" not in name and name not in (b".", b"..")


def files(items: Iterator[Item]) -> Iterator[Item]:
    """The same, with the rules between items checked, so that who writes them need not.

    Bytes and holes belong to a file and are not more than its size; a complete file has all of them; directories end
    in order. Raises `BadReply`.
    """
    order = _Order()
    for item in items:
        order.follow(item)
        yield item
    order.end()


@dataclass(slots=True)
class _Order:
    """How far an answer is."""

    #: Bytes that the open file still has; None: none is open.
    left: int | None = None
    depth: int = 0
    count: int = 0

    def follow(self, item: Item) -> None:
        match item:
            case Entry():
                self._entry(item)
            case Data():
                self._more(len(item.data))
            case Hole():
                self._more(item.length)
            case Whole():
                if self.left != 0:
                    raise wire.bad("a file that ends before its size")
                self.left = None
            case Unread():
                self.left = None
            case Up():
                self.depth -= 1
                if self.left is not None or self.depth < 0:
                    raise wire.bad("a directory that ends and did not begin")

    def _entry(self, entry: Entry) -> None:
        if self.left is not None:
            raise wire.bad("an entry in the middle of a file")
        if self.count and not self.depth:
            raise wire.bad("an entry behind the last one")
        self.count += 1
        if entry.same >= self.count:
            raise wire.bad("a file that is the same as a later one")
        self.depth += entry.type is Type.DIRECTORY
        if entry.type is Type.FILE and not entry.same:
            self.left = entry.size

    def _more(self, length: int) -> None:
        if self.left is None or length > self.left:
            raise wire.bad("more bytes than a file has")
        self.left -= length

    def end(self) -> None:
        if self.left is not None or self.depth:
            raise wire.bad("an answer that ends in the middle of a file or directory")
