"""A disk that clients find before it can be read: its size is known at once, its hash list a moment later.

The list of a disk of many TiB takes half a second to read and to prove. QEMU opens a disk without reading
it, so a machine that starts from a restore point need not wait for that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from pullback.extents import Extent, Mapped
from pullback.serve.disk import Answer, Disk


class LateDisk(Disk):
    """Whoever asks waits until the disk is there."""

    def __init__(self, target: str, size: int) -> None:
        self.target = target
        self.size = size
        self._there = threading.Event()
        self._disk: Disk | None = None

    def be(self, disk: Disk) -> None:
        """Here it is."""
        self._disk = disk
        self._there.set()

    def map(self, window: Extent) -> Iterator[Mapped]:
        """See `Disk`."""
        return self._wait().map(window)

    def ask(self, offset: int, length: int, ready: Callable[[], None]) -> Answer:
        """See `Disk`."""
        return self._wait().ask(offset, length, ready)

    def _wait(self) -> Disk:
        if self._disk is None:
            self._there.wait()
        assert self._disk is not None
        return self._disk
