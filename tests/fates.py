"""More that happens to a machine of `historian`: jobs, backups, ends of QEMU, and deaths of ourselves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import perishing
from chronicle import GRANULE, Checkpoint, granules
from historian import SIZES, Historian, Job, View, content_of, differing, present
from pullback import errors, sync
from pullback.flows.jobs import Job as Begun
from pullback.model import urls
from pullback.model.backups import Fleecing, Level
from pullback.model.exports import NbdAddress
from pullback.model.points import Mode
from pullback.programs import qemu
from pullback.state.history import EndedJob
from pullback.units import KiB
from victim import eventually, running

_SECONDS = 40.0


class Fates(Historian):
    """See the module."""

    # -- jobs ----------------------------------------------------------------------------------

    def _since(self, rolls: Random, targets: list[str]) -> dict[str, Checkpoint]:
        found = {}
        for target in targets:
            there = self.past.on(target)
            if there and rolls.random() < 0.7:
                found[target] = rolls.choice(there)
        return found

    def _begun(
        self, kind: str, job: Begun, targets: list[str], checkpoint: str | None, since: dict[str, Checkpoint]
    ) -> Job:
        instant = self._new("j")
        held = self.past.freeze(instant, targets)
        bounds = {t: self.past.disks[t].between(c.at[t]) for t, c in since.items()}
        if checkpoint:
            self._made(checkpoint, targets, held)
        filtered = any("filter" in engine.split(":")[0] for engine in job.engines.values())
        # As they are now: a backup that follows deletes some, perhaps before we see that the job has ended.
        was = {target: replace(known, at=dict(known.at)) for target, known in since.items()}
        self.job = Job(kind, job.job, instant, checkpoint, was, bounds, filtered=filtered)
        return self.job

    def _wishes(self, rolls: Random, targets: list[str]) -> tuple[str | None, dict[str, Checkpoint]]:
        trackable = any(self.past.disks[target].lasting for target in targets)
        checkpoint = self._checkpoint_name(rolls) if trackable and rolls.random() < 0.6 else None
        return checkpoint, self._since(rolls, targets)

    def pull(self, rolls: Random) -> None:
        """One is begun; its exports are read from now on."""
        targets = self._some(rolls)
        checkpoint, since = self._wishes(rolls, targets)
        disks = [{"name": t, **({"incremental": since[t].name} if t in since else {})} for t in targets]
        how = self._how(rolls, (None, None, "classic", "filter"))
        with self.machine() as machine:
            try:
                job = machine.backup_begin(
                    {"mode": "pull", "disks": disks},
                    {"name": checkpoint} if checkpoint else None,
                    **how,  # type: ignore[arg-type]
                )
            except (errors.Unsupported, errors.DiskBusy) as error:
                self._excuse(error, how)
                return
            mine = self._begun("pull", job, targets, checkpoint, since)
            for served in job.exports:
                bounds = mine.bounds.get(served.target)
                contexts = {context: bounds for context, _ in served.contexts if bounds is not None}
                assert bool(served.contexts) is (bounds is not None)
                address = NbdAddress(socket=Path(str(served.address.socket)), export=served.name)
                self.views[served.name] = View(served.name, served.target, address, mine.instant, contexts)
            self.look(machine, rolls)

    def push(self, rolls: Random) -> None:
        """One is begun, fast or slowly; it is ended by another step, or by its keeper."""
        targets = self._some(rolls)
        checkpoint, since = self._wishes(rolls, targets)
        place = self.box.directory / "pushed"
        place.mkdir(exist_ok=True)
        files: dict[str, tuple[Path, str]] = {}
        disks = []
        for target in targets:
            path, format = place / self._new(f"{target}-"), rolls.choice(("qcow2", "qcow2", "raw"))
            files[target] = (path, format)
            disk: dict[str, object] = {"name": target, "type": "file", "driver": format, "target": {"file": str(path)}}
            disks.append({**disk, **({"incremental": since[target].name} if target in since else {})})
        how = self._how(rolls, (None, None, "classic", "filter"))
        speed = rolls.choice((None, 4 * KiB))
        with self.machine() as machine:
            document = {"mode": "push", "disks": disks}
            try:
                job = machine.backup_begin(document, {"name": checkpoint} if checkpoint else None, speed=speed, **how)  # type: ignore[arg-type]
            except (errors.Unsupported, errors.DiskBusy) as error:
                self._excuse(error, how)
                assert list(place.glob("*.part*")) == []
                return
            self._begun("push", job, targets, checkpoint, since).files = files
            self.look(machine, rolls)

    def settle(self) -> None:
        """A push may have been ended by its keeper meanwhile."""
        job = self.job
        if job is not None and job.kind == "push" and self.running and not self._record(job).exists():
            self._keeper_ended(job)

    def _record(self, job: Job) -> Path:
        return self.box.directories.state / "jobs" / f"{job.id}.json"

    def _keeper_ended(self, job: Job) -> None:
        eventually(lambda: self._last(job) is not None, seconds=5, what="the record of a job's end")
        self._ended_well(job, self._last(job))
        self.mix["check: push ended by its keeper"] += 1

    def _last(self, job: Job) -> EndedJob | None:
        from pullback.state import history

        found = history.load(self.box.directories.state, self.box.name)
        return found if found is not None and found.job == job.id else None

    def finish_job(self, rolls: Random) -> None:
        """It is ended, aborted, or (a push) left to its keeper."""
        job = self.job
        assert job is not None
        way = rolls.choice(
            ("end", "end", "abort", "leave") if job.kind == "push" and self.running else ("end", "abort")
        )
        with self.machine() as machine:
            try:
                if way == "abort":
                    ended = machine.backup_abort()
                    assert not ended.success
                    self._aborted(job)
                elif job.kind == "pull":
                    self._ended_well(job, machine.backup_end())
                elif way == "end":
                    machine.backup_set_speed(None)
                    self._ended_well(job, machine.backup_wait(timeout=_SECONDS))
                else:
                    machine.backup_set_speed(None)
            except errors.NoJob:
                assert job.kind == "push"
                self._keeper_ended(job)
            if self.job is None:
                self.look(machine, rolls)
        if self.job is not None:
            eventually(lambda: not self._record(job).exists(), seconds=20, what="a push that is left to its keeper")
            self._keeper_ended(job)

    def _aborted(self, job: Job) -> None:
        self._no_files(job)
        if job.checkpoint in self.past.checkpoints and self._is_its(job):
            self.past.delete(str(job.checkpoint))
        self._instant_gone(job.instant)
        self.job = None

    def _is_its(self, job: Job) -> bool:
        """Or is it a later one of the same name?"""
        instant, found = self.past.instants[job.instant], self.past.checkpoints[str(job.checkpoint)]
        return all(known.get(found.name) != found.number for known in instant.older.values()) and all(
            found.at[target] == instant.at.get(target) for target in found.at
        )

    def _ended_well(self, job: Job, ended: EndedJob | None) -> None:
        assert ended is not None
        assert ended.success, ended
        for target, (path, format) in job.files.items():
            self._pushed(job, target, path, format)
        self._instant_gone(job.instant)
        self.job = None

    def _pushed(self, job: Job, target: str, path: Path, format: str) -> None:
        """What was pushed, laid over the content at its checkpoint, is the content at the instant."""
        wanted = self.past.instants[job.instant].content[target]
        got = content_of(path, format, self.box.directory / "pushed-raw")
        self.mix[f"check: pushed {format} {'increment' if target in job.since else 'whole'}"] += 1
        since = job.since.get(target)
        if since is None:
            assert not differing(got, wanted), (target, differing(got, wanted))
            return
        assert len(got) == len(wanted)
        bounds = job.bounds[target]
        for granule in bounds.must:
            part = slice(granule * GRANULE, (granule + 1) * GRANULE)
            assert got[part] == wanted[part], (target, since.name, granule)
        if format == "qcow2":
            base = bytearray(self._bases[since.number][target].ljust(len(wanted), b"\0")[: len(wanted)])
            told: set[int] = set()
            for start, end in present(path):
                base[start:end] = got[start:end]
                told |= granules(start, end)
            assert bounds.complaint(frozenset(told)) is None, (target, since.name, bounds.complaint(frozenset(told)))
            if not self.past.disks[target].resized(since.at[target], self.past.instants[job.instant].at[target]):
                assert not differing(bytes(base), wanted), (target, since.name, differing(bytes(base), wanted))

    # -- backups -------------------------------------------------------------------------------

    def backup(self, rolls: Random) -> None:
        """A restore point of all disks or some, restored and compared."""
        if not self.running:
            self.let_go()
        targets = rolls.choice((list(SIZES), list(SIZES), rolls.sample(list(SIZES), 2)))
        full = rolls.random() < 0.15
        changes = self._request(rolls, targets)
        if full:
            changes["level"] = Level.FULL
        try:
            report = self.box.backup(**changes)
            self.last_backup = int(time.time())
        except errors.BusyError:
            assert self.job is not None
            self._refused("a backup beside a job")
            return
        except errors.Unsupported:
            assert changes.get("fleecing") is Fleecing.FILTER
            assert self.snapshots
            self._refused("a filter above a snapshot")
            return
        whole = {target for target in targets if full or self._whole(target)}
        modes = {disk.target: disk.mode for disk in report.point.disks}
        reasons = {disk.target: disk.reason for disk in report.point.disks}
        assert modes == {t: Mode.FULL if t in whole else Mode.INCREMENTAL for t in targets}, (modes, reasons)
        self._pointed(report.point.id, str(report.point.checkpoint), targets)

    def _request(self, rolls: Random, targets: list[str]) -> dict[str, Any]:
        """What a backup is asked for, of the machine as it is now."""
        images = tuple(urls.Image(target=disk.id, path=disk.path, format=disk.format) for disk in self.box.disks)
        machine = urls.QmpMachine(socket=self.box.qmp) if self.running else urls.ImagesMachine(images=images)
        changes: dict[str, Any] = {"machine": machine, "name": self.box.name, "only": tuple(sorted(targets))}
        if self.running:
            changes["fleecing"] = rolls.choice((None, Fleecing.FILTER, Fleecing.CLASSIC))
        while int(time.time()) == self.last_backup:  # two of one second, of other disks, would be one name here
            time.sleep(0.05)
        return changes

    def _whole(self, target: str) -> bool:
        number, size = self.parents.get(target, (None, 0))
        alive = any(known.number == number for known in self.past.on(target)) and self.rests[target] in self.points
        return not alive or size != self.past.disks[target].size

    def _pointed(self, point: str, checkpoint: str, targets: list[str]) -> None:
        for target in targets:
            for known in self.past.on(target):
                if known.name.startswith("auto."):
                    self.past.delete(known.name, [target])
        tracked = [target for target in targets if self.running or self.past.disks[target].lasting]
        if tracked:
            self._made(checkpoint, tracked, documented=False)
        for target in targets:
            number = self.past.checkpoints[checkpoint].number if target in tracked else None
            self.parents[target] = (number, self.past.disks[target].size)
            self.rests[target] = point
        self.points[point] = {target: bytes(self.past.disks[target].content) for target in targets}
        self._restored(point)

    def _restored(self, point: str) -> None:
        got = self.box.restored(point)
        for target, wanted in self.points[point].items():
            assert not differing(got[target], wanted), (point, target, differing(got[target], wanted))
        assert set(got) == set(self.points[point])
        self.mix["check: point restored"] += 1

    def old_point(self, rolls: Random) -> None:
        """An older point is still what it was."""
        self._restored(rolls.choice(list(self.points)))

    # -- the end of QEMU -----------------------------------------------------------------------

    def power(self, rolls: Random) -> None:
        """Off, on, or off and on again."""
        if self.running:
            self._quit()
            if rolls.random() < 0.5:
                self._start()
        else:
            self.let_go()
            self._start()
        with self.machine() as machine:
            self.look(machine, rolls)

    def _quit(self) -> None:
        self.box.quit()
        self.running = False
        self._ended_by_qemu()
        self.compare_images()

    def _start(self) -> None:
        self.let_go()
        self.box.start()
        self.running = True

    def _ended_by_qemu(self) -> None:
        """Snapshots and jobs end with it; what they left on disk is removed by their keepers, or who comes next."""
        job = self.job
        unwatched = any(view.instant is None for view in self.views.values())
        self._all_gone()
        self._untracked()
        if unwatched:  # exports of disks themselves hold nothing that needs a keeper
            with self.machine() as machine:
                machine.disks()
            self.let_go()
        eventually(lambda: self._left() == [], seconds=20, what=f"files removed after the end of QEMU ({self._left()})")
        if job is not None:
            self._no_files(job)

    def _left(self) -> list[Path]:
        place = self.box.directories.state
        return [path for folder in ("jobs", "scratch", "run") for path in (place / folder).glob("*")]

    def _untracked(self) -> None:
        """What backups track of a raw disk is in QEMU's memory only."""
        for disk in self.past.disks.values():
            if not disk.lasting:
                for known in self.past.on(disk.target):
                    self.past.delete(known.name, [disk.target])

    def reconnect(self, rolls: Random) -> None:
        """Those who work on stopped images go, and others come."""
        self.let_go()
        with self.machine() as machine:
            self.look(machine, rolls)

    def kill(self, rolls: Random) -> None:
        """SIGKILL to QEMU: every checkpoint is worthless, and said to be."""
        for disk in self.box.disks:
            qemu.hmp(self.box.hmp, f'qemu-io {disk.node_name} "flush"')
        self.box.kill()
        self.running = False
        self._ended_by_qemu()
        if rolls.random() < 0.6:
            self._start()
        self.compare_wrecks(rolls)

    def compare_wrecks(self, rolls: Random) -> None:
        """After an unclean end. No answer but an error; then the wrecks go."""
        with self.machine() as machine:
            names = self._worthless(machine, rolls)
        if rolls.random() < 0.5:
            for name in rolls.sample(names, len(names)):
                self._delete_wreck(name, rolls)
            self.past.checkpoints.clear()
        else:
            self._backup_over_wrecks(rolls)
        with self.machine() as machine:
            self.look(machine, rolls)

    def _worthless(self, machine: sync.Machine, rolls: Random) -> list[str]:
        found = machine.checkpoint_list(sizes=True)
        for item in found.checkpoints:
            assert item.problem is not None, item
            for target in SIZES:
                part = item.disk(target)
                assert part is None or (part.problem is not None and part.dirty is None)
                try:
                    machine.changes(target, since=item.name)
                except errors.CheckpointInconsistent:
                    self.mix["check: a wreck tells nothing"] += 1
                else:
                    raise AssertionError(f"changes since {item.name}, which is worthless")
        broken = {part.target for item in found.checkpoints for part in item.disks}
        if broken:
            wish = rolls.choice(sorted(broken))
            for call in (
                lambda: machine.checkpoint_create({"name": "never", "disks": [{"name": wish}]}),
                lambda: machine.snapshot_create({"disks": [{"name": wish}]}, {"name": "never"}),
                lambda: machine.backup_begin({"mode": "pull", "disks": [{"name": wish}]}, {"name": "never"}),
            ):
                try:
                    call()
                except errors.CheckpointInconsistent:
                    self._refused("a checkpoint behind wrecks")
                else:
                    raise AssertionError("a checkpoint was made behind wrecks")
        return [item.name for item in found.checkpoints]

    def _delete_wreck(self, name: str, rolls: Random) -> None:
        with self.machine() as machine:
            try:
                machine.checkpoint_delete(name, children=rolls.random() < 0.2)
            except errors.NoCheckpoint:
                self.mix["refused: deleted with its parent"] += 1
            assert name not in {item.name for item in machine.checkpoint_list().checkpoints}

    def _backup_over_wrecks(self, rolls: Random) -> None:
        """The next backup reads whole what lost its checkpoints; documents stay until they are deleted."""
        self.past.checkpoints.clear()
        self.backup(rolls)
        with self.machine() as machine:
            for item in machine.checkpoint_list().checkpoints:
                if item.name not in self.past.checkpoints:
                    assert item.problem is not None, item
                    machine.checkpoint_delete(item.name)

    # -- our own death -------------------------------------------------------------------------

    def die(self, rolls: Random) -> None:
        """A call is killed after some command of its own; what it was about is there, or is not."""
        calls: list[tuple[str, list[Any], dict[str, Any]]] = [
            ("checkpoint_create", [{"name": self._checkpoint_name(rolls)}], {})
        ]
        name = self._new("x")
        calls.append(("snapshot_create", [{"name": name, "disks": [{"name": "vda"}, {"name": "vdb"}]}, {}], {}))
        if self.past.checkpoints:
            calls.append(("checkpoint_delete", [rolls.choice(list(self.past.checkpoints))], {}))
        if self.job is None:
            calls.append(("backup_begin", [{"mode": "pull"}, {"name": name}], {}))
        call, words, options = rolls.choice(calls)
        if not self.running:
            self.let_go()
        before = set(self.past.checkpoints)
        argv = [rolls.randrange(1, 70), self.uri, self.box.name, self.box.directories.state, call]
        done = subprocess.run(
            [sys.executable, perishing.__file__, *map(str, argv), json.dumps(words), json.dumps(options)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        died = done.returncode == -signal.SIGKILL
        excused = self.job is not None and self.job.filtered and call == "snapshot_create"
        assert died or done.returncode == 0 or excused, done.stderr
        self.mix[f"killed: {call}" if died else f"not killed in time: {call}"] += 1
        if self.running:
            eventually(lambda: running(self.box), seconds=4, what="running again")
        with self._patiently() as machine:
            wrecked = self._adopt(machine, before)
        if wrecked:
            if self.running or self._off is not None:
                self.let_go()
            self.mix["killed: bitmaps lost while they were written"] += 1
            self._wrecked(rolls)

    @contextmanager
    def _patiently(self) -> Iterator[sync.Machine]:
        """The guard of the dead, or its storage daemon, may still be at work."""
        deadline = time.monotonic() + 15
        while True:
            try:
                with self.machine() as machine:
                    machine.disks()
                    break
            except (errors.BusyError, errors.MonitorBusy):
                assert time.monotonic() < deadline, "busy for ever after a death"
                time.sleep(0.1)
        with self.machine() as machine:
            yield machine

    def _adopt(self, machine: sync.Machine, before: set[str]) -> bool:
        """What is there now. Nothing was written meanwhile, so what is there is of this moment."""
        if self.job is None:
            try:
                machine.backup_abort()
            except errors.NoJob:
                pass
            else:
                self.mix["killed: job found and aborted"] += 1
        for snapshot in machine.snapshot_list():
            if snapshot.name not in self.snapshots:
                machine.snapshot_delete(snapshot.name)
                self.mix["killed: snapshot found and deleted"] += 1
        found = machine.checkpoint_list()
        names = {item.name for item in found.checkpoints}
        for item in found.checkpoints:
            if item.name not in before and item.disks and item.problem is None:
                self._made(item.name, [disk.target for disk in item.disks])
        for name in before - names:
            self._forget(name)
        return any(item.problem is not None for item in found.checkpoints)

    def _wrecked(self, rolls: Random) -> None:
        """A death in the milliseconds in which stopped images were written: on those disks all is worthless."""
        assert not self.running
        with self.machine() as machine:
            found = machine.checkpoint_list()
            for item in found.checkpoints:
                for part in item.disks:
                    if part.problem is not None and item.name in self.past.checkpoints:
                        self.past.checkpoints[item.name].at.pop(part.target, None)
            for item in found.checkpoints:
                if item.problem is not None:
                    machine.checkpoint_delete(item.name)
                    if item.name in self.past.checkpoints:
                        self._forget(item.name)
            self.look(machine, rolls)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """All is let go of; nothing is left, and the images are sound."""
        if self.running:
            with self.machine() as machine:
                if self.job is not None:
                    self._abort_last(machine)
                for name in list(self.snapshots):
                    machine.snapshot_delete(name)
                machine.export_stop()
            assert self.box.leftovers() == []
            self._quit()
        else:
            self.let_go()
            self.compare_images()
        for disk in self.box.disks:
            self.box.model[disk.id] = self.past.disks[disk.id].content

    def _abort_last(self, machine: sync.Machine) -> None:
        job = self.job
        assert job is not None
        try:
            machine.backup_abort()
            self._aborted(job)
        except errors.NoJob:
            self._keeper_ended(job)
