"""Rollbacks in the lives of `fates` and `lots`: a disk becomes what it was in any of its restore points."""

from __future__ import annotations

import asyncio
from random import Random

import rolling
from chronicle import GRANULE, Change, Disk, granules
from fates import Fates
from historian import differing
from lots import Lots
from pullback import errors
from pullback.flows import rollback as flow
from pullback.model.rollbacks import After
from victim import running


def become(disk: Disk, content: bytes) -> None:
    """Its content is that now. Whole chunks are written, so more than what differs may be told as changed."""
    every = granules(0, disk.size)
    parts = {number: slice(number * GRANULE, (number + 1) * GRANULE) for number in every}
    must = frozenset(number for number, part in parts.items() if disk.content[part] != content[part])
    disk.content[:] = content
    disk.changes.append(Change(must, every, disk.size))


class Reverting(Fates):
    """See the module."""

    def rollback(self, rolls: Random) -> None:
        """To any point, of all of its disks or some."""
        if not self.running:
            self.let_go()
        point = rolls.choice(list(self.points))
        content = self.points[point]
        targets = rolls.sample(list(content), rolls.randrange(1, len(content) + 1))
        where = {} if self.running else rolling.off(self.box)
        wish = rolling.request(self.box, point, only=tuple(targets), **where)
        if any(len(content[target]) != self.past.disks[target].size for target in targets):
            try:
                asyncio.run(flow.rollback(wish))
            except errors.DisksDiffer:
                self._refused("a rollback of a disk that was resized")
                return
            raise AssertionError("a disk of another size was rolled back")
        report = asyncio.run(flow.rollback(wish))
        assert report.after is (After.RUN if self.running else After.HELD)
        for target in targets:
            become(self.past.disks[target], content[target])
        for disk in report.disks:
            self.mix[f"check: rolled back {'by bitmaps' if disk.by_bitmaps else 'whole'}"] += 1
        self._has(targets)
        with self.machine() as machine:
            self.look(machine, rolls)

    def _has(self, targets: list[str]) -> None:
        if self.running:
            assert running(self.box)
        for target in targets:
            found = rolling.content(self.box, target)[: self.past.disks[target].size]
            assert not differing(found, bytes(self.past.disks[target].content)), target


class RevertingLots(Reverting, Lots):
    """The same with a repository in restic's format."""
