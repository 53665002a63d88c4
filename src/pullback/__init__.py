"""Pullback: live, incremental backup and rollback of QEMU/KVM virtual machines.

The library: `connect` gives a `Machine`; `pullback.sync` is the same without asyncio. See docs/api.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pullback.version import __version__

if TYPE_CHECKING:
    from pullback.flows.exports import Access
    from pullback.flows.library import Machine, connect
    from pullback.flows.snapshots import How

__all__ = ["Access", "How", "Machine", "__version__", "connect"]
#: Loaded when they are asked for, so that `pullback --version` stays instant.
_HOMES = {
    "Access": "pullback.flows.exports",
    "How": "pullback.flows.snapshots",
    "Machine": "pullback.flows.library",
    "connect": "pullback.flows.library",
}


def __getattr__(name: str) -> object:
    import importlib

    if name == "sync":
        return importlib.import_module("pullback.sync")
    if name not in _HOMES:
        raise AttributeError(f"module 'pullback' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
