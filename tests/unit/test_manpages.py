"""The man pages: made from the command line, up to date, and roff that every program can read."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.cli import manpages, reference, roff

MAN = Path(__file__).parents[2] / "man"
PAGES = manpages.pages()
_MACROS = {".TH", ".SH", ".PP", ".TP", ".IP", ".RS", ".RE", ".nf", ".fi", '.\\"'}
_ESCAPES = re.compile(r"\\(?:e|-|&|fB|fR|\(aq|\(ga|\(ha|\(ti|\(bu|\[u[0-9A-F]{4,6}\])")


def rendered(text: str) -> str:
    """What a reader sees of a page made of this text."""
    page = '.TH X 1 "" "" ""\n' + "\n".join(roff.blocks(text)) + "\n"
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-P-c", "-P-b", "-P-u", "-rLL=9999n"],
        input=page, capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout


def test_the_pages_are_what_the_command_line_is() -> None:
    written = {path.name: path.read_text(encoding="ascii") for path in MAN.glob("*")}
    assert written == PAGES, "run `make docs`"


def test_every_command_has_a_page_and_the_first_page_names_them_all() -> None:
    names = {manpages.name_of(command) for command in reference.commands()}
    assert set(PAGES) == {"pullback.1", *(f"{name}.1" for name in names)}
    for name in names:
        assert roff.escaped(name) in PAGES["pullback.1"]


@pytest.mark.parametrize("command", list(reference.commands()))
def test_a_page_has_every_option_of_its_command(command: str) -> None:
    text = PAGES[f"{manpages.name_of(command)}.1"]
    for parameter in reference.parameters(reference.commands()[command]):
        spelling = reference.row(parameter)[0].strip("`")
        assert f".TP\n\\fB{roff.escaped(spelling)}\\fR\n" in text


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_only_macros_and_escapes_that_every_program_knows(name: str) -> None:
    text = PAGES[name]
    assert text.isascii()
    for line in text.splitlines():
        if line.startswith((".", "'")):
            assert line.split()[0] in _MACROS
        else:
            assert "\\" not in _ESCAPES.sub("", line)
            assert line.count(r"\fB") == line.count(r"\fR")
    for begin, end in ((".nf", ".fi"), (".RS", ".RE")):
        assert len(re.findall(rf"^\{begin}\b", text, re.M)) == len(re.findall(rf"^\{end}\b", text, re.M))
    assert re.findall(r"^\.SH (.+)$", text, re.M)[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"]


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_has_nothing_to_complain_about() -> None:
    for name, text in PAGES.items():
        line = ["groff", "-man", "-Tutf8", "-ww", "-z"]
        done = subprocess.run(line, input=text, capture_output=True, text=True, timeout=20, check=False)
        assert (done.returncode, done.stderr) == (0, ""), name


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_a_text_reads_in_the_page_as_it_was_written() -> None:
    text = """\
.Dots, 'quotes', `back\\slashes` and **--options** stay; [a link](design.md#x) names its page.

- one
  and more
- two …

```sh
.hidden 'a' ~b ^c \\d
```

    indented
"""
    words = " ".join(rendered(text).split())
    expected = (
        ".Dots, 'quotes', back\\slashes and --options stay; a link (docs/design.md) names its page. "
        "• one and more • two … .hidden 'a' ~b ^c \\d indented"
    )
    assert expected in words


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40))
def test_no_text_becomes_a_command(text: str) -> None:
    made = roff.line(text)
    assert made.isascii()
    assert not made.startswith((".", "'"))
    assert "\\" not in _ESCAPES.sub("", made)


def test_pages_of_commands_that_are_gone_are_removed(tmp_path: Path) -> None:
    for name in ("pullback-old.1", "other.1"):
        (tmp_path / name).write_text("")
    manpages.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*PAGES, "other.1"}
