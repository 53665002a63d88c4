"""docs/coverage.md names tests that are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "coverage.md").read_text(encoding="utf-8")
_ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| (yes|in part|no) \| ([^|]+) \|$", re.MULTILINE)
_NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


@cache
def functions(file: str) -> frozenset[str]:
    """Names of the tests in a file below tests/."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_each_test_that_is_named_is_there() -> None:
    for file, name in _NAMED.findall(PAGE):
        assert name.startswith("test_"), name
        assert (TESTS / file).exists(), file
        assert name in functions(file), f"{file}::{name}"


def test_each_capability_stands_once_and_has_a_test_or_a_reason() -> None:
    rows = _ROW.findall(PAGE)
    assert [int(number) for number, *_ in rows] == list(range(1, 45))
    assert len(rows) == len(re.findall(r"^\| \d", PAGE, re.MULTILINE))
    for number, _, state, shown in rows:
        words = _NAMED.sub("", shown).strip(" ,.")
        assert _NAMED.search(shown) or state == "no", number
        assert words or state == "yes", f"{number}: what is missing?"
