"""The state of a machine's TPM in restore points, from a real swtpm beside a real QEMU."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import swtpm
from kit import Box, MakeBox, last_json
from pullback import errors
from pullback.engine import peers, tpm
from pullback.flows.backup import Report
from pullback.flows.repositories import opened
from pullback.model.tpm import Backend, TpmState, Version
from pullback.programs import qemu
from pullback.units import MiB

SECRET = b"what the disk is sealed with"
KINDS = ["dir", "restic"]


@contextmanager
def machine(make_box: MakeBox, kind: str, *words: str, single: bool = False) -> Iterator[tuple[Box, Path]]:
    """A running machine with a TPM that keeps a secret, and the directory of its state."""
    box = make_box(qemu.Disk(id="vda", path=Path("vda.qcow2")), kind=kind, start=False, size=MiB)
    place = box.directory / "tpm"
    place.mkdir()
    state = ("--tpmstate", f"backend-uri=file://{place}/one") if single else ("--tpmstate", f"dir={place}")
    with swtpm.alone(*state, *words) as alone:
        alone.keep(SECRET)
        alone.shutdown()
    with swtpm.beside(place, *words, state=state) as extra:
        box.extra = extra
        box.start()
        yield box, place
        box.quit()


def kept(box: Box) -> TpmState | None:
    """What the newest point has, proven."""
    with opened(box.place, box.access) as repository:
        return repository.tpm(repository.find("latest"))


def about(report: Report) -> list[str]:
    """What a backup says of the TPM."""
    return [note for note in report.notes if "TPM" in note]


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_keeps_the_state_of_the_tpm_and_with_it_what_the_tpm_keeps(
    make_box: MakeBox, kind: str, tmp_path: Path
) -> None:
    with machine(make_box, kind) as (box, place):
        report = box.backup()
        state = kept(box)
        assert state is not None
        assert (state.version, state.backend, state.encrypted) == (Version.TPM_2_0, Backend.DIR, False)
        assert {file.name: file.data for file in state.files} == {
            "tpm2-00.permall": (place / "tpm2-00.permall").read_bytes()
        }
        assert report.point.tpm == state.header
        assert about(report) == []
        assert box.verify().clean
        assert box.leftovers() == []
    for file in state.files:
        (tmp_path / file.name).write_bytes(file.data)
    with swtpm.alone("--tpmstate", f"dir={tmp_path}") as alone:
        assert alone.kept(len(SECRET)) == SECRET


def test_a_tpm_in_a_single_file(make_box: MakeBox, tmp_path: Path) -> None:
    with machine(make_box, "restic", single=True) as (box, _):
        assert about(box.backup()) == []
        state = kept(box)
    assert state is not None
    assert state.backend is Backend.FILE
    [file] = state.files
    (tmp_path / "one").write_bytes(file.data)
    with swtpm.alone("--tpmstate", f"backend-uri=file://{tmp_path}/one") as alone:
        assert alone.kept(len(SECRET)) == SECRET


def test_a_state_that_swtpm_encrypts_is_kept_and_it_is_said_that_its_key_is_not(make_box: MakeBox) -> None:
    key = Path("/dev/shm") / f"pb-key-{os.getpid()}"
    key.write_text("ab" * 32)
    try:
        box_key = ("--key", f"file={key},format=hex,mode=aes-256-cbc")
        with machine(make_box, "dir", *box_key) as (box, _):
            [note] = about(box.backup())
            assert "encrypted by swtpm" in note
            assert box.points()[0].tpm is not None
            assert box.points()[0].tpm.encrypted  # type: ignore[union-attr]
            assert note in box.points()[0].notes
    finally:
        key.unlink()


def test_a_machine_without_a_tpm_has_none(make_box: MakeBox) -> None:
    box = make_box(size=MiB)
    assert box.backup().point.tpm is None
    assert not any("TPM" in note for note in box.points()[0].notes)


# -- what cannot be read is said, and never hinders ------------------------------------------


def test_files_that_are_not_the_state_are_not_kept(make_box: MakeBox) -> None:
    with machine(make_box, "dir") as (box, place):
        file = place / "tpm2-00.permall"
        away = file.rename(place / "away")
        traps: list[Callable[[], object]] = [partial(file.symlink_to, away), partial(os.mkfifo, file), file.touch]
        traps.append(partial(huge, file))
        for trap in traps:
            trap()
            [note] = about(box.backup())
            assert note.startswith("the TPM's state is not kept: ")
            assert box.points()[-1].tpm is None
            assert note in box.points()[-1].notes
            file.unlink()
        assert "no tpm2-00.permall" in about(box.backup())[0]
        assert box.restored() == box.image()
        away.rename(file)
        assert about(box.backup()) == []


def huge(file: Path) -> None:
    """More than any TPM has."""
    with open(file, "wb") as made:
        made.truncate(9 * MiB)


def test_a_swtpm_that_died_is_no_reason_to_fail(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("vda.qcow2")), start=False, size=MiB)
    with swtpm.beside(box.directory) as extra:
        box.extra = extra
        box.start()
    [note] = about(box.backup())
    assert "no swtpm" in note
    box.kill()


def test_the_warning_is_in_the_command_s_report(make_box: MakeBox) -> None:
    with machine(make_box, "dir") as (box, place):
        away = (place / "tpm2-00.permall").rename(place / "away")
        done = box.cli("backup", f"qmp:{box.qmp}", "-r", box.place.url, "--json")
        assert done.returncode == 0, done.stderr
        assert any("TPM" in note for note in last_json(done.stdout)["notes"])
        shown = json.loads(box.cli("show", "-r", box.place.url, "--json").stdout)
        assert shown["point"]["tpm"] is None
        away.rename(place / "tpm2-00.permall")


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_was_damaged_in_the_repository_is_found(make_box: MakeBox, kind: str) -> None:
    with machine(make_box, kind) as (box, _):
        box.backup()
    if kind == "dir":
        [file] = box.repository.glob("*/*/*.tpm")
        data = bytearray(file.read_bytes())
        data[7] ^= 1
        file.write_bytes(data)
    else:
        for pack in box.repository.glob("data/*/*"):
            pack.chmod(0o600)
            data = bytearray(pack.read_bytes())
            data[len(data) // 4] ^= 1
            pack.write_bytes(data)
    assert not box.verify(read_data=True).clean
    if kind == "dir":
        with pytest.raises(errors.VerificationFailed, match="TPM"):
            kept(box)


# -- reading a place -------------------------------------------------------------------------


def place_at(path: Path, backend: Backend = Backend.DIR) -> tpm.Place:
    """As if this process were the swtpm."""
    return tpm.Place(pid=os.getpid(), version=Version.TPM_2_0, backend=backend, path=path, encrypted=False)


def test_all_kinds_of_files_are_kept_and_no_others(tmp_path: Path) -> None:
    for name in ("tpm2-00.permall", "tpm2-00.volatilestate", "TMP2-00.permall", ".lock", "tpm-00.permall", "id_rsa"):
        (tmp_path / name).write_text(name)
    assert [file.name for file in tpm.read(place_at(tmp_path)).files] == ["tpm2-00.permall", "tpm2-00.volatilestate"]


def test_a_relative_path_is_below_the_process_s_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tpm2-00.permall").write_text("x")
    assert tpm.read(place_at(Path("."))).files[0].data == b"x"


def test_a_file_system_that_is_not_local_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'proc' is not a local one"):
        tpm.read(place_at(Path("/proc/self"), Backend.DIR))


def test_both_ends_of_a_connection_are_known() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ends = peers.connections()
        numbers = [os.fstat(end.fileno()).st_ino for end in (ours, theirs)]
        assert [ends[number] for number in numbers] == numbers[::-1]
    assert os.getpid() not in peers.of(os.getpid())
