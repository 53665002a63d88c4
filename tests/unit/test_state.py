"""Locks and job records: who holds what, and records that were tampered with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pullback import errors, state

HOLD = """
import sys
from pathlib import Path
from pullback import state
with state.lock(state.directories(Path(sys.argv[1])), "it", command="backup to /srv", title="web01"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def directories(tmp_path: Path) -> state.Directories:
    """Directories of their own."""
    return state.directories(tmp_path / "state")


def taken(directories: state.Directories) -> None:
    """Take the lock, and let go of it."""
    with state.lock(directories, "it", command="info", title="web01"):
        pass


# -- locks -----------------------------------------------------------------------------------


def test_a_lock_is_held_against_other_processes_and_ends_with_its_holder(directories: state.Directories) -> None:
    line = [sys.executable, "-c", HOLD, str(directories.state)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(errors.BusyError) as caught:
            taken(directories)
        assert caught.value.what == "web01"
        assert caught.value.holder.startswith(f"backup to /srv, process {holder.pid}, since ")
        holder.kill()
        holder.wait(10)
    taken(directories)


def test_locks_of_different_things_do_not_meet(directories: state.Directories) -> None:
    with state.lock(directories, "another", command="info", title="db01"):
        taken(directories)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff", b"null"])
def test_a_lock_file_with_anything_in_it_still_locks(directories: state.Directories, text: bytes) -> None:
    with state.lock(directories, "it", command="info", title="web01"):
        [path] = (directories.state / "locks").iterdir()
        path.write_bytes(text)
        with pytest.raises(errors.BusyError) as caught:
            taken(directories)
    assert caught.value.holder == "another pullback process"


def test_a_state_directory_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(errors.CannotWrite):
        taken(state.directories(tmp_path / "state"))


# -- records ---------------------------------------------------------------------------------


def begun(directories: state.Directories) -> state.Job:
    """A job."""
    return state.begin_job(
        directories, job="0123abcd", socket=Path("/run/web01.sock"), machine="web01", command="backup", qemu="7:9"
    )


def test_a_record_is_read_back_as_it_was_saved(directories: state.Directories) -> None:
    job = begun(directories)
    job.record.paused_by_us = True
    job.record.scratch.append("/var/lib/pullback/scratch/pullback-0123abcd-scr0")
    job.save()
    loaded = state.load_job(job.path)
    assert loaded is not None
    assert asdict(loaded.record) == asdict(job.record)
    assert (job.path.stat().st_mode & 0o777, Path(job.record.runtime).stat().st_mode & 0o777) == (0o600, 0o700)


def test_jobs_are_found_by_socket_or_by_machine(directories: state.Directories) -> None:
    begun(directories)
    found = [
        len(state.jobs_of(directories, socket=Path(socket), machine=machine))
        for socket, machine in [("/run/web01.sock", "x"), ("/x", "web01"), ("/x", "x")]
    ]
    assert found == [1, 1, 0]


def test_a_removed_job_is_gone_and_removing_twice_is_fine(directories: state.Directories) -> None:
    job = begun(directories)
    job.remove()
    job.remove()
    assert state.jobs_of(directories, socket=Path("/run/web01.sock"), machine="web01") == []


@pytest.mark.parametrize(
    "change",
    [
        {"scratch": ["/etc/passwd"]},
        {"scratch": ["/srv/pullback-ffffffff-scr0"]},
        {"scratch": ["/srv/pullback-0123abcd-x/../../etc/passwd"]},
        {"scratch": "/etc"},
        {"scratch": [7]},
        {"runtime": "/"},
        {"runtime": "/home"},
        {"runtime": 7},
        {"job": "../../x"},
        {"job": "0123ABCD"},
        {"job": 7},
        {"job": None},
        {"paused_by_us": "yes"},
        {"paused_by_us": 1},
        {"socket": None},
        {"machine": []},
        {"qemu": 7},
        {"pid": "x"},
    ],
)
def test_a_record_that_was_tampered_with_is_none(directories: state.Directories, change: dict[str, Any]) -> None:
    job = begun(directories)
    job.path.write_text(json.dumps(asdict(job.record) | change))
    assert state.load_job(job.path) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
FIELDS = [
    "job",
    "socket",
    "machine",
    "command",
    "pid",
    "started",
    "qemu",
    "paused_by_us",
    "scratch",
    "runtime",
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(JSON, st.fixed_dictionaries({}, optional={name: JSON for name in FIELDS})))
def test_a_hostile_record_is_never_believed(tmp_path: Path, content: object) -> None:
    path = tmp_path / "0123abcd.json"
    path.write_text(json.dumps(content))
    job = state.load_job(path)
    assert job is None or all(isinstance(item, str) for item in (job.record.job, job.record.socket, job.record.runtime))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"job": '])
def test_a_record_that_is_no_json_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "0123abcd.json"
    path.write_bytes(content)
    assert state.load_job(path) is None


# -- places ----------------------------------------------------------------------------------


def test_places_for_root_and_for_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PULLBACK_STATE_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert state.directories().state == Path("/var/lib/pullback")
    assert state.directories().runtime == Path("/run/pullback")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_STATE_HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert state.directories().state == tmp_path / ".local/state/pullback"
    monkeypatch.setenv("XDG_STATE_HOME", "/srv/s")
    assert state.directories().scratch == Path("/srv/s/pullback/scratch")


def test_the_option_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULLBACK_STATE_DIR", "/from/environment")
    assert state.directories().state == Path("/from/environment")
    assert state.directories(Path("/from/option")).cache == Path("/from/option/cache")
