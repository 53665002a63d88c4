"""Asking QEMU for its disks: the queries, and the walk over QOM that tells what a device is."""

from __future__ import annotations

from collections.abc import Mapping

from pullback import errors
from pullback.engine import graph, replies
from pullback.engine.monitor import Monitor
from pullback.model.disks import Disk

#: device → HBA → controller: no disk sits deeper.
_LEVELS = 4


def device_path(qdev: str) -> str:
    """The absolute QOM path of a device: a bare id can be ambiguous (an nvme and its bus share it)."""
    return qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"


async def find(monitor: Monitor, *, has_graph: bool) -> tuple[tuple[Disk, ...], graph.Graph]:
    """All block devices of the machine, and the graph they stand on."""
    nodes = graph.parse_nodes(await monitor.execute("query-named-block-nodes", {"flat": True}))
    edges = await monitor.execute("x-debug-query-block-graph") if has_graph else None
    whole = graph.parse_graph(nodes, edges)
    blocks = await monitor.execute("query-block")
    return graph.parse_disks(blocks, whole, await devices(monitor, blocks)), whole


async def devices(monitor: Monitor, blocks: object) -> Mapping[str, graph.Device]:
    """What QOM says of each device in a `query-block` reply, by its qdev."""
    listed = [replies.optional_text(record, "qdev") for record in replies.objects(blocks, "query-block")]
    return {qdev: await _device(monitor, qdev) for qdev in listed if qdev}


async def roots(monitor: Monitor) -> dict[str, str]:
    """The root node of each device with a medium, by qdev, as it is now."""
    found = {}
    for record in replies.objects(await monitor.execute("query-block"), "query-block"):
        inserted = record.get("inserted")
        if record.get("qdev") and isinstance(inserted, Mapping):
            found[replies.text(record, "qdev", "block")] = replies.text(inserted, "node-name", "inserted")
    return found


async def _device(monitor: Monitor, qdev: str) -> graph.Device:
    path: str | None = device_path(qdev)
    types: list[str] = []
    serial, iothread = "", None
    for _ in range(_LEVELS):
        if path is None:
            break
        types.append(await _property(monitor, path, "type"))
        serial = serial or await _property(monitor, path, "serial")
        iothread = iothread or await _iothread(monitor, path)
        path = _above(await _property(monitor, path, "parent_bus"))
    return graph.Device(type=types[0], parents=tuple(types[1:]), serial=serial, iothread=iothread)


def _above(bus: str) -> str | None:
    """The device that has a bus: `/machine/peripheral/hba0/virtio-backend/hba0.0` → its parent."""
    parent = bus.rpartition("/")[0]
    return parent if parent.startswith("/machine/") and parent.count("/") > 2 else None


async def _iothread(monitor: Monitor, path: str) -> str | None:
    single = await _property(monitor, path, "iothread")
    if single:
        return single.rpartition("/")[2]
    # QEMU ≥ 9.0: virtqueues spread over several iothreads.
    mapping = await _raw_property(monitor, path, "iothread-vq-mapping")
    return "several" if isinstance(mapping, list) and mapping else None


async def _property(monitor: Monitor, path: str, name: str) -> str:
    value = await _raw_property(monitor, path, name)
    return value if isinstance(value, str) else ""


async def _raw_property(monitor: Monitor, path: str, name: str) -> object:
    """None if the object has no such property, or is not there (any more).

    Whatever else refuses it is no answer: a disk in an iothread that is taken for another one could kill QEMU.
    """
    try:
        return await monitor.execute("qom-get", {"path": path, "property": name})
    except errors.RefusedError as error:
        if "not found" in error.reason:  # QEMU qom/object.c, error_class_name DeviceNotFound of a path
            return None
        raise


def named(found: tuple[Disk, ...], target: str, machine: str) -> Disk:
    """The disk of that target, with a medium. Raises `UnknownDisk`."""
    for disk in found:
        if disk.target == target and disk.node is not None:
            return disk
    known = ", ".join(disk.target for disk in found if disk.node is not None)
    raise errors.UnknownDisk(target=target, where=machine, known=known)
