"""TLS for an NBD server that has none: nbdkit, which passes each client on (nbdkit(1), nbdkit-nbd-plugin(1)).

The socket is ours: bound by us, so there is no moment in which its port is taken by another, and given to
nbdkit as a service manager gives sockets (nbdkit(1), "SOCKET ACTIVATION"; sd_listen_fds(3): descriptor 3, and
LISTEN_PID is the server's own id).

One thread for each connection: with more, nbdkit 1.32 (Debian 12) aborts when a client dies that has several
requests under way (connections.c:402; tried: 2 of 2, and none of 40 with one).
"""

from __future__ import annotations

from pathlib import Path

from pullback.model.exports import Tls, TlsKind
from pullback.programs import process

#: Standard input is the listening socket. dash knows no descriptors above 9.
_ACTIVATE = 'exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'


def start(below: Path, listener: int, tls: Tls) -> process.Child:
    """Begin to pass clients on to the server at the socket `below`, whatever export they name. It dies with us.

    `listener` is a listening socket, which stays ours. Clients must prove who they are. Raises `ProgramMissing`.
    """
    argv: list[str | Path] = ["sh", "-c", _ACTIVATE, "nbdkit", process.find("nbdkit"), "--foreground", "--threads=1"]
    argv += [*_tls(tls), "nbd", f"socket={below}", "dynamic-export=true"]
    return process.Child(argv, stdin=listener)


def _tls(tls: Tls) -> list[str]:
    if tls.kind is TlsKind.PSK:
        return ["--tls=require", f"--tls-psk={tls.directory / 'keys.psk'}"]
    return ["--tls=require", f"--tls-certificates={tls.directory}", "--tls-verify-peer"]
