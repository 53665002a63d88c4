"""docs/api.md is true: its program backs up a real machine, its examples run, its documents are read, its names are."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pullback
from kit import Box, MakeBox
from pullback import errors, sync
from pullback.flows import library
from pullback.flows.events import Kind
from pullback.model.documents import backup, checkpoint, export, snapshot
from pullback.model.xml import backup as backup_xml
from pullback.model.xml import checkpoint as checkpoint_xml
from pullback.model.xml import export as export_xml
from pullback.model.xml import snapshot as snapshot_xml
from pullback.programs import qemu
from pullback.units import KiB, MiB

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
_PROGRAM = re.compile(r"<!-- program: (\S+) -->\n```python\n(.*?)```", re.DOTALL)
_BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
#: Root element -> JSON and XML readers.
READERS: dict[str, tuple[Callable[[object], object], Callable[[str], object]]] = {
    "domainbackup": (backup.from_dict, backup_xml.parse),
    "domaincheckpoint": (checkpoint.from_dict, checkpoint_xml.parse),
    "domainblocksnapshot": (snapshot.from_dict, snapshot_xml.parse),
    "domainblockexport": (export.from_dict, export_xml.parse),
}


def blocks(language: str) -> list[str]:
    """The blocks of a language, the program aside."""
    return [text for found, text in _BLOCK.findall(_PROGRAM.sub("", PAGE)) if found == language]


def moved(text: str, box: Box) -> str:
    """With the places in it moved to the test's own."""
    return text.replace("/run/web01-pullback.sock", str(box.qmp)).replace("/srv/", f"{box.directory}/")


# -- the program -----------------------------------------------------------------------------


class Program:
    """The program of the page, on a machine."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.to = box.directory / "copies"
        [(name, text)] = _PROGRAM.findall(PAGE)
        self.path = box.directory / name
        self.path.write_text(text)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        """Begin a run."""
        line = [sys.executable, "-W", "error", str(self.path), f"qmp:{self.box.qmp}", str(self.to)]
        places = {"PULLBACK_STATE_DIR": str(self.box.directories.state), **environment}
        return subprocess.Popen(line, text=True, stderr=subprocess.PIPE, env=os.environ | places)

    def run(self, **environment: str) -> tuple[int, str]:
        """A whole run; its exit code and what it complained of."""
        time.sleep(max(0.0, self._named_until() - time.time()))
        with self.start(**environment) as process:
            _, said = process.communicate(timeout=60)
        return process.returncode, said

    def _named_until(self) -> float:
        """A copy has the second in its name."""
        return max((path.stat().st_mtime for path in self.to.glob("copy-*")), default=0.0) + 1.1

    def copy(self) -> dict[str, bytes]:
        """What the last copy holds."""
        last = max(self.to.glob("copy-*"))
        return {disk.id: (last / f"{disk.id}.raw").read_bytes() for disk in self.box.disks}


@pytest.fixture
def program(make_box: MakeBox) -> Program:
    """The program, and a machine with a qcow2 and a raw disk."""
    box = make_box(qemu.Disk(path=Path("a.qcow2"), id="vda"), qemu.Disk(path=Path("b.raw"), id="vdb", format="raw"))
    box.write("vda", 0x11, 0, 4 * MiB)
    box.write("vdb", 0x21, MiB, MiB)
    return Program(box)


def names(box: Box) -> list[str]:
    """The checkpoints of vda."""
    return [bitmap["name"].split("/")[-1] for bitmap in box.checkpoints("vda")]


def test_the_program_backs_up_whole_then_what_changed_with_its_zeroes(program: Program) -> None:
    box = program.box
    assert program.run() == (0, "")
    assert program.copy() == box.image()
    for step in range(2):
        box.write("vda", 0x30 + step, 5 * MiB, 192 * KiB)
        box.write("vda", 0x40, 300 * KiB, 4 * KiB)
        box.zero("vda", step * MiB, 128 * KiB)
        box.discard("vda", (step + 1) * MiB, MiB)
        box.write("vdb", 0x50 + step, 0, 64 * KiB)
        assert program.run() == (0, "")
        assert program.copy() == box.image()
        assert names(box) == [max(program.to.iterdir()).name]
        assert box.leftovers() == []


def test_the_program_reads_what_changed_only(program: Program, tmp_path: Path) -> None:
    """A block that only the last copy has comes from there."""
    assert program.run() == (0, "")
    last = max(program.to.iterdir()) / "vda.raw"
    with last.open("r+b") as file:
        file.seek(2 * MiB)
        file.write(b"old")
    program.box.write("vda", 0x12, 3 * MiB, 64 * KiB)
    assert program.run() == (0, "")
    wanted = bytearray(program.box.image()["vda"])
    wanted[2 * MiB : 2 * MiB + 3] = b"old"
    assert program.copy()["vda"] == wanted


def test_the_program_that_fails_leaves_the_checkpoint_and_the_copy_of_last_time(program: Program) -> None:
    box = program.box
    assert program.run() == (0, "")
    before = names(box), sorted(program.to.iterdir())
    box.write("vda", 0x13, 0, 64 * KiB)
    failing = box.directory / "failing"
    failing.mkdir()
    (failing / "cp").symlink_to("/bin/false")
    code, said = program.run(PATH=f"{failing}:{os.environ['PATH']}")
    assert code == 1
    assert "CalledProcessError" in said
    assert names(box) == before[0]
    assert box.leftovers() == []
    box.write("vda", 0x14, MiB, 64 * KiB)
    assert program.run() == (0, "")
    assert program.copy() == box.image()


def test_the_program_that_is_killed_leaves_nothing_and_no_gap(program: Program) -> None:
    box = program.box
    assert program.run() == (0, "")
    before = names(box)
    box.write("vda", 0x15, 0, 64 * KiB)
    slow = box.directory / "slow"
    slow.mkdir()
    (slow / "cp").write_text("#!/bin/sh\nexec sleep 30 </dev/null >/dev/null 2>&1\n")
    (slow / "cp").chmod(0o755)
    time.sleep(1.1)
    with program.start(PATH=f"{slow}:{os.environ['PATH']}") as process:
        deadline = time.monotonic() + 40
        while not (program.to / ".unfinished").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    while names(box) != before or box.leftovers():
        assert time.monotonic() < deadline, (names(box), box.leftovers())
        time.sleep(0.1)
    assert program.run() == (0, "")
    assert program.copy() == box.image()
    assert not (program.to / ".unfinished").exists()


def test_the_program_begins_anew_after_a_crash_of_qemu(program: Program) -> None:
    box = program.box
    assert program.run() == (0, "")
    box.quit()
    box.start()  # now the bitmaps are in the image
    box.write("vda", 0x16, 0, 64 * KiB)
    box.kill()
    box.start()
    assert program.run() == (0, "")
    assert program.copy() == box.image()
    box.write("vda", 0x17, 0, 64 * KiB)
    assert program.run() == (0, "")
    assert program.copy() == box.image()


def test_the_program_reads_a_disk_whole_that_took_the_place_of_another(make_box: MakeBox) -> None:
    box = make_box(*(qemu.Disk(path=Path(f"{id}.qcow2"), id=id) for id in ("vda", "vdb")))
    program = Program(box)
    box.write("vda", 0x18, 0, MiB)
    box.write("vdb", 0x28, MiB, MiB)
    assert program.run() == (0, "")
    box.quit()
    a, b = box.disks[0].path, box.disks[1].path
    other = a.with_name("other")
    a.rename(other), b.rename(a), other.rename(b)
    box.model["vda"], box.model["vdb"] = box.model["vdb"], box.model["vda"]
    box.start()
    assert program.run() == (0, "")
    assert program.copy() == box.image()


# -- the examples ----------------------------------------------------------------------------


def test_the_examples_run_in_order(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.write("vda", 0x19, 0, MiB)
    monkeypatch.setenv("PULLBACK_STATE_DIR", str(box.directories.state))
    (box.directory / "tls").mkdir()
    (box.directory / "tls" / "keys.psk").write_text(f"qemu:{'5a' * 32}\n")
    space: dict[str, Any] = {"__name__": "example"}
    for number, text in enumerate(blocks("python")):
        exec(compile(moved(text, box), f"docs/api.md, example {number}", "exec"), space)
    assert box.leftovers() == []
    assert (box.directory / "pushed.qcow2").exists()


def test_documents_are_the_same_in_both_forms() -> None:
    forms = list(zip(blocks("json"), blocks("xml"), strict=True))
    assert len(forms) == len(READERS)
    for as_json, as_xml in forms:
        found = re.search(r"<(\w+)", as_xml)
        assert found is not None
        from_json, from_xml = READERS[found[1]]
        assert from_json(json.loads(as_json)) == from_xml(as_xml)


def test_every_block_is_an_example_or_a_document() -> None:
    assert {language for language, _ in _BLOCK.findall(PAGE)} == {"python", "json", "xml"}
    assert len(_PROGRAM.findall(PAGE)) == 1
    assert PAGE.count("```") == 2 * len(_BLOCK.findall(PAGE))


# -- the names -------------------------------------------------------------------------------


def test_every_call_is_described_with_all_its_arguments() -> None:
    calls = {name: call for name, call in inspect.getmembers(library.Machine, callable) if not name.startswith("_")}
    calls |= {"connect": library.connect, "watch": library.watch}
    for name, call in calls.items():
        found = re.search(rf"\| [^|\n]*`(?:Machine\.)?{name}\(([^)`]*)\)", PAGE)
        assert found is not None, name
        wanted = [parameter for parameter in inspect.signature(call).parameters if parameter != "self"]
        assert [word for word in found[1].split(", ") if word not in ("*", "")] == wanted, name


def test_both_faces_are_entered_in_the_same_way() -> None:
    for name in ("connect", "watch"):
        here, there = inspect.signature(getattr(sync, name)), inspect.signature(getattr(library, name))
        assert here.parameters == there.parameters


def test_every_code_and_kind_of_event_that_is_named_is_one() -> None:
    codes = {kind.code for kind in errors.catalogue()}
    tables = re.findall(r"^\| call \| gives \| errors \(codes\) \|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert len(tables) == 5
    cells = [row.split(" | ")[-1] for table in tables for row in table.splitlines()[1:]]
    named = {code for cell in cells for code in re.findall(r"`([^`]+)`", cell)}
    assert named - codes == set()
    assert all(f"`{kind}`" in PAGE for kind in Kind)


def test_every_public_name_is_in_the_page() -> None:
    for name in set(pullback.__all__) - {"__version__"}:
        assert re.search(rf"`(?:pullback\.)?{name}\b|pullback\.{name}\b", PAGE), name
        assert getattr(pullback, name) is not None
