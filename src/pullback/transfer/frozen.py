"""A frozen disk as an endpoint: its data from the snapshot, its holes from the live disk and scratch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from pullback import errors, extents
from pullback.endpoint import Channel, Endpoint
from pullback.extents import Extent, Mapped
from pullback.model.exports import Export, NbdAddress
from pullback.progress import Cancel
from pullback.transfer.file import FileEndpoint
from pullback.transfer.nbd import NbdEndpoint
from pullback.units import MiB

#: Bytes read to see that a snapshot still lives; no more than its cluster (and a page, for O_DIRECT).
_PROOF = 4096
#: Bytes of one read before many: several times what is read at once then.
_LONG_READ = 4 * MiB


class FrozenEndpoint:
    """An `Export` of a machine's snapshot as an `Endpoint`; `name` is what messages call it.

    Raises `EndpointFailed` if the disk was resized between the plan and the snapshot: what is behind
    its planned end would be missing, and nobody would know.
    """

    def __init__(self, export: Export, *, name: str, cancel: Cancel) -> None:
        self._export = export
        self._name = name
        with ExitStack() as stack:
            self._data = stack.enter_context(_data(export, name, cancel))
            _require_size(self._data, export.size)
            allocation = export.allocation
            same = allocation == export.data
            self._allocation = (
                self._data if same or allocation is None else stack.enter_context(_map(allocation, name, cancel))
            )
            self._scratch = stack.enter_context(FileEndpoint(export.scratch)) if export.scratch else None
            self._changes = stack.enter_context(_changes(export, name, cancel)) if export.changes else None
            self._open = stack.pop_all()

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    @property
    def size(self) -> int:
        """Bytes."""
        return self._export.size

    @property
    def channels(self) -> int:
        """How many channels may be open at a time."""
        return self._data.channels

    def extents(self, window: Extent) -> Iterator[Mapped]:
        """The allocation of `window` at the instant of the snapshot.

        The order matters: first the live disk, then scratch. What the guest discarded before the
        first look had been copied to scratch by then, so the second look sees it.
        """
        if self._export.allocation is None:
            yield Mapped(window.start, window.length, zero=False)
            return
        holes = list(extents.zeroes(self._allocation.extents(window)))
        copied = list(extents.data(self._scratch.extents(window))) if self._scratch else []
        zero = list(extents.subtract(holes, copied))
        yield from sorted(
            [
                *(Mapped(*extent, zero=True) for extent in zero),
                *(Mapped(*extent, zero=False) for extent in extents.subtract([window], zero)),
            ]
        )

    def dirty(self, window: Extent) -> Iterator[Extent]:
        """What of `window` changed since the checkpoint that the export was made for."""
        assert self._changes is not None, "asked only where changes are exported"
        assert self._export.changes_context is not None
        return self._changes.dirty(self._export.changes_context, window)

    def channel(self) -> Channel:
        """A new channel."""
        return self._data.channel()

    def expect_much(self) -> None:
        """One long read, whose result nobody uses, before very many of a megabyte.

        QEMU takes memory for each request from the C library. glibc gives it back to the kernel each time, and has
        every page made anew, until it once saw a longer piece freed (mallopt(3), M_MMAP_THRESHOLD: it adapts). For
        4 GiB in requests of 1 MiB QEMU 7.2 took 4.4 s of processor time without this and 2.1 s with it.
        """
        if isinstance(self._data, NbdEndpoint) and self.size >= _LONG_READ:
            with self._data.channel() as channel:
                channel.read_into(0, bytearray(_LONG_READ), _LONG_READ)

    @property
    def spared(self) -> Extent:
        """What must never be trimmed, so that `prove` can read it."""
        return Extent(0, min(self._export.trim_unit or _PROOF, self.size))

    def prove(self) -> None:
        """Raise `EndpointFailed` if the snapshot broke meanwhile; to be called when all was read.

        Once it is broken every read fails, but the live disk still tells its holes: those that were
        made after that would be taken for zeroes of the instant, without a single read that fails.
        """
        buffer = bytearray(min(_PROOF, self.size))
        with self._data.channel() as channel:
            channel.read_into(0, buffer, len(buffer))

    def close(self) -> None:
        """Close all of it; twice is fine."""
        self._open.close()

    def __enter__(self) -> FrozenEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _data(export: Export, name: str, cancel: Cancel) -> Endpoint:
    if isinstance(export.data, Path):
        return FileEndpoint(export.data, request_limit=export.request_limit)
    return NbdEndpoint(
        export.data,
        cancel=cancel,
        name=name,
        writable=export.trim_unit is not None,
        request_limit=export.request_limit,
        copied=export.copied_context,
    )


def _require_size(data: Endpoint, planned: int) -> None:
    if data.size != planned:
        reason = f"the disk was resized meanwhile: it has {data.size} bytes, and had {planned}"
        raise errors.EndpointFailed(operation="opening", endpoint=data.name, offset=0, reason=reason)


def _map(allocation: NbdAddress | Path, name: str, cancel: Cancel) -> Endpoint:
    if isinstance(allocation, Path):
        return FileEndpoint(allocation)
    return NbdEndpoint(allocation, cancel=cancel, name=f"{name} (map)", channels=1)


def _changes(export: Export, name: str, cancel: Cancel) -> NbdEndpoint:
    assert export.changes is not None
    assert export.changes_context is not None
    contexts = [export.changes_context]
    return NbdEndpoint(export.changes, contexts=contexts, cancel=cancel, name=f"{name} (changes)", channels=1)
