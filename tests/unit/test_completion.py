"""How shells complete a command line: the answers, and bash asking for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.cli import completion, reference
from pullback.cli.completion import DIRECTORIES, FILES, Shell
from pullback.cli.main import app

CONFIG = """
[repositories.main]
url = "/srv/backup"
[machines.web01]
url = "qmp:/run/web01.sock"
[machines.db01]
url = "qmp:/run/db01.sock"
"""


def names(metavar: str) -> Iterable[tuple[str, str]]:
    """What is configured."""
    return {"MACHINE": [("web01", "qmp:/run/web01.sock"), ("db01", "")], "REPO": [("main", "/srv/backup")]}.get(
        metavar, []
    )


def answers(*words: str, shell: Shell = Shell.FISH) -> list[str]:
    """The candidates alone."""
    return [item.word for item in completion.answers(app, words, shell=shell, names=names)]


def test_commands_and_groups_come_first() -> None:
    firsts = {name.split()[0] for name in reference.commands()}
    assert set(answers("")) == firsts
    assert answers("back") == ["backup"]
    assert answers("--v") == ["--version"]


def test_a_group_goes_on_with_its_commands() -> None:
    assert answers("overlay", "") == ["create", "commit"]
    assert answers("overlay", "cr") == ["create"]


def test_a_candidate_says_what_it_is() -> None:
    [item] = completion.answers(app, ["bac"], shell=Shell.ZSH, names=names)
    assert str(item).startswith("backup\tBack up ")


def test_a_machine_is_one_that_is_configured_or_a_path() -> None:
    assert answers("info", "") == ["web01", "db01"]
    assert answers("info", "w") == ["web01"]
    assert answers("checkpoint", "list", "d") == ["db01"]
    assert answers("info", "qmp:/run/x") == answers("info", "x") == [FILES]


def test_a_repository_is_one_that_is_configured_or_a_path() -> None:
    assert answers("list", "-r", "") == answers("list", "--repository", "m") == ["main"]
    assert answers("list", "--repository=") == ["--repository=main"]
    assert answers("list", "-r", "/srv/b") == [FILES]


def test_an_option_with_words_offers_them() -> None:
    assert answers("backup", "web01", "--level", "") == ["auto", "full"]
    assert answers("backup", "web01", "--level=f") == ["--level=full"]
    assert answers("restore", "--format", "q") == ["qcow2"]


def test_options_are_offered_once_unless_they_may_be_repeated() -> None:
    assert "--dry-run" in answers("backup", "web01", "--d")
    assert "--dry-run" not in answers("backup", "web01", "--dry-run", "--d")
    assert "--dry-run" not in answers("backup", "-n", "web01", "--d")
    assert "--disk" in answers("backup", "web01", "--disk", "vda", "--d")


def test_when_all_arguments_are_given_options_follow() -> None:
    assert "--json" in answers("info", "web01", "")
    assert answers("info", "web01", "x") == []


def test_files_and_directories_are_left_to_the_shell() -> None:
    assert answers("restore", "--to", "") == [DIRECTORIES]
    assert answers("checkpoint", "redefine", "web01", "") == [FILES]
    assert answers("backup", "web01", "--agent", "/run/") == [FILES]


def test_behind_two_dashes_nothing_is_an_option() -> None:
    assert answers("info", "--", "w") == ["web01"]
    assert answers("info", "--", "-") == [FILES]


def test_what_bash_has_cut_is_put_together_and_only_the_last_piece_is_answered() -> None:
    assert answers("backup", "web01", "--level", "=", "f", shell=Shell.BASH) == ["full"]
    assert answers("backup", "web01", "--level", "=", shell=Shell.BASH) == ["auto", "full"]
    assert answers("info", "qmp", ":", "/ru", shell=Shell.BASH) == [FILES]
    assert "--json" in answers("info", "qmp", ":", "/run/x", "--j", shell=Shell.BASH)


@given(st.lists(st.text(max_size=6) | st.sampled_from([*" :=-", "--", "--level", "backup", "-r", "list"]), min_size=1))
def test_no_words_make_it_fail(words: list[str]) -> None:
    for shell in Shell:
        assert isinstance(answers(*words, shell=shell), list)


@pytest.mark.parametrize("command", list(reference.commands()))
def test_every_command_can_be_completed(command: str) -> None:
    """With every option of each: a metavar that nobody thought of is at least no failure."""
    assert command.split()[-1] in answers(*command.split())
    for parameter in reference.parameters(reference.commands()[command]):
        if not parameter.is_argument and parameter.value:
            answers(*command.split(), parameter.names[-1], "")
            assert parameter.names[-1] in answers(*command.split(), parameter.names[-1])


def test_a_script_for_each_shell_is_printed_and_asks_with_words_behind_dashes() -> None:
    for shell in Shell:
        done = pullback("completion", shell)
        assert done.stdout == completion.SCRIPTS[shell]
        assert f" completion {shell} -- " in done.stdout


def test_a_configuration_that_cannot_be_used_says_nothing_in_the_middle_of_a_line(tmp_path: Path) -> None:
    done = pullback("completion", "bash", "--", "info", "", PULLBACK_CONFIG=str(tmp_path / "none"))
    assert (done.stdout, done.stderr, done.returncode) == (f"{FILES}\n", "", 0)


def pullback(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line."""
    line = [sys.executable, "-m", "pullback.cli.main", *words]
    env = os.environ | variables
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, env=env)


def test_bash_offers_what_is_configured(tmp_path: Path) -> None:
    """The script itself, in a real bash, on a program called pullback."""
    (tmp_path / "config.toml").write_text(CONFIG)
    command = tmp_path / "pullback"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pullback.cli.main "$@"\n')
    command.chmod(0o755)
    script = f"""
        source <(pullback completion bash)
        complete -p pullback
        COMP_WORDS=(pullback backup w); COMP_CWORD=2; _pullback; echo "${{COMPREPLY[@]}}"
        COMP_WORDS=(pullback backup web01 --level = f); COMP_CWORD=5; _pullback; echo "${{COMPREPLY[@]}}"
        COMP_WORDS=(pullback list -r '' --json); COMP_CWORD=3; _pullback; echo "${{COMPREPLY[@]}}"
        cd {tmp_path}; compopt() {{ echo "compopt $*"; }}
        COMP_WORDS=(pullback list -r ./); COMP_CWORD=3; _pullback; echo "${{#COMPREPLY[@]}}"
    """
    path = f"{tmp_path}:{os.environ['PATH']}"
    variables = os.environ | {"PATH": path, "PULLBACK_CONFIG": str(tmp_path / "config.toml")}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=60, check=False, env=variables
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "complete -F _pullback pullback", "web01", "full", "main", "compopt -o default", "0"
    ]  # fmt: skip
