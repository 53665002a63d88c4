"""Where served blocks of a disk in a `dir:` repository come from: its chain of images, each proven by its hash."""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from pullback import errors, repo
from pullback.endpoint import Channel
from pullback.model.points import Point
from pullback.programs import qemu_nbd
from pullback.progress import Cancel
from pullback.serve.blocks import Content
from pullback.serve.patience import Patience
from pullback.serve.source import Buffer, Load
from pullback.transfer import NbdEndpoint
from pullback.units import MiB

#: Bytes of a disk that one load brings.
_TOGETHER = 2 * MiB
_LOOK = 4096


class ChainSource:
    """A disk of a restore point in a `dir:` repository: QEMU reads the chain, and we compare. A context manager.

    Raises `VerificationFailed` for a chain that is damaged, `ProgramFailed` if it cannot be opened.
    """

    def __init__(
        self, repository: repo.Directory, point: Point, target: str, directory: Path, patience: Patience
    ) -> None:
        self.hashes = repository.hashes(point, target)
        self.together = max(1, _TOGETHER // self.hashes.block_size)
        self._name = f"restore point {point.id}, disk {target}"
        self._repository = repository
        self._point = point
        self._target = target
        self._socket = directory / f"{target}.sock"
        self._patience = patience
        self._mending = threading.Lock()
        self._opened = self._open()

    def _open(self) -> _Opened:
        links = self._repository.chain(self._point, self._target)
        return _Opened(links, self._socket, self._name, self.hashes.size)

    # -- loading -----------------------------------------------------------------------------

    def loads(self, indexes: Sequence[int], buffer: Buffer) -> Iterable[Load]:
        """See `Source`."""
        yield partial(self._load, indexes, buffer)

    def _load(self, indexes: Sequence[int], buffer: Buffer) -> Iterator[tuple[int, Content]]:
        for index in indexes:
            block = self.hashes.block(index)
            content = buffer(block.length)
            opened = self._opened
            self._patience.run(partial(self._read, block.start, content), partial(self._mend, opened))
            if not self.hashes.matches(index, content):
                raise errors.EndpointFailed(
                    operation="Reading",
                    endpoint=self._name,
                    offset=block.start,
                    reason="it is not what was stored",
                )
            yield index, content

    def _read(self, offset: int, content: bytearray) -> None:
        opened = self._opened
        try:
            opened.read_into(offset, content)
        except (errors.EndpointFailed, errors.EndpointTimeout) as error:
            if (reason := opened.away(error)) is not None:
                raise errors.StoreUnreachable(store=self._repository.name, reason=reason) from error
            raise

    def _mend(self, failed: _Opened) -> None:
        """Open the chain anew, unless another thread did; what it finds is proven as at the beginning."""
        with self._mending:
            if self._opened is failed or self._opened.dead:
                self._opened.close()
                self._opened = self._open()

    def close(self) -> None:
        """Let go of the images; twice is fine."""
        self._opened.close()

    def __enter__(self) -> ChainSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Opened:
    """A chain that QEMU has open for us, read-only."""

    def __init__(self, links: Sequence[repo.Link], socket: Path, name: str, size: int) -> None:
        self._paths = [link.path for link in links]
        self._channels: queue.SimpleQueue[Channel] = queue.SimpleQueue()
        #: Does its server not answer any more?
        self.dead = False
        with ExitStack() as stack:
            address = stack.enter_context(qemu_nbd.serve_graph(repo.graph(links), socket=socket))
            endpoint = stack.enter_context(NbdEndpoint(address, cancel=Cancel(), name=name))
            if endpoint.size != size:
                raise errors.VerificationFailed(point=name, problem="its image has another size")
            for _ in range(endpoint.channels):
                self._channels.put(stack.enter_context(endpoint.channel()))
            self._stack = stack.pop_all()

    def read_into(self, offset: int, content: bytearray) -> None:
        """Fill `content` from `offset`."""
        with self._lent() as channel:
            channel.read_into(offset, content, len(content))

    @contextmanager
    def _lent(self) -> Iterator[Channel]:
        channel = self._channels.get()
        try:
            yield channel
        finally:
            self._channels.put(channel)

    def away(self, error: errors.EndpointFailed | errors.EndpointTimeout) -> str | None:
        """Is it not this block alone that cannot be read? Then why."""
        if isinstance(error, errors.EndpointTimeout) or error.errno == errno.ENOTCONN:
            self.dead = True
            return str(error).rstrip(".")
        for path in self._paths:
            try:
                with path.open("rb", buffering=0) as file:
                    os.posix_fadvise(file.fileno(), 0, _LOOK, os.POSIX_FADV_DONTNEED)
                    file.read(_LOOK)
            except OSError as failure:
                return f"{path}: {failure.strerror}"
        return None

    def close(self) -> None:
        """End the server."""
        self._stack.close()
