"""`domainblocksnapshot`: a temporary snapshot of disks, for one backup (the external backup API of 2018).

    <domainblocksnapshot>
      <name>before-upgrade</name>
      <disk name='vda' type='file'>
        <fleece file='/var/lib/pullback/scratch/vda'/>
      </disk>
    </domainblocksnapshot>

JSON form (keys that say nothing are left out; `*` must be there):

    {"name": "…", "disks": [{"name": "vda" or "/path" *, "type": "file" (default), "fleece": "/path"}]}

That API never became a part of libvirt, and its schema is known from its author's product only. Our
reading: disks stand directly under the root; the file that takes old blocks (`fleece`) may be left
out, and is then made up; only files are allowed; a name has the form of a checkpoint's, because a
checkpoint made with the snapshot takes it; at least one disk is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pullback.model.documents import rules
from pullback.model.documents.fields import Fields, Place, plain
from pullback.model.documents.machine import Machine, MachineDisk
from pullback.model.documents.storage import StoreType

ROOT = "domainblocksnapshot"


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotDisk:
    """One disk's part in a snapshot."""

    #: Its target, or the absolute path of its source.
    name: str
    #: What takes the old blocks; only files.
    type: StoreType = StoreType.FILE
    #: Absolute path of the file that takes the old blocks.
    fleece: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotDocument:
    """A temporary snapshot."""

    #: None: the caller gives it one.
    name: str | None = None
    #: One or more.
    disks: tuple[SnapshotDisk, ...]


def to_dict(document: SnapshotDocument) -> dict[str, object]:
    """The document as JSON values; the form stands above."""
    return plain(document)


def from_dict(values: object) -> SnapshotDocument:
    """The document that JSON values describe. Raises `BadDocument` for anything that breaks a rule."""
    fields = Fields(values, Place(document=ROOT))
    document = SnapshotDocument(
        name=fields.text("name", rules.checkpoint_name),
        disks=tuple(_disk(item) for item in fields.items("disks")),
    )
    fields.end()
    if not document.disks:
        raise fields.bad("disks", "is missing")
    return document


def _disk(fields: Fields) -> SnapshotDisk:
    fields.word("type", StoreType.FILE)
    name = fields.need("name", fields.text("name", rules.target_or_path))
    disk = SnapshotDisk(name=name, fleece=fields.text("fleece", rules.path))
    fields.end()
    return disk


def effective(
    document: SnapshotDocument, disks: Sequence[MachineDisk], name: str, *, directory: str | None = None
) -> SnapshotDocument:
    """The document with nothing left open: called `name` unless it has one, disks by their targets.

    Files not named are called `SOURCE.NAME`, or `directory/TARGET.NAME`. Raises `BadDocument`: no
    disks, an unknown one, one listed twice or without a medium, a file that is used already.
    """
    machine = Machine(disks, Place(document=ROOT))
    name = document.name or name
    filled = tuple(_filled(disk, machine, name, directory) for disk in document.disks)
    machine.once(disk.name for disk in filled)
    machine.distinct([(disk.name, disk.fleece) for disk in filled if disk.fleece], "fleece")
    return replace(document, name=name, disks=filled)


def _filled(disk: SnapshotDisk, machine: Machine, name: str, directory: str | None) -> SnapshotDisk:
    found = machine.find_by_path(disk.name)
    if found.empty:
        raise machine.at(disk.name).bad("has no medium")
    fleece = disk.fleece or machine.invent(found, name, directory, "fleece")
    return replace(disk, name=found.target, fleece=fleece)
