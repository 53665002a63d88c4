"""Decoded blocks of disks, kept by their hashes: bounded in bytes, each loaded once however many ask.

    absent ── claim ──► loading ── fill ──► ready ── (the longest unused, when there are too many) ──► absent
                           └────── fail ──► absent, and all who wait for it hear why

A block that somebody copies from is held, and stays. The buffers of those that go are used again:
new memory of 1 MiB costs a quarter of what decoding into it does.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from pullback import errors

Content = bytes | bytearray
#: Buffers kept for use again, at most.
_SPARE = 8


class Block:
    """A block of some disk. Who holds it may read `ready`, `error` and `content`; all else belongs to `Blocks`."""

    __slots__ = ("content", "error", "holders", "key", "ready", "waiting")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.content: Content = b""
        self.error: errors.PullbackError | None = None
        self.ready = False
        self.holders = 0
        #: Who wants to hear when it is there.
        self.waiting: list[Callable[[], None]] = []


class Blocks:
    """The cache. All methods may be called by any thread."""

    def __init__(self, limit: int) -> None:
        """Keep `limit` bytes; somewhat more while many blocks are held at once."""
        self.limit = limit
        self._lock = threading.Lock()
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        self._bytes = 0
        self._spare: list[bytearray] = []

    @property
    def kept(self) -> int:
        """Bytes of content."""
        return self._bytes

    def has(self, key: bytes) -> bool:
        """Is it there, or being loaded? It may be gone a moment later."""
        return key in self._blocks

    def claim(self, keys: Sequence[bytes]) -> list[Block]:
        """Blocks for those keys that are absent: whoever claims a block must `fill` it, or `fail` it."""
        with self._lock:
            claimed = []
            for key in keys:
                if key not in self._blocks:
                    block = self._blocks[key] = Block(key)
                    claimed.append(block)
            return claimed

    def hold(self, key: bytes, ready: Callable[[], None]) -> tuple[Block, bool] | None:
        """The block, which stays until it is let go of with `release`, and whether it is there; None: it is absent.

        If it is being loaded, `ready` is called as soon as it is there, or has failed: once, in some thread,
        which it must not keep.
        """
        with self._lock:
            block = self._blocks.get(key)
            if block is None:
                return None
            block.holders += 1
            if block.ready:
                self._blocks.move_to_end(key)
            else:
                block.waiting.append(ready)
            return block, block.ready

    def release(self, block: Block) -> None:
        """Somebody has what he wanted of it."""
        with self._lock:
            block.holders -= 1
            if self._bytes > self.limit:
                self._shrink()

    def buffer(self, size: int) -> bytearray:
        """A buffer of `size` bytes to load a block into; anything may be in it."""
        with self._lock:
            for number, spare in enumerate(self._spare):
                if len(spare) == size:
                    return self._spare.pop(number)
        return bytearray(size)

    def fill(self, block: Block, content: Content) -> None:
        """The block is loaded. `content` is the cache's from now on."""
        with self._lock:
            block.content = content
            self._bytes += len(content)
            waiting = self._settle(block)
            self._shrink()
        for ready in waiting:
            ready()

    def fail(self, block: Block, error: errors.PullbackError) -> None:
        """The block cannot be loaded; whoever asks for it later tries again."""
        with self._lock:
            block.error = error
            del self._blocks[block.key]
            waiting = self._settle(block)
        for ready in waiting:
            ready()

    def _settle(self, block: Block) -> list[Callable[[], None]]:
        block.ready = True
        waiting, block.waiting = block.waiting, []
        return waiting

    def _shrink(self) -> None:
        """Let go of the longest unused, but not of what is held or being loaded."""
        if self._bytes <= self.limit:
            return
        going, left = [], self._bytes
        for block in self._blocks.values():
            if block.ready and not block.holders:
                going.append(block)
                left -= len(block.content)
                if left <= self.limit:
                    break
        for block in going:
            del self._blocks[block.key]
            if isinstance(block.content, bytearray) and len(self._spare) < _SPARE:
                self._spare.append(block.content)
        self._bytes = left
