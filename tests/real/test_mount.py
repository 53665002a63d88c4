"""A restore point shown as files: what is read there, what programs make of it, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jsonkit import mismatches
from kit import MakeBox, run_cli
from pullback import errors
from pullback.cli import documents
from pullback.flows import mount_servant, mounting, servant, servants
from pullback.model.urls import ResticRepository
from pullback.programs import qemu
from pullback.serve import words
from pullback.units import KiB, MiB
from serverkit import Program, descendants, flip, living, run, running, until
from stored import Stored, content_of, store

SIZES = {"vda": 5 * MiB + 512, "vdb": 2 * MiB}
CONTENT = {target: content_of(size, seed) for seed, (target, size) in enumerate(SIZES.items())}
_FLASH = "if=pflash,format=raw,"


@pytest.fixture(scope="module", params=["restic", "dir"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Disks vda and vdb in each kind of repository."""
    return store(tmp_path_factory.mktemp(request.param), request.param, CONTENT)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory."""
    return tmp_path_factory.mktemp("mnt")


@pytest.fixture(scope="module")
def shown(stored: Stored, place: Path) -> Iterator[Program]:
    """Both disks, as files in `place`."""
    with running("mount", stored, "latest", place) as program:
        yield program
        assert program.quiet() == []
    assert list(place.iterdir()) == []


def test_what_it_says_of_itself(shown: Program, place: Path) -> None:
    assert mismatches(shown.result, documents.RESULTS["mount"][0].fields) == []
    assert [(Path(file["path"]).name, file["target"]) for file in shown.result["files"]] == [
        ("point.json", None),
        ("vda.raw", "vda"),
        ("vdb.raw", "vdb"),
    ]
    assert json.loads((place / "point.json").read_text())["machine"] == "web01"


@pytest.mark.parametrize("target", SIZES)
def test_the_files_are_the_disks(shown: Program, place: Path, target: str) -> None:
    path = place / f"{target}.raw"
    assert path.read_bytes() == CONTENT[target]
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_size) == (0o400, os.geteuid(), SIZES[target])
    if target == "vda":  # a MiB of it is a hole
        assert status.st_blocks * 512 == SIZES["vda"] - MiB
    assert stat.S_IMODE(place.stat().st_mode) == 0o500


def test_many_readers_at_once(shown: Program, place: Path) -> None:
    def one(number: int) -> bool:
        target = "vda" if number % 2 else "vdb"
        with open(place / f"{target}.raw", "rb", buffering=0) as file:
            return all(
                os.pread(file.fileno(), 70_000, at) == CONTENT[target][at : at + 70_000]
                for at in range(number * 1000, SIZES[target], 300_000)
            )

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, range(24)))


def test_programs_take_them_for_disks(shown: Program, place: Path, tmp_path: Path) -> None:
    assert "virtual size: 5" in run("qemu-img", "info", place / "vda.raw")
    (tmp_path / "vda").write_bytes(CONTENT["vda"])
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", place / "vda.raw", tmp_path / "vda")
    run("dd", f"if={place / 'vda.raw'}", f"of={tmp_path / 'out'}", "bs=64k", "iflag=direct")
    assert (tmp_path / "out").read_bytes() == CONTENT["vda"]


def test_a_loop_device_on_a_file(shown: Program, place: Path) -> None:
    device = run("losetup", "--read-only", "--find", "--show", place / "vdb.raw").strip()
    try:
        assert Path(device).read_bytes() == CONTENT["vdb"]
    finally:
        run("losetup", "--detach", device)


def test_nothing_can_be_changed(shown: Program, place: Path) -> None:
    for act in (
        lambda: (place / "vda.raw").open("r+b"),
        lambda: (place / "new").touch(),
        lambda: (place / "vda.raw").unlink(),
        lambda: (place / "vda.raw").chmod(0o600),
    ):
        with pytest.raises(OSError) as caught:
            act()
        assert caught.value.errno == errno.EROFS


def test_where_something_is_already_nothing_is_hidden(shown: Program, stored: Stored, place: Path) -> None:
    done = run_cli(
        "mount", "latest", place, "-r", stored.place.url, state=stored.directory / "state", environ=_environ(stored)
    )
    assert done.returncode == 2
    assert "is not empty" in done.stderr


def _environ(stored: Stored) -> dict[str, str]:
    return dict(stored.access.environ)


# -- the end ---------------------------------------------------------------------------------


def mounted(place: Path) -> bool:
    """Is anything mounted there?"""
    return any(line.split()[1] == str(place) for line in Path("/proc/mounts").read_text().splitlines())


@pytest.fixture
def restic(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """In restic's format only, where the kind makes no difference."""
    return store(tmp_path_factory.mktemp("restic"), "restic", CONTENT)


@pytest.fixture(autouse=True)
def _nothing_stays_mounted(tmp_path: Path) -> Iterator[None]:
    yield
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[1].startswith(f"{tmp_path}/"):
            subprocess.run(["fusermount3", "-u", "-z", line.split()[1]], timeout=20)


def test_unmounting_is_the_good_end(restic: Stored, tmp_path: Path) -> None:
    with running("mount", restic, "latest", tmp_path / "m", state=tmp_path / "s") as program:
        run("fusermount3", "-u", tmp_path / "m")
        assert program.process.wait(20) == 0
    assert list((tmp_path / "s" / "run").iterdir()) == []


def test_a_signal_unmounts_also_under_a_reader(stored: Stored, tmp_path: Path) -> None:
    signum = signal.SIGTERM if isinstance(stored.place, ResticRepository) else signal.SIGINT
    with running("mount", stored, "latest", tmp_path / "m") as program:
        below = descendants(program.process.pid)
        reader = os.open(tmp_path / "m" / "vda.raw", os.O_RDONLY)
        assert os.pread(reader, KiB, 0) == CONTENT["vda"][:KiB]
        assert program.end(signum) == 0
        with pytest.raises(OSError, match="not connected"):
            os.close(reader)
        assert not mounted(tmp_path / "m")
        assert living(below) == []


def test_after_sigkill_it_is_unmounted(restic: Stored, tmp_path: Path) -> None:
    with running("mount", restic, "latest", tmp_path / "m", ends=None) as program:
        program.end(signal.SIGKILL)
    until(lambda: not mounted(tmp_path / "m"), "its process unmounts")


def test_what_could_not_be_unmounted_the_next_unmounts(restic: Stored, tmp_path: Path) -> None:
    place = tmp_path / "m"
    with running("mount", restic, "latest", place, ends=None, state=tmp_path / "s") as program:
        below = descendants(program.process.pid)
        for pid in (program.process.pid, *below):
            os.kill(pid, signal.SIGSTOP)  # so that none can clean up
        for pid in (*below, program.process.pid):
            os.kill(pid, signal.SIGKILL)
        program.process.wait(20)
    with pytest.raises(OSError, match="not connected"):
        list(place.iterdir())
    with running("mount", restic, "latest", place, state=tmp_path / "s"):
        assert (place / "vdb.raw").read_bytes() == CONTENT["vdb"]
    assert not mounted(place)
    assert list((tmp_path / "s" / "run").iterdir()) == []


def test_the_death_of_what_shows_it_is_told_and_cleaned_up(tmp_path: Path) -> None:
    stored = store(tmp_path, "restic", {"vda": CONTENT["vdb"]})
    with running("mount", stored, "latest", tmp_path / "m", ends=1) as program:
        [pid] = descendants(program.process.pid)
        os.kill(pid, signal.SIGKILL)
        assert program.process.wait(20) == 1
    assert not mounted(tmp_path / "m")


# -- damage ----------------------------------------------------------------------------------


def test_a_damaged_block_is_an_io_error_just_there(tmp_path: Path) -> None:
    stored = store(tmp_path, "restic", CONTENT)
    pack = max((tmp_path / "repo" / "data").rglob("*"), key=lambda path: path.stat().st_size)
    flip(pack, pack.stat().st_size // 2)
    with running("mount", stored, "latest", tmp_path / "m") as program:
        bad = []
        for target, content in CONTENT.items():
            with open(tmp_path / "m" / f"{target}.raw", "rb", buffering=0) as file:
                for start in range(0, len(content), 64 * KiB):
                    got = _read(file.fileno(), start)
                    if got == errno.EIO:
                        bad.append((target, start // MiB))
                    else:
                        assert got == content[start : start + 64 * KiB]
        [(target, block)] = set(bad)
        event = program.event("point-damaged")
        assert (event["subject"], event["facts"]["start"]) == (target, block * MiB)


def _read(descriptor: int, start: int) -> bytes | int | None:
    """64 KiB, or the error's number."""
    try:
        return os.pread(descriptor, 64 * KiB, start)
    except OSError as error:
        return error.errno


def test_who_waits_for_the_repository_does_not_keep_the_end(tmp_path: Path) -> None:
    stored = store(tmp_path, "restic", CONTENT)
    with running("mount", stored, "latest", tmp_path / "m", "--patient") as program:
        for name in ("config", "data"):
            (tmp_path / "repo" / name).rename(tmp_path / name)
        with subprocess.Popen(["cat", tmp_path / "m" / "vda.raw"], stdout=subprocess.DEVNULL) as reader:
            program.event("point-away")
            assert program.end() == 0
            assert reader.wait(20) != 0
    assert not mounted(tmp_path / "m")


# -- firmware --------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [mount_servant.MOST_FIRMWARE, KiB], ids=["shown", "too large"])
def test_firmware_is_shown_unless_it_is_large(
    make_box: MakeBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """What is shown, without the kernel: the servant's own files."""
    code, variables = tmp_path / "code.fd", tmp_path / "vars.fd"
    code.write_bytes(bytes(192 * KiB) + qemu.halting_firmware())
    variables.write_bytes(random.Random(1).randbytes(528 * KiB))
    extra = [word for file in (f"readonly=on,file={code}", f"file={variables}") for word in ("-drive", _FLASH + file)]
    box = make_box(start=False, kind="restic", extra=extra)
    box.process = qemu.start(
        qemu.Machine(name=box.name, disks=box.disks, qmp=[box.qmp, box.other], hmp=box.hmp, extra=box.extra)
    )
    box.backup()
    monkeypatch.setattr(mount_servant, "MOST_FIRMWARE", most)

    async def look() -> dict[str, mount_servant.File]:
        async with servants.lent(box.place, box.access, "latest") as found:
            setup = found.setup(found.point.disks, tmp_path, cache=16 * MiB, patient=False)
            return mount_servant.files(servant.Servant(setup, words.Teller(os.open("/dev/null", os.O_WRONLY))))

    shown = asyncio.run(look())
    names = ["vda.raw", "vdb.raw", *(["pflash0.fd", "pflash1.fd"] if most > KiB else []), "point.json"]
    assert list(shown) == names
    if most > KiB:
        file = shown["pflash1.fd"]
        assert file.read(0, file.size) == variables.read_bytes()
        assert file.read(1000, 24) == variables.read_bytes()[1000:1024]


# -- what is refused --------------------------------------------------------------------------


def test_what_is_refused(stored: Stored, tmp_path: Path) -> None:
    async def enter(place: Path) -> None:
        request = mounting.Request(repository=stored.place, access=stored.access, directory=place)
        async with mounting.mounting(request):
            pass

    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for place, error in (
        (Path("relative"), errors.UsageError),
        (tmp_path / "full", errors.UsageError),
        (tmp_path / "file", errors.CannotWrite),
        (tmp_path / "no" / "where", errors.CannotWrite),
    ):
        with pytest.raises(error):
            asyncio.run(enter(place))
