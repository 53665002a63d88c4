"""What the process that serves is told at its start, and what it says meanwhile.

It inherits two descriptors: a file in memory with the setup, which has keys and credentials in it, and
one end of a pair of sockets. On that it writes a line of JSON for each word, and its end tells it that
the other process is gone.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from pullback import errors
from pullback.extents import Extent
from pullback.model.texts import showable

#: Bytes of a line that are believed to be a word.
MAX_LINE = 64 * 1024
#: Damaged ranges that are told.
_MOST_TOLD = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a process that serves must know. Never printed."""

    repository: str
    machine: str
    #: The restore point's id.
    point: str
    #: The disks.
    targets: tuple[str, ...]
    #: What opens a repository in restic's format (`repo.lending`); empty for a `dir:` one.
    lent: Mapping[str, str] = field(repr=False)
    #: Where credentials of the store stand.
    environ: Mapping[str, str] = field(repr=False)
    caches: str
    #: Private, for sockets of its own.
    directory: str
    #: Bytes of decoded blocks to keep.
    cache: int
    #: Wait for a repository that is away.
    patient: bool

    def to_file(self) -> int:
        """A descriptor of a file that only has memory, and no name; read from its beginning."""
        file = os.memfd_create("pullback", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(file), "wb") as out:
                out.write(json.dumps(asdict(self)).encode())
            os.lseek(file, 0, os.SEEK_SET)
        except BaseException:
            os.close(file)
            raise
        return file

    @classmethod
    def from_file(cls, descriptor: int) -> Setup:
        """What `to_file` wrote; closes the descriptor."""
        with os.fdopen(descriptor, "rb") as file:
            values = json.loads(file.read())
        return cls(**values | {"targets": tuple(values["targets"])})


class Teller:
    """Says words to the process that started us. Thread-safe; never waits, so what nobody reads is lost."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._told: set[tuple[str, int]] = set()
        os.set_blocking(descriptor, False)

    def ready(self) -> None:
        """Clients are served from now on."""
        self._say({"word": "ready"})

    def failed(self, error: BaseException) -> None:
        """Nothing will be served, because of this."""
        if isinstance(error, errors.PullbackError):
            self._say({"word": "failed", "code": error.code, "facts": _plain(error.facts())})
        else:
            self._say({"word": "failed", "code": "", "facts": {"message": f"{type(error).__name__}: {error}"}})

    def damaged(self, target: str, extent: Extent, error: errors.PullbackError) -> None:
        """A range cannot be read, now and later. Each is told once."""
        with self._lock:
            if (target, extent.start) in self._told or len(self._told) >= _MOST_TOLD:
                return
            self._told.add((target, extent.start))
        reason = error.reason if isinstance(error, errors.EndpointFailed) else str(error)
        values = {"target": target, "start": extent.start, "length": extent.length}
        self._say({"word": "damaged", "reason": showable(reason).rstrip("."), **values})

    def away(self, error: errors.PullbackError, *, waiting: bool) -> None:
        """The repository cannot be reached. Does who reads wait?"""
        self._say({"word": "away", "reason": showable(str(error)), "waiting": waiting})

    def back(self) -> None:
        """It can be reached again."""
        self._say({"word": "back"})

    def notice(self, sentence: str) -> None:
        """A sentence of the store's."""
        self._say({"word": "notice", "sentence": showable(sentence)})

    def _say(self, word: Mapping[str, object]) -> None:
        line = json.dumps(word).encode()[: MAX_LINE - 1] + b"\n"
        with self._lock, suppress(OSError):
            os.write(self._descriptor, line)


def _plain(facts: Mapping[str, object]) -> dict[str, object]:
    return {name: value if isinstance(value, str | int | float) else str(value) for name, value in facts.items()}


def word(line: bytes) -> dict[str, object]:
    """A line as a word; {} for what is none."""
    with suppress(ValueError, RecursionError):
        values = json.loads(line)
        if isinstance(values, dict) and isinstance(values.get("word"), str):
            return values
    return {}


def failure(values: Mapping[str, object], program: str) -> errors.PullbackError:
    """The error that a word "failed" is about."""
    facts = values.get("facts")
    given = facts if isinstance(facts, dict) else {}
    for kind in errors.catalogue():
        if kind.code == values.get("code") and kind is not errors.PullbackError:
            with suppress(TypeError):
                return kind(**given)
    message = str(given.get("message", "it did not say why"))
    return errors.ProgramFailed(program=program, status="at its start", message=message)
