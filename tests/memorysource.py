"""A served disk in memory, some blocks of which are bad; and our server of such disks, in this process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pullback import errors, repo
from pullback.serve.blocks import Blocks
from pullback.serve.disk import Disk, Workers
from pullback.serve.export import Export
from pullback.serve.server import Server
from pullback.serve.source import Buffer, Load


class Memory:
    """A source in memory, of which some blocks are bad."""

    def __init__(self, content: bytes, chunk: int, bad: Sequence[int] = (), together: int = 4) -> None:
        self.content = content
        self.together = together
        self.hashes = repo.HashList(len(content), chunk)
        for index in range(self.hashes.count):
            block = self.hashes.block(index)
            self.hashes.hash(index, content[block.start : block.end])
        self.bad = set(bad)
        self.loaded: list[int] = []

    def loads(self, indexes: Sequence[int], buffer: Buffer) -> Iterator[Load]:
        """All in one."""
        yield lambda: self._load(indexes, buffer)

    def _load(self, indexes: Sequence[int], buffer: Buffer) -> Iterator[tuple[int, bytearray]]:
        for index in indexes:
            block = self.hashes.block(index)
            if index in self.bad:
                raise errors.EndpointFailed(operation="Reading", endpoint="m", offset=block.start, reason="bad")
            self.loaded.append(index)
            content = buffer(block.length)
            content[:] = self.content[block.start : block.end]
            yield index, content


@contextlib.contextmanager
def disk(source: Memory, limit: int = 1 << 24) -> Iterator[Disk]:
    """The source as a disk, with threads of its own."""
    workers = Workers(3)
    workers.start()
    try:
        yield Disk("vda", source, Blocks(limit), workers, lambda *what: None)
    finally:
        workers.close()


def serve(exports: Mapping[str, Export], path: Path, most: int | None = None) -> None:
    """Our server on a unix socket, in a thread that stays until the tests end."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(50)
    threading.Thread(target=Server(listener, exports, most=most).run, daemon=True).start()
