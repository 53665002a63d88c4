"""Which fleecing engine is chosen, and the reason that the user is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pullback import errors
from pullback.engine import fleece, probe
from pullback.engine.capabilities import Capabilities
from pullback.model.backups import Fleecing

MODERN = Capabilities(
    version="7.2.22",
    filter=True,
    classic=True,
    classic_breaks_snapshot=False,
    exports=True,
    fuse=True,
    graph=True,
    defects=probe.Defects(),
)


def choose(
    wanted: Fleecing | None = None,
    capabilities: Capabilities = MODERN,
    *,
    pausable: bool = True,
    flush_seconds: float = 0.0,
    foreign_backup: str | None = None,
) -> tuple[Fleecing, str]:
    """`fleece.choose` on a machine where nothing hinders the filter, unless said."""
    return fleece.choose(
        wanted, capabilities, pausable=pausable, flush_seconds=flush_seconds, foreign_backup=foreign_backup
    )


def test_where_nothing_hinders_it_the_filter_is_taken_because_it_protects_the_guest() -> None:
    engine, reason = choose()
    assert engine is Fleecing.FILTER
    assert "protects" in reason


HINDRANCES = [
    pytest.param({"capabilities": replace(MODERN, filter=False)}, "filter", id="QEMU before 7.1"),
    pytest.param({"capabilities": replace(MODERN, graph=False)}, "filter", id="the graph cannot be seen"),
    pytest.param({"foreign_backup": "theirs"}, "theirs", id="a foreign backup job"),
    pytest.param({"pausable": False}, "state", id="a state that cannot be held"),
    pytest.param({"flush_seconds": fleece.PAUSE_BUDGET * 2}, "500 ms", id="a pause that would be long"),
]


@pytest.mark.parametrize(("hindrance", "word"), HINDRANCES)
def test_what_hinders_the_filter_is_said_and_the_classic_engine_taken(hindrance: dict[str, object], word: str) -> None:
    engine, reason = choose(**hindrance)  # type: ignore[arg-type]
    assert engine is Fleecing.CLASSIC
    assert word in reason


@pytest.mark.parametrize(("hindrance", "word"), HINDRANCES)
def test_a_filter_that_is_asked_for_and_hindered_is_refused_with_the_reason(
    hindrance: dict[str, object], word: str
) -> None:
    with pytest.raises(errors.Unsupported, match=word):
        choose(Fleecing.FILTER, **hindrance)  # type: ignore[arg-type]


def test_the_classic_engine_can_be_asked_for() -> None:
    assert choose(Fleecing.CLASSIC) == (Fleecing.CLASSIC, "as asked for")


def test_a_flush_just_within_the_budget_allows_the_pause() -> None:
    assert choose(flush_seconds=fleece.PAUSE_BUDGET)[0] is Fleecing.FILTER
