"""What long work says while it goes on, and how it is told to stop. No output here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

#: What the running command was interrupted by, as soon as it was: filled by whoever handles signals, and seen by all
#: tasks that were begun after it was set. (Cancelled tasks are not told why.)
INTERRUPTION: ContextVar[list[BaseException] | None] = ContextVar("INTERRUPTION", default=None)


class Progress(Protocol):
    """Where long work reports. Called from any thread; must return at once."""

    def start(self, subject: str, total: int) -> None:
        """Work on `subject` (a disk's target) begins; `total` bytes are expected, 0 if unknown."""

    def advance(self, subject: str, done: int) -> None:
        """`done` more bytes of `subject` are through."""

    def finish(self, subject: str) -> None:
        """`subject` is through."""

    def note(self, message: str) -> None:
        """A sentence that the user should read."""


class Silent:
    """A `Progress` that says nothing."""

    def start(self, subject: str, total: int) -> None:
        """Nothing."""

    def advance(self, subject: str, done: int) -> None:
        """Nothing."""

    def finish(self, subject: str) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""


@dataclass(slots=True)
class Cancel:
    """A token that threads look at once per block. The first reason given is kept."""

    _event: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _reason: BaseException | None = None
    _told: list[Callable[[BaseException], None]] = field(default_factory=list)

    def cancel(self, reason: BaseException) -> None:
        """Ask everybody who holds the token to stop because of `reason`."""
        with self._lock:
            first = self._reason is None
            self._reason = self._reason or reason
            told = list(self._told) if first else []
        self._event.set()
        for tell in told:
            tell(reason)

    def tell(self, whom: Callable[[BaseException], None]) -> None:
        """Call `whom` with the reason as soon as somebody asks: for those who wait and cannot look."""
        with self._lock:
            self._told.append(whom)
            reason = self._reason
        if reason is not None:
            whom(reason)

    @property
    def event(self) -> threading.Event:
        """Is set when somebody asks; for those who cannot look themselves."""
        return self._event

    @property
    def cancelled(self) -> bool:
        """Has anybody asked?"""
        return self._event.is_set()

    def wait(self, seconds: float) -> None:
        """Do nothing for so long, or until somebody asks; then raise the reason."""
        if self._event.wait(seconds):
            self.check()

    def check(self) -> None:
        """Raise the reason if somebody asked."""
        if self._event.is_set():
            assert self._reason is not None
            raise self._reason
