"""Reading a served disk: from the cache, else loaded by a few threads, each block once.

    client's thread ── read ──► cache ── absent ──► queue ──► worker: request, decode, prove ──► cache
                                   ▲ waits for just the block that it needs                        │
                                   └───────────────────────────────────────────────────────────────┘

What clients wait for goes before what is only loaded ahead.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from pullback import errors, repo
from pullback.extents import Extent, Mapped
from pullback.serve.ahead import Ahead
from pullback.serve.blocks import Block, Blocks
from pullback.serve.holes import Holes
from pullback.serve.source import Source, is_damage
from pullback.units import MiB

#: Bytes that are loaded ahead of one reader at most.
_DEEPEST = 16 * MiB
#: Bytes of a hash.
_ENTRY = 32
#: Called with the target, what cannot be read, and why.
Lost = Callable[[str, Extent, errors.PullbackError], None]
_Job = Callable[[], None]
_ZEROES = bytes(MiB)


class Workers:
    """Threads that load blocks."""

    def __init__(self, count: int) -> None:
        self._wanted: deque[_Job] = deque()
        self._ahead: deque[_Job] = deque()
        self._ready = threading.Condition(threading.Lock())
        self._ended = False
        self._threads = [threading.Thread(target=self._work, name=f"load-{n}", daemon=True) for n in range(count)]

    def start(self) -> None:
        """Begin; not before a fork."""
        for thread in self._threads:
            thread.start()

    def do(self, job: _Job, *, ahead: bool) -> None:
        """Have it done; what is not `ahead` first."""
        with self._ready:
            (self._ahead if ahead else self._wanted).append(job)
            self._ready.notify()

    def _work(self) -> None:
        while True:
            with self._ready:
                while not (self._wanted or self._ahead):
                    if self._ended:
                        return
                    self._ready.wait()
                job = self._wanted.popleft() if self._wanted else self._ahead.popleft()
            job()

    def close(self) -> None:
        """No more than what is queued; does not wait."""
        with self._ready:
            self._ended = True
            self._ready.notify_all()


class Answer:
    """What a client wants to read, as far as it is there. Its blocks stay until `release`.

    It is made by one thread, while others load blocks.
    """

    __slots__ = ("_blocks", "_calls", "_lock", "_missing", "_parts", "_ready")

    def __init__(self, blocks: Blocks, ready: Callable[[], None]) -> None:
        """`ready` is called once all is there, if `call_when_there` asks for that."""
        self._blocks = blocks
        self._ready = ready
        #: Blocks, and which bytes of each are wanted; None: so many zeroes.
        self._parts: list[tuple[Block | None, int, int]] = []
        self._lock = threading.Lock()
        #: Blocks that were not there when they were added, less those that came since.
        self._missing = 0
        self._calls = False

    def add(self, key: bytes, start: int, end: int) -> bool:
        """Some bytes of a block; False if it is absent."""
        held = self._blocks.hold(key, self._came)
        if held is None:
            return False
        block, there = held
        self._parts.append((block, start, end))
        if not there:
            with self._lock:
                self._missing += 1
        return True

    def add_zeroes(self, length: int) -> None:
        """So many zero bytes."""
        self._parts.append((None, 0, length))

    def _came(self) -> None:
        with self._lock:
            self._missing -= 1
            now = self._calls and self._missing == 0
        if now:
            self._ready()

    def is_there(self) -> bool:
        """Is all that was added there, or has it failed?"""
        with self._lock:
            return self._missing == 0

    def call_when_there(self) -> None:
        """Have `ready` called, once, now or later."""
        with self._lock:
            self._calls = True
            now = self._missing == 0
        if now:
            self._ready()

    @property
    def error(self) -> errors.PullbackError | None:
        """Why a block could not be loaded."""
        return next((block.error for block, _, _ in self._parts if block and block.error), None)

    def parts(self) -> Iterator[memoryview]:
        """The bytes, in order. Valid until `release`."""
        for block, start, end in self._parts:
            if block is not None:
                yield memoryview(block.content)[start:end]
                continue
            for at in range(start, end, len(_ZEROES)):
                yield memoryview(_ZEROES)[: min(end - at, len(_ZEROES))]

    def release(self) -> None:
        """Let go of the blocks; twice is fine."""
        for block, _, _ in self._parts:
            if block is not None:
                self._blocks.release(block)
        self._parts.clear()


class Disk:
    """A disk that is served. Thread-safe."""

    def __init__(self, target: str, source: Source, blocks: Blocks, workers: Workers, lost: Lost) -> None:
        self.target = target
        self.size = source.hashes.size
        self._source = source
        self._hashes = source.hashes
        self._block = source.hashes.block_size
        self._entries = source.hashes.encode()
        last = source.hashes.block(source.hashes.count - 1)
        self._zeroes = {repo.zero_hash(self._block), repo.zero_hash(last.length)}
        #: The block that was asked for last, by whomever.
        self._last = -1
        self._blocks = blocks
        self._workers = workers
        self._lost = lost
        self._holes = Holes(source.hashes)
        # Two readers shall not push out of the cache what was loaded ahead of them.
        deepest = min(_DEEPEST, blocks.limit // 4) // self._block
        self._ahead = Ahead(self._hashes.count, deepest, self._holes.next_data)
        self._lock = threading.Lock()

    @property
    def block_size(self) -> int:
        """Bytes of what is loaded at a time."""
        return self._block

    def map(self, window: Extent) -> Iterator[Mapped]:
        """What of `window` is known to be zero."""
        return self._holes.map(window)

    def ask(self, offset: int, length: int, ready: Callable[[], None]) -> Answer:
        """Begin to read. What is missing is loaded; the answer says what `ready` is for."""
        end = offset + length
        wanted = range(offset // self._block, -(-end // self._block))
        self._want(wanted)
        answer = Answer(self._blocks, ready)
        for index in wanted:
            start = index * self._block
            first, behind = max(start, offset), min(start + self._block, end)
            key = self._key(index)
            if key in self._zeroes:
                answer.add_zeroes(behind - first)
                continue
            while not answer.add(key, first - start, behind - start):
                self._load([index], ahead=False)  # it went before we came to it
        return answer

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `offset`. Raises `EndpointFailed` and errors of stores."""
        turn = threading.Lock()
        turn.acquire()
        answer = self.ask(offset, len(view), turn.release)
        try:
            if not answer.is_there():
                answer.call_when_there()
                turn.acquire()
            if answer.error is not None:
                raise answer.error.with_traceback(None)
            at = 0
            for part in answer.parts():
                view[at : at + len(part)] = part
                at += len(part)
        finally:
            answer.release()

    def _key(self, index: int) -> bytes:
        return self._entries[index * _ENTRY : (index + 1) * _ENTRY]

    # -- loading -----------------------------------------------------------------------------

    def _want(self, wanted: range) -> None:
        if not (len(wanted) == 1 and self._blocks.has(self._key(wanted[0]))):
            self._load(wanted, ahead=False)
        if wanted[-1] == self._last:
            return  # most requests are for the block of the one before
        self._last = wanted[-1]
        with self._lock:
            ahead = [index for block in wanted for index in self._ahead.asked(block)]
        if ahead:
            self._load(ahead, ahead=True)

    def _load(self, indexes: Sequence[int], *, ahead: bool) -> None:
        """Have those loaded that are absent."""
        numbers = {key: index for index in indexes if (key := self._key(index)) not in self._zeroes}
        claimed = {numbers[block.key]: block for block in self._blocks.claim(list(numbers))}
        order = list(claimed)
        for at in range(0, len(order), self._source.together):
            part = {index: claimed[index] for index in order[at : at + self._source.together]}
            self._workers.do(partial(self._run, part), ahead=ahead)

    def _run(self, left: dict[int, Block]) -> None:
        """Load blocks; each is filled or failed in the end, whatever happens."""
        try:
            for load in self._source.loads(list(left), self._blocks.buffer):
                for index, content in load():
                    self._blocks.fill(left.pop(index), content)
        except errors.PullbackError as error:
            self._failed(left, error)
        except Exception as error:  # noqa: BLE001 - whoever waits would wait for ever
            self._fail(left, self._broken(left, f"{type(error).__name__}: {error}"))
        else:
            assert not left, "a source gives what it was asked for, or raises"

    def _failed(self, left: dict[int, Block], error: errors.PullbackError) -> None:
        """One of them is bad, or all cannot be had now."""
        if not is_damage(error) or len(left) == 1:
            self._fail(left, error)
            return
        for index in list(left):
            self._run({index: left.pop(index)})

    def _fail(self, left: dict[int, Block], error: errors.PullbackError) -> None:
        for index, block in left.items():
            self._lost(self.target, self._hashes.block(index), error)
            self._blocks.fail(block, error)
        left.clear()

    def _broken(self, left: dict[int, Block], reason: str) -> errors.PullbackError:
        offset = min(left, default=0) * self._block
        return errors.EndpointFailed(operation="Reading", endpoint=self.target, offset=offset, reason=reason)
