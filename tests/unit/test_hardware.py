"""Hardware out of a saved command line: what is made anew, what is left out; and no word of a host gets through."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.model import commandline, devices, hardware, savedhardware
from pullback.model.commandline import Option
from pullback.model.description import Description, FirmwareHeader, ImageAt, Kind
from pullback.model.devices import Role
from pullback.model.exports import NbdAddress
from pullback.model.hardware import Hardware, Link, Network
from pullback.model.points import Mode, PointDisk
from pullback.programs import launching, qemu
from pullback.programs.launching import Kernel, Offers, Place, Start
from pullback.units import GiB, MiB

UUID = "6c1e7b0e-8b5c-4f2f-9d1f-0d6b7f9a3c11"
OFFERS = Offers(
    program="/usr/bin/qemu-system-x86_64",
    machines=frozenset({"q35", "pc", "pc-q35-7.2", "pc-i440fx-7.2"}),
    devices=frozenset(devices.DRIVERS),
    sandbox=True,
)
#: As libvirt 9 starts a machine.
LIBVIRT = """
-name guest=web01,debug-threads=on -S
-object {"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/master-key.aes"}
-blockdev {"driver":"file","filename":"/usr/share/OVMF/OVMF_CODE.fd","node-name":"libvirt-pflash0-storage"}
-machine pc-q35-7.2,usb=off,smm=on,dump-guest-core=off,memory-backend=pc.ram,pflash0=libvirt-pflash0-format
-accel kvm -cpu host,migratable=on -global driver=cfi.pflash01,property=secure,value=on
-m size=4194304k -object {"qom-type":"memory-backend-ram","id":"pc.ram","size":4294967296} -overcommit mem-lock=off
-smp 2,sockets=2,cores=1,threads=1 -uuid 6c1e7b0e-8b5c-4f2f-9d1f-0d6b7f9a3c11 -no-user-config -nodefaults
-chardev socket,id=charmonitor,fd=35,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control
-rtc base=utc,driftfix=slew -global kvm-pit.lost_tick_policy=delay -no-hpet -no-shutdown
-global ICH9-LPC.disable_s3=1 -boot strict=on
-device {"driver":"pcie-root-port","port":8,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x1"}
-device {"driver":"qemu-xhci","p2":15,"p3":15,"id":"usb","bus":"pcie.0","addr":"0x2"}
-device {"driver":"virtio-serial-pci","id":"virtio-serial0","bus":"pcie.0","addr":"0x3"}
-blockdev {"driver":"file","filename":"/var/lib/libvirt/images/web01.qcow2","node-name":"libvirt-1-storage"}
-blockdev {"node-name":"libvirt-1-format","driver":"qcow2","file":"libvirt-1-storage","backing":null}
-device {"driver":"virtio-blk-pci","bus":"pci.1","addr":"0x0","drive":"libvirt-1-format","id":"virtio-disk0","bootindex":1}
-netdev {"type":"tap","fd":"37","vhost":true,"vhostfd":"39","id":"hostnet0"}
-device {"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:11:22:33","bus":"pcie.0","addr":"0x5"}
-chardev pty,id=charserial0 -device {"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}
-chardev socket,id=charchannel0,fd=34,server=on,wait=off
-device {"driver":"virtserialport","bus":"virtio-serial0.0","nr":1,"chardev":"charchannel0","id":"channel0","name":"org.qemu.guest_agent.0"}
-device {"driver":"usb-tablet","id":"input0","bus":"usb.0","port":"1"} -spice port=5900
-device {"driver":"qxl-vga","id":"video0","ram_size":67108864,"vgamem_mb":16,"bus":"pcie.0","addr":"0x7"}
-device {"driver":"vfio-pci","host":"0000:03:00.0","id":"hostdev0","bus":"pcie.0"}
-object {"qom-type":"rng-random","id":"objrng0","filename":"/dev/urandom"}
-device {"driver":"virtio-rng-pci","rng":"objrng0","id":"rng0","bus":"pcie.0","addr":"0x9"}
-sandbox on -msg timestamp=on
"""  # noqa: E501 - one device a line


def disk(target: str, qdev: str | None = None, source: str | None = None) -> PointDisk:
    """A disk of a restore point."""
    return PointDisk(
        target=target, qdev=qdev, serial=None, source=source, source_format="qcow2", size=GiB, mode=Mode.FULL,
        reason=None, parent=None, mark=None, block_size=MiB, digest="0" * 64, stored=1, read=1,
    )  # fmt: skip


def read(
    words: Sequence[str] | str,
    *disks: PointDisk,
    firmware: Sequence[FirmwareHeader] = (),
    program: str = "/usr/bin/qemu-system-x86_64",
    machine_type: str | None = "pc-q35-7.2",
) -> Hardware:
    """The hardware of a command line."""
    listed = words.split() if isinstance(words, str) else list(words)
    saved = Description(
        kind=Kind.QEMU, program=program, argv=("qemu", *listed), version="7.2", machine_type=machine_type
    )
    return savedhardware.read(saved, disks or [disk("vda")], firmware, name="web01")


def argv(found: Hardware, **changes: object) -> list[str]:
    """The command line that is made of it, here."""
    places = [Place(target=target, image=Path(f"/vm/{target}.qcow2")) for target in sorted(found.targets)]
    start = Start(disks=places, accel="tcg", qmp=[Path("/run/q.sock")], console=Path("/vm/console.log"))
    words, _ = launching.argv(found, replace(start, **changes), offers=OFFERS)  # type: ignore[arg-type]
    return words


def after(words: Sequence[str], option: str) -> list[str]:
    """What stands behind each such option."""
    return [words[number + 1] for number, word in enumerate(words) if word == option]


# -- what is made anew -----------------------------------------------------------------------


def test_a_machine_of_libvirt_is_made_anew_at_the_same_addresses() -> None:
    found = read(LIBVIRT, disk("vda", "/machine/peripheral/virtio-disk0/virtio-backend"))
    assert (found.architecture, found.machine, found.memory, found.uuid) == ("x86_64", "pc-q35-7.2", 4 * GiB, UUID)
    assert found.smp == (("cpus", 2), ("sockets", 2), ("cores", 1), ("threads", 1))
    assert (found.has_agent, found.has_tpm) == (True, False)
    words = argv(found)
    assert after(words, "-device") == [
        "pcie-root-port,port=8,chassis=1,id=pci.1,bus=pcie.0,multifunction=on,addr=0x1",
        "qemu-xhci,p2=15,p3=15,id=usb,bus=pcie.0,addr=0x2",
        "virtio-serial-pci,id=virtio-serial0,bus=pcie.0,addr=0x3",
        "virtio-blk-pci,bus=pci.1,addr=0x0,id=virtio-disk0,bootindex=1,drive=disk-0",
        "virtio-net-pci,id=net0,mac=52:54:00:11:22:33,bus=pcie.0,addr=0x5",
        "isa-serial,id=serial0,index=0,chardev=console",
        "virtserialport,bus=virtio-serial0.0,nr=1,id=channel0,name=org.qemu.guest_agent.0,chardev=nowhere6",
        "usb-tablet,id=input0,bus=usb.0,port=1",
        "qxl-vga,id=video0,ram_size=67108864,vgamem_mb=16,bus=pcie.0,addr=0x7",
        "virtio-rng-pci,id=rng0,bus=pcie.0,addr=0x9,rng=random9",
    ]
    assert after(words, "-machine") == ["type=pc-q35-7.2,usb=off,smm=on,hpet=off"]
    assert after(words, "-global") == [
        "driver=cfi.pflash01,property=secure,value=on",
        "driver=ICH9-LPC,property=disable_s3,value=1",
    ]
    assert after(words, "-boot") == ["strict=on"]


def test_people_are_told_of_losses_and_not_of_what_every_host_has_of_its_own() -> None:
    found = read(LIBVIRT)
    assert [str(item) for item in found.left_out if not item.of_host] == [
        "-device vfio-pci (hostdev0): it is a device of the host"
    ]
    assert any("masterKey0" in item.what for item in found.left_out if item.of_host)


def test_disks_are_found_by_id_then_by_image_then_by_what_they_are_called() -> None:
    words = (
        "-nodefaults -drive if=none,id=one,file=/a -drive if=none,id=two,file=/b"
        ' -blockdev {"driver":"file","filename":"/c","node-name":"low"}'
        ' -blockdev {"driver":"qcow2","file":"low","node-name":"top"}'
        " -device virtio-blk-pci,drive=one -device virtio-blk-pci,drive=two,id=known -device virtio-blk-pci,drive=top"
    )
    found = read(words, disk("vda", "known"), disk("vdb", source="/c"), disk("vdc"))
    assert found.targets == ("vdc", "vda", "vdb")


def test_drives_that_make_their_own_devices() -> None:
    words = "-hda /a -drive file=/b,if=virtio,serial=xyz -cdrom /c.iso -drive file=/d,index=3 -m 512"
    found = read(words, disk("hda"), disk("vda"), disk("hdd"), machine_type="pc-i440fx-7.2")
    told = {device.target: device for device in found.of(Role.DISK)}
    assert [told[name].driver for name in ("hda", "vda", "hdd")] == ["ide-hd", "virtio-blk-pci", "ide-hd"]
    assert (told["hda"].get("bus"), told["hdd"].get("bus"), told["hdd"].get("unit")) == ("ide.0", "ide.1", "1")
    assert told["vda"].get("serial") == "xyz"
    [drive] = found.of(Role.CDROM)
    assert (drive.driver, drive.get("bus"), drive.get("unit")) == ("ide-cd", "ide.1", "0")


def test_what_qemu_adds_by_itself_is_there_too() -> None:
    found = read("-hda /a", disk("hda"), machine_type=None)
    assert [device.driver for device in found.devices if device.role is not Role.DISK] == [
        "VGA", "isa-serial", "e1000e",
    ]  # fmt: skip
    assert found.memory == 128 * MiB
    assert [device.role for device in read("-nodefaults", disk("vda")).devices] == [Role.DISK]


def test_a_disk_without_a_device_gets_a_standard_one() -> None:
    found = read("-nodefaults -device virtio-blk-pci,drive=x", disk("vda"), disk("sda"), disk("nvme0n1"))
    assert {device.target: device.driver for device in found.of(Role.DISK)} == {
        "vda": "virtio-blk-pci", "sda": "ide-hd", "nvme0n1": "nvme",
    }  # fmt: skip
    assert len([item for item in found.left_out if "a standard one stands in" in item.why]) == 2


def test_a_machine_that_was_off_gets_standard_devices() -> None:
    images = tuple(ImageAt(target=name, path="/x", format="raw") for name in ("sda", "sdb"))
    saved = Description(kind=Kind.IMAGES, version="7.2", images=images)
    found = savedhardware.read(saved, [disk(f"sd{letter}") for letter in "abcdefgh"], name="web01")
    assert [device.get("bus") for device in found.of(Role.DISK)] == [
        *(f"sata0.{port}" for port in range(6)), "sata1.0", "sata1.1",
    ]  # fmt: skip
    assert found.has_agent
    assert savedhardware.read(None, [disk("hda")], name="x").machine in ("pc", "virt")


def test_a_copy_has_another_identity_and_the_original_keeps_its_own() -> None:
    found = read(LIBVIRT)
    copy = found.as_copy("web02")
    assert (copy.name, copy.uuid == found.uuid) == ("web02", False)
    [card], [old] = copy.of(Role.NIC), found.of(Role.NIC)
    assert card.get("mac") != old.get("mac")
    assert (card.get("mac") or "").startswith("52:54:00:")
    assert card.get("bus") == old.get("bus")


def test_plain_hardware_keeps_what_the_guest_was_set_up_for() -> None:
    header = FirmwareHeader(name="pflash0", writable=False, size=4096, sha256="0" * 64)
    plain = read(LIBVIRT, firmware=[header]).plain()
    assert (plain.machine, plain.memory, plain.cpus, plain.uuid) == ("q35", 4 * GiB, 2, UUID)
    assert plain.firmware == (header,)
    assert [device.get("mac") for device in plain.of(Role.NIC)] == ["52:54:00:11:22:33"]
    assert plain.targets == ("vda",)


def test_a_bus_that_is_not_there_does_not_hinder() -> None:
    found = read("-nodefaults -device vfio-bridge,id=far -device virtio-rng-pci,bus=far,addr=0x3,id=rng")
    [rng] = found.of(Role.RNG)
    assert dict(rng.properties) == {"id": "rng"}


# -- what this host makes of it --------------------------------------------------------------


def test_without_kvm_its_features_are_left_out() -> None:
    found = read("-nodefaults -cpu Skylake-Server,+vmx,hv_relaxed,kvm=off,-pdpe1gb,enforce")
    assert after(argv(found), "-cpu") == ["Skylake-Server,+vmx,-pdpe1gb"]
    assert after(argv(found, accel="kvm"), "-cpu") == [found.cpu]
    assert after(argv(read("-nodefaults -cpu host")), "-cpu") == ["max"]


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        ("pc-q35-7.2", "pc-q35-7.2"),
        ("pc-q35-rhel9.2.0", "q35"),
        ("pc-i440fx-jammy", "pc"),
        ("rhel6.6.0", "pc"),
        ("x-remote", "q35"),
    ],
)
def test_a_machine_type_that_is_not_here_falls_back_to_its_family(saved: str, here: str) -> None:
    words = argv(read("-nodefaults", machine_type=saved))
    assert after(words, "-machine") == [f"type={here}"]


def test_devices_that_are_not_here_are_replaced_or_told() -> None:
    found = read("-nodefaults -device qxl-vga,id=video0,ram_size=67108864 -device vmxnet3,id=net0 -device i6300esb")
    few = replace(OFFERS, devices=OFFERS.devices - {"qxl-vga", "vmxnet3", "i6300esb"})
    places = [Place(target="vda", image=Path("/vm/vda.qcow2"))]
    words, left = launching.argv(found, Start(disks=places, accel="tcg"), offers=few)
    assert after(words, "-device") == ["VGA,id=video0", "virtio-blk-pci,drive=disk-0"]
    assert [item.what for item in left] == ["qxl-vga (video0)", "vmxnet3 (net0)", "i6300esb"]


def test_networks_are_connected_only_when_asked() -> None:
    found = read(LIBVIRT)
    assert after(argv(found), "-netdev") == []
    for network, words in [
        (Network(link=Link.USER), "user,id=net4"),
        (Network(link=Link.ISOLATED), "user,id=net4,restrict=on"),
        (launching.bridge("br0"), "bridge,id=net4,br=br0"),
    ]:
        made = argv(found, network=network)
        assert after(made, "-netdev") == [words]
        assert ("spawn=deny" in after(made, "-sandbox")[0]) == (network.link is not Link.BRIDGE)


def test_disks_are_overlays_whose_reads_wait() -> None:
    place = Place(target="vda", image=Path("/vm/v,a.qcow2"), point=NbdAddress(socket=Path("/run/p.sock"), export="vda"))
    nodes = [json.loads(word) for word in after(argv(read("-nodefaults"), disks=[place]), "-blockdev")]
    assert [node["node-name"] for node in nodes] == ["disk-0-server", "disk-0-point", "disk-0-file", "disk-0"]
    assert nodes[0]["reconnect-delay"] > 365 * 86400
    assert nodes[2]["filename"] == "/vm/v,a.qcow2"
    assert nodes[3]["backing"] == "disk-0-point"
    assert json.loads(after(argv(read("-nodefaults")), "-blockdev")[-1])["backing"] is None


def test_firmware_is_that_of_the_restore_point() -> None:
    headers = [
        FirmwareHeader(name="pflash0", writable=False, size=4096, sha256="0" * 64),
        FirmwareHeader(name="pflash1", writable=True, size=4096, sha256="0" * 64),
        FirmwareHeader(name="pflash7", writable=True, size=4096, sha256="0" * 64),
    ]
    found = read(LIBVIRT, firmware=headers)
    files = {"pflash0": Path("/vm/firmware/pflash0.fd"), "pflash1": Path("/vm/firmware/pflash1.fd")}
    words = argv(found, firmware=files)
    assert "pflash0=flash-0,pflash1=flash-1" in after(words, "-machine")[0]
    nodes = [json.loads(word) for word in after(words, "-blockdev")][:2]
    assert [(node["node-name"], node["read-only"], node["file"]["filename"]) for node in nodes] == [
        ("flash-0", True, "/vm/firmware/pflash0.fd"),
        ("flash-1", False, "/vm/firmware/pflash1.fd"),
    ]
    assert any("pflash7" in item.what for item in found.left_out)


def test_a_kernel_is_only_the_users_own() -> None:
    found = read("-nodefaults -kernel /boot/vmlinuz -initrd /boot/initrd -append root=/dev/vda,x -dtb /x.dtb")
    assert found.had_kernel
    assert not {"-kernel", "-initrd", "-append", "-dtb"} & set(argv(found))
    words = argv(found, kernel=Kernel(image=Path("/k"), append="a=b,c"))
    assert (after(words, "-kernel"), after(words, "-append"), after(words, "-initrd")) == (["/k"], ["a=b,c"], [])
    assert after(argv(found, kernel=Kernel(image=Path("/k"))), "-append") == ["root=/dev/vda,x"]


# -- what is hostile -------------------------------------------------------------------------

#: Each names something of the host; no part of it may reach the new command line.
EVIL = [
    "-device vfio-pci,host=0000:EVIL",
    "-device virtio-blk-pci,drive=EVIL,id=a,addr=/EVIL",
    "-device e1000,netdev=EVIL,romfile=/EVIL",
    "-device VGA,romfile=/EVIL",
    "-device loader,file=/EVIL",
    "-device virtio-9p-pci,fsdev=EVIL,mount_tag=EVIL",
    "-device virtserialport,chardev=EVIL,name=EVIL",
    "-device isa-serial,chardev=EVIL",
    "-device scsi-generic,drive=EVIL,id=EVIL/",
    "-device ivshmem-plain,memdev=EVIL",
    "-device vhost-vsock-pci,guest-cid=3,id=EVIL",
    "-device tpm-tis,tpmdev=EVIL",
    '-device {"driver":"e1000","id":"a,file=/EVIL"}',
    '-device {"driver":"e1000,romfile=/EVIL"}',
    '-device {"driver":"e1000","mac":{"EVIL":1}}',
    '-device {"driver":["e1000","EVIL"]}',
    "-drive file=/EVIL,if=none,id=EVIL",
    "-drive file=/EVIL,if=virtio,serial=/EVIL,readonly=on",
    "-drive file=/EVIL,if=xen",
    "-hda /EVIL",
    "/EVIL",
    "-cdrom /EVIL",
    "-fda /EVIL",
    "-pflash /EVIL",
    "-mtdblock /EVIL",
    "-blockdev driver=host_device,filename=/EVIL,node-name=EVIL",
    "-netdev tap,id=EVIL,script=/EVIL,downscript=/EVIL",
    "-nic tap,script=/EVIL,model=e1000",
    "-nic user,model=/EVIL,hostfwd=tcp::22-:22",
    "-net nic,model=e1000,macaddr=EVIL",
    "-net user,smb=/EVIL",
    "-chardev pipe,id=EVIL,path=/EVIL",
    "-serial file:/EVIL",
    "-serial tcp:EVIL:1",
    "-parallel /EVIL",
    "-monitor unix:/EVIL,server",
    "-qmp tcp:EVIL:4444,server",
    "-mon chardev=EVIL",
    "-vnc EVIL:1",
    "-vga /EVIL",
    "-spice addr=EVIL",
    "-display sdl,EVIL=on",
    "-smbios file=/EVIL",
    "-smbios type=11,path=/EVIL",
    "-smbios type=1,EVIL=x",
    "-fw_cfg name=opt/a,file=/EVIL",
    "-fw_cfg name=etc/EVIL,string=x",
    "-acpitable file=/EVIL",
    "-object memory-backend-file,id=EVIL,mem-path=/EVIL,size=1G",
    "-object secret,id=EVIL,file=/EVIL",
    "-tpmdev passthrough,id=EVIL,path=/EVIL",
    "-fsdev local,id=EVIL,path=/EVIL,security_model=none",
    "-virtfs local,path=/EVIL,mount_tag=EVIL,security_model=none",
    "-kernel /EVIL",
    "-initrd /EVIL",
    "-append EVIL",
    "-bios /EVIL",
    "-L /EVIL",
    "-dtb /EVIL",
    "-option-rom /EVIL",
    "-boot splash=/EVIL",
    "-k /EVIL",
    "-pidfile /EVIL",
    "-D /EVIL",
    "-trace file=/EVIL",
    "-mem-path /EVIL",
    "-readconfig /EVIL",
    "-incoming exec:EVIL",
    "-loadvm EVIL",
    "-chroot /EVIL",
    "-runas EVIL",
    "-add-fd fd=3,set=1,opaque=EVIL",
    "-set device.EVIL.romfile=/EVIL",
    "-global e1000.romfile=/EVIL",
    "-global driver=isa-debugcon,property=chardev,value=EVIL",
    "-machine firmware=/EVIL,kernel=/EVIL,dumpdtb=/EVIL",
    "-machine EVIL,usb=/EVIL",
    "-machine q35,usb=on,,file=/EVIL",
    "-accel EVIL",
    "-cpu host,file=/EVIL",
    "-cpu EVIL/",
    "-uuid EVIL",
    "-rtc base=EVIL",
    "-rtc base=utc,,EVIL",
    "-smp EVIL",
    "-m EVIL",
    "-numa node,memdev=EVIL",
    "-plugin /EVIL",
    "-semihosting-config chardev=EVIL",
    "-EVIL /EVIL",
    "--EVIL=/EVIL",
    "-watchdog-action EVIL",
    "-watchdog EVIL",
    "-usbdevice disk:/EVIL",
    "-usbdevice EVIL",
    "-sd /EVIL",
    "-icount shift=1,rrfile=/EVIL",
    "-name web01,process=EVIL",
]


@pytest.mark.parametrize("words", EVIL)
def test_nothing_of_a_host_gets_through(words: str) -> None:
    option = ["/EVIL"] if words == "/EVIL" else words.split(" ", 1)
    found = read(["-nodefaults", *option, "-device", "virtio-blk-pci,id=good"])
    made = argv(found, network=Network(link=Link.USER), vnc=Path("/run/v"), agent=Path("/run/a"))
    assert not any("EVIL" in word for word in made), made
    assert "vda" in found.targets
    for plain in (found.plain(), found.as_copy("other")):
        assert not any("EVIL" in word for word in argv(plain))


def test_texts_for_the_guest_keep_their_commas_and_stay_one_value() -> None:
    words = ["-nodefaults", "-smbios", "type=1,serial=a,,file=/x,product=b", "-fw_cfg", "name=opt/x,string=a,,file=/x"]
    made = argv(read(words))
    assert after(made, "-smbios") == ["type=1,serial=a,,file=/x,product=b"]
    assert after(made, "-fw_cfg") == ["name=opt/x,string=a,,file=/x"]


def test_a_name_is_one_value() -> None:
    found = savedhardware.read(None, [disk("vda")], name="a,process=b")
    assert after(argv(found), "-name") == ["guest=a,,process=b"]


@pytest.mark.parametrize(
    ("words", "memory", "cpus"),
    [
        ("-m 512", 512 * MiB, 1),
        ("-m 2G,slots=2,maxmem=4G -smp 4", 2 * GiB, 4),
        ("-m 99999999999T", 128 * MiB, 1),
        ("-m -1", 128 * MiB, 1),
        ("-m 0", 128 * MiB, 1),
        ("-smp 99999", 128 * MiB, 1),
        ("-smp cpus=2,sockets=3", 128 * MiB, 2),
        ("-smp sockets=2,cores=2", 128 * MiB, 4),
        ("-smp 0", 128 * MiB, 1),
        ("-smp ٣", 128 * MiB, 1),
    ],
)
def test_memory_and_processors_are_bounded(words: str, memory: int, cpus: int) -> None:
    found = read(f"-nodefaults {words}")
    assert (found.memory, found.cpus) == (memory, cpus)


@pytest.mark.parametrize(
    ("program", "architecture"),
    [("/usr/bin/qemu-system-aarch64", "aarch64"), ("/x/qemu-system-../../evil", None), ("/usr/bin/kvm", None)],
)
def test_the_architecture_is_a_plain_word(program: str, architecture: str | None) -> None:
    assert read("-nodefaults", program=program).architecture == (architecture or qemu.architecture())


_TOKENS = st.sampled_from(
    [*shlex.split("-device -drive -machine -object -smbios -global -m -smp -netdev -blockdev -fw_cfg -cpu -boot -hda"),
     *(word for line in EVIL for word in line.split()), "{", '{"driver":', "[" * 500, "a=b", ",,", "=", ",", "-", ""]
)  # fmt: skip
_WORDS = st.lists(
    st.one_of(_TOKENS, st.text(max_size=40), st.builds("".join, st.lists(_TOKENS, max_size=5))), max_size=30
)


@settings(max_examples=150)
@given(_WORDS)
def test_any_command_line_can_be_read_and_none_names_a_file(words: list[str]) -> None:
    found = read(words)
    made = argv(found)
    assert found.targets == ("vda",)
    given = set(argv(read("-nodefaults")))
    strange = [word for word in made if "/" in word and word not in given]
    assert all(made[made.index(word) - 1] in ("-smbios", "-fw_cfg", "-device") for word in strange), strange
    assert not any("romfile" in word or "chardev=/" in word for word in strange)


# -- the words themselves --------------------------------------------------------------------


def test_options_of_a_command_line() -> None:
    words = ["qemu", "-S", "-m", "4G", "disk.img", "--usb", "-append", "-x", "-unknown", "-m", "1", "-last"]
    assert list(commandline.options(words)) == [
        Option(name="S"),
        Option(name="m", value="4G"),
        Option(name="hda", value="disk.img"),
        Option(name="usb"),
        Option(name="append", value="-x"),
        Option(name="unknown"),
        Option(name="m", value="1"),
        Option(name="last"),
    ]


def test_pairs_and_back() -> None:
    assert commandline.pairs("a,b=1,c=x,,y,nowait", "first") == {
        "first": "a", "b": "1", "c": "x,y", "nowait": "on", "wait": "off",
    }  # fmt: skip
    assert commandline.pairs("a,,b", "first") == {"first": "a,b"}
    assert commandline.pairs("", "first") == {}


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.text(max_size=20), max_size=5))
def test_what_is_joined_can_be_taken_apart(values: dict[str, str]) -> None:
    assert commandline.pairs(commandline.joined(values)) == values


def test_every_driver_is_allowed_something() -> None:
    assert all(driver.properties for driver in devices.DRIVERS.values())
    forbidden = {"drive", "netdev", "chardev", "romfile", "file", "filename", "path", "memdev", "host", "fsdev", "rng"}
    assert {
        name: driver.properties & forbidden for name, driver in devices.DRIVERS.items() if driver.properties & forbidden
    } == {}


def test_families_are_known_by_their_versions() -> None:
    assert hardware.family("virt-8.2", "aarch64") == "virt"
    assert hardware.family("pc-q35-7.2", "aarch64") == "virt"
    assert hardware.family("s390-ccw-virtio-jammy", "s390x") == "s390-ccw-virtio"
