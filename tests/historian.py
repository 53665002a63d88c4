"""A machine to which anything happens, running and off, and a chronicle of what it must be like. See `chronicle`.

Each step does one thing in the machine and in the chronicle, or is refused where it must be. `Historian.look`
compares all that can be seen: what is exported, what is told of changes, which checkpoints are there.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from chronicle import GRANULE, Bounds, Checkpoint, Chronicle, Disk, Granules, Instant, granules
from kit import Box, MakeBox
from pullback import errors, state, sync
from pullback.extents import Extent
from pullback.model.exports import NbdAddress, Served
from pullback.model.tree import Tree
from pullback.programs import qemu, qemu_img
from pullback.transfer import NbdEndpoint
from pullback.units import KiB, MiB
from storm import Operation, random_operation

#: An odd size, and a last granule that is not whole.
SIZES = {"vda": 2 * MiB + 5 * 512, "vdb": 2 * MiB + 64 * KiB, "vdc": MiB + 512}
_BACKING = MiB + 32 * KiB
_QCOW2 = [target for target in SIZES if target != "vdc"]


@dataclass(frozen=True, slots=True)
class View:
    """An export that is open, and what it must show."""

    name: str
    target: str
    address: NbdAddress
    #: None: the disk itself.
    instant: str | None
    contexts: Mapping[str, Bounds]


@dataclass(slots=True)
class Job:
    """A pull or a push under way."""

    kind: str
    id: str
    #: Its instant's name in the chronicle.
    instant: str
    checkpoint: str | None
    #: By target: the checkpoint since which it copies what changed.
    since: dict[str, Checkpoint]
    bounds: dict[str, Bounds]
    #: Of a push: file and format.
    files: dict[str, tuple[Path, str]] = field(default_factory=dict)
    filtered: bool = False


def run(*words: object) -> str:
    """A program's output."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def content_of(path: Path, format: str, to: Path) -> bytes:
    """What an image holds."""
    run("qemu-img", "convert", "-U", "-f", format, "-O", "raw", path, to)
    return to.read_bytes()


def present(path: Path) -> list[tuple[int, int]]:
    """The ranges that a qcow2 has itself."""
    rows = json.loads(run("qemu-img", "map", "-U", "--output=json", "-f", "qcow2", path))
    return [(row["start"], row["start"] + row["length"]) for row in rows if row["present"]]


def differing(left: bytes, right: bytes) -> str:
    """Where two contents differ, in words; empty if they do not."""
    if left == right:
        return ""
    if len(left) != len(right):
        return f"{len(left)} bytes instead of {len(right)}"
    return f"granules {[n for n in granules(0, len(left)) if _part(left, n) != _part(right, n)]} differ"


def _part(content: bytes, granule: int) -> bytes:
    return content[granule * GRANULE : (granule + 1) * GRANULE]


class Historian:
    """See the module. Each public method that takes `rolls` is a step."""

    def __init__(self, make_box: MakeBox, mix: Counter[str], kind: str = "dir") -> None:
        """`kind`: of the repository that backups go to."""
        self.make_box = make_box
        disks = [
            qemu.Disk(id=target, path=Path(f"{target}.img"), format="qcow2" if target in _QCOW2 else "raw")
            for target in SIZES
        ]
        self.box: Box = make_box(*disks, start=False, kind=kind)
        self._make_images()
        self.box.start()
        self.running = True
        self.mix = mix
        self.views: dict[str, View] = {}
        self.snapshots: dict[str, dict[str, int]] = {}
        self.job: Job | None = None
        self.points: dict[str, dict[str, bytes]] = {}
        #: By target: number of the checkpoint that the repository's last point rests on (None: it had none), its size.
        self.parents: dict[str, tuple[int | None, int]] = {}
        #: By target: the point that it is on.
        self.rests: dict[str, str] = {}
        self.texts: dict[str, object] = {}
        self._bases: dict[int, dict[str, bytes]] = {}
        self._names = 0
        #: The second of the last backup, of which its checkpoint has its name.
        self.last_backup = 0
        self._retired: list[str] = []
        self._off: ExitStack | None = None
        self._lent: sync.Machine | None = None
        self._reads = Random(0)

    def _make_images(self) -> None:
        base = self.box.directory / "base.qcow2"
        qemu_img.create(base, _BACKING)
        run("qemu-io", "-f", "qcow2", "-c", f"write -q -P 201 0 {_BACKING}", base)
        model = {}
        for disk in self.box.disks:
            disk.path.unlink()
            backing = base.name if disk.id == "vdb" else None
            qemu_img.create(disk.path, SIZES[disk.id], format=disk.format, backing=backing)
            content = bytearray(SIZES[disk.id])
            if backing:
                content[:_BACKING] = bytes([201]) * _BACKING
            model[disk.id] = Disk(disk.id, disk.format, content)
        self.past = Chronicle(model)

    # -- the machine by the library ------------------------------------------------------------

    @property
    def uri(self) -> str:
        """It, as it is now."""
        if self.running:
            return f"qmp:{self.box.qmp}"
        return "images:" + ",".join(f"{disk.id}={disk.format}:{disk.path}" for disk in self.box.disks)

    def _connect(self) -> ExitStack:
        stack = ExitStack()
        found = sync.connect(self.uri, name=self.box.name, state_dir=self.box.directories.state)
        self._lent = stack.enter_context(found)
        return stack

    @contextmanager
    def machine(self) -> Iterator[sync.Machine]:
        """Of a running machine a new connection each time; of one that is off the same until `let_go`."""
        if self.running:
            with sync.connect(self.uri, name=self.box.name, state_dir=self.box.directories.state) as found:
                yield found
            return
        if self._off is None:
            self._off = self._connect()
        assert self._lent is not None
        yield self._lent

    def let_go(self, rolls: Random | None = None) -> None:
        """End the connection to stopped images, and with it all that lasts only as long."""
        if self._off is not None:
            self._off.close()
            self._off = self._lent = None
            job = self.job
            self._all_gone()
            if job is not None and job.kind == "push":  # QEMU's own copying ended with the daemon: undone
                self._no_files(job)
                if job.checkpoint in self.past.checkpoints:
                    self.past.delete(str(job.checkpoint))

    def _all_gone(self) -> None:
        """QEMU, or the daemon, has ended."""
        self.views.clear()
        self.snapshots.clear()
        self.past.instants.clear()
        self.job = None

    def _new(self, kind: str) -> str:
        self._names += 1
        return f"{kind}{self._names}"

    def _checkpoint_name(self, rolls: Random) -> str:
        """A new name, or one that was used before."""
        free = [name for name in self._retired if name not in self.past.checkpoints]
        return rolls.choice(free) if free and rolls.random() < 0.4 else self._new("c")

    def _some(self, rolls: Random) -> list[str]:
        """Some of the disks, in any order."""
        return rolls.sample(list(SIZES), rolls.choice((1, 2, 3, 3)))

    def _refused(self, why: str) -> None:
        self.mix[f"refused: {why}"] += 1

    # -- writes --------------------------------------------------------------------------------

    def write(self, rolls: Random) -> None:
        """Some writes, zeroes and discards; to stopped images through an export for writing."""
        if not self.running:
            self._write_off(rolls)
            return
        for _ in range(rolls.randrange(1, 8)):
            disk = self.past.disks[rolls.choice(list(SIZES))]
            operation = random_operation(rolls, disk.target, disk.size)
            self.box._io(disk.target, operation.command())
            if operation.kind == "discard" and any(disk.target in held.at for held in self.past.instants.values()):
                self._zero_too(disk, operation)
            disk.apply(operation)
            self.mix[f"change: {operation.kind}"] += 1

    def _zero_too(self, disk: Disk, operation: Operation) -> None:
        """Under a classic snapshot QEMU drops discards (7.2: its filter is opened without "unmap"). It may."""
        start, end = disk.effective(operation)
        if start < end:
            self.box._io(disk.target, f"write -q -z -u {start} {end - start}")

    def _write_off(self, rolls: Random) -> None:
        target = rolls.choice(list(SIZES))
        disk = self.past.disks[target]
        document = {"disks": [{"name": target, "readonly": False, "exportname": self._new("w")}]}
        with self.machine() as machine:
            shown = any(target in self.past.instants[name].at for name in self.past.instants)
            if shown:
                try:
                    machine.export_start(document)
                except errors.DiskBusy:
                    self._refused("writing to what a snapshot shows")
                    return
                raise AssertionError("a disk that a snapshot of stopped images shows was given for writing")
            [served] = machine.export_start(document)
            with NbdEndpoint(_address(served), writable=True) as endpoint, endpoint.channel() as channel:
                for _ in range(rolls.randrange(1, 6)):
                    operation = random_operation(rolls, target, disk.size, ("write", "zero"))
                    if operation.kind == "zero":
                        channel.zero(operation.start, operation.length)
                    else:
                        data = bytearray([operation.value]) * operation.length
                        channel.write(operation.start, data, 0, operation.length)
                    disk.apply(operation)
                    self.mix[f"change: {operation.kind} off-line"] += 1
                channel.flush()
            machine.export_stop([served.name])

    def resize(self, rolls: Random) -> None:
        """A disk grows, or loses its end (at a granule: within a cluster qcow2 would bring old data back)."""
        disk = self.past.disks[rolls.choice(list(SIZES))]
        node = next(known for known in self.box.disks if known.id == disk.target).node_name
        for _ in range(rolls.randrange(1, 3)):
            if rolls.random() < 0.5:
                size = min(disk.size + rolls.randrange(1, 1024) * 512, 3 * MiB)
            else:
                size = rolls.randrange(2, disk.size // GRANULE + 1) * GRANULE
            self.box.command("block_resize", {"node-name": node, "size": size})
            disk.resize(size)

    # -- checkpoints ---------------------------------------------------------------------------

    def _made(self, name: str, targets: list[str], at: Instant | None = None, *, documented: bool = True) -> None:
        """A checkpoint; a user's is of those of the disks that keep it."""
        kept = [target for target in targets if not documented or self.past.disks[target].lasting]
        self.past.checkpoint(name, kept, at.at if at else None, documented=documented)
        number = self.past.checkpoints[name].number
        contents = at.content if at else {t: bytes(self.past.disks[t].content) for t in targets}
        self._bases[number] = dict(contents)

    def checkpoint(self, rolls: Random) -> None:
        """One alone."""
        name, targets = self._checkpoint_name(rolls), rolls.sample(_QCOW2, rolls.choice((1, 2, 2)))
        with self.machine() as machine:
            machine.checkpoint_create({"name": name, "disks": [{"name": target} for target in targets]})
            self._made(name, targets)
            self.look(machine, rolls)

    def delete_checkpoint(self, rolls: Random) -> None:
        """One, with those behind it, or those alone."""
        name = rolls.choice(list(self.past.checkpoints))
        how = rolls.choice(({}, {}, {}, {"children": True}, {"children_only": True}))
        with self.machine() as machine:
            gone = machine.checkpoint_delete(name, **how).checkpoints
            behind = {other for other in gone if other != name}
            number = self.past.checkpoints[name].number
            assert (name in gone) is ("children_only" not in how)
            assert how or not behind
            assert all(self.past.checkpoints[other].number > number for other in behind), (name, gone)
            assert not how or self.past.later(name) <= behind, (name, gone)
            for other in gone:
                self._forget(other)
            self.look(machine, rolls)

    def _forget(self, name: str) -> None:
        self.past.delete(name)
        self.texts.pop(name, None)
        if not name.startswith("auto."):
            self._retired.append(name)

    def redefine(self, rolls: Random) -> None:
        """Its document goes, and comes back."""
        known = [c.name for c in self.past.checkpoints.values() if c.documented and c.at]
        with self.machine() as machine:
            if not known:
                return
            name = rolls.choice(known)
            text = machine.checkpoint_info(name, sizes=rolls.random() < 0.5).document
            machine.checkpoint_delete(name, metadata_only=True)
            self.look(machine, rolls)
            machine.checkpoint_redefine(text)
            again = machine.checkpoint_info(name)
            assert again.checkpoint.saved is not None
            assert again.checkpoint.problem is None
            self.look(machine, rolls)

    # -- snapshots and exports -----------------------------------------------------------------

    def _how(self, rolls: Random, choices: tuple[str | None, ...]) -> dict[str, object]:
        from pullback import How
        from pullback.model.backups import Fleecing

        wish = rolls.choice(choices) if self.running else None
        return {"how": How(fleecing=Fleecing(wish))} if wish else {}

    def snapshot(self, rolls: Random) -> None:
        """One, with or without a checkpoint."""
        name, targets = self._new("s"), self._some(rolls)
        trackable = any(target in _QCOW2 for target in targets)
        checkpoint = self._checkpoint_name(rolls) if trackable and rolls.random() < 0.5 else None
        document = {"name": name, "disks": [{"name": target} for target in targets]}
        how = self._how(rolls, (None, None, "classic", "filter"))
        with self.machine() as machine:
            try:
                made = machine.snapshot_create(document, {"name": checkpoint} if checkpoint else None, **how)  # type: ignore[arg-type]
            except (errors.Unsupported, errors.DiskBusy) as error:
                self._excuse(error, how)
            else:
                assert {disk.target for disk in made.disks} == set(targets)
                instant = self.past.freeze(name, targets)
                self.snapshots[name] = {}
                if checkpoint:
                    self._made(checkpoint, targets, instant)
            self.look(machine, rolls)

    def _excuse(self, error: errors.PullbackError, how: Mapping[str, object]) -> None:
        """A filter that was asked for may be refused; and one that is there lets no second snapshot be."""
        filtered = self.job is not None and self.job.filtered
        assert how or (filtered and isinstance(error, errors.DiskBusy)), error
        self._refused(type(error).__name__)

    def export(self, rolls: Random) -> None:
        """A disk of a snapshot, with what changed since none, one, or all checkpoints."""
        snapshot = rolls.choice(list(self.snapshots))
        instant = self.past.instants[snapshot]
        target = rolls.choice(list(instant.at))
        shown = self.past.shown(instant, target)
        name = self._new("e")
        document: dict[str, object] = {"name": target, "snapshot": snapshot, "exportname": name}
        wish, chosen = rolls.choice(("none", "one", "all")), []
        if wish == "all":
            document["allcheckpoints"], chosen = True, shown
        elif wish == "one" and shown:
            chosen = [rolls.choice(shown)]
            document["checkpoint"] = chosen[0].name
        with self.machine() as machine:
            self._refuse_younger(machine, rolls, snapshot, target)
            try:
                [served] = machine.export_start({"disks": [document]})
            except errors.BusyError:
                if not self._told_already(snapshot, target, {known.name for known in chosen}):
                    raise
                self._refused("changes since a checkpoint told twice")
                return
            contexts = {f"qemu:dirty-bitmap:{c.name}": self.past.told(instant, target, c) for c in chosen}
            assert {context for context, _ in served.contexts} == set(contexts), (snapshot, target)
            self.views[name] = View(name, target, _address(served), snapshot, contexts)
            self.look(machine, rolls)

    def _told_already(self, snapshot: str, target: str, names: set[str]) -> bool:
        """QEMU exports a bitmap once; and those of all snapshots of stopped images stand on the disk's own node."""
        for view in self.views.values():
            told = {context.removeprefix("qemu:dirty-bitmap:") for context in view.contexts}
            if view.target == target and told & names and (view.instant == snapshot or not self.running):
                return True
        return False

    def _refuse_younger(self, machine: sync.Machine, rolls: Random, snapshot: str, target: str) -> None:
        """A checkpoint that is younger than the snapshot tells nothing about it."""
        shown = self.past.shown(self.past.instants[snapshot], target)
        younger = [known for known in self.past.on(target) if known not in shown]
        if younger and rolls.random() < 0.5:
            wish = {"name": target, "snapshot": snapshot, "checkpoint": rolls.choice(younger).name, "exportname": "x"}
            try:
                machine.export_start({"disks": [wish]})
            except errors.CheckpointInconsistent:
                self._refused("a checkpoint younger than the snapshot")
            else:
                raise AssertionError(f"changes since {wish['checkpoint']}, made after the snapshot {snapshot}")

    def export_disk(self, rolls: Random) -> None:
        """A disk itself, for reading."""
        name, target = self._new("d"), rolls.choice(list(SIZES))
        with self.machine() as machine:
            try:
                [served] = machine.export_start({"disks": [{"name": target, "exportname": name}]})
            except errors.PullbackError as error:
                self._excuse(error, {})
                return
            self.views[name] = View(name, target, _address(served), None, {})

    @property
    def stoppable(self) -> list[str]:
        """The exports that belong to no job."""
        return [name for name, view in self.views.items() if self.job is None or view.instant != self.job.instant]

    def stop_exports(self, rolls: Random) -> None:
        """Some, or all that belong to no job."""
        mine = self.stoppable
        names = rolls.sample(mine, rolls.randrange(0, len(mine) + 1))
        with self.machine() as machine:
            gone = {served.name for served in machine.export_stop(names)}
            assert gone == set(names or mine)
            for name in gone:
                del self.views[name]
            self.look(machine, rolls)

    def delete_snapshot(self, rolls: Random) -> None:
        """Any of them, with its exports."""
        name = rolls.choice(list(self.snapshots))
        with self.machine() as machine:
            machine.snapshot_delete(name)
            self._instant_gone(name)
            del self.snapshots[name]
            self.look(machine, rolls)

    def _instant_gone(self, name: str) -> None:
        del self.past.instants[name]
        for view in [view for view in self.views.values() if view.instant == name]:
            del self.views[view.name]

    # -- what must be --------------------------------------------------------------------------

    def look(self, machine: sync.Machine, rolls: Random) -> None:
        """The checkpoints are those that must be, and what changed since them is told right."""
        sizes = rolls.random() < 0.5
        found = machine.checkpoint_list(sizes=sizes)
        assert {item.name for item in found.checkpoints} == set(self.past.checkpoints)
        assert found.notes == ()
        for item in found.checkpoints:
            mine = self.past.checkpoints[item.name]
            assert {disk.target for disk in item.disks if disk.problem is None} == set(mine.at), (item.name, item)
            if sizes:
                self._sizes(found, mine)
        if not sizes and self.past.checkpoints:
            self._changes(machine, rolls)

    def _sizes(self, found: Tree, mine: Checkpoint) -> None:
        for target, at in mine.at.items():
            part = found.require(mine.name).disk(target)
            assert part is not None
            assert part.dirty is not None
            bounds = self.past.disks[target].between(at)
            dirty = -(-part.dirty // GRANULE)  # QEMU counts the last one whole; nobody is told more than the disk has
            assert len(bounds.must) <= dirty <= len(bounds.may), (mine.name, target, dirty, bounds)
            self.mix["check: size of changes"] += 1

    def _changes(self, machine: sync.Machine, rolls: Random) -> None:
        target = rolls.choice(list(SIZES))
        there = self.past.on(target)
        if not there:
            return
        first = rolls.randrange(len(there))
        last = rolls.randrange(first, len(there) + 1)
        until = there[last] if last < len(there) else None
        told = machine.changes(target, since=there[first].name, until=until.name if until else None)
        disk = self.past.disks[target]
        assert told.size == disk.size
        bounds = disk.between(there[first].at[target], until.at[target] if until else None)
        complaint = bounds.complaint(_granules(told.extents))
        assert complaint is None, (target, there[first].name, until and until.name, complaint)
        self.mix["check: changes"] += 1

    def read_views(self) -> None:
        """Every open export shows its instant, and tells its changes."""
        for view in self.views.values():
            disk = self.past.disks[view.target]
            wanted = (
                bytes(disk.content) if view.instant is None else self.past.instants[view.instant].content[view.target]
            )
            got = self._read(view)
            assert not differing(got, wanted), (view.name, view.instant, view.target, differing(got, wanted))
            self.mix["check: export read"] += 1
            with NbdEndpoint(view.address, contexts=list(view.contexts)) as endpoint:
                for context, bounds in view.contexts.items():
                    complaint = bounds.complaint(_granules(endpoint.dirty(context, Extent(0, endpoint.size))))
                    assert complaint is None, (view.name, view.instant, view.target, context, complaint)
                    self.mix["check: dirty context"] += 1

    def _read(self, view: View) -> bytes:
        """In turns by requests of one size, of random ones, whole, and by other programs."""
        way = self._reads.choice(("whole", "cuts", "cuts", "sectors", "nbdcopy", "convert"))
        out = self.box.directory / "read"
        if way in ("nbdcopy", "convert"):
            out.unlink(missing_ok=True)
            words = ("nbdcopy",) if way == "nbdcopy" else ("qemu-img", "convert", "-f", "raw", "-O", "raw")
            run(*words, view.address.uri, out)
            return out.read_bytes()
        with NbdEndpoint(view.address) as endpoint, endpoint.channel() as channel:
            data, at = bytearray(endpoint.size), 0
            with memoryview(data) as whole:
                while at < len(data):
                    length = min(self._length(way, len(data)), len(data) - at)
                    part = bytearray(length)
                    channel.read_into(at, part, length)
                    whole[at : at + length] = part
                    at += length
            return bytes(data)

    def _length(self, way: str, size: int) -> int:
        if way == "whole":
            return size
        if way == "sectors":
            return 512 * self._reads.randrange(1, 300)
        return self._reads.choice((self._reads.randrange(1, 200_000), self._reads.randrange(1, size), 4096 * 17))

    def compare_images(self) -> None:
        """The images hold what the disks must hold, and are sound."""
        for disk in self.box.disks:
            got = content_of(disk.path, disk.format, self.box.directory / "plain")
            wanted = bytes(self.past.disks[disk.id].content)
            assert not differing(got, wanted), (disk.id, differing(got, wanted))
            self.mix["check: image whole"] += 1
            if disk.format == "qcow2" and not self.running:
                assert qemu_img.check(disk.path) is None

    def _no_files(self, job: Job) -> None:
        for path, _ in job.files.values():
            left = [other.name for other in path.parent.glob(f"*{path.name}*")]
            assert left == [], left


def _address(served: Served) -> NbdAddress:
    assert served.address.socket is not None
    return NbdAddress(socket=Path(served.address.socket), export=served.name)


def _granules(extents: object) -> Granules:
    found: set[int] = set()
    for extent in extents:  # type: ignore[attr-defined]
        found |= granules(extent.start, extent.end)
    return frozenset(found)


__all__ = ["Historian", "Job", "View", "content_of", "differing", "present", "state"]
