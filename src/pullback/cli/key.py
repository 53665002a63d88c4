"""pullback key: the passwords of a repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from collections.abc import Callable

    from pullback.flows import keys as flow

app = typer.Typer(help="The passwords of a repository: each has a key of its own.", no_args_is_help=True)


@app.command("list")
def listing(
    repository: options.Repository = None,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List the keys of a repository."""
    from pullback.flows import keys as flow

    output = Output(json, quiet, verbose)
    found = run(flow.listed(run(_request(repository, config, state_dir), output)), output)
    output.result("key list", {"keys": [_document(key) for key in found]}, list(map(_line, found)))


@app.command("add")
def add(
    repository: options.Repository = None,
    new_password_file: options.NewPasswordFile = None,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Add a password to a repository."""
    from pullback.flows import keys as flow

    output = Output(json, quiet, verbose)
    request = run(_request(repository, config, state_dir), output)
    key = run(flow.added(request, _new(new_password_file)), output)
    output.result("key add", {"key": _document(key)}, [] if quiet else [f"added key {key.id[:8]}"])


@app.command("remove")
def remove(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The start of a key's id.")],
    repository: options.Repository = None,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Remove a password from a repository."""
    from pullback.flows import keys as flow

    output = Output(json, quiet, verbose)
    gone = run(flow.removed(run(_request(repository, config, state_dir), output), key), output)
    output.result("key remove", {"key": _document(gone)}, [] if quiet else [f"removed key {gone.id[:8]}"])


@app.command("passwd")
def passwd(
    repository: options.Repository = None,
    new_password_file: options.NewPasswordFile = None,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Replace the password with which the repository is opened by another."""
    from pullback.flows import keys as flow

    output = Output(json, quiet, verbose)
    request = run(_request(repository, config, state_dir), output)
    key = run(flow.changed(request, _new(new_password_file)), output)
    lines = [f"the password is changed, key {key.id[:8]}; give the new one to whatever runs your backups"]
    output.result("key passwd", {"key": _document(key)}, [] if quiet else lines)


async def _request(name: str | None, config: Path | None, state_dir: Path | None) -> flow.Request:
    from pullback.flows import keys as flow

    chosen = configured.repository(name, configured.load(config), state=state_dir)
    return flow.Request(repository=chosen.place, access=chosen.access)


def _new(file: Path | None) -> Callable[[], str]:
    from pullback.flows import repositories

    return lambda: repositories.new_password(file, configured.new_password())


def _document(key: flow.Key) -> dict[str, object]:
    return {
        "id": key.id,
        "current": key.current,
        "user": key.user,
        "host": key.host,
        "created": key.created,
        "damaged": key.damaged,
    }


def _line(key: flow.Key) -> str:
    mark = "*" if key.current else " "
    made = "DAMAGED" if key.damaged else f"{key.created[:19]}  {key.user} on {key.host}"
    return f"{mark}{key.id[:8]}  {made}"
