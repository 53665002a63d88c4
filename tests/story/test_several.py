"""One command, several machines and repositories: by URLs, or by the names that the configuration gives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kit
from kit import Box, MakeBox
from pullback.units import KiB, MiB


@pytest.fixture
def pair(make_box: MakeBox) -> list[Box]:
    """Two machines; the first one's repository is for both."""
    boxes = [make_box(name=name, kind="restic") for name in ("web01", "db01")]
    for number, box in enumerate(boxes, 1):
        box.write("vda", 0x10 + number, number * MiB, 64 * KiB)
    return boxes


def configure(pair: list[Box], more: str = "") -> Path:
    """A configuration with both machines and two repositories."""
    web, db = pair
    path = web.directory / "config.toml"
    second = web.directory / "second"
    kit.make_repository(second, web.directory / "state" / "cache" / "repositories")
    path.write_text(
        f"""
[repositories.main]
url = "{web.repository}"
password_file = "{kit.password_file(web.directory)}"
[repositories.second]
url = "{second}"
password_file = "{kit.password_file(web.directory)}"
[machines.web]
url = "qmp:{web.qmp}"
repository = ["main", "second"]
tags = ["nightly"]
[machines.db]
url = "qmp:{db.qmp}"
repository = "main"
exclude = ["vdb"]
{more}
"""
    )
    return path


def test_configured_machines_are_backed_up_to_their_repositories_at_once(pair: list[Box]) -> None:
    path = configure(pair)
    done = pair[0].cli("backup", "web", "db", "--config", path, "--parallel", 2, "--json")
    assert done.returncode == 0, done.stderr
    results = [line for line in map(json.loads, done.stdout.splitlines()) if line["type"] == "result"]
    made = [(line["point"]["machine"], [disk["target"] for disk in line["point"]["disks"]]) for line in results]
    assert made == [("web01", ["vda", "vdb"]), ("web01", ["vda", "vdb"]), ("db01", ["vda"])]
    assert [line["point"]["tags"] for line in results] == [["nightly"], ["nightly"], []]
    progress = [line["disk"] for line in map(json.loads, done.stdout.splitlines()) if line["type"] == "progress"]
    assert {"web/vda", "db/vda"} <= set(progress)
    assert pair[0].restored(machine="web01") == pair[0].image()
    assert pair[0].restored(machine="db01") == {"vda": pair[1].image()["vda"]}
    again = pair[0].cli("backup", "web", "--config", path, "--json")
    lines = [json.loads(line) for line in again.stdout.splitlines()]
    modes = [disk["mode"] for line in lines if line["type"] == "result" for disk in line["point"]["disks"]]
    assert modes == ["incremental"] * 4


def test_a_machine_that_fails_does_not_keep_the_others_from_being_backed_up(pair: list[Box]) -> None:
    path = configure(pair)
    pair[1].quit()
    done = pair[0].cli("backup", "db", "web", "--config", path)
    assert done.returncode == 1
    assert done.stdout.count("web01: restore point") == 2
    assert str(pair[1].qmp) in done.stderr


def test_hooks_are_told_how_it_went(pair: list[Box]) -> None:
    log = pair[0].directory / "log"
    script = pair[0].directory / "hook"
    script.write_text(f'#!/bin/sh\necho "$PULLBACK_HOOK $PULLBACK_MACHINE $PULLBACK_STATUS" >>{log}\n')
    script.chmod(0o755)
    hooks = "".join(f'{name} = ["{script}"]\n' for name in ("pre", "post", "error"))
    path = configure(pair, f"[hooks]\n{hooks}")
    assert pair[0].cli("backup", "web", "-r", "main", "--config", path).returncode == 0
    pair[1].quit()
    assert pair[0].cli("backup", "db", "--config", path).returncode == 1
    assert log.read_text().splitlines() == ["pre web ", "post web done", "pre db ", "error db failed"]


def test_a_hook_that_says_no_stops_the_backup_and_a_late_failure_is_a_warning(pair: list[Box]) -> None:
    path = configure(pair, '[hooks]\npre = ["/bin/false"]\n')
    done = pair[0].cli("backup", "web", "-r", "main", "--config", path)
    assert done.returncode == 1
    assert "pre hook" in done.stderr
    path.write_text(path.read_text().replace("pre =", "post ="))
    done = pair[0].cli("backup", "web", "-r", "main", "--config", path)
    assert done.returncode == 3
    assert "the post hook of web failed" in done.stderr
    assert len(pair[0].cli("list", "-r", pair[0].repository).stdout.splitlines()) == 2


def test_a_rate_limit_slows_a_backup_down(box: Box) -> None:
    for step in range(8):
        box.write("vda", 1 + step, step * MiB, MiB)
    words = ["backup", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}", "--level", "full", "--json", "--limit-rate"]
    slow, quick = (kit.last_json(box.cli(*words, rate).stdout)["seconds"] for rate in ("2M", "1G"))
    # 8 MiB at 2 MiB/s; what was not used in the first second may be made up for.
    assert slow > 2
    assert slow > quick + 1


def test_preview_of_several_machines_tells_each(pair: list[Box]) -> None:
    path = configure(pair)
    done = pair[0].cli("backup", "web", "db", "-r", "main", "--config", path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "web01: nothing was done" in done.stdout
    assert "db01: nothing was done" in done.stdout
