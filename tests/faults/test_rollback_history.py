"""Rollbacks in random histories: the disk is the point, every checkpoint stays true, and so does what follows.

The steps are those of `test_random_history` (but what lasts on a machine, which hinders a rollback), and the model too.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import boxes
from pullback.engine import scratch
from pullback.units import MiB
from reverting import Reverting, RevertingLots

Step = Callable[[random.Random], None]
MIX: Counter[str] = Counter()


class Life:
    """A machine's life, by a seed."""

    def __init__(self, fates: Reverting, seed: int) -> None:
        self._fates = fates
        self._rolls = random.Random(seed)
        self.log: list[str] = []

    def _possible(self) -> list[tuple[int, Step]]:
        fates = self._fates
        found: list[tuple[int, Step]] = [(6, fates.write), (5, fates.backup), (2, fates.power), (1, fates.die)]
        if len(fates.past.checkpoints) < 8:
            found.append((3, fates.checkpoint))
        if fates.past.checkpoints:
            found += [(2, fates.delete_checkpoint), (1, fates.redefine)]
        if fates.points:
            found += [(8, fates.rollback), (1, fates.old_point)]
        if fates.running:
            found += [(1, fates.kill), (1, fates.resize)]
        if isinstance(fates, RevertingLots):
            found += [(1, fates.lose_cache), (1, fates.killed), *([(1, fates.forget)] if len(fates.points) > 2 else [])]
        return found

    def step(self) -> None:
        """One thing happens."""
        weights, steps = zip(*self._possible(), strict=True)
        [chosen] = self._rolls.choices(steps, weights)
        number = self._rolls.randrange(1, 1 << 32)
        self.log.append(f"{chosen.__name__}({number})")
        MIX[f"step: {chosen.__name__}"] += 1
        rolls = random.Random(number)
        if self._fates.running and rolls.random() < 0.5:
            self._fates.write(rolls)
        chosen(rolls)


def live(place: Path, seed: int, steps: int, kind: type[Reverting]) -> None:
    """So many steps of one machine's life."""
    with boxes(place) as make:
        fates = kind(make, MIX)
        life = Life(fates, seed)
        try:
            for _ in range(steps):
                life.step()
            fates.close()
        except BaseException as error:
            error.add_note(f"seed {seed}: {' '.join(life.log)}")
            raise
        finally:
            fates.let_go()


@pytest.fixture(autouse=True)
def _little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_MINIMUM_FREE", 16 * MiB)


@pytest.mark.parametrize("kind", [Reverting, pytest.param(RevertingLots, marks=pytest.mark.slow)])
def test_a_machine_that_goes_back_now_and_then_stays_true(short_dir: Path, kind: type[Reverting]) -> None:
    before = MIX["step: rollback"]
    live(short_dir, 2, 10, kind)
    assert MIX["step: rollback"] > before


@pytest.mark.slow
@pytest.mark.timeout(24 * 3600)
def test_machines_that_go_back_now_and_then_stay_true(capsys: pytest.CaptureFixture[str]) -> None:
    """For PULLBACK_FUZZ_SECONDS, from PULLBACK_HISTORY_SEED on."""
    deadline = time.monotonic() + float(os.environ.get("PULLBACK_FUZZ_SECONDS", "120"))
    seed = int(os.environ.get("PULLBACK_HISTORY_SEED", random.SystemRandom().randrange(10**6)))
    try:
        while time.monotonic() < deadline:
            with tempfile.TemporaryDirectory(prefix="pb-", dir="/dev/shm") as place:
                live(Path(place), seed, 40, RevertingLots if seed % 2 else Reverting)
            seed += 1
    finally:
        with capsys.disabled():
            print("", *(f"{count:6}  {what}" for what, count in sorted(MIX.items())), f"last seed {seed}", sep="\n")
