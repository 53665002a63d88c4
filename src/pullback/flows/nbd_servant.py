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
from collections.abc import Mapping
from pathlib import Path

from pullback.flows import servant
from pullback.flows.passing import OverlaidDisk
from pullback.model.exports import NbdAddress
from pullback.serve.export import Export
from pullback.serve.server import Server


def main() -> None:
    """Serve, until we are killed."""
    setup, words, listener, most = map(int, sys.argv[1:5])
    # Clients are let in before the disks can be read; those that come later need not pass through that any more.
    exports: dict[str, Export] = {}
    writable = len(sys.argv) > 5
    server = Server(_listening(listener), exports, most=None if writable else most or None)
    running = threading.Thread(target=server.run, name="server", daemon=True)

    def let_in(disks: Mapping[str, Export]) -> None:
        exports.update(disks)
        running.start()

    serving = servant.begin(setup, words, early=let_in)
    exports.update(serving.disks)
    above = _above(serving, *sys.argv[5:], most=most) if writable else None
    servant.silence()
    serving.teller.ready()
    if above is not None:
        above.run()
    running.join()


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
