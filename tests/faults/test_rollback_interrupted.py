"""What becomes of a rollback that cannot go on: undone before it writes, pending afterwards, and always told."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rolling
from hindered import Seen, hindered
from jsonkit import mismatches
from kit import Box, MakeBox, last_json
from mounts import Mount
from pullback import errors
from pullback.cli import documents
from pullback.flows import rollback as flow
from pullback.flows import staging
from pullback.model import rollbacks as values
from pullback.model.rollbacks import After, Phase
from pullback.programs import qemu
from pullback.progress import Silent
from pullback.repo import Kind
from pullback.state import rollbacks
from pullback.transfer.nbd import NbdChannel
from pullback.units import KiB, MiB


class Breaking(Silent):
    """Something happens when a disk's work begins."""

    def __init__(self, subject: str, what: Callable[[], object]) -> None:
        self._subject, self._what = subject, what

    def start(self, subject: str, total: int) -> None:
        """Once."""
        if subject == self._subject:
            self._subject = ""
            self._what()


def fail() -> None:
    """As a thread of ours would."""
    raise errors.CannotWrite(path="something", reason="made so by the test")


def prepared(make_box: MakeBox, **options: Any) -> tuple[Box, dict[str, bytes]]:
    """A machine that has changed since its point, and what it held then."""
    box = make_box(**options)
    for disk in ("vda", "vdb"):
        box.scramble(disk, 1, 0, 3 * MiB)
    box.backup()
    then = box.image()
    for disk in ("vda", "vdb"):
        box.scramble(disk, 2, MiB, 64 * KiB)
        box.zero(disk, 2 * MiB, MiB)
    return box, then


def is_undone(box: Box) -> None:
    """The disks are as they were, and the machine runs."""
    assert box.command("query-status")["status"] == "running"
    for disk, wanted in box.image().items():
        assert rolling.content(box, disk) == wanted
    assert box.leftovers() == []
    assert list((box.directory / "state" / "rollbacks").glob("*")) == []
    assert box.backup().broken == ()
    assert box.restored() == box.image()


def is_back(box: Box, then: dict[str, bytes]) -> None:
    for disk, wanted in then.items():
        assert rolling.content(box, disk) == wanted
        box.model[disk][:] = wanted
    assert box.leftovers() == []
    assert list((box.directory / "state" / "rollbacks").glob("*")) == []
    box.backup()
    assert box.restored() == box.image()


def phase(box: Box) -> Phase:
    """Of the only rollback."""
    [journal] = rollbacks.every(box.directories.state)
    return journal.phase


def interrupt(box: Box, subject: str = "vdb write", **changes: Any) -> None:
    """A rollback that fails when it has written one disk."""
    with pytest.raises(errors.RollbackUnfinished, match="made so by the test") as caught:
        rolling.roll(box, progress=Breaking(subject, fail), **changes)
    assert "pullback rollback " in str(caught.value.hint)
    assert phase(box) is Phase.WRITING


# -- before it writes ------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["vda stage", "vda compare", "vdb compare"])
def test_what_fails_before_anything_is_written_is_undone(make_box: MakeBox, subject: str) -> None:
    box, _ = prepared(make_box)
    if subject == "vda stage":
        box.backup()
    with pytest.raises(errors.CannotWrite):
        rolling.roll(box, box.points()[0].id, progress=Breaking(subject, fail))
    is_undone(box)


@pytest.mark.parametrize("numbers", [range(1, 40, 4), pytest.param(range(1, 60), marks=pytest.mark.slow)])
def test_a_store_that_fails_at_any_operation_costs_nothing(make_box: MakeBox, numbers: range) -> None:
    """And once writing has begun the repository is not asked for anything."""
    box, then = prepared(make_box, kind="restic")
    point = box.points()[0].id
    box.backup()
    failed = 0
    for number in numbers:
        seen = Seen()
        late: list[str] = []

        def strike(at: int, operation: str, kind: Kind, number: int = number, late: list[str] = late) -> None:
            if any(journal.phase is Phase.WRITING for journal in rollbacks.every(box.directories.state)):
                late.append(f"{operation} {kind}")
            if at == number:
                raise errors.StoreUnreachable(store="it", reason="the test says so")

        seen.strike = strike
        try:
            with hindered(seen):
                rolling.roll(box, point)
        except (errors.StoreUnreachable, errors.VerificationFailed):
            failed += 1
            assert late == []
            continue
        assert late == []
        break
    assert failed
    assert box.command("query-status")["status"] == "running"
    if failed == len(numbers):
        rolling.roll(box, point)
    is_back(box, then)


def test_a_damaged_chunk_is_found_before_anything_is_written(make_box: MakeBox) -> None:
    box, _ = prepared(make_box)
    image = max(box.repository.rglob("vda.qcow2"))
    data = bytearray(image.read_bytes())
    for at in range(len(data) - 3 * MiB, len(data), 64 * KiB):
        data[at] ^= 1
    image.write_bytes(data)
    with pytest.raises(errors.VerificationFailed):
        rolling.roll(box)
    assert box.command("query-status")["status"] == "running"
    assert rolling.content(box, "vda") == bytes(box.model["vda"])
    assert box.leftovers() == []


# -- afterwards ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dir", pytest.param("restic", marks=pytest.mark.slow)])
def test_until_it_is_finished_nobody_may_use_the_disks(make_box: MakeBox, kind: str) -> None:
    box, then = prepared(make_box, kind=kind)
    interrupt(box)
    assert box.command("query-status")["status"] == "prelaunch"
    place = box.repository if kind == "restic" else f"dir:{box.repository}"
    target = f"qmp:{box.qmp}"
    for words in (
        ["backup", target, "-r", place],
        ["info", target],
        ["recover", target],
        ["untrack", target],
        ["checkpoint", "create", target],
        ["snapshot", "create", target],
        ["rollback", target, "-r", place, "--dry-run"],
        ["rollback", target, "1999-12-31", "-r", place],
    ):
        done = box.cli(*words, "--json")
        assert (done.returncode, last_json(done.stdout)["code"]) == (11, "rollback-pending"), words
    told = [check for check in last_json(box.cli("doctor", "--json").stdout)["checks"] if check["name"] == "rollback"]
    assert [check["status"] for check in told] == ["problem"]
    assert "pullback rollback" in told[0]["remedy"]
    # Its own machine goes on, and has no word in it.
    box.command("cont")
    assert rolling.roll(box).finished
    assert box.command("query-status")["status"] == "running"
    is_back(box, then)


def test_it_is_known_by_its_files_whatever_the_machine_is_called(make_box: MakeBox) -> None:
    box, then = prepared(make_box)
    interrupt(box)
    box.kill()
    box.name = "another"
    moved = replace(box.disks[0], path=box.disks[0].path.rename(box.directory / "moved.qcow2"))
    box.disks[0] = moved
    box.start()
    refused = box.cli("info", f"qmp:{box.qmp}", "--json")
    assert last_json(refused.stdout)["code"] == "rollback-pending"
    assert rolling.roll(box).finished
    assert {disk: rolling.content(box, disk) for disk in then} == then


def test_an_overlay_does_not_hide_it(make_box: MakeBox) -> None:
    """Neither from a machine that runs, nor from one that is off."""
    box, _ = prepared(make_box)
    interrupt(box)
    box.kill()
    base = box.disks[0].path
    overlay = box.directory / "overlay.qcow2"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(overlay)]
    subprocess.run(words, check=True)
    box.disks[0] = replace(box.disks[0], path=overlay)
    images = f"images:vda=qcow2:{overlay}"
    assert box.cli("checkpoint", "list", images, "--name", "x").returncode == 11
    box.start()
    assert box.cli("info", f"qmp:{box.qmp}").returncode == 11
    with pytest.raises(errors.DisksDiffer, match="half rolled back"):
        rolling.roll(box)


def test_a_guest_that_ran_meanwhile_is_rolled_back_whole(make_box: MakeBox) -> None:
    """Started by other means: what it wrote is found by reading everything, and asked of the repository."""
    box, then = prepared(make_box)
    interrupt(box)
    box.kill()
    box.start()
    box.write("vda", 77, 0, 64 * KiB)  # nothing of this was staged
    box.write("vdb", 77, 5 * MiB, 64 * KiB)
    away = box.repository.rename(box.directory / "away")
    with pytest.raises(errors.NoRepository):
        rolling.roll(box)
    assert phase(box) is Phase.WRITING
    assert box.cli("info", f"qmp:{box.qmp}").returncode == 11
    away.rename(box.repository)
    report = rolling.roll(box, after=After.RUN)
    assert report.finished
    assert all(not disk.by_bitmaps for disk in report.disks)
    is_back(box, then)


def test_what_is_staged_is_proven_before_it_is_written(make_box: MakeBox) -> None:
    box, then = prepared(make_box)
    interrupt(box, "vda write")
    [journal] = rollbacks.every(box.directories.state)
    staged = Path(journal.disks[0].staged)
    whole = staged.read_bytes()
    broken = bytearray(whole)
    broken[MiB + 5] ^= 1
    staged.write_bytes(broken)
    with pytest.raises(errors.RollbackUnfinished, match="not what was staged"):
        rolling.roll(box)
    staged.write_bytes(whole)
    rolling.roll(box)
    is_back(box, then)


def test_a_disk_that_forgets_what_it_was_given_is_told(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is read back."""
    box, then = prepared(make_box)
    real = NbdChannel.write
    with monkeypatch.context() as patch:
        patch.setattr(NbdChannel, "write", lambda *words: None)
        with pytest.raises(errors.RollbackUnfinished, match="are not what was written"):
            rolling.roll(box)
    assert NbdChannel.write is real
    rolling.roll(box)
    is_back(box, then)


def test_a_full_file_system_under_an_image_can_be_given_room(make_box: MakeBox, mount: Mount) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), start=False)
    small = mount.tmpfs(7 * MiB)
    box.disks[0].path.unlink()
    box.disks[0] = replace(box.disks[0], path=small / "a.qcow2")
    box.make_images()
    box.start()
    box.scramble("vda", 1, 0, 5 * MiB)
    box.backup()
    then = box.image()
    box.discard("vda", 0, 5 * MiB)
    filler = small / "filler"
    filler.write_bytes(bytes(5 * MiB))
    with pytest.raises(errors.RollbackUnfinished, match="no room left"):
        rolling.roll(box)
    assert box.command("query-status")["status"] == "prelaunch"
    filler.unlink()
    assert rolling.roll(box).finished
    is_back(box, then)


def test_an_interrupted_rollback_of_images_is_finished_with_a_machine_and_the_other_way_round(
    make_box: MakeBox,
) -> None:
    box, then = prepared(make_box)
    box.quit()
    interrupt(box, **rolling.off(box))
    box.start()
    assert box.cli("info", f"qmp:{box.qmp}").returncode == 11
    interrupt(box, "vda check")
    box.kill()
    assert rolling.roll(box, **rolling.off(box)).finished
    box.start()
    is_back(box, then)


# -- a way out -------------------------------------------------------------------------------


def test_a_rollback_can_be_given_up_when_no_qemu_has_the_disks(make_box: MakeBox) -> None:
    box, _ = prepared(make_box)
    interrupt(box)
    words = ["rollback", f"qmp:{box.qmp}", "-r", f"dir:{box.repository}", "--abandon", "--json"]
    done = box.cli(*words)
    assert (done.returncode, last_json(done.stdout)["code"]) == (1, "unsupported")
    box.kill()
    box.start()
    done = box.cli(*words)
    assert done.returncode == 0, done.stderr
    assert mismatches(last_json(done.stdout), documents.RESULTS["rollback"][2].fields) == []
    assert box.cli("info", f"qmp:{box.qmp}").returncode == 0
    assert list((box.directory / "state" / "rollbacks").glob("*")) == []


def test_a_journal_that_cannot_be_read_blocks_everything_and_says_why(make_box: MakeBox) -> None:
    box, _ = prepared(make_box)
    interrupt(box)
    [path] = (box.directory / "state" / "rollbacks").glob("*/journal.json")
    good = path.read_text()
    record = json.loads(good)
    for bad in (
        "",
        "[" * 100_000,
        json.dumps(record | {"phase": "done"}),
        json.dumps(record | {"job": "../../etc"}),
        json.dumps({name: value for name, value in record.items() if name != "point"}),
    ):
        path.write_text(bad)
        with pytest.raises(errors.JournalDamaged):
            box.backup()
    done = box.cli("info", f"qmp:{box.qmp}", "--json")
    assert (done.returncode, last_json(done.stdout)["code"]) == (13, "journal-damaged")
    path.write_text(good)
    assert rolling.roll(box).finished


def test_two_at_once_do_not_finish_the_same_rollback(make_box: MakeBox) -> None:
    box, then = prepared(make_box)
    interrupt(box)
    [journal] = rollbacks.every(box.directories.state)
    with rollbacks.living(box.directories.state, journal.job):
        box.kill()
        with pytest.raises(errors.BusyError):
            rolling.roll(box, **rolling.off(box))
        done = box.cli("checkpoint", "list", f"images:vda={box.disks[0].path}", "--name", "x", "--json")
        assert last_json(done.stdout)["code"] == "busy"
    rolling.roll(box, **rolling.off(box))
    box.start()
    is_back(box, then)


def test_ctrl_c_while_it_writes_leaves_it_pending(make_box: MakeBox) -> None:
    box, then = prepared(make_box)

    async def cancelled() -> None:
        task = asyncio.ensure_future(
            flow.rollback(
                rolling.request(box),
                Breaking("vdb write", lambda: task.get_loop().call_soon_threadsafe(task.cancel)),
            )
        )
        await task

    with pytest.raises(asyncio.CancelledError) as caught:
        asyncio.run(cancelled())
    assert any("half rolled back" in note for note in getattr(caught.value, "__notes__", []))
    assert phase(box) is Phase.WRITING
    assert rolling.roll(box).finished
    is_back(box, then)


# -- what belongs to it ----------------------------------------------------------------------


def test_the_journal_is_what_it_was(make_box: MakeBox) -> None:
    box, _ = prepared(make_box)
    interrupt(box)
    [journal] = rollbacks.every(box.directories.state)
    assert values.from_dict(json.loads(json.dumps(journal.to_dict()))) == journal
    assert [disk.target for disk in journal.disks] == ["vda", "vdb"]
    assert [disk.done for disk in journal.disks] == [True, False]
    entry = journal.disks[1]
    assert entry.files[0].path == str(box.disks[1].path)
    again = staging.again(entry, "x")
    assert again.bytes_of(again.wanted) == 2 * MiB
    Path(entry.wanted).write_bytes(b"\2" * 8)
    with pytest.raises(errors.JournalDamaged):
        staging.again(entry, "x")
