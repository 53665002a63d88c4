"""A machine for tests: a real QEMU whose CPU idles, written to through its monitor, with a model beside it.

`Box.write` and friends do the write in QEMU (on the device's own backend, so that it goes through
whatever stands between device and disk) and in a bytearray, which says what each disk must hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pullback import repo, state
from pullback.engine import monitor
from pullback.engine.disks import device_path
from pullback.flows import backup as backup_flow
from pullback.flows import restore as restore_flow
from pullback.flows import verify as verify_flow
from pullback.flows.repositories import Access, opened
from pullback.model import urls
from pullback.model.points import Point
from pullback.programs import qemu, qemu_img, restic
from pullback.repo.restic import keys
from pullback.repo.store.local import LocalStore
from pullback.units import KiB, MiB

SIZE = 8 * MiB


@dataclass
class Box:
    """A machine, its disks' model, and a repository beside it."""

    directory: Path
    disks: list[qemu.Disk]
    name: str = "web01"
    extra: Sequence[str] = ()
    #: The kind of its repository: "dir" or "restic".
    kind: str = "dir"
    model: dict[str, bytearray] = field(default_factory=dict)
    process: qemu.Qemu | None = None

    # -- the machine -------------------------------------------------------------------------

    @property
    def qmp(self) -> Path:
        """The monitor for pullback."""
        return self.directory / "qmp.sock"

    @property
    def other(self) -> Path:
        """A second monitor, for the test."""
        return self.directory / "other.sock"

    @property
    def hmp(self) -> Path:
        """A monitor for people."""
        return self.directory / "hmp.sock"

    @property
    def repository(self) -> Path:
        """Where backups go."""
        return self.directory / "repo"

    @property
    def place(self) -> urls.Repository:
        """The repository, as requests name it."""
        return place_of(self.repository, self.kind)

    @property
    def access(self) -> Access:
        """What opens it."""
        return access_of(self.directory)

    @property
    def directories(self) -> state.Directories:
        """Pullback's own directories."""
        return state.directories(self.directory / "state")

    @property
    def scratch(self) -> Path:
        """Scratch images."""
        return self.directory / "state" / "scratch"

    def make_images(self, size: int = SIZE) -> None:
        """New empty images."""
        for disk in self.disks:
            qemu_img.create(disk.path, size, format=disk.format)
            self.model[disk.id] = bytearray(size)

    def start(self, *, paused: bool = False) -> None:
        """Start QEMU on the images."""
        for socket in (self.qmp, self.other, self.hmp):
            socket.unlink(missing_ok=True)
        machine = qemu.Machine(
            name=self.name,
            idle=True,
            disks=self.disks,
            qmp=[self.qmp, self.other],
            hmp=self.hmp,
            paused=paused,
            extra=self.extra,
        )
        self.process = qemu.start(machine)

    def quit(self) -> None:
        """A clean end."""
        assert self.process is not None
        with contextlib.suppress(Exception):
            self.command("quit")
        self.process.wait(20)
        self.process.close()

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.close()

    def close(self) -> None:
        """Whatever state it is in."""
        if self.process is not None:
            self.process.close()

    def command(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """A QMP command on the second monitor."""

        async def ask() -> object:
            async with monitor.connect(self.other) as qmp:
                return await qmp.execute(command, arguments)

        return asyncio.run(ask())

    def _io(self, disk: str, text: str) -> None:
        path = device_path(disk)
        if next(d for d in self.disks if d.id == disk).bus is qemu.Bus.VIRTIO:
            path += "/virtio-backend"
        answer = qemu.hmp(self.hmp, f'qemu-io -d {path} "{text}"')
        assert "rror" not in answer, answer
        assert "ailed" not in answer, answer

    def write(self, disk: str, value: int, start: int, length: int) -> None:
        """Write `length` bytes of `value`."""
        self._io(disk, f"write -q -P {value} {start} {length}")
        self.model[disk][start : start + length] = bytes([value]) * length

    def scramble(self, disk: str, seed: int, start: int, length: int) -> None:
        """Write bytes that nobody can compress."""
        data, file = random.Random(seed).randbytes(length), self.directory / "scrambled"
        file.write_bytes(data)
        self._io(disk, f"write -q -s {file} {start} {length}")
        self.model[disk][start : start + length] = data

    def zero(self, disk: str, start: int, length: int) -> None:
        """Write zeroes, with a hole where possible."""
        self._io(disk, f"write -q -z -u {start} {length}")
        self.model[disk][start : start + length] = bytes(length)

    def discard(self, disk: str, start: int, length: int) -> None:
        """Discard (the images discard to zeroes)."""
        self._io(disk, f"discard -q {start} {length}")
        self.model[disk][start : start + length] = bytes(length)

    def image(self) -> dict[str, bytes]:
        """What the disks hold now, by target."""
        return {disk.id: bytes(self.model[disk.id]) for disk in self.disks}

    # -- pullback ----------------------------------------------------------------------------

    def request(self, **changes: Any) -> backup_flow.Request:
        """A backup of this machine."""
        base = backup_flow.Request(
            machine=urls.QmpMachine(socket=self.qmp),
            repository=self.place,
            access=self.access,
            directories=self.directories,
        )
        return replace(base, **changes)

    def backup(self, **changes: Any) -> backup_flow.Report:
        """Back up in this process."""
        return asyncio.run(backup_flow.backup(self.request(**changes)))

    def points(self, machine: str | None = None) -> tuple[Point, ...]:
        """The restore points of this machine (or another one), oldest first."""
        with opened(self.place, self.access) as repository:
            return repository.listing(machine or self.name).points

    def restored(self, point: str = "latest", **changes: Any) -> dict[str, bytes]:
        """Restore a point; gives the disks' contents by target."""
        to = self.directory / f"out-{len(list(self.directory.glob('out-*')))}"
        words = {"repository": self.place, "access": self.access} | changes
        request = restore_flow.Request(to=to, point=point, **words)
        report = asyncio.run(restore_flow.restore(request))
        return {disk.target: disk.path.read_bytes() for disk in report.disks}

    def verify(self, **changes: Any) -> verify_flow.Report:
        """Verify."""
        place = place_of(changes.pop("repository", self.repository), self.kind)
        request = verify_flow.Request(repository=place, access=self.access, **changes)
        return asyncio.run(verify_flow.verify(request))

    def cli(self, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the command line in a process of its own."""
        password = {"PULLBACK_PASSWORD_FILE": str(password_file(self.directory))}
        return run_cli(*words, state=self.directory / "state", environ=password, **options)

    # -- what must hold ----------------------------------------------------------------------

    def leftovers(self) -> list[str]:
        """Everything of ours that is still in QEMU or on disk, bitmaps of checkpoints aside."""
        found: list[str] = []
        nodes = self.command("query-named-block-nodes", {"flat": True})
        found += [node["node-name"] for node in nodes if node["node-name"].startswith("pullback-")]
        for node in nodes:
            found += [b["name"] for b in node.get("dirty-bitmaps", []) if b.get("name", "").startswith("pullback-")]
        found += [export["id"] for export in self.command("query-block-exports") if "pullback" in export["id"]]
        found += [job["id"] for job in self.command("query-jobs") if "pullback" in job["id"]]
        base = self.directory / "state"
        found += [str(path) for folder in ("jobs", "scratch", "run") for path in sorted((base / folder).glob("*"))]
        found += [str(path) for path in self.repository.glob("*/.partial-*")]
        return found

    def checkpoints(self, disk: str) -> list[dict[str, Any]]:
        """Bitmaps of ours on a disk."""
        nodes = self.command("query-named-block-nodes", {"flat": True})
        path = str(next(d for d in self.disks if d.id == disk).path)
        node = next(n for n in nodes if n["drv"] == "qcow2" and n["file"] == path)
        return [b for b in node.get("dirty-bitmaps", []) if b.get("name", "").startswith("pullback/")]


#: The password of all repositories of tests.
PASSWORD = "correct horse"


def place_of(path: Path, kind: str) -> urls.Repository:
    """A repository's place by its path."""
    if kind == "dir":
        return urls.DirectoryRepository(path=path)
    return urls.ResticRepository(location=urls.LocalPlace(path=path))


def password_file(directory: Path) -> Path:
    """A file with the password, in `directory`."""
    path = directory / "password"
    if not path.exists():
        path.write_text(PASSWORD)
    return path


def access_of(directory: Path) -> Access:
    """What opens the repositories of tests; their cache is in `directory`."""
    environ = dict(os.environ) | {"PULLBACK_PASSWORD_FILE": str(password_file(directory))}
    return Access(environ=environ, cache=directory / "cache")


def restic_of(box: Box, path: Path | None = None) -> restic.Restic:
    """The program restic, for a machine's repository (or another one), without a cache."""
    access = restic.Access(url=str(path or box.repository), password=PASSWORD)
    return restic.Restic(access, {"PATH": os.environ["PATH"], "RESTIC_CACHE_DIR": "/nonexistent"})


def make_repository(path: Path, caches: Path) -> None:
    """An empty repository in restic's format, whose password costs next to nothing to try."""
    repo.create_repository(LocalStore.create(path), PASSWORD, caches=caches, cost=keys.Cost(1024, 8, 1)).close()


def run_cli(
    *words: object, state: Path, timeout: float = 60, environ: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `pullback` as a program."""
    return subprocess.run(
        [sys.executable, "-m", "pullback.cli.main", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PULLBACK_STATE_DIR": str(state)} | (environ or {}),
        check=False,
        **options,
    )


def last_json(output: str) -> dict[str, Any]:
    """The result or error line of a --json command."""
    document: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return document


MakeBox = Callable[..., Box]


@contextlib.contextmanager
def boxes(directory: Path) -> Iterator[MakeBox]:
    """A factory of started boxes; all are ended with the block."""
    made: list[Box] = []

    def make(*disks: qemu.Disk, size: int = SIZE, start: bool = True, **options: Any) -> Box:
        place = directory / f"box{len(made)}"
        place.mkdir()
        chosen = list(disks) or [qemu.Disk(id=id, path=Path(f"{id}.qcow2")) for id in ("vda", "vdb")]
        box = Box(place, [replace(disk, path=place / disk.path) for disk in chosen], **options)
        made.append(box)
        box.make_images(size)
        if box.kind == "restic":
            make_repository(box.repository, place / "cache" / "repositories")
        if start:
            box.start()
        return box

    try:
        yield make
    finally:
        for box in made:
            box.close()


CLUSTER = 64 * KiB
