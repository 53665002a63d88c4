"""The rule that gives each disk its target."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.model import texts
from pullback.model.disks import PREFIXES, Bus, targets

NAMES = st.one_of(
    st.sampled_from(
        ["", "vda", "vdb", "sda", "hda", "nvme0n1", "nvme1n1", "virtio0", "fd0", "pflash0", "/machine/x[0]"]
    ),
    st.text(max_size=6),
)
DEVICES = st.lists(st.tuples(st.sampled_from(list(Bus)), NAMES), max_size=12)


@pytest.mark.parametrize(
    ("devices", "given_to_them"),
    [
        ([(Bus.VIRTIO, "disk0"), (Bus.VIRTIO, "disk1")], ["vda", "vdb"]),
        ([(Bus.VIRTIO, "disk0"), (Bus.VIRTIO, "vda")], ["vdb", "vda"]),
        ([(Bus.VIRTIO, "vdb"), (Bus.VIRTIO, "x"), (Bus.VIRTIO, "y")], ["vdb", "vda", "vdc"]),
        ([(Bus.SCSI, "a"), (Bus.SATA, "b"), (Bus.USB, "c"), (Bus.IDE, "d")], ["sda", "sdb", "sdc", "hda"]),
        ([(Bus.NVME, "nv0"), (Bus.NVME, "nvme0n1")], ["nvme1n1", "nvme0n1"]),
        ([(Bus.FIRMWARE, "pflash0"), (Bus.FLOPPY, ""), (Bus.SD, "")], ["pflash0", "fda", "mmcblk0"]),
        ([(Bus.VIRTIO, "sda")], ["vda"]),
        ([(Bus.VIRTIO, "vda1")], ["vda"]),
        ([(Bus.VIRTIO, "vdA")], ["vda"]),
        ([(Bus.OTHER, "")], ["diska"]),
    ],
)
def test_targets_are_given_by_the_rule(devices: list[tuple[Bus, str]], given_to_them: list[str]) -> None:
    assert targets(devices) == given_to_them


def test_letters_go_on_as_linux_counts() -> None:
    given_to_them = targets([(Bus.VIRTIO, "")] * 703)
    assert [given_to_them[n] for n in (25, 26, 27, 701, 702)] == ["vdz", "vdaa", "vdab", "vdzz", "vdaaa"]


@given(DEVICES)
def test_every_device_has_a_target_of_its_own_that_fits_its_bus(devices: list[tuple[Bus, str]]) -> None:
    found = targets(devices)
    assert len(set(found)) == len(devices)
    for (bus, _), target in zip(devices, found, strict=True):
        assert target.startswith(PREFIXES[bus])
        assert texts.is_target(target)


@given(DEVICES, st.data())
def test_a_new_disk_behind_the_others_changes_nobodys_target(
    devices: list[tuple[Bus, str]], data: st.DataObject
) -> None:
    """Unless the new one has a name that is a target itself, which then is its own."""
    new = (data.draw(st.sampled_from(list(Bus))), "")
    assert targets([*devices, new])[:-1] == targets(devices)
