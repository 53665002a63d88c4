"""What is fetched from the reader, written on the host: a file, a directory, a tar archive.

Names, links and types are a stranger's. A directory is written with descriptors, one component at a time, into a place
that nobody sees until it is whole: no name can lead out of it. Links that lead out, device nodes, pipes and sockets are
left out and told; bits for setuid, setgid and sticky are taken away; owners are who runs this.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pullback import errors
from pullback.guest import wire
from pullback.guest.entries import Data, Entry, Hole, Item, Type, Unread, Up, Whole
from pullback.units import MiB

#: Things that are told one by one; more are counted.
MAX_TOLD = 100
_ZEROES = bytes(1 * MiB)
_FULL = (errno.ENOSPC, errno.EDQUOT)
#: What a file system of the host says to a name or a link that it does not want: no reason to stop.
_UNWANTED = (errno.EINVAL, errno.ENAMETOOLONG, errno.EEXIST, errno.EILSEQ, errno.EPERM, errno.EMLINK, errno.EFBIG)
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Something that was not fetched."""

    #: Its path below what was fetched.
    path: bytes
    reason: str


@dataclass(slots=True)
class Taken:
    """What was fetched."""

    files: int = 0
    directories: int = 0
    links: int = 0
    #: Bytes of all the files, holes counted.
    size: int = 0
    #: Left out, because it could do harm or is no data; the first of them.
    left_out: list[LeftOut] = field(default_factory=list)
    left_out_count: int = 0
    #: Could not be read: the file system, or the restore point, is damaged; the first of them.
    unread: list[LeftOut] = field(default_factory=list)
    unread_count: int = 0

    def leave(self, path: bytes, reason: str) -> None:
        """Something is left out."""
        self.left_out_count += 1
        if len(self.left_out) < MAX_TOLD:
            self.left_out.append(LeftOut(path=path, reason=reason))

    def miss(self, path: bytes, reason: str) -> None:
        """Something cannot be read."""
        self.unread_count += 1
        if len(self.unread) < MAX_TOLD:
            self.unread.append(LeftOut(path=path, reason=reason))


def begun(items: Iterator[Item], path: str) -> Entry:
    """The first item, which says what was asked for. Raises `FileUnreadable`."""
    match next(items, None):
        case Entry() as entry:
            return entry
        case Unread() as unread:
            raise errors.FileUnreadable(path=path, reason=unread.reason)
    raise wire.bad("an answer without an entry")


def leads_out(target: bytes, depth: int) -> bool:
    """Could a link, `depth` directories below the top, lead out of it?

    `..` is only good at the begin: there it goes up through real directories. Behind a name it could go up from
    wherever another link leads.
    """
    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
    ups = 0
    while ups < len(parts) and parts[ups] == b"..":
        ups += 1
    return not target or target.startswith(b"/") or ups > depth or b".." in parts[ups:]


# -- one file --------------------------------------------------------------------------------


def pour(items: Iterator[Item], out: BinaryIO, path: str, advance: Advance) -> int:
    """The bytes of one file, whose entry came already; gives how many. Raises `FileUnreadable`, `CannotWrite`."""
    size = 0
    for item in items:
        match item:
            case Data():
                _write(out, item.data)
                size += len(item.data)
                advance(len(item.data))
            case Hole():
                _zeroes(out, item.length)
                size += item.length
                advance(item.length)
            case Unread():
                raise errors.FileUnreadable(path=path, reason=item.reason)
    return size


def _write(out: BinaryIO, data: bytes) -> None:
    with _writing("standard output"):
        out.write(data)


def _zeroes(out: BinaryIO, length: int) -> None:
    while length:
        piece = min(length, len(_ZEROES))
        _write(out, _ZEROES[:piece])
        length -= piece


def into_file(items: Iterator[Item], entry: Entry, place: Path, path: str, advance: Advance, *, force: bool) -> Taken:
    """One file, to `place`; it is there when it is whole. Raises `DestinationExists`, `FileUnreadable`, `BusyError`."""
    with _staged(place, force=force) as file:
        _fill(file, items, entry, path, advance)
        _dress(file, entry)
    return Taken(files=1, size=entry.size)


@contextlib.contextmanager
def _staged(place: Path, *, force: bool) -> Iterator[int]:
    """A new file, empty, open; it gets its name when the block ends well."""
    with _writing(str(place)), contextlib.ExitStack() as stack:
        parent = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, parent)
        name = os.fsencode(place.name)
        partial = _partial(name)
        file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        stack.callback(os.close, file)
        _alone(file, place)
        undo = stack.enter_context(contextlib.ExitStack())
        undo.callback(_forget, partial, parent)
        os.ftruncate(file, 0)
        yield file
        if not force and os.path.lexists(place):
            raise errors.DestinationExists(path=str(place))
        os.rename(partial, name, src_dir_fd=parent, dst_dir_fd=parent)
        undo.pop_all()


def _partial(name: bytes) -> bytes:
    return b"." + name[:200] + b".partial"


def _alone(descriptor: int, place: Path) -> None:
    """What a killed process left is taken over; what another one writes just now is not."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise errors.BusyError(what=str(place), holder="another process is just writing it") from error


def _forget(name: bytes, parent: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)


def _fill(file: int, items: Iterator[Item], entry: Entry, path: str, advance: Advance) -> None:
    """Bytes at their places; holes stay holes."""
    at = 0
    for item in items:
        match item:
            case Data():
                _put(file, item.data, at)
                at += len(item.data)
                advance(len(item.data))
            case Hole():
                at += item.length
                advance(item.length)
            case Whole():
                os.ftruncate(file, entry.size)
                return
            case Unread():
                raise errors.FileUnreadable(path=path, reason=item.reason)


def _put(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done


def _dress(descriptor: int, entry: Entry, *, least: int = 0) -> None:
    os.fchmod(descriptor, entry.mode & 0o777 | least)
    with contextlib.suppress(OverflowError, OSError):  # a time that the host does not know
        os.utime(descriptor, (entry.changed, entry.changed))


@contextlib.contextmanager
def _writing(place: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise errors.DestinationFull(path=place) from error
        if isinstance(error, PermissionError):
            raise errors.PermissionDenied(path=place) from error
        raise errors.CannotWrite(path=place, reason=error.strerror or str(error)) from error


# -- a directory -----------------------------------------------------------------------------


def into_directory(items: Iterator[Item], entry: Entry, place: Path, advance: Advance) -> Taken:
    """A directory, to `place`, which must not be there. It is there when all is; what cannot be read is told.

    Raises `DestinationExists`, `DestinationFull`, `CannotWrite`, `BusyError`.
    """
    if place.exists() or place.is_symlink():
        raise errors.DestinationExists(path=str(place))
    with _writing(str(place)), contextlib.ExitStack() as stack:
        beside = place.with_name(os.fsdecode(_partial(os.fsencode(place.name))))
        top = _fresh(beside, place)
        stack.callback(os.close, top)
        undo = stack.enter_context(contextlib.ExitStack())
        undo.callback(shutil.rmtree, beside, ignore_errors=True)
        with _Tree(top, entry, advance) as tree:
            for item in items:
                tree.take(item)
        if place.exists():
            raise errors.DestinationExists(path=str(place))
        beside.rename(place)
        undo.pop_all()
    return tree.taken


def _fresh(beside: Path, place: Path) -> int:
    """A new directory, in place of one that a killed process left; locked, and open."""
    with contextlib.suppress(FileNotFoundError):
        old = os.open(beside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _alone(old, place)
            shutil.rmtree(beside)
        finally:
            os.close(old)
    beside.mkdir(mode=0o700)
    top = os.open(beside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    _alone(top, place)
    return top


@dataclass(slots=True)
class _Open:
    """A directory that is being written."""

    descriptor: int
    entry: Entry
    path: tuple[bytes, ...]


class _Tree:
    """A tree on the host, written item by item."""

    def __init__(self, top: int, entry: Entry, advance: Advance) -> None:
        self.taken = Taken(directories=1)
        self._advance = advance
        self._stack = [_Open(os.dup(top), entry, ())]
        #: Directories that could not be made: their content is passed over.
        self._skipping = 0
        self._count = 1
        #: Files with several names, by their position: where they are.
        self._named: dict[int, tuple[bytes, ...]] = {}
        self._file: tuple[int, Entry, bytes, int] | None = None

    def __enter__(self) -> _Tree:
        return self

    def __exit__(self, *error: object) -> None:
        for one in self._stack:
            os.close(one.descriptor)
        self._stack.clear()
        if self._file is not None:
            os.close(self._file[0])

    def take(self, item: Item) -> None:
        """The next one."""
        match item:
            case Entry():
                self._count += 1
                self._entry(item)
            case Data() | Hole():
                self._more(item)
            case Whole():
                self._whole()
            case Unread():
                self._unread(item)
            case Up():
                self._up()

    # -- entries -------------------------------------------------------------------------

    def _entry(self, entry: Entry) -> None:
        if self._skipping:
            self._skipping += entry.type is Type.DIRECTORY
            return
        path = self._path(entry.name)
        try:
            self._make(entry)
        except OSError as error:
            if error.errno not in _UNWANTED:
                raise
            self.taken.leave(path, f"the host does not take it ({error.strerror})")
            self._skipping += entry.type is Type.DIRECTORY

    def _make(self, entry: Entry) -> None:
        match entry.type:
            case Type.DIRECTORY:
                self._directory(entry)
            case Type.FILE if entry.same:
                self._same(entry)
            case Type.FILE:
                self._begin(entry)
            case Type.LINK:
                self._link(entry)
            case _:
                self.taken.leave(self._path(entry.name), f"a {entry.type}")

    def _path(self, name: bytes) -> bytes:
        return b"/".join([*self._stack[-1].path, name])

    def _directory(self, entry: Entry) -> None:
        above = self._stack[-1]
        os.mkdir(entry.name, 0o700, dir_fd=above.descriptor)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(entry.name, flags, dir_fd=above.descriptor)
        self._stack.append(_Open(descriptor, entry, (*above.path, entry.name)))
        self.taken.directories += 1

    def _up(self) -> None:
        if self._skipping:
            self._skipping -= 1
            return
        done = self._stack.pop()
        _dress(done.descriptor, done.entry, least=0o700)
        os.close(done.descriptor)

    def _link(self, entry: Entry) -> None:
        if leads_out(entry.target, len(self._stack) - 1):
            self.taken.leave(self._path(entry.name), f"a link that leads out, to {wire.shown(entry.target)}")
            return
        os.symlink(entry.target, entry.name, dir_fd=self._stack[-1].descriptor)
        self.taken.links += 1

    def _same(self, entry: Entry) -> None:
        first = self._named.get(entry.same)
        if first is None:
            self.taken.leave(self._path(entry.name), "another name of a file that was left out")
            return
        with contextlib.ExitStack() as stack:
            parent = self._stack[0].descriptor
            for part in first[:-1]:
                parent = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
                stack.callback(os.close, parent)
            here = self._stack[-1].descriptor
            os.link(first[-1], entry.name, src_dir_fd=parent, dst_dir_fd=here, follow_symlinks=False)
        self.taken.files += 1

    # -- files ---------------------------------------------------------------------------

    def _begin(self, entry: Entry) -> None:
        above = self._stack[-1]
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(entry.name, flags, 0o600, dir_fd=above.descriptor)
        self._file = (descriptor, entry, self._path(entry.name), 0)
        if entry.links > 1:
            self._named[self._count] = (*above.path, entry.name)

    def _more(self, item: Data | Hole) -> None:
        length = len(item.data) if isinstance(item, Data) else item.length
        self._advance(length)
        if self._file is None:  # left out
            return
        descriptor, entry, path, at = self._file
        if isinstance(item, Data):
            _put(descriptor, item.data, at)
        self._file = (descriptor, entry, path, at + length)

    def _whole(self) -> None:
        if self._file is None:
            return
        descriptor, entry, path, _ = self._file
        self._file = None
        try:
            os.ftruncate(descriptor, entry.size)
            _dress(descriptor, entry)
            self.taken.files += 1
            self.taken.size += entry.size
        except OSError as error:
            if error.errno not in _UNWANTED:
                raise
            os.unlink(entry.name, dir_fd=self._stack[-1].descriptor)
            self.taken.leave(path, f"the host does not take it ({error.strerror})")
        finally:
            os.close(descriptor)

    def _unread(self, item: Unread) -> None:
        if self._file is None:
            self.taken.miss(item.path, item.reason)
            return
        descriptor, entry, path, _ = self._file
        self._file = None
        os.close(descriptor)
        os.unlink(entry.name, dir_fd=self._stack[-1].descriptor)
        self._named.pop(self._count, None)
        self.taken.miss(path, item.reason)


# -- an archive ------------------------------------------------------------------------------


def into_archive(items: Iterator[Item], entry: Entry, out: BinaryIO, top: bytes, advance: Advance) -> Taken:
    """A directory as a tar archive (POSIX 1003.1-2001, with modes, owners and links as they are) below the name `top`.

    Of a file that cannot be read to its end the rest is zeroes, and it is told. Device nodes, pipes and sockets are
    left out. Raises `CannotWrite`.
    """
    with _writing("standard output"), tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        _Archive(archive, top, advance).all(entry, items, taken := Taken())
    return taken


def into_archive_file(
    items: Iterator[Item], entry: Entry, place: Path, top: bytes, advance: Advance, *, force: bool
) -> Taken:
    """The same into a file, which is there when it is whole. Raises `DestinationExists`, `BusyError`."""
    with _staged(place, force=force) as file, os.fdopen(os.dup(file), "wb") as out:
        return into_archive(items, entry, out, top, advance)


class _Archive:
    """An archive, written item by item."""

    def __init__(self, archive: tarfile.TarFile, top: bytes, advance: Advance) -> None:
        self._archive = archive
        self._path = [top]
        self._advance = advance
        self._named: dict[int, str] = {}
        self._count = 0

    def all(self, first: Entry, items: Iterator[Item], taken: Taken) -> None:
        """The first entry, and what comes after it."""
        self._add(first, items, taken, named=False)
        for item in items:
            match item:
                case Entry():
                    self._add(item, items, taken, named=True)
                case Up():
                    self._path.pop()
                case Unread():
                    taken.miss(item.path, item.reason)

    def _add(self, entry: Entry, items: Iterator[Item], taken: Taken, *, named: bool) -> None:
        self._count += 1
        path = b"/".join([*self._path, entry.name] if named else self._path)
        info = tarfile.TarInfo(os.fsdecode(path))
        info.mode, info.uid, info.gid, info.mtime = entry.mode, entry.uid, entry.gid, entry.changed
        match entry.type:
            case Type.DIRECTORY:
                info.type = tarfile.DIRTYPE
                self._archive.addfile(info)
                self._path += [entry.name] if named else []
                taken.directories += 1
            case Type.LINK:
                info.type, info.linkname = tarfile.SYMTYPE, os.fsdecode(entry.target)
                self._archive.addfile(info)
                taken.links += 1
            case Type.FILE if entry.same:
                self._same(info, entry, taken)
            case Type.FILE:
                info.size = entry.size
                self._named |= {self._count: info.name} if entry.links > 1 else {}
                data = _Content(items, entry, path, taken, self._advance)
                self._archive.addfile(info, data)  # type: ignore[arg-type]  # it only calls read
                data.end()
                taken.files += 1
                taken.size += entry.size
            case _:
                taken.leave(path, f"a {entry.type}")

    def _same(self, info: tarfile.TarInfo, entry: Entry, taken: Taken) -> None:
        if (first := self._named.get(entry.same)) is None:
            taken.leave(os.fsencode(info.name), "another name of something that is no file")
            return
        info.type, info.linkname = tarfile.LNKTYPE, first
        self._archive.addfile(info)
        taken.files += 1


class _Content:
    """What tarfile reads a file from."""

    def __init__(self, items: Iterator[Item], entry: Entry, path: bytes, taken: Taken, advance: Advance) -> None:
        self._items = items
        self._path = path
        self._taken = taken
        self._advance = advance
        self._rest = b""
        self._hole = 0
        self._ended = False
        self._left = entry.size

    def read(self, length: int) -> bytes:
        """So many bytes; they are announced, so what cannot be read is zeroes."""
        parts = []
        while length:
            piece = self._piece(length)
            parts.append(piece)
            length -= len(piece)
            self._left -= len(piece)
            self._advance(len(piece))
        return b"".join(parts)

    def _piece(self, length: int) -> bytes:
        while True:
            if self._hole:
                piece = _ZEROES[: min(length, self._hole)]
                self._hole -= len(piece)
                return piece
            if self._rest:
                piece, self._rest = self._rest[:length], self._rest[length:]
                return piece
            self._next()

    def _next(self) -> None:
        match next(self._items):
            case Data() as item:
                self._rest = item.data
            case Hole() as item:
                self._hole = item.length
            case Unread() as item:
                self._taken.miss(self._path, item.reason)
                self._hole, self._ended = self._left, True
            case _:
                self._ended = True

    def end(self) -> None:
        """Go on to the end of the file."""
        while not self._ended:
            self._next()
