"""Examples in the docs are true: blocks after <!-- run --> are run on a real machine, and links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kit import Box
from pullback.units import MiB

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"<!-- run -->\n```sh\n(.*?)```", re.DOTALL)
_LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]*)(#[^)\s]*)?\)")


def blocks(page: Path) -> list[str]:
    """The examples of a page that are to be run."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def run(box: Box, script: str) -> subprocess.CompletedProcess[str]:
    """Run the examples of a page as a user would, in one shell, with the places in them moved to the test's own."""
    places = {"/run/web01-pullback.sock": str(box.qmp), "/srv/": f"{box.directory}/"}
    for place, instead in places.items():
        script = script.replace(place, instead)
    command = box.directory / "bin" / "pullback"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pullback.cli.main "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PULLBACK_STATE_DIR": str(box.directory / "state"),
        "RESTIC_CACHE_DIR": str(box.directory / "cache"),
    }
    line = ["bash", "-euxo", "pipefail", "-c", script]
    return subprocess.run(line, capture_output=True, text=True, timeout=110, check=False, env=environment)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_examples_of_a_page_run_in_order(box: Box, page: Path) -> None:
    box.write("vda", 0x11, 0, 2 * MiB)
    done = run(box, "".join(blocks(page)))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    by_hand = box.directory / "by-hand.raw"
    assert by_hand.exists() == (page.name == "README.md")
    assert not by_hand.exists() or by_hand.read_bytes() == box.image()["vda"]
    assert box.leftovers() == []


def test_the_important_pages_have_examples() -> None:
    found = {page.name: len(blocks(page)) for page in PAGES if blocks(page)}
    assert found == {"README.md": 5, "commands.md": 13, "restore.md": 5, "rollback.md": 1}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("https:"):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor:
            assert anchor[1:] in anchors(file), f"{target}{anchor}"


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_target_of_make_is_in_its_help() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^([a-z]+):", makefile, re.MULTILINE):
        assert re.search(rf"^  {target} ", done.stdout, re.MULTILINE), target


def test_make_targets_that_the_docs_name_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"(?<!install )\bmake ([a-z]+)", "".join(_code(page))):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


def _code(page: Path) -> list[str]:
    """Indented lines, and what stands in backticks."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^    .*$|`[^`\n]+`", text, re.MULTILINE)
