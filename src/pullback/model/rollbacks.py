"""What a rollback asks of a machine, and what it writes down: values between the rooms."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pullback.model.disks import Disk
from pullback.model.exports import NbdAddress

#: The word that marks restore points which were made right before a rollback.
SAFETY_TAG = "before-rollback"
_MAX_SIZE = 1 << 63
_MAX_TEXT = 65536


class After(enum.StrEnum):
    """What becomes of the machine when its disks are rolled back."""

    #: It runs, from its beginning.
    RUN = "run"
    #: It stands still; `cont` starts it.
    HELD = "held"
    #: QEMU ends.
    QUIT = "quit"


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldDisk:
    """A disk that is to be taken from the guest."""

    disk: Disk
    #: Bitmaps whose union is to be told as what changed; empty: it is not asked.
    since: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldRequest:
    """Take these disks from the guest, whose memory is lost, and give them to us for writing."""

    #: Eight hex digits; every name that is made in QEMU carries it.
    job: str
    disks: tuple[HoldDisk, ...]
    #: None: it runs if it ran before.
    after: After | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldDisk:
    """A disk that nobody but us can reach: an export for writing."""

    disk: Disk
    address: NbdAddress
    #: Its image, as it is called here; none if it is no file.
    files: tuple[Path, ...]
    #: The metadata context there that tells what changed: `qemu:dirty-bitmap:NAME`; None: it was not asked.
    changes: str | None = None


# -- what is written down ---------------------------------------------------------------------


class Phase(enum.StrEnum):
    """How far a rollback is."""

    #: The disks are as they were.
    STAGING = "staging"
    #: A disk may be half written.
    WRITING = "writing"
    #: All disks hold what they shall, durably.
    WRITTEN = "written"
    #: The disks are given back, and only files of ours are left.
    OVER = "over"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """A file or block device, however it is called: numbers as stat(2) gives them."""

    path: str
    device: int
    inode: int
    #: The number of a block device; 0 for a file.
    block: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalDisk:
    """A disk in the journal. Sizes in bytes."""

    target: str
    qdev: str
    size: int
    block_size: int
    #: Digest of what it shall hold.
    digest: str
    #: Its image, and whatever other file holds its data; none: they cannot be seen from here.
    files: tuple[FileIdentity, ...]
    #: The file with what is to be written, each chunk at its place on the disk.
    staged: str
    #: The file with the hashes of all chunks.
    hashes: str
    #: The file that tells which chunks are to be written: a byte, 0 or 1, for each.
    wanted: str
    #: It is written, durable and proven.
    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """A rollback, as it is on disk."""

    job: str
    machine: str
    phase: Phase
    #: Id of the restore point, what the user called it, and the repository, for people.
    point: str
    asked: str
    repository: str
    #: UTC, ISO 8601.
    began: str
    #: The user's command, as far as it is needed to finish.
    command: str
    disks: tuple[JournalDisk, ...]
    #: The QEMU process in which the disks are held since it is known what differs: `<pid>:<start time>`, or "".
    qemu: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def from_dict(record: object) -> Journal:
    """A journal from JSON values, each checked. Raises `ValueError`."""
    values = _mapping(record)
    try:
        disks = tuple(_disk(entry) for entry in _sequence(values["disks"]))
        names = ("job", "machine", "point", "asked", "repository", "began", "command")
        texts = {name: _text(values[name]) for name in names}
        phase = Phase(_text(values["phase"]))
        qemu = _text(values["qemu"])
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error
    if len(texts["job"]) != 8 or set(texts["job"]) - set("0123456789abcdef"):
        raise ValueError("its job is none")
    if not disks:
        raise ValueError("it has no disks")
    return Journal(phase=phase, disks=disks, qemu=qemu, **texts)


def _disk(record: object) -> JournalDisk:
    values = _mapping(record)
    texts = {name: _text(values[name]) for name in ("target", "qdev", "digest", "staged", "hashes", "wanted")}
    size, block = _number(values["size"]), _number(values["block_size"])
    if not (size and block):
        raise ValueError("a disk has no size")
    files = tuple(_file(entry) for entry in _sequence(values["files"]))
    return JournalDisk(size=size, block_size=block, files=files, done=values.get("done") is True, **texts)


def _file(record: object) -> FileIdentity:
    values = _mapping(record)
    numbers = {name: _number(values[name]) for name in ("device", "inode", "block")}
    return FileIdentity(path=_text(values["path"]), **numbers)


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError("it is not made as it should be")
    return value


def _sequence(value: object) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise ValueError("it is not made as it should be")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or "\0" in value:
        raise ValueError("a text in it is none")
    value.encode()  # half a character is a ValueError
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_SIZE << 1:
        raise ValueError("a number in it is none")
    return value
