"""The images behind a disk of a restore point, and the one way in which QEMU may open them.

    20261126T…/vda.qcow2 ─▶ 20261125T…/vda.qcow2 ─▶ 20261124T…/vda.qcow2 ─▶ nothing
       top: an increment                               base: a whole image

The way is told by the manifests, never by the images: an image whose header says anything else
(another backing file, a data file, another size) is refused before QEMU sees it. And QEMU is given
the whole graph with its drivers, so that it probes nothing and follows no name in an image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pullback import errors
from pullback.model.points import Point, PointDisk
from pullback.model.texts import showable
from pullback.programs import qemu_img
from pullback.repo import files
from pullback.repo.digest import ENTRY, HashList
from pullback.repo.directory import layout, qcow2, structure
from pullback.units import KiB, MiB

#: Images in a chain at most. QEMU's time to open a chain grows with the third power of its length
#: (QEMU 7.2: 64 images 0.13 s, 128 0.9 s, 256 7 s; every node's file name is rebuilt from those below).
MAX_DEPTH = 128

# QEMU gives every qcow2 of a chain up to 32 MiB of L2 cache (its docs/qcow2-cache.txt), filled as
# it is used. A long chain shares what about eight images would take.
_CACHE_BUDGET = 256 * MiB
_CACHE_MIN = 512 * KiB
_CACHE_DEFAULT = 32 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One image of a chain."""

    #: The restore point that it belongs to.
    point: Point
    #: The disk in that point.
    disk: PointDisk
    #: The image file.
    path: Path
    #: The name of the backing file that the image must have; None for the base.
    backing: str | None


def follow(machine: Path, point: Point, target: str) -> tuple[Link, ...]:
    """The chain of a disk, top first, each image's header checked against the manifests.

    `machine` is the machine's directory. Raises `VerificationFailed` if a point or image of the
    chain is missing or not what it must be, `UnknownDisk`, `RepositoryTooNew`, `PermissionDenied`.
    """
    links = _links(machine, point, target)
    for link in links:
        _check_header(point.id, link)
    return links


def _links(machine: Path, point: Point, target: str) -> tuple[Link, ...]:
    """The chain as the manifests tell it: no circle, no more than `MAX_DEPTH`, one size."""
    found = [(point, point.disk(target))]
    while (parent := found[-1][1].parent) is not None:
        if len(found) == MAX_DEPTH or any((parent.point, parent.target) == (at.id, disk.target) for at, disk in found):
            raise errors.VerificationFailed(point=point.id, problem=f"the chain of {target} does not end")
        below = _parent(machine, point.id, parent.point)
        found.append((below, _disk_of(below, parent.target, point.id)))
    if len({disk.size for _, disk in found}) > 1:
        raise errors.VerificationFailed(point=point.id, problem=f"{target} and its parents differ in size")
    backings = [layout.backing_name(at.id, disk.image.image) for at, disk in found[1:]]
    return tuple(
        Link(point=at, disk=disk, path=machine / at.id / disk.image.image, backing=backing)
        for (at, disk), backing in zip(found, [*backings, None], strict=True)
    )


def _parent(machine: Path, point: str, parent: str) -> Point:
    try:
        return layout.read_point(machine, parent)
    except errors.VerificationFailed as error:
        raise errors.VerificationFailed(point=point, problem=f"its parent {parent}: {error.problem}") from error


def _disk_of(parent: Point, target: str, point: str) -> PointDisk:
    try:
        disk = parent.disk(target)
    except errors.UnknownDisk as error:
        raise errors.VerificationFailed(point=point, problem=f"its parent {parent.id} has no disk {target}") from error
    return disk


def _check_header(point: str, link: Link) -> None:
    """Refuse an image whose own words are not those that its manifest demands."""
    name = f"{link.point.id}/{link.disk.image.image}"
    with files.judging(point, name):
        header = qcow2.read(link.path)
        if header.backing != link.backing:
            found = "nothing" if header.backing is None else repr(showable(header.backing)[:200])
            raise ValueError(f"the image is backed by {found} instead of {link.backing or 'nothing'}")
        if header.backing is not None and header.backing_format != "qcow2":
            raise ValueError("the image does not say that its backing file is a qcow2")
        if header.size != link.disk.size:
            raise ValueError(f"the image has {header.size} bytes instead of {link.disk.size}")


def prove_structure(point: str, links: Sequence[Link]) -> None:
    """Compare all of each image that is not the guest's data; raises `VerificationFailed`."""
    for link in links:
        with files.judging(point, f"{link.point.id}/{link.disk.image.image}"):
            if structure.digest(link.path) != link.disk.image.structure:
                raise ValueError("its structure is not what was stored")


def graph(links: Sequence[Link]) -> dict[str, object]:
    """QEMU's block graph of a chain, read-only, for `-blockdev` or `pseudo_filename`.

    Without locks: nobody writes to an image of a finished point, a file system may be read-only or
    know no locks, and others may have the same image open.
    """
    cache = max(_CACHE_MIN, min(_CACHE_DEFAULT, _CACHE_BUDGET // len(links)))
    below: dict[str, object] | None = None
    for link in reversed(links):
        below = {
            "driver": "qcow2",
            "read-only": True,
            "l2-cache-size": cache,
            "file": {"driver": "file", "filename": str(link.path), "read-only": True, "locking": "off"},
            "backing": below,
        }
    assert below is not None
    return below


def pseudo_filename(graph: dict[str, object]) -> str:
    """The graph as a file name that every QEMU program takes in place of one (without -f)."""
    return "json:" + json.dumps(graph, separators=(",", ":"))


def hash_list(machine: Path, point: Point, target: str) -> HashList:
    """The block hashes of a disk. Raises `VerificationFailed` if they are not those of the manifest."""
    disk = point.disk(target)
    with files.judging(point.id, f"{point.id}/{disk.image.hashes}"):
        expected = -(-disk.size // disk.block_size) * ENTRY
        data = files.read(machine / point.id / disk.image.hashes, limit=expected)
        hashes = HashList.decode(data, size=disk.size, block_size=disk.block_size)
        if hashes.digest() != disk.digest:
            raise ValueError("the hash list is not the one that the manifest names")
    return hashes


def complaints(links: Sequence[Link]) -> tuple[str, ...]:
    """What is wrong with the structure of a chain that `follow` has passed; empty if it is sound.

    Looks at every image (qemu-img check) and every hash list, not at what the guest's disk holds:
    that takes reading it all. Raises `ProgramMissing`, `PermissionDenied`.
    """
    found = []
    for link in links:
        if (problem := qemu_img.check(link.path)) is not None:
            found.append(f"{link.point.id}/{link.disk.image.image}: {showable(problem)}")
        try:
            hash_list(link.path.parent.parent, link.point, link.disk.target)
        except errors.VerificationFailed as error:
            found.append(error.problem)
    return tuple(found)
