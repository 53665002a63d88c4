"""What this build of QEMU does wrong, found out on a sacrificial process of the same binary.

Two defects that no schema and no version number shows (distributions patch, or do not):

*iothread*: QEMU aborts when an NBD client leaves an export that lives in an iothread
(`nbd_blockdev_client_closed: Assertion qemu_in_main_thread()`; Debian's 7.2.22).

*clusters*: snapshot-access returns the guest's NEW data for a request that starts in a cluster
which was copied already and goes beyond its end (`hbitmap_status()` returned false for "dirty
first, then clean"; fixed upstream in February 2023 for 8.0; Debian's 7.2.22 has it). Requests that
do not cross a multiple of the filter's cluster, 64 KiB, are right; so is the classic engine.

The process has no machine, no guest and a main loop of its own; it takes about 60 ms once per
build, and the answer is cached by the binary's identity.
"""

from __future__ import annotations

import asyncio
import os
import struct
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pullback import errors
from pullback.engine import monitor
from pullback.engine.build import Build
from pullback.programs import process

_DEADLINE = 10.0
_CLUSTER = 65536

# NBD protocol, "Values": magics and the few requests that the probe needs.
_IHAVEOPT = 0x49484156454F5054
_REQUEST_MAGIC = 0x25609513
_OPT_EXPORT_NAME = 1
_CMD_READ, _CMD_DISC = 0, 2
_NO_ZEROES = 3  # fixed newstyle, no zeroes


@dataclass(frozen=True, slots=True, kw_only=True)
class Defects:
    """What to work around. The default is the careful assumption, for a binary that cannot be probed."""

    #: An NBD client of a disk in an iothread kills QEMU.
    iothread_nbd_aborts: bool = True
    #: Reads of a snapshot must not cross a cluster of the filter.
    snapshot_reads_cross: bool = True
    #: False if this is only the careful assumption.
    probed: bool = False


async def defects(build: Build) -> Defects:
    """The defects of a build; probed once, then remembered."""
    if not build.known:  # be careful
        return Defects()
    known = _read(build.load("build"))
    if known is not None:
        return known
    found = await _try(build.exe)
    if found.probed:
        build.save("build", asdict(found))
    return found


def _read(record: Mapping[str, object] | None) -> Defects | None:
    if record is None or not all(isinstance(value, bool) for value in record.values()):
        return None
    try:
        return Defects(**record)  # type: ignore[arg-type]
    except TypeError:
        return None


async def _try(exe: Path) -> Defects:
    try:
        with tempfile.TemporaryDirectory(prefix="pullback-probe-") as directory:
            async with _sacrifice(exe, Path(directory)) as qmp:
                crosses = await _reads_cross(qmp, Path(directory))
                aborts = await _aborts(qmp, Path(directory))
                return Defects(iothread_nbd_aborts=aborts, snapshot_reads_cross=crosses, probed=True)
    except (errors.PullbackError, OSError, EOFError, TimeoutError):
        return Defects()


@asynccontextmanager
async def _sacrifice(exe: Path, directory: Path) -> AsyncIterator[monitor.Monitor]:
    for name in ("disk", "scratch"):
        (directory / name).touch(mode=0o600)
        os.truncate(directory / name, 4 * _CLUSTER)
    socket = directory / "qmp"
    argv: list[str | Path] = [
        exe, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S",
        "-object", "iothread,id=io",
        "-blockdev", f"driver=null-co,node-name=null,size={_CLUSTER}",
        "-qmp", f"unix:{socket},server=on,wait=off",
    ]  # fmt: skip
    with process.Child(argv, grace=1.0) as child:
        await asyncio.to_thread(child.wait_until, socket.exists, what="monitor", timeout=_DEADLINE)
        async with asyncio.timeout(_DEADLINE), monitor.connect(socket) as qmp:
            yield qmp


async def _reads_cross(qmp: monitor.Monitor, directory: Path) -> bool:
    """Overwrite the first cluster below a filter, then read two clusters of the snapshot at once."""
    for name in ("disk", "scratch"):
        await qmp.execute("blockdev-add", {"driver": "file", "node-name": name, "filename": str(directory / name)})
    filter_node = {"driver": "copy-before-write", "node-name": "filter", "file": "disk", "target": "scratch"}
    await qmp.execute("blockdev-add", filter_node)
    await qmp.execute("blockdev-add", {"driver": "snapshot-access", "node-name": "snapshot", "file": "filter"})
    command = {"command-line": f'qemu-io filter "write -q -P 1 0 {_CLUSTER}"'}
    await qmp.execute("human-monitor-command", command)
    address = {"type": "unix", "data": {"path": str(directory / "nbd")}}
    await qmp.execute("nbd-server-start", {"addr": address})
    await qmp.execute("block-export-add", {"type": "nbd", "id": "snapshot", "node-name": "snapshot"})
    data = await _nbd_read(directory / "nbd", "snapshot", 2 * _CLUSTER)
    return any(data)


async def _aborts(qmp: monitor.Monitor, directory: Path) -> bool:
    """Leave an export in an iothread as a client, then ask whether QEMU still lives."""
    export = {"type": "nbd", "id": "null", "node-name": "null", "iothread": "io", "fixed-iothread": True}
    await qmp.execute("block-export-add", export)
    try:
        await _nbd_read(directory / "nbd", "null", 512)
        await asyncio.sleep(0.05)  # measured: the abort comes within 10 ms of the disconnect
        await qmp.execute("query-status", timeout=2.0)
    except (errors.OutcomeUnknown, OSError, EOFError):
        return True
    return False


async def _nbd_read(socket: Path, export: str, length: int) -> bytes:
    """One read over NBD with simple replies, and a clean disconnect (NBD protocol, "Export name")."""
    async with asyncio.timeout(_DEADLINE):
        reader, writer = await asyncio.open_unix_connection(socket)
        try:
            await reader.readexactly(18)
            name = export.encode()
            writer.write(struct.pack(">IQII", _NO_ZEROES, _IHAVEOPT, _OPT_EXPORT_NAME, len(name)) + name)
            await reader.readexactly(10)
            writer.write(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _CMD_READ, 1, 0, length))
            await reader.readexactly(16)
            data = await reader.readexactly(length)
            writer.write(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _CMD_DISC, 2, 0, 0))
            await writer.drain()
            return data
        finally:
            writer.close()
