"""Errors: each has its code, its sentence and hint with its facts, and a line in the docs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import string
import typing
from pathlib import Path

import pytest

from pullback import errors
from pullback.cli import exitcodes
from pullback.errors import Exit, PullbackError

PAGE = Path(__file__).parents[2] / "docs" / "exit-codes.md"
EVERY = errors.catalogue()
_SAMPLES = {str: "words", int: 7, float: 2.5}


def sample(kind: type[PullbackError]) -> PullbackError:
    """An error of that class, with facts of the right types."""
    types = typing.get_type_hints(kind)
    return kind(**{field.name: _SAMPLES[types[field.name]] for field in dataclasses.fields(kind)})


def names(template: str) -> set[str]:
    """The facts that a template shows."""
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def test_the_page_in_the_docs_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == exitcodes.page(), "run `make docs`"


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in EVERY]
    assert len(set(codes)) == len(codes)


def test_the_catalogue_has_every_class_of_the_module() -> None:
    found = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, PullbackError)}
    assert found == set(EVERY)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_an_error_says_its_facts(kind: type[PullbackError]) -> None:
    assert dataclasses.is_dataclass(kind)
    assert "__init__" in vars(kind), "decorate it with @dataclass"
    error = sample(kind)
    facts = {field.name for field in dataclasses.fields(kind)}
    shown = names(kind.sentence) | names(kind.remedy or "")
    assert shown <= facts
    assert facts - shown <= {"error_class", "errno"}, "a fact that nobody is told"
    assert str(error)
    assert error.hint is None or error.hint
    assert str(error).endswith((".", "words")), "a sentence ends with a full stop"


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_an_error_survives_copying(kind: type[PullbackError]) -> None:
    error = sample(kind)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert twin.facts() == error.facts()


def test_exit_codes_have_a_meaning_and_are_used() -> None:
    assert all(code.meaning for code in Exit)
    used = {kind.exit_code for kind in EVERY}
    # These two are no errors.
    assert set(Exit) - used == {Exit.DONE, Exit.WARNED}


def test_a_problem_of_usage_needs_no_full_stop() -> None:
    assert str(errors.UsageError(problem="'x' is no size")) == "'x' is no size."


def test_every_mishap_stands_once() -> None:
    listed = [mishap.what for mishaps in exitcodes.MISHAPS.values() for mishap in mishaps]
    assert len(set(listed)) == len(listed)
