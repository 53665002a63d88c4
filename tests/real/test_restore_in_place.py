"""Devices and servers that hold something else: zeroed in few requests, discarded if that is asked for, flushed."""

from __future__ import annotations

import random
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from kit import last_json
from pullback import errors
from pullback.testing.endpoints import nbdkit
from pullback.units import KiB, MiB
from stored import JUNK, Stored, loop_device, store

SIZE = 8 * MiB


def checkered() -> bytes:
    """Every other 64 KiB is zero."""
    unit = random.Random(1).randbytes(64 * KiB) + bytes(64 * KiB)
    return unit * (SIZE // len(unit))


@pytest.fixture(scope="module", params=["restic", "dir"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A disk with many holes, in each kind of repository."""
    return store(tmp_path_factory.mktemp(request.param), request.param, {"vda": checkered()})


@pytest.fixture(scope="module")
def restic(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The same in restic's format only, where the kind makes no difference."""
    return store(tmp_path_factory.mktemp("restic-only"), "restic", {"vda": checkered()})


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESTIC_PASSWORD", "secret")
    monkeypatch.setenv("PULLBACK_CACHE_DIR", str(tmp_path / "cli-cache"))


def junk(directory: Path, size: int) -> Path:
    """A file full of junk."""
    image = directory / "served.img"
    image.write_bytes(bytes([JUNK]) * size)
    return image


def requests(log: Path) -> Counter[str]:
    """How often each kind of request was made, by nbdkit's log."""
    return Counter(re.findall(r"connection=\d+ (Read|Write|Zero|Trim|Flush) id=\d+ ", log.read_text()))


# -- zeroes ----------------------------------------------------------------------------------


def zeroes(stored: Stored, directory: Path, *settings: str) -> tuple[int, str]:
    """Restore to a server that has something else; how many requests for zeroes were made, and the log."""
    log = directory / "log"
    filters = ["--filter=log", "--filter=nozero"] if settings else ["--filter=log"]
    plugin = ["data", f"data=0xa5*{SIZE + MiB}", f"logfile={log}", *settings]
    with nbdkit(directory / "nbd.sock", *filters, *plugin) as (to, _):
        stored.one(to.uri, check=True)
    asked = requests(log)
    assert asked["Flush"] >= 1
    return asked["Zero"], log.read_text()


def test_a_server_that_zeroes_fast_is_zeroed_at_once(stored: Stored, short_dir: Path) -> None:
    count, log = zeroes(stored, short_dir)
    assert count == 1
    assert "fast=1" in log


def test_a_server_that_does_not_gets_each_run_of_zeroes(stored: Stored, short_dir: Path) -> None:
    count, log = zeroes(stored, short_dir, "zeromode=plugin", "fastzeromode=none")
    assert count == SIZE // (128 * KiB)
    assert "fast=1" not in log


def test_a_server_that_says_it_is_not_fast_after_all(restic: Stored, short_dir: Path) -> None:
    count, _ = zeroes(restic, short_dir, "zeromode=plugin", "fastzeromode=slow")
    assert count == 1 + SIZE // (128 * KiB)


def test_a_server_that_knows_no_zeroes_has_them_written(restic: Stored, short_dir: Path) -> None:
    assert zeroes(restic, short_dir, "zeromode=none")[0] == 0


def test_of_a_larger_device_the_disk_s_part_is_zeroed(stored: Stored, tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", SIZE + MiB) as device:
        stored.one(str(device), force=True, check=True)
        assert device.read_bytes() == checkered() + bytes([JUNK]) * MiB
    assert (tmp_path / "image").stat().st_blocks * 512 < SIZE * 3 // 4


def test_nothing_is_zeroed_before_the_disk_is_known_to_be_readable(tmp_path: Path, short_dir: Path) -> None:
    found = store(tmp_path, "restic", {"vda": checkered()})
    min((tmp_path / "repo").glob("data/*/*"), key=lambda path: path.stat().st_size).unlink()  # the trees
    image = junk(short_dir, SIZE)
    with (
        nbdkit(short_dir / "nbd.sock", "file", f"file={image}") as (address, _),
        pytest.raises(errors.VerificationFailed),
    ):
        found.one(address.uri)
    assert image.read_bytes() == bytes([JUNK]) * SIZE


# -- discarding ------------------------------------------------------------------------------


def test_a_device_is_discarded_whole_if_that_is_asked_for(restic: Stored, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with loop_device(image, SIZE + 4 * MiB) as device:
        done = restic.cli("--to", f"vda={device}", "--force", "--check", "--discard", "--json")
        assert done.returncode == 0, done.stderr
        assert device.read_bytes()[:SIZE] == checkered()
        [note] = last_json(done.stdout)["notes"]
        assert note == f"vda: {device} is larger; its last 4.00 MiB were discarded, and are undefined"
    allocated = image.stat().st_blocks * 512
    assert allocated < SIZE * 3 // 4, "the rest is still there"


def test_a_server_is_discarded_whole_if_that_is_asked_for(restic: Stored, short_dir: Path) -> None:
    image, log = junk(short_dir, SIZE + MiB), short_dir / "log"
    words = ("--filter=log", "file", f"file={image}", f"logfile={log}")
    with nbdkit(short_dir / "nbd.sock", *words) as (address, _):
        assert restic.one(address.uri, discard=True).behind == MiB
    assert image.read_bytes()[:SIZE] == checkered()
    assert requests(log)["Trim"] == 1
    assert f"offset=0x0 count={SIZE + MiB:#x}" in log.read_text()


def test_a_server_that_knows_no_discard_is_told(restic: Stored, short_dir: Path) -> None:
    image = junk(short_dir, SIZE)
    script = "--filter=noextents"
    words = (script, "eval", f"get_size=echo {SIZE}", *_file(image), "can_flush=exit 3")
    with nbdkit(short_dir / "nbd.sock", *words) as (address, _):
        report = restic.restore({"vda": place(address.uri)}, discard=True)
    assert image.read_bytes() == checkered()
    assert [note.split(" ", 2)[2] for note in report.notes] == [
        "cannot be told to flush, so whether all is durable there is not known",
        "knows no discard",
    ]


def place(uri: str) -> object:
    """A place."""
    from pullback.flows import destinations

    return destinations.parse(uri)


def _file(image: Path) -> tuple[str, ...]:
    """A file served by shell commands (nbdkit-eval-plugin)."""
    return (
        f"pread=dd if={image} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
        f"pwrite=dd of={image} oflag=seek_bytes seek=$4 conv=notrunc status=none",
        "can_write=exit 0",
    )


# -- flushing --------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "kind"), [("EIO", errors.EndpointFailed), ("ENOSPC", errors.DestinationFull)])
def test_a_flush_that_fails_is_a_failed_restore(
    restic: Stored, short_dir: Path, answer: str, kind: type[errors.PullbackError]
) -> None:
    image = junk(short_dir, SIZE)
    flush = f"flush=echo {answer} no such luck >&2; exit 1"
    words = ("--filter=noextents", "eval", f"get_size=echo {SIZE}", *_file(image), "can_flush=exit 0", flush)
    with nbdkit(short_dir / "nbd.sock", *words) as (address, _):
        with pytest.raises(kind) as caught:
            restic.one(address.uri)
        assert any("undefined" in note for note in caught.value.__notes__)
        done = restic.cli("--to", f"vda={address.uri}", "--json")
    assert done.returncode == 1
    assert last_json(done.stdout)["code"] == kind.code


def test_a_device_whose_flush_fails_is_a_failed_restore(restic: Stored, short_dir: Path) -> None:
    """The kernel's page cache takes everything; only the flush at the end tells that the device is gone."""
    image = short_dir / "backing"
    tmpfs = short_dir / "small"
    tmpfs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmpfs], check=True, timeout=20)
    try:
        image = tmpfs / "image"
        with open(image, "wb") as file:
            file.truncate(SIZE)  # a thin device, of which there is less than it says
        attached = subprocess.run(
            ["losetup", "-f", "--show", image], check=True, capture_output=True, text=True, timeout=20
        )
        device = attached.stdout.strip()
        try:
            with pytest.raises((errors.EndpointFailed, errors.DestinationFull)) as caught:
                restic.one(device, force=True)
            assert any("undefined" in note for note in caught.value.__notes__)
        finally:
            subprocess.run(["losetup", "-d", device], check=True, timeout=20)
    finally:
        subprocess.run(["umount", tmpfs], check=True, timeout=20)
