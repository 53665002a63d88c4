"""The command line and the XML of a machine for another place, and for a copy."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback import errors
from pullback.model import identity, rebuilding
from pullback.model.identity import Identity
from pullback.model.rebuilding import Moved, Places, Rebuilt, rebuild
from pullback.model.rewriting import Properties
from pullback.model.texts import is_showable
from pullback.model.xml import domain

NEW = "/srv/new"
UUID = "11111111-2222-3333-4444-555555555555"


def places(*disks: Moved, firmware: dict[str, str] | None = None, tpm: str | None = None) -> Places:
    """Where things are."""
    return Places(disks=disks, firmware=firmware or {}, tpm=tpm, directory=NEW)


def disk(source: str | None = "/old/a.qcow2", format: str = "raw", **options: object) -> Moved:
    """Disk vda, in the new place."""
    values = {"target": "vda", "source": source, "path": f"{NEW}/vda.{format}", "format": format} | options
    return Moved(**values)  # type: ignore[arg-type]


def one(*words: str, to: Places | None = None, copy: Identity | None = None) -> list[str]:
    """The words after the program's name."""
    return list(rebuild(["qemu", *words], to or places(disk()), copy).words[1:])


def test_words_that_are_nobody_s_stay_as_they_are() -> None:
    words = ["-m", "4G", "-device", '{"a":1}', "-append", "x=1,y", "-S", "-cdrom", "/iso/x.iso"]
    assert one(*words) == words


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("file=/old/a.qcow2,if=virtio,format=qcow2", f"file={NEW}/vda.raw,if=virtio,format=raw"),
        ("file=/old/a.qcow2,if=none,id=d", f"file={NEW}/vda.raw,if=none,id=d,format=raw"),
        ("driver=qcow2,file.filename=/old/a.qcow2", f"driver=raw,file.filename={NEW}/vda.raw"),
        ("file=/old/a.qcow2.bak,if=virtio", "file=/old/a.qcow2.bak,if=virtio"),
        ("if=pflash,file=/old/a.qcow2", "if=pflash,file=/old/a.qcow2"),
    ],
)
def test_a_drive_gets_its_new_path_and_format(word: str, wanted: str) -> None:
    assert one("-drive", word) == ["-drive", wanted]


def test_a_comma_in_a_path_stays_doubled() -> None:
    moved = disk("/old/a,b.raw", path="/srv/x,y.raw")
    assert one("-drive", "file=/old/a,,b.raw,if=virtio", to=places(moved)) == [
        "-drive",
        "file=/srv/x,,y.raw,if=virtio,format=raw",
    ]


def test_block_nodes_get_the_new_path_and_the_format_upon_it_none_of_the_old_one_s_keys() -> None:
    file = '{"driver": "file", "filename": "/old/a.qcow2", "node-name": "f", "locking": "on"}'
    top = '{"driver": "qcow2", "node-name": "q", "file": "f", "discard": "unmap", "l2-cache-size": 1048576}'
    found = one("-blockdev", file, "-blockdev", top)
    assert found[1] == f'{{"driver": "file", "filename": "{NEW}/vda.raw", "node-name": "f", "locking": "on"}}'
    assert found[3] == '{"driver": "raw", "node-name": "q", "file": "f", "discard": "unmap"}'
    nested = "driver=qcow2,node-name=q,file.driver=file,file.filename=/old/a.qcow2"
    wanted = f"driver=raw,node-name=q,file.driver=file,file.filename={NEW}/vda.raw"
    assert one("-blockdev", nested) == ["-blockdev", wanted]


def test_a_block_device_is_one_of_the_host() -> None:
    moved = disk(path="/dev/vg/a", device=True)
    found = one("-blockdev", "driver=file,filename=/old/a.qcow2,node-name=f", to=places(moved))
    assert found[1] == "driver=host_device,filename=/dev/vg/a,node-name=f"


@pytest.mark.parametrize(("source", "path"), [(None, f"{NEW}/vda.raw"), ("/other", f"{NEW}/vda.raw"), ("/x", None)])
def test_a_disk_that_is_not_found_is_told(source: str | None, path: str | None) -> None:
    found = rebuild(["qemu", "-m", "1G"], places(disk(source, path=path)), None)
    assert any("vda" in note for note in found.notes)


def test_images_by_their_short_names() -> None:
    assert one("-hdb", "/old/a.qcow2") == ["-hdb", f"{NEW}/vda.raw"]
    assert one("/old/a.qcow2") == ["-hda", f"{NEW}/vda.raw"]


FLASH = {"pflash0": f"{NEW}/firmware/pflash0.fd", "pflash1": f"{NEW}/firmware/pflash1.fd"}


@pytest.mark.parametrize(
    "words",
    [
        ("-drive", "if=pflash,file=/c,format=raw,readonly=on", "-drive", "if=pflash,file=/v,format=qcow2"),
        ("-drive", "if=pflash,unit=1,file=/v,format=raw", "-drive", "if=pflash,unit=0,file=/c,format=raw"),
        ("-pflash", "/c", "-pflash", "/v"),
        (
            *("-machine", "q35,pflash0=c,pflash1=vraw", "-blockdev", "driver=file,filename=/c,node-name=c"),
            *("-blockdev", "driver=file,filename=/v,node-name=vf", "-blockdev", "driver=qcow2,file=vf,node-name=vraw"),
        ),
    ],
)
def test_flash_memory_gets_its_new_files_in_its_order(words: tuple[str, ...]) -> None:
    found = rebuild(["qemu", *words], places(firmware=FLASH), None)
    text = " ".join(found.words)
    for old, new in (("/c", FLASH["pflash0"]), ("/v", FLASH["pflash1"])):
        at = next(number for number, word in enumerate(words) if old in word)
        assert new in found.words[at + 1], text
    assert found.notes == ()
    assert "qcow2" not in text


def test_flash_memory_that_is_not_found_is_told_and_rings_of_nodes_do_no_harm() -> None:
    ring = ("-blockdev", "driver=raw,file=b,node-name=a", "-blockdev", "driver=raw,file=a,node-name=b")
    found = rebuild(["qemu", "-machine", "q35,pflash0=a", *ring], places(firmware=FLASH), None)
    assert [note.split()[0] for note in found.notes] == ["pflash0", "pflash1"]


def test_the_tpm_gets_a_new_socket_and_other_sockets_do_not() -> None:
    words = ["-chardev", "socket,id=t,path=/old/tpm.sock", "-tpmdev", "emulator,id=x,chardev=t"]
    words += ["-chardev", "socket,id=fs,path=/old/fs.sock"]
    found = one(*words, to=places(tpm=f"{NEW}/tpm.sock"))
    assert found[1] == f"socket,id=t,path={NEW}/tpm.sock"
    assert found[5] == words[5]


def test_a_machine_that_came_by_migration_begins_anew() -> None:
    found = rebuild(["qemu", "-incoming", "tcp:0:4444", "-loadvm", "x", "-m", "1G"], places(), None)
    assert found.words == ("qemu", "-m", "1G")
    assert len(found.notes) == 2


# -- copies ----------------------------------------------------------------------------------


COPY = identity.named("web 02")


def copied(*words: str) -> Rebuilt:
    """A copy's words."""
    return rebuild(["qemu", *words], places(), COPY)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("-name", "web01"), ("-name", "web 02")),
        (("-name", "guest=web01,debug-threads=on"), ("-name", "guest=web 02,debug-threads=on")),
        (("-name", "web01,process=x"), ("-name", "web 02,process=x")),
    ],
)
def test_the_name_is_new(before: tuple[str, ...], after: tuple[str, ...]) -> None:
    assert copied(*before, "-uuid", UUID).words[1:3] == after


def test_a_machine_without_name_and_uuid_gets_both() -> None:
    assert copied("-m", "1G").words[1:] == ("-name", "guest=web 02", "-uuid", COPY.uuid, "-m", "1G")


def test_the_uuid_is_new_everywhere() -> None:
    found = copied("-uuid", UUID, "-smbios", f"type=1,serial=x,uuid={UUID}")
    assert UUID not in " ".join(found.words)
    assert " ".join(found.words).count(COPY.uuid) == 2


@pytest.mark.parametrize(
    "words",
    [
        ("-device", "virtio-net-pci,netdev=n,mac=52:54:00:aa:bb:cc"),
        ("-device", '{"driver": "e1000", "mac": "52:54:00:aa:bb:cc"}'),
        ("-nic", "user,mac=52:54:00:aa:bb:cc"),
        ("-net", "nic,macaddr=52:54:00:aa:bb:cc"),
    ],
)
def test_addresses_are_new(words: tuple[str, ...]) -> None:
    found = copied(*words)
    [(old, new)] = found.macs
    assert old == "52:54:00:aa:bb:cc"
    assert re.fullmatch("52:54:00(:[0-9a-f]{2}){3}", new)
    assert "aa:bb:cc" not in " ".join(found.words)
    assert new in " ".join(found.words)


@pytest.mark.parametrize("words", [("-nic", "none"), ("-net", "user"), ("-device", "virtio-blk-pci,drive=a")])
def test_what_is_no_card_has_no_address(words: tuple[str, ...]) -> None:
    found = copied(*words)
    assert found.macs == ()
    assert found.words[-2:] == words


def test_a_card_that_had_qemu_s_own_address_gets_one() -> None:
    found = copied("-device", "e1000,netdev=a", "-device", "e1000,netdev=b")
    assert [old for old, _ in found.macs] == [None, None]
    assert len({new for _, new in found.macs}) == 2


def test_sockets_where_it_listens_are_in_its_own_directory_and_those_of_others_are_not() -> None:
    found = copied(
        *("-qmp", "unix:/run/a/qmp.sock,server=on,wait=off", "-monitor", "unix:/run/b/qmp.sock,server,nowait"),
        *("-chardev", "socket,id=a,path=/run/a.sock,server=on", "-chardev", "socket,id=b,path=/run/fs.sock"),
        *("-chardev", "file,id=c,path=/var/log/x.log", "-serial", "file:/var/log/y.log", "-pidfile", "/run/pid"),
    )
    text = " ".join(found.words)
    assert f"unix:{NEW}/qmp.sock,server=on,wait=off" in text
    assert f"unix:{NEW}/1-qmp.sock,server,nowait" in text
    for name in ("a.sock,server=on", "x.log", "y.log", "pid"):
        assert f"{NEW}/{name}" in text
    assert "path=/run/fs.sock" in text


@pytest.mark.parametrize(
    "words",
    [
        ("-vnc", ":1"),
        ("-netdev", "user,id=n,hostfwd=tcp::2222-:22"),
        ("-netdev", "tap,id=n,ifname=tap0"),
        ("-device", "vfio-pci,host=01:00.0"),
        ("-gdb", "tcp::1234"),
        ("-s",),
        ("-virtfs", "local,path=/srv,mount_tag=x,security_model=none"),
        ("-qmp", "tcp:localhost:4444,server=on,wait=off"),
    ],
)
def test_what_the_original_may_have_too_is_told(words: tuple[str, ...]) -> None:
    assert any("the original may have too" in note and words[0] in note for note in copied(*words).notes)
    assert not any("original" in note for note in rebuild(["qemu", *words], places(), None).notes)


def test_the_generation_is_another_one_for_every_restore() -> None:
    assert one("-device", f"vmgenid,guid={UUID}") == ["-device", "vmgenid,guid=auto"]
    assert copied("-device", f"vmgenid,guid={UUID}").words[-1] == f"vmgenid,guid={COPY.generation}"


def test_masked_secrets_and_lines_that_were_cut_are_told() -> None:
    found = rebuild(["qemu", "-object", "secret,id=a,data=***", "…"], places(), None)
    assert any("secret" in note for note in found.notes)
    assert any("too long" in note for note in found.notes)


@pytest.mark.parametrize("name", ["", " a", "a/b", "a\nb", "x" * 201])
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(errors.UsageError):
        identity.named(name)


# -- whatever it is --------------------------------------------------------------------------


_WORDS = st.lists(
    st.sampled_from(["-drive", "-blockdev", "-device", "-chardev", "-machine", "-name", "-uuid", "-nic", "--x", "-"])
    | st.text(st.characters(codec="utf-8"), max_size=30).filter(is_showable)
    | st.sampled_from(['{"file": {"filename": "/old/a.qcow2"}}', "{", '{"a": [', "file=/old/a.qcow2", ",,,=,"]),
    max_size=8,
)


@given(_WORDS)
def test_hostile_words_never_raise_and_the_text_for_a_shell_has_just_these_words(words: list[str]) -> None:
    for copy in (None, COPY):
        found = rebuild(["qemu", *words], places(disk(), firmware=FLASH, tpm="/t"), copy)
        text = rebuilding.text("/usr/bin/qemu", found.words)
        assert "\n" not in " ".join(found.words)
        assert shlex.split(text.replace("\\\n", " "))[0] == "/usr/bin/qemu"


def test_a_shell_gets_words_and_nothing_else(tmp_path: Path) -> None:
    hostile = ["qemu", "-name", "$(touch pwned)`touch pwned`;touch pwned\\", "-m", "'\"&|>x"]
    script = tmp_path / "command"
    script.write_text("printf '%s\\n' " + rebuilding.text("/usr/bin/qemu", rebuild(hostile, places(), None).words))
    done = subprocess.run(["sh", script], capture_output=True, text=True, timeout=10, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == ["/usr/bin/qemu", *hostile[1:]]
    assert [path.name for path in tmp_path.iterdir()] == ["command"]


@given(st.text(max_size=40), st.sampled_from(["device", "drive", "chardev", "x"]))
def test_a_value_that_is_not_changed_stays_itself(text: str, option: str) -> None:
    """Unless it is such that no QEMU would take it."""
    if "\0" not in text and not text.lstrip().startswith("{") and ",,," not in text:
        assert str(Properties(option, text)) == text


# -- libvirt's XML ---------------------------------------------------------------------------


XML = f"""<domain type='kvm' id='7'>
  <name>web01</name>
  <uuid>{UUID}</uuid>
  <genid>{UUID}</genid>
  <os><type>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/web01_VARS.fd</nvram>
  </os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='/old/a.qcow2' index='1'><reservations/></source>
      <backingStore/>
      <target dev='vda' bus='virtio'/>
      <serial>S1</serial>
    </disk>
    <disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/></disk>
    <interface type='network'><mac address='52:54:00:aa:bb:cc'/><source network='default'/></interface>
    <interface type='user'/>
    <channel type='unix'><source mode='bind' path='/run/agent.sock'/><target name='x'/></channel>
  </devices>
</domain>""".splitlines()


def test_xml_gets_new_places_and_stays_the_same_machine() -> None:
    text = domain.rebuild(XML, places(disk(), firmware=FLASH), None)
    assert f'<source file="{NEW}/vda.raw"/>' in text
    assert 'type="raw" discard="unmap"' in text
    assert "/old/a.qcow2" not in text
    assert "backingStore" not in text
    assert f">{FLASH['pflash1']}</nvram>" in text
    assert f">{FLASH['pflash0']}</loader>" in text
    assert "<genid/>" in text
    assert "id=" not in text.splitlines()[0]
    for kept in ("<name>web01</name>", f"<uuid>{UUID}</uuid>", "<serial>S1</serial>", "/iso", "52:54:00:aa:bb:cc"):
        assert kept in text


def test_the_xml_of_a_copy_has_a_new_identity() -> None:
    text = domain.rebuild(XML, places(disk()), COPY)
    assert "<name>web 02</name>" in text
    assert f"<uuid>{COPY.uuid}</uuid>" in text
    assert f"<genid>{COPY.generation}</genid>" in text
    assert UUID not in text
    assert "52:54:00:aa:bb:cc" not in text
    assert len(set(re.findall(r'<mac address="(52:54:00:[0-9a-f:]{8})"/>', text))) == 2
    assert "/run/agent.sock" not in text
    assert "<serial>S1</serial>" in text


def test_a_block_device_in_xml() -> None:
    text = domain.rebuild(XML, places(disk(path="/dev/vg/a", device=True)), None)
    assert '<disk type="block"' in text
    assert '<source dev="/dev/vg/a"/>' in text


@pytest.mark.parametrize(
    "lines",
    [["<x/>"], ["<domain>"], ['<!DOCTYPE d [<!ENTITY e SYSTEM "file:///etc/passwd">]>', "<domain>&e;</domain>"]],
)
def test_xml_that_is_none_is_refused(lines: list[str]) -> None:
    with pytest.raises(errors.BadDocument):
        domain.rebuild(lines, places(), COPY)
