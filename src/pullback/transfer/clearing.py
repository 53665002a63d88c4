"""Making a whole destination zero with few requests, where it can do that faster than zeroes are written.

Without, each run of zeroes of a disk is a request of its own: 16 384 for a GiB of which every other 64 KiB is
zero. With, there is one for each GiB, and then data alone is sent.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from pullback.endpoint import Endpoint
from pullback.extents import Extent, split
from pullback.progress import Cancel
from pullback.units import GiB

#: The cancel token is looked at between requests of this length.
_PART = 1 * GiB


@runtime_checkable
class Quick(Protocol):
    """A channel that may know a quick way."""

    def zero_quickly(self, offset: int, length: int) -> bool:
        """Make the range read as zeroes if that is faster than writing them. False: not done, or in part."""


def clear(endpoint: Endpoint, size: int, *, cancel: Cancel) -> bool:
    """Make the first `size` bytes read as zeroes, if that is quick. False: what is there is as it was, or zero."""
    with endpoint.channel() as channel:
        if not isinstance(channel, Quick):
            return False
        for part in split([Extent(0, size)], _PART):
            cancel.check()
            if not channel.zero_quickly(part.start, part.length):
                return False
    return True


def discard(endpoint: Endpoint, *, cancel: Cancel) -> None:
    """Tell that nothing of the content is needed. What it reads as afterwards is undefined."""
    with endpoint.channel() as channel:
        for part in split([Extent(0, endpoint.size)], _PART):
            cancel.check()
            channel.trim(part.start, part.length)
