"""pullback export …: snapshots and disks, served over NBD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback import errors
from pullback.cli import lasting, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback import state
    from pullback.flows.opening import Opened
    from pullback.model.documents.export import Address, ExportDocument
    from pullback.model.exports import Served

app = typer.Typer(
    help="Exports: snapshots, and disks themselves, served over NBD for other programs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_File = Annotated[
    str | None, typer.Argument(metavar="FILE", help="A domainblockexport, as XML or JSON; '-' is standard input.")
]
_OfSnapshot = Annotated[
    str | None,
    typer.Option("--snapshot", metavar="SNAPSHOT", help="Serve this snapshot; without --disk, all disks of it."),
]
_Since = Annotated[
    str | None, typer.Option("--checkpoint", metavar="CHECKPOINT", help="Tell what changed from it to the snapshot.")
]
_All = Annotated[
    bool, typer.Option("--all-checkpoints", help="Tell what changed from each checkpoint to the snapshot.")
]
_Writable = Annotated[
    bool,
    typer.Option(
        "--writable", help="Serve disks themselves for writing; of a running machine, its device must allow that."
    ),
]
_As = Annotated[
    str | None,
    typer.Option(
        "--as", metavar="EXPORT", help="The export's name, of one disk; without it TARGET or TARGET-SNAPSHOT."
    ),
]


# -- start -----------------------------------------------------------------------------------


@app.command("start")
def start(
    machine: options.Machine,
    file: _File = None,
    disk: options.Disks = None,
    of_snapshot: _OfSnapshot = None,
    since_checkpoint: _Since = None,
    all_checkpoints: _All = False,
    writable: _Writable = False,
    export_name: _As = None,
    listen: options.ListenOn = None,
    socket: options.SocketAt = None,
    tls_x509: options.TlsX509 = None,
    tls_psk: options.TlsPsk = None,
    insecure: options.Insecure = False,
    max_connections: options.MaxConnections = None,
    wait: options.Wait = False,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Serve snapshots (read-only) or disks over NBD, and print how to reach each: its name, URI and contexts.

    Of a machine that is off, and with --wait, the command stays, and the exports end with it.
    """
    from pullback.flows import exports as flow
    from pullback.flows import staying

    output = Output(json, quiet, verbose)
    place = run(lasting.at(machine, name, state_dir, "export start"), output)
    given = _Given(
        disks=tuple(disk or ()),
        snapshot=of_snapshot,
        checkpoint=since_checkpoint,
        all_checkpoints=all_checkpoints,
        writable=writable,
        name=export_name,
    )
    asked = run(_asked(file, given), output)
    address = run(_address(listen, socket), output)
    access = run(lasting.access(tls_x509, tls_psk, max_connections, insecure=insecure), output)
    machines: list[str] = []

    async def begin(opened: Opened, _: state.Directories) -> tuple[Served, ...]:
        machines.append(opened.name)
        wish = asked or await _whole_snapshot(opened, given)
        return await flow.start(opened, replace(wish, address=address or wish.address), access)

    def told(made: tuple[Served, ...]) -> None:
        values: dict[str, object] = {"machine": machines[0], "exports": [lasting.export_values(one) for one in made]}
        output.result("export start", values, lasting.export_lines(made))

    lasting.stay(place, staying.some_exports(place, begin), output, told=told, wait=wait)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """What the options say of each disk."""

    disks: tuple[str, ...]
    snapshot: str | None
    checkpoint: str | None
    all_checkpoints: bool
    writable: bool
    name: str | None

    def document(self, disks: Sequence[str]) -> ExportDocument:
        """As a document, through its rules. Raises `BadDocument`, `UsageError`."""
        from pullback.model.documents import export as documents

        if self.name is not None and len(disks) != 1:
            raise errors.UsageError(problem="--as names the export of one disk")
        values = {
            "exportname": self.name,
            "snapshot": self.snapshot,
            "checkpoint": self.checkpoint,
            "allcheckpoints": self.all_checkpoints or None,
            "readonly": False if self.writable else None,
        }
        said = {key: value for key, value in values.items() if value is not None}
        return documents.from_dict({"disks": [{"name": target, **said} for target in disks]})


_NOTHING = _Given(disks=(), snapshot=None, checkpoint=None, all_checkpoints=False, writable=False, name=None)


async def _asked(file: str | None, given: _Given) -> ExportDocument | None:
    """The document of a file, or that of the options; None: the machine must be asked for the snapshot's disks."""
    from pullback.cli import inputs
    from pullback.model.documents import export as documents
    from pullback.model.xml import export as xml

    if file is not None:
        if given != _NOTHING:
            raise errors.UsageError(problem="FILE says what is served, so options do not (those of the server do)")
        return inputs.document(file, documents.ROOT, xml=xml.parse, values=documents.from_dict)
    if given.disks:
        return given.document(given.disks)
    if given.snapshot is None:
        raise errors.UsageError(problem="Say what is to be served: FILE, --disk or --snapshot")
    given.document(["vda"])  # what is wrong with the other options is told at once, whatever the disk
    return None


async def _whole_snapshot(opened: Opened, given: _Given) -> ExportDocument:
    from pullback.flows import snapshots

    assert given.snapshot is not None
    found = await snapshots.find(opened, given.snapshot)
    return given.document([disk.target for disk in found.disks])


async def _address(listen: str | None, socket: Path | None) -> Address | None:
    """Where to serve; None: as the document says."""
    from pullback.model import urls
    from pullback.model.documents import rules
    from pullback.model.documents.export import Address, AddressType

    if listen is not None and socket is not None:
        raise errors.UsageError(problem="--listen and --socket exclude each other")
    if socket is not None:
        path = str(socket.absolute())
        if problem := rules.socket(path):
            raise errors.UsageError(problem=f"{path} {problem}")
        return Address(type=AddressType.UNIX, socket=path)
    if listen is not None:
        host, port = urls.address(listen)
        return Address(host=host, port=port)
    return None


# -- looking, and the end --------------------------------------------------------------------


@app.command("list")
def listing(
    machine: options.Machine,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what is served of a machine, those of its job too."""
    from pullback.flows import exports as flow

    output = Output(json, quiet, verbose)
    place = run(lasting.at(machine, name, state_dir, "export list"), output)

    async def work(opened: Opened, _: state.Directories) -> tuple[str, tuple[Served, ...]]:
        return opened.name, await flow.listing(opened)

    machine_name, found = run(place.do(work), output)
    values: dict[str, object] = {
        "machine": machine_name,
        "exports": [lasting.export_values(served) for served in found],
    }
    output.result("export list", values, lasting.export_lines(found) or [f"{machine_name}: no exports"])


@app.command("stop")
def stop(
    machine: options.Machine,
    exports: Annotated[
        list[str] | None,
        typer.Argument(metavar="EXPORT…", help="Names of exports; without any, all that belong to no job."),
    ] = None,
    name: options.Name = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Stop exports, also under clients; the server too, with the last one. Snapshots stay."""
    from pullback.flows import exports as flow

    output = Output(json, quiet, verbose)
    place = run(lasting.at(machine, name, state_dir, "export stop"), output)

    async def work(opened: Opened, _: state.Directories) -> tuple[str, tuple[Served, ...]]:
        return opened.name, await flow.stop(opened, tuple(exports or ()))

    machine_name, gone = run(place.do(work), output)
    values: dict[str, object] = {"machine": machine_name, "stopped": [served.name for served in gone]}
    lines = [f"export {served.name} is stopped" for served in gone] or ["there was nothing to stop"]
    output.result("export stop", values, [] if quiet else lines)
