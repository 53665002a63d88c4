"""A limit of bytes a second."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.repo.store.limit import BURST_SECONDS, Limiter


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(
    rate=st.floats(1, 1e9),
    steps=st.lists(st.tuples(st.integers(0, 10**8), st.floats(0, 10)), min_size=1, max_size=30),
)
def test_no_more_than_the_rate_passes_in_any_time(rate: float, steps: list[tuple[int, float]]) -> None:
    clock = Clock()
    limiter = Limiter(rate, clock=clock)
    passed = []
    for count, pause in steps:
        clock.now += limiter.book(count)
        passed.append((clock.now, count))
        clock.now += pause
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            # The last take may pass at once: its time comes after it.
            volume = sum(count for _, count in passed[first:last])
            seconds = passed[last][0] - passed[first][0]
            assert volume <= rate * (seconds + BURST_SECONDS) * (1 + 1e-6) + 1


def test_who_is_slower_than_the_rate_never_waits() -> None:
    clock = Clock()
    limiter = Limiter(100, clock=clock)
    for _ in range(50):
        assert limiter.book(90) == 0
        clock.now += 1


def test_the_rate_is_used_up_by_who_wants_more() -> None:
    clock = Clock()
    limiter = Limiter(1000, clock=clock)
    for _ in range(100):
        clock.now += limiter.book(500)
    assert clock.now - 1000 == pytest.approx(49.5, abs=0.01)  # 100 times 0.5 s, the last not waited for


def test_threads_share_the_rate() -> None:
    limiter, stop = Limiter(400_000), threading.Event()
    start = time.monotonic()
    threads = [threading.Thread(target=lambda: [limiter.take(1000, stop) for _ in range(35)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.3 <= time.monotonic() - start < 2  # 140 000 bytes


def test_stopping_ends_a_wait_at_once() -> None:
    limiter, stop = Limiter(1), threading.Event()
    assert limiter.take(10_000, stop)
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(limiter.take(1, stop)))
    waiting.start()
    stop.set()
    waiting.join(5)
    assert answers == [False]
    assert not limiter.take(0, stop)


@pytest.mark.parametrize("rate", [0, -1])
def test_there_is_no_rate_of_nothing(rate: float) -> None:
    with pytest.raises(ValueError):
        Limiter(rate)
