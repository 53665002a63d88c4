"""QEMU's one NBD server: started with our first export, stopped with the last, shared by all of ours.

QEMU does not tell where its server listens, so what we start is written down (`state.serving`). A
server that runs without such a record is somebody else's. Sources: QAPI block-export.json
(`nbd-server-start`), qom.json (`tls-creds-x509`, `tls-creds-psk`).
"""

from __future__ import annotations

import os
import socket as sockets
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pullback import errors, state
from pullback.engine import exports
from pullback.engine.monitor import Monitor, listener, process_lives
from pullback.model.exports import Listen, Served, ServerAddress, Tls, TlsKind
from pullback.state.serving import Register, Serving

TLS_OBJECT = "pullback-tls"
#: Somebody may take a free port between our finding it and QEMU's using it.
_PORT_ATTEMPTS = 10
#: What each kind of credentials needs in its directory (QEMU docs/system/tls.rst).
_TLS_FILES = {TlsKind.X509: ("ca-cert.pem", "server-cert.pem", "server-key.pem"), TlsKind.PSK: ("keys.psk",)}


def private_socket(job: state.Job) -> Path:
    """The socket of the server that is wanted nowhere in particular: one for each machine."""
    machine = state.machine_directory(Path(), job.record.machine).name
    return Path(job.record.runtime).parent / machine[:8] / "nbd.sock"


async def ensure_private(monitor: Monitor, job: state.Job) -> None:
    """Our server, on its private socket. Raises `NbdServerBusy` if one runs elsewhere."""
    await ensure(monitor, register_of(job), Listen(socket=private_socket(job)), private=private_socket(job))


def register_of(job: state.Job) -> Register:
    """The register of the job's machine."""
    return Register(job.path.parent.parent, job.record.machine)


async def ensure(monitor: Monitor, register: Register, wish: Listen, *, private: Path) -> ServerAddress:
    """A running server that fits `wish`; `private` is the socket of one that is wanted nowhere in particular.

    Raises `NbdServerBusy` if one runs that does not fit: a server of somebody else, or ours elsewhere.
    """
    running = await current(monitor, register)
    if running is not None and not running.exports:
        # It may be gone (`nbd-server-stop` is anybody's), and if it is not, nobody needs it: begin anew.
        await stop_unused(monitor, register)
        running = await current(monitor, register)
    if running is not None:
        if not _fits(running.address, wish):
            raise errors.NbdServerBusy(detail=f"our own exports, at {running.address}")
        return running.address
    _check(wish)
    if foreign := [item for item in await exports.listed(monitor) if item["type"] == "nbd"]:
        raise errors.NbdServerBusy(detail=f"export {foreign[0]['id']}")
    if monitor.peer is not None and listener(private) == monitor.peer:  # ours, and its record was lost
        await monitor.execute("nbd-server-stop")
    return await _start(monitor, register, wish, private)


async def current(monitor: Monitor, register: Register) -> Serving | None:
    """Our server in this QEMU, with the exports that are still there; None if there is none."""
    known = register.load(monitor.process)
    if known is None:
        return None
    there = {item["id"] for item in await exports.listed(monitor)}
    return replace(known, exports=tuple(item for item in known.exports if item.id in there))


def _fits(address: ServerAddress, wish: Listen) -> bool:
    if wish.socket is not None:
        return address.socket == str(wish.socket)
    if wish.host is None:
        return address.socket is not None
    return address.host == wish.host and wish.port in (None, address.port) and address.tls == _kind(wish)


def _kind(wish: Listen) -> TlsKind | None:
    return wish.tls.kind if wish.tls else None


def _check(wish: Listen) -> None:
    """Refuse what would show the disks to strangers, or cannot work."""
    if wish.tls is not None:
        if wish.host is None:
            raise errors.UsageError(problem="TLS goes with a host and port, not with a unix socket")
        missing = [name for name in _TLS_FILES[wish.tls.kind] if not (wish.tls.directory / name).exists()]
        if missing:
            raise errors.UsageError(problem=f"{wish.tls.directory} has no {missing[0]}, which TLS needs")
    elif wish.host is not None and not wish.insecure:
        raise errors.InsecureExport(address=f"{wish.host}:{wish.port or 'a free port'}")


async def _start(monitor: Monitor, register: Register, wish: Listen, private: Path) -> ServerAddress:
    _make_room(monitor, wish, private)
    tls = None
    if wish.tls is not None:
        tls = TLS_OBJECT
        await _add_credentials(monitor, wish.tls)
    attempts = _PORT_ATTEMPTS if wish.host is not None and wish.port is None else 1
    try:
        for attempt in range(1, attempts + 1):
            address = _address(wish, private)
            register.save(Serving(qemu=monitor.process, address=address, tls_object=tls))
            try:
                await _command(monitor, address, wish, tls)
                break
            except errors.RefusedError as error:
                if "in use" not in error.reason or attempt == attempts:
                    raise
    except BaseException:
        register.remove()
        _remove_private(private)
        if tls is not None:
            with suppress(errors.PullbackError):
                await monitor.execute("object-del", {"id": tls})
        raise
    if address.socket is not None:
        with suppress(OSError):
            Path(address.socket).chmod(0o600)
    return address


def _make_room(monitor: Monitor, wish: Listen, private: Path) -> None:
    """A private directory for our own socket; nobody else's socket is replaced."""
    if wish.socket in (None, private) and wish.host is None:
        state.private(private.parent)
        private.unlink(missing_ok=True)  # of a QEMU that was killed
        owner = monitor.user()
        if owner is not None and os.geteuid() == 0:
            os.chown(private.parent, *owner)
    elif wish.socket is not None and (wish.socket.exists() or wish.socket.is_symlink()):
        raise errors.DestinationExists(path=str(wish.socket))


async def _command(monitor: Monitor, address: ServerAddress, wish: Listen, tls: str | None) -> None:
    place: dict[str, object]
    if address.socket is not None:
        place = {"type": "unix", "data": {"path": address.socket}}
    else:
        place = {"type": "inet", "data": {"host": address.host, "port": str(address.port)}}
    arguments: dict[str, object] = {"addr": place}
    if tls is not None:
        arguments["tls-creds"] = tls
    if wish.max_connections is not None:
        arguments["max-connections"] = wish.max_connections
    try:
        await monitor.execute("nbd-server-start", arguments)
    except errors.RefusedError as error:
        if "already running" in error.reason:
            raise errors.NbdServerBusy(detail="it runs without exports") from error
        raise


async def _add_credentials(monitor: Monitor, tls: Tls) -> None:
    kind = f"tls-creds-{tls.kind}"
    values: dict[str, object] = {"qom-type": kind, "id": TLS_OBJECT, "dir": str(tls.directory), "endpoint": "server"}
    if tls.kind is TlsKind.X509:
        values["verify-peer"] = True
    with suppress(errors.RefusedError):  # left by a server whose record was lost
        await monitor.execute("object-del", {"id": TLS_OBJECT})
    await monitor.execute("object-add", values)


def _address(wish: Listen, private: Path) -> ServerAddress:
    if wish.host is not None:
        return ServerAddress(host=wish.host, port=wish.port or _free_port(wish.host), tls=_kind(wish))
    return ServerAddress(socket=str(wish.socket or private))


def _free_port(host: str) -> int:
    """A port that is free now. QEMU would find one itself (port 0), but not tell which."""
    try:
        family, kind, _, _, address = sockets.getaddrinfo(host, 0, type=sockets.SOCK_STREAM)[0]
        with sockets.socket(family, kind) as probe:
            probe.bind(address)
            port: int = probe.getsockname()[1]
            return port
    except OSError as error:
        raise errors.UsageError(problem=f"Nothing can listen on {host} here ({error.strerror})") from error


# -- exports ---------------------------------------------------------------------------------


async def add(monitor: Monitor, register: Register, served: Served, *, node: str, bitmaps: list[str]) -> None:
    """Export a node, and write down what it is."""
    serving = await current(monitor, register)
    assert serving is not None, "the server was started before"
    if any(item.name == served.name for item in serving.exports):
        raise errors.ExportExists(name=served.name)
    register.save(replace(serving, exports=(*serving.exports, served)))
    try:
        await exports.add_nbd(
            monitor, id=served.id, node=node, name=served.name, bitmaps=bitmaps, writable=served.writable
        )
    except BaseException:
        register.save(serving)
        raise


async def stop_unused(monitor: Monitor, register: Register) -> None:
    """Stop the server if it is ours and nobody exports anything through it; forget exports that are gone."""
    known = register.load(monitor.process)
    if known is None:
        return
    listed = await exports.listed(monitor)
    if any(item["type"] == "nbd" for item in listed):
        register.save(known.without({item.id for item in known.exports} - {item["id"] for item in listed}))
        return
    try:
        await monitor.execute("nbd-server-stop")
    except errors.RefusedError as error:
        if "not running" not in error.reason:
            raise
    if known.tls_object is not None:
        with suppress(errors.RefusedError):
            await monitor.execute("object-del", {"id": known.tls_object})
    forget(register, known)


def forget(register: Register, known: Serving) -> None:
    """The server is gone, or its QEMU: remove its socket (a QEMU that was killed leaves it) and the record."""
    if known.address.socket is not None:
        socket = Path(known.address.socket)
        if socket.is_socket():  # whatever else a record names is not ours
            socket.unlink(missing_ok=True)
        if socket.parent.name == register.path.parent.name[:8]:
            _remove_private(socket)
    register.remove()


def _remove_private(socket: Path) -> None:
    with suppress(OSError):
        socket.parent.rmdir()


def forget_dead(register: Register) -> None:
    """Forget the server of a QEMU that does not live any more."""
    known = register.load()
    if known is not None and not process_lives(known.qemu):
        forget(register, known)
