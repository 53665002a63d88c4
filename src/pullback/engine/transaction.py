"""The elementary actions, joined in one QMP transaction. Pure, but for `run`.

    bitmap: add | disable | enable | merge | remove          (checkpoint half)
    disk:   back up (classic fleecing, push)                 (consumption half)
            put an overlay on it

QEMU drains all I/O before a transaction's first action, so its actions share one instant, over
any number of disks; and it undoes all of them when one fails (QAPI `transaction`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pullback.engine.monitor import Monitor
from pullback.model import checkpoints
from pullback.model.checkpoints import Chain, Mark, Merge


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """A new, clean bitmap on a node."""

    node: str
    name: str
    persistent: bool
    recording: bool
    granularity: int = checkpoints.GRANULARITY

    def qmp(self) -> dict[str, object]:
        """The action as QMP has it."""
        data: dict[str, object] = {"node": self.node, "name": self.name, "granularity": self.granularity}
        if self.persistent:
            data["persistent"] = True
        if not self.recording:
            data["disabled"] = True
        return {"type": "block-dirty-bitmap-add", "data": data}

    def undo(self) -> Remove:
        """Only for a bitmap that holds nothing: what it recorded must be merged away first."""
        return Remove(node=self.node, name=self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disable:
    """Freeze a bitmap."""

    node: str
    name: str

    def qmp(self) -> dict[str, object]:
        """The action as QMP has it."""
        return {"type": "block-dirty-bitmap-disable", "data": {"node": self.node, "name": self.name}}

    def undo(self) -> Enable:
        """Let it record again."""
        return Enable(node=self.node, name=self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Enable:
    """Let a bitmap record."""

    node: str
    name: str

    def qmp(self) -> dict[str, object]:
        """The action as QMP has it."""
        return {"type": "block-dirty-bitmap-enable", "data": {"node": self.node, "name": self.name}}

    def undo(self) -> Disable:
        """Freeze it again."""
        return Disable(node=self.node, name=self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeInto:
    """Add the bits of bitmaps to another bitmap. Not undone: its target is new, or kept."""

    node: str
    target: str
    sources: tuple[str, ...]
    #: Where the sources are; None: on the target's node.
    source_node: str | None = None

    def qmp(self) -> dict[str, object]:
        """The action as QMP has it."""
        sources: list[object] = list(self.sources)
        if self.source_node is not None:
            sources = [{"node": self.source_node, "name": name} for name in self.sources]
        data = {"node": self.node, "target": self.target, "bitmaps": sources}
        return {"type": "block-dirty-bitmap-merge", "data": data}


@dataclass(frozen=True, slots=True, kw_only=True)
class Clear:
    """Take all bits out of a bitmap."""

    node: str
    name: str

    def qmp(self) -> dict[str, object]:
        """The action as QMP has it."""
        return {"type": "block-dirty-bitmap-clear", "data": {"node": self.node, "name": self.name}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Remove:
    """Remove a bitmap."""

    node: str
    name: str

    def qmp(self) -> dict[str, object]:
        """The action as QMP has it."""
        return {"type": "block-dirty-bitmap-remove", "data": {"node": self.node, "name": self.name}}


@dataclass(frozen=True, slots=True, kw_only=True)
class BackUp:
    """Start a job that copies old blocks of a disk to scratch before they are overwritten."""

    job: str
    node: str
    scratch: str
    #: QEMU ≥ 10.1: a failing copy breaks the snapshot, not the guest's write.
    break_snapshot: bool = False

    def qmp(self) -> dict[str, object]:
        """The action as QMP has it."""
        data: dict[str, object] = {
            "job-id": self.job,
            "device": self.node,
            "target": self.scratch,
            "sync": "none",
            "auto-dismiss": False,
        }
        if self.break_snapshot:
            data |= {"on-cbw-error": "break-snapshot"}
        return {"type": "blockdev-backup", "data": data}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Put an overlay on a disk's image: writes go to it from now on."""

    node: str
    overlay: str

    def qmp(self) -> dict[str, object]:
        """The action as QMP has it."""
        return {"type": "blockdev-snapshot", "data": {"node": self.node, "overlay": self.overlay}}


Action = Add | Disable | Enable | MergeInto | Clear | Remove | BackUp | Stack


def checkpoint(node: str, new: Mark, freeze: str | None, *, transient: bool = False) -> list[Action]:
    """A new checkpoint: its bitmap records from now on, the older one is frozen.

    `transient`: the disk's format cannot store it (`model.disks.Disk`).
    """
    actions: list[Action] = [Add(node=node, name=new.bitmap, persistent=not transient, recording=True)]
    if freeze is not None:
        actions.append(Disable(node=node, name=freeze))
    return actions


def take_back(node: str, new: Mark, freeze: str | None) -> list[Action]:
    """Undo `checkpoint`, also long after it: what the new bitmap recorded goes back into the older."""
    remove = Remove(node=node, name=new.bitmap)
    if freeze is None:
        return [remove]
    return [
        Disable(node=node, name=freeze).undo(),
        MergeInto(node=node, target=freeze, sources=(new.bitmap,)),
        remove,
    ]


def give_back(node: str, chain: Chain, new: Mark) -> list[Action]:
    """Undo `checkpoint` on a chain as it is now; nothing if it is not there.

    Exactly as it was before, if it still is the newest; else it is deleted like any checkpoint.
    """
    link = chain.find(new.nonce)
    if link is None:
        return []
    index = chain.links.index(link)
    if chain.newest is link and chain.problem is None:
        return take_back(node, link.mark, chain.links[index - 1].mark.bitmap if index else None)
    merge = chain.deletion(new.nonce)
    return deletion(node, merge) if merge else []


def union(node: str, name: str, sources: Sequence[str]) -> list[Action]:
    """A temporary, frozen bitmap that holds the union of others."""
    return [
        Add(node=node, name=name, persistent=False, recording=False),
        MergeInto(node=node, target=name, sources=tuple(sources)),
    ]


def deletion(node: str, merge: Merge) -> list[Action]:
    """Delete a checkpoint without losing what its bitmap holds (`model.checkpoints.Chain.deletion`)."""
    actions: list[Action] = []
    if merge.add is not None:
        actions.append(Add(node=node, name=merge.add.bitmap, persistent=merge.persistent, recording=merge.recording))
        actions.append(MergeInto(node=node, target=merge.add.bitmap, sources=merge.sources))
    actions += [Remove(node=node, name=name) for name in merge.remove]
    return actions


async def run(monitor: Monitor, actions: Iterable[Action]) -> None:
    """Run the actions at one instant; `RefusedError` if QEMU refuses one (then none was done)."""
    listed = [action.qmp() for action in actions]
    if listed:
        await monitor.transaction(listed)
