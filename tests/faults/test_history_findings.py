"""What random histories found, each by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from fates import Fates
from kit import MakeBox
from pullback import How, errors
from pullback.model.backups import Fleecing

_VDA = [{"name": "vda"}]


@pytest.fixture
def fates(make_box: MakeBox) -> Iterator[Fates]:
    """A machine with two qcow2 disks and a raw one."""
    made = Fates(make_box, Counter())
    yield made
    made.let_go()


def test_a_checkpoint_made_after_a_snapshot_tells_nothing_of_it_though_its_step_and_name_were_used_before(
    fates: Fates,
) -> None:
    with fates.machine() as machine:
        machine.checkpoint_create({"name": "a", "disks": _VDA})
        machine.snapshot_create({"name": "s", "disks": _VDA})
        machine.checkpoint_delete("a")
        machine.checkpoint_create({"name": "a", "disks": _VDA})
        with pytest.raises(errors.CheckpointInconsistent, match="not older"):
            machine.export_start({"disks": [{"name": "vda", "snapshot": "s", "checkpoint": "a"}]})
        [served] = machine.export_start({"disks": [{"name": "vda", "snapshot": "s", "allcheckpoints": True}]})
        assert served.contexts == ()
        machine.snapshot_delete("s")


def test_an_export_of_a_disk_does_not_hold_the_filter_of_a_push(fates: Fates) -> None:
    wish = {"name": "vda", "type": "file", "target": {"file": str(fates.box.directory / "out")}}
    with fates.machine() as machine:
        machine.backup_begin({"mode": "push", "disks": [wish]}, speed=4096, how=How(fleecing=Fleecing.FILTER))
        machine.export_start({"disks": _VDA})
        machine.backup_abort()
        machine.export_stop()
    assert fates.box.leftovers() == []


def test_a_second_export_of_the_changes_since_the_same_checkpoint_is_refused_and_the_first_goes_on(
    fates: Fates,
) -> None:
    with fates.machine() as machine:
        machine.checkpoint_create({"name": "a", "disks": _VDA})
        machine.snapshot_create({"name": "s", "disks": _VDA})
        wish = {"name": "vda", "snapshot": "s", "checkpoint": "a"}
        [first] = machine.export_start({"disks": [{**wish, "exportname": "first"}]})
        with pytest.raises(errors.BusyError, match="another export"):
            machine.export_start({"disks": [{**wish, "exportname": "second"}]})
        assert machine.export_list() == (first,)
        machine.export_stop()
        machine.export_start({"disks": [wish]})
        machine.snapshot_delete("s")


def test_a_raw_disk_that_is_off_is_written_through_an_export_but_not_under_a_snapshot(fates: Fates) -> None:
    fates.box.quit()
    fates.running = False
    for number in range(3):
        fates.write(Random(number))
    document = {"disks": [{"name": "vdc", "readonly": False}]}
    with fates.machine() as machine:
        machine.snapshot_create({"name": "s", "disks": [{"name": "vdc"}]})
        with pytest.raises(errors.DiskBusy, match="snapshot s"):
            machine.export_start(document)
        machine.snapshot_delete("s")
        machine.export_start(document)
        with pytest.raises(errors.DiskBusy, match="export vdc"):
            machine.snapshot_create({"name": "s", "disks": [{"name": "vdc"}]})
        with pytest.raises(errors.DiskBusy, match="export vdc"):
            machine.backup_begin({"mode": "pull", "disks": [{"name": "vdc"}]})
    fates.let_go()
    fates.compare_images()


def test_a_push_of_stopped_images_that_is_left_takes_its_checkpoint_s_document_with_it(fates: Fates) -> None:
    fates.box.quit()
    fates.running = False
    out: Path = fates.box.directory / "out"
    wish = {"name": "vda", "type": "file", "target": {"file": str(out)}}
    with fates.machine() as machine:
        machine.backup_begin({"mode": "push", "disks": [wish]}, {"name": "a"}, speed=4096)
    fates.let_go()
    with fates.machine() as machine:
        assert machine.checkpoint_list().checkpoints == ()
    assert not out.exists()


def test_an_aborted_job_leaves_the_document_of_a_later_checkpoint_of_the_same_name(fates: Fates) -> None:
    with fates.machine() as machine:
        machine.backup_begin({"mode": "pull", "disks": _VDA}, {"name": "a"})
        machine.checkpoint_delete("a")
        machine.checkpoint_create({"name": "a", "description": "mine", "disks": _VDA})
        machine.backup_abort()
        assert machine.checkpoint_info("a").checkpoint.description == "mine"
