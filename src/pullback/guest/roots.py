"""The guest's own tree: its root file system, and the others where its fstab has them. No volume need be named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pullback import errors
from pullback.guest import entries, fstab
from pullback.guest.reader import Reader
from pullback.guest.volumes import Volume

#: Where a root lies in a btrfs, by distribution: Fedora and its kin, Debian, Ubuntu and openSUSE; each a subvolume.
_SUBVOLUMES = ("", "root", "@rootfs", "@")
#: File systems that no Linux has its root on.
_NEVER = frozenset({"vfat", "exfat", "ntfs", "iso9660", "udf", "hfsplus"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A composed tree."""

    #: The mount by which it is read.
    number: int
    #: The volumes in it, with where they are: "/", "/home" …
    places: tuple[tuple[str, Volume], ...]
    #: What could not be put into it, and which journals were not replayed.
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    volume: Volume
    options: str
    number: int
    lines: tuple[fstab.Line, ...]
    notes: tuple[str, ...]


def compose(reader: Reader, known: Sequence[Volume], *, path: str, point: str) -> Root:
    """Find the root and mount what belongs to it. Raises `NoRoot` (with `path` and `point`, for the sentence)."""
    found = [candidate for volume in known for candidate in _candidates(reader, volume, known)]
    # A root names itself in its own fstab; a copy or an older system on another disk does not.
    own = [candidate for candidate in found if _names_itself(candidate, known)] or found
    if not own:
        raise errors.NoRoot(path=path, point=point, reason="no file system has an /etc/fstab")
    if len(own) > 1:
        names = ", ".join(candidate.volume.name for candidate in own)
        raise errors.NoRoot(path=path, point=point, reason=f"there are several systems, on {names}")
    return _with_others(reader, own[0], known)


def _candidates(reader: Reader, volume: Volume, known: Sequence[Volume]) -> Iterator[_Candidate]:
    """The file system, or its subvolume, that has an fstab."""
    if volume.content is None or volume.content in _NEVER:
        return
    try:
        mounted = reader.mount(volume, known)
    except errors.VolumeUnreadable:
        return
    for name in _SUBVOLUMES if volume.content == "btrfs" else ("",):
        data = content(reader, mounted.number, f"{name}/etc/fstab".encode())
        if data is None:
            continue
        options, number = "", mounted.number
        if name:
            options = f"subvol={name}"
            number = reader.mount(volume, known, options=options).number
        notes = (mounted.note,) if mounted.note else ()
        yield _Candidate(volume=volume, options=options, number=number, lines=fstab.parse(data), notes=notes)
        return


def content(reader: Reader, number: int, path: bytes) -> bytes | None:
    """A small file of a mount, cut at `fstab.MAX_BYTES`; None if there is none that can be read."""
    data = bytearray()
    try:
        items = reader.tree(number, path)
        for item in items:
            if isinstance(item, entries.Entry) and item.type is not entries.Type.FILE:
                list(items)
                return None
            if isinstance(item, entries.Data) and len(data) < fstab.MAX_BYTES:
                data += item.data
            if isinstance(item, entries.Unread):
                list(items)
                return None
    except (errors.NoSuchFile, errors.FileUnreadable):
        return None
    return bytes(data)


def _names_itself(candidate: _Candidate, known: Sequence[Volume]) -> bool:
    return any(line.where == "/" and fstab.volume(line.what, known) == candidate.volume for line in candidate.lines)


def _with_others(reader: Reader, root: _Candidate, known: Sequence[Volume]) -> Root:
    places = [("/", root.volume)]
    notes = list(root.notes)
    for line in root.lines:
        if line.where == "/":
            continue
        volume = fstab.volume(line.what, known)
        if volume is None:
            notes.append(f"{line.where} is not shown: {line.what} is not in the restore point")
            continue
        try:
            mounted = reader.mount(volume, known, below=(root.number, line.where), options=line.subvolume)
        except errors.VolumeUnreadable as error:
            notes.append(f"{line.where} is not shown: {error}")
            continue
        places.append((line.where, volume))
        notes += [mounted.note] if mounted.note else []
    return Root(number=root.number, places=tuple(places), notes=tuple(notes))
