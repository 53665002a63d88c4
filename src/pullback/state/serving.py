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
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return None
        return found if qemu in (None, found.qemu) else None

    def save(self, serving: Serving) -> None:
        """Durable when it returns."""
        state.private(self.path.parent)
        state.write_durably(self.path, asdict(serving))

    def remove(self) -> None:
        """There is no server of ours any more."""
        self.path.unlink(missing_ok=True)


def _text(value: Any) -> str:
    """A text that the system can take."""
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("no text")
    value.encode()  # raises a ValueError for half a character
    return value


def _optional(value: Any) -> str | None:
    return None if value is None else _text(value)


def _serving(values: Any) -> Serving:
    address = _address(values["address"])
    return Serving(
        qemu=_text(values["qemu"]),
        address=address,
        tls_object=_optional(values["tls_object"]),
        exports=tuple(_served(item, address) for item in values["exports"]),
    )


def _address(values: Any) -> ServerAddress:
    return ServerAddress(
        socket=_optional(values["socket"]),
        host=_optional(values["host"]),
        port=_port(values["port"]),
        tls=None if values["tls"] is None else TlsKind(values["tls"]),
    )


def _port(value: Any) -> int | None:
    if value is not None and (type(value) is not int or not 0 < value < 65536):
        raise ValueError("no port")
    return value


def _served(values: Any, address: ServerAddress) -> Served:
    return Served(
        id=_text(values["id"]),
        job=_text(values["job"]),
        name=_text(values["name"]),
        target=_text(values["target"]),
        snapshot=_optional(values["snapshot"]),
        writable=values["writable"] is True,
        contexts=tuple((_text(context), _text(since)) for context, since in values["contexts"]),
        address=address,
    )
