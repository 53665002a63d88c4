"""What goes wrong while a restore point is served: damage, a repository that is away, servers and clients that die."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

import proxy
import seaweed
from pullback import errors, repo, state
from pullback.extents import Extent
from pullback.flows import backup, serving
from pullback.flows.repositories import Access
from pullback.model import urls
from pullback.repo.restic import keys
from pullback.units import KiB, MiB
from serverkit import Program, copied, descendants, flip, living, run, running, until
from stored import Stored, content_of, store

SIZE = 8 * MiB + 512
CONTENT = {"vda": content_of(SIZE, 3)}


@pytest.fixture(params=["restic", "dir"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Stored:
    """A disk in each kind of repository."""
    return store(tmp_path, request.param, CONTENT)


@pytest.fixture
def restic(tmp_path: Path) -> Stored:
    """The same in restic's format only."""
    return store(tmp_path, "restic", CONTENT)


def client(uri: str) -> Any:
    """libnbd's own, without anything of ours."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


def read(handle: Any, extent: Extent) -> bytes | int:
    """The bytes, or the error's number."""
    try:
        content: bytes = handle.pread(extent.length, extent.start)
    except nbd.Error as error:
        return int(error.errnum)
    return content


def damage(stored: Stored) -> None:
    """One byte of the disk's data, in the middle of what is stored."""
    if isinstance(stored.place, urls.ResticRepository):
        pack = max((stored.directory / "repo" / "data").rglob("*"), key=lambda path: path.stat().st_size)
        flip(pack, pack.stat().st_size // 2)
        return
    [image] = (stored.directory / "repo").rglob("vda.qcow2")
    place = image.read_bytes().index(CONTENT["vda"][5 * MiB : 5 * MiB + KiB])
    flip(image, place + 100)


# -- damage ----------------------------------------------------------------------------------


def test_a_damaged_block_is_an_io_error_just_there_and_told(stored: Stored, tmp_path: Path) -> None:
    damage(stored)
    with running("serve", stored) as program:
        handle, bad = client(program.uri()), []
        for start in range(0, SIZE, 64 * KiB):
            extent = Extent(start, min(64 * KiB, SIZE - start))
            got = read(handle, extent)
            if got == errno.EIO:
                bad.append(extent)
            else:
                assert got == CONTENT["vda"][extent.start : extent.end]
        assert sum(extent.length for extent in bad) == MiB
        event = program.event("point-damaged")
        assert event["subject"] == "vda"
        assert (event["facts"]["start"], event["facts"]["length"]) == (bad[0].start, MiB)
        assert "cannot be read" in event["facts"]["message"]
        assert program.quiet() == []  # told once, though it was read 16 times
        # It goes on, for this client and for others.
        assert read(handle, Extent(0, KiB)) == CONTENT["vda"][:KiB]
        assert read(client(program.uri()), Extent(0, KiB)) == CONTENT["vda"][:KiB]
        run("nbdcopy", program.uri(), "null:", code=1)
        # A request across the border of the damage fails, and gives nothing.
        assert read(handle, Extent(bad[0].start - KiB, 2 * KiB)) == errno.EIO


def test_a_damaged_block_below_a_writable_disk(restic: Stored, short_dir: Path) -> None:
    damage(restic)
    with running("serve", restic, "--copy-on-write", state=short_dir) as program:
        handle = client(program.uri())
        found = [read(handle, Extent(start, MiB)) for start in range(0, 8 * MiB, MiB)]
        assert [got for got in found if isinstance(got, int)] == [errno.EIO]
        bad = found.index(errno.EIO) * MiB
        handle.pwrite(b"n" * MiB, bad)
        assert read(handle, Extent(bad, MiB)) == b"n" * MiB


def test_a_disk_whose_list_of_blocks_is_damaged_is_not_served(stored: Stored) -> None:
    if isinstance(stored.place, urls.ResticRepository):
        small = sorted((stored.directory / "repo" / "data").rglob("*"), key=lambda path: path.stat().st_size)
        for pack in [path for path in small if path.is_file()][:-1]:
            flip(pack, 10)
    else:
        [hashes] = (stored.directory / "repo").rglob("vda.sha256")
        flip(hashes, 5)

    async def enter() -> None:
        async with serving.serving(request(stored)):
            pass

    with pytest.raises(errors.VerificationFailed):
        asyncio.run(enter())


def request(stored: Stored, **changes: Any) -> serving.Request:
    """Serve all."""
    words: dict[str, Any] = {
        "repository": stored.place,
        "access": stored.access,
        "directories": state.directories(stored.directory / "state"),
    }
    return serving.Request(**words | changes)


# -- away ------------------------------------------------------------------------------------


class Away:
    """Takes a local repository away: its files are there no more, or there again."""

    def __init__(self, stored: Stored) -> None:
        self._repository = stored.directory / "repo"
        restic = isinstance(stored.place, urls.ResticRepository)
        self._names = ["config", "data"] if restic else ["web01"]

    def take(self) -> None:
        """It goes."""
        for name in self._names:
            (self._repository / name).rename(self._repository.parent / f"away-{name}")

    def give_back(self) -> None:
        """It comes back."""
        for name in self._names:
            (self._repository.parent / f"away-{name}").rename(self._repository / name)


def lose(program: Program, stored: Stored, away: Away) -> None:
    """The repository goes. (QEMU has the images of a `dir:` one open, so it must go too.)"""
    away.take()
    for pid in program.children("qemu-nbd"):
        os.kill(pid, signal.SIGKILL)


def test_reads_wait_for_a_repository_that_is_away(stored: Stored) -> None:
    away, got = Away(stored), list[bytes | int]()
    with running("serve", stored, "--patient") as program:
        handle = client(program.uri())
        assert read(handle, Extent(0, KiB)) == CONTENT["vda"][:KiB]
        lose(program, stored, away)
        waiting = threading.Thread(target=lambda: got.append(read(handle, Extent(5 * MiB, MiB))))
        waiting.start()
        event = program.event("point-away")
        assert "reads wait until it is back" in event["facts"]["message"]
        time.sleep(1)
        assert got == []
        # What was decoded is still there for others meanwhile.
        assert read(client(program.uri()), Extent(0, KiB)) == CONTENT["vda"][:KiB]
        away.give_back()
        waiting.join(30)
        assert got == [CONTENT["vda"][5 * MiB : 6 * MiB]]
        program.event("point-back")


def test_without_patience_reads_fail_until_it_is_back(stored: Stored, tmp_path: Path) -> None:
    away = Away(stored)
    with running("serve", stored) as program:
        handle = client(program.uri())
        lose(program, stored, away)
        if isinstance(stored.place, urls.DirectoryRepository):
            assert read(handle, Extent(5 * MiB, MiB)) == errno.EIO
            assert "reads fail until it is back" in program.event("point-away")["facts"]["message"]
        else:  # where a pack is missing, it is damage; that nothing is there is not looked at
            assert read(handle, Extent(5 * MiB, MiB)) == errno.EIO
        away.give_back()
        until(lambda: read(handle, Extent(5 * MiB, MiB)) == CONTENT["vda"][5 * MiB : 6 * MiB], "it is back")
        assert copied(program.uri(), tmp_path / "out") == CONTENT["vda"]


def test_who_waits_does_not_keep_the_end(restic: Stored) -> None:
    away = Away(restic)
    with running("serve", restic, "--patient") as program:
        handle = client(program.uri())
        away.take()
        waiting = threading.Thread(target=read, args=(handle, Extent(5 * MiB, MiB)), daemon=True)
        waiting.start()
        program.event("point-away")
        begun = time.monotonic()
        assert program.end() == 0
        assert time.monotonic() - begun < 10
        waiting.join(20)
        assert not waiting.is_alive()


def test_a_missing_pack_is_damage_also_for_who_is_patient(restic: Stored) -> None:
    pack = max((restic.directory / "repo" / "data").rglob("*"), key=lambda path: path.stat().st_size)
    pack.rename(restic.directory / "pack")
    with running("serve", restic, "--patient") as program:
        assert read(client(program.uri()), Extent(0, KiB)) == errno.EIO
        assert program.event("point-damaged")["facts"]["start"] == 0
        (restic.directory / "pack").rename(pack)
        assert read(client(program.uri()), Extent(0, KiB)) == CONTENT["vda"][:KiB]


# -- servers and clients ---------------------------------------------------------------------


@contextlib.contextmanager
def patient_client(socket: Path) -> Iterator[subprocess.Popen[str]]:
    """A QEMU client that reconnects; it reads commands of qemu-io on its standard input."""
    image = f"driver=nbd,server.type=unix,server.path={socket},export=vda,reconnect-delay=60"
    line = ["stdbuf", "-oL", "qemu-io", "-r", "--image-opts", image]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def ask(process: subprocess.Popen[str], command: str) -> str:
    """One command; gives the line that tells how it went."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(command + "\n")
    process.stdin.flush()
    for line in process.stdout:
        if "ops" in line or "failed" in line or "error" in line:
            return line
    return ""


def test_a_client_that_reconnects_goes_on_with_the_next_server(restic: Stored, short_dir: Path) -> None:
    """And until then its requests wait: nothing is answered while the server goes."""
    place = short_dir / "place"
    wish = request(restic, directory=place, patient=True)

    async def serve(words: list[str], gone: asyncio.Event) -> None:
        async with serving.serving(wish) as served:
            assert served.disk("vda").socket == place / "nbd.sock"
            words.append("served")
            await gone.wait()

    async def both() -> str:
        first, second, words = asyncio.Event(), asyncio.Event(), list[str]()
        task = asyncio.ensure_future(serve(words, first))
        while not words:
            await asyncio.sleep(0.02)
            assert not task.done(), task
        with patient_client(place / "nbd.sock") as process:
            assert "4 KiB" in await asyncio.to_thread(ask, process, "read 5M 4k")
            with pytest.raises(errors.BusyError):
                async with serving.serving(wish):
                    pass
            first.set()
            await task
            answer = asyncio.ensure_future(asyncio.to_thread(ask, process, "read 6M 4k"))
            await asyncio.sleep(0.5)
            assert not answer.done()
            task = asyncio.ensure_future(serve(words, second))
            said = await asyncio.wait_for(answer, 40)
        second.set()
        await task
        return said

    assert "4 KiB" in asyncio.run(both())
    assert os.listdir(place) == []


def test_clients_that_die_hurt_nobody(restic: Stored, tmp_path: Path) -> None:
    """Each has many requests under way. (nbdkit 1.32 aborts then, and others lose their server.)"""
    with running("serve", restic) as program:
        staying = client(program.uri())
        for number in range(20):
            words = ["nbdcopy", "--requests=64", program.uri(), "null:"]
            with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
                time.sleep(0.004 * number)
                process.kill()
            assert read(staying, Extent(number * KiB, KiB)) == CONTENT["vda"][number * KiB : (number + 1) * KiB]
        assert copied(program.uri(), tmp_path / "out") == CONTENT["vda"]


def test_a_client_that_does_not_take_its_answers_holds_up_nobody(restic: Stored, tmp_path: Path) -> None:
    with running("serve", restic) as program, socket.socket(socket.AF_UNIX) as lazy:
        lazy.connect(str(program.socket))
        lazy.sendall(struct.pack(">I", 3) + struct.pack(">8sIII3sH", b"IHAVEOPT", 7, 9, 3, b"vda", 0))
        for number in range(200):
            with contextlib.suppress(BlockingIOError):
                lazy.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, number, 0, MiB), socket.MSG_DONTWAIT)
        for _ in range(3):
            assert copied(program.uri(), tmp_path / "out") == CONTENT["vda"]


def test_the_server_dies_with_us(restic: Stored, tmp_path: Path) -> None:
    with running("serve", restic, ends=None, state=tmp_path / "s") as program:
        servers = descendants(program.process.pid)
        assert len(servers) == 1
        program.end(signal.SIGKILL)
        until(lambda: not living(servers), "it is gone")


def test_memory_is_bounded(tmp_path: Path) -> None:
    content = {"vda": os.urandom(96 * MiB)}
    big = store(tmp_path, "restic", content)
    with running("serve", big, "--cache", "16M") as program:
        [pid] = descendants(program.process.pid)
        before = _peak(pid)
        for _ in range(2):
            run("nbdcopy", program.uri(), "null:")
        assert _peak(pid) - before < 64 * MiB


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * KiB for line in lines if line.startswith("VmHWM:"))


# -- S3 --------------------------------------------------------------------------------------


def test_from_a_bucket_whose_server_fails_now_and_then(s3_server: seaweed.Server, tmp_path: Path) -> None:
    with proxy.before(s3_server.port) as between:
        s3_server.make_bucket("served")
        place = urls.ResticRepository(location=s3_server.place("served", port=between.port))
        environ = s3_server.environ | {"RESTIC_PASSWORD": "secret", "PULLBACK_CACHE_DIR": str(tmp_path / "cache")}
        access = Access(environ=environ)
        with repo.create_store(place.location, environ=environ) as made:
            repo.create_repository(made, "secret", caches=access.caches, cost=keys.Cost(1024, 8, 1)).close()
        stored = Stored(tmp_path, place, access, CONTENT)
        (tmp_path / "vda.img").write_bytes(CONTENT["vda"])
        asyncio.run(
            backup.backup(
                backup.Request(
                    machine=urls.machine(f"images:vda=raw:{tmp_path}/vda.img"),
                    repository=place,
                    access=access,
                    name="web01",
                    directories=state.directories(tmp_path / "state"),
                )
            )
        )
        with running("serve", stored) as program:
            between.rule = proxy.first(4, proxy.Fault(cut="body"), "GET")
            assert copied(program.uri(), tmp_path / "out") == CONTENT["vda"]
