"""Between QEMU and somebody's NBD server: a process that cuts the connection when the server hangs.

QEMU has no time limit for an NBD request, and whatever drains a disk (a guest that reboots does) waits for
the copying job, which waits for its destination: a server that stands still would stop the guest (tried, 7.2:
`system_reset` gets no answer, with the main lock held). With the connection cut, the request fails, so does
the job, and the guest goes on.

    QEMU ── unix socket ── relay ── NBD server

The relay lives as long as QEMU's connection, whatever becomes of us. It cuts when a server that has been silent
for `SILENCE_SECONDS` does not greet a new client either, when one that greets has owed an answer for
`SLOW_SECONDS`, and when the name of its own socket is removed: by `destinations.release`, or with the job's
directory.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from pullback import errors
from pullback.model.pushing import NbdServer, parse_nbd

#: After so much silence a server is asked whether it still greets.
SILENCE_SECONDS = 5.0
#: And a server that does, but owes an answer, has this time for it: its disks may be slow.
SLOW_SECONDS = 30.0
_START_SECONDS = 20.0
#: So long is QEMU waited for.
_ACCEPT_SECONDS = 60.0
_LOOK_SECONDS = 0.2
_GREET_SECONDS = 3.0
_BUFFER = 1 << 20
_GREETING = b"NBDMAGIC"
#: They outlive us; those that end before are waited for when the next one begins.
_children: list[subprocess.Popen[bytes]] = []


def start(path: Path, uri: str, owner: tuple[int, int] | None) -> None:
    """A relay that listens at `path`, for QEMU's user. Raises `ProgramFailed`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pullback.engine.relay", path, uri],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout as ready, selectors.DefaultSelector() as selector:
        selector.register(ready, selectors.EVENT_READ)
        if not selector.select(_START_SECONDS) or ready.read(1) != b"r":
            process.kill()
            process.wait()
            raise errors.ProgramFailed(program="the NBD relay", status="no start", message="it did not get ready")
    _children[:] = [child for child in _children if child.poll() is None] + [process]
    if owner is not None and os.geteuid() == 0:
        os.chown(path, *owner)


def connect(server: NbdServer, seconds: float) -> socket.socket:
    """A connection to an NBD server."""
    if server.socket is not None:
        found = socket.socket(socket.AF_UNIX)
        found.settimeout(seconds)
        found.connect(str(server.socket))
        return found
    found = socket.create_connection((server.host, server.port), seconds)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small requests wait for nothing (4 times as fast)
    return found


def greets(server: NbdServer) -> bool:
    """Does it greet a client in time?"""
    try:
        with connect(server, _GREET_SECONDS) as asked:
            return asked.recv(len(_GREETING), socket.MSG_WAITALL) == _GREETING
    except OSError:
        return False


class _Relay:
    """Two ends, and what is on its way from each to the other."""

    def __init__(self, qemu: socket.socket, server: socket.socket, path: Path, where: NbdServer) -> None:
        self._ends = {qemu: server, server: qemu}
        self._waiting = {qemu: memoryview(b""), server: memoryview(b"")}
        self._qemu = qemu
        self._path = path
        self._where = where
        #: When the server was heard, or first owed an answer after that.
        self._heard = time.monotonic()
        self._owed = False
        #: When it was last asked whether it lives.
        self._asked = 0.0
        for end in self._ends:
            end.setblocking(False)

    def run(self) -> None:
        """Until one end is closed, or the server hangs, or we are told to end."""
        with selectors.DefaultSelector() as selector:
            while self._path.exists() and not self._hangs():
                for end, other in self._ends.items():
                    self._watch(selector, end, other)
                for key, events in selector.select(_LOOK_SECONDS):
                    if isinstance(key.fileobj, socket.socket) and not self._move(key.fileobj, events):
                        return

    def _watch(self, selector: selectors.BaseSelector, end: socket.socket, other: socket.socket) -> None:
        wanted = (selectors.EVENT_WRITE if self._waiting[end] else 0) | (
            selectors.EVENT_READ if not self._waiting[other] else 0
        )
        known = selector.get_map().get(end.fileno())
        if known is not None and known.events != wanted:
            selector.unregister(end)
            known = None
        if known is None and wanted:
            selector.register(end, wanted)

    def _move(self, end: socket.socket, events: int) -> bool:
        """Take in and give out what there is; False at the end of file."""
        try:
            if events & selectors.EVENT_WRITE:
                self._give(end)
            if events & selectors.EVENT_READ:
                taken = end.recv(_BUFFER)
                if not taken:
                    return False
                if end is not self._qemu or not self._owed:
                    self._heard = time.monotonic()
                self._owed = end is self._qemu
                self._waiting[self._ends[end]] = memoryview(taken)
                self._give(self._ends[end])
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def _give(self, end: socket.socket) -> None:
        self._waiting[end] = self._waiting[end][end.send(self._waiting[end]) :]

    def _hangs(self) -> bool:
        """Has it been silent for too long? A server that lives, but whose disks are slow, has more time."""
        silent = time.monotonic() - self._heard
        if silent < SILENCE_SECONDS or time.monotonic() < self._asked + SILENCE_SECONDS:
            return False
        self._asked = time.monotonic()
        return (self._owed and silent > SLOW_SECONDS) or not greets(self._where)


def main() -> None:
    """The process: arguments are its socket and the server's URI."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    path, where = Path(sys.argv[1]), parse_nbd(sys.argv[2])
    os.umask(0o077)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        os.write(1, b"r")
        os.close(1)
        listening.settimeout(_ACCEPT_SECONDS)
        with suppress(OSError):
            qemu, _ = listening.accept()
            with qemu, connect(where, _GREET_SECONDS) as server:
                _Relay(qemu, server, path, where).run()
    path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
