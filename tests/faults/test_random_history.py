"""Random histories of a machine, running and off: every answer is what a model of it says, whatever happened before.

The steps are in `historian` and `fates`, the model in `chronicle`. Each rule draws one number, and is random by it:
so a history of fifty steps fits in what Hypothesis draws at most, and a failure is replayed by its numbers.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fates import Fates
from kit import boxes
from lots import Lots
from pullback.engine import scratch
from pullback.units import GiB, MiB

#: Steps, and checks, of all histories of this process.
MIX: Counter[str] = Counter()
#: Never 0: Hypothesis begins with the simplest history, which would be one step again and again.
NUMBER = st.integers(0, 2**32 - 1).filter(bool)
Machine = type[RuleBasedStateMachine]


class RandomHistory(RuleBasedStateMachine):
    """A machine's life."""

    #: What happens to it.
    lots: type[Fates] = Fates

    def __init__(self) -> None:
        super().__init__()
        self._held = ExitStack()
        memory = Path("/dev/shm")
        place = str(memory) if memory.is_dir() and os.statvfs(memory).f_bavail * 4096 > 2 * GiB else None
        directory = self._held.enter_context(tempfile.TemporaryDirectory(prefix="pb-", dir=place))
        self.fates = self.lots(self._held.enter_context(boxes(Path(directory))), MIX)
        self.log: list[str] = []
        self._broken = False

    def _step(self, name: str, step: Callable[[random.Random], None], number: int) -> None:
        self.fates.settle()
        self.log.append(f"{name}({number})")
        MIX[f"step: {name}"] += 1
        rolls = random.Random(number)
        try:
            if self.fates.running and name != "write" and rolls.random() < 0.6:
                self.fates.write(rolls)
            step(rolls)
        except BaseException as error:
            self._failed(error)
            raise

    def _failed(self, error: BaseException) -> None:
        """Said at once: what hangs on time may go another way when Hypothesis tries it again."""
        self._broken = True
        error.add_note("history: " + " ".join(self.log))
        traceback.print_exception(error)

    @rule(number=NUMBER)
    def write(self, number: int) -> None:
        self._step("write", self.fates.write, number)

    @rule(number=NUMBER)
    def write_more(self, number: int) -> None:
        self._step("write", self.fates.write, number)

    @precondition(lambda self: len(self.fates.past.checkpoints) < 8)
    @rule(number=NUMBER)
    def checkpoint(self, number: int) -> None:
        self._step("checkpoint", self.fates.checkpoint, number)

    @precondition(lambda self: self.fates.past.checkpoints)
    @rule(number=NUMBER)
    def delete_checkpoint(self, number: int) -> None:
        self._step("delete checkpoint", self.fates.delete_checkpoint, number)

    @precondition(lambda self: self.fates.past.checkpoints)
    @rule(number=NUMBER)
    def redefine(self, number: int) -> None:
        self._step("redefine", self.fates.redefine, number)

    @precondition(lambda self: len(self.fates.snapshots) < 4)
    @rule(number=NUMBER)
    def snapshot(self, number: int) -> None:
        self._step("snapshot", self.fates.snapshot, number)

    @precondition(lambda self: self.fates.snapshots and len(self.fates.views) < 8)
    @rule(number=NUMBER)
    def export(self, number: int) -> None:
        self._step("export", self.fates.export, number)

    @precondition(lambda self: len(self.fates.views) < 8)
    @rule(number=NUMBER)
    def export_disk(self, number: int) -> None:
        self._step("export disk", self.fates.export_disk, number)

    @precondition(
        lambda self: any(not v.instant or v.instant in self.fates.snapshots for v in self.fates.views.values())
    )
    @rule(number=NUMBER)
    def stop_exports(self, number: int) -> None:
        self._step("stop exports", self.fates.stop_exports, number)

    @precondition(lambda self: self.fates.snapshots)
    @rule(number=NUMBER)
    def delete_snapshot(self, number: int) -> None:
        self._step("delete snapshot", self.fates.delete_snapshot, number)

    @precondition(lambda self: self.fates.job is None)
    @rule(number=NUMBER)
    def pull(self, number: int) -> None:
        self._step("pull", self.fates.pull, number)

    @precondition(lambda self: self.fates.job is None)
    @rule(number=NUMBER)
    def push(self, number: int) -> None:
        self._step("push", self.fates.push, number)

    @precondition(lambda self: self.fates.job is not None)
    @rule(number=NUMBER)
    def finish_job(self, number: int) -> None:
        self.fates.settle()
        if self.fates.job is not None:
            self._step("finish job", self.fates.finish_job, number)

    @rule(number=NUMBER)
    def backup(self, number: int) -> None:
        self._step("backup", self.fates.backup, number)

    @precondition(lambda self: self.fates.points)
    @rule(number=NUMBER)
    def old_point(self, number: int) -> None:
        self._step("old point", self.fates.old_point, number)

    @rule(number=NUMBER)
    def power(self, number: int) -> None:
        self._step("power", self.fates.power, number)

    @precondition(lambda self: not self.fates.running)
    @rule(number=NUMBER)
    def reconnect(self, number: int) -> None:
        self._step("reconnect", self.fates.reconnect, number)

    @precondition(lambda self: self.fates.running)
    @rule(number=NUMBER)
    def kill(self, number: int) -> None:
        self._step("kill QEMU", self.fates.kill, number)

    @rule(number=NUMBER)
    def die(self, number: int) -> None:
        self._step("die", self.fates.die, number)

    @precondition(lambda self: self.fates.running and not (self.fates.job or self.fates.snapshots or self.fates.views))
    @rule(number=NUMBER)
    def resize(self, number: int) -> None:
        self._step("resize", self.fates.resize, number)

    @invariant()
    def every_export_shows_its_instant(self) -> None:
        """Read after each step."""
        try:
            self.fates.settle()
            self.fates.read_views()
        except BaseException as error:
            self._failed(error)
            raise

    def teardown(self) -> None:
        """Nothing is left of it."""
        with self._held:
            if not self._broken:
                try:
                    self.fates.settle()
                    self.fates.close()
                except BaseException as error:
                    self._failed(error)
                    raise
                finally:
                    self.fates.let_go()
            elif self.fates._off is not None:
                self.fates._off.close()


class ResticHistory(RandomHistory):
    """A life with a repository in restic's format."""

    lots = Lots
    fates: Lots

    @precondition(lambda self: self.fates.points)
    @rule(number=NUMBER)
    def forget(self, number: int) -> None:
        self._step("forget", self.fates.forget, number)

    @rule(number=NUMBER)
    def lose_cache(self, number: int) -> None:
        self._step("lose cache", self.fates.lose_cache, number)

    @rule(number=NUMBER)
    def neighbour(self, number: int) -> None:
        self._step("backup beside another machine", self.fates.neighbour, number)

    @rule(number=NUMBER)
    def pruned_under(self, number: int) -> None:
        self._step("backup under which is pruned", self.fates.pruned_under, number)

    @rule(number=NUMBER)
    def killed(self, number: int) -> None:
        self._step("kill a backup", self.fates.killed, number)

    @rule(number=NUMBER)
    def backup_again(self, number: int) -> None:
        self._step("backup", self.fates.backup, number)


def live(seed: int, *, histories: int, steps: int, kind: type[RandomHistory] = RandomHistory) -> None:
    """So many machines' lives. The same seed gives the same steps."""

    class Seeded(kind):  # type: ignore[misc,valid-type]
        pass

    chosen = settings(
        max_examples=histories,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink) if "PULLBACK_HISTORY_SHRINK" in os.environ else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    run_state_machine_as_test(hypothesis.seed(seed)(Seeded), settings=chosen)


def steps_done() -> int:
    """Of all histories of this process."""
    return sum(count for what, count in MIX.items() if what.startswith("step: "))


def told() -> str:
    """The mix, as a table."""
    rows = [
        f"{count:7}  {what}" for what, count in sorted(MIX.items(), key=lambda row: (row[0].split(":")[0], -row[1]))
    ]
    return "\n".join([f"{steps_done()} steps of random histories (a failing one is the last)", *rows])


@pytest.fixture(autouse=True)
def _little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_MINIMUM_FREE", 16 * MiB)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [RandomHistory, ResticHistory])
def test_every_answer_in_a_random_history_is_what_the_model_says(kind: type[RandomHistory], seed: int) -> None:
    live(seed, histories=1, steps=12, kind=kind)


@pytest.mark.slow
@pytest.mark.timeout(24 * 3600)
def test_every_answer_in_many_random_histories_is_what_the_model_says(capsys: pytest.CaptureFixture[str]) -> None:
    """PULLBACK_HISTORY_STEPS steps, or for PULLBACK_FUZZ_SECONDS, from PULLBACK_HISTORY_SEED on."""
    enough = int(os.environ.get("PULLBACK_HISTORY_STEPS", "100000"))
    deadline = time.monotonic() + float(os.environ.get("PULLBACK_FUZZ_SECONDS", "120"))
    seed = int(os.environ.get("PULLBACK_HISTORY_SEED", random.SystemRandom().randrange(10**6)))
    try:
        while steps_done() < enough and time.monotonic() < deadline:
            live(seed, histories=1, steps=50, kind=ResticHistory if seed % 2 else RandomHistory)
            seed += 1
    finally:
        with capsys.disabled():
            print(f"\n{told()}\nlast seed {seed}")
