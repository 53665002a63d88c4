"""Disks with file systems of all kinds, made by a real kernel in a machine of its own: no root, no mount on the host.

The machine is the reader's kernel and initramfs, with an archive behind it: programs that make file systems, and a
script of Perl that runs in place of /init. It is killed when the script says so, with everything mounted: journals
are left as a snapshot of a running machine has them.
"""

from __future__ import annotations

import binascii
import os
import struct
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from pullback.guest import build, cpio, packages
from pullback.guest.console import Console
from pullback.programs import qemu
from pullback.units import MiB

_SECTOR = 512
_PROGRAMS = ("mke2fs", "mkfs.xfs", "mkfs.btrfs", "mkfs.vfat", "mkntfs", "mkswap", "lvm")
_PRELUDE = r"""#!/bin/perl
$ENV{PATH} = "/bin";
our $LVM;
sub mounted {
    my ($what, $where, $flags, $data) = (@_, 0, "");
    mkdir $where;
    syscall(165, "$what", "$where", "$what", $flags, $data);
}
mounted("proc", "/proc"); mounted("sysfs", "/sys"); mounted("devtmpfs", "/dev");
mounted("tmpfs", "/run"); mounted("tmpfs", "/tmp");
mkdir("/etc");
require "/programs/read.pl";
opendir(my $modules, "/modules");
insert("/modules/$_") for sort grep { /\.ko$/ } readdir($modules);
sub fail { print STDERR "PB-FAILED @_\n"; sleep 100 }
sub run {
    my (@words) = @_;
    my $text = "";
    open(my $output, "-|") or (open(STDERR, ">&", \*STDOUT), exec(@words), exit(127));
    $text .= $_ while <$output>;
    close($output);
    fail("@words: $text") if $?;
}
sub attach {
    my ($device, $where, $type, $options) = @_;
    drivers($_) for $type, $type eq "vfat" ? ("nls_cp437", "nls_ascii", "nls_utf8") : ();
    mkdir $where;
    my ($flags, $data) = (0, $options // "");
    syscall(165, "$device", "$where", "$type", $flags, $data) == 0 or fail("mount $device: $!");
}
sub detach { syscall(166, "$_[0]", 0) == 0 or fail("umount $_[0]: $!") }
sub put_file {
    my ($path, @data) = @_;
    open(my $file, ">", $path) or fail("$path: $!");
    print $file @data;
    close $file or fail("$path: $!");
}
sub sync_all { syscall(162) }
"""


def guest_cache() -> Path:
    """Where small guests are kept for tests."""
    return Path(os.environ.get("PULLBACK_GUEST_CACHE", build.CACHE))


def reader() -> build.SmallGuest:
    """The reader, from the usual cache."""
    return build.guest(guest_cache(), recipe=build.READER)


def make(directory: Path, images: Mapping[str, int], script: str) -> None:
    """Make raw images (file names in `directory` to sizes) and run `script` on them: /dev/vda, /dev/vdb, …"""
    small = reader()
    root = packages.Root(path=max(guest_cache().glob("packages-*"), key=lambda path: path.stat().st_mtime))
    programs = {name: f"bin/{name}" for name in _PROGRAMS}
    more = [*build.foreign_programs(root, programs), cpio.file("maker", (_PRELUDE + script).encode(), executable=True)]
    initrd = directory / "maker.initrd"
    initrd.write_bytes(small.initrd.read_bytes() + cpio.archive(more))
    disks: list[qemu.Disk] = []
    for name, size in images.items():
        path = directory / name
        if not path.exists():
            path.touch()
        with path.open("r+b") as file:
            file.truncate(size)
        disks.append(qemu.Disk(id=f"d{len(disks)}", path=path, format="raw"))
    log = directory / "maker.log"
    machine = qemu.Machine(
        kernel=small.kernel,
        initrd=initrd,
        cmdline="console=ttyS0 quiet loglevel=1 rdinit=/maker random.trust_cpu=on",
        memory=512 * MiB,
        disks=disks,
        serial=log,
    )
    with qemu.start(machine) as running:
        console = Console(log, lambda: running.returncode is None)
        console.wait_for_line("^PB-MADE", 120)
        running.kill()
    initrd.unlink()


def gpt(path: Path, size: int, parts: Sequence[tuple[str, int, int]]) -> None:
    """A new disk with a partition table: (name, first sector, sectors) each."""
    sectors = size // _SECTOR
    kind = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4").bytes_le
    table = bytearray(128 * 128)
    for number, (name, first, count) in enumerate(parts):
        own = uuid.uuid5(uuid.NAMESPACE_URL, f"part{number}").bytes_le
        record = kind + own + struct.pack("<QQQ", first, first + count - 1, 0) + name.encode("utf-16-le")
        table[number * 128 : number * 128 + len(record)] = record
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(446)
        file.write(struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, sectors - 1))
        file.seek(510)
        file.write(b"\x55\xaa")
        for here, there, entries in ((1, sectors - 1, 2), (sectors - 1, 1, sectors - 33)):
            file.seek(entries * _SECTOR)
            file.write(table)
            file.seek(here * _SECTOR)
            file.write(_gpt_header(here, there, entries, sectors, bytes(table)))


def _gpt_header(here: int, there: int, entries: int, sectors: int, table: bytes) -> bytes:
    disk = uuid.uuid5(uuid.NAMESPACE_URL, "disk").bytes_le
    rest = struct.pack("<QQQQ16sQIII", here, there, 34, sectors - 34, disk, entries, 128, 128, binascii.crc32(table))
    head = b"EFI PART" + struct.pack("<II", 0x10000, 92)
    return head + struct.pack("<II", binascii.crc32(head + bytes(8) + rest), 0) + rest
