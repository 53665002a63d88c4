"""External snapshots that carry tracking along: an overlay put on a disk's image, and committed back into it.

    create   one transaction over all disks:  overlay on top; for each of our bitmaps one of the same name,
             granularity and state on the overlay, and the bits of the image's own merged into it
    commit   data goes down while the guest runs ─▶ ready ─▶ one transaction: the image's bitmaps become
             copies of the overlay's, the newest recording ─▶ pivot

So a chain is always whole on the top image, and what holds for a disk without overlays holds here. The
bitmaps in the image below stay as they were at that instant: whoever goes back to that image, or commits
into it by other means (which that image's newest bitmap records), finds a chain that is true of it.

The order is chosen for disks in an iothread, where QEMU drains a transaction's disks only one by one, from
the action on: the overlay comes first, so that no write falls between it and the bits that are merged. In a
commit, what the guest writes after the merge is copied down before the pivot, and recorded there.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pullback import errors
from pullback.engine import disks, graph, jobs, replies, transaction
from pullback.engine.monitor import Monitor
from pullback.engine.names import prefix
from pullback.engine.pause import uninterrupted
from pullback.engine.undoing import despite
from pullback.model import checkpoints
from pullback.model.checkpoints import Chain
from pullback.model.disks import Bitmap, Disk
from pullback.model.overlays import Advance, Committed, NewOverlay, Overlay
from pullback.programs import qemu_img

#: Nodes of overlays. They are the machine's own from then on, so they have no name of a job.
_NODE = "overlay-"
_FILE = "-file"
_POLL_SECONDS = 0.1
#: From `job-complete` to the pivot: what the guest wrote last is copied, and flushed.
_PIVOT_SECONDS = 120.0
_MODE = 0o600


# -- on top ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One disk's overlay in the making."""

    disk: Disk
    path: Path
    #: The overlay's node.
    node: str


async def create(monitor: Monitor, parts: Sequence[NewOverlay], *, has_graph: bool) -> tuple[Overlay, ...]:
    """Put new overlays on disks at one instant, with their checkpoints; all of them, or none.

    To be used inside `pause.uninterrupted`. Raises `DiskBusy`, `BusyError`, `DestinationExists`, `Unsupported`.
    """
    found, whole = await disks.find(monitor, has_graph=has_graph)
    await _remove_strays(monitor, whole)
    for part in parts:
        await _require_free(monitor, part.disk, whole)
        require_stackable(part.disk)
    made = [
        _Part(disk=part.disk, path=part.path, node=f"{_NODE}{secrets.token_hex(6)}") for part in _current(parts, found)
    ]
    files: list[Path] = []
    try:
        for one in made:
            await asyncio.to_thread(make_file, one.path, one.disk, monitor.user())
            files.append(one.path)
            await _open(monitor, one, has_graph=has_graph)
        await _put(monitor, made)
    except errors.OutcomeUnknown:
        raise  # the overlays may be in use
    except BaseException as error:
        await despite(error, _undo(monitor, made, files))
        raise
    return tuple(told(one.disk, one.path) for one in made)


def _current(parts: Sequence[NewOverlay], found: Sequence[Disk]) -> list[NewOverlay]:
    """The same, with the disks as they are now."""
    now = {disk.qdev: disk for disk in found}
    return [NewOverlay(disk=now[part.disk.qdev], path=part.path) for part in parts]


def told(disk: Disk, path: Path) -> Overlay:
    """An overlay that was made."""
    names = tuple(link.mark.name for link in _carried(disk).links)
    return Overlay(target=disk.target, path=str(path), backing=disk.image, checkpoints=names)


def require_stackable(disk: Disk) -> None:
    """Can an overlay be put on the disk's image? Raises `Unsupported`."""
    what = f"an overlay of disk {disk.target}"
    if disk.read_only:
        raise errors.Unsupported(what=what, reason="the disk is read-only")
    if disk.untrackable and "-snapshot" in disk.untrackable:
        raise errors.Unsupported(what=what, reason=disk.untrackable)
    if not disk.image.startswith(("/", "json:")) and "://" not in disk.image:
        reason = f"QEMU has its image under the relative name {disk.image!r}, which no overlay elsewhere can name"
        raise errors.Unsupported(what=what, reason=reason)


async def _require_free(monitor: Monitor, disk: Disk, whole: graph.Graph) -> None:
    """Nothing of ours or of others is at work on it. Raises `DiskBusy`, `BusyError`."""
    assert disk.node is not None
    if disk.root is not None and disk.root.startswith(graph.OURS):
        raise errors.DiskBusy(target=disk.target, holder="a snapshot that was made with the filter engine")
    kinds = await jobs.types(monitor)
    for job in whole.jobs_on(disk.node):
        raise errors.DiskBusy(target=disk.target, holder=f"the {kinds.get(job, 'block')} job {job}")
    for bitmap in disk.bitmaps:
        if bitmap.busy and checkpoints.parse(bitmap.name):
            raise errors.BusyError(what=f"bitmap {bitmap.name} of {disk.target}", holder="a job or an export uses it")


def make_file(path: Path, disk: Disk, user: tuple[int, int] | None) -> None:
    """An empty overlay, with mode and owner of the image below. Raises `DestinationExists`, `CannotWrite`."""
    below = graph.image_path(disk.image)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE))
    except FileExistsError as error:
        raise errors.DestinationExists(path=str(path)) from error
    except OSError as error:
        raise errors.CannotWrite(path=str(path), reason=error.strerror or str(error)) from error
    try:
        qemu_img.create_overlay(path, disk.size, backing=disk.image, format=disk.format)
        if below is not None and os.path.isfile(below):
            status = os.stat(below)
            os.chmod(path, status.st_mode & 0o777)
            user = (status.st_uid, status.st_gid)
        if user is not None and os.geteuid() == 0:
            os.chown(path, *user)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


async def _open(monitor: Monitor, part: _Part, *, has_graph: bool) -> None:
    """The overlay's nodes, with nothing below yet, and the cache mode of the image."""
    assert part.disk.node is not None
    cache, zeroes = await _habits(monitor, part.disk.node)
    common: dict[str, object] = {"discard": "unmap", "cache": cache}
    name = part.node + _FILE
    await monitor.execute("blockdev-add", {"driver": "file", "node-name": name, "filename": str(part.path), **common})
    options = {"driver": "qcow2", "node-name": part.node, "file": name, "backing": None, "detect-zeroes": zeroes}
    await monitor.execute("blockdev-add", {**options, **common})


async def _habits(monitor: Monitor, node: str) -> tuple[dict[str, bool], str]:
    """Cache mode and zero detection of a node."""
    for record in replies.objects(await monitor.execute("query-named-block-nodes", {"flat": True}), "nodes"):
        if record.get("node-name") == node:
            cache = replies.mapping(record.get("cache"), "cache")
            direct, unsafe = replies.flag(cache, "direct"), replies.flag(cache, "no-flush")
            zeroes = replies.optional_text(record, "detect_zeroes") or "off"
            return {"direct": direct, "no-flush": unsafe}, zeroes
    return {"direct": False, "no-flush": False}, "off"


async def _put(monitor: Monitor, parts: Sequence[_Part]) -> None:
    """The one instant."""
    actions: list[transaction.Action] = []
    for part in parts:
        assert part.disk.node is not None
        actions.append(transaction.Stack(node=part.disk.node, overlay=part.node))
    for part in parts:
        actions += carry(part.disk, part.node)
    await transaction.run(monitor, actions)


def _carried(disk: Disk) -> Chain:
    """The checkpoints that go on; a worthless chain does not."""
    chain = checkpoints.chain(disk.bitmaps)
    return Chain() if chain.problem else chain


def carry(disk: Disk, overlay: str) -> list[transaction.Action]:
    """A copy of each of the disk's checkpoints on its overlay's node."""
    assert disk.node is not None
    actions: list[transaction.Action] = []
    for link in _carried(disk).links:
        actions.append(_copy_of(link.bitmap, overlay, persistent=True))
        actions.append(_merge(disk.node, overlay, link.bitmap.name))
    return actions


def _copy_of(bitmap: Bitmap, node: str, *, persistent: bool) -> transaction.Add:
    """A new bitmap like another, without its bits."""
    return transaction.Add(
        node=node,
        name=bitmap.name,
        persistent=persistent,
        recording=bitmap.recording,
        granularity=bitmap.granularity,
    )


def _merge(source: str, node: str, name: str) -> transaction.MergeInto:
    return transaction.MergeInto(node=node, target=name, sources=(name,), source_node=source)


async def _undo(monitor: Monitor, parts: Sequence[_Part], files: Sequence[Path]) -> None:
    """Remove nodes that were not put anywhere, and then their files."""
    for part in parts:
        for node in (part.node, part.node + _FILE):
            with suppress(errors.RefusedError):  # it was not made, or it is in use
                await monitor.execute("blockdev-del", {"node-name": node})
    used = set(graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True})))
    for part in parts:
        if part.path in files and not used & {part.node, part.node + _FILE}:
            part.path.unlink(missing_ok=True)


async def _remove_strays(monitor: Monitor, whole: graph.Graph) -> None:
    """Nodes of overlays that nobody uses: left by a run that was killed. QEMU refuses to remove those in use."""
    for name in sorted(whole.nodes):  # a node comes before its file's
        if name.startswith(_NODE):
            with suppress(errors.RefusedError):
                await monitor.execute("blockdev-del", {"node-name": name})


# -- and back --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Commit:
    """A commit on its way."""

    job: str
    disk: Disk
    base: graph.Node


async def commit(monitor: Monitor, job: str, disk: Disk, advance: Advance, *, has_graph: bool) -> Committed:
    """Commit a disk's top image into the one below, while the guest runs; its checkpoints go on there.

    `job`: eight hex digits. Raises `DiskBusy`, `BusyError`, `UsageError` (nothing is below),
    `OverlayNotCommitted`: the overlay is on top still, and needed.
    """
    found, whole = await disks.find(monitor, has_graph=has_graph)
    disk = next(now for now in found if now.qdev == disk.qdev)
    assert disk.node is not None
    await _require_free(monitor, disk, whole)
    below = whole.backing_chain(disk.node)
    if not below:
        raise errors.UsageError(problem=f"Disk {disk.target} is no overlay: nothing lies below {disk.image}")
    if disk.read_only:
        raise errors.Unsupported(what=f"committing disk {disk.target}", reason="it is read-only")
    going = _Commit(job=f"{prefix(job)}commit0", disk=disk, base=below[0])
    try:
        await _start(monitor, going)
        await _until_ready(monitor, going, advance)
        await uninterrupted(_finish(monitor, going))
    except BaseException as error:
        await despite(error, jobs.end(monitor, prefix(job)))
        raise
    notes = await _remove_nodes(monitor, disk.node, whole)
    after = await disks.find(monitor, has_graph=has_graph)
    return await _outcome(going, after[0], notes)


async def _outcome(going: _Commit, found: Sequence[Disk], notes: Sequence[str]) -> Committed:
    disk = going.disk
    now = next((now for now in found if now.qdev == disk.qdev), None)
    if now is None or now.node != going.base.name:
        raise _failed(going, "the machine's disk is another image than it should be")
    names = tuple(link.mark.name for link in checkpoints.chain(now.bitmaps).links)
    return Committed(
        target=disk.target, overlay=disk.image, image=now.image, checkpoints=names, removed=False, notes=tuple(notes)
    )


def _failed(going: _Commit, reason: str) -> errors.OverlayNotCommitted:
    return errors.OverlayNotCommitted(overlay=going.disk.image, base=going.base.file, reason=reason)


async def _start(monitor: Monitor, going: _Commit) -> None:
    disk = going.disk
    assert disk.node is not None
    arguments: dict[str, object] = {
        "job-id": going.job,
        "device": disk.root or disk.node,
        "base-node": going.base.name,
        "auto-dismiss": False,
    }
    if disk.root not in (None, disk.node):  # a filter of the user's is in between
        arguments["top-node"] = disk.node
    try:
        await monitor.execute("block-commit", arguments)
    except errors.RefusedError as error:
        raise _failed(going, error.reason) from error


async def _until_ready(monitor: Monitor, going: _Commit, advance: Advance) -> None:
    """All that was in the overlay is below, and what the guest writes is copied as it comes."""
    while True:
        record = await _job(monitor, going)
        advance(replies.integer(record, "current-progress", "job"), replies.integer(record, "total-progress", "job"))
        status = replies.text(record, "status", "job")
        if status == "ready":
            return
        if status == "concluded":
            raise _failed(going, replies.optional_text(record, "error") or "the job ended before its time")
        await asyncio.sleep(_POLL_SECONDS)


async def _job(monitor: Monitor, going: _Commit) -> Mapping[str, object]:
    for record in replies.objects(await monitor.execute("query-jobs"), "query-jobs"):
        if record.get("id") == going.job:
            return record
    raise _failed(going, "somebody ended the job")


async def _finish(monitor: Monitor, going: _Commit) -> None:
    """The image below gets the checkpoints, then the place of the overlay."""
    nodes = graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True}))
    assert going.disk.node is not None
    top, base = nodes.get(going.disk.node), nodes.get(going.base.name)
    if top is None or base is None:
        raise _failed(going, "its images are not there any more")
    try:
        await transaction.run(monitor, _removal_of_wrecks(top, base))
        await transaction.run(monitor, _handing_down(top, base))
        await monitor.execute("job-complete", {"id": going.job})
    except errors.RefusedError as error:
        raise _failed(going, error.reason) from error

    async def concluded() -> bool:
        return (await _job(monitor, going)).get("status") == "concluded"

    await monitor.poll(concluded, what="job-complete", timeout=_PIVOT_SECONDS)
    problem = replies.optional_text(await _job(monitor, going), "error")
    await monitor.execute("job-dismiss", {"id": going.job})
    if problem:
        raise _failed(going, problem)


def _handed_down(top: graph.Node) -> Chain:
    """The checkpoints that the image below shall have. Without any, it keeps its own, which recorded the commit."""
    chain = checkpoints.chain(top.bitmaps)
    return Chain() if chain.problem else chain


def _removal_of_wrecks(top: graph.Node, base: graph.Node) -> list[transaction.Action]:
    """What of ours cannot become a copy: worthless bitmaps, and those of checkpoints that the overlay has no more."""
    wanted = {link.bitmap.name: link.bitmap for link in _handed_down(top).links}
    if not wanted:
        return []
    return [
        transaction.Remove(node=base.name, name=bitmap.name)
        for bitmap in base.bitmaps
        if checkpoints.parse(bitmap.name) and not _fits(bitmap, wanted.get(bitmap.name))
    ]


def _fits(bitmap: Bitmap, wanted: Bitmap | None) -> bool:
    return wanted is not None and not bitmap.inconsistent and bitmap.granularity == wanted.granularity


def _handing_down(top: graph.Node, base: graph.Node) -> list[transaction.Action]:
    """The image's bitmaps become copies of the overlay's.

    The bits come last: what is written after they are merged is copied down, and recorded there.
    """
    there = {bitmap.name: bitmap for bitmap in base.bitmaps}
    actions: list[transaction.Action] = []
    for link in _handed_down(top).links:
        bitmap = link.bitmap
        old = there.get(bitmap.name)
        if old is None or not _fits(old, bitmap):
            actions.append(_copy_of(bitmap, base.name, persistent=graph.holds_bitmaps(base)))
        else:
            actions.append(transaction.Clear(node=base.name, name=bitmap.name))
            switch = transaction.Enable if bitmap.recording else transaction.Disable
            if old.recording != bitmap.recording:
                actions.append(switch(node=base.name, name=bitmap.name))
        actions.append(_merge(top.name, base.name, bitmap.name))
    return actions


async def _remove_nodes(monitor: Monitor, node: str, whole: graph.Graph) -> list[str]:
    """The overlay's nodes are of no use; gives what is to be said. Those of a `-drive` went by themselves."""
    for name in (node, whole.child(node, "file")):
        if name is None or name.startswith("#"):
            continue
        try:
            await monitor.execute("blockdev-del", {"node-name": name})
        except errors.RefusedError as error:
            there = graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True}))
            if name in there:
                return [f"QEMU still has the overlay open: {error.reason}"]
    return []
