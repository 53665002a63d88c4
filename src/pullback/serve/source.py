"""Where a served disk's blocks come from: whatever gives them whole and proven."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

from pullback import errors, repo
from pullback.repo import HashList
from pullback.serve.blocks import Content
from pullback.units import MiB

#: Gives a buffer of that many bytes, to be filled and given away.
Buffer = Callable[[int], bytearray]
#: Loads blocks, and gives each as (index, content); what it gives is not used by it again.
Load = Callable[[], Iterator[tuple[int, Content]]]


class Source(Protocol):
    """The blocks of a disk of a restore point. Thread-safe."""

    @property
    def hashes(self) -> HashList:
        """Of all its blocks, proven."""

    @property
    def together(self) -> int:
        """So many blocks are best asked for at a time."""

    def loads(self, indexes: Sequence[int], buffer: Buffer) -> Iterable[Load]:
        """How to load these blocks, none of which is zero: each load is one request, of one thread.

        Both this and a load raise `EndpointFailed` for blocks that are damaged or missing, and
        `StoreUnreachable` and its like if the repository is away.
        """


class _Own(repo.Scratch):
    """Gives every blob a buffer that stays its own."""

    def __init__(self, largest: int, buffer: Buffer) -> None:
        super().__init__(largest)
        self._buffers = buffer

    def of(self, size: int) -> bytearray:
        """A buffer of the cache's."""
        return self._buffers(size)


#: Bytes of a disk that one request brings, where the answer comes from near, and from far.
_NEAR, _FAR = 4 * MiB, 8 * MiB
#: Requests at once that only a store far away wants.
_FAR_CONNECTIONS = 8


class PointSource:
    """A disk in a repository of restic's format."""

    def __init__(self, endpoint: repo.PointEndpoint) -> None:
        self.hashes = endpoint.hashes
        span = _FAR if endpoint.channels >= _FAR_CONNECTIONS else _NEAR
        self.together = max(1, span // endpoint.hashes.block_size)
        self._endpoint = endpoint

    def loads(self, indexes: Sequence[int], buffer: Buffer) -> Iterable[Load]:
        """See `Source`: chunks that lie side by side in a pack come with one request."""
        for batch in self._endpoint.batches_of(indexes):
            yield partial(self._load, batch, buffer)

    def _load(self, batch: repo.Batch, buffer: Buffer) -> Iterator[tuple[int, Content]]:
        size = self.hashes.block_size
        for offset, content in self._endpoint.fetch(batch, _Own(size, buffer)):
            yield offset // size, content


def is_damage(error: errors.PullbackError) -> bool:
    """Is it the data that is bad, and not the repository that is away?"""
    return isinstance(
        error, errors.EndpointFailed | errors.RepositoryDamaged | errors.ObjectDamaged | errors.ObjectMissing
    )
