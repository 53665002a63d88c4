"""One contract suite for everything that holds a repository's files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import proxy
from pullback.repo.store import Store
from pullback.repo.store.local import LocalStore
from pullback.repo.store.memory import MemoryStore
from pullback.repo.store.s3 import S3Store
from pullback.testing.stores import StoreContract, WrappedStore, delaying
from seaweed import Server

_numbers = itertools.count()


class TestMemory(StoreContract):
    @contextmanager
    def make(self) -> Iterator[Store]:
        with MemoryStore() as store:
            yield store


class TestLocal(StoreContract):
    @pytest.fixture(autouse=True)
    def _in_directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path

    @contextmanager
    def make(self) -> Iterator[Store]:
        with LocalStore.create(self.directory / "repo") as store:
            yield store


class TestWrapped(TestMemory):
    @contextmanager
    def make(self) -> Iterator[Store]:
        with WrappedStore(MemoryStore(), delaying(0.0001)) as store:
            yield store


class TestS3(StoreContract):
    locked = False

    @pytest.fixture(autouse=True)
    def _on_server(self, s3_server: Server) -> None:
        self.server = s3_server

    @contextmanager
    def make(self) -> Iterator[Store]:
        bucket = f"contract-{next(_numbers)}"
        self.server.make_bucket(bucket, locked=self.locked)
        with S3Store(self.server.place(bucket, self.prefix), self.server.environ) as store:
            yield store

    prefix = "a b/ü"


class TestS3WithoutAPrefix(TestS3):
    prefix = ""


class TestS3BucketWhoseObjectsAreLocked(TestS3):
    """What is put there cannot be removed for a day; deleting hides it."""

    locked = True


class TestS3ThroughAProxyThatFailsNowAndThen(TestS3):
    """Every third request is answered by 503, cut before or after the server did it, or cut within the answer."""

    @contextmanager
    def make(self) -> Iterator[Store]:
        bucket = f"contract-{next(_numbers)}"
        self.server.make_bucket(bucket)
        faults = itertools.cycle(
            [
                proxy.Fault(status=503, code="SlowDown"),
                proxy.Fault(cut="before"),
                proxy.Fault(cut="after"),
                proxy.Fault(cut="body"),
                proxy.Fault(status=500, code="InternalError"),
            ]
        )
        with proxy.before(self.server.port) as between:
            between.rule = lambda request: next(faults) if request.number % 3 == 0 else None
            place = self.server.place(bucket, self.prefix, port=between.port)
            with S3Store(place, self.server.environ) as store:
                yield store
