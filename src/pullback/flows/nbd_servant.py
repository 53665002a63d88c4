"""The process that serves a restore point over NBD.

    python -m pullback.flows.nbd_servant SETUP WORDS LISTENER MOST [ABOVE SOCKET]

SETUP and WORDS are descriptors that it inherits, see `serve.words`. LISTENER is a listening socket, and MOST the
clients at a time (0: as usual). With ABOVE, another listening socket, what is served there can be written to: it
is what QEMU serves at the unix socket SOCKET, above what we serve at LISTENER.
"""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

from pullback.flows import servant
from pullback.flows.passing import OverlaidDisk
from pullback.model.exports import NbdAddress
from pullback.serve.server import Server


def main() -> None:
    """Serve, until we are killed."""
    setup, words, listener, most = map(int, sys.argv[1:5])
    serving = servant.begin(setup, words)
    above = _above(serving, *sys.argv[5:], most=most) if len(sys.argv) > 5 else None
    server = Server(_listening(listener), serving.disks, most=None if above else most or None)
    servant.silence()
    serving.teller.ready()
    if above is not None:
        threading.Thread(target=above.run, name="above", daemon=True).start()
    server.run()


def _above(serving: servant.Servant, listener: str, path: str, *, most: int) -> Server:
    exports = {
        target: OverlaidDisk(NbdAddress(socket=Path(path), export=target), disk.size)
        for target, disk in serving.disks.items()
    }
    return Server(_listening(int(listener)), exports, most=most or None)


def _listening(descriptor: int) -> socket.socket:
    return socket.socket(fileno=descriptor)


if __name__ == "__main__":
    main()
