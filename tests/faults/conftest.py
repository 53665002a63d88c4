"""What the tests of failures share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mounts import Mount, mounts

_MEMORY = Path("/dev/shm")


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """In memory where possible: hundreds of machines are killed here, and each syncs its files often."""
    with tempfile.TemporaryDirectory(prefix="pb-", dir=_MEMORY if _MEMORY.is_dir() else None) as directory:
        yield Path(directory)


@pytest.fixture
def mount(short_dir: Path) -> Iterator[Mount]:
    """File systems of their own."""
    with mounts(short_dir / "mnt") as made:
        yield made
