"""Restore points as values, and the manifest that describes one in a `dir:` repository.

A manifest is one JSON object (UTF-8, sorted keys) with an own checksum:

    {"format": 1, "minor": 2, "sha256": "<of all the rest in canonical form>",
     "id": "20261124T060018Z-1f2e3d4c", "machine": "web01", "created": "2026-11-24T06:00:18.250000Z",
     "level": "auto", "pullback": "0.1.0", "qemu": "7.2.22", "engine": "filter", "pause_us": 4900,
     "checkpoint": "auto.….…" | null, "notes": ["…"], "host": "kvm1", "milliseconds": 1330, "tags": ["…"],
     "description": {…} | null, "firmware": [{…}]      see `model.description`
     "tpm": {…} | null                                 see `model.tpm`
     "disks": [{"target": "vda", "qdev": …, "serial": …, "source": …, "source_format": …,
                "size": 8589934592, "mode": "incremental", "reason": null,
                "parent": {"point": "…", "target": "vda"} | null,
                "mark": {"name": "auto.….…", "nonce": "<hex>", "first": 3, "last": 4} | null,
                "image": "vda.qcow2", "hashes": "vda.sha256", "block_size": 1048576,
                "digest": "<hex>", "structure": "<hex>", "stored": 1310720, "read": 1048576}]}

Canonical form: sorted keys, no spaces, no escapes beyond JSON's own, UTF-8. There are no floating
point numbers in it, because their text differs between languages.

What is read is hostile until checked: every key, type, range, name and count. Unknown keys are
refused in our own minor version and ignored in a later one; a later `format` is refused whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar

from pullback import errors
from pullback.model import description as descriptions
from pullback.model import tpm as tpms
from pullback.model.backups import Level
from pullback.model.checkpoints import Mark
from pullback.model.checkpoints import parse as parse_bitmap
from pullback.model.description import Description, FirmwareHeader
from pullback.model.texts import TARGET, is_showable, showable
from pullback.model.tpm import TpmHeader
from pullback.units import KiB, MiB

#: The format that this Pullback writes, and the highest that it reads.
FORMAT = 1
#: Additions within the format that an older Pullback may ignore.
MINOR = 2
#: Bytes of a manifest that are read at most: 256 disks with the longest texts are far below.
MAX_MANIFEST = 16 * MiB
#: Disks of one point: virtio-scsi alone could have more, nobody was seen with more than 100.
MAX_DISKS = 256
#: Notes of one point.
MAX_NOTES = 1024
#: Blocks in a disk's hash list, so that the list has at most 32 MiB.
MAX_BLOCKS = 1 << 20
#: A hash block holds at least this, in bytes.
MIN_BLOCK = 4 * KiB
#: A hash block holds at most this, in bytes (a disk of 256 TiB at `MAX_BLOCKS`).
MAX_BLOCK = 256 * MiB

#: The minor version since which there are the TPM's state and libvirt's XML.
_WITH_TPM = 2
_MAX_INTEGER = (1 << 63) - 1
_SECTOR = 512
_MICRO = 1_000_000
_MILLI = 1_000
_MAX_PAUSE_US = 86_400 * _MICRO
_ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")
_SNAPSHOT_ID = re.compile(r"[0-9a-f]{64}")
_ANY_ID = re.compile(f"{_ID.pattern}|{_SNAPSHOT_ID.pattern}")
_ID_TIME = "%Y%m%dT%H%M%SZ"
_CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RESERVED = frozenset({"manifest.json"})


class Mode(StrEnum):
    """How a disk was read."""

    #: Whole; the image stands alone.
    FULL = "full"
    #: Only what changed since the parent; the image is backed by the parent's.
    INCREMENTAL = "incremental"


@dataclass(frozen=True, slots=True, kw_only=True)
class PointRef:
    """A disk of a restore point of the same machine."""

    #: The point's id.
    point: str
    #: The disk's target there (a disk may have moved to another target since).
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFiles:
    """What a `dir:` repository keeps of a disk, in the point's directory."""

    #: File name of the qcow2 image.
    image: str
    #: File name of the list of block hashes.
    hashes: str
    #: SHA-256 of all in the image that is not data of the disk, hex (`repo.directory.structure`).
    structure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PointDisk:
    """A disk in a restore point. Sizes in bytes."""

    #: Its name in the machine, such as "vda".
    target: str
    #: The device's id or path in QEMU, for people.
    qdev: str | None
    #: Its serial number, for people.
    serial: str | None
    #: The image file as the machine had it, for people; never opened.
    source: str | None
    #: The format of that file.
    source_format: str | None
    #: Bytes of the guest's disk.
    size: int
    #: How it was read.
    mode: Mode
    #: Why it was read whole although an increment was wanted; None if there is nothing to say.
    reason: str | None
    #: The disk that the image is backed by; None for a whole image.
    parent: PointRef | None
    #: The checkpoint made in the same instant, which the disk's chain must contain for this point
    #: to be a parent; None if the disk cannot be tracked.
    mark: Mark | None
    #: Bytes of one hash block.
    block_size: int
    #: SHA-256 over the SHA-256s of the blocks, hex; thus also the SHA-256 of the file `files.hashes`.
    digest: str
    #: Bytes that it added to the repository.
    stored: int
    #: Bytes that were read from the machine.
    read: int
    #: Its files in a `dir:` repository; None in restic's format, where trees name its chunks.
    files: ImageFiles | None = None

    @property
    def image(self) -> ImageFiles:
        """The files of a disk in a `dir:` repository, where each has some."""
        assert self.files is not None
        return self.files


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A restore point: the disks of one machine at one instant."""

    #: In a `dir:` repository sortable by time and unique, `20261124T060018Z-<8 hex>` (see `new_id`);
    #: in restic's format the snapshot's id, 64 hex digits.
    id: str
    #: The machine's name.
    machine: str
    #: The instant, in UTC.
    created: datetime
    #: What was asked for.
    level: Level
    #: Version of Pullback that made it.
    pullback: str
    #: Version of the QEMU that it was made from.
    qemu: str
    #: The fleecing engine.
    engine: str
    #: How long the guest stood still, in seconds (kept to the microsecond).
    pause: float
    #: Name of the checkpoint made with it, if one was.
    checkpoint: str | None
    #: At least one, each target once.
    disks: tuple[PointDisk, ...]
    #: Sentences for people: what fell back, what was left out.
    notes: tuple[str, ...] = ()
    #: The host that the machine ran on; None in points of format 1.0.
    host: str | None = None
    #: Seconds that the backup took (kept to the millisecond); None in points of format 1.0.
    seconds: float | None = None
    #: The user's words for it. In restic's format they are the snapshot's, and not in the manifest.
    tags: tuple[str, ...] = ()
    #: How the machine was started; None in points of format 1.0.
    description: Description | None = None
    #: Its firmware devices, whose bytes the repository keeps beside the disks.
    firmware: tuple[FirmwareHeader, ...] = ()
    #: The state of its TPM, whose bytes the repository keeps too; None in points before format 1.2.
    tpm: TpmHeader | None = None

    def disk(self, target: str) -> PointDisk:
        """The disk of that name; raises `UnknownDisk`."""
        for disk in self.disks:
            if disk.target == target:
                return disk
        known = ", ".join(disk.target for disk in self.disks)
        raise errors.UnknownDisk(target=target, where=f"restore point {self.id}", known=known)

    def chosen(self, only: tuple[str, ...]) -> tuple[PointDisk, ...]:
        """The disks that are meant: those named, or all; raises `UnknownDisk`."""
        return tuple(self.disk(target) for target in only) if only else self.disks

    @property
    def size(self) -> int:
        """Bytes of all the disks as the guest sees them."""
        return sum(disk.size for disk in self.disks)

    @property
    def stored(self) -> int:
        """Bytes that the point's images take."""
        return sum(disk.stored for disk in self.disks)

    @property
    def read(self) -> int:
        """Bytes that were read from the machine for it."""
        return sum(disk.read for disk in self.disks)

    @property
    def whole(self) -> bool:
        """Does it stand alone, without any other point?"""
        return all(disk.parent is None for disk in self.disks)


# -- names -----------------------------------------------------------------------------------


def new_id(created: datetime, token: str | None = None) -> str:
    """The id of a point made at `created` (aware); `token` is its random part, 8 hex digits."""
    return f"{created.astimezone(UTC).strftime(_ID_TIME)}-{token or secrets.token_hex(4)}"


def id_moment(text: str) -> datetime | None:
    """The second (UTC) that an id names, or None if the text is no id."""
    if not _ID.fullmatch(text):
        return None
    try:
        return datetime.strptime(text.partition("-")[0], _ID_TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def is_file_name(text: str) -> bool:
    """May a manifest name a file so? (No slash, no leading dot, plain ASCII, not the manifest's own name.)"""
    return bool(_NAME.fullmatch(text)) and text not in _RESERVED


# -- writing ---------------------------------------------------------------------------------


def document(point: Point) -> dict[str, object]:
    """The point as plain JSON values, without format and checksum."""
    return {
        "id": point.id,
        "machine": point.machine,
        "created": point.created.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z",
        "level": str(point.level),
        "pullback": showable(point.pullback),
        "qemu": showable(point.qemu),
        "engine": showable(point.engine),
        "pause_us": round(point.pause * _MICRO),
        "checkpoint": point.checkpoint,
        "disks": [_disk_document(disk) for disk in point.disks],
        "notes": [showable(note) for note in point.notes],
        "host": _shown(point.host),
        "milliseconds": None if point.seconds is None else round(point.seconds * _MILLI),
        "tags": list(point.tags),
        "description": None if point.description is None else descriptions.document(point.description),
        "firmware": [descriptions.firmware_document(header) for header in point.firmware],
        "tpm": None if point.tpm is None else tpms.document(point.tpm),
    }


def _disk_document(disk: PointDisk) -> dict[str, object]:
    parent, mark = disk.parent, disk.mark
    values: dict[str, object] = {
        "target": disk.target,
        "qdev": _shown(disk.qdev),
        "serial": _shown(disk.serial),
        "source": _shown(disk.source),
        "source_format": _shown(disk.source_format),
        "size": disk.size,
        "mode": str(disk.mode),
        "reason": _shown(disk.reason),
        "parent": None if parent is None else {"point": parent.point, "target": parent.target},
        "mark": None if mark is None else _mark_document(mark),
        "block_size": disk.block_size,
        "digest": disk.digest,
        "stored": disk.stored,
        "read": disk.read,
    }
    files = disk.files
    return values | {
        "image": files and files.image,
        "hashes": files and files.hashes,
        "structure": files and files.structure,
    }


def _mark_document(mark: Mark) -> dict[str, object]:
    return {"name": mark.name, "nonce": mark.nonce, "first": mark.first, "last": mark.last}


def _shown(text: str | None) -> str | None:
    return None if text is None else showable(text)


def encode(point: Point) -> bytes:
    """The manifest. Texts for people are made `showable`; all else is written as it is.

    In restic's format (`point.disks` without `files`) it lacks the id, which is made from it.
    Raises `VerificationFailed` if the point is such that it could not be read back.
    """
    nameless = all(disk.files is None for disk in point.disks)
    body: dict[str, object] = {
        "format": FORMAT,
        "minor": MINOR,
        **(_without_place(point) if nameless else document(point)),
    }
    try:
        body["sha256"] = _checksum(body)
    except ValueError as error:
        raise errors.VerificationFailed(point=showable(point.id), problem=_broken(str(error))) from error
    data = json.dumps(body, ensure_ascii=False, sort_keys=True, indent=1).encode() + b"\n"
    decode(data, name=showable(point.id), identity=point.id if nameless else None)
    return data


def _without_place(point: Point) -> dict[str, object]:
    """What a manifest in restic's format says: neither its own id, nor tags, nor files."""
    body = document(point)
    del body["id"], body["tags"]
    body["disks"] = [
        {key: value for key, value in _disk_document(disk).items() if key not in ("image", "hashes", "structure")}
        for disk in point.disks
    ]
    return body


def _checksum(body: dict[str, object]) -> str:
    rest = {key: value for key, value in body.items() if key != "sha256"}
    text = json.dumps(rest, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# -- reading ---------------------------------------------------------------------------------


def decode(data: bytes, *, name: str, identity: str | None = None) -> Point:
    """The point that the manifest `data` describes; `name` is what messages call it.

    `identity`: the id of a point in restic's format, whose manifest cannot hold it.

    Raises `VerificationFailed` for anything that is not a sound manifest, and `RepositoryTooNew`
    if it was written in a later format. Nothing else.
    """
    try:
        return _point(_body(data, name), identity)
    except (_BadManifest, ValueError, RecursionError) as error:
        raise errors.VerificationFailed(point=name, problem=_broken(str(error))) from error


def _broken(problem: str) -> str:
    return f"its manifest cannot be used ({showable(problem)[:300]})"


class _BadManifest(Exception):
    """A manifest breaks a rule; the text says which."""


def _body(data: bytes, name: str) -> _Fields:
    """Parse, check the version and the checksum."""
    if len(data) > MAX_MANIFEST:
        raise _BadManifest(f"longer than {MAX_MANIFEST} bytes")
    body = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_float=_refuse, parse_constant=_refuse)
    fields = _Fields(body, "the manifest")
    found = fields.integer("format", 1)
    if found > FORMAT:
        raise errors.RepositoryTooNew(path=name, found=found, known=FORMAT)
    fields.minor = fields.integer("minor", 0)
    fields.lenient = fields.minor > MINOR
    if fields.pattern("sha256", _SHA256) != _checksum(fields.all()):
        raise _BadManifest("its checksum is wrong")
    return fields


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _BadManifest("a key stands twice")
    return values


def _refuse(text: str) -> object:
    raise _BadManifest(f"{text[:20]} is no whole number")


_T = TypeVar("_T")
_E = TypeVar("_E", bound=StrEnum)


class _Fields:
    """The keys of one JSON object, each taken once and checked; `end` refuses what is left over."""

    def __init__(self, values: object, where: str, *, lenient: bool = False) -> None:
        if not isinstance(values, dict):
            raise _BadManifest(f"{where} is no object")
        self._values: dict[str, object] = values
        self._left = set(self._values)
        self._where = where
        self.lenient = lenient
        #: Of the manifest as a whole; known to its outermost object only.
        self.minor = 0

    def all(self) -> dict[str, object]:
        return self._values

    def end(self) -> None:
        if self._left and not self.lenient:
            raise _BadManifest(f"unknown key {min(self._left)!r} in {self._where}")

    def bad(self, key: str, problem: str) -> _BadManifest:
        return _BadManifest(f"{key!r} in {self._where} {problem}")

    def take(self, key: str) -> object:
        if key not in self._values:
            raise self.bad(key, "is missing")
        self._left.discard(key)
        return self._values[key]

    def integer(self, key: str, low: int, high: int = _MAX_INTEGER) -> int:
        value = self.take(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(key, f"is no whole number from {low} to {high}")
        return value

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not is_showable(value):
            raise self.bad(key, "is no plain text")
        return value

    def pattern(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self.text(key)
        if not pattern.fullmatch(value):
            raise self.bad(key, "has a form that is not allowed")
        return value

    def choice(self, key: str, kind: type[_E]) -> _E:
        value = self.text(key)
        if value not in {str(member) for member in kind}:
            raise self.bad(key, "is none of the known words")
        return kind(value)

    def file_name(self, key: str) -> str:
        value = self.text(key)
        if not is_file_name(value):
            raise self.bad(key, "is no file name that is allowed")
        return value

    def optional(self, key: str, read: Callable[[str], _T]) -> _T | None:
        return None if self.take(key) is None else read(key)

    def inner(self, key: str) -> _Fields:
        return _Fields(self.take(key), f"{key!r} of {self._where}", lenient=self.lenient)

    def items(self, key: str, low: int, high: int) -> list[object]:
        value = self.take(key)
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise self.bad(key, f"is no list of {low} to {high} things")
        return value


def _point(fields: _Fields, identity: str | None) -> Point:
    point = Point(
        id=identity or fields.pattern("id", _ID),
        machine=fields.text("machine"),
        created=_created(fields),
        level=fields.choice("level", Level),
        pullback=fields.text("pullback"),
        qemu=fields.text("qemu"),
        engine=fields.text("engine"),
        pause=fields.integer("pause_us", 0, _MAX_PAUSE_US) / _MICRO,
        checkpoint=fields.optional("checkpoint", fields.text),
        disks=_disks(fields, with_files=identity is None),
        notes=_texts(fields, "notes"),
        host=fields.optional("host", fields.text) if fields.minor else None,
        seconds=_seconds(fields) if fields.minor else None,
        tags=_texts(fields, "tags") if fields.minor and identity is None else (),
        description=_description(fields) if fields.minor else None,
        firmware=_firmware(fields) if fields.minor else (),
        tpm=_tpm(fields) if fields.minor >= _WITH_TPM else None,
    )
    fields.end()
    _agree(point)
    return point


def _created(fields: _Fields) -> datetime:
    text = fields.pattern("created", _CREATED)
    return datetime.fromisoformat(text.removesuffix("Z")).replace(tzinfo=UTC)


def _texts(fields: _Fields, key: str) -> tuple[str, ...]:
    found = fields.items(key, 0, MAX_NOTES)
    return tuple(_Fields({"text": text}, f"{key!r}").text("text") for text in found)


def _seconds(fields: _Fields) -> float | None:
    found = fields.optional("milliseconds", lambda key: fields.integer(key, 0))
    return None if found is None else found / _MILLI


def _description(fields: _Fields) -> Description | None:
    found = fields.take("description")
    with_xml = fields.minor >= _WITH_TPM
    return None if found is None else descriptions.parse(found, lenient=fields.lenient, with_xml=with_xml)


def _firmware(fields: _Fields) -> tuple[FirmwareHeader, ...]:
    found = fields.items("firmware", 0, descriptions.MAX_FIRMWARES)
    return tuple(descriptions.parse_header(item, lenient=fields.lenient) for item in found)


def _tpm(fields: _Fields) -> TpmHeader | None:
    found = fields.take("tpm")
    return None if found is None else tpms.parse(found, lenient=fields.lenient)


def _disks(fields: _Fields, *, with_files: bool) -> tuple[PointDisk, ...]:
    found = [
        _Fields(item, f"disk {number}", lenient=fields.lenient)
        for number, item in enumerate(fields.items("disks", 1, MAX_DISKS), 1)
    ]
    return tuple(_disk(disk, with_files=with_files) for disk in found)


def _disk(fields: _Fields, *, with_files: bool) -> PointDisk:
    disk = PointDisk(
        target=fields.pattern("target", TARGET),
        qdev=fields.optional("qdev", fields.text),
        serial=fields.optional("serial", fields.text),
        source=fields.optional("source", fields.text),
        source_format=fields.optional("source_format", fields.text),
        size=fields.integer("size", _SECTOR),
        mode=fields.choice("mode", Mode),
        reason=fields.optional("reason", fields.text),
        parent=fields.optional("parent", lambda key: _parent(fields.inner(key))),
        mark=fields.optional("mark", lambda key: _mark(fields.inner(key))),
        block_size=fields.integer("block_size", MIN_BLOCK, MAX_BLOCK),
        digest=fields.pattern("digest", _SHA256),
        stored=fields.integer("stored", 0),
        read=fields.integer("read", 0),
        files=_files(fields) if with_files else None,
    )
    fields.end()
    _sizes_agree(disk)
    return disk


def _files(fields: _Fields) -> ImageFiles:
    return ImageFiles(
        image=fields.file_name("image"),
        hashes=fields.file_name("hashes"),
        structure=fields.pattern("structure", _SHA256),
    )


def _parent(fields: _Fields) -> PointRef:
    parent = PointRef(point=fields.pattern("point", _ANY_ID), target=fields.pattern("target", TARGET))
    fields.end()
    return parent


def _mark(fields: _Fields) -> Mark:
    name, nonce = fields.text("name"), fields.text("nonce")
    mark = Mark(name=name, nonce=nonce, first=fields.integer("first", 0), last=fields.integer("last", 0))
    fields.end()
    if parse_bitmap(mark.bitmap) != mark:
        raise _BadManifest("a checkpoint's mark could not be that of a bitmap")
    return mark


def _sizes_agree(disk: PointDisk) -> None:
    """Rules between the fields of a disk."""
    if disk.size % _SECTOR:
        raise _BadManifest(f"the size of {disk.target} is no multiple of {_SECTOR}")
    if disk.block_size & (disk.block_size - 1):
        raise _BadManifest(f"the block size of {disk.target} is no power of two")
    if -(-disk.size // disk.block_size) > MAX_BLOCKS:
        raise _BadManifest(f"{disk.target} has more than {MAX_BLOCKS} blocks")
    if (disk.mode is Mode.INCREMENTAL) != (disk.parent is not None):
        raise _BadManifest(f"the mode of {disk.target} does not fit its parent")
    if disk.parent is not None and disk.reason is not None:
        raise _BadManifest(f"{disk.target} is an increment, with a reason not to be one")


def _agree(point: Point) -> None:
    """Rules between the fields of a point."""
    if not point.machine:
        raise _BadManifest("the machine has no name")
    if _ID.fullmatch(point.id) and id_moment(point.id) != point.created.replace(microsecond=0):
        raise _BadManifest("the time is not that of the id")
    if point.level is Level.FULL and not point.whole:
        raise _BadManifest("an increment in a point that was to be whole")
    if any(disk.parent is not None and disk.parent.point == point.id for disk in point.disks):
        raise _BadManifest("a disk is its own parent")
    _distinct([disk.target for disk in point.disks], "disk")
    _distinct([header.name for header in point.firmware], "firmware device")
    files = [disk.files for disk in point.disks if disk.files is not None]
    _distinct([name for kept in files for name in (kept.image, kept.hashes)], "file")


def _distinct(names: list[str], kind: str) -> None:
    if len(set(names)) != len(names):
        raise _BadManifest(f"a {kind} stands twice")
