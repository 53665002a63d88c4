"""Destinations of a push: making them, opening them in QEMU, and letting go of them.

A file that we make has another name until all is done, beside its own: `.pullback-<job>-dst0.part`. So
nothing is visible before it is complete, and whoever clears up after a death knows what is to go.

A new raw file is written through a qcow2 image without data (`data-file`): QEMU's backup job writes its
zeroes so that they take room in a raw file (QEMU 7.2, no BDRV_REQ_MAY_UNMAP in block/block-copy.c), but
a qcow2 only notes them. What lies in the data file is the raw disk, at its own places.

A destination may hang at any time, and QEMU waits in every draining command for a request that hangs,
with its main lock held: the guest would stand still. So

- before such a command each destination must have answered a child of ours (`answers`),
- NBD goes through a `relay`, which cuts the connection when the server hangs, or when it is told to. (QEMU's
  `yank` alone is not enough: who waits for room in a unix socket does not notice it, tried on 7.2.)
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pullback import errors, state
from pullback.engine import graph, jobs, relay, scratch
from pullback.engine.monitor import Monitor
from pullback.engine.names import Names, prefix
from pullback.model import checkpoints
from pullback.model.pushing import Destination, Format, Kind, PushedDisk, PushPart
from pullback.programs import process, qemu_img

#: Seconds in which a server must have told what it has.
_ASK_SECONDS = 5.0
#: Seconds for which QEMU may wait for a connection, with its main lock held; we have asked the server right before.
_OPEN_SECONDS = 1
#: Seconds to see whether a cancelled job ends by itself.
_PATIENCE_SECONDS = 1.0
_END_SECONDS = 15.0
#: So many chunks may be on their way to one destination (QEMU's own default), or to a server.
_WORKERS, _NBD_WORKERS = 64, 16
#: How the name of a file ends that is not complete.
PART = ".part"
_OFFER = "Choose a file that is not there yet, or say that it is to be reused."


# -- making ----------------------------------------------------------------------------------


def describe(job: str, index: int, part: PushPart, directory: Path) -> PushedDisk:
    """What will be made for a disk. Pure."""
    to, named = part.destination, Names(job, index)
    made = to.kind is Kind.FILE and not to.reuse
    assert part.disk.node is not None
    return PushedDisk(
        index=index,
        target=part.disk.target,
        size=part.disk.size,
        node=part.disk.node,
        destination=to,
        incremental=bool(part.since),
        part=str(to.path.parent / f".{named.destination}{PART}") if made else None,
        meta=str(directory / named.meta) if made and to.format is Format.RAW else None,
        checkpoint=part.checkpoint,
        freeze=part.freeze,
    )


def refuse_taken(disks: Sequence[PushedDisk], used: Iterable[str]) -> None:
    """No destination twice, and none that is a part of the machine (`used`: files of its nodes)."""
    taken: dict[str | tuple[int, ...], str] = {}
    for path in used:
        if (mine := _identity(path)) is not None:
            taken[mine] = "the machine itself"
    for disk in disks:
        place = disk.destination.place
        identity = _identity(place) if disk.destination.kind is not Kind.NBD else None
        for key in (place, identity) if identity is not None else (place,):
            if key in taken:
                raise _unusable(disk, f"it is in use by {taken[key]}")
            taken[key] = f"disk {disk.target}"


def _identity(path: str) -> tuple[int, ...] | None:
    """Of a file or block device that is there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_rdev,) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def make(disk: PushedDisk, owner: tuple[int, int] | None, *, longest: int | None) -> PushedDisk:
    """Make or check one destination; `owner` is QEMU's user.

    `longest` is the largest chunk that may be copied at once, if there is a limit. Raises `DestinationUnusable`.
    """
    kind = disk.destination.kind
    try:
        if kind is Kind.FILE and not disk.destination.reuse:
            _make_file(disk, owner)
            return disk
        if kind is Kind.BLOCK and not Path(disk.destination.place).is_block_device():
            raise _unusable(disk, "it is no block device")
        if disk.destination.format is Format.QCOW2 and not disk.destination.reuse:
            _require_size(disk, _info(disk, Format.RAW), exactly=False)
            qemu_img.create(disk.destination.place, disk.size)
        return _checked(disk, longest)
    except errors.ProgramFailed as error:
        raise _unusable(disk, error.message.splitlines()[-1].removeprefix("qemu-img: ").rstrip(".")) from error
    except OSError as error:
        raise _unusable(disk, os.strerror(error.errno or 0)) from error


def _make_file(disk: PushedDisk, owner: tuple[int, int] | None) -> None:
    if os.path.lexists(disk.destination.place):
        raise _unusable(disk, "it exists already", _OFFER)
    assert disk.part is not None
    made = [_touch(disk.part)]
    try:
        if disk.meta is None:
            qemu_img.create(disk.part, disk.size)
        else:
            made.append(_touch(disk.meta))
            data = disk.part.replace(",", ",,")
            qemu_img.create(disk.meta, disk.size, options=f"data_file={data},data_file_raw=off")
        if owner is not None and os.geteuid() == 0:
            for descriptor in made:
                os.fchown(descriptor, *owner)
    finally:
        for descriptor in made:
            os.close(descriptor)


def _touch(path: str) -> int:
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)


def _checked(disk: PushedDisk, longest: int | None) -> PushedDisk:
    """What is there already has the right format and size."""
    found = _info(disk, disk.destination.format)
    if disk.destination.format is Format.RAW:
        _require_size(disk, found, exactly=disk.destination.kind is Kind.FILE)
        return disk
    _require_size(disk, found, exactly=True)
    chunk = max(checkpoints.GRANULARITY, found.cluster)
    if longest is not None and chunk > longest:
        raise _unusable(
            disk,
            f"its clusters have {found.cluster} bytes; this build of QEMU reads more than {longest} at once wrongly",
            "Make it with smaller clusters.",
        )
    return replace(disk, chunk=chunk)


def _require_size(disk: PushedDisk, found: qemu_img.ImageInfo, *, exactly: bool) -> None:
    if found.virtual_size < disk.size or (exactly and found.virtual_size > disk.size):
        raise _unusable(disk, f"it has {found.virtual_size} bytes, the disk has {disk.size}")


def _info(disk: PushedDisk, format: Format) -> qemu_img.ImageInfo:
    return qemu_img.info(disk.destination.place, format=str(format), timeout=_ASK_SECONDS)


def _unusable(disk: PushedDisk, reason: str, way_out: str = "Name another destination.") -> errors.DestinationUnusable:
    return errors.DestinationUnusable(place=disk.destination.place, target=disk.target, reason=reason, way_out=way_out)


# -- in QEMU ---------------------------------------------------------------------------------


async def open_node(monitor: Monitor, job: state.Job, disk: PushedDisk) -> None:
    """The destination as a node. Raises `DestinationUnusable`."""
    if not await _answers(disk.destination):
        raise _unusable(disk, "it does not answer")
    if disk.destination.kind is Kind.NBD:
        await asyncio.to_thread(relay.start, _relayed(job, disk.index), disk.destination.place, monitor.user())
    try:
        await monitor.execute("blockdev-add", _node(job, disk))
    except errors.RefusedError as error:
        raise _unusable(disk, f"QEMU says: {error.reason}") from error
    nodes = graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True}))
    found = nodes[Names(job.record.job, disk.index).destination].size
    if found != disk.size:
        raise _unusable(disk, f"it has {found} bytes, the disk has {disk.size}")


def _relayed(job: state.Job, index: int) -> Path:
    """Where the relay to a server listens."""
    return Path(job.record.runtime) / f"relay{index}"


def _node(job: state.Job, disk: PushedDisk) -> dict[str, object]:
    named, to = Names(job.record.job, disk.index), disk.destination
    written, relayed = str(disk.part or to.place), _relayed(job, disk.index)
    # Where the classic engine freezes, the job is not told what are holes: it reads zeroes.
    node: dict[str, object] = {"node-name": named.destination, "discard": "unmap", "detect-zeroes": "unmap"}
    if to.kind is not Kind.NBD:
        node["cache"] = {"direct": to.kind is Kind.BLOCK, "no-flush": True}
    if disk.meta is not None:
        node |= {"driver": "qcow2", "file": _file(named.protocol, disk.meta), "data-file": _file(named.data, written)}
    elif to.format is Format.QCOW2:
        node |= {"driver": "qcow2", "file": _protocol(named.protocol, to, written, relayed)}
    else:
        node |= {"driver": "raw", "file": _protocol(named.protocol, to, written, relayed)}
        if to.kind is not Kind.FILE:
            node["size"] = disk.size  # it may be larger than the disk
    return node


def _protocol(name: str, to: Destination, path: str, relayed: Path) -> dict[str, object]:
    if to.kind is Kind.NBD:
        # A connection that was lost stays lost: the job fails, instead of waiting.
        patience = {"reconnect-delay": 0, "open-timeout": _OPEN_SECONDS}
        server = {"type": "unix", "path": str(relayed)}
        return {"driver": "nbd", "node-name": name, "server": server, "export": to.server.export, **patience}
    return _file(name, path, driver="host_device" if to.kind is Kind.BLOCK else "file")


def _file(name: str, path: str, driver: str = "file") -> dict[str, object]:
    """QEMU would flush with its main lock held, gigabytes perhaps: so we do (`sync`), and QEMU does not.

    A block device is written past the host's cache, for the kernel writes that out when it is closed.
    """
    cache = {"direct": driver == "host_device", "no-flush": True}
    return {"driver": driver, "node-name": name, "filename": path, "discard": "unmap", "cache": cache}


async def sync(disk: PushedDisk) -> None:
    """Make durable what is copied, from here: as long as it takes, for nobody waits for it.

    Raises `PushFailed`, `CleanupIncomplete`.
    """
    to = disk.destination
    try:
        if to.kind is Kind.NBD:
            await _flush(to)
        else:
            await asyncio.to_thread(state.sync_file, Path(disk.part or to.place))
    except OSError as error:
        raise errors.PushFailed(
            target=disk.target, place=to.place, reason=f"writing out: {os.strerror(error.errno or 0)}"
        ) from error


async def _flush(to: Destination) -> None:
    """Flush a server, as long as it greets. Raises `OSError`, `CleanupIncomplete`."""
    child = await asyncio.create_subprocess_exec(
        *("qemu-io", "-f", "raw", "-c", "flush", to.place),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env=process.environment(None),
    )
    try:
        while child.returncode is None:
            with suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), _ASK_SECONDS)
            if child.returncode is None and not await asyncio.to_thread(relay.greets, to.server):
                raise errors.CleanupIncomplete(what=f"the push to {to.place}", reason="it does not answer")
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        raise OSError(errno.EIO, "the server refused to flush")


def workers(disk: PushedDisk) -> int:
    """How many chunks may be on their way at once."""
    return _NBD_WORKERS if disk.destination.kind is Kind.NBD else _WORKERS


async def close_node(monitor: Monitor, job: state.Job, disk: PushedDisk) -> None:
    """All is copied: write out what QEMU still holds, and close it. Raises `PushFailed`, `CleanupIncomplete`.

    `blockdev-reopen` to read-only is the one command that tells whether flushing failed. A node that is
    gone was closed well, by one who died right after.
    """
    named = Names(job.record.job, disk.index)
    if named.destination not in await _there(monitor):
        return
    await sync(disk)
    await require_answer([disk.destination])
    below: dict[str, object] = {"file": named.protocol}
    if disk.meta is not None:
        below["data-file"] = named.data
    if disk.destination.format is Format.QCOW2 and disk.destination.reuse:
        below["backing"] = await _backing(monitor, named.destination)
    node = {**_node(job, disk), **below, "read-only": True}
    try:
        await monitor.execute("blockdev-reopen", {"options": [node]})
    except errors.RefusedError as error:
        raise errors.PushFailed(
            target=disk.target, place=disk.destination.place, reason=f"writing out: {error.reason}"
        ) from error
    await monitor.execute("blockdev-del", {"node-name": named.destination})
    if disk.part is None:
        await sync(disk)


async def _backing(monitor: Monitor, node: str) -> str | None:
    """The node behind a reused image: reopening must name it."""
    edges = await monitor.execute("x-debug-query-block-graph")
    return graph.parse_graph(await _there(monitor), edges).child(node, "backing")


async def _there(monitor: Monitor) -> Mapping[str, graph.Node]:
    return graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True}))


# -- what may hang ---------------------------------------------------------------------------


async def require_answer(destinations: Iterable[Destination]) -> None:
    """Raise `CleanupIncomplete` if one does not answer a child of ours; a refusal is an answer."""
    for to in destinations:
        if not await _answers(to):
            raise errors.CleanupIncomplete(what=f"the push to {to.place}", reason="it does not answer")


async def _answers(to: Destination) -> bool:
    if to.kind is Kind.FILE:
        return await scratch.answers(to.path.parent)
    if to.kind is Kind.BLOCK:
        return await scratch.synced(to.path)
    try:
        # A flush, for it goes through to what lies behind the server.
        command = ["qemu-io", "-f", "raw", "-c", "flush", to.place]
        await asyncio.to_thread(process.run, command, timeout=_ASK_SECONDS)
    except errors.ProgramFailed as error:
        return not error.status.startswith("no end")
    return True


async def release(monitor: Monitor, job: state.Job) -> None:
    """Give up what is copied to the job's destinations: end the copying jobs, close the destinations.

    Raises `CleanupIncomplete` if a destination hangs so that this cannot be done without hanging QEMU.
    """
    ours = prefix(job.record.job)
    copying = f"{ours}push"
    if not await _cancelled(monitor, copying, _PATIENCE_SECONDS):
        await _cut(monitor, job)
        if not await _cancelled(monitor, copying, _END_SECONDS):
            raise errors.CleanupIncomplete(what="a push", reason="its destination does not answer")
    await _cut(monitor, job)
    await asyncio.to_thread(_empty, job)
    for name, node in (await _there(monitor)).items():
        if name.startswith((f"{ours}dstp", f"{ours}dstd")) and not await _file_answers(node):
            raise errors.CleanupIncomplete(what=f"the push to {node.file}", reason="it does not answer")
    await jobs.end(monitor, copying)


async def remove_nodes(monitor: Monitor, ours: str) -> None:
    """Close what `release` gave up, where nothing else of the job is left (`sweep` does it elsewhere)."""
    for name in await _there(monitor):
        if name.rstrip("0123456789") == f"{ours}dst":
            await monitor.execute("blockdev-del", {"node-name": name})


async def _file_answers(node: graph.Node) -> bool:
    if node.driver == "host_device":
        return await scratch.synced(Path(node.file))
    return node.driver != "file" or await scratch.answers(Path(node.file).parent)


def _empty(job: state.Job) -> None:
    """What will be removed needs not be written out when it is closed."""
    for path in job.record.scratch:
        if path.endswith(PART):
            with suppress(OSError):
                os.truncate(path, 0)


async def _cancelled(monitor: Monitor, prefix: str, seconds: float) -> bool:
    for job, status in (await jobs.statuses(monitor)).items():
        if job.startswith(prefix) and status != "concluded":
            with suppress(errors.RefusedError):  # it may conclude by itself just now
                # A job that sleeps for its limit's sake does not hear of its end before (7.2).
                await monitor.execute("block-job-set-speed", {"device": job, "speed": 0})
                await monitor.execute("job-cancel", {"id": job, "force": True})

    async def ended() -> bool:
        found = await jobs.statuses(monitor)
        return all(status == "concluded" for job, status in found.items() if job.startswith(prefix))

    try:
        await monitor.poll(ended, what="job-cancel", timeout=seconds)
    except errors.OutcomeUnknown:
        if not await ended():  # that raises too, if it is QEMU that does not answer
            return False
    return True


async def _cut(monitor: Monitor, job: state.Job) -> None:
    """Cut all connections of the job's destinations, in QEMU and in the relays."""
    ours = prefix(job.record.job)
    for name, node in (await _there(monitor)).items():
        if name.startswith(f"{ours}dstp") and node.driver == "nbd":
            with suppress(errors.RefusedError):  # it was cut before
                await monitor.execute("yank", {"instances": [{"type": "block-node", "node-name": name}]})
            number = int(name.removeprefix(f"{ours}dstp"))
            _relayed(job, number).unlink(missing_ok=True)
