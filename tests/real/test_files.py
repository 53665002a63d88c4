"""Single files of restore points: what the reader finds on disks of all kinds, and what it does with hostile ones."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import diskmaker
import kit
from pullback import errors, state
from pullback.flows import backup as backup_flow
from pullback.guest import build, entries, reader, roots, taking, volumes
from pullback.guest.reader import Drive, Reader
from pullback.guest.volumes import Volume
from pullback.model import urls
from pullback.progress import Cancel
from pullback.units import MiB

pytestmark = pytest.mark.guest
S = 2048
VDA, VDB, VDC = 512 * MiB, 128 * MiB, 160 * MiB
_SCRIPT = r"""
run("mkfs.vfat", "-n", "ESP", "/dev/vda1");
run("mke2fs", "-q", "-t", "ext4", "-L", "rootfs", "/dev/vda2");
run("mkfs.xfs", "-q", "-L", "space", "/dev/vda3");
run("mkswap", "/dev/vda4");
run("mkfs.btrfs", "-q", "-L", "bee", "/dev/vdb");
drivers("dm_mod");
lvm_run("pvcreate", "-q", "/dev/vdc");
lvm_run("vgcreate", "-q", "box-0", "/dev/vdc");
lvm_run("lvcreate", "-q", "-Wn", "-Zn", "-L", "64m", "-n", "home", "box-0");
lvm_run("lvcreate", "-q", "-Wn", "-Zn", "-L", "32m", "-n", "windows", "box-0");
run("mke2fs", "-q", "-t", "ext3", "/dev/mapper/box--0-home");
run("mkntfs", "-q", "-F", "-L", "C", "/dev/mapper/box--0-windows");
sub lvm_run { my ($verb, @words) = @_; run("lvm", $verb, "--config", $LVM, @words) }

attach("/dev/vda1", "/esp", "vfat", "utf8=1");
attach("/dev/vda2", "/root", "ext4");
attach("/dev/vda3", "/space", "xfs");
attach("/dev/vdb", "/bee", "btrfs");
attach("/dev/mapper/box--0-home", "/home", "ext4");
mkdir "/esp/EFI";
put_file("/esp/EFI/Gr\xc3\xbc\xc3\x9fe und so weiter.txt", "vfat\n");
mkdir "/root/$_" for "etc", "home", "srv", "odd", "odd/deep";
put_file("/root/etc/hosts", "127.0.0.1 localhost\n");
put_file("/root/etc/fstab", "LABEL=rootfs / ext4 defaults 0 1\n/dev/mapper/box--0-home /home ext3 defaults 0 2\n",
    "LABEL=space /srv xfs defaults 0 2\nUUID=gone /gone ext4 defaults 0 2\n");
put_file("/root/odd/a\nb\e[31m", "control");
put_file("/root/odd/\xff\xfe", "bytes");
put_file("/root/odd/" . "n" x 255, "long");
put_file("/root/odd/deep/same", "several names");
link("/root/odd/deep/same", "/root/odd/again");
symlink("/etc/hosts", "/root/odd/absolute");
symlink("deep/same", "/root/odd/inside");
symlink("../etc/hosts", "/root/odd/above");
sub node { my ($path, $mode, $number) = @_; syscall(133, "$path", $mode, $number) == 0 or fail("mknod: $!") }
node("/root/odd/pipe", 0010644, 0);
node("/root/odd/null", 0020666, 0x103);
chmod(04755, "/root/odd/deep/same");
open(my $sparse, "+>", "/root/odd/sparse"); seek($sparse, 30 << 20, 0); print $sparse "end"; close($sparse);
# Big enough to show that bytes arrive as they are, and made of all of them.
open(my $big, ">", "/space/big"); my $block = join("", map { pack("C*", map { $_ & 255 } $_ .. $_ + 255) } 0 .. 255);
print $big pack("N", $_), $block for 1 .. 320; close($big);
put_file("/bee/b", "btrfs"); put_file("/home/h", "home");
sync_all();
# Only in the journals.
put_file("/root/etc/late", "late\n"); put_file("/space/late", "late\n"); put_file("/home/late", "late\n");
put_file("/bee/late", "late\n");
sync_all();
print STDERR "PB-MADE\n";
sleep 100;
"""


def big() -> bytes:
    """What the script writes into /space/big."""
    block = b"".join(bytes((value + more) & 255 for more in range(256)) for value in range(256))
    return b"".join(number.to_bytes(4, "big") + block for number in range(1, 321))


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """vda: a system in partitions; vdb: btrfs; vdc: logical volumes. Cut off while mounted."""
    place = tmp_path_factory.mktemp("d")
    parts = [("EFI", S, 32 * S), ("root", 33 * S, 128 * S), ("space", 161 * S, 330 * S), ("swap", 492 * S, 8 * S)]
    diskmaker.gpt(place / "vda", VDA, parts)
    diskmaker.make(place, {"vda": VDA, "vdb": VDB, "vdc": VDC}, _SCRIPT)
    yield place
    shutil.rmtree(place)


def drive(path: Path) -> Drive:
    node = {"driver": "file", "filename": str(path), "locking": "off"}
    return Drive(target=path.name, size=path.stat().st_size, node=node)


@dataclass
class Looked:
    """A reader and what it found."""

    machine: Reader
    volumes: tuple[Volume, ...]
    mounts: dict[str, int] = field(default_factory=dict)

    def volume(self, name: str) -> Volume:
        return next(volume for volume in self.volumes if volume.name == name)

    def at(self, name: str) -> int:
        if name not in self.mounts:
            mounted = self.machine.mount(self.volume(name), self.volumes)
            assert mounted.note is None
            self.mounts[name] = mounted.number
        return self.mounts[name]

    def names(self, name: str, path: bytes) -> list[bytes]:
        return sorted(one.name for one in self.machine.list(self.at(name), path) if isinstance(one, entries.Entry))

    def content(self, name: str, path: bytes) -> bytes:
        data = bytearray()
        for item in self.machine.tree(self.at(name), path):
            match item:
                case entries.Data():
                    data += item.data
                case entries.Hole():
                    data += bytes(item.length)
                case entries.Unread():
                    raise AssertionError(item)
        return bytes(data)


def hostile(disks: Path) -> list[Path]:
    """Disks that somebody made to annoy us."""
    chance = random.Random(5)
    made = [disks / name for name in ("noise", "short", "scrambled", "empty")]
    made[0].write_bytes(chance.randbytes(4 * MiB))
    with (disks / "vdb").open("rb") as whole:  # a file system whose end is missing
        made[1].write_bytes(whole.read(24 * MiB))
    with (disks / "vda").open("rb") as whole:  # an ext4 whose inodes and directories are noise, its superblock good
        whole.seek(33 * S * 512)
        image = bytearray(whole.read(128 * MiB))
    for at in range(1 * MiB, len(image), 64 * 1024):
        image[at : at + 512] = chance.randbytes(512)
    made[2].write_bytes(image)
    made[3].write_bytes(bytes(MiB))
    return made


@pytest.fixture(scope="module")
def looked(disks: Path) -> Iterator[Looked]:
    """One reader for all: the disks, and hostile ones beside them."""
    place = disks / "r"
    place.mkdir()
    paths = [disks / name for name in ("vda", "vdb", "vdc")] + hostile(disks)
    with reader.start(diskmaker.reader(), [drive(path) for path in paths], place, Cancel()) as machine:
        yield Looked(machine, machine.scan())


# -- what is there ---------------------------------------------------------------------------


def test_all_volumes_are_found_with_what_is_on_them(looked: Looked) -> None:
    found = {volume.name: (volume.content, volume.label, volume.size) for volume in looked.volumes}
    assert {name: found[name] for name in ("vda1", "vda2", "vda3", "vdb", "box-0/home", "box-0/windows")} == {
        "vda1": ("vfat", "ESP", 32 * MiB),
        "vda2": ("ext4", "rootfs", 128 * MiB),
        "vda3": ("xfs", "space", 330 * MiB),
        "vdb": ("btrfs", "bee", VDB),
        "box-0/home": ("ext3", None, 64 * MiB),
        "box-0/windows": ("ntfs", "C", 32 * MiB),
    }
    assert volumes.closed(looked.volume("vda")) == "partitions (gpt)"
    assert volumes.closed(looked.volume("vda4")) == "swap space"
    assert volumes.closed(looked.volume("vdc")) == "part of a volume group"
    assert volumes.closed(looked.volume("noise")) == "nothing that is known"
    assert looked.volume("vda2").part_label == "root"


def test_every_file_system_is_read_and_its_journal_is_replayed(looked: Looked) -> None:
    assert looked.content("vda1", "/EFI/Grüße und so weiter.txt".encode()) == b"vfat\n"
    assert looked.content("vda2", b"/etc/hosts") == b"127.0.0.1 localhost\n"
    assert looked.content("vda2", b"/etc/late") == b"late\n"
    assert looked.content("vda3", b"/late") == b"late\n"
    assert looked.content("vdb", b"/b") == b"btrfs"
    assert looked.content("vdb", b"/late") == b"late\n"
    assert looked.content("box-0/home", b"/late") == b"late\n"
    assert b"$MFT" in looked.names("box-0/windows", b"/") or looked.names("box-0/windows", b"/") == []


def test_bytes_arrive_as_they_are_and_fast(looked: Looked) -> None:
    begun = time.monotonic()
    assert looked.content("vda3", b"/big") == big()
    assert time.monotonic() - begun < 20  # 20 MiB, in a second on an idle machine
    assert looked.content("vda2", b"/odd/sparse") == bytes(30 * MiB) + b"end"


def test_names_are_bytes(looked: Looked) -> None:
    names = looked.names("vda2", b"/odd")
    assert {b"a\nb\x1b[31m", b"\xff\xfe", b"n" * 255} < set(names)
    assert looked.content("vda2", b"/odd/\xff\xfe") == b"bytes"
    assert looked.content("vda2", b"/odd/a\nb\x1b[31m") == b"control"


def test_paths_stay_in_their_file_system(looked: Looked) -> None:
    assert looked.content("vda2", b"/odd/absolute") == b"127.0.0.1 localhost\n"
    assert looked.content("vda2", b"/../../odd/../etc/hosts") == b"127.0.0.1 localhost\n"
    for path in (b"/init", b"/programs/read.pl", b"/odd/../../init"):
        with pytest.raises(errors.NoSuchFile):
            looked.content("vda2", path)
    with pytest.raises(errors.NoSuchFile):
        looked.content("vda2", b"/etc/hosts/x")


def test_a_tree_is_fetched_as_it_is(looked: Looked, tmp_path: Path) -> None:
    items = looked.machine.tree(looked.at("vda2"), b"/odd")
    taken = taking.into_directory(items, taking.begun(items, "/odd"), tmp_path / "odd", lambda done: None)
    out = tmp_path / "odd"
    assert sorted(os.listdir(os.fsencode(out))) == sorted(
        [b"a\nb\x1b[31m", b"\xff\xfe", b"n" * 255, b"deep", b"again", b"inside", b"sparse"]
    )
    assert (out / "again").samefile(out / "deep/same")
    assert (out / "deep/same").stat().st_mode & 0o7777 == 0o755
    assert os.readlink(out / "inside") == "deep/same"
    assert (out / "sparse").stat().st_blocks * 512 < MiB
    left = {one.path: one.reason for one in taken.left_out}
    assert set(left) == {b"absolute", b"above", b"pipe", b"null"}
    assert left[b"null"] == "a character device"


def test_a_path_alone_is_the_guests_own(looked: Looked) -> None:
    known = [volume for volume in looked.volumes if volume.name[:3] in ("vda", "vdb", "vdc", "box")]
    root = roots.compose(looked.machine, known, path="/", point="x")
    places = {where: volume.name for where, volume in root.places}
    assert places == {"/": "vda2", "/home": "box-0/home", "/srv": "vda3"}
    assert [note for note in root.notes if "/gone" in note]
    looked.mounts["root"] = root.number
    assert looked.content("root", b"/home/h") == b"home"
    assert b"big" in looked.names("root", b"/srv")


# -- hostile ---------------------------------------------------------------------------------


def test_a_damaged_disk_is_an_error_and_no_end(looked: Looked) -> None:
    with pytest.raises(errors.VolumeUnreadable, match="nothing that is known"):
        looked.at("noise")
    with pytest.raises(errors.VolumeUnreadable, match="short"):
        looked.at("short")
    with pytest.raises(errors.VolumeUnreadable, match="nothing that is known"):
        looked.at("empty")
    with contextlib.suppress(errors.VolumeUnreadable, errors.FileUnreadable):
        number = looked.machine.mount(looked.volume("scrambled"), looked.volumes).number
        assert len(list(looked.machine.tree(number, b"/"))) < 1000
    assert looked.content("vda2", b"/etc/hosts") == b"127.0.0.1 localhost\n"  # the reader lives


# -- the command -----------------------------------------------------------------------------


@dataclass
class Kept:
    """A restore point of the disks."""

    directory: Path
    kind: str

    def cli(self, *words: object) -> subprocess.CompletedProcess[str]:
        environ = {"PULLBACK_PASSWORD_FILE": str(kit.password_file(self.directory))}
        place = kit.place_of(self.directory / "repo", self.kind).url
        return kit.run_cli("files", "latest", *words, "-r", place, state=self.directory / "state", environ=environ)

    def left(self) -> list[Path]:
        """Runtime files."""
        return list((self.directory / "state/run").glob("*"))


def keep(place: Path, kind: str, disks: Path) -> Kept:
    """The disks in a repository."""
    if kind == "restic":
        kit.make_repository(place / "repo", place / "cache" / "repositories")
    images = ",".join(f"{name}=raw:{disks / name}" for name in ("vda", "vdb", "vdc"))
    wish = backup_flow.Request(
        machine=urls.machine(f"images:{images}"),
        repository=kit.place_of(place / "repo", kind),
        access=kit.access_of(place),
        name="web01",
        directories=state.directories(place / "state"),
    )
    asyncio.run(backup_flow.backup(wish))
    return Kept(place, kind)


@pytest.fixture(scope="module")
def plain(disks: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """In a `dir:` repository."""
    return keep(tmp_path_factory.mktemp("k"), "dir", disks)


@pytest.fixture(scope="module")
def restic(disks: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """In one of restic's format."""
    return keep(tmp_path_factory.mktemp("k"), "restic", disks)


@pytest.fixture
def unprivileged() -> list[str]:
    """Words that run a command as nobody."""
    return ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]


def test_names_do_nothing_to_a_terminal(plain: Kept) -> None:
    listed = plain.cli("ls", "vda2:/odd", "--trust")
    assert listed.returncode == 0, listed.stderr
    assert "a\\u000ab\\u001b[31m" in listed.stdout
    assert "\x1b" not in listed.stdout


@pytest.mark.slow
def test_a_directory_becomes_an_archive(restic: Kept, tmp_path: Path) -> None:
    done = restic.cli("get", "/etc", "--to", tmp_path / "etc.tar")
    assert done.returncode == 0, done.stderr
    assert "/gone is not shown" in done.stderr
    with tarfile.open(tmp_path / "etc.tar") as archive:
        late = archive.extractfile("etc/late")
        assert late is not None
        assert late.read() == b"late\n"


def test_nobody_need_be_root(plain: Kept, short_dir: Path, unprivileged: list[str]) -> None:
    """Another user, who can read the repository and nothing else, gets a file."""
    home, out = short_dir / "home", short_dir / "out"
    for place in (home, out):
        place.mkdir()
        os.chown(place, 65534, 65534)
    short_dir.chmod(0o755)
    shutil.copytree(plain.directory / "repo", home / "repo")
    for path in (home / "repo", *(home / "repo").rglob("*")):
        os.chown(path, 65534, 65534)
    words = [sys.executable, "-m", "pullback.cli.main", "files", "latest", "get", "vda3:/big"]
    words += ["--to", str(out), "-r", f"dir:{home / 'repo'}"]
    environ = {"HOME": str(home), "PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(home / "run")}
    environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PULLBACK_GUEST_CACHE": str(diskmaker.guest_cache())}
    done = subprocess.run(
        [*unprivileged, *words], capture_output=True, text=True, timeout=100, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (out / "big").read_bytes() == big()
    assert (out / "big").stat().st_uid == 65534


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("get", "vda9:/x", "--trust"), "unknown-volume"),
        (("get", "vda2:/nothing", "--trust"), "no-such-file"),
        (("get", "vda4:/x", "--trust"), "volume-unreadable"),
        (("get",), "usage"),
        (("get", "vda2:/x", "--to", "-"), "usage"),
    ],
)
def test_what_is_wrong_is_said(plain: Kept, tmp_path: Path, words: tuple[str, ...], code: str) -> None:
    to = () if "--to" in words else ("--to", tmp_path / "x")
    done = plain.cli(*words, *to, "--json")
    assert done.stdout, done.stderr
    assert kit.last_json(done.stdout)["code"] == code
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGKILL, -signal.SIGKILL), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_who_is_ended_leaves_nothing(restic: Kept, tmp_path: Path, signum: int, status: int) -> None:
    environ = os.environ | {
        "PULLBACK_STATE_DIR": str(restic.directory / "state"),
        "PULLBACK_PASSWORD_FILE": str(kit.password_file(restic.directory)),
    }
    words = [sys.executable, "-m", "pullback.cli.main", "files", "latest", "get", "vda3:/"]
    words += ["-r", str(restic.directory / "repo"), "--to", str(tmp_path / "out")]
    running = subprocess.Popen(words, env=environ)
    try:
        machine = _child_of(running.pid, "qemu-system")
        time.sleep(0.5)
        running.send_signal(signum)
        assert running.wait(30) == status
    finally:
        running.kill()
        running.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{machine}").exists():
        assert time.monotonic() < deadline, "QEMU lives on"
        time.sleep(0.05)
    assert os.listdir(tmp_path) == []
    if signum == signal.SIGTERM:  # after the other one, whose runtime files went at this one's start
        assert restic.left() == []


def _child_of(pid: int, name: str) -> int:
    """The process below `pid` whose program begins so."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        listing = subprocess.run(
            ["ps", "-e", "-o", "pid=,ppid=,comm="], capture_output=True, text=True, timeout=20, check=True
        )
        rows = [line.split(None, 2) for line in listing.stdout.splitlines()]
        below = {str(pid)}
        for _ in range(4):
            below |= {row[0] for row in rows if row[1] in below}
        for row in rows:
            if row[0] in below and row[2].startswith(name):
                return int(row[0])
        time.sleep(0.05)
    raise AssertionError(f"no {name} below {pid}")


def test_a_host_that_trusts_reads_the_same(restic: Kept, tmp_path: Path) -> None:
    done = restic.cli("get", "vda2:/odd", "--trust", "--to", tmp_path / "odd")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "odd/deep/same").read_bytes() == b"several names"
    assert "journal of vda2 was not replayed" in done.stderr
    loops = subprocess.run(["losetup", "--all"], capture_output=True, text=True, timeout=20, check=True).stdout
    assert str(restic.directory) not in loops
    result = kit.last_json(restic.cli("ls", "--trust", "--json").stdout)
    closed = {volume["name"]: volume["closed"] for volume in result["volumes"]}
    assert (closed["vda2"], closed["vda4"], closed["vdc"]) == (None, "swap space", "part of a volume group")
    assert restic.left() == []


def test_the_reader_is_built_without_what_a_distribution_lacks() -> None:
    small = diskmaker.reader()
    assert {"ext4", "xfs", "btrfs", "dm_mod"} <= small.drivers
    assert {"lvm", "xfs_repair", "btrfs", "fsck.fat"} <= small.programs
    assert build.ready(small.kernel.parent.parent, recipe=build.READER) == small
