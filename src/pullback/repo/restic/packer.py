"""From plain chunks to durable packs and index files.

    put ──known?──► dropped
         └────────► compressed, sealed ─► pack (16 MiB) ─► uploads ─► durable ─► journal, index in memory
    upload: the packs that are not full      finish: the index file

Called by many threads; hashing, compressing and sealing happen in theirs. So a chunk waits for
nobody unless more is under way than `Uploads` allows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial

from pullback import errors
from pullback.repo.restic import blobs, index, unpacked
from pullback.repo.restic.cache import Cache
from pullback.repo.restic.crypto import Buffer, Key
from pullback.repo.restic.lookup import Index
from pullback.repo.restic.packs import Pack, PackBuilder
from pullback.repo.restic.types import Blob, Entry
from pullback.repo.store import Kind, Store
from pullback.repo.store.limit import Limiter
from pullback.repo.store.uploads import Uploads
from pullback.units import MiB

#: Bytes of a pack before it is closed (restic's own default).
PACK_SIZE = 16 * MiB
#: Blobs that one index file holds at most (restic's own limit).
INDEX_BLOBS = 50_000
#: Bytes of packs under way at a time.
IN_FLIGHT = 96 * MiB


class Packer:
    """Stores blobs; a context manager that abandons what is under way unless `finish` came first."""

    def __init__(
        self,
        store: Store,
        key: Key,
        known: Index,
        cache: Cache,
        *,
        compress: bool,
        guarded: Callable[[], bool] = lambda: True,
        limiter: Limiter | None = None,
    ) -> None:
        """`guarded`: may we still trust that nobody prunes? Only then is an index file written before `finish`."""
        self._store = store
        self._key = key
        self._known = known
        self._cache = cache
        self._level = 1 if compress else None
        self._compress = compress
        self._guarded = guarded
        self._limiter = limiter
        self._lock = threading.Lock()
        self._builders = {kind: PackBuilder(key, kind) for kind in Blob}
        self._told: dict[Blob, list[Callable[[], None]]] = {kind: [] for kind in Blob}
        #: Blobs of ours that are not in `known` yet. A chunk may be the text of a tree: they are two blobs.
        self._claimed: set[tuple[bytes, Blob]] = set()
        self._unindexed: list[tuple[bytes, tuple[Entry, ...]]] = []
        self._packs: set[bytes] = set()
        self._open = ExitStack()

    def __enter__(self) -> Packer:
        self._journal = self._open.enter_context(self._cache.journal())
        workers = max(2, self._store.connections // 2)
        self._uploads = Uploads(self._store, workers=workers, limit_bytes=IN_FLIGHT, limiter=self._limiter)
        self._open.enter_context(self._uploads)
        self._adopt()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._open.__exit__(kind, error, None)

    def _adopt(self) -> None:
        """Packs that a killed backup of ours uploaded, and nobody knows: they need not be sent again."""
        with self._cache.left() as left:
            known, (bad, _) = self._known.pack_ids(), self._cache.damage()
            for pack, entries in left:
                if pack not in known and pack not in bad and self._whole(pack, entries):
                    known.add(pack)
                    self._keep(pack, entries)

    def _whole(self, pack: bytes, entries: Iterable[Entry]) -> bool:
        try:
            size = self._store.size(Kind.DATA, pack.hex())
        except errors.ObjectMissing:
            return False  # pruned meanwhile
        return size > max((entry.offset + entry.length for entry in entries), default=size)

    # -- blobs -------------------------------------------------------------------------------

    def put(self, kind: Blob, plain: Buffer, id: bytes, *, durable: Callable[[], None] | None = None) -> int:
        """Store a blob unless it is known; gives the bytes that it takes (0: it was known).

        `durable` is called as soon as the blob can be read from the repository; never for one that
        another thread is just storing.
        """
        with self._lock:
            claimed = (id, kind) in self._claimed
            known = not claimed and self._known.contains(id, kind)
            if not claimed and not known:
                self._claimed.add((id, kind))
        if known and durable is not None:
            durable()
        if claimed or known:
            return 0
        encoded = blobs.encode(self._key, plain, kind, level=self._level, id=id)
        with self._lock:
            builder = self._builders[kind]
            builder.add(encoded)
            if durable is not None:
                self._told[kind].append(durable)
            full = builder.size >= PACK_SIZE
            told = self._renew(kind) if full else []
        if full:
            self._send(builder, told)
        return len(encoded.sealed)

    def _renew(self, kind: Blob) -> list[Callable[[], None]]:
        self._builders[kind] = PackBuilder(self._key, kind)
        told, self._told[kind] = self._told[kind], []
        return told

    def _send(self, builder: PackBuilder, told: list[Callable[[], None]]) -> None:
        pack = builder.finish()
        self._uploads.submit(Kind.DATA, pack.name, pack.data, partial(self._sent, pack, told))

    def _sent(self, pack: Pack, told: list[Callable[[], None]]) -> None:
        """The pack is durable; in the thread that uploaded it."""
        self._keep(pack.id, pack.entries)
        for durable in told:
            durable()

    def _keep(self, pack: bytes, entries: tuple[Entry, ...]) -> None:
        self._journal.add(pack, entries)
        self._known.add(pack, entries)
        with self._lock:
            self._claimed.difference_update((entry.id, entry.kind) for entry in entries)
            self._unindexed.append((pack, entries))
            self._packs.add(pack)
            due = sum(len(some) for _, some in self._unindexed) >= INDEX_BLOBS
        if due and self._guarded():
            self.finish()

    # -- the end -----------------------------------------------------------------------------

    def upload(self) -> None:
        """Make all that was put durable."""
        for kind in Blob:
            with self._lock:
                builder = self._builders[kind]
                told = self._renew(kind) if builder.count else []
            if builder.count:
                self._send(builder, told)
        self._uploads.flush()

    def stop(self, reason: BaseException) -> None:
        """Whoever puts or uploads now, or waits there, gets `reason` as an error."""
        self._uploads.fail(reason)

    def finish(self) -> None:
        """Put what is durable, and not in an index file yet, into one."""
        with self._lock:
            batch, self._unindexed = self._unindexed, []
        while batch:
            # As much as is due at once; more gathers only while nobody guards us.
            some, count = [], 0
            while batch and (count := count + len(batch[-1][1])) <= max(INDEX_BLOBS, len(batch[-1][1])):
                some.append(batch.pop())
            name, data = unpacked.seal_file(self._key, index.encode(some), compress=self._compress)
            self._store.write(Kind.INDEX, name, data)

    def packs(self) -> frozenset[bytes]:
        """The packs that this run made or adopted."""
        with self._lock:
            return frozenset(self._packs)

    def committed(self) -> None:
        """What was put is in an index, and a restore point needs it."""
        self._journal.done()
