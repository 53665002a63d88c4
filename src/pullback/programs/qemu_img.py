"""qemu-img: making images and looking at them. Facts from QEMU's docs/tools/qemu-img.rst."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pullback import errors
from pullback.programs import process

_TIMEOUT = 60.0
_CHECK_TIMEOUT = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBitmap:
    """A dirty bitmap as it stands in a qcow2 file."""

    name: str
    #: Records writes when the image is opened (flag `auto`).
    recording: bool
    #: Somebody has the image open for writing, or died so: the stored bits are worthless (flag `in-use`).
    in_use: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """What an image file says of itself (nothing behind it is opened)."""

    #: Format, as probed or as given.
    format: str
    #: Bytes of the guest's disk.
    virtual_size: int
    #: Name of the backing file, exactly as it stands in the image.
    backing: str | None
    #: Format of the backing file, as it stands in the image.
    backing_format: str | None
    #: Name of an external data file (qcow2), if there is one.
    data_file: str | None
    #: Marked corrupt by QEMU.
    corrupt: bool
    #: The backing file's name as QEMU would open it: absolute if `path` was, or of a protocol (`nbd://…`).
    full_backing: str | None = None
    #: Was not closed cleanly, and its reference counts must be repaired before it is written to.
    dirty: bool = False
    bitmaps: tuple[StoredBitmap, ...] = ()
    #: Bytes of a cluster; 0 where the format has none.
    cluster: int = 0


def create(
    path: Path | str, size: int, *, format: str = "qcow2", backing: str | None = None, options: str | None = None
) -> None:
    """Make an image of `size` bytes; `backing` is written as given (relative to `path`) and not opened."""
    argv: list[str | Path] = ["qemu-img", "create", "-q", "-f", format]
    if backing is not None:
        argv += ["-u", "-b", backing, "-F", "qcow2"]
    if options:
        argv += ["-o", options]
    process.run([*argv, path, str(size)], timeout=_TIMEOUT)


def create_overlay(path: Path, size: int, *, backing: str, format: str) -> None:
    """An empty qcow2 over any image, which is named as given and not opened."""
    argv: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", format]
    process.run([*argv, path, str(size)], timeout=_TIMEOUT)


def info(path: Path | str, *, format: str | None = None, timeout: float = _TIMEOUT) -> ImageInfo:
    """Look at one image (a path, or an NBD URI), without its backing chain and without taking its lock."""
    argv: list[str | Path] = ["qemu-img", "info", "-U", "--output=json"]
    if format:
        argv += ["-f", format]
    answer = _object(process.run([*argv, path], timeout=timeout))
    specific = answer.get("format-specific")
    inner = specific.get("data") if isinstance(specific, dict) else None
    details = inner if isinstance(inner, dict) else {}
    size = answer.get("virtual-size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise errors.BadReply(who="qemu-img", problem=f"no size for {path}")
    return ImageInfo(
        format=str(answer.get("format")),
        virtual_size=size,
        backing=_text(answer.get("backing-filename")),
        backing_format=_text(answer.get("backing-filename-format")),
        data_file=_text(details.get("data-file")),
        corrupt=bool(details.get("corrupt")),
        full_backing=_text(answer.get("full-backing-filename")),
        dirty=bool(answer.get("dirty-flag")),
        bitmaps=_bitmaps(details.get("bitmaps")),
        cluster=cluster if isinstance(cluster := answer.get("cluster-size"), int) else 0,
    )


def allocated(path: Path, *, format: str) -> bool:
    """Has an image data of its own, its backing chain aside?"""
    output = process.run(["qemu-img", "map", "-U", "--output=json", "-f", format, path], timeout=_TIMEOUT)
    try:
        ranges = json.loads(output)
    except ValueError as error:
        raise errors.BadReply(who="qemu-img", problem=str(error)) from error
    return any(item.get("present", True) and item.get("depth") == 0 for item in ranges if isinstance(item, dict))


def _bitmaps(listed: object) -> tuple[StoredBitmap, ...]:
    records = listed if isinstance(listed, list) else []
    return tuple(_bitmap(record) for record in records if isinstance(record, dict))


def _bitmap(record: dict[str, object]) -> StoredBitmap:
    flags = record.get("flags")
    known = flags if isinstance(flags, list) else []
    return StoredBitmap(name=str(record.get("name")), recording="auto" in known, in_use="in-use" in known)


def _object(output: bytes) -> dict[str, object]:
    try:
        answer = json.loads(output)
    except ValueError as error:
        raise errors.BadReply(who="qemu-img", problem=str(error)) from error
    if not isinstance(answer, dict):
        raise errors.BadReply(who="qemu-img", problem="not an object")
    return answer


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def check(path: Path) -> str | None:
    """Check a qcow2's own structure (not its backing files); gives the complaint, or None if sound.

    qemu-img's exit status: 0 sound, 1 could not check, 2 corrupt, 3 leaked clusters (harmless).
    """
    try:
        process.run(["qemu-img", "check", "-q", "-U", "-f", "qcow2", path], timeout=_CHECK_TIMEOUT)
    except errors.ProgramFailed as error:
        return None if error.status == "exit status 3" else error.message
    return None
