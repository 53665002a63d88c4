"""/etc/fstab of a guest, and which volumes it means. Pure; what comes of it is only ever used inside the reader."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pullback.guest.volumes import Volume

#: Bytes of a file that are looked at.
MAX_BYTES = 1 << 18
#: Lines that are used.
MAX_LINES = 256
_OCTAL = re.compile(r"\\([0-7]{3})")
_SUBVOLUME = re.compile(r"(?:subvol=/?[A-Za-z0-9@._/+-]{1,200}|subvolid=[0-9]{1,20})")
_NOT_HERE = frozenset({"swap", "proc", "sysfs", "tmpfs", "devpts", "nfs", "nfs4", "cifs", "fuse", "none", "auto.nfs"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One file system."""

    #: What is mounted: UUID=…, LABEL=…, /dev/….
    what: str
    #: Where: an absolute path without "." and "..".
    where: str
    #: The part of its options that tells which part of a btrfs is meant; or nothing.
    subvolume: str


def parse(data: bytes) -> tuple[Line, ...]:
    """The lines that mount something, those above before those below. What makes no sense is left out."""
    found: dict[str, Line] = {}
    for text in data[:MAX_BYTES].decode("utf-8", "replace").splitlines():
        words = text.split()
        if len(words) < 3 or words[0].startswith("#") or len(found) >= MAX_LINES:
            continue
        what, where, kind = (_plain(word) for word in words[:3])
        options = words[3].split(",") if len(words) > 3 else []
        if kind in _NOT_HERE or "bind" in options or "noauto" in options or not _is_path(where):
            continue
        subvolume = next((option for option in options if _SUBVOLUME.fullmatch(option)), "")
        found[where] = Line(what=what, where=where, subvolume=subvolume)
    return tuple(sorted(found.values(), key=lambda line: line.where.count("/") if line.where != "/" else 0))


def _plain(word: str) -> str:
    """fstab(5): a space in a path is \\040."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), word)


def _is_path(text: str) -> bool:
    parts = text.split("/")[1:]
    if text == "/":
        return True
    return text.startswith("/") and len(text) < 1024 and "\0" not in text and not {"", ".", ".."} & set(parts)


def volume(what: str, known: Sequence[Volume]) -> Volume | None:
    """The volume that the first word of a line means, if it is one of those that are known and only one is meant."""
    found = [one for one in known if _is(what, one)]
    return found[0] if len(found) == 1 else None


def _is(what: str, one: Volume) -> bool:
    key, equals, value = what.partition("=")
    value = value.strip('"')
    if equals:
        tags = {"UUID": one.uuid, "LABEL": one.label, "PARTUUID": one.part_uuid, "PARTLABEL": one.part_label}
        return _same(tags.get(key), value)
    path = what.removeprefix("/dev/")
    if path == what:
        return False
    for place, tag in (("uuid", one.uuid), ("label", one.label), ("partuuid", one.part_uuid)):
        if path.startswith(f"disk/by-{place}/"):
            return _same(tag, path.removeprefix(f"disk/by-{place}/"))
    group, slash, name = one.name.partition("/")
    mapped = f"mapper/{group.replace('-', '--')}-{name.replace('-', '--')}" if slash else ""
    return path in (one.name, mapped)


def _same(tag: str | None, value: str) -> bool:
    return tag is not None and tag.lower() == value.lower()
