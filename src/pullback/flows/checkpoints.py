"""Checkpoints of a machine: made, listed, looked at, deleted, put back, and what changed between them.

    create   document durable (pending) ─▶ one transaction over all disks ─▶ document gets its name
    delete   newest first: document pending ─▶ one transaction over its disks ─▶ children get its parent
             ─▶ document removed

All functions take an open machine, which is locked for us, so nobody else changes its checkpoints or
documents. The bitmaps are the truth: a document that lost them is told, and a lost document costs a
description.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pullback import errors, state
from pullback.engine.pause import uninterrupted
from pullback.engine.undoing import despite
from pullback.extents import Extent
from pullback.flows.threads import blocking
from pullback.machine import Machine
from pullback.model import checkpoints, tree
from pullback.model.backups import Quiesce, Quiescing, Window
from pullback.model.checkpoints import Chain, Link, Mark
from pullback.model.disks import Disk
from pullback.model.documents import checkpoint as documents
from pullback.model.documents.checkpoint import CheckpointDisk, CheckpointDocument, Tracking
from pullback.model.documents.fields import Place
from pullback.model.documents.machine import MachineDisk, Moment
from pullback.model.snapshots import OpenSnapshot
from pullback.model.tracking import ChangeMap, Doomed, NewBitmap, Union
from pullback.model.tree import Checkpoint, Saved, Tree
from pullback.progress import Cancel
from pullback.state import checkpoints as saved
from pullback.transfer import NbdEndpoint

NO_QUIESCING = Quiescing(wish=Quiesce.NO)
#: Backups give their own checkpoints such names, and delete them when they are done with them.
_RESERVED = "auto."


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """A checkpoint, in full."""

    #: The machine's name.
    machine: str
    checkpoint: Checkpoint
    #: Its document with nothing left open, as it would be redefined.
    document: CheckpointDocument
    #: The machine as it was at that moment, if that was kept (JSON values).
    kept: Mapping[str, object]
    #: Sentences that the user should read.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """A checkpoint that was made."""

    info: Info
    window: Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """What a deletion did."""

    machine: str
    #: Names, in the order in which they went.
    checkpoints: tuple[str, ...]
    #: Only their documents went.
    metadata_only: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What changed on a disk between two checkpoints, or since one."""

    machine: str
    target: str
    size: int
    granularity: int
    extents: tuple[Extent, ...]


# -- listing ---------------------------------------------------------------------------------


async def listing(machine: Machine, directories: state.Directories, *, sizes: bool = False) -> Tree:
    """All checkpoints of the machine; with `sizes`, also the exact bytes changed since each on each disk."""
    disks = await machine.disks()
    found = _tree(machine, directories, disks)
    if not sizes:
        return found
    return tree.with_sizes(found, await _sizes(machine, disks, found.checkpoints))


def _tree(machine: Machine, directories: state.Directories, disks: Sequence[Disk]) -> Tree:
    loaded = saved.load(directories, machine.name)
    if loaded.pending:
        _settle(loaded, machine, directories, disks)
        loaded = saved.load(directories, machine.name)
    found = tree.build(disks, loaded.saved, machine=machine.name)
    return replace(found, notes=(*loaded.notes, *found.notes))


def _settle(loaded: saved.Loaded, machine: Machine, directories: state.Directories, disks: Sequence[Disk]) -> None:
    """Making or deleting was cut short: the bitmaps tell whether the checkpoint is there."""
    marks = (checkpoints.parse(bitmap.name) for disk in disks for bitmap in disk.bitmaps)
    there = {mark.nonce for mark in marks if mark is not None}
    for pending in loaded.pending:
        own = (checkpoints.parse(bitmap) for bitmap in pending.marks.values())
        # All of them, or of several images those that were stored in time.
        if there.intersection(mark.nonce for mark in own if mark is not None):
            saved.finish(directories, machine.name, pending.name)
            continue
        children = [kept for kept in loaded.saved if kept.document.parent == pending.name]
        _reparent(machine, directories, children, pending.document.parent)
        saved.forget(directories, machine.name, pending.name)


async def _sizes(
    machine: Machine, disks: Sequence[Disk], wanted: Iterable[Checkpoint]
) -> Mapping[tuple[str, str], int]:
    """The exact bytes by (target, nonce); what a wreck holds is not looked at."""
    known = {disk.target: disk for disk in disks}
    asked = {}
    for checkpoint in wanted:
        for part in checkpoint.disks:
            links = checkpoints.chain(known[part.target].bitmaps).since(part.mark)
            if not isinstance(links, str):
                names = tuple(link.mark.bitmap for link in links)
                asked[part.target, part.mark.nonce] = Union(disk=known[part.target], bitmaps=names)
    counted = await machine.dirty_sizes(tuple(asked.values()))
    return dict(zip(asked, counted, strict=True))


async def info(machine: Machine, directories: state.Directories, name: str, *, sizes: bool = False) -> Info:
    """One checkpoint in full; with `sizes`, also the exact bytes changed since it on each disk."""
    disks = await machine.disks()
    found = _tree(machine, directories, disks)
    wanted = found.require(name)
    if sizes:
        found = tree.with_sizes(found, await _sizes(machine, disks, [wanted]))
    return _info(found, name, disks)


async def current(machine: Machine, directories: state.Directories) -> Checkpoint:
    """The newest checkpoint, whose bitmaps record. Raises `NoCheckpoint`."""
    return (await listing(machine, directories)).require_current()


async def parent(machine: Machine, directories: state.Directories, name: str) -> Checkpoint:
    """The checkpoint before. Raises `NoCheckpoint`, also for a root."""
    return (await listing(machine, directories)).require_parent(name)


def _info(found: Tree, name: str, disks: Sequence[Disk]) -> Info:
    checkpoint = found.require(name)
    kept = checkpoint.saved.machine if checkpoint.saved else {}
    document = _document(checkpoint, disks)
    return Info(machine=found.machine, checkpoint=checkpoint, document=document, kept=kept, notes=found.notes)


def _document(checkpoint: Checkpoint, disks: Sequence[Disk]) -> CheckpointDocument:
    """The saved document, or the one that the bitmaps allow; parent and sizes as they are now."""
    parts = {part.target: part for part in checkpoint.disks}
    if checkpoint.saved:
        document = checkpoint.saved.document
    else:
        seconds = int(checkpoint.created.timestamp()) if checkpoint.created else None
        listed = tuple(_told(disk.target, checkpoint.name, disk.target in parts) for disk in disks)
        document = CheckpointDocument(name=checkpoint.name, creation_time=seconds, disks=listed)
    sized = tuple(
        replace(disk, size=parts[disk.name].dirty)
        if disk.name in parts and disk.checkpoint is Tracking.BITMAP
        else disk
        for disk in document.disks
    )
    return replace(document, parent=checkpoint.parent, disks=sized)


def _told(target: str, name: str, tracked: bool) -> CheckpointDisk:
    if tracked:
        return CheckpointDisk(name=target, bitmap=name)
    return CheckpointDisk(name=target, checkpoint=Tracking.NO)


# -- making ----------------------------------------------------------------------------------


class Prepared:
    """A checkpoint that is about to be made: its document is durable, and not yet in force.

    Whoever makes its bitmaps (`parts`, in one transaction) calls `commit` then, or `abort`.
    """

    def __init__(
        self, machine: Machine, directories: state.Directories, new: Saved, parts: Sequence[NewBitmap]
    ) -> None:
        self._machine = machine
        self._directories = directories
        self.saved = new
        self.parts = tuple(parts)

    def commit(self) -> None:
        """The bitmaps are there."""
        saved.finish(self._directories, self._machine.name, self.saved.name)

    def abort(self) -> None:
        """They are not."""
        saved.remove(self._directories, self._machine.name, self.saved.name)


async def prepare(
    machine: Machine,
    directories: state.Directories,
    document: CheckpointDocument | None = None,
    *,
    disks: Sequence[Disk] | None = None,
) -> Prepared:
    """Decide all about a new checkpoint, refuse what cannot be, and write its document.

    `disks`: those of the machine, of one who has just asked for them.
    Raises `BadDocument`, `CheckpointExists`, `Unsupported` (a disk cannot be tracked), `UsageError`.
    """
    wish = document or CheckpointDocument()
    disks = await machine.disks() if disks is None else disks
    found = _tree(machine, directories, disks)
    if wish.name is not None:
        _require_new(wish.name, found, machine)
    _require_trackable(wish, disks)
    moment = _moment(found)
    above = found.current.name if found.current else None
    listed = _machine_disks(disks, strict=not wish.disks)
    whole = documents.effective(wish, listed, moment, parent=above, domain=wish.domain)
    assert whole.name is not None, "an effective document has a name"
    by_target = {disk.target: disk for disk in disks}
    parts = [_part(by_target[disk.name], whole.name) for disk in whole.tracked]
    marks = {part.disk.target: part.mark.bitmap for part in parts}
    new = Saved(document=whole, marks=marks, machine=_description(machine, disks))
    saved.prepare(directories, machine.name, new)
    return Prepared(machine, directories, new, parts)


def _require_new(name: str, found: Tree, machine: Machine) -> None:
    checkpoints.check_name(name)
    if name.startswith(_RESERVED):
        raise errors.UsageError(problem=f"Names that begin with {_RESERVED!r} are those of backups' own checkpoints")
    if found.find(name) is not None:
        raise errors.CheckpointExists(checkpoint=name, machine=machine.name)


def _moment(found: Tree) -> Moment:
    """Now; two checkpoints without a name in one second have names of two."""
    seconds = int(time.time())
    free = seconds
    while found.find(str(free)) is not None:
        free += 1
    return Moment(seconds=seconds, checkpoint=str(free))


def _require_trackable(wish: CheckpointDocument, disks: Sequence[Disk]) -> None:
    """A disk that is named must be one that can be tracked; without names, there must be one."""
    named = {disk.name for disk in wish.tracked}
    reasons = {disk.target: disk.unlasting for disk in disks if disk.unlasting}
    for disk in disks:
        if (disk.target in named or (disk.image and disk.image in named)) and disk.unlasting:
            raise errors.Unsupported(what=f"a checkpoint of disk {disk.target}", reason=disk.unlasting)
    if not wish.disks and all(disk.unlasting or disk.left_out for disk in disks) and reasons:
        target, reason = next(iter(reasons.items()))
        raise errors.Unsupported(what="a checkpoint", reason=f"no disk can be tracked ({target}: {reason})")


def called(document: CheckpointDocument, name: str) -> CheckpointDocument:
    """The same, called `name` unless it has a name."""
    return document if document.name else replace(document, name=name)


def forget_taken_back(directories: state.Directories, machine: str, snapshot: OpenSnapshot) -> None:
    """The document of its checkpoint, whose bitmaps were merged back; not that of a later one of the same name."""
    gone = {disk.checkpoint.nonce for disk in snapshot.disks if disk.checkpoint is not None}
    for kept in saved.load(directories, machine).saved if gone else ():
        marks = (checkpoints.parse(bitmap) for bitmap in kept.marks.values())
        if gone.intersection(mark.nonce for mark in marks if mark is not None):
            saved.remove(directories, machine, kept.name)


def machine_disks(disks: Iterable[Disk]) -> list[MachineDisk]:
    """The disks as documents see them."""
    return _machine_disks(disks, strict=False)


def _machine_disks(disks: Iterable[Disk], *, strict: bool) -> list[MachineDisk]:
    """The disks as documents see them. `strict`: those that cannot be tracked, or are left out, take no part."""
    return [
        MachineDisk(
            target=disk.target,
            source=disk.image if disk.image.startswith("/") else None,
            read_only=disk.read_only or (strict and bool(disk.unlasting or disk.left_out)),
            empty=disk.node is None,
        )
        for disk in disks
    ]


def _part(disk: Disk, name: str) -> NewBitmap:
    """A disk's new bitmap. A chain that is worthless is not continued: it would be taken for sound."""
    chain = checkpoints.chain(disk.bitmaps)
    if chain.problem:
        raise errors.CheckpointInconsistent(
            checkpoint=name,
            target=disk.target,
            problem=f"the checkpoints before it are worthless ({chain.problem}), so delete them first",
        )
    freeze = chain.newest.mark.bitmap if chain.newest else None
    return NewBitmap(disk=disk, mark=chain.next_mark(name), freeze=freeze)


def _description(machine: Machine, disks: Iterable[Disk]) -> Mapping[str, object]:
    """The machine as it is now, for whoever restores it later."""
    return {
        "name": machine.name,
        "qemu": machine.version,
        "disks": [
            {
                "target": disk.target,
                "image": disk.image,
                "format": disk.format,
                "size": disk.size,
                "serial": disk.serial,
            }
            for disk in disks
        ],
    }


async def create(
    machine: Machine,
    directories: state.Directories,
    document: CheckpointDocument | None = None,
    *,
    quiescing: Quiescing = NO_QUIESCING,
) -> Created:
    """Make a checkpoint. Whatever fails, nothing of it stays.

    Raises what `prepare` does, `BusyError`, `QuiesceFailed`, `CheckpointsNotStored`.
    """
    prepared = await prepare(machine, directories, document)
    try:
        begun = await machine.create_checkpoint(prepared.parts, quiescing)
        prepared.commit()
        disks = await machine.disks()
    except BaseException as error:
        await despite(error, _undo(machine, prepared))
        raise
    made = _info(_tree(machine, directories, disks), prepared.saved.name, disks)
    notes = [f"{disk.target} is not tracked, because {disk.unlasting}" for disk in disks if _passed(disk, made)]
    if begun.window.frozen_note:
        notes.append(begun.window.frozen_note)
    return Created(info=replace(made, notes=(*made.notes, *notes)), window=begun.window)


def _passed(disk: Disk, made: Info) -> bool:
    """A disk that would have taken part, and cannot be tracked."""
    return bool(disk.unlasting) and not disk.left_out and made.checkpoint.disk(disk.target) is None


async def _undo(machine: Machine, prepared: Prepared) -> None:
    await machine.take_back_checkpoint(prepared.parts)
    prepared.abort()


# -- deleting --------------------------------------------------------------------------------


async def delete(
    machine: Machine,
    directories: state.Directories,
    name: str,
    *,
    children: bool = False,
    children_only: bool = False,
    metadata_only: bool = False,
) -> Deleted:
    """Delete a checkpoint; with `children` all behind it too, with `children_only` those alone.

    What the bitmaps hold goes to the checkpoint before, so no other loses a change. With
    `metadata_only` only the documents go, and the bitmaps stay. Raises `NoCheckpoint`, and
    `BusyError` before anything is changed.
    """
    if children and children_only:
        raise errors.UsageError(problem="Deleting with children, and children only, exclude each other")
    disks = await machine.disks()
    found = _tree(machine, directories, disks)
    wanted = found.require(name)
    doomed = [*found.descendants(name)] if children or children_only else []
    doomed = doomed if children_only else [wanted, *doomed]
    doomed.reverse()
    if not metadata_only:
        _require_idle(doomed, disks)
    for checkpoint in doomed:
        await uninterrupted(_delete(machine, directories, checkpoint.name, bitmaps=not metadata_only))
    notes = [] if metadata_only else _losses(doomed, disks)
    return Deleted(
        machine=machine.name,
        checkpoints=tuple(checkpoint.name for checkpoint in doomed),
        metadata_only=metadata_only,
        notes=(*found.notes, *notes),
    )


def _require_idle(doomed: Iterable[Checkpoint], disks: Iterable[Disk]) -> None:
    """Neither what goes may be in use, nor what it is merged into."""
    names = {checkpoint.name for checkpoint in doomed}
    for disk in disks:
        links = checkpoints.chain(disk.bitmaps).links
        older = (None, *links)
        for pair in zip(older, links, strict=False):
            if pair[1].mark.name in names:
                for bitmap in (link.bitmap for link in pair if link is not None and link.bitmap.busy):
                    what = f"bitmap {bitmap.name} of {disk.target}"
                    raise errors.BusyError(what=what, holder="a job or an export uses it")


async def _delete(machine: Machine, directories: state.Directories, name: str, *, bitmaps: bool) -> None:
    """One checkpoint. Whoever finds it half done, finds a pending document, and ends it."""
    disks = await machine.disks()
    found = _tree(machine, directories, disks)
    checkpoint = found.require(name)
    if bitmaps and checkpoint.disks:
        suspended = saved.suspend(directories, machine.name, name)
        try:
            await _delete_bitmaps(machine, checkpoint, disks)
        except errors.OutcomeUnknown:
            raise
        except BaseException:
            if suspended:
                saved.finish(directories, machine.name, name)
            raise
    if bitmaps or checkpoint.metadata_only:
        everyone = (item.saved for item in found.checkpoints if item.saved is not None)
        children = [kept for kept in everyone if kept.document.parent == name]
        _reparent(machine, directories, children, checkpoint.parent)
    saved.remove(directories, machine.name, name)


def _reparent(machine: Machine, directories: state.Directories, children: Iterable[Saved], parent: str | None) -> None:
    """What stood behind one that is gone stands behind its parent."""
    for kept in children:
        document = replace(kept.document, parent=parent)
        saved.save(directories, machine.name, replace(kept, document=document))


async def _delete_bitmaps(machine: Machine, checkpoint: Checkpoint, disks: Iterable[Disk]) -> None:
    by_target = {disk.target: disk for disk in disks}
    left = list(checkpoint.disks)
    while left:  # once, unless a disk has two bitmaps of that name
        parts = {part.target: part for part in left}
        doomed = [Doomed(disk=by_target[target], nonce=part.mark.nonce) for target, part in parts.items()]
        await machine.delete_checkpoint(doomed)
        left = [part for part in left if part is not parts[part.target]]


def _losses(doomed: Iterable[Checkpoint], disks: Iterable[Disk]) -> list[str]:
    """What the backups of repositories lose with their checkpoints."""
    gone = {part.mark.nonce for checkpoint in doomed for part in checkpoint.disks}
    notes = []
    for disk in disks:
        chain = checkpoints.chain(disk.bitmaps)
        owners = {checkpoints.owner(link.mark.name) for link in chain.links if link.mark.nonce in gone}
        notes += [_loss(disk, chain, owner, gone) for owner in sorted(owner for owner in owners if owner)]
    return notes


def _loss(disk: Disk, chain: Chain, owner: str, gone: set[str]) -> str:
    owned = [link for link in chain.links if checkpoints.owner(link.mark.name) == owner]
    if all(link.mark.nonce in gone for link in owned):
        return f"{disk.target}: the next backup to the repository {owner} reads it whole"
    return f"{disk.target}: the next backup to the repository {owner} may read more than what changed since its last"


# -- putting back ----------------------------------------------------------------------------


async def redefine(
    machine: Machine, directories: state.Directories, document: CheckpointDocument, *, validate: bool = True
) -> Info:
    """Put a checkpoint's document back, from its saved text.

    With `validate` its bitmaps must be there and sound on every disk that it lists, else
    `CheckpointInconsistent`; without, whatever of them is there is joined to it. Raises `BadDocument`.
    """
    disks = await machine.disks()
    found = _tree(machine, directories, disks)
    whole = documents.redefined(_without_sizes(document), _machine_disks(disks, strict=False))
    assert whole.name is not None, "a redefined document has a name"
    checkpoints.check_name(whole.name)
    _require_no_circle(found, whole)
    by_target = {disk.target: disk for disk in disks}
    marks = {}
    for tracked in whole.tracked:
        mark = _proven(by_target[tracked.name], whole.name)
        if not isinstance(mark, str):
            marks[tracked.name] = mark.bitmap
        elif validate:
            raise errors.CheckpointInconsistent(checkpoint=whole.name, target=tracked.name, problem=mark)
    before = found.find(whole.name)
    kept = before.saved.machine if before is not None and before.saved is not None else _description(machine, disks)
    saved.save(directories, machine.name, Saved(document=whole, marks=marks, machine=kept))
    return _info(_tree(machine, directories, disks), whole.name, disks)


def _without_sizes(document: CheckpointDocument) -> CheckpointDocument:
    return replace(document, disks=tuple(replace(disk, size=None) for disk in document.disks))


def _proven(disk: Disk, name: str) -> Mark | str:
    """The mark of a checkpoint on a disk, if it is there once and sound, or why not."""
    chain = checkpoints.chain(disk.bitmaps)
    links = [link for link in chain.links if link.mark.name == name]
    if not links:
        buried = any(mark is not None and mark.name == name for mark in map(checkpoints.parse, disk.buried))
        return "its bitmap lies in a backing image (an external snapshot was made)" if buried else "it has no bitmap"
    if len(links) > 1:
        return "there are two checkpoints of that name"
    return chain.problem or links[0].mark


def _require_no_circle(found: Tree, document: CheckpointDocument) -> None:
    name, above = document.name, document.parent
    if name is None or above is None or found.find(name) is None:
        return
    if any(below.name == above for below in found.descendants(name)):
        raise Place(document=documents.ROOT).at("parent").bad(f"comes behind {name}")


# -- what changed ----------------------------------------------------------------------------


async def changes(
    machine: Machine, directories: state.Directories, target: str, since: str, until: str | None = None
) -> Changes:
    """The ranges of a disk that changed between two checkpoints, or between one and now.

    Whole granules. Raises `UnknownDisk`, `NoCheckpoint`, `CheckpointInconsistent`.
    """
    disks = await machine.disks()
    disk = next((found for found in disks if found.target == target), None)
    if disk is None:
        known = ", ".join(found.target for found in disks) or "none"
        raise errors.UnknownDisk(target=target, where=machine.name, known=known)
    found = _tree(machine, directories, disks)
    links = _between(disk, found, since, until)
    ranges: tuple[Extent, ...] = ()
    if links:
        names = tuple(link.mark.bitmap for link in links)
        async with machine.change_map(Union(disk=disk, bitmaps=names)) as shown:
            cancel = Cancel()
            ranges = await blocking(partial(_ranges, shown, target, cancel), cancel=cancel)
    granularity = max((link.bitmap.granularity for link in links), default=checkpoints.GRANULARITY)
    return Changes(machine=machine.name, target=target, size=disk.size, granularity=granularity, extents=ranges)


def _between(disk: Disk, found: Tree, since: str, until: str | None) -> tuple[Link, ...]:
    """The checkpoints whose bitmaps are what is asked for."""
    chain = checkpoints.chain(disk.bitmaps)
    older = _mark(found.require(since), disk)
    links = chain.since(older) if until is None else chain.between(older, _mark(found.require(until), disk))
    if isinstance(links, str):
        raise errors.CheckpointInconsistent(checkpoint=since, target=disk.target, problem=links)
    return links


def _mark(checkpoint: Checkpoint, disk: Disk) -> Mark:
    part = checkpoint.disk(disk.target)
    reason = "it has no bitmap" if part is None else part.problem
    if part is None or reason is not None:
        raise errors.CheckpointInconsistent(checkpoint=checkpoint.name, target=disk.target, problem=str(reason))
    return part.mark


def _ranges(shown: ChangeMap, target: str, cancel: Cancel) -> tuple[Extent, ...]:
    """In a thread."""
    name = f"the changes of {target}"
    with NbdEndpoint(shown.address, contexts=[shown.context], channels=1, cancel=cancel, name=name) as endpoint:
        return tuple(endpoint.dirty(shown.context, Extent(0, shown.size)))
