"""Where a repository's password comes from."""

from __future__ import annotations

import codecs
import os
import sys
import time
from pathlib import Path

import pytest

from pullback import errors
from pullback.repo import passwords


def find(environ: dict[str, str], answer: str | None = None, timeout: float = 10) -> str:
    """The password for these variables; `answer` is what the person at the prompt types."""
    prompt = None if answer is None else lambda: answer
    return passwords.find({"PATH": os.environ["PATH"], **environ}, repository="REPO", prompt=prompt, timeout=timeout)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("from a file\n")
    return path


def test_without_variables_the_person_is_asked() -> None:
    assert find({}, "typed ") == "typed "


@pytest.mark.parametrize("answer", [None, ""])
def test_without_a_password_there_is_a_clear_error(answer: str | None) -> None:
    with pytest.raises(errors.NoPassword, match="REPO") as caught:
        find({}, answer)
    assert "PULLBACK_PASSWORD_FILE" in (caught.value.hint or "")


def test_ours_win_over_those_of_restic_and_its_file_over_its_variable(file: Path) -> None:
    environ = {"RESTIC_PASSWORD": "plain"}
    assert find(environ, "typed") == "plain"
    environ["RESTIC_PASSWORD_FILE"] = str(file)
    assert find(environ) == "from a file"
    environ["PULLBACK_PASSWORD_COMMAND"] = "echo ours"
    assert find(environ) == "ours"
    del environ["PULLBACK_PASSWORD_COMMAND"], environ["RESTIC_PASSWORD_FILE"]
    environ["RESTIC_PASSWORD_COMMAND"] = "echo theirs"
    assert find(environ) == "theirs"
    environ["PULLBACK_PASSWORD_FILE"] = str(file)
    assert find(environ) == "from a file"


@pytest.mark.parametrize("whose", ["PULLBACK", "RESTIC"])
def test_a_file_and_a_command_at_once_are_refused(whose: str, file: Path) -> None:
    with pytest.raises(errors.UsageError, match="both set"):
        find({f"{whose}_PASSWORD_FILE": str(file), f"{whose}_PASSWORD_COMMAND": "echo x"})


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"plain", "plain"),
        (b" \t two words \r\n\n", "two words"),
        (b"two\nlines\n", "two\nlines"),
        ("ünï\n".encode(), "ünï"),
        (codecs.BOM_UTF8 + b"marked\n", "marked"),
        ("wide".encode("utf-16"), "wide"),
    ],
)
def test_the_text_of_a_file_is_the_password_as_for_restic(content: bytes, password: str, file: Path) -> None:
    file.write_bytes(content)
    assert find({"PULLBACK_PASSWORD_FILE": str(file)}) == password


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe\xff", "no text"), (b"x" * 70_000, "long")],
)
def test_a_file_without_a_password_is_told_without_its_content(content: bytes, problem: str, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(errors.PasswordUnavailable, match=problem) as caught:
        find({"RESTIC_PASSWORD_FILE": str(file)})
    assert "RESTIC_PASSWORD_FILE" in str(caught.value)
    assert "xxx" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.PasswordUnavailable, match="No such file"):
        find({"PULLBACK_PASSWORD_FILE": str(tmp_path / "none")})


def test_a_password_may_come_through_a_descriptor() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"piped\n")
    os.close(writing)
    try:
        assert find({"PULLBACK_PASSWORD_FILE": f"/dev/fd/{reading}"}) == "piped"
    finally:
        os.close(reading)


def test_a_command_is_split_like_a_shell_does_and_has_our_variables() -> None:
    words = f"""{sys.executable} -c 'import os; print(" " + os.environ["HINT"] + "  x")'"""
    assert find({"PULLBACK_PASSWORD_COMMAND": words, "HINT": "a"}) == "a  x"


def test_what_a_command_says_of_its_trouble_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.PasswordUnavailable, match="ended with status 3"):
        find({"PULLBACK_PASSWORD_COMMAND": "sh -c 'echo the vault is locked >&2; echo secret; exit 3'"})
    assert capfd.readouterr().err == "the vault is locked\n"


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("no-such-program x", "no-such-program cannot be run"),
        ("echo 'x", "cannot be read"),
        (" ", "is empty"),
        ("true", "is empty"),
    ],
)
def test_a_command_that_gives_nothing_is_told(command: str, problem: str) -> None:
    with pytest.raises(errors.PasswordUnavailable, match=problem):
        find({"RESTIC_PASSWORD_COMMAND": command})


def test_a_command_that_does_not_end_is_ended() -> None:
    begin = time.monotonic()
    with pytest.raises(errors.PasswordUnavailable, match="no end within"):
        find({"PULLBACK_PASSWORD_COMMAND": "sleep 60"}, timeout=0.2)
    assert time.monotonic() - begin < 5
