"""Journals of rollbacks: found by the files of their disks, believed wholly or not at all, and swept when dead."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pullback import errors
from pullback.model.rollbacks import FileIdentity, Journal, JournalDisk, Phase, from_dict
from pullback.state import rollbacks

JOB = "0123abcd"
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\0") | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def journal(base: Path, *files: Path, phase: Phase = Phase.WRITING) -> Journal:
    """One, with a disk in these files."""
    place = rollbacks.directory(base, JOB)
    identities = tuple(found for path in files if (found := rollbacks.identity(path)) is not None)
    disk = JournalDisk(
        target="vda", qdev="vda", size=8 << 20, block_size=1 << 20, digest="0" * 64, files=identities,
        staged=str(place / f"pullback-{JOB}-stage0"), hashes=str(place / "hashes0"), wanted=str(place / "wanted0"),
    )  # fmt: skip
    return Journal(
        job=JOB, machine="web01", phase=phase, point="20261124T060018Z-1f2e3d4c", asked="latest", repository="/r",
        began="2026-11-24T06:00:18+00:00", command="pullback rollback …", disks=(disk,),
    )  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow2"
    path.write_bytes(b"disk")
    return path


def test_what_is_saved_is_loaded(tmp_path: Path, image: Path) -> None:
    saved = journal(tmp_path, image)
    rollbacks.save(tmp_path, saved)
    assert rollbacks.load(tmp_path, JOB) == saved
    assert rollbacks.every(tmp_path) == [saved]
    assert rollbacks.load(tmp_path, "00000000") is None


def test_disks_are_found_by_their_files(tmp_path: Path, image: Path) -> None:
    rollbacks.save(tmp_path, journal(tmp_path, image))
    link = tmp_path / "link"
    link.symlink_to(image)
    other = tmp_path / "other"
    other.write_bytes(b"disk")
    moved = image.rename(tmp_path / "moved")
    image.write_bytes(b"new")  # what has its old name now is another file
    assert rollbacks.concerning(tmp_path, [moved], "x")
    for free in (image, other, link, tmp_path / "nothing"):
        assert rollbacks.concerning(tmp_path, [free], "web01") is None, free
    with pytest.raises(errors.RollbackPending, match="half rolled back to 20261124T060018Z-1f2e3d4c"):
        rollbacks.require_none(tmp_path, [other, moved], "x")


def test_disks_whose_files_cannot_be_seen_are_known_by_the_machine(tmp_path: Path, image: Path) -> None:
    rollbacks.save(tmp_path, journal(tmp_path))
    assert rollbacks.concerning(tmp_path, [], "db01") is None
    assert rollbacks.concerning(tmp_path, [image], "web01")


@pytest.mark.parametrize(
    ("known", "found", "same"),
    [
        (FileIdentity(path="/a", device=1, inode=2), FileIdentity(path="/b", device=1, inode=2), True),
        # The host was started anew, and its devices have other numbers.
        (FileIdentity(path="/a", device=1, inode=2), FileIdentity(path="/a", device=9, inode=2), True),
        (FileIdentity(path="/a", device=1, inode=2), FileIdentity(path="/a", device=1, inode=3), False),
        (FileIdentity(path="/a", device=1, inode=2), FileIdentity(path="/b", device=9, inode=2), False),
        (
            FileIdentity(path="/dev/dm-1", device=5, inode=2, block=7),
            FileIdentity(path="/dev/x", device=5, inode=9, block=7),
            True,
        ),
        (
            FileIdentity(path="/dev/vg/a", device=5, inode=2, block=7),
            FileIdentity(path="/dev/vg/a", device=6, inode=9, block=8),
            True,
        ),
        (
            FileIdentity(path="/dev/x", device=5, inode=2, block=7),
            FileIdentity(path="/dev/y", device=5, inode=2, block=8),
            False,
        ),
        (FileIdentity(path="/a", device=1, inode=2), FileIdentity(path="/a", device=1, inode=2, block=7), False),
    ],
)
def test_what_is_the_same_file(known: FileIdentity, found: FileIdentity, same: bool) -> None:
    assert rollbacks.same(known, found) is same


def test_only_writing_blocks_others(tmp_path: Path, image: Path) -> None:
    for phase in Phase:
        rollbacks.save(tmp_path, journal(tmp_path, image, phase=phase))
        assert rollbacks.is_writing(tmp_path, JOB) is (phase is Phase.WRITING)
        assert (rollbacks.concerning(tmp_path, [image], "x") is None) is (phase in (Phase.STAGING, Phase.OVER))
        if phase is Phase.WRITING:
            with pytest.raises(errors.RollbackPending):
                rollbacks.require_none(tmp_path, [image], "x")
            with rollbacks.living(tmp_path, JOB), pytest.raises(errors.BusyError):
                rollbacks.require_none(tmp_path, [image], "x")
        else:
            rollbacks.require_none(tmp_path, [image], "x")


def test_what_the_dead_left_is_swept_but_not_what_is_half_written(tmp_path: Path, image: Path) -> None:
    for phase in (Phase.STAGING, Phase.WRITTEN, Phase.OVER):
        made = journal(tmp_path, image, phase=phase)
        with rollbacks.living(tmp_path, JOB) as place:
            rollbacks.save(tmp_path, made)
            Path(made.disks[0].staged).write_bytes(b"x")
            rollbacks.sweep(tmp_path)
            assert Path(made.disks[0].staged).exists()
        rollbacks.sweep(tmp_path)
        assert not place.exists()
    with rollbacks.living(tmp_path, JOB) as place:  # killed before it wrote anything down
        pass
    rollbacks.sweep(tmp_path)
    assert not place.exists()
    rollbacks.save(tmp_path, journal(tmp_path, image))
    rollbacks.sweep(tmp_path)
    assert rollbacks.load(tmp_path, JOB)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with rollbacks.living(tmp_path, JOB), pytest.raises(errors.BusyError), rollbacks.living(tmp_path, JOB):
        pass
    with rollbacks.living(tmp_path, JOB):
        assert rollbacks.lives(tmp_path, JOB)
    assert not rollbacks.lives(tmp_path, JOB)
    assert not rollbacks.lives(tmp_path, "00000000")


def test_only_what_carries_the_jobs_name_is_removed(tmp_path: Path, image: Path) -> None:
    """A journal that was tampered with does not remove other files."""
    saved = journal(tmp_path, image)
    [disk] = saved.disks
    spoilt = replace(saved, disks=(replace(disk, staged=str(image)),))
    rollbacks.save(tmp_path, spoilt)
    rollbacks.remove(tmp_path, spoilt)
    assert image.exists()
    assert rollbacks.every(tmp_path) == []


def spoilt(record: dict[str, Any], junk: object, where: int) -> None:
    """One value of it, at any depth."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(record)
    owner, key = places[where % len(places)]
    owner[key] = junk


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(junk=JUNK, where=st.integers(0, 1000))
def test_junk_is_refused_or_believed_and_never_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, junk: object, where: int
) -> None:
    base = tmp_path_factory.mktemp("j")
    saved = journal(base, base)
    record = json.loads(json.dumps(saved.to_dict()))
    spoilt(record, junk, where)
    rollbacks.save(base, saved)
    [path] = base.glob("rollbacks/*/journal.json")
    path.write_text(json.dumps(record))
    try:
        found = rollbacks.load(base, JOB)
    except errors.JournalDamaged:
        return
    assert found is not None
    assert from_dict(found.to_dict()) == found
    rollbacks.concerning(base, [base], "web01")
    rollbacks.remove(base, found)
