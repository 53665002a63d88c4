"""A limit of bytes a second, shared by threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: Seconds: what was not used for so long is made up for, and no more.
BURST_SECONDS = 1.0


class Limiter:
    """Lets `rate` bytes a second pass, on average; the bytes of one `take` pass together.

    Each `take` books the time that its bytes need, and waits until what was booked before is over.
    """

    def __init__(self, rate: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        if rate <= 0:
            raise ValueError(f"{rate} bytes a second is no rate")
        self.rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        #: When everything that was booked has passed.
        self._free = clock()

    def book(self, count: int) -> float:
        """Book `count` bytes; gives the seconds to wait before they may pass."""
        with self._lock:
            now = self._clock()
            begin = max(self._free, now - BURST_SECONDS)
            self._free = begin + count / self.rate
            return max(0.0, begin - now)

    def take(self, count: int, stop: threading.Event) -> bool:
        """Wait until `count` bytes may pass. False: `stop` was set, and nothing may pass."""
        return not stop.wait(self.book(count))
