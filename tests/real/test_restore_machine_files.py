"""What a restore into a directory writes beside the disks: firmware, TPM, description; and copies."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import swtpm
from kit import Box, MakeBox, last_json
from pullback import errors, repo
from pullback.flows import destinations
from pullback.flows import restore as flow
from pullback.flows.repositories import opened
from pullback.programs import process, qemu
from pullback.units import KiB, MiB
from stored import store

SECRET = b"what the disk is sealed with"
KINDS = ["dir", "restic"]
MAC = "52:54:00:12:34:99"
UUID = "11111111-2222-3333-4444-555555555555"


def whole(make_box: MakeBox, kind: str, tpm: list[str], place: Path) -> Box:
    """A started machine with all that can be kept; the disks are given in both ways."""
    first = qemu.Disk(id="vda", path=Path("a.qcow2"), serial="S1")
    second = qemu.Disk(id="vdb", path=Path("b, c.raw"), format="raw", style=qemu.Style.DRIVE)
    box = make_box(first, second, kind=kind, start=False, size=MiB)
    code, variables = place / "code.fd", place / "vars.fd"
    code.write_bytes(bytes(192 * KiB) + qemu.halting_firmware())
    variables.write_bytes(b"\xff" * 4096 + b"BootOrder" + bytes(256 * KiB - 4105))
    box.extra = [
        *("-drive", f"if=pflash,format=raw,readonly=on,file={code}"),
        *("-drive", f"if=pflash,format=raw,file={variables}"),
        *("-uuid", UUID, "-netdev", "user,id=net0", "-device", f"virtio-net-pci,netdev=net0,mac={MAC}"),
        *("-device", '{"driver": "e1000", "netdev": "net1"}', "-netdev", "user,id=net1"),
        *("-device", f"vmgenid,guid={UUID}"),
        *tpm,
    ]
    box.start()
    box.write("vda", 0x11, 0, 256 * KiB)
    box.scramble("vdb", 7, 64 * KiB, 128 * KiB)
    return box


@contextmanager
def stored(make_box: MakeBox, kind: str, place: Path) -> Iterator[Box]:
    """The same with a restore point; it still runs."""
    place.mkdir()
    with swtpm.alone("--tpmstate", f"dir={place}") as alone:
        alone.keep(SECRET)
        alone.shutdown()
    with swtpm.beside(place) as words:
        box = whole(make_box, kind, words, place)
        box.backup()
        yield box
        box.quit()


def restore(box: Box, to: Any, **options: Any) -> flow.Report:
    """In this process."""
    import asyncio

    request = flow.Request(repository=box.place, access=box.access, to=to, directories=box.directories, **options)
    return asyncio.run(flow.restore(request))


def document(directory: Path) -> dict[str, Any]:
    """machine.json."""
    found: dict[str, Any] = json.loads((directory / "machine.json").read_text())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_gets_all_that_the_machine_was(make_box: MakeBox, kind: str, short_dir: Path) -> None:
    state = short_dir / "tpm"
    with stored(make_box, kind, state) as box:
        out = short_dir / "out"
        report = restore(box, out)
        assert {str(path.relative_to(out)) for path in report.files} == {
            *("firmware/pflash0.fd", "firmware/pflash1.fd", "tpm/tpm2-00.permall"),
            *("command-line.txt", "machine.json"),
        }
        assert (out / "firmware/pflash1.fd").read_bytes() == (state / "vars.fd").read_bytes()
        assert (out / "firmware/pflash0.fd").read_bytes() == (state / "code.fd").read_bytes()
        assert (out / "tpm/tpm2-00.permall").read_bytes() == (state / "tpm2-00.permall").read_bytes()
        assert {disk.target: disk.path.read_bytes() for disk in report.disks} == box.image()
        for path in (*report.files, *(disk.path for disk in report.disks)):
            assert path.stat().st_mode & 0o777 == 0o600, path
        assert (out / "tpm").stat().st_mode & 0o777 == 0o700
        assert not list(out.glob("**/.*"))
        told = document(out)
        assert (told["name"], told["uuid"], told["copy_of"]) == ("web01", UUID, None)
        assert {(disk["target"], disk["place"], disk["serial"]) for disk in told["disks"]} == {
            ("vda", "vda.raw", "S1"),
            ("vdb", "vdb.raw", None),
        }
        assert report.notes == ()


def words_of(text: str) -> list[str]:
    """The command in command-line.txt, as a shell reads it (that for swtpm aside)."""
    return shlex.split(text.replace("\\\n", " ")[text.rindex("/qemu-system") - len("/usr/bin") :])


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_the_command_line_starts_the_restored_machine(make_box: MakeBox, short_dir: Path, format: str) -> None:
    """The words themselves are run: disks, flash memory and TPM are those that were restored."""
    with stored(make_box, "dir", short_dir / "tpm") as box, ExitStack() as stack:
        out = short_dir / "out"
        restore(box, out, format=flow.Format(format), copy_name="web02")
        original = box.command("query-name")["name"]
        words = _without(words_of((out / "command-line.txt").read_text()), "starter", "/proc/self/fd")
        with process.Child(_swtpm_words(out)) as first:
            first.wait_until((out / "tpm" / "swtpm.sock").is_socket, what="socket", timeout=20)
            child = stack.enter_context(process.Child(words))
            child.wait_until(lambda: (out / "qmp.sock").is_socket(), what="socket", timeout=30)
            second = replace(box, directory=out, disks=box.disks)
            found = {
                "name": second.command("query-name")["name"],
                "uuid": second.command("query-uuid")["UUID"],
                "files": {node["file"] for node in second.command("query-named-block-nodes", {"flat": True})},
                "tpm": second.command("query-tpm")[0]["model"],
            }
            second.command("quit")
            assert child.wait(20) == 0
    assert (original, found["name"], found["tpm"]) == ("web01", "web02", "tpm-crb")
    assert found["uuid"] not in (UUID, "00000000-0000-0000-0000-000000000000")
    for name in (f"vda.{format}", f"vdb.{format}", "firmware/pflash0.fd", "firmware/pflash1.fd"):
        assert str(out / name) in found["files"], found["files"]
    with swtpm.alone("--tpmstate", f"dir={out}/tpm") as alone:
        assert alone.kept(len(SECRET)) == SECRET


def _swtpm_words(out: Path) -> list[str]:
    """As the text says, but as a child of ours."""
    text = (out / "command-line.txt").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("swtpm ")]
    return [word for word in shlex.split(line) if word != "--daemon"]


def _without(words: list[str], *marks: str) -> list[str]:
    """What the tests' own starter gives QEMU are descriptors of a process that is gone."""
    drop = {at for at, word in enumerate(words) if any(mark in word for mark in marks)}
    return [word for at, word in enumerate(words) if at not in drop and at + 1 not in drop]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_an_identity_of_its_own(make_box: MakeBox, kind: str, short_dir: Path) -> None:
    with stored(make_box, kind, short_dir / "tpm") as box:
        out = short_dir / "out"
        report = restore(box, out, copy_name="web02")
        told, text = document(out), (out / "command-line.txt").read_text()
        assert report.identity is not None
        assert (told["name"], told["copy_of"], told["uuid"]) == ("web02", "web01", report.identity.uuid)
        assert UUID not in text
        assert MAC not in text
        assert [old for old, _ in report.macs] == [MAC, None]
        for _, new in report.macs:
            assert re.fullmatch("52:54:00(:[0-9a-f]{2}){3}", new)
            assert new in text
        assert len({new for _, new in report.macs}) == 2
        assert "guest=web02" in text.split()
        assert f"vmgenid,guid={report.identity.generation}" in text
        assert "serial" in text
        assert '"S1"' in text
        assert str(box.qmp) not in text
        again = restore(box, short_dir / "again", copy_name="web02")
        assert again.identity is not None
        assert again.identity.uuid != report.identity.uuid


def test_single_disks_get_nothing_beside_them(make_box: MakeBox, short_dir: Path) -> None:
    with stored(make_box, "dir", short_dir / "tpm") as box:
        out = short_dir / "out"
        assert restore(box, out, only=("vda",)).files == ()
        assert os.listdir(out) == ["vda.raw"]
        assert restore(box, {"vda": destinations.parse(f"{out}/x.raw")}).files == ()


def test_a_directory_and_a_disk_elsewhere(make_box: MakeBox, short_dir: Path) -> None:
    with stored(make_box, "dir", short_dir / "tpm") as box:
        out = short_dir / "out"
        done = box.cli(
            "restore", "-r", box.place.url, "--to", out, "--to", f"vdb={short_dir}/b.qcow2", "--json", "--as", "web02"
        )
        assert done.returncode == 0, done.stderr
        result = last_json(done.stdout)
        assert {disk["path"] for disk in result["disks"]} == {f"{out}/vda.raw", f"{short_dir}/b.qcow2"}
        assert f"{out}/machine.json" in result["files"]
        assert result["copy"]["name"] == "web02"
        assert [pair["old"] for pair in result["macs"]] == [MAC, None]
        text = (out / "command-line.txt").read_text()
        assert f"file={short_dir}/b.qcow2" in text
        assert "format=qcow2" in text


def test_what_is_there_is_only_replaced_by_force(make_box: MakeBox, short_dir: Path) -> None:
    with stored(make_box, "dir", short_dir / "tpm") as box:
        out = short_dir / "out"
        (out / "tpm").mkdir(parents=True)
        (out / "tpm" / "tpm2-00.permall").write_text("mine")
        with pytest.raises(errors.DestinationExists, match="permall"):
            restore(box, out)
        assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == ["tpm", "tpm/tpm2-00.permall"]
        restore(box, out, force=True)
        assert len((out / "tpm" / "tpm2-00.permall").read_bytes()) > 1000
        (out / "machine.json").unlink()
        (out / "machine.json").symlink_to(short_dir / "elsewhere")
        with pytest.raises(errors.CannotWrite):
            restore(box, out, force=True)
        assert not (short_dir / "elsewhere").exists()


def damage_variables(box: Box, variables: bytes) -> None:
    """Flip a bit of the firmware's variables in the repository, and nothing else."""
    if box.kind == "dir":
        [file] = box.repository.glob("*/*/pflash1.firmware")
        place = (file, len(variables) - 1)
    else:
        with opened(box.place, box.access) as repository:
            assert isinstance(repository, repo.ResticRepository)
            [blob] = repository.index.find(hashlib.sha256(variables).digest())
        place = (box.repository / "data" / blob.pack.hex()[:2] / blob.pack.hex(), blob.offset + blob.length // 2)
    file, offset = place
    file.chmod(0o600)
    with open(file, "r+b") as opened_file:
        opened_file.seek(offset)
        byte = opened_file.read(1)[0]
        opened_file.seek(offset)
        opened_file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_what_stands_beside_is_found_before_a_disk_is_written(
    make_box: MakeBox, kind: str, short_dir: Path
) -> None:
    with stored(make_box, kind, short_dir / "tpm") as box:
        damage_variables(box, (short_dir / "tpm" / "vars.fd").read_bytes())
        out = short_dir / "out"
        done = box.cli("restore", "-r", box.place.url, "--to", out)
        assert done.returncode == 13, done.stderr
        assert not out.exists() or os.listdir(out) == []


def test_what_makes_no_sense_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = store(tmp_path, "dir", {"vda": bytes(MiB), "vdb": bytes(MiB)})
    for words, problem in {
        ("--to", "vda=x/a", "--as", "copy"): "needs a directory",
        ("--to", "x", "--disk", "vda", "--as", "copy"): "not with --disk",
        ("--to", "x", "--as", "a/b"): "cannot name a machine",
        ("--to", "x", "--as", ""): "cannot name a machine",
        ("--to", "x", "--disk", "vda", "--to", "vdb=x/b"): "leaves it out",
        ("--to", "x", "--to", "vdz=x/b"): "no disk 'vdz'",
        ("--to", "x", "--disk-map", "vda"): "not TARGET=TARGET",
        ("--to", "x", "--to", "qmp:/run/x"): "takes all disks",
        ("--to", "machine:nobody"): "There is no machine 'nobody'",
    }.items():
        done = found.cli(*words)
        assert (done.returncode, problem in done.stderr) == (2, True), done.stderr
    assert not Path("x").exists()


def test_a_machine_that_was_off_has_no_command_line(make_box: MakeBox, short_dir: Path) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), start=False, size=MiB)
    done = box.cli("backup", f"images:vda={box.disks[0].path}", "--name", "web01", "-r", box.place.url)
    assert done.returncode == 0, done.stderr
    out = short_dir / "out"
    report = restore(box, out, copy_name="web02")
    assert [path.name for path in report.files] == ["machine.json"]
    assert document(out)["name"] == "web02"
    assert sorted(os.listdir(out)) == ["machine.json", "vda.raw"]


def test_a_directory_that_is_not_whole_says_nothing_of_a_machine(make_box: MakeBox, short_dir: Path) -> None:
    with stored(make_box, "dir", short_dir / "tpm") as box:
        image = next(box.repository.glob("*/*/vda.qcow2"))
        data = bytearray(image.read_bytes())
        data[-100] ^= 1
        image.write_bytes(data)
        out = short_dir / "out"
        done = box.cli("restore", "-r", box.place.url, "--to", out)
        assert done.returncode == 13, done.stderr
        assert set(os.listdir(out)) <= {"vdb.raw"}


def test_sockets_and_logs_of_a_copy_are_its_own(make_box: MakeBox, short_dir: Path) -> None:
    box = make_box(qemu.Disk(id="vda", path=Path("a.qcow2")), start=False, size=MiB)
    log = box.directory / "serial.log"
    box.extra = ["-serial", f"file:{log}", "-pidfile", f"{box.directory}/pid", "-vnc", "127.0.0.1:77"]
    box.start()
    box.backup()
    out = short_dir / "out"
    restore(box, out, copy_name="web02")
    text = (out / "command-line.txt").read_text()
    for name in ("qmp.sock", "other.sock", "hmp.sock", "serial.log", "pid"):
        assert f"{out}/{name}" in text
    assert str(box.directory) not in text
    assert "# Look at the port of the screen, which the original may have too: '-vnc 127.0.0.1:77'" in text
    plain = restore(box, short_dir / "plain")
    assert str(log) in (short_dir / "plain" / "command-line.txt").read_text()
    assert plain.identity is None
    subprocess.run(["sh", "-n", out / "command-line.txt"], check=True, timeout=10)
