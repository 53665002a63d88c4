"""The commands of docs/without-us.md restore what a backup stored: its own blocks are run, and every byte compared.

Nothing of ours takes part after the backups: restic, tar, dd, qemu-img, nbdkit. Blocks after `<!-- run: NAME -->`
belong together and are run in order, in one shell.
"""

from __future__ import annotations

import asyncio
import filecmp
import os
import random
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import kit
import seaweed
import swtpm
from kit import MakeBox
from pullback import repo, state
from pullback.flows import backup as backup_flow
from pullback.flows.repositories import Access
from pullback.model import urls
from pullback.model.points import Point
from pullback.programs import process, qemu, qemu_img
from pullback.repo.restic import keys
from pullback.units import GiB, KiB, MiB

PAGE = (Path(__file__).parents[2] / "docs" / "without-us.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"<!-- run: ([\w]+) -->\n```sh\n(.*?)```", re.DOTALL)
#: Names of groups of blocks, each with a test below.
GROUPS = {"restic", "digest", "firmware", "tpm", "mount", "s3", "dir"}
OLD = "1f2e3d4c"
BOOTED = "booted from the restore point"
#: More than one segment; the last chunk is short.
SIZES = {"vda": GiB + 20 * MiB + 512 * KiB, "vdb": 5 * MiB + 512}


def script(*groups: str) -> str:
    """The blocks of these groups, in the order of the page."""
    found = [text for name, text in _BLOCK.findall(PAGE) if name in groups]
    assert found
    return "".join(found)


def boot_sector() -> bytes:
    """A program for the first sector: it says `BOOTED` on the serial line, and switches the machine off."""
    say = bytes.fromhex("31c0 8ed8 fc be 0000 ba f803 ac 84c0 7403 ee ebf8")
    # The ACPI register of QEMU's default machine: SLP_EN, with type 0.
    off = bytes.fromhex("ba 0406 b8 0020 ef f4")
    code = bytearray(say + off)
    code[6:8] = (0x7C00 + len(code)).to_bytes(2, "little")
    return bytes(code + BOOTED.encode() + b"\r\n\0").ljust(510, b"\0") + b"\x55\xaa"


@dataclass
class World:
    """A machine that is off, its repository, and what its disks held at each restore point."""

    directory: Path
    place: urls.Repository
    environ: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)

    def image(self, disk: str) -> Path:
        """The image of a disk of the machine."""
        return self.directory / f"{disk}-live.qcow2"

    def content(self, disk: str, point: int) -> Path:
        """What a disk held at a point, raw."""
        return self.directory / f"{disk}-at-{point}"

    def write(self, disk: str, *writes: tuple[int, bytes]) -> None:
        """Write to a disk."""
        part = self.directory / "part"
        for offset, data in writes:
            part.write_bytes(data)
            line = f"write -q -s {part} {offset} {len(data)}"
            process.run(["qemu-io", "-f", "qcow2", "-c", line, self.image(disk)], timeout=20)

    def backup(self) -> Point:
        """Make a restore point, and keep beside it what the disks hold."""
        images = tuple(urls.Image(target=disk, path=self.image(disk), format="qcow2") for disk in SIZES)
        access = kit.access_of(self.directory)
        request = backup_flow.Request(
            machine=urls.ImagesMachine(images=images),
            name="web01",
            repository=self.place,
            access=Access(environ=dict(access.environ) | self.environ, cache=access.cache),
            directories=state.directories(self.directory / "state"),
        )
        self.points.append(asyncio.run(backup_flow.backup(request)).point)
        for disk in SIZES:
            raw = self.content(disk, len(self.points) - 1)
            process.run(["qemu-img", "convert", "-O", "raw", self.image(disk), raw], timeout=60)
        return self.points[-1]

    def holds(self, file: str, disk: str, point: int = -1) -> bool:
        """Is the file in the work directory the disk at that point?"""
        raw = self.content(disk, point % len(self.points))
        return filecmp.cmp(self.directory / "work" / file, raw, shallow=False)

    def compare(self, file: str, disk: str) -> None:
        """The qcow2 image in the work directory must be the disk at the last point."""
        image, raw = self.directory / "work" / file, self.content(disk, len(self.points) - 1)
        process.run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, raw], timeout=60)

    def run(self, text: str, places: dict[str, str], environ: dict[str, str]) -> str:
        """Run blocks as a user would, with the places in them moved to the test's own; gives what they print."""
        for place, instead in places.items():
            assert place in text
            text = text.replace(place, instead)
        work = self.directory / "work"
        work.mkdir()
        variables = {
            "RESTIC_CACHE_DIR": str(self.directory / "restic-cache"),
            "TMPDIR": str(self.directory),
            **self.environ,
            **environ,
        }
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=work,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, complaints = shell.communicate(timeout=100)
        finally:
            subprocess.run(["umount", "-l", str(work / "mnt")], check=False, capture_output=True, timeout=20)
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)
        assert shell.returncode == 0, f"{text}\n{output}\n{complaints}"
        return output


def fill(world: World) -> World:
    """Two restore points: the second is an increment."""
    chance = random.Random(7)
    for disk, size in SIZES.items():
        qemu_img.create(world.image(disk), size, format="qcow2")
    world.write(
        "vda",
        (0, boot_sector()),
        (GiB - 300 * KiB, chance.randbytes(700 * KiB)),
        (SIZES["vda"] - 4096, chance.randbytes(4096)),
    )
    world.write("vdb", (MiB - 512, chance.randbytes(1024)), (5 * MiB, chance.randbytes(512)))
    world.backup()
    time.sleep(1)  # points of a `dir:` repository are ordered by the second in their names
    world.write("vda", (GiB - 4096, chance.randbytes(8192)))
    world.write("vdb", (3 * MiB, chance.randbytes(MiB)))
    point = world.backup()
    assert [disk.mode for disk in point.disks] == ["incremental", "incremental"]
    return world


@pytest.fixture
def restic(short_dir: Path) -> World:
    """A repository in restic's format in a directory."""
    path = short_dir / "repo"
    kit.make_repository(path, short_dir / "cache")
    return fill(World(short_dir, kit.place_of(path, "restic")))


def variables(world: World) -> dict[str, str]:
    """What the page's first block says."""
    password = kit.password_file(world.directory)
    return {"RESTIC_REPOSITORY": str(world.directory / "repo"), "RESTIC_PASSWORD_FILE": str(password)}


def places(world: World) -> dict[str, str]:
    """The names in the page's blocks, and what they are here."""
    return {
        "/srv/backup": str(world.directory / "repo"),
        "/etc/pullback/main.password": str(kit.password_file(world.directory)),
        OLD: world.points[0].id[:8],
    }


def test_restic_tar_and_dd_restore_every_disk_of_every_point(restic: World) -> None:
    output = restic.run(script("restic", "digest"), places(restic), {})
    assert f"{restic.points[-1].id[:8]}  " in output
    assert '"target": "vdb"' in output
    assert restic.holds("vda.raw", "vda")
    assert restic.holds("again.raw", "vda")
    assert restic.holds("vdb-before.raw", "vdb", 0)
    assert restic.holds("all-vda.raw", "vda")
    assert restic.holds("all-vdb.raw", "vdb")
    restic.compare("vda.qcow2", "vda")
    assert (restic.directory / "work" / "vda.raw").stat().st_blocks * 512 < 16 * MiB  # it is sparse
    [by_hand] = re.findall(r"^([0-9a-f]{64})  -$", output, re.MULTILINE)
    assert by_hand == restic.points[0].disk("vdb").digest
    assert f'"digest": "{by_hand}"' in output


def test_a_disk_is_read_and_booted_in_the_repository_itself(restic: World) -> None:
    """It needs FUSE: where there is none, this page was not tried, and that is a failure."""
    assert os.access("/dev/fuse", os.R_OK | os.W_OK), "there is no /dev/fuse, so `restic mount` cannot be tried"
    output = restic.run(script("mount"), {OLD: restic.points[0].id[:8]}, variables(restic))
    assert BOOTED in output
    assert f"export-size: {SIZES['vdb']}" in output
    assert restic.holds("vdb-before.raw", "vdb", 0)
    restic.compare("vda.qcow2", "vda")
    assert not (restic.directory / "work" / "mnt").is_mount()


def test_restic_restores_from_a_bucket(short_dir: Path, s3_server: seaweed.Server) -> None:
    s3_server.make_bucket("without-us")
    place = urls.ResticRepository(location=s3_server.place("without-us", "pullback"))
    world = World(short_dir, place, environ=s3_server.environ)
    with (
        repo.create_store(place.location, environ=s3_server.environ) as store,
        repo.create_repository(store, kit.PASSWORD, caches=short_dir / "cache", cost=keys.Cost(1024, 8, 1)),
    ):
        pass
    fill(world)
    words = [f"{name}={s3_server.environ[name]}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    moved = {
        "s3:https://s3.example.org/backup/pullback": place.url,
        "/etc/pullback/main.password": str(kit.password_file(short_dir)),
        "AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=…": " ".join(words),
    }
    world.run(script("s3"), moved, {})
    assert world.holds("vda.raw", "vda")


def test_qemu_img_restores_from_a_directory_of_images(short_dir: Path) -> None:
    path = short_dir / "images"
    world = fill(World(short_dir, kit.place_of(path, "dir")))
    output = world.run(script("dir"), {"/srv/images": str(path)}, {})
    assert world.holds("vda.raw", "vda")
    assert world.holds("vdb-before.raw", "vdb", 0)
    world.compare("vda.qcow2", "vda")
    assert BOOTED in output
    assert output.count(world.points[0].disk("vdb").digest) == 2  # by hand, and in the manifest


def test_restic_gives_back_the_firmware_s_variables(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("vda.qcow2")), kind="restic", start=False)
    code, firmware = tmp_path / "code.fd", tmp_path / "vars.fd"
    code.write_bytes(bytes(192 * KiB) + qemu.halting_firmware())
    firmware.write_bytes(random.Random(7).randbytes(528 * KiB))
    flash = (
        "-drive",
        f"if=pflash,format=raw,readonly=on,file={code}",
        "-drive",
        f"if=pflash,format=raw,file={firmware}",
    )
    box.process = qemu.start(
        qemu.Machine(name=box.name, disks=box.disks, qmp=[box.qmp, box.other], hmp=box.hmp, extra=flash)
    )
    box.backup()
    world = World(box.directory, box.place)
    output = world.run(script("firmware"), {}, variables(world))
    assert "/firmware/pflash0" in output
    assert (box.directory / "work" / "vars.fd").read_bytes() == firmware.read_bytes()


def test_no_command_of_the_page_is_left_out() -> None:
    marked = _BLOCK.findall(PAGE)
    assert {name for name, _ in marked} == GROUPS
    assert PAGE.count("```") == 2 * len(marked)


def test_restic_gives_back_the_state_of_the_tpm(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), kind="restic", start=False, size=MiB)
    place = box.directory / "state-of-tpm"
    place.mkdir()
    with swtpm.alone("--tpmstate", f"dir={place}") as alone:
        alone.keep(b"sealed")
        alone.shutdown()
    with swtpm.beside(place) as words:
        box.extra = words
        box.start()
        box.backup()
        box.quit()
    world = World(box.directory, box.place)
    assert "/tpm/tpm2-00.permall" in world.run(script("tpm"), {}, variables(world))
    with swtpm.alone("--tpmstate", f"dir={box.directory / 'work' / 'tpm'}") as alone:
        assert alone.kept(6) == b"sealed"
