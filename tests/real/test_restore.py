"""Restoring to every kind of place, from both kinds of repository, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kit import last_json
from mounts import Mount, fill
from pullback import errors
from pullback.flows import destinations
from pullback.flows import restore as flow
from pullback.programs import qemu_nbd
from pullback.testing.endpoints import nbdkit
from pullback.units import KiB, MiB
from stored import JUNK as _JUNK
from stored import Stored, content_of, loop_device, store

SIZES = {"vda": 5 * MiB + 512, "vdb": 2 * MiB}

CONTENT = {target: content_of(size, seed) for seed, (target, size) in enumerate(SIZES.items())}


@pytest.fixture(scope="module", params=["restic", "dir"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Disks vda and vdb in each kind of repository."""
    return store(tmp_path_factory.mktemp(request.param), request.param, CONTENT)


@pytest.fixture(scope="module")
def restic(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The same in restic's format only, where the kind makes no difference."""
    return store(tmp_path_factory.mktemp("restic"), "restic", CONTENT)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESTIC_PASSWORD", "secret")
    monkeypatch.setenv("PULLBACK_CACHE_DIR", str(tmp_path / "cli-cache"))


@contextlib.contextmanager
def junk_server(directory: Path, size: int, *words: str) -> Iterator[tuple[str, Path]]:
    """An NBD server of a file full of junk: its URI, and the file."""
    image = directory / "served.img"
    image.write_bytes(bytes([_JUNK]) * size)
    with nbdkit(directory / "nbd.sock", *words, "file", f"file={image}") as (address, _):
        yield address.uri, image


def plain(image: Path) -> bytes:
    """The content of a qcow2 image."""
    raw = image.with_suffix(".converted")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw], check=True, timeout=30)
    return raw.read_bytes()


# -- exact bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("check", [False, True], ids=["", "checked"])
def test_a_raw_file_is_the_disk_and_has_holes(stored: Stored, tmp_path: Path, check: bool) -> None:
    done = stored.one(str(tmp_path / "a.raw"), check=check)
    assert (done.path, done.size, done.checked) == (tmp_path / "a.raw", SIZES["vda"], check)
    assert done.path.read_bytes() == CONTENT["vda"]
    assert done.path.stat().st_blocks * 512 <= SIZES["vda"] - MiB
    assert done.path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["a.raw"]


@pytest.mark.parametrize("check", [False, True], ids=["", "checked"])
def test_a_qcow2_file_is_the_disk(stored: Stored, tmp_path: Path, check: bool) -> None:
    done = stored.one(str(tmp_path / "a.qcow2"), check=check)
    assert done.format is flow.Format.QCOW2
    assert plain(done.path) == CONTENT["vda"]
    subprocess.run(["qemu-img", "check", "-q", done.path], check=True, timeout=20)
    assert sorted(os.listdir(tmp_path)) == ["a.converted", "a.qcow2"]


@pytest.mark.parametrize("extra", [0, MiB + 512], ids=["just as large", "larger"])
def test_a_block_device_is_the_disk_and_its_rest_is_left_alone(stored: Stored, tmp_path: Path, extra: int) -> None:
    with loop_device(tmp_path / "image", SIZES["vda"] + extra) as device:
        done = stored.one(str(device), force=True, check=True)
        with open(device, "rb") as file:
            assert file.read(SIZES["vda"]) == CONTENT["vda"]
            assert file.read() == bytes([_JUNK]) * extra
    assert (done.place, done.behind, done.format) == (str(device), extra, flow.Format.RAW)


@pytest.mark.parametrize("words", [(), ("--filter=nozero",), ("--filter=noparallel", "--filter=noextents")], ids=str)
@pytest.mark.parametrize("extra", [0, MiB], ids=["just as large", "larger"])
def test_an_nbd_server_gets_the_disk_zeroes_included(
    stored: Stored, short_dir: Path, words: tuple[str, ...], extra: int
) -> None:
    with junk_server(short_dir, SIZES["vda"] + extra, *words) as (uri, image):
        done = stored.one(uri, check=True)
        assert (done.place, done.behind) == (uri, extra)
        assert image.read_bytes() == CONTENT["vda"] + bytes([_JUNK]) * extra


def test_qemu_nbd_gets_the_disk_as_an_image_of_any_format(restic: Stored, short_dir: Path) -> None:
    image = short_dir / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZES["vda"])], check=True, timeout=20)
    with qemu_nbd.serve(image, "qcow2", socket=short_dir / "s" / "nbd", writable=True, export="x y") as address:
        restic.one(address.uri, check=True)
    assert plain(image) == CONTENT["vda"]


def test_nbd_over_tcp_with_tls(restic: Stored, short_dir: Path) -> None:
    image, secret = short_dir / "image", short_dir / "keys.psk"
    image.write_bytes(bytes([_JUNK]) * SIZES["vda"])
    secret.write_text(f"alice:{'ab' * 32}\n", encoding="ascii")
    command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", "0", f"--tls-psk={secret}", "--tls=require"]
    with nbdkit_on_tcp(command, image) as port:
        uri = f"nbds://alice@127.0.0.1:{port}/"
        with pytest.raises(errors.EndpointFailed):
            restic.one(uri)
        restic.one(f"{uri}?tls-psk-file={secret}", check=True)
    assert image.read_bytes() == CONTENT["vda"]


@contextlib.contextmanager
def nbdkit_on_tcp(command: list[str], image: Path) -> Iterator[int]:
    """A server on a free port."""
    port = free_port()
    command[command.index("0")] = str(port)
    server = subprocess.Popen([*command, "file", image], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: listens(port))
        yield port
    finally:
        server.terminate()
        server.wait(10)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def listens(port: int) -> bool:
    """Does anybody?"""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


@pytest.mark.parametrize("size", [512, MiB - 512, MiB + 512, 3 * MiB + 7 * 512])
@pytest.mark.parametrize("kind", ["restic", "dir"])
def test_disks_of_odd_sizes(tmp_path: Path, kind: str, size: int) -> None:
    content = {"vda": random.Random(size).randbytes(size)}
    found = store(tmp_path, kind, content)
    out = tmp_path / "out"
    out.mkdir()
    assert found.one(str(out / "a.raw"), check=True).path.read_bytes() == content["vda"]
    assert plain(found.one(str(out / "a.qcow2"), check=True).path) == content["vda"]
    with loop_device(tmp_path / "image", size) as device:
        found.one(str(device), force=True, check=True)
        assert device.read_bytes() == content["vda"]


def test_a_disk_of_nothing_but_zeroes(tmp_path: Path) -> None:
    found = store(tmp_path, "restic", {"vda": bytes(3 * MiB)})
    with loop_device(tmp_path / "image", 3 * MiB) as device:
        assert found.one(str(device), force=True, check=True).read == 0
        assert device.read_bytes() == bytes(3 * MiB)
    done = found.one(str(tmp_path / "a.raw"))
    assert (done.path.stat().st_size, done.path.stat().st_blocks) == (3 * MiB, 0)


# -- several disks ---------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [1, 2])
def test_all_disks_go_to_a_directory(stored: Stored, tmp_path: Path, parallel: int) -> None:
    report = stored.restore(tmp_path / "new" / "out", parallel=parallel)
    assert [disk.target for disk in report.disks] == ["vda", "vdb"]
    assert {disk.target: disk.path.read_bytes() for disk in report.disks} == CONTENT


@pytest.mark.parametrize("parallel", [1, 2])
def test_each_disk_to_a_place_of_its_own(stored: Stored, short_dir: Path, parallel: int) -> None:
    with junk_server(short_dir, SIZES["vda"]) as (uri, image):
        places = {"vdb": destinations.parse(f"{short_dir}/b.img"), "vda": destinations.parse(uri)}
        report = stored.restore(places, parallel=parallel)
        assert [disk.target for disk in report.disks] == ["vdb", "vda"]
        assert image.read_bytes() == CONTENT["vda"]
        assert (short_dir / "b.img").read_bytes() == CONTENT["vdb"]


def test_one_failure_stops_the_other_disks(restic: Stored, short_dir: Path) -> None:
    out = short_dir / "out"
    out.mkdir()
    with junk_server(short_dir, SIZES["vdb"] - 512) as (uri, _):
        places = {"vda": destinations.parse(f"{out}/a.raw"), "vdb": destinations.parse(uri)}
        began = time.monotonic()
        with pytest.raises(errors.DestinationUnusable, match="has 2096640 bytes"):
            restic.restore(places, parallel=2, rate=64 * KiB)
        assert time.monotonic() - began < 5
    assert os.listdir(out) == []


# -- the command line ------------------------------------------------------------------------


def test_a_device_or_server_alone_is_enough_for_a_single_disk(restic: Stored, short_dir: Path) -> None:
    with junk_server(short_dir, SIZES["vdb"]) as (uri, image):
        several = restic.cli("--to", uri)
        assert (several.returncode, "say which with --disk" in several.stderr) == (2, True)
        done = restic.cli("--to", uri, "--disk", "vdb", "--check", "--json")
        assert done.returncode == 0, done.stderr
        [disk] = last_json(done.stdout)["disks"]
        assert (disk["path"], disk["checked"], disk["format"]) == (uri, True, "raw")
        assert image.read_bytes() == CONTENT["vdb"]


def test_places_by_target(restic: Stored, tmp_path: Path) -> None:
    done = restic.cli("--to", f"vda=qcow2:{tmp_path}/a", "--to", f"vdb={tmp_path}/b", "--format", "raw", "-p", "2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b").read_bytes() == CONTENT["vdb"]
    assert plain(tmp_path / "a") == CONTENT["vda"]
    assert "read back" not in done.stdout


def test_a_larger_device_is_told(restic: Stored, tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", SIZES["vdb"] + MiB) as device:
        done = restic.cli("--to", device, "--disk", "vdb", "--force")
    assert done.returncode == 0, done.stderr
    assert f"vdb: {device} is larger; its last 1.00 MiB were left alone" in done.stderr


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--to", "/y", "--to", "/x"), "each target once"),
        (("--to", "vda=/x/a", "--to", "vda=/x/b"), "each target once"),
        (("--to", "vda=/x/a", "--disk", "vda"), "leave --disk out"),
        (("--to", "vdz=/x/a"), "no disk 'vdz'"),
        (("--to", "vda=http://host/x"), "of URIs, there are nbd://"),
        (("--to", "vda=qcow2:"), "the path is missing"),
        (("--to", "vda=/x/same", "--to", "vdb=/x/../x/same"), "cannot both go to"),
        (("--to", "/x", "--format", "vmdk"), "'vmdk' is no format"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(restic: Stored, words: tuple[str, ...], problem: str) -> None:
    done = restic.cli(*words)
    assert (done.returncode, problem in done.stderr) == (2, True), done.stderr


def test_names_of_places() -> None:
    file, nbd = destinations.FilePlace, destinations.NbdPlace
    here = Path.cwd()
    for text, meaning in {
        "/srv/a.raw": file(path=Path("/srv/a.raw")),
        "qcow2:/srv/a": file(path=Path("/srv/a"), format=flow.Format.QCOW2),
        "raw:a.qcow2": file(path=here / "a.qcow2", format=flow.Format.RAW),
        "./raw:a": file(path=here / "raw:a"),
        "nbd://host/export": nbd(uri="nbd://host/export"),
        "nbds+unix:///?socket=/x": nbd(uri="nbds+unix:///?socket=/x"),
    }.items():
        assert destinations.parse(text) == meaning
        assert destinations.targeted(f"vda={text}") == ("vda", meaning)
        assert destinations.targeted(text) is None
    assert destinations.targeted("/srv/vda=a") is None
    assert destinations.targeted("nbd://host/a=b") is None


# -- places that are refused -----------------------------------------------------------------


def test_a_file_is_only_replaced_by_force(restic: Stored, tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"mine")
    with pytest.raises(errors.DestinationExists):
        restic.one(str(path))
    assert path.read_bytes() == b"mine"
    assert restic.one(str(path), force=True).path.read_bytes() == CONTENT["vda"]
    assert os.listdir(tmp_path) == ["a.raw"]


def test_a_symbolic_link_is_followed_and_never_written_through_unasked(restic: Stored, tmp_path: Path) -> None:
    link, behind = tmp_path / "a.raw", tmp_path / "behind"
    link.symlink_to(behind)
    with pytest.raises(errors.DestinationExists):
        restic.one(str(link))
    restic.one(str(link), force=True)
    assert link.is_symlink()
    assert behind.read_bytes() == CONTENT["vda"]


def test_a_file_that_came_meanwhile_is_not_replaced(restic: Stored, tmp_path: Path) -> None:
    path = tmp_path / "a.raw"

    class Late:
        """Makes the file while the restore goes on."""

        def start(self, subject: str, total: int) -> None:
            path.write_bytes(b"somebody's")

        def advance(self, subject: str, done: int) -> None: ...

        def finish(self, subject: str) -> None: ...

        def note(self, message: str) -> None: ...

    to = {"vda": destinations.parse(str(path))}
    request = flow.Request(repository=restic.place, access=restic.access, to=to)
    with pytest.raises(errors.DestinationExists):
        asyncio.run(flow.restore(request, Late()))
    assert path.read_bytes() == b"somebody's"
    assert os.listdir(tmp_path) == ["a.raw"]


def test_what_is_no_place_for_a_disk(restic: Stored, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for place, problem in {
        tmp_path: "a directory is in its place",
        tmp_path / "fifo": "neither a file nor a block device",
        Path("/dev/null"): "neither a file nor a block device",
        Path("/dev/no-such-device"): "there is no such device",
        tmp_path / "none" / "a.raw": "No such file or directory",
    }.items():
        with pytest.raises((errors.CannotWrite, errors.DestinationUnusable), match=problem):
            restic.one(str(place), force=True)
    assert os.listdir(tmp_path) == ["fifo"]


def test_a_block_device_always_needs_force_and_room(restic: Stored, tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", SIZES["vda"] - 512) as device:
        for options, problem in (
            ({}, "would be lost"),
            ({"force": True}, f"it has {SIZES['vda'] - 512} bytes, and the disk {SIZES['vda']}"),
        ):
            with pytest.raises(errors.DestinationUnusable, match=problem):
                restic.one(str(device), **options)
        with pytest.raises(errors.DestinationUnusable, match="not as qcow2"):
            restic.one(f"qcow2:{device}", force=True)
        assert device.read_bytes() == bytes([_JUNK]) * (SIZES["vda"] - 512)


def test_a_block_device_in_use_is_refused(restic: Stored, tmp_path: Path, short_dir: Path) -> None:
    with loop_device(tmp_path / "image", SIZES["vda"]) as device:
        held = os.open(device, os.O_RDONLY | os.O_EXCL)  # as a mount does
        try:
            with pytest.raises(errors.BusyError, match="mounted"):
                restic.one(str(device), force=True)
        finally:
            os.close(held)
        with (
            qemu_nbd.serve(device, "raw", socket=short_dir / "s" / "nbd", writable=True),  # as a machine does
            pytest.raises(errors.BusyError, match="in use by another process"),
        ):
            restic.one(str(device), force=True)
        assert device.read_bytes() == bytes([_JUNK]) * SIZES["vda"]


def test_the_image_of_a_running_machine_is_not_replaced(restic: Stored, short_dir: Path) -> None:
    image = short_dir / "a.raw"
    image.write_bytes(b"x" * MiB)
    with (
        qemu_nbd.serve(image, "raw", socket=short_dir / "s" / "nbd", writable=True),
        pytest.raises(errors.BusyError),
    ):
        restic.one(str(image), force=True)
    assert image.read_bytes() == b"x" * MiB


def test_an_nbd_server_that_cannot_take_it_is_refused(restic: Stored, short_dir: Path) -> None:
    with (
        junk_server(short_dir, SIZES["vda"], "-r") as (uri, _),
        pytest.raises(errors.DestinationUnusable, match="for reading only"),
    ):
        restic.one(uri)
    with junk_server(short_dir, SIZES["vda"] - 512) as (uri, image):
        with pytest.raises(errors.DestinationUnusable, match="and the disk"):
            restic.one(uri)
        assert image.read_bytes() == bytes([_JUNK]) * (SIZES["vda"] - 512)
    with pytest.raises(errors.EndpointFailed, match="connecting"):
        restic.one(f"nbd+unix:///?socket={short_dir}/nobody")


# -- failures --------------------------------------------------------------------------------


@pytest.fixture(params=["restic", "dir"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Stored:
    """A byte of the stored data of vda is another."""
    place = tmp_path / "stored"
    place.mkdir()
    found = store(place, request.param, {"vda": CONTENT["vda"]})
    pattern = "data/*/*" if request.param == "restic" else "**/vda.qcow2"
    path = max((found.directory / "repo").glob(pattern), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    return found


def test_of_a_damaged_disk_nothing_is_left(damaged: Stored, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for format in ("raw", "qcow2"):
        done = damaged.cli("--to", out, "--format", format)
        assert (done.returncode, os.listdir(out)) == (13, []), done.stderr
        assert "is damaged: disk vda: " in done.stderr


def test_a_damaged_disk_leaves_a_device_undefined_and_says_so(damaged: Stored, tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", SIZES["vda"]) as device:
        done = damaged.cli("--to", device, "--force", "--json")
    assert done.returncode == 13
    error = last_json(done.stdout)
    assert error["code"] == "verification-failed"
    assert error["notes"] == [f"{device} was overwritten in part: what it holds now is undefined"]


def test_damage_of_what_names_the_chunks_leaves_a_device_alone(tmp_path: Path) -> None:
    found = store(tmp_path, "restic", {"vda": CONTENT["vda"]})
    path = min((tmp_path / "repo").glob("data/*/*"), key=lambda path: path.stat().st_size)  # the trees
    path.unlink()
    with loop_device(tmp_path / "image", SIZES["vda"]) as device:
        with pytest.raises(errors.VerificationFailed) as caught:
            found.one(str(device), force=True)
        assert getattr(caught.value, "__notes__", []) == []
        assert device.read_bytes() == bytes([_JUNK]) * SIZES["vda"]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_full_file_system_is_said_and_nothing_is_left(restic: Stored, mount: Mount, format: str) -> None:
    small = mount.tmpfs(8 * MiB)
    fill(small, leave=2 * MiB)
    before = os.listdir(small)
    with pytest.raises(errors.DestinationFull) as caught:
        restic.one(f"{format}:{small}/a")
    assert caught.value.path == f"{small}/a"
    assert os.listdir(small) == before


def test_a_disk_larger_than_its_file_system_allows(restic: Stored, mount: Mount) -> None:
    """ext4 finds out late, while it writes back."""
    small = mount.ext4(4 * MiB)
    before = os.listdir(small)
    with pytest.raises(errors.DestinationFull):
        restic.one(f"{small}/a.raw")
    assert os.listdir(small) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_interrupted_restore_leaves_nothing(
    stored: Stored, tmp_path: Path, number: signal.Signals, format: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with running(stored, "--to", out, "--format", format, "--limit-rate", "100K") as child:
        wait_for(lambda: any(path.stat().st_blocks > 100 for path in out.iterdir()))
        child.send_signal(number)
        assert child.wait(10) == 128 + number
    assert os.listdir(out) == []


def test_an_interrupted_device_is_said_to_be_undefined(restic: Stored, tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", SIZES["vda"]) as device:
        words = ("--to", f"vda={device}", "--force", "--limit-rate", "100K", "--json")
        with running(restic, *words) as child:
            assert child.stdout is not None
            wait_for(lambda: device.read_bytes() != bytes([_JUNK]) * SIZES["vda"])
            child.send_signal(signal.SIGTERM)
            assert child.wait(10) == 143
            error = json.loads(child.stdout.read().splitlines()[-1])
    assert error["notes"] == [f"{device} was overwritten in part: what it holds now is undefined"]


@contextlib.contextmanager
def running(stored: Stored, *words: object) -> Iterator[subprocess.Popen[str]]:
    """`pullback restore …` while it runs."""
    command = [sys.executable, "-m", "pullback.cli.main", "restore", "-r", stored.place.url, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def test_what_a_killed_restore_left_is_taken_over_and_a_living_one_is_not_disturbed(
    restic: Stored, tmp_path: Path
) -> None:
    beside = tmp_path / ".a.raw.partial"
    beside.write_bytes(b"junk" * 5 * MiB)
    holder = os.open(beside, os.O_RDWR)
    try:
        fcntl.fcntl(holder, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
        with pytest.raises(errors.BusyError, match="another restore"):
            restic.one(f"{tmp_path}/a.raw")
        assert beside.stat().st_size == 20 * MiB
    finally:
        os.close(holder)
    assert restic.one(f"{tmp_path}/a.raw").path.read_bytes() == CONTENT["vda"]
    assert os.listdir(tmp_path) == ["a.raw"]


def test_a_destination_that_forgets_is_found_by_reading_back(restic: Stored, short_dir: Path) -> None:
    with nbdkit(short_dir / "nbd.sock", "null", str(SIZES["vda"])) as (address, _):
        restic.one(address.uri)
        done = restic.cli("--to", f"vda={address.uri}", "--check")
        assert done.returncode == 13
        assert f"pullback: {address.uri} does not give back what was written to it: the 1048576 bytes" in done.stderr


def test_a_server_that_fails_in_the_middle(restic: Stored, short_dir: Path) -> None:
    words = ("--filter=error", "memory", str(SIZES["vda"]), "error-pwrite=EIO", "error-pwrite-rate=100%")
    with nbdkit(short_dir / "nbd.sock", *words) as (address, _), pytest.raises(errors.EndpointFailed) as caught:
        restic.one(address.uri)
    assert "undefined" in caught.value.__notes__[0]


def test_the_rate_is_limited(stored: Stored, tmp_path: Path) -> None:
    began = time.monotonic()
    stored.restore(tmp_path, only=("vdb",), rate=2 * MiB)
    assert 0.4 < time.monotonic() - began < 5
