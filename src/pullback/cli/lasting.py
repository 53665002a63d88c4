"""What the commands of snapshots, exports and jobs share: options made values, staying, and how exports are shown."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pullback import errors
from pullback.cli import options
from pullback.cli.output import Output
from pullback.cli.running import run
from pullback.model.backups import Fleecing, Quiesce
from pullback.model.exports import Tls, TlsKind

if TYPE_CHECKING:
    from pullback.flows.exports import Access
    from pullback.flows.servants import Trouble
    from pullback.flows.snapshots import How
    from pullback.flows.staying import At, Thing
    from pullback.model.exports import Served

T = TypeVar("T")


async def at(machine: str, name: str | None, state_dir: Path | None, command: str, *, anonymous: bool = True) -> At:
    """The machine that a command is about."""
    from pullback import state
    from pullback.flows.staying import At
    from pullback.model import urls

    return At(
        url=urls.machine(machine),
        directories=state.directories(state_dir),
        command=command,
        name=name,
        anonymous=anonymous,
    )


async def how(
    scratch: Path | None,
    engine: Fleecing | None,
    quiesce: Quiesce | None,
    agent: Path | None,
    mount_point: Sequence[str] | None,
    owner: int | None,
    *,
    wait: bool,
) -> How:
    """How disks are frozen. Who waits owns what it made, so it goes also if we are killed."""
    from pullback.flows.snapshots import How

    quiescing = options.quiescing(quiesce or Quiesce.NO, agent, mount_point)
    owner = owner or (os.getpid() if wait else None)
    made = How(scratch=scratch.absolute() if scratch else None, fleecing=engine, quiescing=quiescing, owner=owner)
    _ = made.owner_token  # a process that is not there is refused before anything is done
    return made


async def access(x509: Path | None, psk: Path | None, max_connections: int | None, *, insecure: bool) -> Access:
    """Who may connect."""
    from pullback.flows.exports import Access

    if x509 and psk:
        raise errors.UsageError(problem="--tls-x509 and --tls-psk exclude each other")
    tls = None
    if x509 or psk:
        tls = Tls(kind=TlsKind.X509 if x509 else TlsKind.PSK, directory=(x509 or psk or Path()).absolute())
    return Access(tls=tls, insecure=insecure, max_connections=max_connections)


def stay(place: At, thing: Thing[T], output: Output, *, told: Callable[[T], None], wait: bool) -> None:
    """Make it, tell of it, and stay with it if that is wanted, or if the machine is off."""
    from pullback.flows.staying import make

    def tell(made: T) -> None:
        if wait or place.off:
            output.note("it stays until this command ends: Ctrl-C or SIGTERM ends both")
        told(made)

    if reason := run(make(place, thing, told=tell, wait=wait), output):
        print_end(reason, output)
        raise SystemExit(int(errors.Exit.FAILED))


def print_end(reason: str, output: Output) -> None:
    """Why something was over before it was ended."""
    output.note(f"it is over: {reason}")


def tell_trouble(trouble: Trouble, output: Output) -> None:
    """What happened while a restore point is read by others: a JSON event, or a sentence on standard error."""
    if not output.json:
        output.note(f"{moment(trouble.at)}  {trouble.message}")
        return
    facts: dict[str, object] = {"message": trouble.message}
    if trouble.extent is not None:
        facts |= {"start": trouble.extent.start, "length": trouble.extent.length, "reason": trouble.reason}
    output.event(
        {
            "kind": f"point-{trouble.kind}",
            "at": trouble.at.isoformat(),
            "subject": trouble.target or "repository",
            "facts": facts,
        },
        trouble.message,
    )


def cache_size(text: str | None) -> int:
    """Bytes to keep of what was decoded."""
    from pullback.flows import serving
    from pullback.units import format_size, parse_size

    size = parse_size(text) if text else serving.CACHE
    if size < serving.LEAST_CACHE:
        raise errors.UsageError(problem=f"--cache needs {format_size(serving.LEAST_CACHE)} at least")
    return size


def use_up() -> None:
    """The cancellation of this task has done what it was for."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


# -- exports ---------------------------------------------------------------------------------


def export_values(served: Served) -> dict[str, object]:
    """An export as JSON."""
    return {
        "name": served.name,
        "target": served.target,
        "uri": served.uri,
        "snapshot": served.snapshot,
        "writable": served.writable,
        "tls": served.address.tls.value if served.address.tls else None,
        "contexts": [{"context": context, "since": since} for context, since in served.contexts],
        "job": served.job,
    }


def export_lines(exports: Iterable[Served]) -> list[str]:
    """One line for each: name, URI, contexts."""
    found = list(exports)
    names = max((len(served.name) for served in found), default=0)
    return [_line(served, names) for served in found]


def _line(served: Served, width: int) -> str:
    contexts = [f"{context} (since {since})" for context, since in served.contexts]
    return "  ".join(
        [f"  {served.name.ljust(width)}", served.uri, *contexts, *(("writable",) if served.writable else ())]
    )


def moment(at: datetime) -> str:
    """An instant for people, in local time."""
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}"
