"""The command line from end to end, as a user runs it, on a real machine; and what `--json` prints."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import kit
from jsonkit import mismatches
from kit import Box
from pullback.cli import documents
from pullback.cli.documents import Document
from pullback.units import MiB


def checked(done: subprocess.CompletedProcess[str], command: str, variant: int = 0, code: int = 0) -> dict[str, Any]:
    """The result of a command with --json; every line must be as it is described."""
    assert done.returncode == code, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    *before, last = lines
    for line in before:
        assert line["type"] in ("note", "progress", "event")
        assert mismatches(line, documents.COMMON[line["type"]].fields) == []
    kind: Document = documents.COMMON["error"] if last["type"] == "error" else documents.RESULTS[command][variant]
    assert mismatches(last, kind.fields) == []
    result: dict[str, Any] = last
    return result


def repository(box: Box) -> list[str]:
    """The option."""
    return ["-r", f"dir:{box.repository}"]


def backup(box: Box, *words: object) -> subprocess.CompletedProcess[str]:
    """A backup by the command line."""
    return box.cli("backup", f"qmp:{box.qmp}", *repository(box), *words)


def test_from_the_first_backup_to_the_restored_disks(box: Box) -> None:
    box.write("vda", 0x11, 0, 2 * MiB)
    box.write("vdb", 0x22, 0, 64 * 1024)
    first = backup(box)
    assert first.returncode == 0
    assert "vda: read whole, because it is the first backup" in first.stderr
    old = box.image()
    box.write("vda", 0x33, MiB, 4096)
    second = backup(box)
    assert (second.returncode, second.stderr) == (0, "")
    assert second.stdout.splitlines()[1].split()[:4] == ["vda", "incremental", "1.00", "MiB"]

    listed = box.cli("list", *repository(box))
    assert listed.stdout.startswith("web01:\n")
    ids = [line.split()[0] for line in listed.stdout.splitlines()[1:]]
    assert len(ids) == 2

    for point, content in ((ids[0], old), ("latest", box.image())):
        to = box.directory / f"out-{point}"
        done = box.cli("restore", point, *repository(box), "--to", to)
        assert done.returncode == 0, done.stderr
        assert {path.stem: path.read_bytes() for path in to.glob("*.raw")} == content

    verified = box.cli("verify", "--all", *repository(box))
    assert verified.returncode == 0
    assert verified.stdout.count("sound") == 4
    assert box.leftovers() == []


def test_every_json_document_is_as_the_docs_describe_it(box: Box) -> None:
    box.write("vda", 0x11, 0, 2 * MiB)
    preview = checked(backup(box, "--dry-run", "--json"), "backup", variant=1)
    assert [disk["read_at_most"] for disk in preview["disks"]] == [kit.SIZE, kit.SIZE]
    first = checked(backup(box, "--json"), "backup")
    assert first["point"]["disks"][0]["mode"] == "full"
    box.write("vda", 0x12, 0, 4096)
    preview = checked(backup(box, "-n", "--json"), "backup", variant=1)
    assert preview["disks"][0]["parent"] == first["point"]["id"]
    assert preview["disks"][0]["read_at_most"] == kit.CLUSTER
    second = checked(backup(box, "--json"), "backup")
    assert second["point"]["disks"][0]["parent"] == {"point": first["point"]["id"], "target": "vda"}

    listed = checked(box.cli("list", *repository(box), "--json"), "list")
    assert [point["id"] for point in listed["machines"][0]["points"]] == [first["point"]["id"], second["point"]["id"]]
    to = box.directory / "out"
    restored = checked(box.cli("restore", *repository(box), "--to", to, "--format", "qcow2", "--json"), "restore")
    assert [Path(disk["path"]) for disk in restored["disks"]] == [to / "vda.qcow2", to / "vdb.qcow2"]
    assert restored["disks"][0]["digest"] == second["point"]["disks"][0]["digest"]
    verified = checked(box.cli("verify", *repository(box), "--json"), "verify")
    assert verified["damaged"] == 0
    info = checked(box.cli("info", f"qmp:{box.qmp}", "--json"), "info")
    assert info["machine"] == "web01"
    assert [len(disk["checkpoints"]) for disk in info["disks"]] == [1, 1]
    untracked = checked(box.cli("untrack", f"qmp:{box.qmp}", "--json"), "untrack")
    assert list(untracked["bitmaps"]) == ["vda", "vdb"]
    assert box.checkpoints("vda") == []


def test_every_json_document_of_checkpoints_is_as_the_docs_describe_it(box: Box) -> None:
    def ask(command: str, *words: object, code: int = 0) -> dict[str, Any]:
        done = box.cli("checkpoint", command, f"qmp:{box.qmp}", *words, "--json")
        return checked(done, f"checkpoint {command}", code=code)

    made = ask("create", "--as", "a", "--description", "first")
    assert [disk["target"] for disk in made["checkpoint"]["disks"]] == ["vda", "vdb"]
    assert [disk["target"] for disk in made["kept"]["disks"]] == ["vda", "vdb"]
    ask("create", "--as", "b")
    box.write("vda", 0x11, 0, 4096)
    listed = ask("list", "--size")
    assert (listed["current"], [item["name"] for item in listed["checkpoints"]]) == ("b", ["a", "b"])
    assert listed["checkpoints"][0]["disks"][0]["dirty"] == kit.CLUSTER
    assert ask("current")["checkpoint"]["name"] == "b"
    assert ask("parent", "b")["checkpoint"]["name"] == "a"
    assert ask("parent", "a", code=2)["code"] == "no-checkpoint"
    assert ask("changes", "vda", "--since", "a")["extents"] == [{"offset": 0, "length": kit.CLUSTER}]
    found = ask("info", "a", "--size")
    document = box.directory / "a.json"
    document.write_text(json.dumps(found["document"]))
    assert ask("redefine", document)["document"]["description"] == "first"
    assert ask("delete", "a", "--children")["deleted"] == ["b", "a"]
    ask("create", "--as", "c")
    untracked = checked(box.cli("untrack", f"qmp:{box.qmp}", "--json"), "untrack")
    assert untracked["checkpoints"] == ["c"]


def test_an_error_is_a_document_too(box: Box) -> None:
    error = checked(backup(box, "--disk", "vdz", "--json"), "backup", code=2)
    assert error["code"] == "unknown-disk"
    assert error["facts"] == {"target": "vdz", "where": "web01", "known": "vda, vdb"}


def test_damage_is_told_in_words_in_json_and_by_the_exit_code(box: Box) -> None:
    box.write("vda", 0x11, 0, 2 * MiB)
    assert backup(box).returncode == 0
    [image] = box.repository.rglob("vda.qcow2")
    data = bytearray(image.read_bytes())
    data[-70_000] ^= 0x40
    image.write_bytes(data)
    told = box.cli("verify", *repository(box))
    assert told.returncode == 13
    assert "DAMAGED" in told.stdout
    assert told.stderr.startswith("  hint: ")
    verdicts = checked(box.cli("verify", *repository(box), "--json"), "verify", code=13)
    assert [disk["problem"] is None for disk in verdicts["disks"]] == [False, True]
    failed = checked(box.cli("restore", *repository(box), "--to", box.directory / "out", "--json"), "restore", code=13)
    assert failed["code"] == "verification-failed"
    assert list((box.directory / "out").iterdir()) == []


def test_a_dry_run_changes_nothing(box: Box) -> None:
    done = backup(box, "--dry-run")
    assert done.stdout.splitlines() == [
        "web01: nothing was done; a backup now would read",
        "  vda      whole    at most 8.00 MiB  (it is the first backup)",
        "  vdb      whole    at most 8.00 MiB  (it is the first backup)",
    ]
    assert not box.repository.exists()
    assert box.checkpoints("vda") == []
    assert box.leftovers() == []


def test_a_broken_chain_is_3_and_strictly_1_and_the_point_is_made_all_the_same(box: Box) -> None:
    assert backup(box).returncode == 0
    for words, code in (([], 3), (["--strict"], 1)):
        assert box.cli("untrack", f"qmp:{box.qmp}").returncode == 0
        done = backup(box, *words)
        assert done.returncode == code
        assert "vda: read whole, because its last checkpoint is not on the disk" in done.stderr
    listed = checked(box.cli("list", *repository(box), "--json"), "list")
    assert len(listed["machines"][0]["points"]) == 3
    assert backup(box, "--strict").returncode == 0


def test_disks_are_left_out_by_name(box: Box) -> None:
    first = checked(backup(box, "--exclude", "vdb", "--json"), "backup")
    second = checked(backup(box, "--disk", "vdb", "--json"), "backup")
    assert [[disk["target"] for disk in result["point"]["disks"]] for result in (first, second)] == [["vda"], ["vdb"]]
    assert second["point"]["disks"][0]["reason"] == "it is a new disk"


@pytest.mark.parametrize("words", [["-q"], ["--quiet"]])
def test_quiet_says_nothing_where_nothing_is_wrong(box: Box, words: list[str]) -> None:
    to = box.directory / "out"
    for done in (
        backup(box, *words),
        box.cli("restore", *repository(box), "--to", to, *words),
        box.cli("verify", *repository(box), *words),
        box.cli("untrack", f"qmp:{box.qmp}", *words),
    ):
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert backup(box, *words, "--disk", "vdz").stderr.startswith("pullback: ")


def test_the_repository_may_come_from_the_environment(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULLBACK_REPOSITORY", f"dir:{box.repository}")
    assert box.cli("backup", f"qmp:{box.qmp}").returncode == 0
    assert box.cli("list").stdout.startswith("web01:\n")


def test_force_overwrites_and_only_then(box: Box) -> None:
    box.write("vda", 0x11, 0, MiB)
    assert backup(box).returncode == 0
    to = box.directory / "out"
    to.mkdir()
    (to / "vda.raw").write_bytes(b"precious")
    words = ["restore", *repository(box), "--to", to, "--disk", "vda"]
    assert box.cli(*words).returncode == 2
    assert (to / "vda.raw").read_bytes() == b"precious"
    assert box.cli(*words, "--force").returncode == 0
    assert (to / "vda.raw").read_bytes() == box.image()["vda"]


def test_a_closed_pipe_ends_a_listing_without_a_traceback(box: Box) -> None:
    assert backup(box).returncode == 0
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            ["sh", "-c", '"$@" | true', "sh", *kit_words(box)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert "Traceback" not in done.stderr


def kit_words(box: Box) -> list[str]:
    """`pullback list`, for a shell."""
    import sys

    return [sys.executable, "-m", "pullback.cli.main", "list", *repository(box)]
