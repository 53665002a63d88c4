"""Disks that are no plain qcow2: full, then increments where there can be any, and each restore is exact."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit import CLUSTER, Box, MakeBox, last_json
from pullback import errors
from pullback.engine import images
from pullback.flows import backup as flow
from pullback.model import urls
from pullback.model.backups import Fleecing
from pullback.model.points import Mode
from pullback.programs import qemu, qemu_img
from pullback.units import MiB
from victim import running

SIZE = 4 * MiB
SECRET = "open sesame"
SECRET_OBJECT = ("-object", f"secret,id=key,data={base64.b64encode(SECRET.encode()).decode()},format=base64")


def exact(box: Box, mode: Mode, **changes: Any) -> flow.Report:
    """The next backup has that mode, is no broken chain, and holds what the guest sees."""
    report = box.backup(**changes)
    assert report.broken == (), report.notes
    assert {disk.mode for disk in report.point.disks} == {mode}, report.notes
    assert list(box.restored().values()) == list(box.image().values())
    assert box.leftovers() == []
    assert running(box)
    return report


def extra_disk(box: Box, node: dict[str, object], *more: str) -> None:
    """Start the machine with one disk, vda, over a node described here."""
    box.quit() if box.process else None
    blockdev = json.dumps({"node-name": "vda-format", **node})
    box.extra = (*more, "-blockdev", blockdev, "-device", "virtio-blk-pci,id=vda,drive=vda-format")
    box.model = {"vda": box.model.get("vda", bytearray(SIZE))}
    disk = qemu.Disk(id="vda", path=box.directory / "a.img")
    box.disks = []
    box.start()
    box.disks = [disk]


def empty(make_box: MakeBox) -> Box:
    """A machine that has no disk yet."""
    return make_box(size=SIZE, start=False)


def fill_and_follow(box: Box, again: Mode = Mode.INCREMENTAL, **changes: Any) -> flow.Report:
    """First whole, then what changed: written, zeroed, discarded."""
    box.write("vda", 0x11, 0, 2 * MiB + 512)
    exact(box, Mode.FULL, **changes)
    box.write("vda", 0x12, 3 * MiB + 512, 1024)
    box.zero("vda", MiB, 2 * CLUSTER)
    box.write("vda", 0x13, CLUSTER - 512, 1024)
    report = exact(box, again, **changes)
    if again is Mode.INCREMENTAL:
        assert report.point.disks[0].read <= 3 * MiB
    return report


# -- raw -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", list(Fleecing))
def test_a_raw_file_is_tracked_while_the_same_qemu_runs_and_no_longer(make_box: MakeBox, engine: Fleecing) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"), size=SIZE + 512)
    fill_and_follow(box, fleecing=engine)
    shown = box.cli("info", f"qmp:{box.qmp}")
    assert "tracked while this QEMU runs, because its format raw cannot hold bitmaps" in shown.stdout
    box.discard("vda", 0, MiB)
    exact(box, Mode.INCREMENTAL, fleecing=engine)
    box.quit()
    box.start()
    box.write("vda", 0x14, 0, 512)
    done = box.cli("backup", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}", "--json")
    assert done.returncode == 0, done.stderr
    assert any("known only while QEMU runs" in note for note in last_json(done.stdout)["notes"])
    assert list(box.restored().values()) == list(box.image().values())
    box.write("vda", 0x15, 3 * MiB, 512)
    exact(box, Mode.INCREMENTAL, fleecing=engine)
    assert box.verify(all=True).damaged == ()


def test_a_raw_disk_that_grew_is_read_whole_and_one_shrunk_and_grown_back_is_exact(make_box: MakeBox) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.raw"), format="raw"), size=SIZE)
    box.write("vda", 0x11, 0, SIZE)
    exact(box, Mode.FULL)
    for size in (MiB + CLUSTER, SIZE):
        box.command("block_resize", {"node-name": "vda-format", "size": size})
    box.model["vda"][MiB + CLUSTER :] = bytes(SIZE - MiB - CLUSTER)
    exact(box, Mode.INCREMENTAL)
    box.command("block_resize", {"node-name": "vda-format", "size": SIZE + MiB})
    box.model["vda"].extend(bytes(MiB))
    report = box.backup()
    assert report.broken == ("vda",)
    assert list(box.restored().values()) == list(box.image().values())
    exact(box, Mode.INCREMENTAL)


def test_a_block_device_is_tracked_while_qemu_runs(make_box: MakeBox) -> None:
    box = empty(make_box)
    backing = box.directory / "backing.img"
    backing.write_bytes(bytes(SIZE))
    device = subprocess.run(
        ["losetup", "-f", "--show", str(backing)], check=True, capture_output=True, text=True, timeout=20
    ).stdout.strip()
    try:
        extra_disk(box, {"driver": "raw", "discard": "unmap", "file": {"driver": "host_device", "filename": device}})
        fill_and_follow(box)
        box.quit()
    finally:
        subprocess.run(["losetup", "-d", device], check=True, timeout=20)


# -- qcow2 with data elsewhere ---------------------------------------------------------------


@pytest.mark.parametrize("raw", ["on", "off"])
def test_a_qcow2_with_an_external_data_file_is_incremental_running_and_off(make_box: MakeBox, raw: str) -> None:
    box = empty(make_box)
    path, data = box.directory / "a.img", box.directory / "a.data"
    qemu_img.create(path, SIZE, options=f"data_file={data},data_file_raw={raw}")
    node: dict[str, object] = {
        "driver": "qcow2",
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(path)},
        "data-file": {"driver": "file", "filename": str(data), "discard": "unmap"},
    }
    extra_disk(box, node)
    fill_and_follow(box)
    box.write("vda", 0x21, 2 * MiB, 512)
    box.quit()
    off = urls.ImagesMachine(images=(urls.Image(target="vda", path=path, format="qcow2"),))
    report = box.backup(machine=off, name="web01")
    assert (report.broken, report.point.disks[0].mode) == ((), Mode.INCREMENTAL)
    assert list(box.restored().values()) == list(box.image().values())
    extra_disk(box, node)
    box.write("vda", 0x22, 0, 512)
    exact(box, Mode.INCREMENTAL)


def test_a_chain_of_images_is_backed_up_as_what_the_guest_sees(make_box: MakeBox) -> None:
    box = empty(make_box)
    base, middle, top = (box.directory / name for name in ("base.raw", "middle.qcow2", "a.img"))
    base.write_bytes(b"\x41" * SIZE)
    qemu_img.create_overlay(middle, SIZE, backing=str(base), format="raw")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 66 {MiB} {MiB}", str(middle)], check=True, timeout=20)
    qemu_img.create_overlay(top, SIZE, backing=str(middle), format="qcow2")
    box.model["vda"] = bytearray(b"\x41" * SIZE)
    box.model["vda"][MiB : 2 * MiB] = b"\x42" * MiB
    extra_disk(box, {"driver": "qcow2", "discard": "unmap", "file": {"driver": "file", "filename": str(top)}})
    fill_and_follow(box)
    box.discard("vda", 0, CLUSTER)
    exact(box, Mode.INCREMENTAL)


# -- encrypted -------------------------------------------------------------------------------


def make_luks(path: Path, format: str) -> None:
    """An encrypted image."""
    options = "key-secret=key,iter-time=10"
    if format == "qcow2":
        options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    command = ["qemu-img", "create", "-q", "--object", SECRET_OBJECT[1], "-f", format, "-o", options]
    subprocess.run([*command, str(path), str(SIZE)], check=True, timeout=60)


@pytest.mark.parametrize("format", ["luks", "qcow2"])
def test_an_encrypted_disk_is_backed_up_as_the_guest_sees_it(make_box: MakeBox, format: str) -> None:
    """So the restore point is not encrypted."""
    box = empty(make_box)
    path = box.directory / "a.img"
    make_luks(path, format)
    key: dict[str, object] = (
        {"key-secret": "key"} if format == "luks" else {"encrypt": {"format": "luks", "key-secret": "key"}}
    )
    node: dict[str, object] = {"driver": format, "file": {"driver": "file", "filename": str(path)}, **key}
    extra_disk(box, node, *SECRET_OBJECT)
    if format == "luks":
        # A new image holds noise where nothing was written.
        box.write("vda", 0, 0, SIZE)
    fill_and_follow(box)
    shown = box.cli("info", f"qmp:{box.qmp}").stdout
    assert ("tracked in the image" if format == "qcow2" else "tracked while this QEMU runs") in shown
    box.write("vda", 0x31, 0, 512)
    extra_disk(box, node, *SECRET_OBJECT)
    exact(box, Mode.FULL if format == "luks" else Mode.INCREMENTAL)


# -- network ---------------------------------------------------------------------------------


@contextlib.contextmanager
def nbd_server(path: Path, socket: Path) -> Iterator[None]:
    """A server of a raw file."""
    command = ["qemu-nbd", "-t", "-f", "raw", "-e", "8", "--discard=unmap", "-k", str(socket), str(path)]
    server = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 20
        while not socket.exists():
            assert time.monotonic() < deadline, "qemu-nbd does not listen"
            time.sleep(0.01)
        yield
    finally:
        server.terminate()
        server.wait(20)


def test_a_network_disk_is_tracked_while_qemu_runs(make_box: MakeBox) -> None:
    box = empty(make_box)
    path, socket = box.directory / "remote.raw", box.directory / "remote.sock"
    path.write_bytes(bytes(SIZE))
    with nbd_server(path, socket):
        extra_disk(box, {"driver": "nbd", "discard": "unmap", "server": {"type": "unix", "path": str(socket)}})
        fill_and_follow(box)
        shown = box.cli("info", f"qmp:{box.qmp}").stdout
        assert "its format nbd cannot hold bitmaps" in shown
        refused = box.cli("overlay", "create", f"qmp:{box.qmp}", "vda", "--json")
        assert last_json(refused.stdout)["code"] == "usage", "whoever can, says where its file shall be"
        box.quit()


def test_a_stopped_encrypted_image_is_refused_by_name(tmp_path: Path) -> None:
    """Its key is not ours to have."""
    path = tmp_path / "a.img"
    make_luks(path, "luks")
    with pytest.raises(errors.ImageUnusable, match="luks"):
        images.inspect([urls.Image(target="vda", path=path, format=None)])


@pytest.mark.parametrize("raw", ["on", "off"])
def test_a_disk_with_a_data_file_shrunk_and_grown_back_is_exact(make_box: MakeBox, raw: str) -> None:
    """No bitmap knows the new zeroes, and a raw data file is written through without a map of its own."""
    box = empty(make_box)
    path, data = box.directory / "a.img", box.directory / "a.data"
    qemu_img.create(path, SIZE, options=f"data_file={data},data_file_raw={raw}")
    node: dict[str, object] = {
        "driver": "qcow2",
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(path)},
        "data-file": {"driver": "file", "filename": str(data), "discard": "unmap"},
    }
    extra_disk(box, node)
    box.write("vda", 0x11, 0, SIZE)
    exact(box, Mode.FULL)
    for size in (MiB + CLUSTER, SIZE):
        box.command("block_resize", {"node-name": "vda-format", "size": size})
    box.model["vda"][MiB + CLUSTER :] = bytes(SIZE - MiB - CLUSTER)
    exact(box, Mode.INCREMENTAL)
