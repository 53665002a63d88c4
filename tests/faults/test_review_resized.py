"""A disk that is resized between the plan of a backup and its snapshot: the backup fails, and cuts nothing off."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kit import MakeBox
from pullback import errors
from pullback.flows import backup as flow
from pullback.flows.planning import DiskPlan
from pullback.model.backups import SnapshotRequest
from pullback.programs import qemu
from pullback.units import MiB

SIZE = 8 * MiB


@pytest.mark.parametrize("size", [4 * MiB, 20 * MiB], ids=["shrunk", "grown"])
@pytest.mark.parametrize("increment", [False, True], ids=["whole", "increment"])
def test_a_disk_that_is_resized_in_between_is_told(
    make_box: MakeBox, monkeypatch: pytest.MonkeyPatch, size: int, increment: bool
) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), size=SIZE, kind="restic")
    box.scramble("vda", 1, 0, 4 * MiB)
    if increment:
        box.backup()
    before = len(box.checkpoints("vda"))
    real = flow._Backup._snapshot_request

    def resize(self: flow._Backup, plans: Sequence[DiskPlan]) -> SnapshotRequest:
        arguments: dict[str, object] = {"node-name": plans[0].disk.node, "size": size}
        # In a thread, because an event loop runs in this one.
        thread = threading.Thread(target=box.command, args=("block_resize", arguments))
        thread.start()
        thread.join()
        return real(self, plans)

    with monkeypatch.context() as patch:
        patch.setattr(flow._Backup, "_snapshot_request", resize)
        with pytest.raises(errors.EndpointFailed, match=f"resized meanwhile: it has {size} bytes, and had {SIZE}"):
            box.backup()
    assert box.leftovers() == []
    assert len(box.checkpoints("vda")) == before
    [disk] = box.backup().point.disks
    assert (disk.size, disk.parent) == (size, None)
