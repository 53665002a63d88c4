"""The command line's own words: help, version, and the reference in the docs."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import pullback
from pullback.cli import documents, reference
from pullback.cli.documents import Field, Kind

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = [
    "init",
    "backup",
    "list",
    "show",
    "restore",
    "rollback",
    "boot",
    "serve",
    "mount",
    "files",
    "prove",
    "verify",
    "diff",
    "forget",
    "copy",
    "unlock",
    "doctor",
    "info",
    "recover",
    "untrack",
    "events",
    "completion",
    "key list",
    "key add",
    "key remove",
    "key passwd",
    "checkpoint create",
    "checkpoint list",
    "checkpoint info",
    "checkpoint current",
    "checkpoint parent",
    "checkpoint delete",
    "checkpoint redefine",
    "checkpoint changes",
    "snapshot create",
    "snapshot list",
    "snapshot info",
    "snapshot delete",
    "export start",
    "export list",
    "export stop",
    "job begin",
    "job info",
    "job stats",
    "job wait",
    "job end",
    "job abort",
    "job speed",
    "job pause",
    "job resume",
    "overlay create",
    "overlay commit",
]
#: Slow to import, and of no use before a command runs.
HEAVY = {
    "nbd",
    "qemu",
    "rich",
    "lxml",
    "pullback.engine",
    "pullback.repo",
    "pullback.transfer",
    "pullback.flows",
}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line."""
    line = [sys.executable, "-m", "pullback.cli.main", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_the_reference_in_the_docs_is_what_the_command_line_is() -> None:
    assert (DOCS / "commands.md").read_text(encoding="utf-8") == reference.page(), "run `make docs`"


def test_the_commands_are_these() -> None:
    assert list(reference.commands()) == COMMANDS
    assert set(reference.NOTES) == set(documents.RESULTS) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_every_option_that_the_reference_says(command: str) -> None:
    done = run(*command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: pullback {command} ")
    for parameter in reference.parameters(reference.commands()[command]):
        assert all(name in done.stdout for name in ([] if parameter.is_argument else parameter.names))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_sentence(command: str) -> None:
    for parameter in reference.parameters(reference.commands()[command]):
        assert (parameter.info.help or "").endswith("."), parameter.name


def test_options_have_the_same_words_everywhere() -> None:
    seen: dict[str, set[str | None]] = {}
    for callback in reference.commands().values():
        for parameter in reference.parameters(callback):
            if not parameter.is_argument:
                seen.setdefault(parameter.name, set()).add(parameter.info.help)
    assert [name for name, words in seen.items() if len(words) > 1] == []


def test_without_a_command_the_help_is_shown() -> None:
    done = run()
    assert done.returncode == 2
    assert all(command.split()[0] in done.stdout + done.stderr for command in COMMANDS)


def test_an_unknown_command_is_a_usage_error_with_a_suggestion() -> None:
    done = run("bakup")
    assert done.returncode == 2
    assert "backup" in done.stderr


def test_the_version_comes_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("--version")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout == f"pullback {pullback.__version__}\n"
    assert after.ru_utime - before.ru_utime < 0.9  # three times the 0.3 s that it may take on an idle machine


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["backup", "--help"]])
def test_nothing_heavy_is_imported_to_say_a_few_words(words: list[str]) -> None:
    code = f"""
import sys
from pullback.cli import main
sys.argv = ["pullback", *{words!r}]
try:
    main.main()
except SystemExit:
    pass
print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "[]\n"


def names(fields: tuple[Field, ...]) -> list[str]:
    """Names of members, those inside too."""
    return [name for field in fields for name in (field.name, *names(field.inside))]


def test_every_document_is_described_in_words() -> None:
    every = [*documents.COMMON.values(), *(found for results in documents.RESULTS.values() for found in results)]
    for document in every:
        top = [field.name for field in document.fields]
        assert len(set(top)) == len(top)
        assert document.fields[0].name == "type"
        assert all(field.meaning for field in document.fields)
        assert all(bool(field.inside) <= (field.kind in (Kind.OBJECT, Kind.OBJECTS)) for field in document.fields)
