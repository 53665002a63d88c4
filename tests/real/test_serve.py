"""A served restore point: what clients of all kinds read and write, and how the server ends."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jsonkit import mismatches
from kit import run_cli
from pullback import errors, state
from pullback.cli import documents
from pullback.flows import serving
from pullback.flows.repositories import Access
from pullback.model.exports import Listen, Tls, TlsKind
from pullback.model.urls import ResticRepository
from pullback.units import KiB, MiB
from serverkit import Program, copied, descendants, living, run, running, until
from stored import Stored, content_of, store

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


@pytest.fixture(scope="module")
def server(stored: Stored) -> Iterator[Program]:
    """A server of both disks."""
    with running("serve", stored) as program:
        yield program
        assert program.quiet() == []


# -- reading ---------------------------------------------------------------------------------


def test_what_it_says_of_itself(server: Program, stored: Stored) -> None:
    assert mismatches(server.result, documents.RESULTS["serve"][0].fields) == []
    assert [(disk["name"], disk["size"], disk["writable"]) for disk in server.result["disks"]] == [
        (target, size, False) for target, size in SIZES.items()
    ]
    assert server.socket.stat().st_mode & 0o777 == 0o600
    assert server.socket.parent.stat().st_mode & 0o777 == 0o700


def test_nbdinfo_accepts_the_uris(server: Program) -> None:
    for target, size in SIZES.items():
        [export] = json.loads(run("nbdinfo", "--json", server.uri(target)))["exports"]
        assert (export["export-name"], export["export-size"]) == (target, size)
        assert (export["is_read_only"], export["can_multi_conn"]) == (True, True)
        assert export["contexts"] == ["base:allocation"]
    listed = json.loads(run("nbdinfo", "--list", "--json", server.uri()))
    assert {export["export-name"] for export in listed["exports"]} == set(SIZES)
    assert "No such file" in run("nbdinfo", server.uri().replace("vda", "vdx"), code=1)


def test_holes_are_told(server: Program) -> None:
    shown = json.loads(run("nbdinfo", "--map", "--json", server.uri()))
    assert [(part["offset"], part["length"], part["type"]) for part in shown] == [
        (0, 2 * MiB, 0),
        (2 * MiB, MiB, 3),
        (3 * MiB, 2 * MiB + 512, 0),
    ]


@pytest.mark.parametrize("target", SIZES)
def test_nbdcopy_reads_the_disk(server: Program, tmp_path: Path, target: str) -> None:
    assert copied(server.uri(target), tmp_path / "out") == CONTENT[target]


@pytest.mark.parametrize("words", [("--connections=1", "--request-size=4096"), ("--synchronous",)])
def test_nbdcopy_reads_it_in_other_ways(server: Program, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert copied(server.uri(), tmp_path / "out", *words) == CONTENT["vda"]


def test_qemu_img_reads_the_disk(server: Program, tmp_path: Path) -> None:
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri(), tmp_path / "a.qcow2")
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", tmp_path / "a.qcow2", server.uri())
    (tmp_path / "b").write_bytes(CONTENT["vda"])
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", tmp_path / "a.qcow2", tmp_path / "b")


def test_many_clients_at_once(server: Program, tmp_path: Path) -> None:
    def one(number: int) -> bool:
        target = "vda" if number % 3 else "vdb"
        return copied(server.uri(target), tmp_path / f"out{number}", "--connections=2") == CONTENT[target]

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, range(12)))


def test_scattered_reads_of_any_length(server: Program, tmp_path: Path) -> None:
    import nbd  # the client: libnbd's binding, without anything of ours

    chance, handle = random.Random(5), nbd.NBD()
    handle.connect_uri(server.uri())
    for _ in range(300):
        offset = chance.randrange(SIZES["vda"])
        length = min(chance.choice((1, 511, 4096, 70_000, 2 * MiB)), SIZES["vda"] - offset)
        assert handle.pread(length, offset) == CONTENT["vda"][offset : offset + length]
    handle.shutdown()


def test_nothing_can_be_written(server: Program) -> None:
    import nbd  # the client: libnbd's binding, without anything of ours

    assert "Permission denied" in run("qemu-io", "-f", "raw", "-c", "write 0 4k", server.uri(), code=1)
    handle = nbd.NBD()
    handle.connect_uri(server.uri())
    handle.set_strict_mode(0)  # asks for it though the server said that it is read-only
    with pytest.raises(nbd.Error) as caught:
        handle.pwrite(b"x" * 512, 0)
    assert caught.value.errnum in (errno.EPERM, errno.EROFS)


def test_no_secret_is_in_words_environment_or_log(restic: Stored) -> None:
    with running("serve", restic, AWS_SECRET_ACCESS_KEY="correct-horse") as program:
        assert b"correct-horse" in Path(f"/proc/{program.process.pid}/environ").read_bytes()
        below = descendants(program.process.pid)
        assert below
        for pid in below:
            words, environ = (Path(f"/proc/{pid}/{file}").read_bytes() for file in ("cmdline", "environ"))
            assert b"RESTIC_PASSWORD" not in environ
            assert b"correct-horse" not in environ + words
            assert b"secret" not in words


# -- many points, few disks ------------------------------------------------------------------


def test_only_the_disk_that_is_named(restic: Stored, tmp_path: Path) -> None:
    with running("serve", restic, "--disk", "vdb") as program:
        assert [disk["target"] for disk in program.result["disks"]] == ["vdb"]
        assert copied(program.uri("vdb"), tmp_path / "out") == CONTENT["vdb"]
        run("nbdinfo", program.uri("vdb").replace("vdb", "vda"), code=1)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"only": ("vdx",)}, errors.UnknownDisk),
        ({"point": "0000"}, errors.UnknownPoint),
        ({"listen": Listen(host="127.0.0.1")}, errors.InsecureExport),
        ({"listen": Listen(tls=Tls(kind=TlsKind.PSK, directory=Path("/")))}, errors.UsageError),
        (
            {"listen": Listen(host="127.0.0.1", tls=Tls(kind=TlsKind.PSK, directory=Path("/nowhere")))},
            errors.UsageError,
        ),
        ({"listen": Listen(host="192.0.2.1", insecure=True)}, errors.UsageError),
        ({"listen": Listen(socket=Path("/proc/x.sock"))}, errors.CannotWrite),
        ({"listen": Listen(socket=Path("/etc/passwd"))}, errors.DestinationExists),
        ({"listen": Listen(socket=Path("/" + "x" * 200))}, errors.UsageError),
        ({"overlay": Path("/nowhere")}, errors.UsageError),
        ({"directory": Path("/tmp")}, errors.CannotWrite),
        ({"access": Access(environ={"RESTIC_PASSWORD": "wrong"})}, errors.WrongPassword),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else ",".join(value),
)
def test_what_is_refused(
    restic: Stored, tmp_path: Path, changes: dict[str, Any], error: type[errors.PullbackError]
) -> None:
    with pytest.raises(error):
        _enter(restic, tmp_path, **changes)
    assert leftovers(tmp_path) == []
    assert list((restic.directory / "repo" / "locks").iterdir()) == []


def _enter(stored: Stored, place: Path, **changes: Any) -> None:
    """Serve for a moment, in this process."""

    async def enter() -> None:
        words: dict[str, Any] = {"repository": stored.place, "access": stored.access}
        request = serving.Request(**words | {"directories": state.directories(place)} | changes)
        async with serving.serving(request):
            pass

    asyncio.run(enter())


def test_words_that_do_not_go_together(restic: Stored) -> None:
    for words in (["--listen", "127.0.0.1", "--socket", "/tmp/x.sock"], ["--cache", "1M"]):
        done = run_cli("serve", *words, "-r", restic.place.url, state=restic.directory / "state")
        assert done.returncode == 2, done.stderr


def _environ(stored: Stored) -> dict[str, str]:
    return dict(stored.access.environ)


def leftovers(place: Path) -> list[Path]:
    """Runtime files and scratch."""
    return [path for name in ("run", "scratch") for path in (place / name).glob("*")]


# -- where it listens ------------------------------------------------------------------------


def test_a_socket_of_the_users_choice(restic: Stored, short_dir: Path) -> None:
    path = short_dir / "my.sock"
    with running("serve", restic, "--socket", path) as program:
        assert program.socket == path
        assert path.stat().st_mode & 0o777 == 0o600
        assert copied(program.uri("vdb"), short_dir / "out") == CONTENT["vdb"]
    assert not path.exists()


def test_clear_text_when_it_is_asked_for_by_name(restic: Stored, tmp_path: Path) -> None:
    with running("serve", restic, "--listen", "127.0.0.1", "--insecure") as program:
        assert program.uri().startswith("nbd://127.0.0.1:")
        assert copied(program.uri("vdb"), tmp_path / "out") == CONTENT["vdb"]


def test_tls_with_keys(restic: Stored, tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text(f"me:{'11' * 32}\n")
    (tmp_path / "wrong.psk").write_text(f"me:{'22' * 32}\n")
    with running("serve", restic, "--listen", "127.0.0.1", "--tls-psk", tmp_path, "--copy-on-write") as program:
        assert program.result["tls"] == "psk"
        host = program.uri("vdb").replace("nbds://", "nbds://me@")
        assert copied(f"{host}?tls-psk-file={tmp_path / 'keys.psk'}", tmp_path / "out") == CONTENT["vdb"]
        key = f"{host}?tls-psk-file={tmp_path / 'keys.psk'}"
        listed = json.loads(run("nbdinfo", "--list", "--json", key))["exports"]
        assert {export["export-name"] for export in listed} == set(SIZES)
        (tmp_path / "in").write_bytes(CONTENT["vdb"][::-1])
        run("nbdcopy", "--flush", tmp_path / "in", key)
        assert copied(key, tmp_path / "out") == CONTENT["vdb"][::-1]
        run("nbdinfo", f"{host}?tls-psk-file={tmp_path / 'wrong.psk'}", code=1)
        run("nbdinfo", program.uri("vdb").replace("nbds://", "nbd://"), code=1)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server, a client; and in `other` a client of another authority."""
    directory = tmp_path_factory.mktemp("tls")
    _authority(directory)
    _authority(directory / "other")
    shutil.copy(directory / "ca-cert.pem", directory / "other" / "ca-cert.pem")
    return directory


def _authority(directory: Path) -> None:
    directory.mkdir(exist_ok=True)

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=directory, timeout=30)

    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl(*new, "-x509", "-keyout", "ca.key", "-out", "ca-cert.pem", "-subj", "/CN=Test", "-days", "2")
    (directory / "extensions").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl(*new, "-keyout", f"{name}-key.pem", "-out", "request.pem", "-subj", "/CN=localhost")
        sign = ["x509", "-req", "-in", "request.pem", "-CA", "ca-cert.pem", "-CAkey", "ca.key", "-CAcreateserial"]
        openssl(*sign, "-days", "2", "-extfile", "extensions", "-out", f"{name}-cert.pem")


def test_tls_with_certificates(restic: Stored, tmp_path: Path, certificates: Path) -> None:
    with running("serve", restic, "--listen", "127.0.0.1", "--tls-x509", certificates) as program:
        assert program.result["tls"] == "x509"
        uri = program.uri("vdb")
        assert copied(f"{uri}?tls-certificates={certificates}", tmp_path / "out") == CONTENT["vdb"]
        run("nbdinfo", f"{uri}?tls-certificates={certificates / 'other'}", code=1)
        run("nbdinfo", uri.replace("nbds://", "nbd://"), code=1)


def test_no_more_clients_than_allowed(restic: Stored) -> None:
    import nbd  # the client: libnbd's binding, without anything of ours

    with running("serve", restic, "--max-connections", "1") as program:
        first = nbd.NBD()
        first.connect_uri(program.uri())
        run("nbdinfo", program.uri(), code=1)
        first.shutdown()
        until(lambda: subprocess.run(["nbdinfo", program.uri()], capture_output=True).returncode == 0, "room again")


# -- copy on write ---------------------------------------------------------------------------


def test_what_clients_write_is_kept_apart_and_thrown_away(stored: Stored, tmp_path: Path, short_dir: Path) -> None:
    place = short_dir / "state"
    with running("serve", stored, "--copy-on-write", state=place) as program:
        assert [disk["writable"] for disk in program.result["disks"]] == [True, True]
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", "-c", "write -z 4M 64k", "-c", "flush", program.uri())
        expected = bytearray(CONTENT["vda"])
        expected[MiB : MiB + 64 * KiB] = bytes([7]) * 64 * KiB
        expected[4 * MiB : 4 * MiB + 64 * KiB] = bytes(64 * KiB)
        assert copied(program.uri(), tmp_path / "out") == expected
        assert copied(program.uri("vdb"), tmp_path / "out") == CONTENT["vdb"]
        shown = json.loads(run("nbdinfo", "--map", "--json", program.uri()))
        assert any(part["type"] == 3 for part in shown)
        # Nothing would be left if all were killed now.
        assert [path for path in (place / "scratch").rglob("*") if path.is_file()] == []
    assert leftovers(place) == []
    with running("serve", stored) as program:
        assert copied(program.uri(), tmp_path / "out") == CONTENT["vda"]


def test_an_overlay_goes_on_in_the_next_run(restic: Stored, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    with running("serve", restic, "--overlay", overlay) as program:
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", program.uri())
        with pytest.raises(errors.BusyError):
            _enter(restic, tmp_path / "s", writable=True, overlay=overlay)
    with running("serve", restic, "--overlay", overlay) as program:
        run("qemu-io", "-f", "raw", "-c", "read -P 7 1M 64k", "-c", "write -P 8 0 4k", program.uri())
    alone = {"driver": "qcow2", "file": {"driver": "file", "filename": str(overlay / "vda.qcow2")}, "backing": None}
    run("qemu-img", "check", "-q", f"json:{json.dumps(alone)}")
    assert sorted(os.listdir(overlay)) == ["overlay.json", "vda.qcow2", "vdb.qcow2"]


def test_the_overlay_of_another_point_is_refused(restic: Stored, tmp_path: Path) -> None:
    overlay, other, place = tmp_path / "overlay", tmp_path / "other", tmp_path / "s"
    other.mkdir()
    elsewhere = store(other, "restic", {"vda": CONTENT["vdb"]})
    _enter(restic, place, writable=True, overlay=overlay)
    before = {path: path.read_bytes() for path in overlay.iterdir()}
    for record in (None, b"{", b"[]", b'{"format": 9, "disks": {}}', b'{"format": 1, "disks": {"vda": 1}}'):
        if record is not None:
            (overlay / "overlay.json").write_bytes(record)
        with pytest.raises(errors.DestinationUnusable):
            _enter(elsewhere, place, writable=True, overlay=overlay)
    (overlay / "overlay.json").unlink()
    with pytest.raises(errors.DestinationUnusable):
        _enter(restic, place, writable=True, overlay=overlay)
    (overlay / "overlay.json").write_bytes(before[overlay / "overlay.json"])
    assert {path: path.read_bytes() for path in overlay.iterdir()} == before
    assert leftovers(place) == []


# -- the end ---------------------------------------------------------------------------------


def test_a_signal_is_the_good_end(stored: Stored, tmp_path: Path) -> None:
    with running("serve", stored, state=tmp_path) as program:
        below = descendants(program.process.pid)
        assert program.end(signal.SIGTERM if isinstance(stored.place, ResticRepository) else signal.SIGINT) == 0
    assert living(below) == []
    assert leftovers(tmp_path) == []


def test_what_is_left_after_sigkill_goes_at_the_next_run(stored: Stored, tmp_path: Path) -> None:
    words = ["--copy-on-write"] if isinstance(stored.place, ResticRepository) else []
    with running("serve", stored, *words, ends=None, state=tmp_path) as program:
        below = descendants(program.process.pid)
        program.end(signal.SIGKILL)
    until(lambda: not living(below), "the servers die too")
    assert len(leftovers(tmp_path)) == 1 + len(words)
    with running("serve", stored, *words, state=tmp_path):
        assert len(leftovers(tmp_path)) == 1 + len(words)
    assert leftovers(tmp_path) == []


def test_the_servers_death_is_told(restic: Stored, tmp_path: Path) -> None:
    with running("serve", restic, ends=1, state=tmp_path / "state") as program:
        [pid] = descendants(program.process.pid)
        os.kill(pid, signal.SIGKILL)
        assert program.process.wait(30) == 1
    assert leftovers(tmp_path / "state") == []
