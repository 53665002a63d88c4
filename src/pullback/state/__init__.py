"""What Pullback keeps on disk about machines and jobs: locks and job records.

    STATE/locks/<hash of the socket>.lock     held (flock) while a command works on a machine
    STATE/jobs/<job>.json                     a running job, written and synced before its first command
    STATE/scratch/                            default place of scratch images
    RUNTIME/<job>/                            private sockets and mount points of a job
    CACHE/                                    what can be found out again

QEMU itself is the truth about what runs; a record adds what QEMU cannot tell: that it was we who
paused the machine, which NBD server is ours, which files are to be removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pullback import errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Directories:
    """Where state, runtime and cache files go."""

    state: Path
    runtime: Path
    cache: Path

    @property
    def scratch(self) -> Path:
        """Default directory of scratch images."""
        return self.state / "scratch"


#: What a lock's holder says that is no user's command (`engine.keeper`).
KEEPER = "keeper"
_KEEPER_SECONDS = 10.0


def directories(override: Path | None = None) -> Directories:
    """The system's directories for root, the XDG ones for others.

    `override` (else $PULLBACK_STATE_DIR) puts everything under one directory.
    """
    chosen = override or (Path(text) if (text := os.environ.get("PULLBACK_STATE_DIR")) else None)
    if chosen is not None:
        base = chosen.absolute()
        return Directories(state=base, runtime=base / "run", cache=base / "cache")
    if os.geteuid() == 0:
        return Directories(
            state=Path("/var/lib/pullback"), runtime=Path("/run/pullback"), cache=Path("/var/cache/pullback")
        )
    home = Path.home()
    return Directories(
        state=_xdg("XDG_STATE_HOME", home / ".local/state"),
        runtime=_xdg("XDG_RUNTIME_DIR", home / ".local/state/pullback/run"),
        cache=_xdg("XDG_CACHE_HOME", home / ".cache"),
    )


def _xdg(variable: str, default: Path) -> Path:
    return Path(os.environ.get(variable) or default) / "pullback"


def machine_directory(base: Path, machine: str) -> Path:
    """What is kept of a machine as long as it is known: below the state directory `base`."""
    return base / "machines" / hashlib.sha256(machine.encode()).hexdigest()[:24]


def private(directory: Path) -> Path:
    """Make `directory` (and its parents) if it is not there, readable by us alone."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(directory)) from error
    except OSError as error:
        raise errors.CannotWrite(path=str(directory), reason=_reason(error)) from error
    return directory


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


# -- locks -----------------------------------------------------------------------------------


@contextmanager
def lock(directories: Directories, what: str, *, command: str, title: str) -> Iterator[None]:
    """Hold the lock of `what` (a socket's path, a machine's identity) while the block runs.

    Raises `BusyError` with who holds it and since when. The lock is the kernel's, so it ends with
    its holder however that ends; the text in the file is for people.
    """
    name = hashlib.sha256(what.encode()).hexdigest()[:24]
    path = private(directories.state / "locks") / f"{name}.lock"
    with _opened(path) as descriptor:
        _acquire(descriptor, title)
        os.ftruncate(descriptor, 0)
        note = {"what": what, "command": command, "pid": os.getpid(), "since": _now()}
        os.pwrite(descriptor, json.dumps(note).encode(), 0)
        yield


def _acquire(descriptor: int, title: str) -> None:
    """Lock it. A keeper holds a machine only for moments, so it is waited for."""
    deadline = time.monotonic() + _KEEPER_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            holder = _holder(descriptor)
            if not holder.startswith(f"{KEEPER},") or time.monotonic() > deadline:
                raise errors.BusyError(what=title, holder=holder) from error
            time.sleep(0.02)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(path)) from error
    except OSError as error:
        raise errors.CannotWrite(path=str(path), reason=_reason(error)) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        note = json.loads(os.pread(descriptor, 4096, 0))
        return f"{note['command']}, process {note['pid']}, since {note['since']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another pullback process"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# -- job records -----------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Record:
    """A running job, as it is on disk."""

    #: Eight hex digits; part of every name that the job makes in QEMU.
    job: str
    #: The machine's socket.
    socket: str
    machine: str
    command: str
    pid: int
    #: UTC.
    started: str
    #: The QEMU process, as `<pid>:<start time>`: a record must not continue another one.
    qemu: str = ""
    #: True from before `stop` is sent until `cont` was answered: whoever finds it may continue the machine.
    paused_by_us: bool = False
    #: The guest agent's socket, from before it is asked to freeze until it has thawed: who finds it thaws.
    frozen_agent: str = ""
    #: Of a snapshot that lasts: what it is (`engine.opened`). It is kept as long as its QEMU lives.
    open: dict[str, Any] | None = None
    #: Of what lasts: how it is to end, once that is decided, "undo" or "keep"; who finds it so goes on with that.
    #: While it is being made that is "undo", and only the last step makes it "", which is: it stays.
    ends: str = ""
    #: Why it is undone, for who asks later; "" for what never began.
    why: str = ""
    #: Bitmaps of checkpoints that are made with it, to be merged back when it is undone.
    checkpoints: list[str] = field(default_factory=list)
    #: Ids of exports that are being made, to be removed when it is undone.
    exports: list[str] = field(default_factory=list)
    #: Scratch images, to be removed.
    scratch: list[str] = field(default_factory=list)
    #: Scratch images under names that the user chose, to be removed too.
    chosen: list[str] = field(default_factory=list)
    #: Of a rollback: what is to be known to give the disks back to the guest (`engine.swap`).
    swap: dict[str, Any] | None = None
    #: Directory of sockets and mount points, to be removed.
    runtime: str = ""
    #: Where what can be found out again is kept.
    cache: str = ""


class Job:
    """A job's record and its file. `save` is durable when it returns."""

    def __init__(self, path: Path, record: Record) -> None:
        self.path = path
        self.record = record

    def save(self) -> None:
        """Write beside, sync, rename, sync the directory."""
        write_durably(self.path, asdict(self.record))

    def remove(self) -> None:
        """The job left nothing behind: forget it."""
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".keeper").unlink(missing_ok=True)


def write_durably(path: Path, values: object) -> None:
    """Write JSON beside, sync, rename, sync the directory."""
    beside = path.with_suffix(".new")
    try:
        with open(beside, "w", encoding="utf-8", opener=_private_opener) as file:
            json.dump(values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise errors.CannotWrite(path=str(path), reason=_reason(error)) from error


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def sync_directory(path: Path) -> None:
    """Make names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_job(directories: Directories, *, job: str, socket: Path, machine: str, command: str, qemu: str = "") -> Job:
    """A new job with its record on disk and its private runtime directory, which the record names before it is made."""
    runtime = directories.runtime / job
    record = Record(
        job=job,
        socket=str(socket),
        machine=machine,
        command=command,
        pid=os.getpid(),
        started=_now(),
        runtime=str(runtime),
        cache=str(directories.cache),
        qemu=qemu,
    )
    made = Job(private(directories.state / "jobs") / f"{job}.json", record)
    made.save()
    try:
        private(private(directories.runtime) / job)
    except BaseException:
        made.remove()
        raise
    return made


def load_job(path: Path) -> Job | None:
    """The job recorded in `path`; None if that is no record."""
    try:
        content: Any = json.loads(path.read_bytes())
        known = {item.name for item in fields(Record)}
        record = Record(**{key: value for key, value in content.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return Job(path, record) if _plausible(record) else None


#: How a job may end: as if it had not been, or with what it made.
UNDO, KEEP = "undo", "keep"


def _plausible(record: Record) -> bool:
    """Records are read by root and name files to be removed: take none that was tampered with."""
    named = [record.socket, record.machine, record.command, record.started, record.qemu, record.frozen_agent]
    texts = [record.job, record.ends, record.why, record.runtime, record.cache, *named]
    lists = [record.scratch, record.chosen, record.checkpoints, record.exports]
    return (
        all(isinstance(given, list) for given in lists)
        and all(_is_text(text) for text in (*texts, *(text for given in lists for text in given)))
        and record.ends in ("", UNDO, KEEP)
        and type(record.pid) is int
        and (record.open is None or isinstance(record.open, dict))
        and (record.swap is None or isinstance(record.swap, dict))
        and isinstance(record.paused_by_us, bool)
        and len(record.job) == 8
        and set(record.job) <= set("0123456789abcdef")
        and all(Path(path).is_absolute() for path in record.chosen)
        and all(f"pullback-{record.job}-" in Path(path).name for path in record.scratch)
        and (not record.runtime or _is_plain(record.runtime, record.job))
    )


def _is_text(value: object) -> bool:
    """A name or path that the system can take."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a character
        return False
    return True


def _is_plain(runtime: str, job: str) -> bool:
    path = Path(runtime)
    return path.is_absolute() and path.name == job and ".." not in path.parts


def jobs_of(directories: Directories, *, socket: Path, machine: str) -> list[Job]:
    """Records of earlier jobs on a machine (its lock is held by us, so their makers are dead)."""
    found = []
    with suppress(FileNotFoundError):
        for path in sorted((directories.state / "jobs").glob("*.json")):
            job = load_job(path)
            if job is None or job.record.job != path.stem:
                continue
            if job.record.socket == str(socket) or job.record.machine == machine:
                found.append(job)
    return found


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
