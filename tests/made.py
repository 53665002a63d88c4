"""Restore points without a machine: made in a moment, of any time, in a repository in restic's format."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

import kit
from pullback import repo
from pullback.flows.repositories import opened_restic
from pullback.model import urls
from pullback.model.backups import Level
from pullback.model.points import Mode, Point, PointDisk
from pullback.units import MiB

SIZE = 2 * MiB


def place(path: Path) -> urls.ResticRepository:
    """The repository in a directory."""
    return urls.ResticRepository(location=urls.LocalPlace(path=path))


def opened(path: Path) -> AbstractContextManager[repo.ResticRepository]:
    """It, open; what opens it lies beside it."""
    return opened_restic(place(path), kit.access_of(path.parent))


def empty(path: Path) -> Path:
    """A new repository."""
    kit.make_repository(path, kit.access_of(path.parent).caches)
    return path


def point(path: Path, machine: str, created: datetime, *, tags: Sequence[str] = ()) -> str:
    """A new point, whose disk says whose it is and when it was made; gives its id."""
    with opened(path) as repository, repository.writer(machine, command="test") as writer, writer.begin() as pending:
        pending.create("vda", SIZE)
        disk = pending.disk("vda")
        for block in map(disk.hashes.block, range(disk.hashes.count)):
            data = bytearray(content(machine, created)[block.start : block.end])
            disk.observe(block.start, data, block.length)
        sealed = disk.seal()
        described = PointDisk(
            target="vda",
            qdev=None,
            serial=None,
            source=None,
            source_format=None,
            size=SIZE,
            mode=Mode.FULL,
            reason=None,
            parent=None,
            mark=None,
            block_size=sealed.block_size,
            digest=sealed.digest,
            stored=sealed.stored,
            read=SIZE,
        )
        made = Point(
            id="",
            machine=machine,
            created=created,
            level=Level.AUTO,
            pullback="0",
            qemu="7.2",
            engine="filter",
            pause=0.0,
            checkpoint=None,
            disks=(described,),
            tags=tuple(tags),
        )
        return pending.commit(made).id


def content(machine: str, created: datetime) -> bytes:
    """What the disk of such a point holds."""
    line = f"{machine} {created:%Y-%m-%d %H:%M}\n".encode()
    return (line * (SIZE // len(line) + 1))[:SIZE]
