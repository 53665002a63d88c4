"""pullback init, unlock: a repository as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pullback import errors
from pullback.cli import configured, options
from pullback.cli.output import Output
from pullback.cli.running import run

if TYPE_CHECKING:
    from pullback.flows import keys as flow_keys

_UNRECOVERABLE = "its password cannot be recovered: without it nobody can read what is stored, not even you"


def init(
    repository: options.Repository = None,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Make a new repository: encrypted, in restic's format (or a `dir:` one, of plain images)."""
    output = Output(json, quiet, verbose)
    values = run(_init(repository, config, state_dir), output)
    lines = [f"made the repository {values['repository']}, id {values['id']}"]
    if values["encrypted"]:
        lines.append(_UNRECOVERABLE)
    output.result("init", values, [] if quiet else lines)


async def _init(name: str | None, config: Path | None, state_dir: Path | None) -> dict[str, object]:
    import asyncio
    from dataclasses import replace

    from pullback.flows import repositories
    from pullback.model import urls

    chosen = configured.repository(name, configured.load(config), state=state_dir)
    access = replace(chosen.access, prompt=configured.new_password())
    made = await asyncio.to_thread(repositories.make, chosen.place, access)
    encrypted = isinstance(chosen.place, urls.ResticRepository)
    return {"repository": chosen.place.url, "id": made, "encrypted": encrypted}


def unlock(
    repository: options.Repository = None,
    remove_all: Annotated[
        bool, typer.Option("--remove-all", help="Remove the locks of living processes too. Wants --force.")
    ] = False,
    living: Annotated[
        bool, typer.Option("--force", help="With --remove-all: no backup, prune or copy runs anywhere.")
    ] = False,
    config: options.Config = None,
    state_dir: options.StateDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Remove the locks whose holders are gone, and show the others."""
    output = Output(json, quiet, verbose)
    found = run(_unlock(repository, config, state_dir, remove_all=remove_all, living=living), output)
    values: dict[str, object] = {
        "locks": [
            {
                "id": lock.id,
                "exclusive": lock.exclusive,
                "host": lock.host,
                "user": lock.user,
                "pid": lock.pid,
                "since": lock.since,
                "stale": lock.stale,
                "removed": lock.removed,
            }
            for lock in found
        ]
    }
    output.result("unlock", values, [] if quiet else list(map(_line, found)) or ["there are no locks"])


async def _unlock(
    name: str | None, config: Path | None, state_dir: Path | None, *, remove_all: bool, living: bool
) -> tuple[flow_keys.Lock, ...]:
    from pullback.flows import keys as flow

    if remove_all and not living:
        problem = (
            "--remove-all takes the locks of running backups away, whose data may then be pruned. "
            "If none runs on any host, say --force too"
        )
        raise errors.UsageError(problem=problem)
    chosen = configured.repository(name, configured.load(config), state=state_dir)
    request = flow.Request(repository=chosen.place, access=chosen.access)
    return await flow.unlocked(request, everything=remove_all)


def _line(lock: flow_keys.Lock) -> str:
    holder = f"process {lock.pid} on {lock.host} by {lock.user}" if lock.pid else "it cannot be read"
    kind = "exclusive" if lock.exclusive else "shared"
    word = "removed" if lock.removed else "stays: it is held"
    stale = ", its holder is gone" if lock.stale else ""
    return f"{lock.id[:8]}  {kind}, {holder}, since {lock.since[:19]}Z{stale}: {word}"
