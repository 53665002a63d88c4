"""What goes wrong for users: every line of the table in docs/exit-codes.md, made to happen by the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import kit
import made
import proxy
from mishaps import CASES, Done, Row, Said, World, case, listening, rows
from pullback import config, repo, state
from pullback.model import points, urls
from pullback.programs import qemu, qemu_img
from pullback.testing.endpoints import nbdkit


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """The world, made once."""
    with tempfile.TemporaryDirectory(prefix="pb-") as directory, kit.boxes(Path(directory)) as make:
        yield World(Path(directory), make)


# -- reaching the machine --------------------------------------------------------------------


@case("No socket at that path")
def _(world: World) -> Said:
    path = world.fresh("no.sock")
    return world.backup(machine=f"qmp:{path}"), {"SOCKET": path}


@case("Nothing listens at the socket (the machine is off)")
def _(world: World) -> Said:
    path = world.fresh("old.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    return world.backup(machine=f"qmp:{path}"), {"SOCKET": path}


@case("The socket of another program")
def _(world: World) -> Said:
    path = world.fresh("mail.sock")
    with listening(path, b"220 mail.example.org ESMTP\r\n"):
        return world.backup(machine=f"qmp:{path}"), {"SOCKET": path}


@case("A socket whose program hangs up at once")
def _(world: World) -> Said:
    path = world.fresh("shy.sock")
    with listening(path, b""):
        return world.backup(machine=f"qmp:{path}"), {"SOCKET": path}


@case("The socket of `-monitor`, for people")
def _(world: World) -> Said:
    return world.backup(machine=f"qmp:{world.box.hmp}"), {"SOCKET": world.box.hmp}


@case("A monitor that another client holds")
def _(world: World) -> Said:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(world.box.qmp))
        assert b"QMP" in other.recv(4096)
        return world.backup(), {"SOCKET": world.box.qmp}


@contextlib.contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """Nobody may use the path, unless he has root's capability to pass over that."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        yield
    finally:
        path.chmod(mode)


def without_privilege(world: World, *words: object) -> Done:
    """The command line without root's capability to pass over permissions."""
    lost = "-dac_override,-dac_read_search"
    drop = ["setpriv", "--bounding-set", lost, "--inh-caps", lost] if os.geteuid() == 0 else []
    line = [*drop, sys.executable, "-m", "pullback.cli.main", *map(str, words)]
    environment = os.environ | {"PULLBACK_STATE_DIR": str(world.fresh("state"))}
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, env=environment)


@case("A monitor of another user")
def _(world: World) -> Said:
    with forbidden(world.box.qmp):
        return without_privilege(world, "info", f"qmp:{world.box.qmp}"), {"SOCKET": world.box.qmp}


@case("A machine that libvirt manages")
def _(world: World) -> Said:
    disk = qemu.Disk(id="vda", path=Path("a.qcow2"), node="libvirt-1-format")
    box = world.make(disk, name="managed")
    return world.backup(machine=f"qmp:{box.qmp}"), {"SOCKET": box.qmp}


@case("QEMU without `-name` and `-uuid`")
def _(world: World) -> Said:
    box = world.make(name=None)
    return world.backup(machine=f"qmp:{box.qmp}"), {"SOCKET": box.qmp}


@case("A second pullback on the same machine")
def _(world: World) -> Said:
    with state.lock(
        state.directories(world.state), f"socket {world.box.qmp}", command="backup to /srv/backup", title="it"
    ):
        facts = {"COMMAND": "backup to /srv/backup", "NUMBER": os.getpid(), "TIME": re.compile(r"[-0-9T:]+Z")}
        return world.backup(), {"SOCKET": world.box.qmp, **facts}


# -- the configuration -----------------------------------------------------------------------


def configuration(world: World, *, more: str = "") -> Path:
    """A file with two machines and a repository."""
    path = world.fresh("config.toml")
    path.write_text(
        f"""
[repositories.main]
url = "dir:{world.repository}"
[machines.db01]
url = "qmp:/run/db01.sock"
[machines.web01]
url = "qmp:{world.box.qmp}"
{more}
"""
    )
    path.chmod(0o644)
    return path


@case("A bare word for a machine, and no configuration")
def _(world: World) -> Said:
    return world.backup(machine="web01"), {"CONFIG": config.default_path()}


@case("A machine that is not configured")
def _(world: World) -> Said:
    path = configuration(world)
    return world.backup("--config", path, machine="web1"), {"CONFIG": path}


@case("A repository that is not configured")
def _(world: World) -> Said:
    path = configuration(world)
    return world.run("backup", "web01", "--config", path, "-r", "mian"), {"CONFIG": path}


@case("A key that is not known")
def _(world: World) -> Said:
    path = configuration(world, more='scrach = "/tmp"')
    return world.backup("--config", path), {"CONFIG": path}


@case("A configuration that every user can change")
def _(world: World) -> Said:
    path = configuration(world)
    path.chmod(0o666)
    return world.backup("--config", path), {"CONFIG": path}


@case("A hook that fails before a backup")
def _(world: World) -> Said:
    path = configuration(world, more='hooks = {pre = ["false"]}')
    return world.backup("--config", path, machine="web01"), {}


# -- the machine, its disks, and scratch -----------------------------------------------------


@case("A disk that the machine does not have")
def _(world: World) -> Said:
    return world.backup("--disk", "vdz"), {"DISKS": "vda, vdb"}


@case("Every disk excluded")
def _(world: World) -> Said:
    return world.backup("-x", "vda", "-x", "vdb"), {}


@case("Another program uses QEMU's NBD server")
def _(world: World) -> Said:
    path = world.fresh("nbd.sock")
    world.box.command("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(path)}}})
    try:
        return world.backup(), {}
    finally:
        world.box.command("nbd-server-stop")


@case("Another job runs on a disk")
def _(world: World) -> Said:
    arguments = {"driver": "null-co", "node-name": "sink", "size": kit.SIZE}
    world.box.command("blockdev-add", arguments)
    mirror: dict[str, object] = {"job-id": "theirs", "device": "vda-format", "target": "sink", "sync": "full"}
    world.box.command("blockdev-mirror", mirror)
    try:
        return world.backup(), {"JOB": "theirs"}
    finally:
        world.box.command("block-job-cancel", {"device": "theirs"})
        _eventually_gone(world, "sink")


def _eventually_gone(world: World, node: str) -> None:
    for _ in range(100):
        if not world.box.command("query-jobs"):
            break
    world.box.command("blockdev-del", {"node-name": node})


@case("Scratch on a file system that is not local")
def _(world: World) -> Said:
    return world.backup("--scratch", "/proc"), {"DIR": "/proc"}


@contextlib.contextmanager
def small_file_system(world: World) -> Iterator[Path]:
    """A tmpfs of 4 MiB."""
    path = world.fresh("small")
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", path], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@case("Scratch with too little room")
def _(world: World) -> Said:
    with small_file_system(world) as path:
        return world.backup("--scratch", path), {"DIR": path, "FREE": "4.00 MiB"}


# -- the repository --------------------------------------------------------------------------


# -- machines that are off -------------------------------------------------------------------


@case("Images without `--name`")
def _(world: World) -> Said:
    return world.backup(machine=f"images:vda={world.fresh('a.qcow2')}"), {}


@case("An image that is not there")
def _(world: World) -> Said:
    path = world.fresh("a.qcow2")
    return world.backup("--name", "off", machine=f"images:vda={path}"), {"IMAGE": path}


@case("An image that a running machine, or another program, has open")
def _(world: World) -> Said:
    path = world.box.disks[0].path
    return world.backup("--name", "off", machine=f"images:vda={path}"), {"IMAGE": path}


@case("An image over a backing file, and its format is not given")
def _(world: World) -> Said:
    path = world.fresh("a.qcow2")
    qemu_img.create(path, 1 << 20, backing=str(world.fresh("base.qcow2")))
    return world.backup("--name", "off", machine=f"images:vda={path}"), {"IMAGE": path}


# -- checkpoints -----------------------------------------------------------------------------


@case("A checkpoint that is not there")
def _(world: World) -> Said:
    return world.run("checkpoint", "delete", f"qmp:{world.box.qmp}", "monday"), {}


@case("A new checkpoint with the name of another")
def _(world: World) -> Said:
    line = ("checkpoint", "create", f"qmp:{world.box.qmp}", "--as", "monday")
    assert world.run(*line).returncode == 0
    again = world.run(*line)
    assert world.run("checkpoint", "delete", f"qmp:{world.box.qmp}", "monday").returncode == 0
    return again, {}


@case("A saved checkpoint whose bitmap is not on the disk")
def _(world: World) -> Said:
    document = world.fresh("tuesday.json")
    document.write_text('{"name": "tuesday", "creation_time": 1525889631}')
    return world.run("checkpoint", "redefine", f"qmp:{world.box.qmp}", document), {}


@case("A disk that cannot be tracked")
def _(world: World) -> Said:
    disks = [qemu.Disk(id="vda", path=Path("a.qcow2")), qemu.Disk(id="vdb", path=Path("b.raw"), format="raw")]
    box = world.make(*disks, name="raw01")
    return world.run("checkpoint", "create", f"qmp:{box.qmp}", "--disk", "vdb"), {}


# -- the repository --------------------------------------------------------------------------


@case("A directory with something else in it")
def _(world: World) -> Said:
    path = world.fresh("photos")
    path.mkdir()
    (path / "holiday.jpg").touch()
    return world.backup(repository=path), {"DIR": path}


@case("The directory above is not there")
def _(world: World) -> Said:
    path = world.fresh("unmounted")
    return world.backup(repository=path / "repo"), {"DIR": path}


@case("No repository at that place")
def _(world: World) -> Said:
    path = world.fresh("nothing")
    return world.list(path), {"DIR": path}


@case("A repository of a later Pullback")
def _(world: World) -> Said:
    path = world.copy()
    marker = path / "pullback.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 99}))
    return world.list(path), {"DIR": path}


@case("A repository of another user")
def _(world: World) -> Said:
    path = world.copy()
    with forbidden(path):
        return without_privilege(world, "list", "-r", f"dir:{path}"), {"DIR": path}


@case("A wrong password")
def _(world: World) -> Said:
    path = sealed(world)
    return world.run("list", "-r", path, environ=environ(PULLBACK_PASSWORD_COMMAND="echo wrong")), {"REPO": path}


@case("A damaged file in a repository")
def _(world: World) -> Said:
    path = sealed(world)
    file = path / "config"
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    return world.run("list", "-r", path, environ=known()), {"FILE": "config", "PROBLEM": re.compile(".+")}


@case("A file of a repository that is a symbolic link")
def _(world: World) -> Said:
    path = sealed(world)
    (path / "config").rename(path / "there")
    (path / "config").symlink_to("there")
    return world.run("list", "-r", path, environ=known()), {"REPO": path}


@case("`init` where a repository is")
def _(world: World) -> Said:
    path = sealed(world)
    return world.run("init", "-r", path, environ=known()), {"REPO": path}


@case("`forget` of a `dir:` repository")
def _(world: World) -> Said:
    return world.run("forget", "-r", f"dir:{world.repository}", "--keep-last", 1), {"DIR": world.repository}


@case("`forget` without a rule, and nothing is configured")
def _(world: World) -> Said:
    return world.run("forget", "-r", sealed(world), environ=known()), {}


@case("A backup that runs while `forget` should")
def _(world: World) -> Said:
    path = made.empty(world.fresh("held"))
    point = made.point(path, "web01", datetime(2026, 11, 24, tzinfo=UTC))
    with made.opened(path) as repository, repository.writer("db01", command="test"):
        password = {"PULLBACK_PASSWORD_FILE": str(kit.password_file(path.parent))}
        done = world.run("forget", point[:8], "-r", path, environ=environ(**password))
    return done, {"REPO": path, "HOLDER": re.compile(rf"PID {os.getpid()} on \S+ by \S+")}


@case("A repository without restore points")
def _(world: World) -> Said:
    path = world.fresh("empty")
    repo.create_or_open(path)
    return world.list(path), {"DIR": path}


@case("A machine without restore points")
def _(world: World) -> Said:
    return world.list(world.repository, "--machine", "db01"), {"DIR": world.repository}


@case("The repository's file system is full")
def _(world: World) -> Said:
    world.box.write("vdb", 3, 0, 6 << 20)
    with small_file_system(world) as path:
        return world.backup(repository=path / "repo"), {"FILE": re.compile(rf"{path}/repo/\S+")}


# -- passwords and buckets -------------------------------------------------------------------

_ABOUT_REPOSITORIES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "PULLBACK_PASSWORD_FILE",
    "PULLBACK_PASSWORD_COMMAND",
    "RESTIC_PASSWORD",
    "RESTIC_PASSWORD_FILE",
    "RESTIC_PASSWORD_COMMAND",
)


def environ(**variables: str) -> dict[str, str]:
    """Variables, of which those about repositories are these alone."""
    return dict.fromkeys(_ABOUT_REPOSITORIES, "") | {"HOME": "/nonexistent"} | variables


def sealed(world: World) -> Path:
    """A repository with a password."""
    path = world.fresh("sealed")
    place = urls.LocalPlace(path=path)
    with repo.create_store(place, {}) as store:
        repo.create_repository(store, "secret", caches=world.directory / "caches").close()
    return path


def known() -> dict[str, str]:
    """The right password for `sealed`."""
    return environ(PULLBACK_PASSWORD_COMMAND="echo secret")


@case("No password for the repository")
def _(world: World) -> Said:
    path = sealed(world)
    return world.run("list", "-r", path, stdin=subprocess.DEVNULL, environ=environ()), {"DIR": path}


@case("A file with the password that is not there")
def _(world: World) -> Said:
    file = world.fresh("password")
    return world.run("list", "-r", sealed(world), environ=environ(PULLBACK_PASSWORD_FILE=str(file))), {"FILE": file}


@case("A command for the password that fails")
def _(world: World) -> Said:
    return world.run("list", "-r", sealed(world), environ=environ(PULLBACK_PASSWORD_COMMAND="false")), {}


def listed(world: World, fault: proxy.Fault, *, scheme: str = "http", keys: bool = True) -> Said:
    """A listing of a bucket whose server answers so."""
    given = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "x"} if keys else {}
    with proxy.before(1) as server:
        server.rule = lambda request: fault
        name = f"s3:{scheme}://127.0.0.1:{server.port}/bucket/web"
        done = world.run("list", "-r", name, environ=environ(**given))
        return done, {"REPO": name, "REASON": re.compile(".*"), "BUCKET": "bucket"}


@case("No keys for a bucket")
def _(world: World) -> Said:
    return listed(world, proxy.Fault(status=403), keys=False)


@case("Keys that the bucket's server does not accept")
def _(world: World) -> Said:
    return listed(world, proxy.Fault(status=403, code="InvalidAccessKeyId"))


@case("A bucket's server that answers with an error")
def _(world: World) -> Said:
    return listed(world, proxy.Fault(status=400, code="InvalidRequest"))


@case("A bucket that is not there")
def _(world: World) -> Said:
    return listed(world, proxy.Fault(status=404, code="NoSuchBucket"))


@case("A bucket in another region")
def _(world: World) -> Said:
    return listed(world, proxy.Fault(status=301, code="PermanentRedirect"))


@case("A server without TLS at an address with https")
def _(world: World) -> Said:
    return listed(world, proxy.Fault(), scheme="https")


# -- restore points, and where they go -------------------------------------------------------


@case("An id or date that fits no point")
def _(world: World) -> Said:
    return world.restore("1999-12-31"), {"DIR": world.repository}


@case("The start of several ids")
def _(world: World) -> Said:
    return world.restore("2"), {"IDS": re.compile(r"2\d+T\d+Z-\w+(, 2\d+T\d+Z-\w+)+")}


@case("`latest`, with several machines in the repository")
def _(world: World) -> Said:
    path = world.copy()
    assert world.backup("--name", "db01", repository=path).returncode == 0
    return world.restore(repository=path), {}


_ID = re.compile(r"\d+T\d+Z-[0-9a-f]{8}")


@case("A disk that the restore point does not have")
def _(world: World) -> Said:
    return world.restore("--disk", "vdz"), {"ID": _ID}


@case("A format that cannot be written")
def _(world: World) -> Said:
    return world.restore("--format", "vmdk"), {}


@case("A file where the disk would be restored to")
def _(world: World) -> Said:
    path = world.fresh("there")
    path.mkdir()
    (path / "vda.raw").touch()
    return world.restore("--to", path), {"FILE": path / "vda.raw"}


@case("`--to` below a file")
def _(world: World) -> Said:
    path = world.fresh("file")
    path.touch()
    return world.restore("--to", path / "out"), {"DIR": path / "out"}


@case("A block device as the place of a disk, without `--force`")
def _(world: World) -> Said:
    image = world.fresh("image")
    image.write_bytes(bytes(8 << 20))
    made = subprocess.run(["losetup", "-f", "--show", image], check=True, capture_output=True, text=True)
    device = made.stdout.strip()
    try:
        return world.restore("--to", f"vda={device}"), {"DEVICE": device}
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@case("An NBD server that is too small for the disk")
def _(world: World) -> Said:
    with nbdkit(world.fresh("nbd"), "memory", "4M") as (address, _):
        return world.restore("--to", f"vda={address.uri}"), {"URI": address.uri}


@case("A server that forgets what it was given (`--check`)")
def _(world: World) -> Said:
    with nbdkit(world.fresh("nbd"), "null", "8M") as (address, _):
        problem = re.compile(r"the 1048576 bytes at offset \d+ are not what was stored")
        return world.restore("--to", f"vda={address.uri}", "--check"), {"URI": address.uri, "PROBLEM": problem}


@case("No room for the restored disk")
def _(world: World) -> Said:
    world.box.write("vdb", 4, 0, 6 << 20)
    path = world.fresh("big")
    assert world.backup(repository=path).returncode == 0
    with small_file_system(world) as small:
        done = world.restore("--disk", "vdb", "--to", small, repository=path)
        assert list(small.iterdir()) == []
        return done, {"FILE": small / "vdb.raw"}


@case("A restore point that is damaged")
def _(world: World) -> Said:
    path = world.copy()
    image = max(path.rglob("vda.qcow2"))
    data = bytearray(image.read_bytes())
    data[-100] ^= 1
    image.write_bytes(data)
    assert world.run("verify", "-r", f"dir:{path}").returncode == 13
    return world.restore(repository=path), {"ID": _ID, "PROBLEM": re.compile(r"disk vda: the \d+ bytes at .*stored")}


# -- files of restore points, and proofs -----------------------------------------------------


def files(world: World, *words: object) -> Done:
    """Looked at by this host itself, because that is quicker than to start the reader."""
    return world.run("files", "latest", *words, "--trust", "-r", f"dir:{world.repository}")


@case("`files get` without a path")
def _(world: World) -> Said:
    return files(world, "get"), {}


@case("A partition that the restore point does not have")
def _(world: World) -> Said:
    return files(world, "ls", "vda9"), {"ID": _ID}


@case("A disk without a file system")
def _(world: World) -> Said:
    return files(world, "ls", "vdb"), {}


@case("A path without a volume, where no file system tells its place")
def _(world: World) -> Said:
    return files(world, "ls", "/etc/hosts"), {"ID": _ID}


@case("`prove --newest` without `--all`")
def _(world: World) -> Said:
    return world.run("prove", "--newest", "-r", f"dir:{world.repository}"), {}


# -- rolling back ----------------------------------------------------------------------------


def backed_up(world: World, *words: object, **options: Any) -> tuple[kit.Box, Path]:
    """A machine of its own with a restore point, and its repository."""
    box, path = world.make(**options), world.fresh("repo")
    box.scramble("vda", 1, 0, 3 << 20)
    assert world.backup(*words, machine=f"qmp:{box.qmp}", repository=path).returncode == 0
    return box, path


def roll_back(world: World, box: kit.Box, path: Path, *words: object) -> Done:
    """Without a safety point."""
    return world.run("rollback", f"qmp:{box.qmp}", "-r", f"dir:{path}", "--no-safety", *words)


@case("A disk that has another size than the restore point's")
def _(world: World) -> Said:
    box, path = backed_up(world)
    box.command("block_resize", {"node-name": "vda-format", "size": 9 << 20})
    return roll_back(world, box, path), {"ID": _ID}


@case("A machine that has a disk which the restore point does not have")
def _(world: World) -> Said:
    box, path = backed_up(world, "--exclude", "vdb")
    return roll_back(world, box, path), {"ID": _ID}


@case("A QEMU that ends when it is reset")
def _(world: World) -> Said:
    box, path = backed_up(world, extra=("-no-reboot",))
    return roll_back(world, box, path), {}


@case("Too little room for what is to be written")
def _(world: World) -> Said:
    box, path = backed_up(world)
    box.scramble("vda", 2, 0, 3 << 20)
    with small_file_system(world) as small:
        done = roll_back(world, box, path, "--staging", small)
        return done, {"DIR": small, "NEEDED": re.compile(r"1\d\.\d MiB")}


@contextlib.contextmanager
def half_rolled_back(world: World) -> Iterator[tuple[kit.Box, Done]]:
    """A machine whose image's file system was full while it was rolled back, and what was said of that."""
    with small_file_system(world) as small:
        image = small / "a.qcow2"
        box = world.make(qemu.Disk(id="vda", path=Path("a.qcow2")), start=False)
        box.disks = [dataclasses.replace(box.disks[0], path=image)]
        box.make_images()
        box.start()
        path = world.fresh("repo")
        box.scramble("vda", 1, 0, 3 << 20)
        assert world.backup(machine=f"qmp:{box.qmp}", repository=path).returncode == 0
        box.discard("vda", 0, 3 << 20)
        filler = small / "filler"
        filler.write_bytes(bytes(3 << 20))
        done = roll_back(world, box, path)
        try:
            yield box, done
        finally:
            filler.unlink()
            assert roll_back(world, box, path).returncode == 0
            box.quit()


_COMMAND = re.compile(r"pullback rollback qmp:\S+ \S+ -r dir:\S+")


@case("An image that cannot be written while it is rolled back")
def _(world: World) -> Said:
    with half_rolled_back(world) as (_, done):
        return done, {"ID": _ID, "COMMAND": _COMMAND}


@case("Any command on disks that are half rolled back")
def _(world: World) -> Said:
    with half_rolled_back(world) as (box, _):
        return world.run("info", f"qmp:{box.qmp}"), {"ID": _ID, "COMMAND": _COMMAND}


@case("A journal of a rollback that was damaged")
def _(world: World) -> Said:
    with half_rolled_back(world) as (box, _):
        [journal] = (world.state / "rollbacks").glob("*/journal.json")
        good = journal.read_text()
        journal.write_text("{")
        done = world.run("info", f"qmp:{box.qmp}")
        journal.write_text(good)
        return done, {"FILE": journal, "PROBLEM": re.compile("Expecting property name .*")}


# -- machines that are booted ----------------------------------------------------------------


@case("A file where the disk of a machine that is booted would be")
def _(world: World) -> Said:
    to = world.fresh("vm")
    to.mkdir(mode=0o700)
    (to / "vda.qcow2").touch()
    return world.run("boot", "-r", f"dir:{world.repository}", "--to", to), {"FILE": to / "vda.qcow2"}


@case("A machine that had more memory than this host has")
def _(world: World) -> Said:
    copy = world.fresh("copy")
    shutil.copytree(world.repository, copy)
    for manifest in copy.glob("*/*/manifest.json"):
        point = points.decode(manifest.read_bytes(), name="it")
        assert point.description is not None
        larger = replace(point.description, argv=(*point.description.argv, "-m", "60T"))
        manifest.write_bytes(points.encode(replace(point, description=larger)))
    return world.run("boot", "-r", f"dir:{copy}", "--to", world.fresh("vm")), {"FREE": re.compile(r"[0-9.]+ [KMGT]iB")}


@case("A network that does not exist")
def _(world: World) -> Said:
    return world.run("boot", "-r", f"dir:{world.repository}", "--to", world.fresh("vm"), "--network", "lan"), {}


@case("A machine that is booted already, by a command that is at it")
def _(world: World) -> Said:
    to = world.fresh("vm")
    with state.lock(state.directories(world.state), f"boot {to}", command="boot", title=str(to)):
        done = world.run("boot", "-r", f"dir:{world.repository}", "--to", to)
    return done, {"DIR": to, "PID": os.getpid(), "TIME": re.compile(r"[0-9TZ:-]+")}


# -- the table -------------------------------------------------------------------------------


def pattern(text: str, capitals: dict[str, object]) -> str:
    """A regular expression for a text of the table, its words in capitals replaced."""
    made = re.escape(text)
    for word, meaning in capitals.items():
        wanted = meaning.pattern if isinstance(meaning, re.Pattern) else re.escape(str(meaning))
        made = re.sub(rf"\b{word}\b", lambda _, wanted=wanted: wanted, made)  # type: ignore[misc]
    return made


def test_every_line_is_tried() -> None:
    assert [row.what for row in rows()] == list(CASES)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.what)
def test_what_goes_wrong_is_said_as_the_table_says(world: World, row: Row) -> None:
    done, capitals = CASES[row.what](world)
    said = [line for line in done.stderr.splitlines() if line.startswith(("pullback: ", "  hint: ", "Traceback"))]
    wanted = [f"pullback: {row.sentence}", f"  hint: {row.hint}"][: 2 if row.hint else 1]
    assert done.returncode == row.exit, done.stderr
    assert len(said) == len(wanted), done.stderr
    for line, text in zip(said, wanted, strict=True):
        assert re.fullmatch(pattern(text, capitals), line), f"{line!r} is not {text!r}"
