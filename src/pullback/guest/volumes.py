"""What the reader finds on disks: partitions, logical volumes, file systems, and how each is read. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from pullback.guest import wire
from pullback.model.texts import showable

#: Volumes of one machine.
MAX_VOLUMES = 4096
_KEY = re.compile(rb"/dev/[A-Za-z0-9+_./-]{1,512}")
# lvm(8): names of groups and of logical volumes.
_LOGICAL = re.compile(rb"[A-Za-z0-9+_.-]{1,128}/[A-Za-z0-9+_.-]{1,128}")
_WORD = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
_UUID = re.compile(r"[0-9A-Fa-f-]{4,64}")
_ESCAPE = re.compile(rb"\\x([0-9a-fA-F]{2})")
_LABEL_SHOWN = 256


class Kind(StrEnum):
    """What a volume is."""

    DISK = "disk"
    PARTITION = "partition"
    LOGICAL = "logical volume"


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A block device in the reader."""

    #: What users call it: vda, vda1, nvme0n1p2, group/volume.
    name: str
    kind: Kind
    #: The device in the reader; None: it could not be made ready.
    key: bytes | None
    #: Bytes.
    size: int
    #: What is on it, in blkid's words: ext4, xfs, swap, LVM2_member, crypto_LUKS …; None: nothing that is known.
    content: str | None = None
    #: The file system's label, and its UUID.
    label: str | None = None
    uuid: str | None = None
    #: Kind of the partition table on it: gpt, dos; None: there is none.
    table: str | None = None
    #: A partition's own label and UUID (gpt; dos has UUIDs alone).
    part_label: str | None = None
    part_uuid: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way to mount something: the kernel's name of the file system, and its options."""

    type: str
    options: str = ""


#: How each file system is mounted: first so that a journal is replayed (onto the overlay, never onto the point), then,
#: where that fails, as it stands. Errors of the file system must not stop the reader's kernel, whatever the disk says.
_WAYS: Mapping[str, tuple[Way, ...]] = {
    **{
        name: (Way(type="ext4", options="errors=continue"), Way(type="ext4", options="noload,errors=continue"))
        for name in ("ext2", "ext3", "ext4")
    },
    "xfs": (Way(type="xfs", options="nouuid"), Way(type="xfs", options="nouuid,norecovery")),
    "btrfs": (Way(type="btrfs"), Way(type="btrfs", options="rescue=nologreplay")),
    "vfat": (Way(type="vfat", options="utf8=1,codepage=437,iocharset=ascii"),),
    "exfat": (Way(type="exfat", options="iocharset=utf8"),),
    "iso9660": (Way(type="iso9660", options="iocharset=utf8"), Way(type="iso9660")),
    "udf": (Way(type="udf", options="iocharset=utf8"), Way(type="udf")),
    "squashfs": (Way(type="squashfs"),),
    "erofs": (Way(type="erofs"),),
    "f2fs": (Way(type="f2fs"),),
    "hfsplus": (Way(type="hfsplus"),),
    "ntfs": (Way(type="ntfs3"), Way(type="ntfs3", options="force"), Way(type="ntfs-3g")),
}
#: File systems that the reader checks (reader/read.pl, %CHECKS), by what blkid calls them.
CHECKS = {"ext2": "ext4", "ext3": "ext4", "ext4": "ext4", "xfs": "xfs", "btrfs": "btrfs", "vfat": "vfat"}
#: What has no files of its own, and why it is not opened.
_CLOSED = {
    "swap": "swap space",
    "LVM2_member": "part of a volume group",
    "crypto_LUKS": "encrypted (LUKS), and not opened",
    "BitLocker": "encrypted (BitLocker), and not opened",
    "linux_raid_member": "part of a RAID (md), which is not put together here",
    "zfs_member": "ZFS, which is not read here",
    "VMFS": "VMFS, which is not read here",
}


def ways(volume: Volume, having: frozenset[str] | None, *, together: Sequence[Volume] = ()) -> tuple[Way, ...]:
    """How to mount the volume, in order of preference; none if it cannot be.

    `having` are the drivers and programs of the reader; None: whatever the host has. `together` are all volumes, among
    which those of one btrfs are found.
    """
    found = _WAYS.get(volume.content or "", ())
    found = tuple(way for way in found if having is None or way.type in having)
    if volume.content != "btrfs":
        return found
    others = [other.key.decode() for other in together if other.uuid == volume.uuid and other.key]
    devices = [f"device={key}" for key in others] if len(others) > 1 else []
    return tuple(
        Way(type=way.type, options=",".join([*devices, *([way.options] if way.options else [])])) for way in found
    )


def closed(volume: Volume) -> str:
    """Why a volume has no files to show, in a few words."""
    if volume.table is not None:
        return f"partitions ({volume.table})"
    if volume.content is None:
        return "nothing that is known"
    if volume.key is None:
        return "could not be put together"
    return _CLOSED.get(volume.content, f"{volume.content}, which is not read here")


def parse(frame: wire.Frame, targets: Sequence[str]) -> Volume:
    """A volume as the reader tells it (kind V); `targets` are the disks' names by number. Raises `BadReply`."""
    kind, key, disk, number, size, name, told = frame.fields(7)
    found = _told(_facts(told), wire.integer(size))
    if kind == b"lv":
        if not _LOGICAL.fullmatch(name):
            raise wire.bad(f"a logical volume {wire.shown(name)!r}")
        return replace(found, name=name.decode(), kind=Kind.LOGICAL, key=_key(key) if key else None)
    target = targets[wire.integer(disk, high=len(targets) - 1)]
    if kind == b"disk":
        return replace(found, name=target, key=_key(key))
    if kind != b"part":
        raise wire.bad(f"a volume of kind {wire.shown(kind)!r}")
    title = partition(target, wire.integer(number, low=1, high=100_000))
    return replace(found, name=title, kind=Kind.PARTITION, key=_key(key))


def _told(facts: Mapping[bytes, bytes], size: int) -> Volume:
    return Volume(
        name="",
        kind=Kind.DISK,
        key=None,
        size=size,
        content=_word(facts.get(b"ID_FS_TYPE")),
        label=_text(facts.get(b"ID_FS_LABEL_ENC")),
        uuid=_uuid(facts.get(b"ID_FS_UUID_ENC")),
        table=_word(facts.get(b"ID_PART_TABLE_TYPE")),
        part_label=_text(facts.get(b"ID_PART_ENTRY_NAME")),
        part_uuid=_uuid(facts.get(b"ID_PART_ENTRY_UUID")),
    )


def partition(target: str, number: int) -> str:
    """The name of a partition, as Linux makes it: vda1, nvme0n1p1."""
    return f"{target}{'p' if target[-1].isdigit() else ''}{number}"


def _key(field: bytes) -> bytes:
    if not _KEY.fullmatch(field) or b".." in field:
        raise wire.bad(f"a device {wire.shown(field)!r}")
    return field


def _facts(told: bytes) -> dict[bytes, bytes]:
    """Lines KEY=value."""
    found = {}
    for line in told.split(b"\n")[:64]:
        name, equals, value = line.partition(b"=")
        if equals:
            found[name] = value
    return found


def _word(value: bytes | None) -> str | None:
    text = (value or b"").decode("ascii", "replace")
    return text if _WORD.fullmatch(text) else None


def _uuid(value: bytes | None) -> str | None:
    text = (value or b"").decode("ascii", "replace")
    return text if _UUID.fullmatch(text) else None


def _text(value: bytes | None) -> str | None:
    """blkid writes odd characters as \\xNN."""
    if not value:
        return None
    raw = _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), value)
    return showable(raw.decode("utf-8", "replace"))[:_LABEL_SHOWN]
