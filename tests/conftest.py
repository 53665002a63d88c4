"""Fixtures of all tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

import seaweed
from kit import Box, MakeBox, boxes
from mounts import Mount, mounts
from pullback.engine import scratch
from pullback.units import GiB

# A busy machine makes any example slow, which says nothing about the code; in CI the same examples every time.
hypothesis.settings.register_profile("pullback", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("pullback")


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a short path: a unix socket's has at most 107 bytes.

    In memory where there is room: machines are made, synced and killed here by the hundred.
    """
    with tempfile.TemporaryDirectory(prefix="pb-", dir=_memory()) as directory:
        yield Path(directory)


def _memory() -> Path | None:
    place = Path("/dev/shm")
    return place if place.is_dir() and shutil.disk_usage(place).free > 4 * GiB else None


@pytest.fixture
def mount(short_dir: Path) -> Iterator[Mount]:
    """File systems of their own."""
    with mounts(short_dir / "mnt") as made:
        yield made


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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[seaweed.Server]:
    """An S3 server, started for who needs it first."""
    with seaweed.running() as server:
        yield server
