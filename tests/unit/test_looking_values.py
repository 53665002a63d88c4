"""Looking into disks, without a disk: what a reader may say, paths, fstab, and what is written on the host."""

from __future__ import annotations

import io
import os
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pullback import errors
from pullback.guest import entries, fstab, taking, volumes, wire
from pullback.guest.entries import Data, Entry, Hole, Item, Type, Unread, Up, Whole
from pullback.model import filepaths
from pullback.model.filepaths import FilePath


def entry(name: bytes, type: Type = Type.FILE, **facts: Any) -> Entry:
    values: dict[str, Any] = {
        "mode": 0o644, "uid": 0, "gid": 0, "size": 0, "changed": 1_700_000_000, "links": 1, "node": 0,
    }  # fmt: skip
    return Entry(type=type, name=name, **(values | facts))


def file(name: bytes, data: bytes, **facts: Any) -> list[Item]:
    return [entry(name, size=len(data), **facts), *([Data(data=data)] if data else []), Whole()]


def directory(name: bytes, *inside: list[Item], **facts: Any) -> list[Item]:
    return [entry(name, Type.DIRECTORY, mode=0o755, **facts), *(item for items in inside for item in items), Up()]


# -- the wire --------------------------------------------------------------------------------


def frame(kind: bytes, *fields: bytes) -> bytes:
    data = b"\0".join(fields)
    return len(data).to_bytes(4, "big") + kind + data


def heard(*data: bytes, seconds: float = 5) -> list[wire.Frame]:
    """What a channel makes of these bytes, as the answer to a question."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = wire.Channel(ours, alive=lambda: None)

        def speak() -> None:
            theirs.sendall(b"".join(data))
            theirs.shutdown(socket.SHUT_WR)

        speaker = threading.Thread(target=speak)
        speaker.start()
        try:
            return list(channel.ask("scan", seconds=seconds))
        finally:
            speaker.join()


def test_an_answer_ends_with_its_last_frame() -> None:
    found = heard(frame(b"D", b"x" * 300_000), frame(b".", b"1", b"2"), frame(b"D", b"later"))
    assert [(one.kind, len(one.data)) for one in found] == [("D", 300_000), (".", 3)]


def test_a_no_has_its_reason_without_control_characters() -> None:
    with pytest.raises(wire.Refused, match=r"^\\u001b\[2Jgone$") as refused:
        heard(frame(b"!", b"2", b"\x1b[2Jgone"))
    assert refused.value.number == 2


@pytest.mark.parametrize(
    "data",
    [
        (wire.MAX_FRAME + 1).to_bytes(4, "big") + b"D",
        frame(b"!", b"x", b"text"),
        frame(b"!", b"-5", b"text"),
        frame(b"!", b"99999999999999999999", b"text"),
        frame(b"!", b"1"),
    ],
    ids=["too long", "no number", "negative", "too large", "too few fields"],
)
def test_what_the_protocol_does_not_allow_is_refused(data: bytes) -> None:
    with pytest.raises(errors.BadReply):
        heard(data)


def test_an_end_in_the_middle_and_silence_are_errors() -> None:
    with pytest.raises(errors.ProgramFailed, match="it ended"):
        heard(frame(b"D", b"abc")[:-1])
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(errors.ProgramFailed, match=r"nothing for 0\.2 s"):
        list(wire.Channel(ours, alive=lambda: None).ask("scan", seconds=0.2))


def test_who_waits_is_ended_by_what_it_looks_at() -> None:
    def alive() -> None:
        raise errors.Interrupted

    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(errors.Interrupted):
        list(wire.Channel(ours, alive=alive).ask("scan", seconds=60))


# -- volumes ---------------------------------------------------------------------------------


def told(kind: str, *fields: bytes, facts: bytes = b"") -> volumes.Volume:
    return volumes.parse(wire.Frame(kind="V", data=b"\0".join([kind.encode(), *fields, facts])), ["vda", "nvme0n1"])


def test_volumes_are_called_as_linux_calls_them() -> None:
    assert told("disk", b"/dev/vda", b"0", b"0", b"512", b"").name == "vda"
    assert told("part", b"/dev/vdb2", b"1", b"2", b"512", b"").name == "nvme0n1p2"
    assert told("part", b"/dev/vda12", b"0", b"12", b"512", b"").name == "vda12"
    found = told("lv", b"/dev/mapper/vg-root", b"0", b"0", b"512", b"vg/root", facts=b"ID_FS_TYPE=ext4\n")
    assert (found.name, found.kind, found.content) == ("vg/root", volumes.Kind.LOGICAL, "ext4")
    assert told("lv", b"", b"0", b"0", b"512", b"vg/thin").key is None


def test_labels_are_texts_that_do_nothing() -> None:
    facts = (
        b"ID_FS_TYPE=ext4\nID_FS_LABEL_ENC=my\\x20disk\\x1b[31m\\xff\nID_FS_UUID_ENC=../../etc\nID_PART_ENTRY_NAME=EFI"
    )
    found = told("disk", b"/dev/vda", b"0", b"0", b"512", b"", facts=facts)
    assert (found.label, found.uuid, found.part_label) == ("my disk\\u001b[31m\ufffd", None, "EFI")


@pytest.mark.parametrize(
    "fields",
    [
        (b"disk", b"/dev/vda", b"2", b"0", b"512", b""),
        (b"part", b"/dev/vda1", b"0", b"0", b"512", b""),
        (b"part", b"/etc/shadow", b"0", b"1", b"512", b""),
        (b"part", b"/dev/../etc/shadow", b"0", b"1", b"512", b""),
        (b"lv", b"/dev/mapper/x", b"0", b"0", b"512", b"vg/../x y"),
        (b"tape", b"/dev/st0", b"0", b"0", b"512", b""),
        (b"disk", b"/dev/vda", b"0", b"0", b"-1", b""),
    ],
)
def test_volumes_that_cannot_be_are_refused(fields: tuple[bytes, ...]) -> None:
    with pytest.raises(errors.BadReply):
        told(fields[0].decode(), *fields[1:])


def test_each_volume_is_mounted_in_its_ways_or_says_why_not() -> None:
    having = frozenset({"ext4", "ntfs-3g", "btrfs"})
    disk = volumes.Volume(name="vda", kind=volumes.Kind.DISK, key=b"/dev/vda", size=1, content="ext3")
    assert [way.options for way in volumes.ways(disk, having)] == ["errors=continue", "noload,errors=continue"]
    several = [
        volumes.Volume(name=name, kind=disk.kind, key=b"/dev/" + name.encode(), size=1, content="btrfs", uuid=uuid)
        for name, uuid in (("vda", "aaaa"), ("vdb", "aaaa"), ("vdc", "bbbb"))
    ]
    assert volumes.ways(several[0], having, together=several)[0].options == "device=/dev/vda,device=/dev/vdb"
    assert volumes.ways(several[2], having, together=several)[0].options == ""
    closed = {
        content: volumes.closed(replaced(disk, content)) for content in ("swap", "crypto_LUKS", "zfs_member", None)
    }
    assert closed["swap"] == "swap space"
    assert "encrypted" in closed["crypto_LUKS"]
    assert volumes.ways(replaced(disk, "xfs"), having) == ()
    assert closed[None] == "nothing that is known"


def replaced(volume: volumes.Volume, content: str | None) -> volumes.Volume:
    from dataclasses import replace

    return replace(volume, content=content)


# -- paths and fstab -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "volume", "path", "name"),
    [
        ("/etc/hosts", None, b"/etc/hosts", b"hosts"),
        ("/", None, b"/", b"root"),
        ("vda1:/etc/hosts", "vda1", b"/etc/hosts", b"hosts"),
        ("vda1:etc", "vda1", b"/etc", b"etc"),
        ("vda2", "vda2", b"/", b"vda2"),
        ("vg/root:/srv/a:b", "vg/root", b"/srv/a:b", b"a:b"),
        ("vg/root", "vg/root", b"/", b"vg-root"),
        ("nvme0n1p3:/x/..", "nvme0n1p3", b"/x/..", b"nvme0n1p3"),
        ("vda1:/\udcff", "vda1", b"/\xff", b"\xff"),
    ],
)
def test_a_path_says_the_volume_or_is_the_guests_own(text: str, volume: str | None, path: bytes, name: bytes) -> None:
    found = filepaths.parse(text)
    assert (found, found.name) == (FilePath(volume=volume, path=path), name)


@pytest.mark.parametrize("text", [":/etc", "a/b/c", "../x", "vda 1:/x", "/" + "x" * 5000, "etc\n"])
def test_what_is_no_path_is_refused(text: str) -> None:
    if text == "../x":
        assert filepaths.parse(text).volume == "../x"  # a volume that is nowhere; it is never a path of the host
        return
    with pytest.raises(errors.UsageError):
        filepaths.parse(text)


FSTAB = b"""\
# a comment
UUID=AAAA-1 / ext4 defaults 0 1
/dev/vg/home /home ext4 defaults 0 2
LABEL=my\\040data /srv/da\\040ta xfs nofail 0 2
UUID=bbbb /var btrfs subvol=@var,compress=zstd 0 0
UUID=aaaa-1 swap swap sw 0 0
tmpfs /tmp tmpfs size=1G 0 0
server:/x /net nfs ro 0 0
/dev/sr0 /cdrom iso9660 noauto 0 0
/srv /mnt none bind 0 0
LABEL=x relative ext4
LABEL=x /a/../../etc ext4
broken
"""


def test_fstab_tells_what_is_where() -> None:
    found = {line.where: (line.what, line.subvolume) for line in fstab.parse(FSTAB)}
    assert found == {
        "/": ("UUID=AAAA-1", ""),
        "/home": ("/dev/vg/home", ""),
        "/srv/da ta": ("LABEL=my data", ""),
        "/var": ("UUID=bbbb", "subvol=@var"),
    }
    assert next(iter(found)) == "/"
    assert fstab.parse(os.urandom(5000)) is not None
    assert len(fstab.parse(b"".join(b"/dev/vda /x%d ext4\n" % number for number in range(9999)))) == fstab.MAX_LINES


def test_a_volume_is_found_by_every_name_that_linux_has_for_it() -> None:
    home = volumes.Volume(
        name="vg-0/home", kind=volumes.Kind.LOGICAL, key=b"/dev/x", size=1, uuid="aaaa-1", label="h", part_uuid="p-1"
    )
    root = volumes.Volume(name="vda1", kind=volumes.Kind.PARTITION, key=b"/dev/y", size=1, uuid="cccc", label="twice")
    other = volumes.Volume(name="vda2", kind=volumes.Kind.PARTITION, key=b"/dev/z", size=1, label="twice")
    known = [home, root, other]
    for what in ("UUID=AAAA-1", 'UUID="aaaa-1"', "LABEL=h", "PARTUUID=P-1", "/dev/vg-0/home", "/dev/mapper/vg--0-home",
                 "/dev/disk/by-uuid/aaaa-1", "/dev/disk/by-label/h"):  # fmt: skip
        assert fstab.volume(what, known) is home, what
    assert fstab.volume("/dev/vda1", known) is root
    for what in ("LABEL=twice", "UUID=", "UUID=dddd", "/dev/vdz", "vda1", "PARTLABEL=x"):
        assert fstab.volume(what, known) is None, what


# -- the order of an answer ------------------------------------------------------------------


def test_names_that_lead_elsewhere_are_refused() -> None:
    for name in (b"", b".", b"..", b"a/b", b"/etc", b"x" * 2000):
        fields = [b"f", b"420", b"0", b"0", b"0", b"0", b"1", b"0", name, b"", b"0"]
        with pytest.raises(errors.BadReply):
            entries.parse(wire.Frame(kind="E", data=b"\0".join(fields)))
    with pytest.raises(errors.BadReply):
        entries.parse(wire.Frame(kind="E", data=b"f\x00511"))
    with pytest.raises(errors.BadReply):
        entries.parse(wire.Frame(kind="Q", data=b""))


@pytest.mark.parametrize(
    "items",
    [
        [Data(data=b"x")],
        [entry(b"a", size=1), Data(data=b"xy"), Whole()],
        [entry(b"a", size=2), Data(data=b"x"), Whole()],
        [entry(b"a", size=2), Hole(length=1 << 62)],
        [entry(b"a", size=2), entry(b"b")],
        [entry(b"a", size=2), Data(data=b"x")],
        [entry(b"a", Type.DIRECTORY)],
        [entry(b"a", Type.DIRECTORY), Up(), Up()],
        [entry(b"a", Type.DIRECTORY), entry(b"b", size=1), Up()],
        [entry(b"a", same=1)],
        [*file(b"a", b""), *file(b"b", b"")],
        [Whole()],
    ],
)
def test_an_answer_out_of_order_is_refused(items: list[Item]) -> None:
    with pytest.raises(errors.BadReply):
        list(entries.files(iter(items)))


# -- written on the host ---------------------------------------------------------------------


def taken(place: Path, items: list[Item]) -> taking.Taken:
    checked = entries.files(iter(items))
    return taking.into_directory(checked, taking.begun(checked, "x"), place, lambda done: None)


def test_a_tree_is_written_as_it_is(tmp_path: Path) -> None:
    odd = b"\xff\nodd \x1b[31m"
    big = os.urandom(100_000)
    items = directory(
        b".",
        directory(b"d", file(odd, b"odd"), file(b"set", b"s", mode=0o4755), file(b"same", big, links=2)),
        [entry(b"again", size=len(big), same=5, links=2)],
        [entry(b"sparse", size=10_000_000), Hole(length=9_000_000), Data(data=b"x" * 1_000_000), Whole()],
        [entry(b"up", Type.LINK, target=b"d/same"), entry(b"fine", Type.LINK, target=b"./d/set")],
        file(b"empty", b""),
    )
    found = taken(tmp_path / "out", items)
    out = tmp_path / "out"
    assert (found.files, found.directories, found.links, found.left_out, found.unread) == (6, 2, 2, [], [])
    assert (out / "d" / os.fsdecode(odd)).read_bytes() == b"odd"
    assert (out / "d/set").stat().st_mode & 0o7777 == 0o755
    assert (out / "again").samefile(out / "d/same")
    assert (out / "again").read_bytes() == big
    assert (out / "sparse").stat().st_size == 10_000_000
    assert (out / "sparse").stat().st_blocks * 512 < 2_000_000
    assert os.readlink(out / "up") == "d/same"
    assert (out / "d/set").stat().st_mtime == 1_700_000_000
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_gets_out_of_the_place(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    items = directory(
        b".",
        [entry(b"absolute", Type.LINK, target=os.fsencode(outside))],
        [entry(b"up", Type.LINK, target=b"../outside")],
        [entry(b"around", Type.LINK, target=b"d/../../outside")],
        [
            entry(b"d", Type.DIRECTORY),
            entry(b"one", Type.LINK, target=b".."),
            entry(b"two", Type.LINK, target=b"../.."),
            Up(),
        ],
        [entry(b"nothing", Type.LINK, target=b"")],
        # A directory in the place of the link that was just made: it must not be entered through it.
        [entry(b"twice", Type.LINK, target=b"d"), *directory(b"twice", file(b"x", b"x"))],
        [entry(b"dev", Type.BLOCK_DEVICE), entry(b"tty", Type.CHARACTER_DEVICE), entry(b"p", Type.PIPE)],
        [entry(b"s", Type.SOCKET), entry(b"?", Type.UNKNOWN)],
        [entry(b"of-none", size=3, same=2, links=2)],
    )
    found = taken(tmp_path / "out", items)
    assert outside.read_text() == "mine"
    assert sorted(os.listdir(tmp_path / "out")) == ["d", "twice"]
    assert os.listdir(tmp_path / "out/d") == ["one"]
    assert found.left_out_count == 12
    assert os.path.islink(tmp_path / "out/twice")


def test_what_cannot_be_read_is_told_and_the_rest_is_there(tmp_path: Path) -> None:
    items = directory(
        b".",
        [entry(b"bad", size=9, links=2), Data(data=b"abc"), Unread(path=b"./bad", reason="I/O error")],
        [entry(b"bad2", size=9, links=2, same=2)],
        [Unread(path=b"./gone", reason="I/O error")],
        file(b"good", b"good"),
    )
    found = taken(tmp_path / "out", items)
    assert os.listdir(tmp_path / "out") == ["good"]
    assert [(one.path, one.reason) for one in found.unread] == [(b"bad", "I/O error"), (b"./gone", "I/O error")]
    assert found.unread_count == 2
    assert found.left_out_count == 1


def test_a_failure_leaves_nothing_and_an_old_wreck_goes(tmp_path: Path) -> None:
    def broken() -> Iterator[Item]:
        yield from directory(b".", file(b"a", b"a"))[:-1]
        raise errors.Interrupted

    place = tmp_path / "out"
    wreck = tmp_path / ".out.partial"
    (wreck / "sub").mkdir(parents=True)
    items = broken()
    with pytest.raises(errors.Interrupted):
        taking.into_directory(items, taking.begun(items, "x"), place, lambda done: None)
    assert os.listdir(tmp_path) == []
    place.mkdir()
    with pytest.raises(errors.DestinationExists):
        taken(place, directory(b"."))


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "f"

    def take(items: list[Item], *, force: bool = False) -> None:
        checked = entries.files(iter(items))
        first = taking.begun(checked, "/f")
        taking.into_file(checked, first, place, "/f", lambda done: None, force=force)

    with pytest.raises(errors.FileUnreadable):
        take([entry(b"/f", size=3), Data(data=b"ab"), Unread(path=b"/f", reason="I/O error")])
    assert os.listdir(tmp_path) == []
    take([entry(b"/f", size=4, mode=0o6711), Data(data=b"ab"), Hole(length=2), Whole()])
    assert place.read_bytes() == b"ab\0\0"
    assert place.stat().st_mode & 0o7777 == 0o711
    with pytest.raises(errors.DestinationExists):
        take(file(b"/f", b"new"))
    take(file(b"/f", b"new"), force=True)
    assert place.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


def test_an_archive_has_all_and_zeroes_for_what_cannot_be_read() -> None:
    odd = b"\xff odd"
    items = directory(
        b".",
        file(b"a", b"a" * 5000, links=2, mode=0o4755),
        [entry(b"b", size=5000, same=2, links=2)],
        [entry(b"bad", size=3000), Data(data=b"x" * 1000), Unread(path=b"./bad", reason="I/O error")],
        [entry(b"hole", size=3_000_000), Hole(length=3_000_000), Whole()],
        directory(odd, file(b"empty", b"")),
        [entry(b"link", Type.LINK, target=b"/etc/passwd"), entry(b"tty", Type.CHARACTER_DEVICE)],
    )
    out = io.BytesIO()
    checked = entries.files(iter(items))
    found = taking.into_archive(checked, taking.begun(checked, "x"), out, b"top", lambda done: None)
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        members = {os.fsencode(member.name): member for member in archive}
        assert sorted(members) == sorted(
            [b"top", b"top/a", b"top/b", b"top/bad", b"top/hole", b"top/" + odd, b"top/" + odd + b"/empty", b"top/link"]
        )
        content = archive.extractfile(members[b"top/bad"])
        assert content is not None
        assert content.read() == b"x" * 1000 + bytes(2000)
        assert members[b"top/b"].islnk()
        assert (members[b"top/a"].mode, members[b"top/hole"].size) == (0o4755, 3_000_000)
        assert members[b"top/link"].linkname == "/etc/passwd"
    assert (found.unread_count, found.left_out_count, found.files) == (1, 1, 5)


@pytest.mark.parametrize(
    ("target", "depth", "out"),
    [
        (b"a/b", 0, False), (b"../a", 1, False), (b"../a", 0, True), (b"./../../a", 2, False), (b"../../a", 1, True),
        (b"/a", 5, True), (b"a/../b", 5, True), (b"../a/..", 5, True), (b"", 5, True), (b".", 0, False),
        (b"..", 0, True),
    ],
)  # fmt: skip
def test_a_link_leads_out_or_not(target: bytes, depth: int, out: bool) -> None:
    assert taking.leads_out(target, depth) is out
