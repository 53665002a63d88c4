"""Pushes: QEMU itself copies disks of one instant to destinations."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import mounts
from kit import CLUSTER, Box, MakeBox
from pullback import errors, state
from pullback.engine import destinations, monitor, offline, pause, probe, qemu, recovery, relay
from pullback.engine import push as pushes
from pullback.engine.build import Build
from pullback.engine.pushing import Push
from pullback.guest import build, run, turns
from pullback.model import checkpoints, urls
from pullback.model import pushing as model
from pullback.model.backups import Fleecing
from pullback.model.disks import Disk
from pullback.model.pushing import Destination, Format, PushPart, PushRequest, PushStatus
from pullback.programs import qemu as machines
from pullback.programs import qemu_img
from pullback.units import MiB
from storm import Storm

SIZE = 8 * MiB + 37 * 512
ENGINES = [Fleecing.FILTER, Fleecing.CLASSIC]
DONE_SECONDS = 20.0


def fill(box: Box, size: int = SIZE) -> None:
    """Something old everywhere, with holes between."""
    for disk in box.disks:
        for index in range(0, size // CLUSTER, 7):
            length = min(6 * CLUSTER, size - index * CLUSTER)
            box.write(disk.id, index % 250 + 1, index * CLUSTER, length)


def content(path: Path | str, format: Format = Format.QCOW2) -> bytes:
    """What an image holds, through QEMU."""
    out = Path("/dev/shm") / f"pb-out-{secrets.token_hex(4)}"
    try:
        subprocess.run(["qemu-img", "convert", "-f", str(format), "-O", "raw", str(path), out], check=True, timeout=60)
        return out.read_bytes()
    finally:
        out.unlink(missing_ok=True)


def mapped(path: Path) -> list[dict[str, object]]:
    """The ranges of an image that it holds itself."""
    done = subprocess.run(["qemu-img", "map", "--output=json", path], check=True, capture_output=True, timeout=60)
    return [item for item in json.loads(done.stdout) if item["present"] and (item["data"] or item.get("zero"))]


def part(disk: Disk, to: Destination, *, mark: str | None = None, since: str | None = None) -> PushPart:
    """A disk's part: with a new checkpoint `mark`, and what changed since a checkpoint."""
    chain = checkpoints.chain(disk.bitmaps)
    found: tuple[str, ...] = ()
    if since is not None:
        names = [link.mark.name for link in chain.links]
        found = tuple(link.mark.bitmap for link in chain.links[names.index(since) :])
    return PushPart(
        disk=disk,
        destination=to,
        since=found,
        checkpoint=chain.next_mark(mark) if mark else None,
        freeze=chain.newest.mark.bitmap if mark and chain.newest else None,
    )


def request(box: Box, *parts: PushPart, **changes: object) -> PushRequest:
    box.scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
    base = PushRequest(job=secrets.token_hex(4), parts=parts, scratch=box.scratch)
    return replace(base, **changes)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def connected(box: Box) -> AsyncIterator[tuple[qemu.QemuMachine, dict[str, Disk]]]:
    async with qemu.connect(box.qmp, box.directories, command="test") as machine:
        yield machine, {disk.target: disk for disk in await machine.disks()}


async def done(push: Push) -> None:
    found = await push.wait(DONE_SECONDS)
    assert {one.status for one in found} == {PushStatus.CONCLUDED}, found
    await push.conclude()


def push_all(
    box: Box, to: dict[str, Destination], *, mark: str | None = None, since: str | None = None, **changes: object
) -> None:
    """Push disks, from begin to end."""

    async def work() -> None:
        async with connected(box) as (machine, disks):
            parts = [part(disks[id], place, mark=mark, since=since) for id, place in to.items()]
            async with machine.push(request(box, *parts, **changes)) as push:
                await done(push)

    asyncio.run(work())


def marks(box: Box, disk: str = "vda") -> list[tuple[str, bool]]:
    """Checkpoints of a disk, and which records."""
    return sorted((str(b["name"]), bool(b["recording"])) for b in box.checkpoints(disk))


def one_disk(make_box: MakeBox, **options: object) -> Box:
    return make_box(machines.Disk(id="vda", path=Path("a.qcow2"), **options), size=SIZE)  # type: ignore[arg-type]


# -- what comes out --------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("format", list(Format))
def test_a_push_is_the_disk_and_the_next_one_is_what_changed(
    make_box: MakeBox, engine: Fleecing, format: Format
) -> None:
    box = make_box(size=SIZE)
    fill(box)
    to = {disk.id: Destination.file(box.directory / f"{disk.id}-full", format) for disk in box.disks}
    push_all(box, to, mark="one", fleecing=engine)
    for disk in box.disks:
        path = to[disk.id].path
        assert content(path, format) == box.model[disk.id]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    if format is Format.RAW:
        path = to["vda"].path
        assert path.stat().st_size == SIZE
        assert path.stat().st_blocks * 512 < SIZE - 8 * CLUSTER, "it is as sparse as the disk"
    box.write("vda", 0xEE, 3 * CLUSTER + 512, 512)
    box.zero("vda", 7 * CLUSTER, CLUSTER)
    box.discard("vdb", 14 * CLUSTER, 2 * CLUSTER)
    for disk in box.disks:
        above = box.directory / f"{disk.id}-inc"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", to[disk.id].place, "-F", str(format), above], check=True
        )
    chained = {disk.id: Destination.file(box.directory / f"{disk.id}-inc", reuse=True) for disk in box.disks}
    push_all(box, chained, mark="two", since="one", fleecing=engine)
    for disk in box.disks:
        assert content(chained[disk.id].path) == box.model[disk.id]
        assert (
            sum(int(str(item["length"])) for item in mapped(chained[disk.id].path) if item["depth"] == 0) == 2 * CLUSTER
        )
    assert [name.rpartition("/")[2] for name, _ in marks(box)] == ["one", "two"]
    assert [recording for _, recording in marks(box)] == [False, True]
    assert box.leftovers() == []


PLACES = [
    pytest.param(machines.Bus.VIRTIO, None, ("write", "write", "zero", "discard"), id="main loop"),
    # HMP's own `write -z` kills QEMU for a disk in an iothread; discards zero there too.
    pytest.param(machines.Bus.SCSI, "io1", ("write", "write", "discard"), id="iothread"),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("bus", "iothread", "kinds"), PLACES)
def test_what_is_written_meanwhile_never_leaks_into_a_push(
    make_box: MakeBox, bus: machines.Bus, iothread: str | None, kinds: tuple[str, ...], engine: Fleecing
) -> None:
    """A storm of writes, zeroes and discards of all sizes, at any sector, over whole and incremental pushes."""
    if engine is Fleecing.CLASSIC:  # QEMU drops a guest's discards while a backup job runs on the disk
        kinds = tuple(kind for kind in kinds if kind != "discard")
    ids = [f"{'vd' if bus is machines.Bus.VIRTIO else 'sd'}{letter}" for letter in "ab"]
    pair = [machines.Disk(id=id, path=Path(f"{id}.qcow2"), bus=bus, iothread=iothread) for id in ids]
    box = make_box(*pair, size=SIZE)
    fill(box)
    behind = {disk.id: (disk.path, Format.QCOW2) for disk in box.disks}
    for step in range(2):
        to = {id: _next(box.directory / f"{id}-{step}", *below, full=step == 0) for id, below in behind.items()}
        with Storm(box, step + 7, kinds) as storm:
            first, last = asyncio.run(_slowly(box, storm, engine, to, step))
        shown = {id: content(place.path, place.format) for id, place in to.items()}
        for some in [shown] if engine is Fleecing.CLASSIC else [{id: data} for id, data in shown.items()]:
            assert storm.matches(some, max(0, first - 1), last), f"step {step}, {list(some)}: never so at one instant"
        behind = {id: (place.path, place.format) for id, place in to.items()}
    assert box.leftovers() == []


def _next(path: Path, below: Path, format: Format, *, full: bool) -> Destination:
    """First a raw file, then images each backed by the one before."""
    if full:
        return Destination.file(path, Format.RAW)
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(below), "-F", str(format), str(path)]
    subprocess.run(words, check=True, timeout=30)
    return Destination.file(path, reuse=True)


async def _slowly(
    box: Box,
    storm: Storm,
    engine: Fleecing,
    to: dict[str, Destination],
    step: int,
) -> tuple[int, int]:
    """A push that takes its time. Gives how many writes were begun before it, and before its jobs."""
    async with connected(box) as (machine, disks):
        since = f"c{step - 1}" if step else None
        parts = [part(disks[id], place, mark=f"c{step}", since=since) for id, place in to.items()]
        first = storm.count
        async with machine.push(request(box, *parts, fleecing=engine, speed=8 * MiB)) as push:
            begun = storm.count
            await done(push)
            assert storm.count - begun > 20, "the storm must blow while the disks are copied"
    return first, begun


@pytest.mark.parametrize("chunk", [CLUSTER, 1 * MiB])
def test_only_chunks_of_one_cluster_are_right_on_a_build_that_mixes_up_old_and_new(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Every second cluster becomes a hole: a larger chunk begins in one that was copied to scratch, and goes on."""
    box = one_disk(make_box)
    assert box.process is not None
    real = asyncio.run(probe.defects(Build(box.process.pid, box.directory / "cache")))
    made = destinations.make
    monkeypatch.setattr(destinations, "make", lambda *a, **k: replace(made(*a, **k), chunk=chunk))
    box.write("vda", 7, 0, SIZE)
    before = bytes(box.model["vda"])
    to = Destination.file(box.directory / "out", Format.RAW)

    async def work() -> None:
        async with connected(box) as (machine, disks):
            wish = request(box, part(disks["vda"], to), fleecing=Fleecing.FILTER, speed=CLUSTER)
            async with machine.push(wish) as push:
                await push.pause()
                for start in range(0, SIZE // CLUSTER * CLUSTER, 2 * CLUSTER):
                    await asyncio.to_thread(box.zero, "vda", start, CLUSTER)
                await push.set_speed(None)
                await push.resume()
                await done(push)

    asyncio.run(work())
    assert (to.path.read_bytes() == before) == (chunk == CLUSTER or not real.snapshot_reads_cross)


def test_a_push_and_a_pull_of_the_same_content_are_the_same(make_box: MakeBox) -> None:
    box = make_box(size=SIZE)
    fill(box)
    to = {disk.id: Destination.file(box.directory / f"{disk.id}.raw", Format.RAW) for disk in box.disks}
    push_all(box, to)
    box.backup()
    assert {id: place.path.read_bytes() for id, place in to.items()} == box.restored() == box.image()


def test_an_increment_to_a_new_image_holds_only_what_changed(make_box: MakeBox) -> None:
    box = one_disk(make_box)
    fill(box)
    for name in ("one", "two"):
        push_all(box, {"vda": Destination.file(box.directory / f"{name}.qcow2")}, mark=name)
        box.write("vda", 0x71, (2 if name == "one" else 40) * CLUSTER, CLUSTER)
    for since, changed in (("one", {2, 40}), ("two", {40})):  # from any checkpoint
        to = Destination.file(box.directory / f"since-{since}.qcow2", compress=since == "two")
        push_all(box, {"vda": to}, since=since)
        found = mapped(to.path)
        clusters = {int(str(item["start"])) // CLUSTER + n for item in found for n in range(_clusters(item))}
        assert clusters == changed
        assert qemu_img.info(to.path).backing is None
        image = content(to.path)
        assert all(image[n * CLUSTER : (n + 1) * CLUSTER] == b"\x71" * CLUSTER for n in changed)
    assert [name.rpartition("/")[2] for name, _ in marks(box)] == ["one", "two"], "no checkpoint was asked for"


def _clusters(item: dict[str, object]) -> int:
    return -(-int(str(item["length"])) // CLUSTER)


# -- where it goes ---------------------------------------------------------------------------


@contextlib.contextmanager
def served(path: Path, *, tcp: bool = False) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A raw file in a real qemu-nbd; gives its URI and the server."""
    socket = path.with_suffix(".sock")
    place = ["-b", "127.0.0.1", "-p", "10922"] if tcp else ["-k", str(socket)]
    server = subprocess.Popen(["qemu-nbd", "-t", "-f", "raw", "-x", "a b", "-e", "4", *place, str(path)])
    uri = "nbd://127.0.0.1:10922/a%20b" if tcp else f"nbd+unix:///a%20b?socket={socket}"
    try:
        deadline = time.monotonic() + 10
        while subprocess.run(["qemu-img", "info", uri], capture_output=True, check=False, timeout=10).returncode:
            assert time.monotonic() < deadline, "qemu-nbd does not answer"
            time.sleep(0.02)
        yield uri, server
    finally:
        server.send_signal(signal.SIGCONT)
        server.terminate()
        server.wait(10)


@contextlib.contextmanager
def loop_device(path: Path, size: int) -> Iterator[Path]:
    path.touch()
    os.truncate(path, size)
    done = subprocess.run(["losetup", "-f", "--show", path], capture_output=True, text=True, check=False, timeout=10)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr}")
    try:
        yield Path(done.stdout.strip())
    finally:
        subprocess.run(["losetup", "-d", done.stdout.strip()], check=True, timeout=10)


@pytest.mark.parametrize(
    ("format", "tcp", "iothread"),
    [(Format.RAW, False, None), (Format.QCOW2, False, "io1"), (Format.RAW, True, "io1"), (Format.QCOW2, True, None)],
)
def test_a_push_over_nbd(make_box: MakeBox, format: Format, tcp: bool, iothread: str | None) -> None:
    box = one_disk(make_box, iothread=iothread)
    fill(box)
    room = box.directory / "room.raw"
    room.touch()
    os.truncate(room, SIZE if format is Format.RAW else 2 * SIZE)
    with served(room, tcp=tcp) as (uri, _):
        push_all(box, {"vda": Destination.nbd(uri, format)})
    assert content(room, format) == box.model["vda"]
    assert box.leftovers() == []


@pytest.mark.parametrize("format", list(Format))
def test_a_push_to_a_block_device_that_is_larger(make_box: MakeBox, format: Format) -> None:
    box = one_disk(make_box)
    fill(box)
    with loop_device(box.directory / "loop.raw", 2 * SIZE // CLUSTER * CLUSTER) as device:
        (box.directory / "loop.raw").write_bytes(b"\xff" * (2 * SIZE // CLUSTER * CLUSTER))
        push_all(box, {"vda": Destination.block(device, format)})
        assert content(device, format)[:SIZE] == box.model["vda"], "zeroes were written too"
    assert box.leftovers() == []


def refused(box: Box, *to: Destination, reason: str) -> None:
    with pytest.raises((errors.DestinationUnusable, errors.UsageError), match=reason):
        push_all(box, dict(zip(("vda", "vdb"), to, strict=False)), mark="never")
    assert box.leftovers() == []
    assert marks(box) == []


def test_destinations_that_do_not_fit_are_refused_and_left_alone(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destinations, "_ASK_SECONDS", 1.0)
    there = box.directory / "there"
    there.write_bytes(b"mine")
    refused(box, Destination.file(there), reason="exists already")
    refused(box, Destination.file(there, Format.RAW, reuse=True), reason="512|4 bytes")
    refused(box, Destination.file(there, Format.QCOW2, reuse=True), reason="not in qcow2 format")
    assert there.read_bytes() == b"mine"
    refused(box, Destination.file(box.directory / "no" / "dir"), reason="No such file")
    refused(box, Destination.block(there), reason="no block device")
    disk = box.disks[1].path
    refused(box, Destination.file(disk, reuse=True), reason="the machine itself")
    twice = Destination.file(box.directory / "twice")
    refused(box, twice, twice, reason="disk vda")
    small = box.directory / "small.raw"
    small.write_bytes(bytes(MiB))
    with served(small) as (uri, server):
        refused(box, Destination.nbd(uri), reason="bytes")
        server.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        refused(box, Destination.nbd(uri), reason="no|answer")
        assert time.monotonic() - begun < 10
    refused(box, Destination.nbd("nbd+unix:///?socket=/nowhere"), reason="No such file|Failed to connect")
    assert not (box.directory / "twice").exists()


def test_large_clusters_are_refused_where_the_build_would_copy_them_wrongly(make_box: MakeBox) -> None:
    box = one_disk(make_box)
    fill(box)
    assert box.process is not None
    real = asyncio.run(probe.defects(Build(box.process.pid, box.directory / "cache")))
    path = box.directory / "large.qcow2"
    qemu_img.create(path, SIZE, options="cluster_size=1M")
    to = Destination.file(path, reuse=True)
    if real.snapshot_reads_cross:
        refused(box, to, reason="clusters")
    push_all(box, {"vda": to}, fleecing=Fleecing.CLASSIC)
    assert content(path) == box.model["vda"]


# -- while it runs ---------------------------------------------------------------------------


def test_speed_pause_and_progress(make_box: MakeBox) -> None:
    size = 32 * MiB
    box = make_box(machines.Disk(id="vda", path=Path("a.qcow2")), size=size)
    box.write("vda", 7, 0, size)

    async def work() -> None:
        async with connected(box) as (machine, disks):
            to = Destination.file(box.directory / "slow.qcow2")
            async with machine.push(request(box, part(disks["vda"], to), speed=8 * MiB)) as push:
                await push.wait(0.3)
                slow = await _rate(push, 1.0)
                [now] = await push.progress()
                assert (now.status, now.speed, now.total) == (PushStatus.RUNNING, 8 * MiB, size)
                await push.pause()
                await push.pause()
                await push.wait(0.2)
                [still] = await push.progress()
                assert still.status is PushStatus.PAUSED
                assert await _rate(push, 0.3) == 0
                with pytest.raises(errors.BusyError):
                    await push.conclude()
                await push.set_speed(16 * MiB)
                await push.resume()
                fast = await _rate(push, 0.7)
                print(f"limits 8 and 16 MiB/s: {slow / MiB:.1f} and {fast / MiB:.1f}")
                assert 5 * MiB < slow < 11 * MiB
                assert slow * 1.4 < fast < 22 * MiB
                await push.set_speed(None)
                await done(push)
            assert content(to.path) == box.model["vda"]

    asyncio.run(work())
    assert box.leftovers() == []


async def _rate(push: Push, seconds: float) -> float:
    """Bytes per second, measured."""
    [before] = await push.progress()
    begun = time.monotonic()
    await asyncio.sleep(seconds)
    [after] = await push.progress()
    return (after.done - before.done) / (time.monotonic() - begun)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_push_that_is_left_leaves_nothing_and_loses_no_change(make_box: MakeBox, engine: Fleecing) -> None:
    box = make_box(size=SIZE)
    fill(box)
    first = {disk.id: Destination.file(box.directory / f"{disk.id}-first") for disk in box.disks}
    push_all(box, first, mark="one")
    before = marks(box)
    box.write("vda", 0x11, 0, CLUSTER)

    async def work() -> None:
        async with connected(box) as (machine, disks):
            to = {id: Destination.file(box.directory / f"{id}-gone") for id in first}
            parts = [part(disks[id], place, mark="two", since="one") for id, place in to.items()]
            with contextlib.suppress(ZeroDivisionError):
                async with machine.push(request(box, *parts, fleecing=engine, speed=MiB)) as push:
                    await push.pause("vdb")
                    box.write("vda", 0x22, 9 * CLUSTER, CLUSTER)
                    raise ZeroDivisionError

    asyncio.run(work())
    assert box.leftovers() == []
    assert marks(box) == before
    assert sorted(path.name for path in box.directory.glob("*-gone")) == []
    assert sorted(path.name for path in box.directory.glob(".*")) == []
    for id, place in first.items():
        above = box.directory / f"{id}-inc"
        push_all(box, {id: _next(above, place.path, Format.QCOW2, full=False)}, since="one")
        assert content(above) == box.model[id]


def test_another_process_goes_on_with_a_push_by_its_description(make_box: MakeBox) -> None:
    """As a lasting job does: begun on one connection, watched and ended on others."""
    box = one_disk(make_box)
    fill(box)
    to = Destination.file(box.directory / "vda.raw", Format.RAW)

    async def begin() -> tuple[str, Path]:
        async with connected(box) as (machine, disks):
            wish = request(box, part(disks["vda"], to, mark="one"), speed=MiB)
            job = machine._begin(wish.job)
            async with recovery.guarded(job) as watcher:
                context = machine._context(job, watcher, wish.snapshot)
                made = await pushes.prepare(context, wish)
                begun, _ = await pushes.begin(context, wish, made)
            return json.dumps(begun.document()), job.path

    text, path = asyncio.run(begin())
    want = bytes(box.model["vda"])
    box.write("vda", 0x33, 0, 20 * CLUSTER)

    async def end() -> None:
        begun = model.pushed(json.loads(text))
        job = state.load_job(path)
        assert job is not None
        async with monitor.connect(box.qmp) as qmp, recovery.guarded(job) as watcher:
            still = partial(pause.paused, qmp, job, watcher)
            assert not pushes.over(await pushes.progress(qmp, begun))
            await pushes.set_speed(qmp, begun, None)
            assert pushes.over(await pushes.wait(qmp, begun, DONE_SECONDS))
            for _ in range(2):
                await pushes.conclude(qmp, job, begun, still)
        job.remove()

    asyncio.run(end())
    assert to.path.read_bytes() == want
    assert box.leftovers() == []
    assert [name.rpartition("/")[2] for name, _ in marks(box)] == ["one"]


# -- when it goes wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("format", list(Format))
def test_one_full_destination_undoes_all_and_the_guest_does_not_notice(
    make_box: MakeBox, mount: mounts.Mount, engine: Fleecing, format: Format
) -> None:
    box = make_box(size=SIZE)
    fill(box)
    push_all(box, {disk.id: Destination.file(box.directory / f"{disk.id}-first") for disk in box.disks}, mark="one")
    before = marks(box)
    full = mount.tmpfs(3 * MiB)

    async def work() -> None:
        async with connected(box) as (machine, disks):
            to = {
                "vda": Destination.file(box.directory / "good", format),
                "vdb": Destination.file(full / "bad", format),
            }
            parts = [part(disks[id], place, mark="two") for id, place in to.items()]
            async with machine.push(request(box, *parts, fleecing=engine)) as push:
                found = await push.wait(DONE_SECONDS)
                assert found[1].status is PushStatus.FAILED
                assert found[1].error == "No space left on device"
                for index in range(10):
                    box.write("vdb", 0x44, index * CLUSTER, CLUSTER)  # asserts that it is no error
                await push.conclude()

    with pytest.raises(errors.DestinationFull, match="bad"):
        asyncio.run(work())
    assert box.leftovers() == []
    assert marks(box) == before
    assert os.listdir(full) == []
    assert not (box.directory / "good").exists()


@pytest.mark.parametrize(
    ("format", "tcp", "iothread"),
    [(Format.RAW, False, None), (Format.QCOW2, False, "io1"), (Format.RAW, True, "io1")],
)
def test_a_destination_that_hangs_costs_the_guest_nothing_and_can_be_given_up(
    make_box: MakeBox, format: Format, tcp: bool, iothread: str | None
) -> None:
    size = 32 * MiB
    box = make_box(machines.Disk(id="vda", path=Path("a.qcow2"), iothread=iothread), size=size)
    box.write("vda", 7, 0, size)
    room = box.directory / "room.raw"
    room.touch()
    os.truncate(room, size if format is Format.RAW else 2 * size)

    async def work(uri: str, server: subprocess.Popen[bytes]) -> float:
        async with connected(box) as (machine, disks):
            parts = [part(disks["vda"], Destination.nbd(uri, format), mark="never")]
            async with machine.push(request(box, *parts, speed=32 * MiB)) as push:
                await push.wait(0.2)
                server.send_signal(signal.SIGSTOP)
                await push.wait(0.5)
                slowest = 0.0
                for index in range(40):
                    begun = time.monotonic()
                    await asyncio.to_thread(box.write, "vda", 9, index * 12 * CLUSTER, CLUSTER)
                    slowest = max(slowest, time.monotonic() - begun)
                [now] = await push.progress()
                assert now.status is PushStatus.RUNNING
            return slowest

    with served(room, tcp=tcp) as (uri, server):
        begun = time.monotonic()
        slowest = asyncio.run(work(uri, server))
        print(f"slowest write with a hanging destination: {slowest * 1000:.0f} ms; {time.monotonic() - begun:.1f} s")
        assert slowest < 0.5
        assert box.leftovers() == []
        assert marks(box) == []
        assert box.command("query-status")["status"] == "running"


def test_a_destination_that_hangs_where_it_would_be_written_out_hangs_nobody(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(destinations, "_ASK_SECONDS", 1.0)
    box = one_disk(make_box)
    fill(box)
    room = box.directory / "room.raw"
    room.touch()
    os.truncate(room, SIZE)

    async def work(uri: str, server: subprocess.Popen[bytes]) -> None:
        async with connected(box) as (machine, disks):
            wish = request(box, part(disks["vda"], Destination.nbd(uri), mark="never"))
            async with machine.push(wish) as push:
                assert pushes.over(await push.wait(DONE_SECONDS))
                server.send_signal(signal.SIGSTOP)
                await push.conclude()

    with served(room) as (uri, server):
        with pytest.raises(errors.CleanupIncomplete):
            asyncio.run(work(uri, server))
        assert box.leftovers() == []
        assert marks(box) == []


def test_a_guest_that_reboots_does_not_wait_for_a_destination_that_hangs(make_box: MakeBox) -> None:
    """A reset drains the disks, and so waits for the job: until the relay cuts it off."""
    box = one_disk(make_box)
    box.write("vda", 7, 0, SIZE)
    room = box.directory / "room.raw"
    room.touch()
    os.truncate(room, SIZE)

    async def work(uri: str, server: subprocess.Popen[bytes]) -> float:
        async with connected(box) as (machine, disks):
            wish = request(box, part(disks["vda"], Destination.nbd(uri)), speed=4 * MiB)
            async with machine.push(wish) as push:
                await push.wait(0.2)
                server.send_signal(signal.SIGSTOP)
                begun = time.monotonic()
                await asyncio.to_thread(box.command, "system_reset")
                [found] = await push.wait(DONE_SECONDS)
                took = time.monotonic() - begun
                assert (found.status, found.error) == (PushStatus.FAILED, "Input/output error")
                with pytest.raises(errors.PushFailed):
                    await push.conclude()
            return took

    with served(room) as (uri, server):
        took = asyncio.run(work(uri, server))
    print(f"a reset with a hanging destination: {took:.1f} s")
    assert took < relay.SILENCE_SECONDS + 5, "until then nothing is answered"
    assert box.leftovers() == []


def test_scratch_that_runs_full_breaks_the_push_and_not_the_guest(make_box: MakeBox, mount: mounts.Mount) -> None:
    box = one_disk(make_box)
    fill(box)
    place = mount.tmpfs(20 * MiB)

    async def work() -> None:
        async with connected(box) as (machine, disks):
            to = Destination.file(box.directory / "out")
            wish = request(
                box, part(disks["vda"], to, mark="never"), fleecing=Fleecing.FILTER, scratch=place, speed=MiB
            )
            async with machine.push(wish) as push:
                mounts.fill(place)
                box.write("vda", 0x55, 0, SIZE // 2)
                mounts.empty(place)
                await push.set_speed(None)
                await push.wait(DONE_SECONDS)
                await push.conclude()

    with pytest.raises(errors.SnapshotBroken):
        asyncio.run(work())
    assert box.leftovers() == []
    assert marks(box) == []


# -- a machine that is off -------------------------------------------------------------------


def test_stopped_images_are_pushed_by_a_storage_daemon(make_box: MakeBox) -> None:
    box = make_box(size=SIZE)
    fill(box)
    box.quit()
    images = tuple(urls.Image(target=disk.id, path=disk.path) for disk in box.disks)

    async def work(kind: str, mark: str | None, since: str | None, *, leave: bool = False) -> dict[str, Destination]:
        wanted = urls.ImagesMachine(images=images)
        async with offline.connect(wanted, box.directories, command="test", name="web01") as machine:
            disks = {disk.target: disk for disk in await machine.disks()}
            format = Format.RAW if kind == "full" else Format.QCOW2
            to = {id: Destination.file(box.directory / f"{id}-{kind}", format) for id in disks}
            parts = [part(disks[id], place, mark=mark, since=since) for id, place in to.items()]
            async with machine.push(request(box, *parts)) as push:
                if not leave:
                    await done(push)
            return to

    to = asyncio.run(work("full", "one", None))
    assert {id: place.path.read_bytes() for id, place in to.items()} == box.image()
    for disk in box.disks:
        subprocess.run(["qemu-io", "-c", f"write -P 3 {5 * CLUSTER} {CLUSTER}", disk.path], check=True, timeout=30)
    stored = [qemu_img.info(disk.path).bitmaps for disk in box.disks]
    gone = asyncio.run(work("left", "two", "one", leave=True))
    assert not any(place.path.exists() for place in gone.values())
    assert [qemu_img.info(disk.path).bitmaps for disk in box.disks] == stored
    increment = asyncio.run(work("changes", "two", "one"))
    for place in increment.values():
        assert [int(str(item["start"])) for item in mapped(place.path)] == [5 * CLUSTER]
    names = [bitmap.name.rpartition("/")[2] for bitmap in qemu_img.info(box.disks[0].path).bitmaps]
    assert sorted(names) == ["one", "two"]


# -- a guest that writes ---------------------------------------------------------------------


@pytest.mark.guest
def test_two_disks_of_a_guest_that_writes_are_of_one_instant(short_dir: Path) -> None:
    """The guest writes each number to the first disk, then to the second: never may the second be ahead."""
    small = build.guest(Path(os.environ.get("PULLBACK_GUEST_CACHE", build.CACHE)))
    ids = ("vda", "vdb")
    pair = [machines.Disk(id=id, path=short_dir / f"{id}.qcow2", iothread="io1") for id in ids]
    for disk in pair:
        qemu_img.create(disk.path, 32 * MiB)
    with run.boot(small, run.Turns(a="vda", b="vdb"), disks=pair, directory=short_dir) as guest:
        guest.wait_ready()
        guest.console.wait_for_line("PB-TURN", timeout=30)
        cuts = []
        for number, engine in enumerate((*ENGINES, Fleecing.FILTER)):
            to = {id: Destination.file(short_dir / f"{id}-{number}", Format.RAW) for id in ids}
            asyncio.run(_pushed(guest.qmp[0], short_dir, to, engine, leave=number == 2))
            if number != 2:
                cuts.append([turns.read(place.path) for place in to.values()])
        assert guest.io_errors() == []
        assert guest.qemu.returncode is None
    for first, second in cuts:
        assert (first.problems, second.problems) == ((), ())
        assert second.newest in (first.newest, first.newest - 1)
    assert cuts[0][0].newest < cuts[-1][0].newest, "the guest wrote between the cuts"


async def _pushed(socket: Path, place: Path, to: dict[str, Destination], engine: Fleecing, *, leave: bool) -> None:
    directories = state.directories(place / "state")
    directories.scratch.mkdir(parents=True, exist_ok=True)
    async with qemu.connect(socket, directories, command="test", anonymous=True) as machine:
        disks = {disk.target: disk for disk in await machine.disks()}
        parts = tuple(part(disks[id], where) for id, where in to.items())
        wish = PushRequest(job=secrets.token_hex(4), parts=parts, scratch=directories.scratch, fleecing=engine)
        async with machine.push(replace(wish, speed=64 * MiB)) as push:
            await push.wait(0.2)
            if not leave:
                await done(push)
