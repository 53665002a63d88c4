"""The command `pullback`, which gets a signal from itself right after the answer to a chosen QMP command.

python tests/dying.py SIGKILL blockdev-reopen 2 backup images:…
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from pullback.cli import main
from pullback.engine import monitor


def arm(number: signal.Signals, command: str, occurrence: int) -> None:
    """Send the signal at the answer to that command, the n-th time."""
    real = monitor.Monitor.execute
    seen: list[str] = []

    async def execute(self: monitor.Monitor, name: str, *words: Any, **options: Any) -> object:
        answer = await real(self, name, *words, **options)
        seen.append(name)
        if name == command and seen.count(name) == occurrence:
            os.kill(os.getpid(), number)
        return answer

    monitor.Monitor.execute = execute  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    arm(signal.Signals[sys.argv[1]], sys.argv[2], int(sys.argv[3]))
    del sys.argv[1:4]
    main.main()
