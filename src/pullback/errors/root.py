"""The root of all errors, exit codes, and the end by a signal."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import ClassVar


class Exit(enum.IntEnum):
    """Exit codes of the command line, each with its meaning as documentation."""

    DONE = 0, "done (also: a first backup, a new disk, a disk that cannot be tracked, each noted)"
    FAILED = 1, "failed; no restore point and no disk is left half made"
    USAGE = 2, "the command line, or what it names, is wrong"
    WARNED = (
        3,
        "done, but a chain that should have continued did not (`--strict` makes it 1); of `doctor`: warnings only",
    )
    NO_REPOSITORY = 10, "there is no repository at that place"
    BUSY = 11, "locked or busy: another job, another client, another tool"
    WRONG_PASSWORD = 12, "the repository's password is wrong"
    VERIFICATION = 13, "verification failed: the stored data is damaged"
    INTERRUPTED = 130, "interrupted by Ctrl-C (SIGINT), cleaned up"
    TERMINATED = 143, "interrupted by SIGTERM, cleaned up"

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Exit:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member


@dataclass(kw_only=True, eq=False)
class PullbackError(Exception):
    """Root of all errors. `str()` is one sentence; `hint` a remedy or None; `facts()` the evidence."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[Exit] = Exit.FAILED
    sentence: ClassVar[str] = "Something failed."
    remedy: ClassVar[str | None] = None

    def facts(self) -> dict[str, object]:
        """The facts by name, as they were given."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        return self.sentence.format(**self.facts())

    @property
    def hint(self) -> str | None:
        """What the user can do about it, if there is anything."""
        return self.remedy.format(**self.facts()) if self.remedy else None

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.facts()))


def _rebuild(kind: type[PullbackError], facts: dict[str, object]) -> PullbackError:
    return kind(**facts)


# -- signals ---------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class Interrupted(PullbackError):
    """Ctrl-C; cleaned up."""

    code: ClassVar[str] = "interrupted"
    exit_code: ClassVar[Exit] = Exit.INTERRUPTED
    sentence: ClassVar[str] = "Interrupted; everything was cleaned up."


@dataclass(kw_only=True, eq=False)
class Terminated(PullbackError):
    """SIGTERM; cleaned up."""

    code: ClassVar[str] = "terminated"
    exit_code: ClassVar[Exit] = Exit.TERMINATED
    sentence: ClassVar[str] = "Terminated; everything was cleaned up."


def catalogue() -> list[type[PullbackError]]:
    """All error classes, in the order in which they are written here."""
    found = [PullbackError]
    for kind in found:
        found.extend(kind.__subclasses__())
    return found
