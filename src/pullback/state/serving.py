"""The record of the NBD server that we started in a QEMU, and of what we serve there.

    STATE/machines/<hash of the machine's name>/server.json

QEMU tells neither where its server listens nor by which names and with which bitmaps it exports,
so that is written down before it is done. A record of another QEMU process is worthless.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pullback import state
from pullback.model.exports import Served, ServerAddress, TlsKind

_LIMIT = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A server and its exports."""

    #: The QEMU process, as `<pid>:<start time>`.
    qemu: str
    address: ServerAddress
    #: Id of QEMU's object with the TLS credentials.
    tls_object: str | None = None
    exports: tuple[Served, ...] = ()

    def without(self, ids: set[str]) -> Serving:
        """The same without some exports."""
        return replace(self, exports=tuple(item for item in self.exports if item.id not in ids))


class Register:
    """A machine's record, as a file."""

    def __init__(self, base: Path, machine: str) -> None:
        #: `base`: the state directory.
        self.path = state.machine_directory(base, machine) / "server.json"

    def load(self, qemu: str | None = None) -> Serving | None:
        """The record, if it is one, and about this QEMU process (None: any)."""
        try:
            found = _serving(json.loads(self.path.read_bytes()[:_LIMIT]))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return found if qemu in (None, found.qemu) else None

    def save(self, serving: Serving) -> None:
        """Durable when it returns."""
        state.private(self.path.parent)
        state.write_durably(self.path, asdict(serving))

    def remove(self) -> None:
        """There is no server of ours any more."""
        self.path.unlink(missing_ok=True)


def _serving(values: Any) -> Serving:
    address = _address(values["address"])
    return Serving(
        qemu=str(values["qemu"]),
        address=address,
        tls_object=None if values["tls_object"] is None else str(values["tls_object"]),
        exports=tuple(_served(item, address) for item in values["exports"]),
    )


def _address(values: Any) -> ServerAddress:
    return ServerAddress(
        socket=None if values["socket"] is None else str(values["socket"]),
        host=None if values["host"] is None else str(values["host"]),
        port=None if values["port"] is None else int(values["port"]),
        tls=None if values["tls"] is None else TlsKind(values["tls"]),
    )


def _served(values: Any, address: ServerAddress) -> Served:
    return Served(
        id=str(values["id"]),
        job=str(values["job"]),
        name=str(values["name"]),
        target=str(values["target"]),
        snapshot=None if values["snapshot"] is None else str(values["snapshot"]),
        writable=values["writable"] is True,
        contexts=tuple((str(context), str(since)) for context, since in values["contexts"]),
        address=address,
    )
