"""A call of the library in a process that kills itself right after the answer to its n-th QMP command.

python tests/perishing.py 7 qmp:/run/web01.sock web01 STATE checkpoint_create '[{"name": "a"}]' '{}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from pullback import sync
from pullback.engine import monitor, scratch


def arm(number: int) -> None:
    """SIGKILL at the answer to that command, whichever it is."""
    real = monitor.Monitor.execute
    seen: list[str] = []

    async def execute(self: monitor.Monitor, name: str, *words: Any, **options: Any) -> object:
        answer = await real(self, name, *words, **options)
        seen.append(name)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    monitor.Monitor.execute = execute  # type: ignore[method-assign,assignment]


def main(number: str, uri: str, name: str, place: str, call: str, words: str, options: str) -> None:
    """See the module."""
    scratch._MINIMUM_FREE = 16 << 20  # as in tests/conftest.py
    arm(int(number))
    with sync.connect(uri, name=name, state_dir=Path(place)) as machine:
        getattr(machine, call)(*json.loads(words), **json.loads(options))


if __name__ == "__main__":
    main(*sys.argv[1:])
