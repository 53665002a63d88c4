"""Somebody said no, or nobody knows what became of a command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pullback.errors.root import PullbackError

# -- refused and unknown ---------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class RefusedError(PullbackError):
    """QEMU answered a command with an error: the command did nothing."""

    code: ClassVar[str] = "qemu-refused"
    sentence: ClassVar[str] = "QEMU refused {command}: {reason}."
    command: str
    reason: str
    error_class: str = "GenericError"


@dataclass(kw_only=True, eq=False)
class OutcomeUnknown(PullbackError):
    """The connection was lost, or the deadline passed, before the answer came: it may have happened."""

    code: ClassVar[str] = "outcome-unknown"
    sentence: ClassVar[str] = "No answer to {command}: {reason}. Whether it happened is not known."
    remedy: ClassVar[str | None] = "Run the command again: it first finds and removes what is left."
    command: str
    reason: str


@dataclass(kw_only=True, eq=False)
class BadReply(PullbackError):
    """QEMU, an NBD server or a program answered something that the protocol does not allow."""

    code: ClassVar[str] = "bad-reply"
    sentence: ClassVar[str] = "{who} answered something unexpected: {problem}."
    who: str
    problem: str


@dataclass(kw_only=True, eq=False)
class Unsupported(PullbackError):
    """This QEMU, or this disk, cannot do what is needed."""

    code: ClassVar[str] = "unsupported"
    sentence: ClassVar[str] = "{what} cannot be done here: {reason}."
    remedy: ClassVar[str | None] = "{way_out}"
    what: str
    reason: str
    way_out: str = "`pullback info` shows what this QEMU can do."


@dataclass(kw_only=True, eq=False)
class ProgramFailed(PullbackError):
    """A program that we run ended with an error."""

    code: ClassVar[str] = "program-failed"
    sentence: ClassVar[str] = "{program} failed ({status}): {message}"
    program: str
    status: str
    message: str


@dataclass(kw_only=True, eq=False)
class ProgramMissing(PullbackError):
    """A program or library that we need is not installed."""

    code: ClassVar[str] = "program-missing"
    sentence: ClassVar[str] = "{program} is not installed."
    remedy: ClassVar[str | None] = "apt-get install {package}"
    program: str
    package: str


@dataclass(kw_only=True, eq=False)
class QuiesceFailed(PullbackError):
    """The guest's file systems had to be frozen, and could not be."""

    code: ClassVar[str] = "quiesce-failed"
    sentence: ClassVar[str] = "The guest's file systems cannot be frozen: {reason}."
    remedy: ClassVar[str | None] = "Is qemu-guest-agent running in the guest? Without it: --quiesce try, or no."
    reason: str
