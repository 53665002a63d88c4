"""Large files of a local store are written past the page cache where that can be, and are right everywhere."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
from contextlib import ExitStack
from pathlib import Path

import pytest

import mounts
from pullback import errors
from pullback.repo import Kind
from pullback.repo.store import local
from pullback.repo.store.local import LocalStore
from pullback.testing.endpoints import expecting
from pullback.units import KiB, MiB

LENGTHS = [MiB - 1, MiB, MiB + 1, 2 * MiB + 4 * KiB, 3 * MiB + 4 * KiB - 1, 5 * MiB + 513]


@pytest.fixture(name="place", params=["here", "ext4", "tmpfs"])
def new_place(request: pytest.FixtureRequest, tmp_path: Path, mount: mounts.Mount) -> Path:
    """A file system that knows direct writing; one that may not."""
    if request.param == "here":
        return tmp_path
    made: Path = mount.ext4(64 * MiB) if request.param == "ext4" else mount.tmpfs(64 * MiB)
    return made


def paged(content: bytes) -> memoryview:
    """The same in whole pages, as packs are."""
    memory = mmap.mmap(-1, len(content))
    memory[:] = content
    return memoryview(memory).toreadonly()


@pytest.mark.parametrize("aligned", [True, False])
def test_a_large_file_is_what_was_written(place: Path, aligned: bool) -> None:
    with LocalStore.create(place / "repo") as store:
        for length in LENGTHS:
            content = random.Random(length).randbytes(length)
            given = paged(content) if aligned else memoryview(b"x" + content)[1:]
            name = hashlib.sha256(content).hexdigest()
            store.write(Kind.DATA, name, given)
            assert store.read(Kind.DATA, name) == content
        assert sorted(stored.size for stored in store.list(Kind.DATA)) == sorted(LENGTHS)


def test_most_of_a_pack_goes_past_the_page_cache_on_ext4(mount: mounts.Mount) -> None:
    path = mount.ext4(64 * MiB) / "file"
    content = random.Random(1).randbytes(2 * MiB + 100)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        rest = local._write_directly(descriptor, paged(content))
        assert bytes(rest) == content[2 * MiB :]
        local._write_all(descriptor, rest)
    assert path.read_bytes() == content


def test_a_file_system_gets_full_while_it_is_written_to_directly(mount: mounts.Mount) -> None:
    place = mount.ext4(16 * MiB)
    content = random.Random(1).randbytes(16 * MiB)
    with LocalStore.create(place / "repo") as store:
        with expecting(errors.DestinationFull):
            store.write(Kind.DATA, hashlib.sha256(content).hexdigest(), paged(content))
        assert list(store.list(Kind.DATA)) == []
        assert [path for path in (place / "repo" / "data").rglob("*") if path.is_file()] == []
