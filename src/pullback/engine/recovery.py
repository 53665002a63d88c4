"""After a death: finding what an earlier job left in QEMU and on disk, and removing it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

from pullback import errors, state
from pullback.engine import ending, graph, names, opened, pause, quiesce, replies, serving, swap, sweep
from pullback.engine.guard import Guard, guarding
from pullback.engine.monitor import Monitor, connect, process_lives
from pullback.state import rollbacks


async def recover(job: state.Job) -> None:
    """Connect to the job's machine, continue it if the job had paused it, and remove what is left.

    Of a rollback that has begun to write, nothing: its machine must not run.
    """
    if swap.is_writing(job):
        return
    async with connect(Path(job.record.socket)) as monitor:
        await clear(monitor, job)


async def clear(monitor: Monitor, job: state.Job) -> None:
    """Do that on a connection that is open. What is whole and lasts stays."""
    await pause.resume_if_ours(monitor, job)
    await quiesce.thaw_if_ours(job)
    if opened.lasting(job, monitor.process):
        return
    if await swap.holds(monitor, job):
        await pause.uninterrupted(swap.clear(monitor, job))
        job.remove()
        rollbacks.sweep(job.path.parent.parent)
        return
    async with guarding(job) as guard:
        await pause.uninterrupted(ending.go_on(monitor, job, partial(pause.paused, monitor, job, guard)))
    job.remove()


def forget(job: state.Job) -> None:
    """The job's machine is gone, and with it all that was in it: remove the files."""
    found = opened.parsed(job)
    if found is not None and not job.record.ends:
        job.record.ends, job.record.why = state.UNDO, "the machine ended before it"
    sweep.remove_files(job)
    ending.remember(job, found)
    serving.forget_dead(serving.register_of(job))
    job.remove()


@asynccontextmanager
async def guarded(job: state.Job) -> AsyncIterator[Guard]:
    """A guard over the job while the block runs. Without one nothing was begun, so nothing is recorded."""
    async with AsyncExitStack() as stack:
        try:
            watcher = await stack.enter_async_context(guarding(job))
        except BaseException:
            forget(job)
            raise
        yield watcher


async def strays(monitor: Monitor) -> list[str]:
    """Ids of jobs of ours that QEMU knows: of records that were lost too."""
    nodes = graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True}))
    found = [*nodes, *(bitmap.name for node in nodes.values() for bitmap in node.bitmaps)]
    for command, key in (("query-block-exports", "id"), ("query-jobs", "id")):
        try:
            found += [replies.text(item, key, command) for item in replies.objects(await monitor.execute(command), key)]
        except errors.RefusedError as error:
            if error.error_class != "CommandNotFound":  # QEMU < 5.2 has no exports of this kind
                raise
    jobs = {name.removeprefix(graph.OURS)[:8] for name in found if name.startswith(graph.OURS)}
    return sorted(job for job in jobs if names.prefix(job))


def elsewhere(job: state.Job, monitor: Monitor) -> bool:
    """Is it a job of another QEMU that lives, with the same name, at its own socket?"""
    record = job.record
    other = record.socket != str(monitor.socket) and record.qemu not in ("", monitor.process)
    return other and process_lives(record.qemu) and Path(record.socket).is_socket()
