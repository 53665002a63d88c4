"""The cancel token, and the progress that says nothing."""

from __future__ import annotations

import threading

import pytest

from pullback.progress import Cancel, Silent


def test_a_token_that_nobody_cancelled_lets_everybody_go_on() -> None:
    token = Cancel()
    token.check()
    assert not token.cancelled


def test_the_first_reason_is_kept() -> None:
    token = Cancel()
    token.cancel(ValueError("first"))
    token.cancel(KeyError("second"))
    assert token.cancelled
    for _ in range(2):
        with pytest.raises(ValueError, match="first"):
            token.check()


def test_every_thread_gets_the_same_reason() -> None:
    token = Cancel()
    seen: list[str] = []
    gate = threading.Barrier(8)

    def work(number: int) -> None:
        gate.wait(10)
        token.cancel(ValueError(str(number)))
        try:
            token.check()
        except ValueError as error:
            seen.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(seen) == 8
    assert len(set(seen)) == 1


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    silent = Silent()
    silent.start("vda", 10)
    silent.advance("vda", 5)
    silent.note("a sentence")
    silent.finish("vda")
    assert capsys.readouterr() == ("", "")
