"""Rollbacks under way: what they are to write, and how far they came.

    STATE/rollbacks/<job>/journal.json     written and synced before each step that cannot be taken back
    STATE/rollbacks/<job>/lock             held (flock) while the rollback's process lives
    STATE/rollbacks/<job>/stage0 …         what is to be written to each disk (or elsewhere: --staging)
    STATE/rollbacks/<job>/hashes0 …        the hashes of all chunks that each disk shall hold
    STATE/rollbacks/<job>/wanted0 …        which chunks are to be written

Once a journal says "writing", only the rollback itself may touch its disks. They are found again by
their files' identities, because the machine may be started anew, or named by its images.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pullback import errors, state
from pullback.model import rollbacks
from pullback.model.rollbacks import FileIdentity, Journal, Phase

_JOURNAL = "journal.json"
_LOCK = "lock"
#: Bytes of a journal: some hundred for each disk.
_LARGEST = 1 << 24
_BLOCKED = frozenset({Phase.WRITING})
#: The disks are nobody's but the machine's.
_FREE = frozenset({Phase.STAGING, Phase.OVER})


def directory(base: Path, job: str) -> Path:
    """What belongs to one rollback, below the state directory `base`."""
    return base / "rollbacks" / job


@contextmanager
def living(base: Path, job: str) -> Iterator[Path]:
    """The rollback's directory, marked as in use while the block runs. Raises `BusyError`."""
    place = directory(base, job)
    descriptor = _claimed(place)
    try:
        yield place
    finally:
        os.close(descriptor)


def _claimed(place: Path) -> int:
    """The open, locked file. `sweep` may remove a directory that is not locked yet: then it is made again."""
    while True:
        state.private(place)
        try:
            descriptor = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        if not _locked(descriptor):
            os.close(descriptor)
            raise errors.BusyError(what="the rollback", holder="another pullback process is at it just now")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(place / _LOCK)):
                return descriptor
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lives(base: Path, job: str) -> bool:
    """Does the process of that rollback live?"""
    try:
        descriptor = os.open(directory(base, job) / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _locked(descriptor)
    finally:
        os.close(descriptor)


def save(base: Path, journal: Journal) -> None:
    """Durable when it returns."""
    state.write_durably(state.private(directory(base, journal.job)) / _JOURNAL, journal.to_dict())


def load(base: Path, job: str) -> Journal | None:
    """The journal of a job; None if it has none. Raises `JournalDamaged`."""
    path = directory(base, job) / _JOURNAL
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST)
        found = rollbacks.from_dict(json.loads(data))
        if found.job != job:
            raise ValueError("it is another job's")
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(path)) from error
    except (ValueError, RecursionError, OSError) as error:
        raise errors.JournalDamaged(path=str(path), problem=str(error).splitlines()[0]) from error
    return found


def is_writing(base: Path, job: str) -> bool:
    """May a disk of that job be half written? Raises `JournalDamaged`."""
    found = load(base, job)
    return found is not None and found.phase in _BLOCKED


def every(base: Path) -> list[Journal]:
    """All journals. Raises `JournalDamaged`."""
    found = [load(base, path.name) for path in sorted((base / "rollbacks").glob("*")) if path.is_dir()]
    return [journal for journal in found if journal is not None]


def identity(path: Path) -> FileIdentity | None:
    """What a file or block device is called by the kernel; None if it cannot be seen."""
    try:
        status = path.stat()
    except OSError:
        return None
    block = status.st_rdev if stat.S_ISBLK(status.st_mode) else 0
    return FileIdentity(path=str(path.resolve()), device=status.st_dev, inode=status.st_ino, block=block)


def concerning(base: Path, paths: Iterable[Path], machine: str) -> Journal | None:
    """The rollback that has begun to write to one of these files, or has just ended; None if there is none.

    Disks whose files could not be seen are known by the machine's name alone. Raises `JournalDamaged`.
    """
    journals = [journal for journal in every(base) if journal.phase not in _FREE]
    if not journals:
        return None
    there = [found for path in paths if (found := identity(path)) is not None]
    for journal in journals:
        for disk in journal.disks:
            if any(same(known, found) for known in disk.files for found in there):
                return journal
            if not disk.files and journal.machine == machine:
                return journal
    return None


def same(known: FileIdentity, found: FileIdentity) -> bool:
    """Is it the same file?

    Numbers of devices may change when the host is started anew, so the path will do in their place.
    """
    if known.block or found.block:
        return bool(known.block and found.block) and (known.block == found.block or known.path == found.path)
    return known.inode == found.inode and (known.device == found.device or known.path == found.path)


def require_none(base: Path, paths: Iterable[Path], machine: str) -> None:
    """Raise `RollbackPending` if a disk in these files is half rolled back, `BusyError` while that goes on."""
    journal = concerning(base, paths, machine)
    if journal is None or journal.phase not in _BLOCKED:
        return
    if lives(base, journal.job):
        raise errors.BusyError(what=f"the disks of {journal.machine}", holder=f"a rollback to {journal.point}")
    raise pending(journal)


def pending(journal: Journal) -> errors.RollbackPending:
    """The error for who may not use these disks."""
    return errors.RollbackPending(machine=journal.machine, point=journal.point, command=journal.command)


def remove(base: Path, journal: Journal) -> None:
    """Forget a rollback, with what it had staged. The journal goes last, so that all the rest is found again."""
    for disk in journal.disks:
        for path in (disk.staged, disk.hashes, disk.wanted):
            _unlink(Path(path), journal.job)
    _clear(directory(base, journal.job))


def _unlink(path: Path, job: str) -> None:
    """A journal is outside input: only what carries the job's name is removed."""
    if job in path.parts or job in path.name:
        with suppress(OSError):
            path.unlink()


def _clear(place: Path) -> None:
    for path in sorted(place.glob("*"), key=lambda path: path.name == _JOURNAL):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        place.rmdir()


def sweep(base: Path) -> None:
    """Remove what dead rollbacks left, but of one that has begun to write and is not through."""
    for place in sorted((base / "rollbacks").glob("*")):
        if not place.is_dir() or lives(base, place.name):
            continue
        journal = load(base, place.name)
        if journal is None:
            _clear(place)
        elif journal.phase not in _BLOCKED:
            remove(base, journal)
