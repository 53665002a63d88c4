"""What a document is checked against: the machine's disks, and the moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pullback.model.documents.fields import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineDisk:
    """A disk of the machine, as far as documents care."""

    #: vda, sda, nvme0n1 …
    target: str
    #: Path of its image or device; None without a medium, or if it has no path (a network disk).
    source: str | None = None
    #: The source is a file, so that the name of another can be made from it.
    is_file: bool = True
    read_only: bool = False
    #: There is no medium in it.
    empty: bool = False

    @property
    def takes_part(self) -> bool:
        """Is it backed up when no disks are named?"""
        return not (self.empty or self.read_only)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When a job begins, and the checkpoint that it makes."""

    #: Seconds since the epoch.
    seconds: int
    #: Name of the checkpoint made in the same instant, if one is.
    checkpoint: str | None = None

    @property
    def name(self) -> str:
        """What made-up file names end with, and what a checkpoint without a name is called."""
        return self.checkpoint or str(self.seconds)


class Machine:
    """The disks of a machine, looked up for one document; errors are about that document."""

    def __init__(self, disks: Sequence[MachineDisk], place: Place) -> None:
        if not disks:
            raise place.at("disks").bad("cannot be: the machine has none")
        self.disks = tuple(disks)
        self.place = place
        self._by_target = {disk.target: disk for disk in disks}

    def find(self, name: str) -> MachineDisk:
        """The disk of that target."""
        found = self._by_target.get(name)
        if found is None:
            raise self.at(name).bad("is no disk of the machine")
        return found

    def find_by_path(self, name: str) -> MachineDisk:
        """The disk of that target, or whose source has that absolute path, if it is the only one."""
        if not name.startswith("/"):
            return self.find(name)
        found = [disk for disk in self.disks if disk.source == name]
        if len(found) != 1:
            raise self.at(name).bad("is the source of several disks" if found else "is no disk of the machine")
        return found[0]

    def at(self, name: str) -> Place:
        """The place of a disk in the document."""
        return self.place.item("disks", name)

    def once(self, targets: Iterable[str]) -> None:
        """Refuse a disk that is listed twice."""
        seen: set[str] = set()
        for target in targets:
            if target in seen:
                raise self.at(target).bad("stands twice")
            seen.add(target)

    def others(self, listed: Iterable[str]) -> list[MachineDisk]:
        """The disks that are not listed, in the machine's order."""
        names = set(listed)
        return [disk for disk in self.disks if disk.target not in names]

    def invent(self, disk: MachineDisk, suffix: str, directory: str | None, key: str) -> str:
        """A file's name for the blocks of a disk: `SOURCE.SUFFIX` (libvirt's rule), or in `directory`."""
        if directory is not None:
            return f"{directory.rstrip('/')}/{disk.target}.{suffix}"
        if not disk.is_file or disk.source is None:
            raise self.at(disk.target).at(key).bad("is missing, and cannot be made up: the disk's source is no file")
        return f"{disk.source}.{suffix}"

    def distinct(self, stores: Iterable[tuple[str, str]], key: str) -> None:
        """Refuse (target, path) that would overwrite a disk of the machine, or another of the same document."""
        taken = {disk.source: f"the source of disk {disk.target}" for disk in self.disks if disk.source is not None}
        for target, path in stores:
            if path in taken:
                raise self.at(target).at(key).bad(f"is {taken[path]}")
            taken[path] = f"taken by disk {target}"
