"""The block graph and the devices on it, from QMP's replies to values. Pure.

Sources: QAPI `query-block` (BlockInfo), `query-named-block-nodes` (BlockDeviceInfo) and
`x-debug-query-block-graph` (XDbgBlockGraph), which alone names a node's children before QEMU 10.0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pullback.engine import replies
from pullback.model import checkpoints
from pullback.model.disks import Bitmap, Bus, Disk, targets

#: Every node, job and export of ours begins so (a node name has at most 31 characters).
OURS = "pullback-"
#: Filters that may lie between a device and its format node; writes pass through them unchanged.
_FILTERS = {"throttle", "copy-on-read", "preallocate", "compress", "copy-before-write", "blkdebug", "blklogwrites"}
_BUSES = {
    "virtio-blk-device": Bus.VIRTIO,
    "ide-hd": Bus.IDE,
    "ide-cd": Bus.IDE,
    "scsi-hd": Bus.SCSI,
    "scsi-cd": Bus.SCSI,
    "scsi-block": Bus.SCSI,
    "nvme": Bus.NVME,
    "nvme-ns": Bus.NVME,
    "floppy": Bus.FLOPPY,
    "sd-card": Bus.SD,
    "emmc": Bus.SD,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What QOM says about a device (asked by `disks.devices`)."""

    type: str = ""
    #: Types of what it sits on, nearest first: a usb-storage's disk is a scsi-hd on usb-storage.
    parents: tuple[str, ...] = ()
    serial: str = ""
    iothread: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A block node."""

    name: str
    driver: str
    file: str = ""
    size: int = 0
    read_only: bool = False
    #: Bytes of a cluster; 65536 where the format has none.
    cluster: int = 65536
    bitmaps: tuple[Bitmap, ...] = ()
    #: qcow2 compatibility level, "" otherwise.
    compat: str = ""
    #: The raw external data file of a qcow2 (`data_file_raw`), "" otherwise.
    raw_data: str = ""
    #: Cache mode "unsafe": what a temporary `-snapshot` overlay has.
    unsafe: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """All nodes, and who is whose child."""

    nodes: Mapping[str, Node]
    #: (parent node, role) -> child node; roles are QEMU's: file, backing, target …
    children: Mapping[tuple[str, str], str]
    #: Block job ids -> the nodes they hold.
    jobs: Mapping[str, frozenset[str]]

    def child(self, node: str, role: str) -> str | None:
        """The child of a node in that role."""
        return self.children.get((node, role))

    def parents(self, node: str) -> list[str]:
        """The nodes above a node."""
        return [parent for (parent, _), child in self.children.items() if child == node]

    def family(self, node: str) -> frozenset[str]:
        """The node with all that lies below and all that stands above it (a job's hidden filter does)."""
        found: set[str] = set()
        self._collect(node, found, lambda name: [c for (p, _), c in self.children.items() if p == name])
        above: set[str] = set()
        self._collect(node, above, self.parents)
        return frozenset(found | above)

    def _collect(self, node: str, found: set[str], step: Callable[[str], list[str]]) -> None:
        pending = [node]
        while pending:
            name = pending.pop()
            if name not in found:
                found.add(name)
                pending += step(name)

    def jobs_on(self, node: str) -> list[str]:
        """Ids of the block jobs that hold anything of a disk's tree."""
        family = self.family(node)
        return sorted(job for job, nodes in self.jobs.items() if nodes & family)

    def below_filters(self, root: str) -> str:
        """The format node under a device's root."""
        node, seen = root, set[str]()
        while (known := self.nodes.get(node)) is not None and known.driver in _FILTERS and node not in seen:
            seen.add(node)  # no reply may make us go round for ever
            below = self.child(node, "file") or self.child(node, "backing")
            if below is None:
                break
            node = below
        return node

    def backing_chain(self, node: str) -> list[Node]:
        """The images behind a node, nearest first."""
        found: list[Node] = []
        while (below := self.child(node, "backing")) is not None and below in self.nodes and len(found) < 1000:
            node = self.below_filters(below)
            found.append(self.nodes[node])
        return found


def parse_nodes(reply: object) -> dict[str, Node]:
    """`query-named-block-nodes` (flat) to nodes by name."""
    nodes = [_node(record) for record in replies.objects(reply, "query-named-block-nodes")]
    return {node.name: node for node in nodes if node.name}


def _node(record: Mapping[str, object]) -> Node:
    image = replies.mapping(record.get("image"), "image")
    cache = replies.mapping(record.get("cache"), "cache")
    return Node(
        name=replies.optional_text(record, "node-name"),
        driver=replies.text(record, "drv", "node"),
        file=replies.optional_text(record, "file"),
        size=replies.integer(image, "virtual-size", "image"),
        read_only=replies.flag(record, "ro"),
        cluster=replies.integer(image, "cluster-size", "image") if "cluster-size" in image else 65536,
        bitmaps=_bitmaps(record.get("dirty-bitmaps")),
        compat=replies.optional_text(_specific(image), "compat"),
        raw_data=_raw_data(image),
        unsafe=replies.flag(cache, "no-flush"),
    )


def _specific(image: Mapping[str, object]) -> Mapping[str, object]:
    specific = image.get("format-specific")
    data = specific.get("data") if isinstance(specific, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def _raw_data(image: Mapping[str, object]) -> str:
    details = _specific(image)
    return replies.optional_text(details, "data-file") if replies.flag(details, "data-file-raw") else ""


def _bitmaps(reply: object) -> tuple[Bitmap, ...]:
    """Named bitmaps; the unnamed ones are internal to jobs."""
    if reply is None:
        return ()
    records = replies.objects(reply, "dirty-bitmaps")
    return tuple(
        Bitmap(
            name=replies.text(record, "name", "bitmap"),
            granularity=replies.integer(record, "granularity", "bitmap"),
            count=replies.integer(record, "count", "bitmap"),
            recording=replies.flag(record, "recording"),
            busy=replies.flag(record, "busy"),
            persistent=replies.flag(record, "persistent"),
            inconsistent=replies.flag(record, "inconsistent"),
        )
        for record in records
        if record.get("name")
    )


def parse_graph(nodes: Mapping[str, Node], reply: object | None) -> Graph:
    """Nodes and `x-debug-query-block-graph` (None where QEMU lacks it) to a graph."""
    if reply is None:
        return Graph(nodes=nodes, children={}, jobs={})
    record = replies.mapping(reply, "x-debug-query-block-graph")
    listed = replies.objects(record.get("nodes"), "graph.nodes")
    names = {replies.integer(item, "id", "graph node"): replies.optional_text(item, "name") for item in listed}
    kinds = {replies.integer(item, "id", "graph node"): replies.optional_text(item, "type") for item in listed}
    children: dict[tuple[str, str], str] = {}
    jobs: dict[str, set[str]] = {}
    for edge in replies.objects(record.get("edges"), "graph.edges"):
        parent, child = replies.integer(edge, "parent", "edge"), replies.integer(edge, "child", "edge")
        above, below = names.get(parent, ""), names.get(child, "")
        if kinds.get(parent) == "block-driver":
            children[above, replies.text(edge, "name", "edge")] = below
        elif kinds.get(parent) == "block-job":
            jobs.setdefault(above, set()).add(below)
    return Graph(nodes=nodes, children=children, jobs={name: frozenset(below) for name, below in jobs.items()})


def parse_disks(query_block: object, graph: Graph, devices: Mapping[str, Device]) -> tuple[Disk, ...]:
    """All block devices of a machine, in QEMU's order, with their targets."""
    records = [record for record in replies.objects(query_block, "query-block") if record.get("qdev")]
    facts = [devices.get(replies.text(record, "qdev", "block"), Device()) for record in records]
    buses = [bus(device) for device in facts]
    named = targets(zip(buses, [_identifier(record) for record in records], strict=True))
    return tuple(map(_disk, records, facts, buses, named, [graph] * len(records)))


def _identifier(record: Mapping[str, object]) -> str:
    """The id a user gave: of the device, or of the -drive."""
    qdev = replies.text(record, "qdev", "block").removeprefix("/machine/peripheral/")
    return replies.optional_text(record, "device") or qdev.split("/")[0]


def bus(device: Device) -> Bus:
    """The bus, from the device's type and what it sits on."""
    if "usb-storage" in (device.type, *device.parents) or "usb-uas" in device.parents:
        return Bus.USB
    if device.type in ("ide-hd", "ide-cd") and any("ahci" in parent for parent in device.parents):
        return Bus.SATA
    if device.type.startswith("cfi.pflash"):
        return Bus.FIRMWARE
    return _BUSES.get(device.type, Bus.OTHER)


def _disk(record: Mapping[str, object], device: Device, kind: Bus, target: str, graph: Graph) -> Disk:
    disk = Disk(
        target=target,
        bus=kind,
        qdev=replies.text(record, "qdev", "block"),
        serial=device.serial,
        removable=replies.flag(record, "removable"),
        iothread=device.iothread,
    )
    inserted = record.get("inserted")
    if not isinstance(inserted, Mapping):
        return replace(disk, left_out="it has no medium")
    root = replies.text(inserted, "node-name", "inserted")
    node = graph.nodes.get(graph.below_filters(root))
    if node is None:
        node = _node(inserted)
    return with_medium(disk, root, node, read_only=replies.flag(inserted, "ro"), graph=graph)


def with_medium(disk: Disk, root: str, node: Node, *, read_only: bool, graph: Graph) -> Disk:
    """The disk with what its format node says, and whether changes on it can be tracked."""
    behind = [bitmap.name for image in graph.backing_chain(node.name) for bitmap in image.bitmaps]
    disk = replace(
        disk,
        root=root,
        node=node.name,
        format=node.driver,
        image=node.file,
        size=node.size,
        cluster=max(node.cluster, 512),
        read_only=read_only,
        bitmaps=node.bitmaps,
        buried=tuple(name for name in behind if checkpoints.parse(name)),
    )
    why = _untrackable(disk, node, graph)
    transient = why is None and not holds_bitmaps(node)
    shown = _shows_holes(node, graph)
    return replace(disk, untrackable=why, transient=transient, left_out=_left_out(disk), hole_file=shown)


def _shows_holes(node: Node, graph: Graph) -> str | None:
    """The file whose holes are the disk's, where QEMU tells of data everywhere, or may (7.2)."""
    if node.raw_data:
        below = graph.nodes.get(graph.child(node.name, "data-file") or "")
        named = below.file if below is not None else node.raw_data
        return os.path.join(os.path.dirname(node.file), named)
    return node.file if node.driver == "raw" else None


def _untrackable(disk: Disk, node: Node, graph: Graph) -> str | None:
    """Any writable node takes bitmaps in memory; where they cannot be stored, the disk is `transient`."""
    if disk.read_only:
        return "it is read-only"
    if _temporary(node, graph):
        return "it runs on a temporary overlay (-snapshot)"
    return None


def holds_bitmaps(node: Node) -> bool:
    """Bitmaps are stored in qcow2 version 3 only (QEMU docs/interop/qcow2.txt, "Bitmaps extension")."""
    return node.driver == "qcow2" and node.compat != "0.10"


def _temporary(node: Node, graph: Graph) -> bool:
    """A `-snapshot` overlay: unsafe cache, a backing image, and a file unlinked right after opening.

    No query says so directly (seen on QEMU 7.2: `json:{… "/var/tmp/vl.XXXXXX"}`, cache.no-flush).
    """
    return node.unsafe and "/vl." in node.file and graph.child(node.name, "backing") is not None


def _left_out(disk: Disk) -> str | None:
    if disk.bus is Bus.FIRMWARE:
        return "it is firmware, not a disk"
    if disk.read_only:
        return "it is read-only"
    if disk.removable:
        return "it is removable"
    return None


def image_path(file: str) -> str | None:
    """The local file behind a node's file name, or None (a json: description, a network protocol)."""
    return file if file.startswith("/") and os.path.exists(file) else None
