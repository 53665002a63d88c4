"""What a machine says on its serial port, heard by a thread and kept within bounds.

QEMU writes to a FIFO, not to a file: a hostile guest that talks without end fills neither memory nor disk.
"""

from __future__ import annotations

import os
import select
import threading
from pathlib import Path
from types import TracebackType

from pullback.units import KiB

#: So much is kept of the begin, and as much of the end, in bytes.
_KEPT = 512 * KiB
_TICK = 0.2


class Listener:
    """Hears what is written into a FIFO while the block runs. `text` may be called from any thread."""

    def __init__(self, fifo: Path) -> None:
        """Makes the FIFO `fifo`, for its owner alone."""
        os.mkfifo(fifo, 0o600)
        # For both directions: so the open does not wait for QEMU, and there is no end when QEMU leaves.
        self._pipe = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._begin = bytearray()
        self._end = bytearray()
        #: Bytes heard in all.
        self.heard = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        while not self._closing.is_set():
            if poll.poll(_TICK * 1000):
                self._keep(os.read(self._pipe, 64 * KiB))

    def _keep(self, data: bytes) -> None:
        with self._lock:
            self.heard += len(data)
            room = _KEPT - len(self._begin)
            self._begin += data[:room]
            self._end += data[room:]
            if len(self._end) > 2 * _KEPT:
                del self._end[:-_KEPT]

    def data(self) -> bytes:
        """What was heard: all, or the begin and the end with a line between them that says how much is left out."""
        with self._lock:
            end = bytes(self._end[-_KEPT:])
            missing = self.heard - len(self._begin) - len(end)
            gap = f"\n[… {missing} bytes …]\n".encode() if missing else b""
            return bytes(self._begin) + gap + end

    def text(self) -> str:
        """The same as a text; bytes that are none are replaced."""
        return self.data().decode("utf-8", "replace")

    def close(self) -> None:
        """Hear no more; twice is fine."""
        if not self._closing.is_set():
            self._closing.set()
            self._thread.join()
            os.close(self._pipe)

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
