"""The documents of a machine's checkpoints: what no bitmap knows.

    STATE/machines/<hash of the machine's name>/checkpoints/<checkpoint>.json
    STATE/machines/<hash of the machine's name>/checkpoints/<checkpoint>.pending    being made, or deleted

    {"document": {…}, "marks": {"vda": "pullback/3-3/…/monday"}, "machine": {"name": "web01", …}}

A pending document is durable before its bitmaps are made, and gets its name behind them; before they
are deleted it becomes pending again. Whoever finds one asks the bitmaps: if they are there, so is the
checkpoint, and if not, it is not.
Files are checked when they are read; one that cannot be used is told, and otherwise passed over.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pullback import errors, state
from pullback.model import checkpoints
from pullback.model.documents import rules
from pullback.model.documents.checkpoint import MAX_DOMAIN, CheckpointDocument, from_dict, to_dict
from pullback.model.texts import showable
from pullback.model.tree import Saved

#: Bytes of a file: a domain's text in JSON takes at most twelve for each character.
_MAX_FILE = 16 * MAX_DOMAIN
#: Documents of one machine; more are not looked at.
MAX_DOCUMENTS = 4096
_MAX_MARKS = 1024
_DONE, _PENDING = ".json", ".pending"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The documents of a machine."""

    saved: tuple[Saved, ...] = ()
    #: Those whose checkpoint may or may not be there.
    pending: tuple[Saved, ...] = ()
    #: Sentences about files that cannot be used.
    notes: tuple[str, ...] = ()


def directory(directories: state.Directories, machine: str) -> Path:
    """Where they are kept."""
    return state.machine_directory(directories.state, machine) / "checkpoints"


def load(directories: state.Directories, machine: str) -> Loaded:
    """All documents of a machine, by name."""
    found: dict[str, list[Saved]] = {_DONE: [], _PENDING: []}
    notes = []
    paths = [path for path in _files(directory(directories, machine)) if path.suffix in found]
    for path in paths[:MAX_DOCUMENTS]:
        read = _read(path, machine)
        if isinstance(read, str):
            notes.append(f"the checkpoint document {showable(path.name)} is passed over: {read}")
        else:
            found[path.suffix].append(read)
    if len(paths) > MAX_DOCUMENTS:
        notes.append(f"{len(paths) - MAX_DOCUMENTS} checkpoint documents are not looked at, there are too many")
    return Loaded(saved=tuple(found[_DONE]), pending=tuple(found[_PENDING]), notes=tuple(notes))


def _files(place: Path) -> list[Path]:
    try:
        return sorted(place.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(place)) from error


def _read(path: Path, machine: str) -> Saved | str:
    """The document in a file, or why there is none."""
    try:
        values = json.loads(_content(path))
        saved = _saved(values)
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    except (errors.BadDocument, errors.UsageError) as error:
        return str(error).rstrip(".")
    except (ValueError, RecursionError):
        return "it is no JSON"
    if saved.document.name != path.stem:
        return "it is of a checkpoint of another name"
    if saved.machine.get("name") != machine:
        return "it is of another machine"
    return saved


def _content(path: Path) -> bytes:
    """The whole of a regular file; a pipe or a device in its place is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise errors.UsageError(problem="it is no file")
        if status.st_size > _MAX_FILE:
            raise errors.UsageError(problem="it is too large")
        return file.read(_MAX_FILE)


def _saved(values: Any) -> Saved:
    if not isinstance(values, dict):
        raise errors.UsageError(problem="it is no object")
    document = from_dict(values.get("document"))
    if document.name is None:
        raise errors.UsageError(problem="its checkpoint has no name")
    checkpoints.check_name(document.name)
    machine = values.get("machine")
    if not isinstance(machine, dict):
        raise errors.UsageError(problem="it does not say of which machine it is")
    return Saved(document=document, marks=_marks(values.get("marks"), document), machine=machine)


def _marks(values: Any, document: CheckpointDocument) -> Mapping[str, str]:
    if not isinstance(values, dict) or len(values) > _MAX_MARKS:
        raise errors.UsageError(problem="its bitmaps are not told")
    for target, bitmap in values.items():
        mark = checkpoints.parse(bitmap) if isinstance(bitmap, str) else None
        if rules.target(target) or mark is None or mark.name != document.name:
            raise errors.UsageError(problem="a bitmap in it is none of the checkpoint's")
    return values


def save(directories: state.Directories, machine: str, saved: Saved) -> None:
    """Write a document; durable when it returns, in place of an older one."""
    _write(_path(directories, machine, saved.name, _DONE), machine, saved)


def prepare(directories: state.Directories, machine: str, saved: Saved) -> None:
    """Write the document of a checkpoint that is made next: `finish` or `forget` it then."""
    _write(_path(directories, machine, saved.name, _PENDING), machine, saved)


def finish(directories: state.Directories, machine: str, name: str) -> None:
    """The bitmaps are there: the pending document is the checkpoint's."""
    _rename(_path(directories, machine, name, _PENDING), _DONE)


def suspend(directories: state.Directories, machine: str, name: str) -> bool:
    """The bitmaps are deleted next: `remove` the document then, or `finish` it if they stay. Is there one?"""
    path = _path(directories, machine, name, _DONE)
    if not path.exists():
        return False
    _rename(path, _PENDING)
    return True


def _rename(path: Path, suffix: str) -> None:
    try:
        path.rename(path.with_suffix(suffix))
        state.sync_directory(path.parent)
    except OSError as error:
        raise errors.CannotWrite(path=str(path), reason=os.strerror(error.errno or 0)) from error


def forget(directories: state.Directories, machine: str, name: str) -> None:
    """The bitmaps are not there: nor is the document."""
    _path(directories, machine, name, _PENDING).unlink(missing_ok=True)


def remove(directories: state.Directories, machine: str, name: str) -> None:
    """Remove a checkpoint's document, if there is one."""
    path = _path(directories, machine, name, _DONE)
    try:
        for suffix in (_PENDING, _DONE):
            path.with_suffix(suffix).unlink(missing_ok=True)
        if path.parent.is_dir():
            state.sync_directory(path.parent)
    except OSError as error:
        raise errors.CannotWrite(path=str(path), reason=os.strerror(error.errno or 0)) from error


def clear(directories: state.Directories, machine: str) -> tuple[str, ...]:
    """Remove all documents of a machine, also those that cannot be used; gives the checkpoints' names."""
    place = directory(directories, machine)
    names = tuple(_cleared(place))
    with suppress(OSError):
        place.rmdir()
    return names


def _cleared(place: Path) -> Iterator[str]:
    for path in _files(place):
        try:
            path.unlink()
        except OSError as error:
            raise errors.CannotWrite(path=str(path), reason=os.strerror(error.errno or 0)) from error
        if path.suffix == _DONE:
            yield showable(path.stem)


def _path(directories: state.Directories, machine: str, name: str, suffix: str) -> Path:
    return directory(directories, machine) / (checkpoints.check_name(name) + suffix)


def _write(path: Path, machine: str, saved: Saved) -> None:
    state.private(path.parent)
    state.write_durably(
        path,
        {
            "document": to_dict(saved.document),
            "marks": dict(saved.marks),
            "machine": {**saved.machine, "name": machine},
        },
    )
