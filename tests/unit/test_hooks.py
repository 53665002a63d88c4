"""Hooks: when each runs, what it is told, and that none outlives its time. The programs are real shells."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pullback import errors
from pullback.flows import hooks
from pullback.model.hooks import Hooks
from pullback.progress import INTERRUPTION

SUBJECT = hooks.Subject(machine="web01", repository="/srv/backup")
#: Writes down which hook it is, with all of our variables.
_RECORD = 'env | grep ^PULLBACK_ | sort >"$0/$PULLBACK_HOOK"; echo "$PULLBACK_HOOK" >>"$0/order"'


def recording(directory: Path, *, fails: str = "", timeout: float = 10.0) -> Hooks:
    """Hooks that write down what they are told; the one named fails."""
    script = f'{_RECORD}; [ "$PULLBACK_HOOK" != "{fails}" ] || exit 3'
    words = ("sh", "-c", script, str(directory))
    return Hooks(pre=words, post=words, error=words, timeout=timeout)


def order(directory: Path) -> list[str]:
    """Which hooks ran."""
    path = directory / "order"
    return path.read_text().split() if path.exists() else []


def told(directory: Path, hook: str) -> dict[str, str]:
    """What a hook was told."""
    lines = (directory / hook).read_text().splitlines()
    return {name.removeprefix("PULLBACK_"): value for name, _, value in (line.partition("=") for line in lines)}


def backup(chosen: Hooks, error: BaseException | None = None) -> hooks.Told:
    """A backup with hooks that succeeds or fails."""

    async def work() -> hooks.Told:
        async with hooks.around(chosen, SUBJECT) as found:
            if error is not None:
                raise error
            found.succeeded(point="0a1b2c3d", read=4096, stored=1024, warned=True)
        return found

    return asyncio.run(work())


# -- which run -------------------------------------------------------------------------------


def test_after_a_success_post_runs_and_knows_the_point(tmp_path: Path) -> None:
    found = backup(recording(tmp_path))
    assert order(tmp_path) == ["pre", "post"]
    assert found.warnings == []
    known = told(tmp_path, "post")
    assert float(known.pop("SECONDS")) > 0
    assert known == {
        "HOOK": "post", "MACHINE": "web01", "REPOSITORY": "/srv/backup", "POINT": "0a1b2c3d", "STATUS": "warned",
        "EXIT_CODE": "3", "READ": "4096", "STORED": "1024",
    }  # fmt: skip


def test_before_the_backup_only_its_subject_is_known(tmp_path: Path) -> None:
    backup(recording(tmp_path))
    assert told(tmp_path, "pre").keys() == {"HOOK", "MACHINE", "REPOSITORY", "SECONDS"}


def test_after_a_failure_error_runs_and_knows_why(tmp_path: Path) -> None:
    error = errors.NoRepository(path="/srv/backup")
    with pytest.raises(errors.NoRepository):
        backup(recording(tmp_path), error)
    assert order(tmp_path) == ["pre", "error"]
    known = told(tmp_path, "error")
    assert (known["STATUS"], known["EXIT_CODE"], known["ERROR_CODE"]) == ("failed", "10", "no-repository")
    assert known["ERROR"] == str(error)


def test_a_pre_hook_that_fails_stops_the_backup_and_error_runs(tmp_path: Path) -> None:
    with pytest.raises(errors.HookFailed) as caught:
        backup(recording(tmp_path, fails="pre"), AssertionError("the backup was begun"))
    assert str(caught.value) == "The pre hook of web01 failed: sh ended with exit status 3."
    assert order(tmp_path) == ["pre", "error"]
    assert told(tmp_path, "error")["ERROR_CODE"] == "hook-failed"


def test_a_post_hook_that_fails_is_a_warning_and_no_lost_backup(tmp_path: Path) -> None:
    found = backup(recording(tmp_path, fails="post"))
    assert found.warnings == ["the post hook of web01 failed: sh ended with exit status 3"]
    assert order(tmp_path) == ["pre", "post"]


def test_an_error_hook_that_fails_does_not_hide_the_error(tmp_path: Path) -> None:
    with pytest.raises(errors.NoRepository) as caught:
        backup(recording(tmp_path, fails="error"), errors.NoRepository(path="/srv/backup"))
    assert caught.value.__notes__ == ["the error hook of web01 failed: sh ended with exit status 3"]


def test_without_hooks_nothing_runs() -> None:
    assert backup(Hooks()).warnings == []


def test_a_program_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(errors.HookFailed, match="failed: there is no program /no/such/hook"):
        backup(Hooks(pre=("/no/such/hook",)))
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(errors.HookFailed, match="ended with exit status"):
        backup(Hooks(pre=(str(tmp_path / "text"),)))


# -- what it is told and says ----------------------------------------------------------------


def test_no_password_reaches_a_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTIC_PASSWORD", "hunter2")
    monkeypatch.setenv("PULLBACK_PASSWORD_COMMAND", "echo hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("PULLBACK_POINT", "that of another backup")
    script = 'env >"$0"'
    backup(Hooks(pre=("sh", "-c", script, str(tmp_path / "env"))))
    found = (tmp_path / "env").read_text()
    assert "hunter2" not in found
    assert "that of another backup" not in found
    assert "HOME=" in found


def test_no_shell_takes_part(tmp_path: Path) -> None:
    backup(Hooks(pre=("sh", "-c", 'printf %s "$2" >"$1"', "sh", str(tmp_path / "said"), "$(echo no) a  b;c")))
    assert (tmp_path / "said").read_text() == "$(echo no) a  b;c"


def test_what_it_says_goes_to_standard_error_and_it_can_read_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    backup(Hooks(pre=("sh", "-c", "echo out; echo err >&2; cat")))
    said = capfd.readouterr()
    assert said.out == ""
    assert sorted(said.err.split()) == ["err", "out"]


def test_a_text_that_no_variable_can_hold_is_cut(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError):
        backup(recording(tmp_path), errors.UsageError(problem="a\0b" + "x" * 1_000_000))
    assert told(tmp_path, "error")["ERROR"] == ("ab" + "x" * 1_000_000)[:4096]


# -- its end ---------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    """Is a process dead (a zombie that nobody has waited for yet is)?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def pids(path: Path, count: int) -> list[int]:
    """The processes that a hook wrote down."""
    deadline = time.monotonic() + 5
    while not path.exists() or len(path.read_text().split()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(text) for text in path.read_text().split()]


def all_gone(found: list[int]) -> bool:
    """Are they, soon?"""
    deadline = time.monotonic() + 2
    while not all(map(gone, found)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return all(map(gone, found))


#: A hook with a child, both of which go on for ever.
_ENDLESS = 'sleep 300 & echo $! >>"$0"; echo $$ >>"$0"; wait'


def test_one_that_is_late_is_killed_with_its_children(tmp_path: Path) -> None:
    with pytest.raises(errors.HookFailed, match=r"sh did not end within 0\.3 s, and was killed"):
        backup(Hooks(pre=("sh", "-c", _ENDLESS, str(tmp_path / "pids")), timeout=0.3))
    assert all_gone(pids(tmp_path / "pids", 2))


@pytest.mark.parametrize("cause", [None, errors.Interrupted(), errors.Terminated()])
def test_when_we_are_to_end_it_ends_with_its_children_and_error_runs(
    tmp_path: Path, cause: errors.PullbackError | None
) -> None:
    chosen = Hooks(pre=("sh", "-c", _ENDLESS, str(tmp_path / "pids")), error=recording(tmp_path).error)

    async def interrupted() -> None:
        async def work() -> None:
            async with hooks.around(chosen, SUBJECT):
                raise AssertionError("the backup was begun")

        told: list[BaseException] = []
        INTERRUPTION.set(told)
        task = asyncio.create_task(work())
        await asyncio.to_thread(pids, tmp_path / "pids", 2)
        told += [cause] if cause else []
        task.cancel()
        await task

    begun = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    assert time.monotonic() - begun < 3
    assert all_gone(pids(tmp_path / "pids", 2))
    known = told(tmp_path, "error")
    expected = cause or errors.Terminated()
    assert (known["STATUS"], known["ERROR_CODE"]) == ("interrupted", expected.code)
    assert known["EXIT_CODE"] == str(int(expected.exit_code))


def test_one_that_ignores_sigterm_is_killed_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "GRACE_SECONDS", 0.2)
    script = f"trap '' TERM; {_ENDLESS}"
    with pytest.raises(errors.HookFailed, match="was killed"):
        backup(Hooks(pre=("sh", "-c", script, str(tmp_path / "pids")), timeout=0.2))
    assert all_gone(pids(tmp_path / "pids", 2))


def test_an_interruption_leaves_an_error_hook_little_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "INTERRUPTED_SECONDS", 0.2)
    chosen = Hooks(error=("sh", "-c", _ENDLESS, str(tmp_path / "pids")))
    with pytest.raises(asyncio.CancelledError) as caught:
        backup(chosen, asyncio.CancelledError())
    assert all_gone(pids(tmp_path / "pids", 2))
    assert "within 0.2 s" in caught.value.__notes__[0]


def test_a_signal_that_ends_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.HookFailed, match="sh ended with signal SIGKILL"):
        backup(Hooks(pre=("sh", "-c", "kill -9 $$")))


def test_it_is_in_a_group_of_its_own_so_that_ctrl_c_does_not_reach_it_before_us(tmp_path: Path) -> None:
    backup(Hooks(pre=("sh", "-c", 'cut -d" " -f5 /proc/$$/stat >"$0"; echo $$ >>"$0"', str(tmp_path / "group"))))
    group, own = (tmp_path / "group").read_text().split()
    assert group == own != str(os.getpgrp())


def test_when_we_are_killed_it_is_told_to_end(tmp_path: Path) -> None:
    code = f"""
import asyncio
from pullback.flows import hooks
asyncio.run(hooks.run(("sh", "-c", 'echo $$ >"$0"; exec sleep 300', {str(tmp_path / "pids")!r}), {{}}, 60))
"""
    with subprocess.Popen([sys.executable, "-c", code]) as us:
        found = pids(tmp_path / "pids", 1)
        us.kill()
    assert all_gone(found)


def test_the_page_has_each_variable(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `PULLBACK_(\w+)` \|.*\| ([a-z, ]+) \|$", page, re.MULTILINE)
    backup(recording(tmp_path))
    with pytest.raises(errors.NoRepository):
        backup(recording(tmp_path), errors.NoRepository(path="/srv/backup"))
    for hook in ("pre", "post", "error"):
        assert {name for name, where in rows if where == "all" or hook in where.split(", ")} == set(
            told(tmp_path, hook)
        )
