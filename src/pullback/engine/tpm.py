"""The state of a machine's TPM: the files of the swtpm beside QEMU (swtpm(8), `--tpmstate`).

QEMU has nothing of it: it talks to swtpm over a socket, and swtpm keeps the state in files, which it
changes whenever the guest changes something that lasts. So they are read twice, before the instant and
right after it. If both are equal, that was the state at the instant, for it does not go back within
moments (it holds counters). Else what it was right after is kept, and that is said.

Files of a directory are replaced by a rename (swtpm_nvstore_dir.c), so each is of one moment. The single
file of `backend-uri=file://` is written in place (swtpm_nvstore_linear_file.c): it is read until two
readings in a row are equal.

Whatever fails here is a sentence, and never hinders a backup.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from pullback import errors
from pullback.engine import peers, replies, scratch
from pullback.engine.monitor import Monitor
from pullback.model import tpm as values
from pullback.model.texts import showable
from pullback.model.tpm import Backend, TpmState, Version

#: Reading takes milliseconds; a file system that hangs must not hold the backup.
_SECONDS = 5.0
_MAX_CMDLINE = 1 << 16
#: swtpm writes seldom; a file that never rests is not kept.
_READINGS = 5
_FILES = ("permall", "volatilestate", "savestate")
_KEPT_NOT = "the TPM's state is not kept"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a swtpm keeps its state."""

    pid: int
    version: Version
    backend: Backend
    #: The directory, or the file, as that process sees it.
    path: Path
    encrypted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was found before the instant."""

    place: Place | None = None
    state: TpmState | None = None
    notes: tuple[str, ...] = ()


async def before(monitor: Monitor) -> Seen:
    """Find the machine's TPM, and read its state a first time."""
    try:
        kinds = await _kinds(monitor)
        if not kinds:
            return Seen()
        if kinds != ["emulator"]:
            return Seen(notes=(f"{_KEPT_NOT}: it is {_words(kinds)}, not one that swtpm emulates",))
        place = await _aside(partial(locate, monitor.peer))
        return Seen(place=place, state=await _aside(partial(read, place)))
    except (errors.PullbackError, OSError, TimeoutError, ValueError) as error:
        return Seen(notes=(_sentence(error),))


async def after(seen: Seen) -> tuple[TpmState | None, tuple[str, ...]]:
    """The state at the instant that was just now, and what there is to say of it."""
    if seen.place is None:
        return None, seen.notes
    try:
        state = await _aside(partial(read, seen.place))
    except (errors.PullbackError, OSError, TimeoutError, ValueError) as error:
        return None, (_sentence(error),)
    notes = []
    if state != seen.state:
        notes.append("the TPM's state changed around the instant: what is kept is from right after it")
    if seen.place.encrypted:
        notes.append("the TPM's state is encrypted by swtpm: keep its key too, it is not in the restore point")
    return state, tuple(notes)


async def _aside(work: Callable[[], _T]) -> _T:
    """Do it in a thread that nobody waits for longer than `_SECONDS`, and that keeps no process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: Exception | None) -> None:
        if done.done():  # it was given up
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast("_T", result))

    def run() -> None:
        result: _T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except (OSError, ValueError) as error:
            failure = error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="tpm", daemon=True).start()
    async with asyncio.timeout(_SECONDS):
        return await done


async def _kinds(monitor: Monitor) -> list[str]:
    """The kinds of the machine's TPMs: emulator, passthrough."""
    try:
        found = replies.objects(await monitor.execute("query-tpm"), "query-tpm")
    except errors.RefusedError:  # a QEMU that was built without
        return []
    return [replies.text(replies.mapping(item["options"], "query-tpm"), "type", "query-tpm") for item in found]


def _words(kinds: list[str]) -> str:
    return showable(" and ".join(kinds))


def _sentence(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"{_KEPT_NOT}: its files could not be read within {_SECONDS:g} s"
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return showable(f"{_KEPT_NOT}: {error.strerror or error}{where}")
    return showable(f"{_KEPT_NOT}: {str(error).rstrip('.')}")


# -- where it is -----------------------------------------------------------------------------


def locate(qemu: int | None) -> Place:
    """Where the swtpm that the process `qemu` is connected with keeps its state.

    Raises `ValueError` with a clause, or `OSError`.
    """
    if qemu is None:
        raise ValueError("the process of QEMU is not known")
    found = [place for pid in peers.of(qemu) if (place := _of_process(pid)) is not None]
    if len(found) != 1:
        raise ValueError(f"{'several swtpm are' if found else 'no swtpm of ours to see is'} connected with QEMU")
    return found[0]


def _of_process(pid: int) -> Place | None:
    """What a process's words say, if it is a swtpm."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = os.fsdecode(file.read(_MAX_CMDLINE)).split("\0")[:-1]
    except OSError:
        return None
    if not words or Path(words[0]).name != "swtpm":
        return None
    options = _options(words)
    given = options.get("--tpmstate")
    version = Version.TPM_2_0 if "--tpm2" in words else Version.TPM_1_2
    backend, path = _backend(given) if given is not None else (Backend.DIR, _from_environment(pid))
    return Place(pid=pid, version=version, backend=backend, path=path, encrypted="--key" in options)


def _options(words: list[str]) -> Mapping[str, str]:
    """The long options with their values, given as one word or as two; of several the last counts."""
    found = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            found[name] = value if equals else following
    return found


def _backend(text: str) -> tuple[Backend, Path]:
    """The value of `--tpmstate`: `dir=DIR[,mode=…]` or `backend-uri=dir://DIR|file://FILE[,mode=…]`."""
    values_by_key = dict(part.partition("=")[::2] for part in text.split(","))
    if directory := values_by_key.get("dir"):
        return Backend.DIR, Path(directory)
    match = re.fullmatch(r"(dir|file)://(.+)", values_by_key.get("backend-uri", ""), re.DOTALL)
    if match is None:
        raise ValueError("swtpm keeps it in a way that we do not know")
    return Backend(match[1]), Path(match[2])


def _from_environment(pid: int) -> Path:
    """$TPM_PATH, which swtpm takes without `--tpmstate`."""
    with open(f"/proc/{pid}/environ", "rb") as file:
        for entry in file.read(1 << 20).split(b"\0"):
            if entry.startswith(b"TPM_PATH="):
                return Path(os.fsdecode(entry.removeprefix(b"TPM_PATH=")))
    raise ValueError("swtpm does not say where it keeps it")


# -- reading ---------------------------------------------------------------------------------


def read(place: Place) -> TpmState:
    """The state as it is now. Raises `ValueError` with a clause, or `OSError`."""
    files = {values.SINGLE: _steady(place)} if place.backend is Backend.FILE else _directory(place)
    return TpmState(
        version=place.version, backend=place.backend, encrypted=place.encrypted, files=values.as_files(files)
    )


def _as_we_see_it(place: Place) -> Path:
    """Its root, working directory and mounts may be others than ours (proc(5), /proc/PID/root)."""
    base = Path(f"/proc/{place.pid}")
    if place.path.is_absolute():
        return base / "root" / place.path.relative_to("/")
    return base / "cwd" / place.path


def _directory(place: Place) -> Mapping[str, bytes]:
    stem = "tpm2-00" if place.version is Version.TPM_2_0 else "tpm-00"
    found = {}
    descriptor = os.open(_as_we_see_it(place), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _require_local(descriptor, place.pid)
        for kind in _FILES:
            with suppress(FileNotFoundError):
                found[f"{stem}.{kind}"] = _file(f"{stem}.{kind}", place, directory=descriptor)
    finally:
        os.close(descriptor)
    if f"{stem}.permall" not in found:
        raise ValueError(f"there is no {stem}.permall in {place.path} yet")
    return found


def _steady(place: Place) -> bytes:
    """What two readings in a row agree on."""
    path = str(_as_we_see_it(place))
    last = _file(path, place)
    for _ in range(_READINGS):
        again = _file(path, place)
        if again == last:
            return again
        last = again
    raise ValueError("it changed all the time while it was read")


def _file(name: str, place: Place, *, directory: int | None = None) -> bytes:
    """A small regular file, no link; opening one that is no file does not hang."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{Path(name).name} is no file")
        _require_local(descriptor, place.pid)
        data = bytearray()
        while part := os.read(descriptor, values.MAX_FILE + 1 - len(data)):
            data += part
    finally:
        os.close(descriptor)
    if not 0 < len(data) <= values.MAX_FILE:
        raise ValueError(f"{Path(name).name} is {'larger than expected' if data else 'empty'}")
    return bytes(data)


def _require_local(descriptor: int, pid: int) -> None:
    """Refuse what could hang, by the mount that the descriptor is on, as the process `pid` has it mounted."""
    information = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    mount = re.search(r"^mnt_id:\s*(\d+)$", information, re.MULTILINE)
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if mount and left.split(" ", 1)[0] == mount[1]:
            kind = right.split(" ", 1)[0]
            if scratch.is_local(kind):
                return
            raise ValueError(f"its file system {kind!r} is not a local one")
    raise ValueError("its file system is not known")
