"""Fixtures of all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from kit import Box, MakeBox, boxes
from pullback.engine import scratch

# A busy machine makes any example slow, which says nothing about the code; in CI the same examples every time.
hypothesis.settings.register_profile("pullback", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("pullback")


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a short path: a unix socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pb-") as directory:
        yield Path(directory)


@pytest.fixture
def make_box(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeBox]:
    """A factory of machines; scratch is content with little room, as the disks are small."""
    monkeypatch.setattr(scratch, "_MINIMUM_FREE", 16 * 1024 * 1024)
    with boxes(short_dir) as make:
        yield make


@pytest.fixture
def box(make_box: MakeBox) -> Box:
    """A machine with two virtio disks, vda and vdb."""
    return make_box()
