"""Making a repository and keeping it in order by the command line, from `init` to `doctor`."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import kit
import made
from jsonkit import mismatches
from kit import Box, MakeBox
from pullback import repo
from pullback.cli import documents
from pullback.units import MiB

Done = subprocess.CompletedProcess[str]
DAY = datetime(2026, 11, 20, 6, tzinfo=UTC)


class Desk:
    """Somebody who types."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.repository = directory / "repo"
        self.password = kit.password_file(directory)

    def run(self, *words: object, **variables: str) -> Done:
        """The command line."""
        known = {"PULLBACK_PASSWORD_FILE": str(self.password), "PULLBACK_CACHE_DIR": str(self.directory / "caches")}
        return kit.run_cli(*words, state=self.directory / "state", environ=known | variables, stdin=subprocess.DEVNULL)

    def result(self, command: str, *words: object, code: int = 0, **variables: str) -> dict[str, Any]:
        """What it prints with --json, which must be as it is described."""
        done = self.run(*command.split(), *words, "--json", **variables)
        assert done.returncode == code, done.stderr
        found = kit.last_json(done.stdout)
        kinds = documents.RESULTS[command] if found["type"] == "result" else (documents.COMMON["error"],)
        assert mismatches(found, kinds[0].fields) == []
        return found


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A desk."""
    return Desk(tmp_path)


# -- init ------------------------------------------------------------------------------------


def test_a_repository_is_made_once_and_its_password_is_warned_of(desk: Desk) -> None:
    done = desk.run("init", "-r", desk.repository)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith(f"made the repository {desk.repository}, id ")
    assert "cannot be recovered" in done.stdout
    error = desk.result("init", "-r", desk.repository, code=2)
    assert error["code"] == "repository-exists"
    plain = desk.result("init", "-r", f"dir:{desk.directory}/plain")
    assert plain["encrypted"] is False
    assert repo.open_directory(desk.directory / "plain").id == plain["id"]
    assert desk.result("init", "-r", f"dir:{desk.directory}/plain", code=2)["code"] == "repository-exists"


def test_nothing_is_made_without_a_good_password(desk: Desk) -> None:
    for variables, code in (
        ({"PULLBACK_PASSWORD_FILE": ""}, "no-password"),
        ({"PULLBACK_PASSWORD_FILE": "", "RESTIC_PASSWORD": " x"}, "usage"),
        ({"PULLBACK_PASSWORD_FILE": "", "PULLBACK_PASSWORD_COMMAND": "echo"}, "password-unavailable"),
    ):
        done = desk.run("init", "-r", desk.repository, "--json", **variables)
        assert kit.last_json(done.stdout)["code"] == code
        assert not desk.repository.exists()


def typed(desk: Desk, answers: list[str], *words: object) -> tuple[int, str]:
    """The command on a terminal, with these answers to its questions; its end, and what the terminal showed."""
    line = [sys.executable, "-m", "pullback.cli.main", *map(str, words)]
    known = {"PULLBACK_STATE_DIR": str(desk.directory / "state"), "PATH": os.environ["PATH"]}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(line[0], line, known)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if answers and shown.endswith(b": "):
            os.write(terminal, answers.pop(0).encode() + b"\n")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode()


def test_on_a_terminal_a_new_password_is_asked_for_twice(desk: Desk) -> None:
    code, shown = typed(desk, ["one", "two"], "init", "-r", desk.repository)
    assert code == 2
    assert "The two passwords differ" in shown
    assert not desk.repository.exists()
    assert typed(desk, ["one two", "one two"], "init", "-r", desk.repository)[0] == 0
    code, shown = typed(desk, ["one two"], "key", "list", "-r", desk.repository)
    assert code == 0
    assert f"Password of the repository {desk.repository}: " in shown
    assert "one two" not in shown
    assert typed(desk, ["wrong"], "key", "list", "-r", desk.repository)[0] == 12


# -- forget, copy, key, unlock ---------------------------------------------------------------


def configuration(desk: Desk, more: str = "") -> Path:
    """A file with a repository and its rule."""
    path = desk.directory / "config.toml"
    path.write_text(
        f"""
[repositories.main]
url = "{desk.repository}"
password_file = "{desk.password}"
keep = {{last = 1}}
{more}
"""
    )
    path.chmod(0o600)
    return path


def test_the_configured_rule_holds_where_no_option_says_another(desk: Desk) -> None:
    made.empty(desk.repository)
    ids = [made.point(desk.repository, "web01", DAY + timedelta(hours=step)) for step in range(3)]
    words = ("-r", "main", "--config", configuration(desk))
    preview = desk.result("forget", *words, "--dry-run")
    assert [point["id"] for point in preview["machines"][0]["removed"]] == ids[:2]
    found = desk.result("forget", *words, "--keep-last", "2", "--prune")
    assert [point["id"] for point in found["machines"][0]["removed"]] == ids[:1]
    assert found["freed"] > 0
    done = desk.run("forget", *words)
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:3]] == [
        ["remove", ids[1][:8]],
        ["keep", ids[2][:8]],
    ]
    assert done.stdout.splitlines()[-1] == "1 removed; their data stays until --prune"
    assert desk.result("forget", *words, ids[2][:8], "--keep-last", "1", code=2)["code"] == "usage"
    assert desk.result("forget", *words, "1234567", code=2)["code"] == "unknown-point"


def test_copy_key_and_unlock_print_what_is_described(desk: Desk) -> None:
    made.empty(desk.repository)
    id = made.point(desk.repository, "web01", DAY)
    there = made.empty(desk.directory / "there")
    copied = desk.result("copy", "--to", there, "-r", desk.repository)
    assert [(point["id"], point["already"]) for point in copied["points"]] == [(id, False)]
    again = desk.result("copy", "latest", "--to", there, "-r", desk.repository, "--to-password-file", desk.password)
    assert again["points"][0]["already"] is True

    second = desk.directory / "second"
    second.write_text("second\n")
    added = desk.result("key add", "-r", there, "--new-password-file", second)["key"]
    listed = desk.result("key list", "-r", there, PULLBACK_PASSWORD_FILE=str(second))["keys"]
    assert {key["id"] for key in listed if key["current"]} == {added["id"]}
    assert desk.result("key remove", added["id"][:8], "-r", there)["key"]["id"] == added["id"]
    assert desk.result("key passwd", "-r", there, "--new-password-file", second)["key"]["current"] is True
    assert desk.result("key list", "-r", there, code=12)["code"] == "wrong-password"

    assert desk.result("unlock", "-r", desk.repository)["locks"] == []
    assert desk.result("unlock", "-r", desk.repository, "--remove-all", code=2)["code"] == "usage"
    assert desk.result("unlock", "-r", desk.repository, "--remove-all", "--force")["locks"] == []
    assert desk.result("unlock", "-r", desk.directory / "nothing", code=10)["code"] == "no-repository"


@pytest.mark.parametrize(
    "words",
    [["forget", "--keep-last", "1"], ["copy", "--to", "/there"], ["key", "list"], ["unlock"]],
    ids=lambda words: words[0],
)
def test_what_is_not_for_plain_images_is_refused_with_a_hint(desk: Desk, words: list[str]) -> None:
    repo.create_or_open(desk.directory / "plain")
    done = desk.run(*words, "-r", f"dir:{desk.directory}/plain")
    assert done.returncode == 1
    assert done.stderr.startswith(f"pullback: `pullback {words[0]}")
    assert "\n  hint: " in done.stderr
    assert len(done.stderr.splitlines()) == 2


# -- doctor ----------------------------------------------------------------------------------


def findings(report: dict[str, Any], area: str) -> dict[str, str]:
    """The worst status of each thing that was looked at."""
    order = ["ok", "warning", "problem"]
    found: dict[str, str] = {}
    for check in report["checks"]:
        if check["area"] == area:
            found[check["name"]] = max(found.get(check["name"], "ok"), check["status"], key=order.index)
    return found


def test_the_doctor_finds_a_sound_machine_sound_and_changes_nothing(make_box: MakeBox) -> None:
    box = make_box(kind="restic")
    box.write("vda", 0x11, 0, MiB)
    point = box.backup().point
    before = (box.checkpoints("vda"), sorted(box.repository.rglob("*")))
    words = ("doctor", f"qmp:{box.qmp}", "-r", box.repository, "--json")
    done = box.cli(*words)
    report = kit.last_json(done.stdout)
    assert mismatches(report, documents.RESULTS["doctor"][0].fields) == []
    machine = findings(report, "machine")
    assert machine.pop("agent") == "warning"
    machine.pop("scratch")  # it depends on the room here
    assert set(machine.values()) == {"ok"}
    assert set(findings(report, "repository").values()) == {"ok"}
    assert (box.checkpoints("vda"), sorted(box.repository.rglob("*"))) == before
    assert box.leftovers() == []
    assert box.restored(point.id) == box.image()


def test_the_doctor_names_each_illness_with_a_remedy(box: Box) -> None:
    assert box.backup().point  # to a repository that the configuration does not have
    desk = Desk(box.directory)
    made.empty(desk.repository.with_name("sealed"))
    desk.repository = desk.repository.with_name("sealed")
    with made.opened(desk.repository) as repository:
        repository.lock(exclusive=True).__enter__()  # never let go of
        more = f"""
[repositories.lost]
url = "{desk.directory}/nothing"
[machines.web01]
url = "qmp:{box.qmp}"
repository = ["main", "lost"]
quiesce = "require"
scratch = "/proc/scratch"
[machines.off]
url = "qmp:{box.directory}/none.sock"
"""
        report = desk.result("doctor", "--config", configuration(desk, more), code=1)
    ill = {(check["subject"], check["name"]): check["status"] for check in report["checks"] if check["status"] != "ok"}
    assert ill["off", "monitor"] == "problem"
    assert ill["web01", "agent"] == "problem"
    assert ill["web01", "scratch"] == "problem"
    assert ill["lost", "access"] == "problem"
    assert ill["main", "locks"] == "warning"
    assert ill["main", "age"] == "warning"
    assert ("web01", "bitmaps") not in ill  # one repository cannot be asked for its id
    assert all(check["remedy"] for check in report["checks"] if check["status"] == "problem")
    text = desk.run("doctor", "web01", "--quiet", "--config", configuration(desk, more.replace(', "lost"', ""))).stdout
    assert "machine web01:\n  problem  " in text
    assert "  ok  " not in text


def test_a_checkpoint_of_a_repository_that_is_not_configured_is_told(box: Box) -> None:
    box.backup()
    desk = Desk(box.directory)
    desk.repository = made.empty(box.directory / "sealed")
    more = f'[machines.web01]\nurl = "qmp:{box.qmp}"\nrepository = "main"\nquiesce = "no"\n'
    report = desk.result("doctor", "--config", configuration(desk, more), code=3 if _roomy(box) else 1)
    told = [check for check in report["checks"] if check["name"] == "bitmaps" and check["status"] == "warning"]
    assert len(told) == 2
    assert "which is not configured" in told[0]["finding"]
    assert told[0]["remedy"].startswith("`pullback checkpoint delete web01 auto.")


def _roomy(box: Box) -> bool:
    status = os.statvfs(box.directory)
    return status.f_bavail * status.f_frsize > 1024 * MiB


def test_a_configuration_that_cannot_be_used_is_a_finding(desk: Desk) -> None:
    path = configuration(desk, "[machines.web01]\nurl = 7\n")
    report = desk.result("doctor", "--config", path, code=1)
    [check] = [check for check in report["checks"] if check["area"] == "configuration"]
    assert check["status"] == "problem"
    assert "machines.web01.url" in check["finding"]
