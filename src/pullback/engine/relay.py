"""Between QEMU and somebody's NBD server: a process that cuts the connection when the server hangs.

QEMU has no time limit for an NBD request, and whatever drains a disk (a guest that reboots does) waits for
the copying job, which waits for its destination: a server that stands still would stop the guest (tried, 7.2:
`system_reset` gets no answer, with the main lock held). With the connection cut, the request fails, so does
the job, and the guest goes on.

    QEMU ── unix socket ── relay ── NBD server

The relay lives as long as QEMU's connection, whatever becomes of us. It cuts when a request has had no answer
for `SILENCE_SECONDS`, when a server that has nothing to do for so long does not greet either, and when its
socket's name is removed: by `destinations.release`, or with the job's directory.
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

#: A guest's reboot waits at most so long for a server that hangs.
SILENCE_SECONDS = 8.0
_START_SECONDS = 20.0
#: So long is QEMU waited for.
_ACCEPT_SECONDS = 60.0
_LOOK_SECONDS = 0.2
_GREET_SECONDS = 4.0
_BUFFER = 1 << 20
_GREETING = b"NBDMAGIC"


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
    _children.append(process)
    if owner is not None and os.geteuid() == 0:
        os.chown(path, *owner)


#: Ours to be waited for by the system when they end after us, by nobody while we run.
_children: list[subprocess.Popen[bytes]] = []


def connect(server: NbdServer, seconds: float) -> socket.socket:
    """A connection to an NBD server."""
    if server.socket is not None:
        found = socket.socket(socket.AF_UNIX)
        found.settimeout(seconds)
        found.connect(str(server.socket))
        return found
    return socket.create_connection((server.host, server.port), seconds)


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
        self._waiting = {qemu: b"", server: b""}
        self._qemu = qemu
        self._path = path
        self._where = where
        self._heard = time.monotonic()
        self._owed = False
        for end in self._ends:
            end.setblocking(False)

    def run(self) -> None:
        """Until one end is closed, or the server hangs, or we are told to end."""
        with selectors.DefaultSelector() as selector:
            while self._path.exists() and not self._hangs():
                for end, other in self._ends.items():
                    self._watch(selector, end, other)
                for key, events in selector.select(_LOOK_SECONDS):
                    end = key.fileobj
                    assert isinstance(end, socket.socket)
                    if not self._move(end, events):
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
                self._waiting[end] = self._waiting[end][end.send(self._waiting[end]) :]
            if events & selectors.EVENT_READ:
                taken = end.recv(_BUFFER)
                if not taken:
                    return False
                if end is self._qemu and not self._owed:
                    self._heard = time.monotonic()  # from now on the server owes something
                if end is not self._qemu:
                    self._heard = time.monotonic()
                self._owed = end is self._qemu
                self._waiting[self._ends[end]] = taken
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def _hangs(self) -> bool:
        if time.monotonic() - self._heard < SILENCE_SECONDS:
            return False
        if self._owed or not greets(self._where):
            return True
        self._heard = time.monotonic()
        return False


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
