"""From QMP replies to disks: replies of a real QEMU 7.2 (trimmed), and hostile ones."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback import errors
from pullback.engine import graph
from pullback.model.checkpoints import Mark
from pullback.model.disks import Bus, Disk

DATA = json.loads((Path(__file__).parents[1] / "data" / "qemu-7.2-replies.json").read_text())
MARK = Mark(name="c", nonce="0123456789abcdef", first=1, last=1)


def devices(reply: dict[str, Any]) -> dict[str, graph.Device]:
    """What QOM said."""
    return {
        qdev: graph.Device(
            type=facts["type"], parents=tuple(facts["parents"]), serial=facts["serial"], iothread=facts["iothread"]
        )
        for qdev, facts in reply["devices"].items()
    }


def disks(machine: str) -> dict[str, Disk]:
    """The disks of a captured machine, by target."""
    reply = DATA[machine]
    whole = graph.parse_graph(graph.parse_nodes(reply["nodes"]), None)
    return {disk.target: disk for disk in graph.parse_disks(reply["query-block"], whole, devices(reply))}


def test_every_kind_of_device_of_a_real_machine_gets_its_target() -> None:
    found = {target: (disk.bus, disk.qdev) for target, disk in disks("q35").items()}
    assert found == {
        "vda": (Bus.VIRTIO, "/machine/peripheral-anon/device[2]/virtio-backend"),
        "sda": (Bus.SATA, "/machine/unattached/device[16]"),
        "pflash0": (Bus.FIRMWARE, "/machine/system.flash0"),
        "pflash1": (Bus.FIRMWARE, "/machine/system.flash1"),
        "vdb": (Bus.VIRTIO, "/machine/peripheral/vb0/virtio-backend"),
        "vdc": (Bus.VIRTIO, "/machine/peripheral-anon/device[0]/virtio-backend"),
        "sdb": (Bus.SCSI, "sh0"),
        "sdc": (Bus.SATA, "ah0"),
        "nvme0n1": (Bus.NVME, "nv0"),
        "nvme1n1": (Bus.NVME, "ns1"),
        "sdd": (Bus.USB, "/machine/peripheral/us0/us0.0/legacy[0]"),
        "sde": (Bus.SATA, "cd0"),
        "sdf": (Bus.SCSI, "cd1"),
        "vdd": (Bus.VIRTIO, "/machine/peripheral/ro0/virtio-backend"),
        "fda": (Bus.FLOPPY, "fl0"),
        "mmcblk0": (Bus.SD, "/machine/peripheral-anon/device[1]"),
    }


def test_what_is_no_disk_to_back_up_is_left_out_with_its_reason() -> None:
    left_out = {target: disk.left_out for target, disk in disks("q35").items() if disk.left_out}
    assert left_out == {
        "pflash0": "it is firmware, not a disk",
        "pflash1": "it is firmware, not a disk",
        "sde": "it has no medium",
        "sdf": "it is read-only",
        "vdd": "it is read-only",
        "fda": "it is removable",
        "mmcblk0": "it is removable",
    }


def test_facts_of_a_disk_are_read() -> None:
    disk = disks("q35")["vdb"]
    assert (disk.serial, disk.iothread) == ("VBSER", "io0")
    assert (disk.root, disk.node, disk.format) == ("n_vb", "n_vb", "qcow2")
    assert (disk.size, disk.image) == (1048576, "/images/t3_vb.qcow2")
    assert disk.untrackable is None


def test_a_raw_disk_cannot_be_tracked() -> None:
    assert disks("q35")["fda"].unlasting == "its format raw cannot hold bitmaps"


def test_a_temporary_overlay_cannot_be_tracked() -> None:
    reply = DATA["snapshot"]
    nodes = graph.parse_nodes(reply["nodes"])
    overlay = next(node for node in nodes.values() if "/vl." in node.file and node.driver == "qcow2")
    backed = graph.Graph(nodes=nodes, children={(overlay.name, "backing"): "base"}, jobs={})
    found = graph.parse_disks(reply["query-block"], backed, devices(reply))
    assert [disk.untrackable for disk in found if disk.node == overlay.name] == [
        "it runs on a temporary overlay (-snapshot)"
    ]


# -- the graph -------------------------------------------------------------------------------


def node(name: str, driver: str = "qcow2", **facts: Any) -> graph.Node:
    """A node."""
    return graph.Node(name=name, driver=driver, **facts)


def test_the_graph_of_a_real_machine_names_children_and_jobs() -> None:
    whole = graph.parse_graph({}, DATA["graph with jobs"])
    assert whole.child("#block278", "file") == "#block483"
    assert whole.child("fs", "backing") == "#block483"
    assert whole.child("disk", "file") == "#block029"
    assert whole.jobs_on("disk") == ["foreign", "ours"]
    assert whole.jobs_on("nowhere") == []


def test_filters_are_looked_through_down_to_the_image() -> None:
    nodes = {
        item.name: item for item in (node("t", "throttle"), node("c", "copy-on-read"), node("q"), node("f", "file"))
    }
    children = {("t", "file"): "c", ("c", "file"): "q", ("q", "file"): "f"}
    assert graph.Graph(nodes=nodes, children=children, jobs={}).below_filters("t") == "q"


def test_checkpoints_in_a_backing_image_are_seen_as_buried() -> None:
    bitmaps = [
        {"name": MARK.bitmap, "granularity": 65536, "count": 0, "recording": True},
        {"name": "theirs", "granularity": 512, "count": 0},
    ]
    image = {"virtual-size": 1048576, "format-specific": {"data": {"compat": "1.1"}}}
    top = {"node-name": "top", "drv": "qcow2", "file": "/top", "ro": False, "image": image, "cache": {}}
    base = {**top, "node-name": "base", "file": "/base", "dirty-bitmaps": bitmaps}
    nodes = graph.parse_nodes([top, base])
    whole = graph.Graph(nodes=nodes, children={("top", "backing"): "base"}, jobs={})
    block = {"device": "", "qdev": "vda", "removable": False, "inserted": top}
    [disk] = graph.parse_disks([block], whole, {"vda": graph.Device(type="virtio-blk-device")})
    assert disk.bitmaps == ()
    assert disk.buried == (MARK.bitmap,)


def test_a_circle_in_a_reply_ends() -> None:
    nodes = {"a": node("a", "throttle"), "b": node("b", "throttle")}
    whole = graph.Graph(nodes=nodes, children={("a", "backing"): "b", ("b", "backing"): "a"}, jobs={})
    assert len(whole.family("a")) == 2
    assert len(whole.backing_chain("a")) <= 1000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "qdev",
                    "inserted",
                    "node-name",
                    "drv",
                    "image",
                    "virtual-size",
                    "cache",
                    "dirty-bitmaps",
                    "name",
                    "nodes",
                    "edges",
                    "id",
                    "parent",
                    "child",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_a_hostile_reply_is_a_bad_reply_and_nothing_else(reply: object) -> None:
    empty = graph.Graph(nodes={}, children={}, jobs={})
    for read in (
        graph.parse_nodes,
        lambda value: graph.parse_graph({}, value),
        lambda value: graph.parse_disks(value, empty, {}),
    ):
        with suppress(errors.BadReply):
            read(reply)


@pytest.mark.parametrize(("size", "good"), [(0, True), (2**63 - 1, True), (2**63, False), (-1, False), (True, False)])
def test_sizes_have_bounds(size: object, good: bool) -> None:
    reply = [{"node-name": "n", "drv": "raw", "image": {"virtual-size": size}, "cache": {}}]
    if good:
        assert graph.parse_nodes(reply)["n"].size == size
    else:
        with pytest.raises(errors.BadReply):
            graph.parse_nodes(reply)
