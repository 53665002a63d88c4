"""Handing an open repository to another process of ours, which so need not be told the password.

What is handed over opens the repository: it goes through descriptors only, and is never printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pullback.repo.restic.config import Config
from pullback.repo.restic.crypto import KEY_SIZE, Key
from pullback.repo.restic.repository import Repository
from pullback.repo.store import Store


def lend(repository: Repository) -> dict[str, str]:
    """What opens the repository, as words for `borrow`."""
    key, config = repository.key, repository.config
    return {
        "key": (key.encrypt + key.k + key.r).hex(),
        "version": str(config.version),
        "id": config.id,
        "polynomial": f"{config.polynomial:x}",
    }


def borrow(store: Store, lent: Mapping[str, str], *, caches: Path) -> Repository:
    """The repository in `store`, opened with what `lend` gave. Nothing is asked of the store."""
    material = bytes.fromhex(lent["key"])
    if len(material) != KEY_SIZE:
        raise ValueError("no key of a repository")
    key = Key(material[:32], material[32:48], material[48:])
    config = Config(int(lent["version"]), lent["id"], int(lent["polynomial"], 16))
    return Repository(store, key, config, caches)
