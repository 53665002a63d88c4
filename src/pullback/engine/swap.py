"""Taking the disks of a QEMU from its guest, so that they can be written, and giving them back.

A node that a guest's device uses refuses an export for writing. So the machine is stopped, reset at once
(its memory must never continue over changed disks), and each device gets a placeholder of the same size
that fails all I/O; then the disk's own node is free:

    device ── hold (blkdebug: ENOSPC over null)         ref (raw) ── disk's root ── … ── NBD export, writable

`ref` keeps a root that only its device held (-drive) from vanishing, and tells which root is whose, so nothing
need be remembered. A machine that somebody continues meanwhile sees its disks fail, and is stopped and reset
again. Tried on QEMU 7.2 for virtio-blk, SCSI, SATA, IDE, NVMe and USB, by -blockdev and by -drive.

Disks in an iothread: the reset brings virtio-blk's node back to the main loop, and that of a SCSI disk, which
refuses a placeholder of another context, is moved with `x-blockdev-set-iothread`. In the main loop an NBD client
does no harm, also to builds that abort otherwise (`probe`; tried with guests under load).

    taken    nothing is written: who finds it gives back, and continues a machine that ran
    writing  the journal says so: nobody but the rollback itself gives back
    written  the journal says so: who finds it gives back, and does what was asked for
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pullback import errors, machine, state
from pullback.engine import disks, exports, graph, interrupted, jobs, pause, serving, sweep, transaction
from pullback.engine.guard import Guard
from pullback.engine.monitor import Monitor
from pullback.engine.names import Names, prefix
from pullback.model.disks import Disk
from pullback.model.exports import NbdAddress
from pullback.model.rollbacks import After, HeldDisk, HoldRequest, Phase
from pullback.state import rollbacks

_RESET_SECONDS = 15.0
_QUIT_SECONDS = 60.0
#: How often a machine that somebody continues is stopped again, before we give up.
_PATIENCE = 20
_CONTINUE_ATTEMPTS, _CONTINUE_SECONDS = 5, 0.1
_ENOSPC = 28
#: What a placeholder fails (QAPI BlkdebugIOType).
_ALL = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
_NO_REBOOT = re.compile(r"--?no-reboot")
_ACTION = re.compile(r"--?action")


class _Events(Protocol):
    """What we use of `qemu.qmp.EventListener`."""

    def empty(self) -> bool: ...
    def clear(self) -> object: ...
    async def get(self) -> object: ...


@dataclass(frozen=True, slots=True)
class _Part:
    """One disk of a hold."""

    names: Names
    disk: Disk
    since: tuple[str, ...]


# -- before anything is done -----------------------------------------------------------------


async def require_holdable(monitor: Monitor, request: HoldRequest, *, has_graph: bool) -> None:
    """Raise what would hinder, as far as it can be known."""
    if not has_graph:
        raise errors.Unsupported(what="rolling back", reason="this QEMU does not tell its block graph")
    if not await pause.can_pause(monitor):
        status = await pause.run_state(monitor)
        raise errors.Unsupported(what="rolling back", reason=f"the machine is {status}", way_out="Wake it up first.")
    if request.after is not After.QUIT and ends_at_reset(_words(monitor.peer)):
        raise errors.Unsupported(
            what="rolling back",
            reason="the machine must be reset for it, and this QEMU ends at a reset (-no-reboot)",
            way_out="With --after quit it is rolled back, and then ended.",
        )
    found, whole = await disks.find(monitor, has_graph=True)
    kinds = await jobs.types(monitor)
    for part in _parts(request):
        _require_free(part, found, whole, kinds)


def _parts(request: HoldRequest) -> list[_Part]:
    return [
        _Part(names=Names(request.job, index), disk=wanted.disk, since=wanted.since)
        for index, wanted in enumerate(request.disks)
    ]


def _require_free(part: _Part, found: Sequence[Disk], whole: graph.Graph, kinds: dict[str, str]) -> None:
    disk = part.disk
    if disk.root == part.names.hold:
        return  # ours already
    what = f"rolling back disk {disk.target}"
    if disk.node is None or disk.root is None:
        raise errors.UsageError(problem=f"Disk {disk.target} has no medium")
    if disk.root.startswith(graph.OURS):
        raise errors.DiskBusy(target=disk.target, holder="a snapshot that was made with the filter engine")
    if disk.read_only:
        raise errors.Unsupported(what=what, reason="it is read-only", way_out="Leave it out with --disk.")
    for job in whole.jobs_on(disk.node):
        raise errors.DiskBusy(target=disk.target, holder=f"the {kinds.get(job, 'block')} job {job}")
    for other in found:
        if other.qdev != disk.qdev and other.node == disk.node:
            reason = f"it is {other.target} too: two devices share one image"
            raise errors.Unsupported(what=what, reason=reason, way_out="Restore it to a new image.")


def ends_at_reset(words: Sequence[str]) -> bool:
    """Does QEMU, started with these words, end when the machine is reset? Pure."""
    for number, word in enumerate(words):
        if _NO_REBOOT.fullmatch(word):
            return True
        if _ACTION.fullmatch(word) and "reboot=shutdown" in "".join(words[number + 1 : number + 2]).split(","):
            return True
    return False


def _words(pid: int | None) -> list[str]:
    """A process's command line; empty if it cannot be seen."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "surrogateescape").split("\0")
    except OSError:
        return []


def placeholder(name: str, size: int) -> dict[str, object]:
    """A node of so many bytes that fails all I/O. A null node alone would swallow what is written. Pure."""
    rules = [{"event": "none", "iotype": kind, "errno": _ENOSPC, "once": False} for kind in _ALL]
    image = {"driver": "null-co", "size": size}
    return {"driver": "blkdebug", "node-name": name, "image": image, "inject-error": rules, "discard": "unmap"}


# -- taking ----------------------------------------------------------------------------------


class QemuHeld:
    """See `machine.Held`. Made by `held`."""

    def __init__(self, monitor: Monitor, job: state.Job, request: HoldRequest, resumed: _Events) -> None:
        self._monitor = monitor
        self._job = job
        self._request = request
        self._parts = _parts(request)
        self._resumed = resumed
        self._still = asyncio.Lock()
        self._again = False
        self._disks: tuple[HeldDisk, ...] = ()
        self.kept = ""
        self.process = monitor.process
        self.disturbed = 0

    @property
    def disks(self) -> tuple[HeldDisk, ...]:
        """Where each can be written."""
        return self._disks

    async def take(self, guard: Guard) -> None:
        """Take the disks from the guest, or as far as that is not done already. Inside `pause.uninterrupted`."""
        monitor = self._monitor
        await require_holdable(monitor, self._request, has_graph=True)
        roots = await disks.roots(monitor)
        if all(roots.get(part.disk.qdev) == part.names.hold for part in self._parts):
            self.kept = monitor.process
        await exports.remove(monitor, prefix(self._request.job))
        await serving.ensure_private(monitor, self._job)
        await self._make_placeholders()
        await guard.start()
        await self._record()
        await self._reset()
        for part in self._parts:
            await self._take_out(part)
        await self._settle()
        _, whole = await disks.find(monitor, has_graph=True)
        self._disks = tuple([await self._serve(part, whole) for part in self._parts])

    async def _make_placeholders(self) -> None:
        there = await _nodes(self._monitor)
        for part in self._parts:
            if part.names.hold in there:
                continue
            await self._monitor.execute("blockdev-add", placeholder(part.names.hold, part.disk.size))

    async def _record(self) -> None:
        """Durably, before the machine is stopped: who finds it must know what to do with it."""
        swap = dict(self._job.record.swap or {})
        if not swap:
            swap["ran"] = await pause.run_state(self._monitor) == "running"
            swap["ends_at_reset"] = ends_at_reset(_words(self._monitor.peer))
        if self._request.after is not None or "after" not in swap:
            swap["after"] = self._request.after
        self._job.record.swap = swap
        self._job.save()
        if swap.get("ends_at_reset"):
            await self._monitor.execute("set-action", {"reboot": "reset"})

    async def _reset(self) -> None:
        """Stop the machine and throw its memory away. Raises `MachineGone` if QEMU ends instead."""
        async with self._still:
            self._again = False
            self._resumed.clear()
            await reset(self._monitor, self._job.record.machine)

    async def _settle(self) -> None:
        """The machine stands still, and did so all the time, or was reset again."""
        while self._again or not self._resumed.empty():
            self._note_disturbance()
            await self._reset()

    def _note_disturbance(self) -> None:
        self.disturbed += 1
        if self.disturbed > _PATIENCE:
            raise errors.RefusedError(command="stop", reason="somebody continues the machine again and again")

    async def watch(self) -> None:
        """Stop the machine whenever somebody continues it."""
        while True:
            await self._resumed.get()
            self._again = True
            self._note_disturbance()
            await pause.uninterrupted(self._reset())

    async def _take_out(self, part: _Part) -> None:
        monitor, disk = self._monitor, part.disk
        root = (await disks.roots(monitor)).get(disk.qdev)
        if root != part.names.hold:
            if root is None:
                raise errors.DiskBusy(target=disk.target, holder="somebody who took its medium out just now")
            await self._refer(part, root)
            try:
                await _place(monitor, disk, part.names.hold)
            except errors.RefusedError as error:
                raise errors.Unsupported(
                    what=f"rolling back disk {disk.target}",
                    reason=error.reason,
                    way_out="Roll it back while it is off.",
                ) from error
        if disk.iothread is not None:
            arguments = {"node-name": part.names.reference, "iothread": None, "force": True}
            await monitor.execute("x-blockdev-set-iothread", arguments)

    async def _refer(self, part: _Part, root: str) -> None:
        """Hold the root, so that it stays when its device lets go of it."""
        if part.names.reference in await _nodes(self._monitor):  # of an attempt that got no further
            await self._monitor.execute("blockdev-del", {"node-name": part.names.reference})
        node = {"driver": "raw", "node-name": part.names.reference, "file": root, "read-only": True}
        await self._monitor.execute("blockdev-add", node)

    async def _serve(self, part: _Part, whole: graph.Graph) -> HeldDisk:
        monitor, names = self._monitor, part.names
        root = whole.child(names.reference, "file")
        node = whole.nodes.get(whole.below_filters(root)) if root is not None else None
        if root is None or node is None:
            raise errors.BadReply(who="QEMU", problem=f"disk {part.disk.target} has no node any more")
        disk = graph.with_medium(part.disk, root, node, read_only=False, graph=whole)
        if part.since:
            gone = [
                transaction.Remove(node=node.name, name=found.name)
                for found in node.bitmaps
                if found.name == names.bitmap
            ]
            await transaction.run(monitor, [*gone, *transaction.union(node.name, names.bitmap, part.since)])
        bitmaps = [names.bitmap] if part.since else []
        export = f"{prefix(self._request.job)}{disk.target}-rollback"
        try:
            await exports.add_nbd(
                monitor, id=names.export("roll"), node=node.name, name=export, bitmaps=bitmaps, writable=True
            )
        except errors.RefusedError as error:
            if "onflict" in error.reason:
                raise errors.DiskBusy(target=disk.target, holder=f"something else in QEMU ({error.reason})") from error
            raise
        address = NbdAddress(socket=serving.private_socket(self._job), export=export)
        return HeldDisk(
            disk=disk,
            address=address,
            files=tuple(interrupted.of_name(node.file, monitor.peer)),
            changes=f"qemu:dirty-bitmap:{names.bitmap}" if part.since else None,
        )

    # -- giving back -------------------------------------------------------------------------

    async def give_back(self) -> None:
        """The disks are the guest's again, and nothing of ours is left but the record."""
        await pause.uninterrupted(self._give_back())

    async def _give_back(self) -> None:
        await self._settle()
        await _give_back(self._monitor, self._job)
        await self._settle()
        assert self._job.record.swap is not None
        self._job.record.swap["restored"] = True
        self._job.save()

    async def conclude(self) -> After:
        """Do with the machine what was asked for."""
        return await pause.uninterrupted(self._conclude())

    async def _conclude(self) -> After:
        await self._settle()
        done = await _conclude(self._monitor, self._job, written=True)
        self._job.remove()
        return done

    async def abandon(self) -> None:
        """Something failed: undo it, or if a disk may be half written, leave the disks out of reach."""
        if is_writing(self._job):
            await exports.remove(self._monitor, prefix(self._request.job))
            await serving.stop_unused(self._monitor, serving.register_of(self._job))
            return
        await clear(self._monitor, self._job)
        self._job.remove()


@asynccontextmanager
async def held(monitor: Monitor, job: state.Job, guard: Guard, request: HoldRequest) -> AsyncIterator[QemuHeld]:
    """Disks out of the guest's reach while the block runs."""
    async with monitor.listening("RESUME") as resumed:
        found = QemuHeld(monitor, job, request, resumed)
        try:
            await pause.uninterrupted(found.take(guard))
            yield found
        except BaseException as error:
            await _despite(error, found)
            raise


async def _despite(error: BaseException, found: QemuHeld) -> None:
    try:
        await pause.uninterrupted(found.abandon())
    except errors.PullbackError as second:
        error.add_note(str(second))


# -- whoever does it -------------------------------------------------------------------------


def is_writing(job: state.Job) -> bool:
    """May a disk of the job be half written? If nobody can tell, yes."""
    try:
        return rollbacks.is_writing(job.path.parent.parent, job.record.job)
    except errors.PullbackError:
        return True


async def holds(monitor: Monitor, job: state.Job) -> bool:
    """Is it a rollback's job? (Its record may be lost: then the placeholders tell.)"""
    ours = f"{prefix(job.record.job)}hold"
    return job.record.swap is not None or any(root.startswith(ours) for root in (await disks.roots(monitor)).values())


async def clear(monitor: Monitor, job: state.Job) -> None:
    """Give back what a job holds, unless it is half written: then `RollbackPending` is raised."""
    if job.record.qemu not in ("", monitor.process):  # that QEMU is gone, with all that was in it
        sweep.remove_files(job)
        return
    base = job.path.parent.parent
    journal = rollbacks.load(base, job.record.job)
    if journal is not None and journal.phase is Phase.WRITING:
        raise rollbacks.pending(journal)
    await _give_back(monitor, job)
    written = journal is not None and journal.phase is Phase.WRITTEN
    await _conclude(monitor, job, written=written or bool((job.record.swap or {}).get("restored")))


async def reset(monitor: Monitor, machine: str) -> None:
    """Stop a machine and throw its memory away; afterwards it is in the state `prelaunch`."""
    try:
        if await pause.run_state(monitor) == "running":
            await monitor.execute("stop")
        async with monitor.listening("RESET") as heard:
            await monitor.execute("system_reset")

            async def done() -> bool:
                return not heard.empty() and await pause.run_state(monitor) == "prelaunch"

            await monitor.poll(done, what="system_reset", timeout=_RESET_SECONDS)
    except errors.OutcomeUnknown as error:
        if monitor.process_lives():
            raise
        raise errors.MachineGone(machine=machine, reason="it ended when it was to be reset") from error


async def _give_back(monitor: Monitor, job: state.Job) -> None:
    ours = prefix(job.record.job)
    await exports.remove(monitor, ours)
    await serving.stop_unused(monitor, serving.register_of(job))
    found, whole = await disks.find(monitor, has_graph=True)
    held_disks = [disk for disk in found if disk.root is not None and disk.root.startswith(f"{ours}hold")]
    if held_disks and await pause.run_state(monitor) != "prelaunch":
        await reset(monitor, job.record.machine)
    for disk in held_disks:
        assert disk.root is not None
        root = whole.child(f"{ours}ref{disk.root.removeprefix(f'{ours}hold')}", "file")
        if root is None:
            raise errors.CleanupIncomplete(what=f"disk {disk.target}", reason="its image is not in QEMU any more")
        try:
            await _place(monitor, disk, root)
        except errors.RefusedError as error:
            raise errors.CleanupIncomplete(what=f"disk {disk.target}", reason=error.reason) from error
    await sweep.sweep(monitor, job, still=sweep.as_it_is)


async def _place(monitor: Monitor, disk: Disk, node: str) -> None:
    """Put a node under a device, in whatever thread that lives."""
    arguments = {"path": disks.device_path(disk.qdev), "property": "drive", "value": node}
    try:
        await monitor.execute("qom-set", arguments)
    except errors.RefusedError as error:
        if disk.iothread is None or "aio context" not in error.reason.lower():
            raise
        await monitor.execute("x-blockdev-set-iothread", {"node-name": node, "iothread": disk.iothread})
        await monitor.execute("qom-set", arguments)


async def _conclude(monitor: Monitor, job: state.Job, *, written: bool) -> After:
    """`written`: the disks were rolled back; else a machine that ran runs again, and another one does not."""
    swap = job.record.swap or {}
    default = After.RUN if swap.get("ran") is True else After.HELD
    wished = swap.get("after")
    wish = After(wished) if written and wished in tuple(After) else default
    if swap.get("ends_at_reset") is True and wish is not After.QUIT:
        await monitor.execute("set-action", {"reboot": "shutdown"})
    if wish is After.RUN:
        await _continue(monitor)
    elif wish is After.QUIT:
        await _quit(monitor)
    return wish


async def _continue(monitor: Monitor) -> None:
    """What refuses it may pass (a lock on an image)."""
    for attempt in range(1, _CONTINUE_ATTEMPTS + 1):
        try:
            if await pause.run_state(monitor) in ("prelaunch", "paused"):
                await monitor.execute("cont")
            return
        except errors.RefusedError:
            if attempt == _CONTINUE_ATTEMPTS:
                raise
            await asyncio.sleep(_CONTINUE_SECONDS)


async def _quit(monitor: Monitor) -> None:
    """End QEMU, and wait until it has closed its images."""
    with suppress(errors.OutcomeUnknown):
        await monitor.execute("quit")
    deadline = asyncio.get_running_loop().time() + _QUIT_SECONDS
    while monitor.process and monitor.process_lives():
        if asyncio.get_running_loop().time() > deadline:
            raise errors.OutcomeUnknown(command="quit", reason=f"QEMU has not ended within {_QUIT_SECONDS:g} s")
        await asyncio.sleep(0.02)


async def _nodes(monitor: Monitor) -> dict[str, graph.Node]:
    return graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True}))


_: type[machine.Held] = QemuHeld  # the interface is kept, says mypy
