"""Disk images as files: what they are, what lies under them, and how QEMU shall open each layer.

Nothing is left to QEMU's guessing: every layer is named with its driver. The content of a raw disk
is written by its guest, who can make it look like a qcow2 image that is backed by any file of the
host. So an image whose format was not given is taken for qcow2 only if it names no other file, and
a backing file only with the format that the image above records.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pullback import errors
from pullback.model import urls
from pullback.programs import qemu_img

#: QEMU opens chains of hundreds of images, slowly; longer ones than this are a loop or a mistake.
_LONGEST_CHAIN = 256
# qcow2 header (docs/interop/qcow2.txt): magic, version, offset of the backing file's name; in
# version 3 also the incompatible features, of which bit 2 says that data lies in an external file.
_HEADER = struct.Struct(">4sIQ")
_MAGIC = b"QFI\xfb"
_FEATURES = struct.Struct(">Q")
_FEATURES_AT = 72
_EXTERNAL_DATA = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A file of an image's chain."""

    path: Path
    #: qcow2 or raw.
    format: str
    #: The external file with a qcow2's data, if it has one.
    data_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A disk of a machine that is off."""

    target: str
    #: Top first.
    layers: tuple[Layer, ...]
    #: Can be opened for writing: checkpoints can be stored in it.
    writable: bool
    #: A qcow2 that was not closed cleanly, to be repaired before anything is written.
    dirty: bool = False
    #: Marked corrupt by QEMU.
    corrupt: bool = False

    @property
    def top(self) -> Layer:
        """The image itself."""
        return self.layers[0]

    @property
    def path(self) -> Path:
        """Its file."""
        return self.top.path

    def quiet(self) -> Iterator[Path]:
        """The files that we never write to: all but the qcow2 which holds the checkpoints."""
        for layer in self.layers:
            if layer is not self.top or layer.format != "qcow2":
                yield layer.path
            if layer.data_file is not None:
                yield layer.data_file


def inspect(wanted: Sequence[urls.Image]) -> tuple[Image, ...]:
    """Look at the images (without their locks). Raises `ImageUnusable`, `PermissionDenied`, `UsageError`."""
    found = tuple(_inspect(image) for image in wanted)
    _refuse_twice(found)
    return found


def _inspect(wanted: urls.Image) -> Image:
    path = wanted.path
    _check(path)
    format = wanted.format or _probe(wanted)
    layers = tuple(_layers(path, format))
    if format == "raw":
        return Image(target=wanted.target, layers=layers, writable=False)
    info = _info(path, format)
    return Image(target=wanted.target, layers=layers, writable=_writable(path), dirty=info.dirty, corrupt=info.corrupt)


def _check(path: Path) -> None:
    """The path is a file or a block device that we can read."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise errors.ImageUnusable(path=str(path), reason="it is a directory")
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise errors.ImageUnusable(path=str(path), reason="it is neither a file nor a block device")
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(path)) from error
    except OSError as error:
        raise errors.ImageUnusable(path=str(path), reason=os.strerror(error.errno or 0)) from error


def _writable(path: Path) -> bool:
    """Asked of the kernel, which knows read-only file systems and immutable files too."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _probe(wanted: urls.Image) -> str:
    """The format of an image, where nobody said it."""
    path = wanted.path
    with open(path, "rb", buffering=0) as file:
        header = file.read(_FEATURES_AT + _FEATURES.size)
    if header.startswith(_MAGIC):
        if _names_another(header):
            raise errors.ImageUnusable(
                path=str(path),
                reason="it looks like a qcow2 image over another file, which the guest of a raw disk could feign",
                way_out=f"If it really is one, say so: {wanted.target}=qcow2:{path}",
            )
        return "qcow2"
    format = _info(path, None).format
    if format != "raw":
        raise errors.ImageUnusable(
            path=str(path),
            reason=f"it looks like the format {format}, which is not supported",
            way_out=f"If it is a raw disk that only looks so: {wanted.target}=raw:{path}",
        )
    return format


def _names_another(header: bytes) -> bool:
    """Has a qcow2 header a backing file or an external data file?"""
    if len(header) < _HEADER.size:
        return True  # cut off: opening it will tell
    _, version, backing = _HEADER.unpack_from(header)
    if backing:
        return True
    if version < 3 or len(header) < _FEATURES_AT + _FEATURES.size:
        return False
    return bool(_FEATURES.unpack_from(header, _FEATURES_AT)[0] & _EXTERNAL_DATA)


def _info(path: Path, format: str | None) -> qemu_img.ImageInfo:
    try:
        return qemu_img.info(path, format=format)
    except errors.ProgramFailed as error:
        reason = error.message.splitlines()[-1].removeprefix("qemu-img: ").rstrip(".")
        raise errors.ImageUnusable(path=str(path), reason=reason) from error


def _layers(path: Path, format: str) -> Iterator[Layer]:
    seen: set[Path] = set()
    while True:
        if path.resolve() in seen or len(seen) >= _LONGEST_CHAIN:
            raise errors.ImageUnusable(path=str(path), reason="its backing files go round, or are too many")
        seen.add(path.resolve())
        info = _info(path, format) if format == "qcow2" else None
        yield Layer(path=path, format=format, data_file=_data_file(path, info))
        if info is None or info.backing is None:
            return
        path, format = _below(path, info)
        _check(path)


def _data_file(path: Path, info: qemu_img.ImageInfo | None) -> Path | None:
    if info is None or info.data_file is None:
        return None
    # QEMU takes a relative name from its own working directory, not from the image's (tried, 7.2).
    found = _local(path, info.data_file, "data file")
    _check(found)
    return found


def _below(path: Path, info: qemu_img.ImageInfo) -> tuple[Path, str]:
    """The backing file and its format, as the image above records them."""
    if info.backing_format not in urls.FORMATS:
        known = f"is recorded as {info.backing_format}, which is not supported" if info.backing_format else None
        raise errors.ImageUnusable(
            path=str(path),
            reason=f"the format of its backing file {info.backing} {known or 'is not recorded'}",
            way_out="Record it: qemu-img rebase -u -F FORMAT -b BACKING IMAGE",
        )
    return _local(path, info.full_backing or info.backing or "", "backing file"), info.backing_format


def _local(path: Path, name: str, what: str) -> Path:
    """A file name out of an image's header; names of protocols (nbd:, json:) are refused."""
    plain = name.removeprefix("file:")
    if ":" in plain.split("/")[0]:
        raise errors.ImageUnusable(path=str(path), reason=f"its {what} {name} is not a local file")
    return Path(plain).absolute()


def _refuse_twice(images: Iterable[Image]) -> None:
    tops: dict[tuple[int, ...], Image] = {}
    listed = tuple(images)
    for image in listed:
        twin = tops.setdefault(_identity(image.path), image)
        if twin is not image:
            raise errors.UsageError(problem=f"{twin.target} and {image.target} are the same image, {image.path}")
    for image in listed:
        for path in (file for layer in image.layers for file in (layer.path, layer.data_file) if file is not None):
            other = tops.get(_identity(path))
            if other is not None and other is not image:
                raise errors.UsageError(
                    problem=f"{other.path} is disk {other.target}, and a part of {image.target} too"
                )


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return (status.st_rdev,) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


# -- for QEMU --------------------------------------------------------------------------------


def node(index: int) -> str:
    """Name of the node of the image with that number."""
    return f"disk{index}"


def backing_node(index: int, depth: int) -> str:
    """Name of the node of a layer; depth 0 is the image itself."""
    return f"{node(index)}-b{depth}" if depth else node(index)


def blockdevs(image: Image, index: int) -> Iterator[tuple[Path, dict[str, object]]]:
    """All nodes of an image for `blockdev-add`, read-only, in order, each with the file it is about."""
    for depth in reversed(range(len(image.layers))):
        yield from ((image.layers[depth].path, options) for options in _layer(image, index, depth, read_only=True))


def top(image: Image, index: int, *, read_only: bool) -> list[dict[str, object]]:
    """The nodes of the image itself, for `blockdev-reopen`. Its data file is only ever read."""
    return list(_layer(image, index, 0, read_only=read_only))


def _layer(image: Image, index: int, depth: int, *, read_only: bool) -> Iterator[dict[str, object]]:
    layer, name = image.layers[depth], backing_node(index, depth)
    options: dict[str, object] = {"driver": layer.format, "node-name": name, "file": f"{name}-file"}
    yield _protocol(f"{name}-file", layer.path, read_only=read_only)
    if layer.format == "qcow2":
        below = depth + 1 < len(image.layers)
        options["backing"] = backing_node(index, depth + 1) if below else None
    if layer.data_file is not None:
        options["data-file"] = f"{name}-data"
        yield _protocol(f"{name}-data", layer.data_file, read_only=True)
    yield options | {"read-only": read_only, "discard": "unmap"}


def _protocol(name: str, path: Path, *, read_only: bool) -> dict[str, object]:
    return {
        "driver": "host_device" if stat.S_ISBLK(path.stat().st_mode) else "file",
        "node-name": name,
        "filename": str(path),
        "read-only": read_only,
        "locking": "on",
        "discard": "unmap",
    }
