"""A store in memory, for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from pullback import errors
from pullback.repo.store import MAX_WHOLE, Kind, Stored, path_of


class MemoryStore:
    """Files in a dictionary. `files` may be looked at, and harmed, by tests."""

    def __init__(self, url: str = "memory:") -> None:
        self.url = url
        self.connections = 4
        #: Kind and name to content and time of writing.
        self.files: dict[tuple[Kind, str], tuple[bytes, datetime]] = {}
        self._lock = threading.Lock()

    def list(self, kind: Kind) -> Iterator[Stored]:
        """See `Store`."""
        with self._lock:
            found = [(name, *entry) for (of, name), entry in self.files.items() if of is kind]
        for name, content, modified in found:
            yield Stored(name=name, size=len(content), modified=modified)

    def read(self, kind: Kind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store`."""
        content = self._content(kind, name)
        wanted = len(content) - offset if length is None else length
        if wanted < 0 or offset + wanted > len(content) or (length is None and wanted > MAX_WHOLE):
            raise errors.ObjectDamaged(store=self.url, name=path_of(kind, name), problem=f"it has {len(content)} bytes")
        return content[offset : offset + wanted]

    def write(self, kind: Kind, name: str, data: bytes | bytearray | memoryview, *, new: bool = False) -> None:
        """See `Store`."""
        path = path_of(kind, name)
        with self._lock:
            if new and (kind, name) in self.files:
                raise errors.AlreadyStored(store=self.url, name=path)
            self.files[kind, name] = bytes(data), datetime.now(UTC)

    def size(self, kind: Kind, name: str) -> int:
        """See `Store`."""
        return len(self._content(kind, name))

    def delete(self, kind: Kind, name: str) -> None:
        """See `Store`."""
        path_of(kind, name)
        with self._lock:
            self.files.pop((kind, name), None)

    def _content(self, kind: Kind, name: str) -> bytes:
        path = path_of(kind, name)
        with self._lock:
            entry = self.files.get((kind, name))
        if entry is None:
            raise errors.ObjectMissing(store=self.url, name=path)
        return entry[0]

    def tidy(self) -> None:
        """Nothing is ever left behind."""

    def hurry(self) -> None:
        """See `Store`: nothing is tried twice here."""

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
