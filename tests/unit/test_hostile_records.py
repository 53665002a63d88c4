"""Records of what lasts are outside input: believed wholly or not at all, and never a traceback."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pullback import state
from pullback.engine import monitor, opened, serving
from pullback.model.backups import Fleecing, Window
from pullback.model.checkpoints import Mark
from pullback.model.exports import Served, ServerAddress
from pullback.model.snapshots import Kind, OpenSnapshot, SnapshotDisk, from_dict
from pullback.state import history
from pullback.state.serving import Register, Serving

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\0") | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
MARK = Mark(name="monday", nonce="0123456789abcdef", first=1, last=1)
JOB = "0123abcd"
SNAPSHOT = OpenSnapshot(
    name="s",
    job=JOB,
    kind=Kind.SNAPSHOT,
    machine="web01",
    moment=datetime(2026, 1, 1, tzinfo=UTC),
    window=Window(),
    disks=(
        SnapshotDisk(
            target="vda",
            size=4096,
            node="vda-format",
            view=f"pullback-{JOB}-scr0",
            fleecing=Fleecing.CLASSIC,
            reason="as asked for",
            scratch=f"/srv/pullback-{JOB}-scr0",
            checkpoint=MARK,
            newest=MARK,
            copy=f"pullback-{JOB}-dirty0",
        ),
    ),
)
ADDRESS = ServerAddress(socket="/run/nbd.sock")
SERVED = Served(
    id=f"pullback-{JOB}-exp0",
    job=JOB,
    name="vda",
    target="vda",
    snapshot="s",
    writable=False,
    contexts=(("qemu:dirty-bitmap:x", "monday"),),
    address=ADDRESS,
)
SERVING = Serving(qemu="7:9", address=ADDRESS, exports=(SERVED,))
quick = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    found = [path]
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def changed(values: Any, path: tuple[Any, ...], junk: Any) -> Any:
    """The same with junk in one place."""
    if not path:
        return junk
    copy = dict(values) if isinstance(values, dict) else list(values)
    copy[path[0]] = changed(values[path[0]], path[1:], junk)
    return copy


def plain(values: Any) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(values, default=str))


@pytest.fixture
def job(tmp_path: Path) -> state.Job:
    """A lasting job's record."""
    places = state.directories(tmp_path / "state")
    made = state.begin_job(places, job=JOB, socket=Path("/run/w.sock"), machine="web01", command="c", qemu="7:9")
    made.record.open = SNAPSHOT.to_dict()
    made.record.scratch = [f"/srv/pullback-{JOB}-scr0"]
    made.record.checkpoints = [MARK.bitmap]
    made.save()
    return made


def test_a_sound_record_is_believed(job: state.Job) -> None:
    found = state.load_job(job.path)
    assert found is not None
    assert opened.parsed(found) == SNAPSHOT
    assert opened.lasting(found, "7:9")
    assert not opened.lasting(found, "8:9")


@pytest.mark.parametrize("ends", [state.UNDO, state.KEEP])
def test_what_is_being_made_or_ended_does_not_last(job: state.Job, ends: str) -> None:
    job.record.ends = ends
    assert not opened.lasting(job, "7:9")


@quick
@given(data=st.data())
def test_a_record_with_junk_in_it_is_taken_or_not(job: state.Job, data: st.DataObject) -> None:
    values = plain(asdict(job.record))
    path = data.draw(st.sampled_from(places(values)))
    junk = data.draw(JUNK)
    job.path.write_text(json.dumps(changed(values, path, junk)))
    found = state.load_job(job.path)
    if found is None:
        return
    for text in (found.record.machine, found.record.socket, found.record.frozen_agent, *found.record.scratch):
        Path(text).exists()  # the system can take it
        text.encode()
    state.machine_directory(Path("/"), found.record.machine)
    serving.private_socket(found)
    monitor.process_lives(found.record.qemu)
    lasting = opened.parsed(found)
    assert lasting is None or from_dict(plain(lasting.to_dict())) == lasting


@quick
@given(data=st.data())
def test_a_servers_record_with_junk_in_it_is_taken_or_not(tmp_path: Path, data: st.DataObject) -> None:
    register = Register(tmp_path, "web01")
    register.save(SERVING)
    assert register.load("7:9") == SERVING
    values = json.loads(register.path.read_bytes())
    register.path.write_text(json.dumps(changed(values, data.draw(st.sampled_from(places(values))), data.draw(JUNK))))
    found = register.load()
    if found is not None:
        monitor.process_lives(found.qemu)
        register.save(found)
        assert register.load() == found
        serving.forget_dead(register)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"null", b'{"qemu": "\\ud800"}', b"\xff"])
def test_what_is_no_record_at_all_is_none(job: state.Job, tmp_path: Path, text: bytes) -> None:
    register = Register(tmp_path, "web01")
    register.save(SERVING)
    for path in (job.path, register.path):
        path.write_bytes(text)
    assert state.load_job(job.path) is None
    assert register.load() is None


def test_a_servers_record_that_names_a_file_costs_nobody_that_file(tmp_path: Path) -> None:
    precious, register = tmp_path / "precious", Register(tmp_path, "web01")
    precious.write_text("mine")
    register.save(Serving(qemu="1:1", address=ServerAddress(socket=str(precious))))
    serving.forget_dead(register)
    assert precious.read_text() == "mine"
    assert register.load() is None


@quick
@given(data=st.data())
def test_the_last_jobs_record_with_junk_in_it_is_taken_or_not(tmp_path: Path, data: st.DataObject) -> None:
    history.save(tmp_path, "web01", opened.ended(SNAPSHOT, error="no room"))
    path = state.machine_directory(tmp_path, "web01") / "last-job.json"
    values = json.loads(path.read_bytes())
    path.write_text(json.dumps(changed(values, data.draw(st.sampled_from(places(values))), data.draw(JUNK))))
    found = history.load(tmp_path, "web01")
    assert found is None or isinstance(found.success, bool)


@pytest.mark.parametrize("token", ["", "x", "²:1", "٣:1", "9" * 5000 + ":1", "1", ":", "-1:1"])
def test_a_process_that_cannot_be_does_not_live(token: str) -> None:
    assert not monitor.process_lives(token)


def test_a_record_under_another_jobs_name_is_nobodys(job: state.Job, tmp_path: Path) -> None:
    job.path.rename(job.path.with_name("ffffffff.json"))
    assert state.jobs_of(state.directories(tmp_path / "state"), socket=Path("/run/w.sock"), machine="web01") == []
