"""What a restore point keeps of a machine beside its disks: how it was started, and its firmware's variables.

The firmware devices (pflash) cannot be frozen with the disks: QEMU lets no node be slid between such a
device and its image. They are read right after the freeze instead, through QEMU, because only QEMU knows
the content: a qcow2's tables reach the file late, and the file may be one that we cannot open. Each is
read until two readings in a row are equal. Then each byte had its value both before and after the moment
between the two, so that is the content of one moment (flash cannot go back within milliseconds to what it
was: its blocks must be erased for that). It is that of a machine that lost power then, which firmware is
made for (edk2, fault tolerant write): the same promise as for the disks, some milliseconds later.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pullback import errors, state
from pullback.engine import exports, replies, serving
from pullback.engine.monitor import Monitor
from pullback.engine.names import Names, prefix
from pullback.model import description as values
from pullback.model.description import Description, Firmware, ImageAt, Kind
from pullback.model.disks import Bus, Disk
from pullback.model.texts import showable
from pullback.programs import process

#: Bytes of /proc/PID/cmdline that are read; `values.MAX_ARGV` characters are kept.
_MAX_CMDLINE = 2 * values.MAX_ARGV
_NO_UUID = "00000000-0000-0000-0000-000000000000"
#: Reading 64 MiB takes a tenth of a second; a QEMU that does not answer must not hold the backup.
_READ_SECONDS = 20.0
#: Firmware writes its variables at boot and then seldom; one that never rests is not kept.
_READINGS = 5


# -- the machine -----------------------------------------------------------------------------


async def describe(monitor: Monitor, version: str) -> Description:
    """How the QEMU behind the monitor was started. What cannot be known is left out."""
    program, argv = _process(monitor.peer)
    uuid = replies.optional_text(replies.mapping(await monitor.execute("query-uuid"), "query-uuid"), "UUID")
    return Description(
        kind=Kind.QEMU,
        program=program,
        argv=argv,
        version=showable(version),
        machine_type=await _machine_type(monitor),
        uuid=showable(uuid) if uuid not in ("", _NO_UUID) else None,
    )


async def _machine_type(monitor: Monitor) -> str | None:
    """With its version, also where the command line has an alias (`q35`) or nothing."""
    try:
        found = await monitor.execute("qom-get", {"path": "/machine", "property": "type"})
    except errors.RefusedError:
        return None
    return showable(found.removesuffix("-machine")) if isinstance(found, str) else None


def _process(pid: int | None) -> tuple[str | None, tuple[str, ...]]:
    """Program and command line. The peer of a socket that was made by a manager is that manager: not kept."""
    place = Path(f"/proc/{pid}")
    try:
        with open(place / "cmdline", "rb") as file:
            words = file.read(_MAX_CMDLINE).decode("utf-8", "surrogateescape").split("\0")[:-1]
        name = (place / "comm").read_text(errors="replace").strip()
    except OSError:
        return None, ()
    try:
        program = os.readlink(place / "exe")
    except OSError:  # only who may trace the process is told
        program = None
    # `comm` can be set by anybody (-name debug-threads=on does), so any of the three will do.
    texts = (Path(program or "").name, Path(words[0]).name if words else "", name)
    if not any("qemu" in text or "kvm" in text for text in texts):
        return None, ()
    return showable(program) if program else None, values.command_line(words)


def of_images(disks: Sequence[Disk], version: str) -> Description:
    """A machine that is off: its images."""
    images = tuple(
        ImageAt(target=disk.target, path=showable(disk.image), format=showable(disk.format))
        for disk in disks[: values.MAX_IMAGES]
    )
    return Description(kind=Kind.IMAGES, version=showable(version), images=images)


# -- its firmware ----------------------------------------------------------------------------


async def firmware(
    monitor: Monitor, job: state.Job, disks: Sequence[Disk], *, server: Path | None = None
) -> tuple[tuple[Firmware, ...], tuple[str, ...]]:
    """The content of the firmware devices among `disks`, and sentences about those that could not be read.

    `job`: the one that is open; what is made for the reading carries its name. `server`: the socket of the
    NBD server that the job shares, if it is not our own. A device that cannot be read fails nothing.
    """
    found: list[Firmware] = []
    notes: list[str] = []
    devices = [disk for disk in disks if disk.bus is Bus.FIRMWARE and disk.node is not None]
    for index, disk in enumerate(devices[: values.MAX_FIRMWARES]):
        try:
            found.append(await _read(monitor, job, disk, index, server))
        except errors.PullbackError as error:
            notes.append(f"{disk.target}: the content of this firmware device is not kept ({str(error).rstrip('.')})")
    return tuple(found), tuple(notes)


async def _read(monitor: Monitor, job: state.Job, disk: Disk, index: int, server: Path | None) -> Firmware:
    if not 0 < disk.size <= values.MAX_FIRMWARE:
        raise errors.Unsupported(what="Keeping it", reason=f"it has {disk.size} bytes")
    assert disk.node is not None
    if server is None:
        await serving.ensure_private(monitor, job)
    id = Names(job.record.job, index).export("fw")
    export = f"{prefix(job.record.job)}{disk.target}-firmware"
    try:
        await exports.add_nbd(monitor, id=id, node=disk.node, name=export)
        data = await _steady(server or serving.private_socket(job), export, disk)
    finally:
        await exports.remove_one(monitor, id)
        if server is None:
            await serving.stop_unused(monitor, serving.register_of(job))
    return Firmware(name=disk.target, writable=not disk.read_only, data=data)


async def _steady(socket: Path, export: str, disk: Disk) -> bytes:
    """What two readings in a row agree on. Nobody writes to a device that is read-only."""
    before = await asyncio.to_thread(_content, socket, export, disk.size)
    if disk.read_only:
        return before
    for _ in range(_READINGS):
        again = await asyncio.to_thread(_content, socket, export, disk.size)
        if again == before:
            return again
        before = again
    raise errors.Unsupported(what="Keeping it", reason="it changed all the time while it was read")


def _content(socket: Path, export: str, size: int) -> bytes:
    """All bytes of an export, by qemu-img: it needs no more than one call, and has a deadline."""
    with tempfile.TemporaryDirectory(prefix="pullback-") as directory:
        copy = Path(directory) / "firmware"
        place = {"driver": "nbd", "export": export, "server": {"type": "unix", "path": str(socket)}}
        source = "json:" + json.dumps({"driver": "raw", "file": place})
        process.run(["qemu-img", "convert", "-O", "raw", source, copy], timeout=_READ_SECONDS)
        data = copy.read_bytes()
    if len(data) != size:
        raise errors.BadReply(who="QEMU", problem=f"{len(data)} bytes of {size} in export {export}")
    return data
