"""The far end of the guest agent's channel, for tests: it answers what they want."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Answer = Callable[[str], object]


class Agent:
    """The far end of the agent's channel, which the guest controls: it answers what a test wants."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self.asked: list[str] = []
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection, connection.makefile("rwb") as channel:
                self._talk(channel)

    def _talk(self, channel: Any) -> None:
        try:
            for line in channel:
                request = json.loads(line.lstrip(b"\xff"))
                command = request["execute"]
                self.asked.append(command)
                if command == "guest-sync-delimited":
                    channel.write(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")
                else:
                    answer = self._answer(command)
                    channel.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n")
                channel.flush()
        except (OSError, ValueError):
            return

    def close(self) -> None:
        self._socket.close()


@contextmanager
def agent(path: Path, answer: Answer) -> Iterator[Agent]:
    made = Agent(path, answer)
    try:
        yield made
    finally:
        made.close()
