"""The contract of `pullback.repo.Store` as a test suite, and stores that are slow or fail.

Whoever writes a store derives a test class from `StoreContract` and says how to make one:

    class TestMine(StoreContract):
        @contextmanager
        def make(self):
            with MyStore() as store:
                yield store
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Self

from pullback import errors
from pullback.repo import Kind, Store, Stored, path_of
from pullback.testing.endpoints import expecting
from pullback.units import MiB

#: Called before each operation with its name (`read`, `write`, …), the kind and the name; may raise or wait.
Before = Callable[[str, Kind, str], None]


class WrappedStore:
    """Another store, with something done before each call: the base of slow and failing ones."""

    def __init__(self, store: Store, before: Before) -> None:
        self._store = store
        self._before = before

    @property
    def url(self) -> str:
        """That of the store within."""
        return self._store.url

    @property
    def connections(self) -> int:
        """That of the store within."""
        return self._store.connections

    def list(self, kind: Kind) -> Iterator[Stored]:
        """See `Store`."""
        self._before("list", kind, "")
        yield from self._store.list(kind)

    def read(self, kind: Kind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store`."""
        self._before("read", kind, name)
        return self._store.read(kind, name, offset, length)

    def write(self, kind: Kind, name: str, data: bytes | bytearray | memoryview, *, new: bool = False) -> None:
        """See `Store`."""
        self._before("write", kind, name)
        self._store.write(kind, name, data, new=new)

    def size(self, kind: Kind, name: str) -> int:
        """See `Store`."""
        self._before("size", kind, name)
        return self._store.size(kind, name)

    def delete(self, kind: Kind, name: str) -> None:
        """See `Store`."""
        self._before("delete", kind, name)
        self._store.delete(kind, name)

    def tidy(self) -> None:
        """See `Store`."""
        self._store.tidy()

    def hurry(self) -> None:
        """See `Store`."""
        self._store.hurry()

    def close(self) -> None:
        """See `Store`."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def delaying(seconds: float) -> Before:
    """Each call takes so much longer."""

    def before(operation: str, kind: Kind, name: str) -> None:
        time.sleep(seconds)

    return before


def failing(every: int, *operations: str) -> Before:
    """Each n-th call (of these operations; of all, if none are named) fails with `StoreFailed`."""
    lock, count = threading.Lock(), 0

    def before(operation: str, kind: Kind, name: str) -> None:
        nonlocal count
        if operations and operation not in operations:
            return
        with lock:
            count += 1
            fails = count % every == 0
        if fails:
            raise errors.StoreFailed(
                store="failing", what=f"{operation} {path_of(kind, name)}", reason="as was asked for"
            )

    return before


def hanging(released: threading.Event, *operations: str) -> Before:
    """Calls (of these operations; all, if none are named) wait until `released` is set."""

    def before(operation: str, kind: Kind, name: str) -> None:
        if not operations or operation in operations:
            released.wait()

    return before


def named(content: bytes) -> str:
    """The name of a file with that content."""
    return hashlib.sha256(content).hexdigest()


class StoreContract(ABC):
    """What every store must do. The tests are run by pytest, in a derived class named `Test…`."""

    #: How far the store's clock may be off, with what it rounds.
    clock_slack = timedelta(seconds=10)

    @abstractmethod
    def make(self) -> AbstractContextManager[Store]:
        """An open, empty store, closed with the block."""

    def test_it_says_what_it_is(self) -> None:
        with self.make() as store:
            assert store.url
            assert store.connections >= 1

    def test_an_empty_store_lists_nothing(self) -> None:
        with self.make() as store:
            assert [list(store.list(kind)) for kind in Kind] == [[] for _ in Kind]

    def test_what_is_written_reads_back_and_is_listed(self) -> None:
        with self.make() as store:
            for kind in Kind:
                content = f"a file of {kind}".encode()
                name = "" if kind is Kind.CONFIG else named(content)
                store.write(kind, name, content)
                assert store.read(kind, name) == content
                assert store.size(kind, name) == len(content)
                [listed] = store.list(kind)
                assert (listed.name, listed.size) == (name, len(content))
                assert abs(datetime.now(UTC) - listed.modified) < self.clock_slack

    def test_any_range_reads_back(self) -> None:
        chance = random.Random(1)
        content = chance.randbytes(300_000)
        with self.make() as store:
            store.write(Kind.DATA, named(content), content)
            for _ in range(10):
                offset = chance.randrange(len(content))
                length = chance.randrange(len(content) - offset + 1)
                assert store.read(Kind.DATA, named(content), offset, length) == content[offset : offset + length]
                assert store.read(Kind.DATA, named(content), offset) == content[offset:]
            assert store.read(Kind.DATA, named(content), len(content), 0) == b""

    def test_a_range_beyond_the_end_is_damage(self) -> None:
        with self.make() as store:
            store.write(Kind.DATA, named(b"short"), b"short")
            for offset, length in [(0, 6), (4, 2), (5, 1), (6, 0), (100, 10), (6, None)]:
                with expecting(errors.ObjectDamaged):
                    store.read(Kind.DATA, named(b"short"), offset, length)

    def test_what_is_not_there_is_missing(self) -> None:
        with self.make() as store:
            for kind in Kind:
                name = "" if kind is Kind.CONFIG else named(b"nothing")
                for ask in (store.size, store.read, lambda kind, name: store.read(kind, name, 3, 5)):
                    with expecting(errors.ObjectMissing):
                        ask(kind, name)

    def test_deleting_removes_and_twice_is_fine(self) -> None:
        with self.make() as store:
            for content in (b"one", b"two"):
                store.write(Kind.LOCKS, named(content), content)
            for _ in range(2):
                store.delete(Kind.LOCKS, named(b"one"))
                assert [each.name for each in store.list(Kind.LOCKS)] == [named(b"two")]
            with expecting(errors.ObjectMissing):
                store.read(Kind.LOCKS, named(b"one"))

    def test_a_second_write_replaces_the_first(self) -> None:
        """So what was damaged can be healed."""
        with self.make() as store:
            store.write(Kind.DATA, named(b"good"), b"bad and longer")
            store.write(Kind.DATA, named(b"good"), b"good")
            store.write(Kind.DATA, named(b"good"), b"good")
            assert store.read(Kind.DATA, named(b"good")) == b"good"
            assert len(list(store.list(Kind.DATA))) == 1

    def test_what_must_be_new_is_refused_where_something_is(self) -> None:
        with self.make() as store:
            store.write(Kind.CONFIG, "", b"first", new=True)
            with expecting(errors.AlreadyStored):
                store.write(Kind.CONFIG, "", b"second", new=True)
            assert store.read(Kind.CONFIG, "") == b"first"

    def test_of_many_who_want_to_be_first_one_is(self) -> None:
        with self.make() as store:

            def attempt(number: int) -> int | None:
                try:
                    store.write(Kind.CONFIG, "", str(number).encode(), new=True)
                except errors.AlreadyStored:
                    return None
                return number

            with ThreadPoolExecutor(4) as pool:
                [winner] = [number for number in pool.map(attempt, range(4)) if number is not None]
            assert store.read(Kind.CONFIG, "") == str(winner).encode()

    def test_an_empty_file_is_a_file(self) -> None:
        with self.make() as store:
            store.write(Kind.KEYS, named(b""), b"")
            assert store.read(Kind.KEYS, named(b"")) == b""
            assert store.size(Kind.KEYS, named(b"")) == 0

    def test_any_buffer_is_taken(self) -> None:
        content = random.Random(2).randbytes(MiB + 1)
        with self.make() as store:
            for given in (bytearray(content), memoryview(content), memoryview(b"xx" + content)[2:]):
                name = named(str(type(given)).encode() + bytes([len(given) % 7]))
                store.write(Kind.DATA, name, given)
                assert store.read(Kind.DATA, name) == content

    def test_a_large_file_is_stored_whole(self) -> None:
        content = random.Random(3).randbytes(17 * MiB)
        with self.make() as store:
            store.write(Kind.DATA, named(content), content)
            assert store.read(Kind.DATA, named(content)) == content
            assert store.read(Kind.DATA, named(content), 16 * MiB, MiB) == content[16 * MiB :]

    def test_kinds_do_not_mix(self) -> None:
        with self.make() as store:
            store.write(Kind.INDEX, named(b"x"), b"index")
            store.write(Kind.SNAPSHOTS, named(b"x"), b"snapshot")
            store.delete(Kind.INDEX, named(b"x"))
            assert store.read(Kind.SNAPSHOTS, named(b"x")) == b"snapshot"
            assert list(store.list(Kind.INDEX)) == []

    def test_names_that_lead_elsewhere_are_refused(self) -> None:
        with self.make() as store:
            for name in ("", "../config", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n", "٠" * 64):
                for ask in (
                    store.read,
                    store.size,
                    store.delete,
                    lambda kind, name: store.write(kind, name, b""),
                ):
                    with expecting(ValueError):
                        ask(Kind.DATA, name)
            with expecting(ValueError):
                store.read(Kind.CONFIG, "0" * 64)

    def test_threads_share_it(self) -> None:
        contents = [str(number).encode() * 1000 for number in range(60)]
        with self.make() as store, ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda content: store.write(Kind.DATA, named(content), content), contents))
            found = list(pool.map(lambda content: store.read(Kind.DATA, named(content)), contents))
            assert found == contents
            assert {each.name for each in store.list(Kind.DATA)} == set(map(named, contents))

    def test_tidying_takes_nothing_that_is_stored(self) -> None:
        with self.make() as store:
            store.write(Kind.DATA, named(b"x"), b"x")
            store.tidy()
            assert store.read(Kind.DATA, named(b"x")) == b"x"

    def test_closing_twice_is_fine(self) -> None:
        with self.make() as store:
            store.close()
            store.close()
