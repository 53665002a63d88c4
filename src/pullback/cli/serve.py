"""pullback serve: the disks of a restore point for other programs, over NBD."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback import errors
from pullback.cli import configured, lasting, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback.flows import serving as flow
    from pullback.flows.exports import Access
    from pullback.model.exports import Listen


def serve(
    repository: options.Repository = None,
    point: options.Point = "latest",
    disk: options.Disks = None,
    copy_on_write: Annotated[
        bool,
        typer.Option("--copy-on-write", help="Clients may write: what they write is kept apart, and the point stays."),
    ] = False,
    overlay: Annotated[
        Path | None,
        typer.Option(
            "--overlay",
            metavar="DIR",
            help="Keep what clients write there, for a later `serve` of the same point; without it, it is thrown away.",
        ),
    ] = None,
    listen: options.ListenOn = None,
    socket: options.SocketAt = None,
    tls_x509: options.TlsX509 = None,
    tls_psk: options.TlsPsk = None,
    insecure: options.Insecure = False,
    max_connections: options.MaxConnections = None,
    patient: options.Patient = False,
    cache_size: options.CacheSize = None,
    machine: options.MachineName = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Serve the disks of a restore point over NBD, each byte proven as it is handed out, until Ctrl-C or SIGTERM."""
    output = Output(json, quiet, verbose)

    async def request() -> flow.Request:
        from pullback import state
        from pullback.flows import serving as flow

        access = await lasting.access(tls_x509, tls_psk, max_connections, insecure=insecure)
        chosen = configured.repository(repository, configured.load(None), state=state_dir)
        return flow.Request(
            repository=chosen.place,
            access=chosen.access,
            point=point,
            machine=machine,
            only=tuple(disk or ()),
            listen=_listen(listen, socket, access),
            directories=state.directories(state_dir),
            patient=patient,
            cache=lasting.cache_size(cache_size),
            writable=copy_on_write or overlay is not None,
            overlay=overlay.absolute() if overlay else None,
        )

    run(_stay(run(request(), output), output), output)


def _listen(listen: str | None, socket: Path | None, access: Access) -> Listen:
    """Where to serve, and for whom."""
    from pullback.model import urls
    from pullback.model.exports import Listen

    if listen is not None and socket is not None:
        raise errors.UsageError(problem="--listen and --socket exclude each other")
    host, port = urls.address(listen) if listen is not None else (None, None)
    return Listen(
        socket=socket.absolute() if socket else None,
        host=host,
        port=port,
        tls=access.tls,
        insecure=access.insecure,
        max_connections=access.max_connections,
    )


async def _stay(request: flow.Request, output: Output) -> None:
    """Serve, and say what happens, until we are told to end: that is the good end."""
    from pullback.flows import serving as flow

    def told(trouble: flow.Trouble) -> None:
        lasting.tell_trouble(trouble, output)

    async with flow.serving(request, told=told) as served:
        output.note("it stays until this command ends: Ctrl-C or SIGTERM ends both")
        output.result("serve", _values(served), _lines(served))
        try:
            await served.ended()
        except asyncio.CancelledError:
            lasting.use_up()


def _values(served: flow.Served) -> dict[str, object]:
    tls = served.address.tls
    return {
        "point": served.point.id,
        "machine": served.point.machine,
        "created": served.point.created.isoformat(),
        "tls": tls.value if tls else None,
        "disks": [
            {
                "target": disk.target,
                "name": disk.export,
                "uri": disk.uri,
                "size": disk.size,
                "writable": disk.writable,
            }
            for disk in served.disks
        ],
    }


def _lines(served: flow.Served) -> list[str]:
    from pullback.units import format_size

    width = max(len(disk.target) for disk in served.disks)
    lines = [f"{served.point.machine}: restore point {served.point.id}"]
    for disk in served.disks:
        more = "  writable" if disk.writable else ""
        lines.append(f"  {disk.target.ljust(width)}  {disk.uri}  {format_size(disk.size)}{more}")
    return lines
