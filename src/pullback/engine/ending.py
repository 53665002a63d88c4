"""How what lasts is made, and ends, whole: also when its maker dies in the middle.

A job's record says how it is to end before anything is done for that (`state.Record.ends`), and whoever
finds the record goes on: we ourselves, the guard, the keeper, or the next connection.

    being made   "undo"  ──last step──▶  ""   it stays
    ended        "keep"  exports and view go, the checkpoint stays
    aborted      "undo"  they go, and what the checkpoint recorded is merged back
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pullback import state
from pullback.engine import exports, graph, opened, push, sweep, transaction
from pullback.engine.monitor import Monitor
from pullback.model import checkpoints, pushing
from pullback.model.checkpoints import Mark
from pullback.model.snapshots import Kind, OpenSnapshot
from pullback.state import checkpoints as documents
from pullback.state import history

#: Why a job that its user gave up is undone.
ABORTED = "it was aborted"


# -- deciding --------------------------------------------------------------------------------


def begun(job: state.Job, marks: Iterable[Mark | None]) -> None:
    """Something that shall last is being made: who finds it so undoes it, with the checkpoints `marks`."""
    job.record.ends = state.UNDO
    job.record.checkpoints = [mark.bitmap for mark in marks if mark is not None]
    job.save()


def stays(job: state.Job, snapshot: OpenSnapshot) -> None:
    """It is made, and lasts from now on."""
    job.record.open = opened.recorded(snapshot)
    job.record.ends, job.record.why = "", ""
    job.record.checkpoints, job.record.exports = [], []
    job.save()


def decide(job: state.Job, snapshot: OpenSnapshot, *, undo: bool, why: str = "") -> None:
    """It is to end now."""
    made = job.record.ends == ""
    job.record.ends = state.UNDO if undo else state.KEEP
    if undo and made:
        job.record.why = why
        job.record.checkpoints = [disk.checkpoint.bitmap for disk in snapshot.disks if disk.checkpoint]
    job.save()


def given_up(job: state.Job) -> None:
    """It failed, or was cancelled, before anybody was told that it is there."""
    found = opened.parsed(job)
    if found is not None and not job.record.ends:
        decide(job, found, undo=True)


# -- going on --------------------------------------------------------------------------------


async def go_on(monitor: Monitor, job: state.Job, still: sweep.Stillness) -> None:
    """Bring a job to its end, whatever is done of that already. The record itself is left to the caller."""
    undo, found = job.record.ends == state.UNDO, opened.parsed(job)
    for id in job.record.exports if undo else ():
        await exports.remove_one(monitor, id)
    if undo and found is not None and found.push is not None:
        await push.cancel(monitor, job, pushing.pushed(found.push), still)
    else:
        await sweep.sweep(monitor, job, still=still)
        if undo:
            await _take_back(monitor, job)
    if undo:
        await forget_documents(monitor, job, job.record.checkpoints)
    remember(job, found)


def remember(job: state.Job, found: OpenSnapshot | None) -> None:
    """A backup job that had begun leaves a line for who asks later."""
    decided = job.record.ends == state.KEEP or bool(job.record.why)
    if found is not None and found.kind in (Kind.PULL, Kind.PUSH) and decided:
        ended = opened.ended(found, error=job.record.why or None)
        history.save(places(job).state, job.record.machine, ended)


def places(job: state.Job) -> state.Directories:
    """The directories that a job's record lies in and names."""
    return state.Directories(
        state=job.path.parent.parent, runtime=Path(job.record.runtime).parent, cache=Path(job.record.cache)
    )


async def _take_back(monitor: Monitor, job: state.Job) -> None:
    """Give what its checkpoints recorded back to the older ones; twice is fine."""
    marks = _marks(job.record.checkpoints)
    if not marks:
        return
    actions: list[transaction.Action] = []
    for node in graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True})).values():
        chain = checkpoints.chain(node.bitmaps)
        for mark in marks:
            actions += transaction.give_back(node.name, chain, mark)
    await transaction.run(monitor, actions)


async def forget_documents(monitor: Monitor, job: state.Job, bitmaps: Iterable[str]) -> None:
    """The documents of checkpoints, given by their bitmaps, of which no bitmap is there any more."""
    ours = {mark.nonce for mark in _marks(bitmaps)}
    if not ours:
        return
    nodes = graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True}))
    there = {mark.nonce for node in nodes.values() for mark in _marks(bitmap.name for bitmap in node.bitmaps)}
    where, machine = places(job), job.record.machine
    for saved in documents.load(where, machine).saved:
        nonces = {mark.nonce for mark in _marks(saved.marks.values())}
        if nonces & ours and not nonces & there:
            documents.remove(where, machine, saved.name)


def _marks(bitmaps: Iterable[str]) -> list[Mark]:
    return [mark for mark in map(checkpoints.parse, bitmaps) if mark is not None]
