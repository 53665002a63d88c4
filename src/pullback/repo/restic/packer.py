"""From plain chunks to durable packs and index files.

    put ──known?──► dropped
         └────────► compressed ─► sealed into its place in a pack (16 MiB) ─► uploads ─► durable
                                                                     ─► journal, index in memory
    upload: the packs that are not full      finish: the index file

Called by many threads; hashing, compressing and sealing happen in theirs. So a chunk waits for
nobody unless more is under way than `Uploads` allows. A pack is sent by the thread that fills its
last place. Its memory is used again for another one when it is durable.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from pullback import errors
from pullback.repo.restic import blobs, crypto, index, unpacked
from pullback.repo.restic.cache import Cache
from pullback.repo.restic.crypto import Buffer, Key
from pullback.repo.restic.lookup import Index
from pullback.repo.restic.packs import PackBuilder
from pullback.repo.restic.types import OVERHEAD, Blob, Entry
from pullback.repo.store import Kind, Store
from pullback.repo.store.limit import Limiter
from pullback.repo.store.uploads import Uploads
from pullback.units import KiB, MiB

#: Bytes of a pack before it is closed (restic's own default).
PACK_SIZE = 16 * MiB
#: Blobs that one index file holds at most (restic's own limit).
INDEX_BLOBS = 50_000
#: Bytes of packs under way at a time.
IN_FLIGHT = 96 * MiB
#: Bytes of a pack beyond `PACK_SIZE` and its last blob: what its header grows by with that.
_SPARE = 4 * KiB


@dataclass(slots=True)
class _Filling:
    """A pack that is being filled. Guarded by the packer's lock, but for what lies in its places."""

    builder: PackBuilder
    memory: mmap.mmap
    told: list[Callable[[], None]] = field(default_factory=list)
    #: Places that were reserved, and are not filled yet.
    open: int = 0
    #: No more places are given.
    full: bool = False


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
        self._filling: dict[Blob, _Filling] = {}
        #: Blobs that are being sealed or sent on, and who waits for them.
        self._busy = 0
        self._idle = threading.Condition(self._lock)
        #: Memory of packs that are through.
        self._free: list[mmap.mmap] = []
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
        content, raw_length = blobs.packed(plain, self._level)
        with self._lock:
            self._busy += 1
        try:
            self._store_blob(kind, id, content, raw_length, durable)
        except BaseException as error:
            self.stop(error)  # its place in a pack is not filled: no pack may be waited for
            raise
        finally:
            with self._lock:
                self._busy -= 1
                self._idle.notify_all()
        return len(content) + OVERHEAD

    def _store_blob(
        self, kind: Blob, id: bytes, content: Buffer, raw_length: int, durable: Callable[[], None] | None
    ) -> None:
        length = len(content) + OVERHEAD
        with self._lock:
            done = self._make_room(kind, length)
            filling = self._filling[kind]
            place = filling.builder.reserve(id, length, raw_length)
            filling.open += 1
            if durable is not None:
                filling.told.append(durable)
            if filling.builder.size >= PACK_SIZE:
                done += self._shut(kind)
        with place:
            crypto.seal_into(self._key, content, place)
        with self._lock:
            filling.open -= 1
            if filling.full and not filling.open:
                done.append(filling)
        for one in done:
            self._send(one)

    def _make_room(self, kind: Blob, length: int) -> list[_Filling]:
        """A pack with room for a sealed blob of so many bytes; gives the one before if it can be sent."""
        filling, done = self._filling.get(kind), []
        if filling is not None and not filling.builder.fits(length):
            done = self._shut(kind)
        if kind not in self._filling:
            memory = self._memory(length)
            self._filling[kind] = _Filling(PackBuilder(self._key, kind, memory), memory)
        return done

    def _memory(self, length: int) -> mmap.mmap:
        """For a pack of blobs of about so many bytes."""
        # Chunks have 1 MiB or a multiple by two; what is smaller fits in as well.
        largest = max(MiB, 1 << (length - OVERHEAD - 1).bit_length()) + OVERHEAD
        size = PACK_SIZE + largest + _SPARE
        for number, free in enumerate(self._free):
            if len(free) >= size:
                return self._free.pop(number)
        self._free.clear()  # too small now, and hardly needed again
        return mmap.mmap(-1, size)  # whole pages, as direct writing needs it (`store.local`)

    def _shut(self, kind: Blob) -> list[_Filling]:
        """No more for the pack; gives it if all its places are filled."""
        filling = self._filling.pop(kind)
        filling.full = True
        return [] if filling.open else [filling]

    def _send(self, filling: _Filling) -> None:
        pack = filling.builder.finish()
        self._uploads.submit(
            Kind.DATA, pack.name, pack.data, partial(self._sent, pack.id, pack.entries, filling.told, filling.memory)
        )

    def _sent(self, pack: bytes, entries: tuple[Entry, ...], told: list[Callable[[], None]], memory: mmap.mmap) -> None:
        """The pack is durable; in the thread that uploaded it."""
        self._keep(pack, entries)
        with self._lock:
            self._free.append(memory)
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
        with self._lock:
            done = [filling for kind in list(self._filling) for filling in self._shut(kind)]
        for filling in done:
            self._send(filling)
        with self._lock:
            self._idle.wait_for(lambda: not self._busy)
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
