"""`domaincheckpoint`: a checkpoint, as `virDomainCheckpointCreateXML` takes it and tells it.

JSON form (keys that say nothing are left out; `*` must be there):

    {"name": "<letters, digits, _ - .>",      seconds since the epoch by default
     "description": "…",
     "creation_time": 1525889631,             seconds since the epoch; told, and read when redefining
     "parent": "<checkpoint>",                the same
     "disks": [{"name": "vda" or "/path" *,
                "checkpoint": "bitmap" (default) | "no",
                "bitmap": "…",                by default, and only allowed, the checkpoint's name
                "size": 65536}],              told: bytes changed since then
     "domain": "<domain>…</domain>"}          the machine's description, kept as it is

The rules are those of libvirt (schema, which it always applies, and code; 9.0 to 11.3): a name may
begin with a dash; an empty description is none; a disk without a checkpoint has no bitmap. The
`domain` must be one well-formed element of that name; what is in it is not judged here. The JSON
form holds it as text, checked when it becomes XML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from pullback.model.documents import rules
from pullback.model.documents.fields import Fields, Place, plain
from pullback.model.documents.machine import Machine, MachineDisk, Moment

ROOT = "domaincheckpoint"
#: Characters of a machine's description, as many as bytes of a whole document.
MAX_DOMAIN = 4 << 20


class Tracking(StrEnum):
    """What a checkpoint does on a disk."""

    #: Changes are tracked from then on.
    BITMAP = "bitmap"
    #: Nothing.
    NO = "no"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDisk:
    """One disk's part in a checkpoint."""

    #: Its target, or the absolute path of its source.
    name: str
    checkpoint: Tracking = Tracking.BITMAP
    #: Name of the bitmap: printed as the checkpoint's name, whatever the bitmap is really called.
    bitmap: str | None = None
    #: Told: bytes changed since the checkpoint.
    size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDocument:
    """A checkpoint: a moment since which changes are tracked."""

    name: str | None = None
    #: Free text in lines.
    description: str | None = None
    #: Seconds since the epoch.
    creation_time: int | None = None
    #: Name of the checkpoint before it.
    parent: str | None = None
    #: Empty: all disks that are writable and have a medium.
    disks: tuple[CheckpointDisk, ...] = ()
    #: The machine's description at that moment, as XML text of one `domain` element.
    domain: str | None = None

    @property
    def tracked(self) -> tuple[CheckpointDisk, ...]:
        """The disks whose changes are tracked; of an effective document, all of them."""
        return tuple(disk for disk in self.disks if disk.checkpoint is Tracking.BITMAP)


# -- JSON ------------------------------------------------------------------------------------


def to_dict(document: CheckpointDocument) -> dict[str, object]:
    """The document as JSON values; the form stands above."""
    return plain(document)


def from_dict(values: object) -> CheckpointDocument:
    """The document that JSON values describe. Raises `BadDocument` for anything that breaks a rule."""
    fields = Fields(values, Place(document=ROOT))
    document = CheckpointDocument(
        name=fields.text("name", rules.checkpoint_name),
        description=fields.text("description", rules.description) or None,
        creation_time=fields.integer("creation_time"),
        parent=fields.text("parent", rules.checkpoint_name),
        disks=tuple(_disk(item) for item in fields.items("disks")),
        domain=fields.text("domain", _domain),
    )
    fields.end()
    return document


def _domain(text: str) -> str | None:
    return "is too long" if len(text) > MAX_DOMAIN else None


def _disk(fields: Fields) -> CheckpointDisk:
    disk = CheckpointDisk(
        name=fields.need("name", fields.text("name", rules.target_or_path)),
        checkpoint=fields.choice("checkpoint", Tracking) or Tracking.BITMAP,
        bitmap=fields.text("bitmap", rules.bitmap_name),
        size=fields.integer("size"),
    )
    fields.end()
    for key in ("bitmap", "size"):
        if disk.checkpoint is Tracking.NO and fields.has(key):
            raise fields.bad(key, "does not fit checkpoint=no")
    return disk


# -- defaults --------------------------------------------------------------------------------


def effective(
    document: CheckpointDocument,
    disks: Sequence[MachineDisk],
    moment: Moment,
    *,
    parent: str | None = None,
    domain: str | None = None,
) -> CheckpointDocument:
    """The document of a new checkpoint with nothing left open.

    Its time is the moment's, its name by default `moment.name`; parent and domain are those given
    (what the document says of these three is what libvirt ignores too, unless redefining). Every
    disk of the machine is in it, by its target, in the machine's order; without a list, all that
    are writable and have a medium are tracked. Raises `BadDocument`: no disks, an unknown one, one
    listed twice, without a medium or read-only; a bitmap called otherwise than the checkpoint.
    """
    name = document.name or moment.name
    new = replace(document, name=name, creation_time=moment.seconds, parent=parent, domain=domain)
    return _with_disks(new, disks, name)


def redefined(document: CheckpointDocument, disks: Sequence[MachineDisk]) -> CheckpointDocument:
    """The document of a checkpoint that is put back from its saved text, with nothing left open.

    Name and creation time must be there; time, parent and domain stay as they are. Else as `effective`.
    """
    place = Place(document=ROOT)
    if document.name is None:
        raise place.at("name").bad("is missing, and needed to redefine a checkpoint")
    if document.creation_time is None:
        raise place.at("creation_time").bad("is missing, and needed to redefine a checkpoint")
    if document.parent == document.name:
        raise place.at("parent").bad("is the checkpoint itself")
    return _with_disks(document, disks, document.name)


def _with_disks(document: CheckpointDocument, disks: Sequence[MachineDisk], name: str) -> CheckpointDocument:
    machine = Machine(disks, Place(document=ROOT))
    listed = [(machine.find_by_path(disk.name), disk) for disk in document.disks]
    machine.once(found.target for found, _ in listed)
    given = {found.target: _filled(found, disk, name, machine) for found, disk in listed}
    default = Tracking.NO if listed else Tracking.BITMAP
    everything = tuple(given.get(disk.target) or _unlisted(disk, default, name) for disk in disks)
    found = replace(document, disks=everything)
    if not found.tracked:
        raise machine.place.at("disks").bad("cannot be: none would be tracked")
    return found


def _filled(found: MachineDisk, disk: CheckpointDisk, name: str, machine: Machine) -> CheckpointDisk:
    place = machine.at(disk.name)
    if disk.checkpoint is Tracking.NO:
        return CheckpointDisk(name=found.target, checkpoint=Tracking.NO)
    if not found.takes_part:
        raise place.bad("has no medium or is read-only")
    # libvirt's QEMU driver too has one bitmap per checkpoint, of the same name (qemuCheckpointPrepare).
    if disk.bitmap not in (None, name):
        raise place.at("bitmap").bad("is not the checkpoint's name")
    return replace(disk, name=found.target, bitmap=name)


def _unlisted(disk: MachineDisk, default: Tracking, name: str) -> CheckpointDisk:
    tracking = default if disk.takes_part else Tracking.NO
    bitmap = name if tracking is Tracking.BITMAP else None
    return CheckpointDisk(name=disk.target, checkpoint=tracking, bitmap=bitmap)
