"""The rails in numbers: sizes, docstrings, and no mocks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pullback

SOURCE = Path(pullback.__file__).parent
TESTS = Path(__file__).parents[1]
LONGEST_MODULE = 800
LONGEST_FUNCTION = 60
#: "module" or "module:function" -> why it may be longer.
EXCEPTIONS: dict[str, str] = {}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def complaints(path: Path, *, documented: bool) -> list[str]:
    """What is wrong with a file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = [*_too_long(path.name, text, tree), *_mocks(path.name, tree)]
    if documented:
        found += [f"{path.name}: {name} has no docstring" for name in _undocumented(tree)]
    return [line for line in found if line.split(" ")[0].rstrip(":") not in EXCEPTIONS]


def _too_long(name: str, text: str, tree: ast.Module) -> Iterator[str]:
    lines = len(text.splitlines())
    if lines > LONGEST_MODULE:
        yield f"{name}: {lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield f"{name}:{node.name} {length} lines"


def _mocks(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        base = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if any("mock" in part.split(".") for part in (base, *imported)):
            yield f"{name}: imports a mock"
        if isinstance(node, ast.arg) and node.arg == "mocker":
            yield f"{name}: uses mocker"


def _undocumented(tree: ast.Module) -> Iterator[str]:
    """Public names without a docstring. What is in a private class needs none; a test's name is a sentence."""
    if ast.get_docstring(tree) is None and tree.body:
        yield "the module"
    yield from _undocumented_in(tree.body, "")


def _undocumented_in(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith(("_", "test_")):
            continue
        if ast.get_docstring(node) is None:
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _undocumented_in(node.body, f"{prefix}{node.name}.")


def test_the_package_keeps_to_the_rails() -> None:
    assert [line for path in sorted(SOURCE.rglob("*.py")) for line in complaints(path, documented=True)] == []


def test_the_tests_keep_to_the_rails() -> None:
    assert [line for path in sorted(TESTS.rglob("*.py")) for line in complaints(path, documented=False)] == []


def test_every_exception_is_needed() -> None:
    names = {path.name for path in (*SOURCE.rglob("*.py"), *TESTS.rglob("*.py"))}
    assert {entry.split(":")[0] for entry in EXCEPTIONS} <= names


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ('"""D."""\n' + "x = 1\n" * 800, ["fake.py: 801 lines"]),
        ('"""D."""\ndef _f():\n' + "    x = 1\n" * 60, ["fake.py:_f 61 lines"]),
        ("x = 1\n", ["fake.py: the module has no docstring"]),
        ('"""D."""\nclass A:\n    """D."""\n    def f(self): pass\n', ["fake.py: A.f has no docstring"]),
        ('"""D."""\nclass _A:\n    def f(self): pass\n', []),
        ('"""D."""\nfrom unittest import mock\n', ["fake.py: imports a mock"]),
        ('"""D."""\nimport unittest.mock\n', ["fake.py: imports a mock"]),
        ('"""D."""\ndef test_it(mocker): pass\n', ["fake.py: uses mocker"]),
    ],
)
def test_a_violation_is_seen(tmp_path: Path, text: str, seen: list[str]) -> None:
    fake = tmp_path / "fake.py"
    fake.write_text(text)
    assert sorted(complaints(fake, documented=True)) == seen
