"""Disks that clients of ours may write to: their requests are passed on to QEMU's server of the overlays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from pullback import errors
from pullback.extents import Extent, Mapped
from pullback.model.exports import NbdAddress
from pullback.progress import Cancel
from pullback.transfer import NbdEndpoint
from pullback.units import MiB

#: Reads are not longer. That there is a limit makes them reads in one piece (NBD_CMD_FLAG_DF): QEMU drops a
#: client at a block that it cannot read, unless it was asked so (nbd/server.c, nbd_co_send_sparse_read).
_LONGEST = 32 * MiB


class OverlaidDisk:
    """A disk with an overlay, at a server of QEMU's."""

    def __init__(self, address: NbdAddress, size: int) -> None:
        self.size = size
        self._address = address

    def connect(self) -> OverlayWriter:
        """For a new client."""
        return OverlayWriter(self._address)


class OverlayWriter:
    """Connections of one client; see `serve.export.Writer`."""

    def __init__(self, address: NbdAddress) -> None:
        with ExitStack() as stack:
            self._endpoint = stack.enter_context(
                NbdEndpoint(address, cancel=Cancel(), name="overlay", writable=True, request_limit=_LONGEST)
            )
            self._channel = self._endpoint.channel()
            self._stack = stack.pop_all()

    def read(self, offset: int, length: int) -> bytearray:
        """The bytes from `offset`."""
        content = bytearray(length)
        try:
            self._channel.read_into(offset, content, length)
        except errors.EndpointFailed:
            # A channel with a limit closes its connection then, because other parts may be under way.
            self._channel.close()
            self._channel = self._endpoint.channel()
            raise
        return content

    def write(self, offset: int, content: bytearray) -> None:
        """Write `content` at `offset`."""
        self._channel.write(offset, content, 0, len(content))

    def zero(self, offset: int, length: int, *, hole: bool) -> None:
        """Make a range read as zeroes, by a `hole` if that may be."""
        self._channel.zero(offset, length, hole=hole)

    def trim(self, offset: int, length: int) -> None:
        """A range is not needed any more."""
        self._channel.trim(offset, length)

    def flush(self) -> None:
        """Make durable what was written, by whomever."""
        self._channel.flush()

    def map(self, window: Extent) -> Iterator[Mapped]:
        """What of `window` is known to be zero."""
        return self._endpoint.extents(window)

    def __enter__(self) -> OverlayWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._stack.close()
