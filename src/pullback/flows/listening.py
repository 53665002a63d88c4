"""Where a server listens: a socket bound by us, in a place that is ours.

RUNTIME/serve-<8 hex digits>/lock      held (flock) as long as it is used; one that is not held is left by a
                                       process that was killed, and removed by the next
RUNTIME/serve-…/nbd.sock               the private socket
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket as sockets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pullback import errors, state
from pullback.model.documents import rules
from pullback.model.exports import Listen, ServerAddress, TlsKind

#: The private socket's name.
SOCKET = "nbd.sock"
_PREFIX = "serve-"
_BACKLOG = 128
_NEEDED = {TlsKind.X509: ("ca-cert.pem", "server-cert.pem", "server-key.pem"), TlsKind.PSK: ("keys.psk",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A socket that listens."""

    socket: sockets.socket
    address: ServerAddress


def check(wish: Listen) -> None:
    """Refuse what would show the disks to strangers, or cannot work. Raises `UsageError`, `InsecureExport`."""
    if wish.tls is not None:
        if wish.host is None:
            raise errors.UsageError(problem="TLS goes with a host and port, not with a unix socket")
        missing = [name for name in _NEEDED[wish.tls.kind] if not (wish.tls.directory / name).exists()]
        if missing:
            raise errors.UsageError(problem=f"{wish.tls.directory} has no {missing[0]}, which TLS needs")
    elif wish.host is not None and not wish.insecure:
        raise errors.InsecureExport(address=f"{wish.host}:{wish.port or 'a free port'}")


@contextmanager
def listening(wish: Listen, directory: Path) -> Iterator[Listener]:
    """A listening socket as it is wished for; without a wish, `nbd.sock` in the private `directory`."""
    if wish.host is not None:
        with _on_host(wish.host, wish.port) as socket:
            port = socket.getsockname()[1]
            tls = wish.tls.kind if wish.tls else None
            yield Listener(socket=socket, address=ServerAddress(host=wish.host, port=port, tls=tls))
        return
    path = wish.socket or directory / SOCKET
    with _on_path(path, ours=wish.socket is None) as socket:
        yield Listener(socket=socket, address=ServerAddress(socket=str(path)))


@contextmanager
def _on_host(host: str, port: int | None) -> Iterator[sockets.socket]:
    with ExitStack() as stack:
        try:
            family, kind, protocol, _, address = sockets.getaddrinfo(host, port or 0, type=sockets.SOCK_STREAM)[0]
            socket = stack.enter_context(sockets.socket(family, kind, protocol))
            socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
            socket.bind(address)
            socket.listen(_BACKLOG)
        except OSError as error:
            where = f"{host}:{port}" if port else host
            raise errors.UsageError(problem=f"Nothing can listen on {where} here ({error.strerror})") from error
        yield socket


@contextmanager
def _on_path(path: Path, *, ours: bool) -> Iterator[sockets.socket]:
    """Mode 0600 from the beginning; nobody else's file is replaced."""
    if problem := rules.socket(str(path)):
        raise errors.UsageError(problem=f"{path} {problem}")
    with ExitStack() as stack:
        if ours and _is_socket(path):  # the lock of its directory is ours, so it is a dead one's
            path.unlink()
        socket = stack.enter_context(sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM))
        # Before it is bound, so that there is no moment with another one (Linux, unix_bind_bsd).
        os.fchmod(socket.fileno(), 0o600)
        try:
            socket.bind(str(path))
        except OSError as error:
            if path.exists() or path.is_symlink():
                raise errors.DestinationExists(path=str(path)) from error
            raise errors.CannotWrite(path=str(path), reason=error.strerror or str(error)) from error
        stack.callback(_remove, path)
        socket.listen(_BACKLOG)
        yield socket


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False


def _remove(path: Path) -> None:
    if _is_socket(path):
        path.unlink(missing_ok=True)


# -- private directories ---------------------------------------------------------------------


@contextmanager
def own_directory(directories: state.Directories, chosen: Path | None) -> Iterator[Path]:
    """A private directory while the block runs: a new one, or `chosen`, which stays.

    Raises `BusyError` if another one that lives uses the chosen one.
    """
    if chosen is not None:
        state.private(chosen)
        if chosen.stat().st_mode & 0o077:
            raise errors.CannotWrite(path=str(chosen), reason="it is open to other users (wanted: mode 0700)")
        with locked(chosen):
            yield chosen
        return
    with fresh_directory(directories, directories.runtime) as made:
        yield made


@contextmanager
def fresh_directory(directories: state.Directories, above: Path) -> Iterator[Path]:
    """A new private directory in `above` while the block runs; what killed processes left there goes first."""
    base = state.private(above)
    with ExitStack() as stack:
        with locked(state.private(directories.state / "locks"), wait=True):
            _sweep(base)
            made = state.private(base / f"{_PREFIX}{secrets.token_hex(4)}")
            stack.enter_context(locked(made))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


@contextmanager
def locked(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the kernel's lock of a directory; it ends with us, however that ends. Raises `BusyError`."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise errors.CannotWrite(path=str(directory), reason=error.strerror or str(error)) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise errors.BusyError(what=str(directory), holder="another pullback serves there") from error
        yield
    finally:
        os.close(descriptor)


def _sweep(base: Path) -> None:
    """Remove what killed processes left."""
    for directory in base.glob(f"{_PREFIX}????????"):
        with suppress(errors.PullbackError, OSError), locked(directory):
            shutil.rmtree(directory, ignore_errors=True)
