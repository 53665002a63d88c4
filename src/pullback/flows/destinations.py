"""Where a restored disk goes: a new file, a block device, or an NBD server.

A file has another name until it is whole, durable and proven. A device or server is written in place, so
what it holds after a failure is neither the old nor the new content, and the error says so.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import re
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pullback import errors, state, transfer
from pullback.endpoint import Channel, Endpoint
from pullback.engine import imagelock
from pullback.extents import Extent, Mapped
from pullback.model import urls
from pullback.model.exports import NbdAddress, NbdUri
from pullback.programs import qemu_img, qemu_nbd
from pullback.progress import Cancel
from pullback.transfer import FileEndpoint, NbdEndpoint

_NBD = re.compile(r"nbds?(\+unix|\+vsock)?://", re.ASCII)
_TARGETED = re.compile(r"(?P<target>[A-Za-z0-9_.-]+)=(?P<place>.+)", re.ASCII | re.DOTALL)
_DEVICES = Path("/dev")
_FLOCK = struct.Struct("hhqqi4x")
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})


class Format(enum.StrEnum):
    """What a restored disk is written as."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlace:
    """A file to be made, or a block device."""

    #: Absolute.
    path: Path
    #: As the user said; None: by the name's suffix.
    format: Format | None = None

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdPlace:
    """An export of an NBD server."""

    uri: str

    def __str__(self) -> str:
        return self.uri


Place = FilePlace | NbdPlace


# -- names -----------------------------------------------------------------------------------


def targeted(text: str) -> tuple[str, Place] | None:
    """`TARGET=PLACE` as a target and a place; None if it is not that. (A path `a=b` is written `./a=b`.)"""
    match = _TARGETED.fullmatch(text)
    return (match["target"], parse(match["place"])) if match else None


def parse(text: str) -> Place:
    """A path, `raw:PATH`, `qcow2:PATH`, or an NBD URI. Raises `BadUrl`."""
    if "\0" in text or not text:
        raise _bad(text, "no path holds a zero byte" if text else "it is empty")
    if _NBD.match(text):
        return NbdPlace(uri=text)
    if re.match(r"[a-z0-9+]+://", text, re.ASCII):
        raise _bad(text, "of URIs, there are nbd://, nbds://, nbd+unix:// and nbds+unix://")
    format, colon, path = text.partition(":")
    given = Format(format) if colon and format in urls.FORMATS else None
    place = path if given else text
    if not place:
        raise _bad(text, "the path is missing")
    return FilePlace(path=Path(place).absolute(), format=given)


def _bad(text: str, problem: str) -> errors.BadUrl:
    example = "Name a file, a block device, or a server: /srv/vda.qcow2, /dev/vg/web01, nbd://host/export"
    return errors.BadUrl(url=text, kind="destination", problem=problem, example=example)


def names_itself(text: str) -> bool:
    """Can it be nothing but the place of one disk (a URI, a path with its format, a block device that is there)?"""
    place = parse(text)
    return isinstance(place, NbdPlace) or place.format is not None or place.path.is_block_device()


# -- before anything is written --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Output:
    """A disk's place, as it was found before anything is written."""

    target: str
    #: Bytes of the disk.
    size: int
    #: What messages call the place.
    name: str
    #: An NBD server, or a path (symbolic links followed).
    place: NbdUri | NbdAddress | Path
    format: Format
    #: Whether `place` is a block device.
    device: bool = False
    force: bool = False

    def unusable(self, reason: str, way_out: str = "Name another destination.") -> errors.DestinationUnusable:
        """The error for a place that cannot be used."""
        return errors.DestinationUnusable(place=self.name, target=self.target, reason=reason, way_out=way_out)


def output(target: str, size: int, place: Place, *, force: bool, format: Format = Format.RAW) -> Output:
    """Look at the place of a disk of `size` bytes; `format` is for a file whose name does not say it.

    Raises `DestinationExists` (a file is there, and not `force`), `DestinationUnusable`, `BusyError`
    (a block device, or the image of a running machine, that is in use), `CannotWrite`. An NBD server
    is not asked yet: some serve one client and end.
    """
    if isinstance(place, NbdPlace):
        return Output(target, size, place.uri, NbdUri(uri=place.uri), Format.RAW, force=force)
    path, name = Path(os.path.realpath(place.path)), str(place)
    mode = _mode(path)
    if mode is not None and stat.S_ISBLK(mode):
        found = Output(target, size, name, path, Format.RAW, device=True, force=force)
        _check_device(found, place.format)
        return found
    if mode is None and place.path.is_symlink() and not force:
        raise errors.DestinationExists(path=name)
    found = Output(target, size, name, path, place.format or _suffix(place.path) or format, force=force)
    _check_file(found, mode)
    return found


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(path)) from error
    except OSError as error:
        raise errors.CannotWrite(path=str(path), reason=error.strerror or str(error)) from error


def _suffix(path: Path) -> Format | None:
    return {".qcow2": Format.QCOW2, ".raw": Format.RAW, ".img": Format.RAW}.get(path.suffix)


def _check_device(found: Output, format: Format | None) -> None:
    assert isinstance(found.place, Path)
    if format is Format.QCOW2:
        raise found.unusable("a block device is written as it is, not as qcow2")
    if not found.force:
        raise found.unusable("all that is on this block device would be lost", "If that is meant, say --force.")
    with imagelock.unwritten(found.place), FileEndpoint(found.place) as device:
        _check_size(found, device)


def _check_file(found: Output, mode: int | None) -> None:
    path = found.place
    assert isinstance(path, Path)
    if mode is None:
        if path.is_relative_to(_DEVICES) and not path.is_relative_to(_DEVICES / "shm"):
            raise found.unusable("there is no such device")
        return
    if not stat.S_ISREG(mode):
        what = "a directory is in its place" if stat.S_ISDIR(mode) else "it is neither a file nor a block device"
        raise errors.CannotWrite(path=found.name, reason=what)
    if not found.force:
        raise errors.DestinationExists(path=found.name)
    with imagelock.unwritten(path):  # the image of a machine that runs
        pass


def _check_size(found: Output, endpoint: Endpoint) -> None:
    if endpoint.size < found.size:
        raise found.unusable(f"it has {endpoint.size} bytes, and the disk {found.size}")


def refuse_twice(outputs: list[Output]) -> None:
    """No two disks to one place. Raises `UsageError`."""
    taken: dict[object, str] = {}
    for each in outputs:
        identity: object = each.place
        if each.device and isinstance(each.place, Path):
            identity = each.place.stat().st_rdev
        if identity in taken:
            raise errors.UsageError(problem=f"{taken[identity]} and {each.target} cannot both go to {each.name}")
        taken[identity] = each.target


# -- writing ---------------------------------------------------------------------------------


#: Called right before the first byte is written. True: what is there reads as zeroes.
Prepare = Callable[[], bool]


class Fill(Protocol):
    """Writes a whole disk. Without `prepare`, what is there reads as zeroes."""

    def __call__(self, endpoint: Endpoint, prepare: Prepare | None = None) -> None: ...


#: Reads a whole disk, and raises if it is not what it must be.
Check = Callable[[Endpoint], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What there is to say of a place that was written."""

    #: Bytes that it has behind the disk's end.
    behind: int = 0
    #: Clauses for people.
    notes: tuple[str, ...] = ()


def write(to: Output, fill: Fill, check: Check | None, *, cancel: Cancel, discard: bool = False) -> Written:
    """Have a place written, made durable, then checked.

    A file has its name only when all of that is done. `discard`: all that a device or server holds is
    discarded first. Raises what `fill` and `check` raise, `DestinationFull`, `DestinationUnusable`,
    `DestinationExists`, `BusyError`, `EndpointFailed`.
    """
    if isinstance(to.place, NbdUri | NbdAddress):
        return _write_server(to, to.place, fill, check, cancel, discard=discard)
    if to.device:
        return _write_device(to, to.place, fill, check, cancel, discard=discard)
    try:
        with _staged(to) as beside:
            writer = _write_raw if to.format is Format.RAW else _write_qcow2
            writer(beside, to, fill, check, cancel)
    except errors.DestinationFull as error:
        raise errors.DestinationFull(path=to.name) from error  # nobody knows the name of the file beside
    return Written()


def _write_raw(path: Path, to: Output, fill: Fill, check: Check | None, cancel: Cancel) -> None:
    with writing(to.name):
        os.truncate(path, to.size)
    with FileEndpoint(path, writable=True) as file:
        fill(file)
    if check is not None:
        _forget_cache(path)
        with FileEndpoint(path) as file:
            check(file)


def _write_qcow2(path: Path, to: Output, fill: Fill, check: Check | None, cancel: Cancel) -> None:
    qemu_img.create(path, to.size)
    with _served(path, to, cancel, writable=True) as image:
        fill(image)
    state.sync_file(path)
    if check is not None:
        _forget_cache(path)
        with _served(path, to, cancel) as image:
            check(image)


@contextlib.contextmanager
def _served(path: Path, to: Output, cancel: Cancel, *, writable: bool = False) -> Iterator[Endpoint]:
    with (
        tempfile.TemporaryDirectory(prefix="pullback-") as directory,
        qemu_nbd.serve(path, "qcow2", socket=Path(directory) / "out.sock", writable=writable) as address,
        NbdEndpoint(address, writable=writable, name=to.name, cancel=cancel) as image,
    ):
        yield image


def _write_device(to: Output, path: Path, fill: Fill, check: Check | None, cancel: Cancel, *, discard: bool) -> Written:
    # Held: nobody mounts it, and no QEMU opens it for writing.
    with imagelock.unwritten(path):
        with FileEndpoint(path, writable=True) as device:
            _check_size(to, device)
            _fill_in_place(to, device, fill, cancel, discard=discard)
        if check is not None:
            _forget_cache(path)
            with FileEndpoint(path) as again:
                check(again)
        return Written(behind=device.size - to.size)


def _write_server(
    to: Output, address: NbdUri | NbdAddress, fill: Fill, check: Check | None, cancel: Cancel, *, discard: bool
) -> Written:
    try:
        server = NbdEndpoint(address, writable=True, cancel=cancel, name=to.name)
    except errors.EndpointFailed as error:
        if error.errno == errno.EROFS:
            raise to.unusable("the server offers it for reading only") from error
        raise
    with server:
        _check_size(to, server)
        notes = _shortcomings(server, discard=discard)
        _fill_in_place(to, server, fill, cancel, discard=discard)
        if check is not None:
            check(server)
        return Written(behind=server.size - to.size, notes=notes)


def _shortcomings(server: NbdEndpoint, *, discard: bool) -> tuple[str, ...]:
    notes = []
    if not server.flushes:
        notes.append("cannot be told to flush, so whether all is durable there is not known")
    if discard and not server.trims:
        notes.append("knows no discard")
    return tuple(notes)


def _fill_in_place(to: Output, endpoint: Endpoint, fill: Fill, cancel: Cancel, *, discard: bool) -> None:
    watched = _Watched(endpoint)

    def prepare() -> bool:
        if discard:
            transfer.discard(watched, cancel=cancel)
        # If it can be made zero at once, zeroes need no requests afterwards.
        return transfer.clear(watched, to.size, cancel=cancel)

    try:
        fill(watched, prepare)
    except BaseException as error:
        if watched.opened:
            error.add_note(f"{to.name} was overwritten in part: what it holds now is undefined")
        raise


class _Watched:
    """An endpoint of which is known whether anybody began to use it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.opened = False

    @property
    def name(self) -> str:
        return self._endpoint.name

    @property
    def size(self) -> int:
        return self._endpoint.size

    @property
    def channels(self) -> int:
        return self._endpoint.channels

    def extents(self, window: Extent) -> Iterator[Mapped]:
        return self._endpoint.extents(window)

    def channel(self) -> Channel:
        self.opened = True
        return self._endpoint.channel()

    def close(self) -> None:
        self._endpoint.close()

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _forget_cache(path: Path) -> None:
    """What is read from now on comes from the disk, as far as the kernel can be told so."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


# -- a file with another name ----------------------------------------------------------------


@contextlib.contextmanager
def _staged(to: Output) -> Iterator[Path]:
    """A new, empty file beside, which gets its name when the block is left well, and is gone otherwise.

    Its name is always the same, so that the next attempt clears up after one that was killed; a lock
    keeps two attempts apart.
    """
    assert isinstance(to.place, Path)
    beside = to.place.with_name(f".{to.place.name}.partial")
    with _claimed(beside, to.name):
        try:
            yield beside
            with writing(to.name):
                appear(beside, to.place, name=to.name, force=to.force)
                state.sync_directory(beside.parent)
        finally:
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()


def appear(beside: Path, path: Path, *, name: str, force: bool) -> None:
    """Let a file be `path`, which messages call `name`. Raises `DestinationExists` if it is taken, and not `force`."""
    if force:
        beside.rename(path)
        return
    try:
        os.link(beside, path)  # unlike a rename, it never takes the place of a file that came meanwhile
    except FileExistsError as error:
        raise errors.DestinationExists(path=name) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        beside.rename(path)


@contextlib.contextmanager
def _claimed(beside: Path, name: str) -> Iterator[None]:
    with writing(name):
        descriptor = _claim(beside, name)
    try:
        yield
    finally:
        os.close(descriptor)


def _claim(beside: Path, name: str) -> int:
    """The open, locked, empty file `beside`."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        descriptor = os.open(beside, flags, 0o600)
        try:
            _lock(descriptor, name)
            # Whoever held the lock before may have renamed or removed it.
            if _same(descriptor, beside):
                os.ftruncate(descriptor, 0)
                os.fchmod(descriptor, 0o600)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, name: str) -> None:
    """On the first byte, which QEMU's own locks leave alone (block/file-posix.c begins at byte 100)."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise errors.BusyError(what=name, holder="another restore writes it") from error
        if error.errno not in _NO_LOCKS:
            raise


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def writing(name: str) -> Iterator[None]:
    """The system's errors as ours."""
    try:
        yield
    except PermissionError as error:
        raise errors.PermissionDenied(path=name) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise errors.DestinationFull(path=name) from error
        raise errors.CannotWrite(path=name, reason=error.strerror or str(error)) from error
