"""How a restore point is laid out as a snapshot. What of it is ours is in docs/format.md.

snapshot      hostname: the machine   paths: /pullback/<machine>   tags: pullback, and the user's
root tree     pullback.json           what restic has no word for (`model.points`)
              firmware/<name>         variables of the machine's firmware, if it has any
              tpm/<name>              the state of its TPM, if it has one
              vda/, vdb/ …            the disks (`trees`)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from pullback import errors
from pullback.model.points import Point
from pullback.repo.restic import host, times, trees
from pullback.repo.restic.snapshots import Snapshot
from pullback.version import __version__

#: File name of the manifest in the root tree.
MANIFEST = "pullback.json"
#: Directory of the firmware's variables in the root tree.
FIRMWARE = "firmware"
#: Directory of the TPM's state in the root tree.
TPM = "tpm"
#: Names that no disk can have.
RESERVED = frozenset({MANIFEST, FIRMWARE, TPM})
#: The tag of every restore point.
TAG = "pullback"
_ROOT = "/pullback/"


def path_of(machine: str) -> str:
    """What a snapshot of the machine has for its path. With the host name it makes restic's groups."""
    return f"{_ROOT}{machine}"


def is_point(snapshot: Snapshot) -> bool:
    """Is it a restore point of ours? (A repository may hold other people's snapshots too.)"""
    return snapshot.paths == (path_of(snapshot.hostname),)


def root_tree(manifest: trees.Node, folders: Mapping[str, bytes], created: datetime) -> bytes:
    """The root tree: the manifest, and the trees of disks, firmware and TPM by their names."""
    moment = times.write(created)
    nodes = [replace(manifest, mtime=moment, atime=moment, ctime=moment)]
    nodes += [trees.directory(name, tree) for name, tree in folders.items()]
    return trees.encode(nodes)


def snapshot_of(point: Point, tree: bytes, parent: str | None) -> Snapshot:
    """The snapshot of a restore point, whose root tree is `tree`."""
    return Snapshot(
        time=times.write(point.created),
        parent=parent,
        tree=tree.hex(),
        paths=(path_of(point.machine),),
        hostname=point.machine,
        username=host.user(),
        uid=os.getuid(),
        gid=os.getgid(),
        tags=(TAG, *point.tags),
        program_version=f"pullback {__version__}",
    )


def tags_of(snapshot: Snapshot) -> tuple[str, ...]:
    """The user's own tags; restic can change them afterwards."""
    return tuple(tag for tag in snapshot.tags if tag != TAG)


def child(tree: bytes, name: str, where: str) -> trees.Node:
    """The entry `name` of a tree. Raises `RepositoryDamaged` if there is none."""
    for node in trees.parse(tree, where):
        if node.name == name:
            return node
    raise errors.RepositoryDamaged(file=where, problem=f"there is no {name} in it")
