"""Pullback: live, incremental backup and rollback of QEMU/KVM virtual machines.

The library: `connect` gives a `Machine`; `pullback.sync` is the same without asyncio. See docs/api.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pullback.version import __version__

if TYPE_CHECKING:
    from pullback.flows.exports import Access
    from pullback.flows.library import Machine, connect, watch
    from pullback.flows.snapshots import How
    from pullback.model.backups import Fleecing, Quiesce, Quiescing
    from pullback.model.exports import Tls, TlsKind

__all__ = [
    "Access",
    "Fleecing",
    "How",
    "Machine",
    "Quiesce",
    "Quiescing",
    "Tls",
    "TlsKind",
    "__version__",
    "connect",
    "watch",
]
#: Loaded when they are asked for, so that `pullback --version` stays instant.
_HOMES = {
    "Access": "pullback.flows.exports",
    "Fleecing": "pullback.model.backups",
    "How": "pullback.flows.snapshots",
    "Machine": "pullback.flows.library",
    "Quiesce": "pullback.model.backups",
    "Quiescing": "pullback.model.backups",
    "Tls": "pullback.model.exports",
    "TlsKind": "pullback.model.exports",
    "connect": "pullback.flows.library",
    "watch": "pullback.flows.library",
}


def __getattr__(name: str) -> object:
    import importlib

    if name in ("errors", "sync"):
        return importlib.import_module(f"pullback.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'pullback' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
