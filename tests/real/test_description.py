"""What a restore point keeps of a machine beside its disks, on real QEMU."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from kit import Box, MakeBox
from pullback import errors, state
from pullback.engine import description, disks, monitor, offline
from pullback.engine.exports import listed
from pullback.model import urls
from pullback.model.description import Description, Firmware, Kind
from pullback.programs import process, qemu, qemu_img
from pullback.units import KiB, MiB

pytestmark = pytest.mark.timeout(60)
JOB = "0a1b2c3d"
CODE_SIZE, VARS_SIZE = 256 * KiB, 528 * KiB


def flash(box_directory: Path, *, format: str = "raw") -> tuple[str, ...]:
    """The words for a machine with code and variables; the files are made, each byte of them told."""
    code, variables = box_directory / "code.fd", box_directory / f"vars.{format}"
    # It halts at once, as the machine without firmware devices does.
    code.write_bytes(bytes(CODE_SIZE - 64 * KiB) + qemu.halting_firmware())
    raw = box_directory / "vars.fd"
    raw.write_bytes(content())
    if format != "raw":
        process.run(["qemu-img", "convert", "-O", format, raw, variables], timeout=20)
    else:
        raw.rename(variables)
    return (
        *("-drive", f"if=pflash,format=raw,readonly=on,file={code}"),
        *("-drive", f"if=pflash,format={format},file={variables}"),
    )


def content() -> bytes:
    """The bytes of a machine's variables: some erased, some zero, all else different."""
    varied = b"".join(number.to_bytes(4, "little") for number in range(64 * KiB // 4))
    return varied + bytes(64 * KiB) + b"\xff" * (VARS_SIZE - 128 * KiB)


def machine(make: MakeBox, tmp_path: Path, *, format: str = "raw", extra: tuple[str, ...] = ()) -> Box:
    """A running machine with firmware devices; its processor halts."""
    box = make(start=False, extra=(*flash(tmp_path, format=format), *extra))
    box.process = qemu.start(
        qemu.Machine(name=box.name, disks=box.disks, qmp=[box.qmp, box.other], hmp=box.hmp, extra=box.extra)
    )
    return box


async def _firmware(box: Box) -> tuple[tuple[Firmware, ...], tuple[str, ...], list[str]]:
    """The firmware, what was said, and what is exported afterwards."""
    async with monitor.connect(box.qmp) as qmp:
        job = state.begin_job(box.directories, job=JOB, socket=box.qmp, machine=box.name, command="test")
        found, _ = await disks.find(qmp, has_graph=True)
        kept, notes = await description.firmware(qmp, job, found)
        left = [export["id"] for export in await listed(qmp)]
        job.remove()
        return kept, notes, left


async def _description(box: Box) -> Description:
    async with monitor.connect(box.qmp) as qmp:
        return await description.describe(qmp, "7.2")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_code_and_variables_are_read_byte_for_byte(make_box: MakeBox, tmp_path: Path, format: str) -> None:
    box = machine(make_box, tmp_path, format=format)
    (code, variables), notes, _ = asyncio.run(_firmware(box))
    assert (code.name, code.writable, code.data) == ("pflash0", False, (tmp_path / "code.fd").read_bytes())
    assert (variables.name, variables.writable) == ("pflash1", True)
    assert variables.data == content()
    assert notes == ()


def test_what_the_machine_wrote_is_read_and_not_what_the_file_says_yet(make_box: MakeBox, tmp_path: Path) -> None:
    """A qcow2 whose new clusters are still in QEMU's cache of tables only."""
    box = machine(make_box, tmp_path, format="qcow2")
    written = bytes([0x5A]) * 64 * KiB
    answer = qemu.hmp(box.hmp, f'qemu-io pflash1 "write -q -P 0x5a {64 * KiB} {64 * KiB}"')
    assert answer == ""
    (_, variables), _, _ = asyncio.run(_firmware(box))
    assert variables.data == content()[: 64 * KiB] + written + content()[128 * KiB :]


def test_reading_leaves_no_export_no_server_and_no_file(make_box: MakeBox, tmp_path: Path) -> None:
    box = machine(make_box, tmp_path)
    _, _, left = asyncio.run(_firmware(box))
    assert left == []
    assert list((box.directory / "state").rglob("*.sock")) == []
    box.command("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(box.directory / "free.sock")}}})


def test_variables_that_change_while_they_are_read_are_read_again(make_box: MakeBox, tmp_path: Path) -> None:
    """What is kept is the content of one moment: never the first byte of one write with the last of another."""
    box = machine(make_box, tmp_path)
    ended = threading.Event()

    def write() -> None:
        for value in range(40):
            qemu.hmp(box.hmp, f'qemu-io pflash1 "write -q -P {value + 1} 0 {VARS_SIZE}"')
            ended.wait(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    kept, notes, _ = asyncio.run(_firmware(box))
    writer.join()
    if len(kept) == 2:
        assert len(set(kept[1].data)) == 1 or kept[1].data == content()
    else:
        assert "it changed all the time" in notes[0]


def test_a_device_that_cannot_be_read_is_a_note_and_no_failure(make_box: MakeBox, tmp_path: Path) -> None:
    box = machine(make_box, tmp_path)
    box.command("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(box.directory / "their.sock")}}})
    kept, notes, _ = asyncio.run(_firmware(box))
    assert kept == ()
    assert [note.split(":")[0] for note in notes] == ["pflash0", "pflash1"]
    assert "NBD server" in notes[0]


def test_a_machine_without_firmware_devices_has_none(box: Box) -> None:
    assert asyncio.run(_firmware(box))[:2] == ((), ())


def test_a_machine_is_described_by_its_command_line_without_secrets(make_box: MakeBox) -> None:
    uuid = "6c1e7b0e-8b5c-4f2f-9d1f-0d6b7f9a3c11"
    extra = ("-uuid", uuid, "-object", "secret,id=sec0,data=hunter2", "-object", "secret,id=sec1,data=hun,,ter3")
    box = make_box(extra=extra)
    found = asyncio.run(_description(box))
    assert box.process is not None
    assert found.kind is Kind.QEMU
    assert found.program == os.readlink(f"/proc/{box.process.pid}/exe")
    assert found.uuid == uuid
    assert found.machine_type is not None
    assert found.machine_type.startswith("pc-q35-")
    words = Path(f"/proc/{box.process.pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    expected = [word.replace("hunter2", "***").replace("hun,,ter3", "***") for word in words]
    assert list(found.argv) == [*expected]
    assert "secret,id=sec0,data=***" in found.argv


def test_a_socket_that_a_manager_made_does_not_pass_the_manager_off_as_the_machine(short_dir: Path) -> None:
    assert description._process(os.getpid()) == (None, ())


def test_images_are_described_by_their_names(short_dir: Path) -> None:
    path = short_dir / "a.qcow2"
    qemu_img.create(path, MiB)
    directories = state.directories(short_dir / "state")

    async def described() -> Description:
        wanted = urls.ImagesMachine(images=(urls.Image(target="vda", path=path),))
        async with offline.connect(wanted, directories, command="test", name="web01") as found:
            return description.of_images(await found.disks(), found.version)

    found = asyncio.run(described())
    assert found.kind is Kind.IMAGES
    assert [(image.target, image.path, image.format) for image in found.images] == [("vda", str(path), "qcow2")]
    assert found.argv == ()


def test_a_monitor_that_is_lost_meanwhile_is_an_error_of_the_machine(box: Box) -> None:
    async def lost() -> None:
        async with monitor.connect(box.qmp) as qmp:
            box.kill()
            await description.describe(qmp, "7.2")

    with pytest.raises(errors.OutcomeUnknown):
        asyncio.run(lost())
