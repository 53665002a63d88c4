"""Snapshots, exports, jobs and events by the command line, read by other programs as users would."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import kit
from jsonkit import mismatches
from kit import Box, MakeBox
from pullback.cli import documents, main
from pullback.model.xml import backup as backup_xml
from pullback.model.xml import snapshot as snapshot_xml
from pullback.programs import qemu
from pullback.units import KiB, MiB

CLUSTER = kit.CLUSTER


# -- helpers ---------------------------------------------------------------------------------


def described(line: dict[str, Any], command: str, variant: int) -> None:
    """A line of output is as it is described."""
    known = documents.RESULTS[command][variant] if line["type"] == "result" else documents.COMMON[line["type"]]
    assert mismatches(line, known.fields) == []


def result(box: Box, command: str, *words: object, variant: int = 0, code: int = 0, stdin: str = "") -> dict[str, Any]:
    """Run a command with --json on the machine; every line must be as it is described."""
    done = box.cli(*command.split(), f"qmp:{box.qmp}", *words, "--json", input=stdin)
    assert done.returncode == code, done.stderr + done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line in lines:
        described(line, command, variant)
    assert lines[-1]["type"] == ("error" if code not in (0, 1) else "result")
    last: dict[str, Any] = lines[-1]
    return last


def content(uri: str) -> bytes:
    """All bytes of an export, by nbdcopy."""
    return subprocess.run(["nbdcopy", uri, "-"], capture_output=True, timeout=30, check=True).stdout


def changed(uri: str, context: str) -> list[tuple[int, int]]:
    """The dirty extents that a context tells, by nbdinfo."""
    line = ["nbdinfo", "--json", f"--map={context}", uri]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=True)
    return [(item["offset"], item["length"]) for item in json.loads(done.stdout) if item["type"]]


def refused(uri: str) -> str:
    """Why a client is not let in."""
    done = subprocess.run(["nbdinfo", uri], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0, done.stdout
    return done.stderr


class Staying:
    """A command that stays, and what it has printed so far."""

    def __init__(self, box: Box, *words: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pullback.cli.main", *map(str, words), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PULLBACK_STATE_DIR": str(box.directory / "state")},
        )

    def line(self, kind: str) -> dict[str, Any]:
        """The next line of a type (others are passed over)."""
        assert self.process.stdout is not None
        for text in self.process.stdout:
            found: dict[str, Any] = json.loads(text)
            if found["type"] == kind:
                return found
        assert self.process.stderr is not None
        raise AssertionError(f"it ended without one: {self.process.stderr.read()}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; gives the exit code."""
        self.process.send_signal(number)
        return self.process.wait(20)


@contextlib.contextmanager
def staying(box: Box, *words: object) -> Iterator[Staying]:
    """A command in the background, killed in the end."""
    made = Staying(box, *words)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate(timeout=10)


def written(box: Box, name: str, text: str) -> Path:
    """A file for a command."""
    path = box.directory / name
    path.write_text(text)
    return path


def images(box: Box) -> list[str]:
    """The machine, off."""
    return [f"images:{','.join(f'{disk.id}={disk.path}' for disk in box.disks)}", "--name", "web01"]


# -- snapshots and exports -------------------------------------------------------------------


def test_two_snapshots_at_once_both_read_right_with_their_changes(box: Box) -> None:
    box.write("vda", 0x11, 0, 2 * MiB)
    first = result(box, "snapshot create", "--as", "one", "--checkpoint", "c1")
    assert first["snapshot"]["checkpoint"] == "c1"
    at_first = box.image()
    box.write("vda", 0x22, CLUSTER, CLUSTER)
    document = '<domainblocksnapshot><name>two</name><disk name="vda"/></domainblocksnapshot>'
    second = result(box, "snapshot create", "-", "--checkpoint-file", written(box, "c.json", '{"name": "c2"}'),
                    stdin=document)  # fmt: skip
    assert [disk["target"] for disk in second["snapshot"]["disks"]] == ["vda"]
    at_second = box.image()
    box.write("vda", 0x33, 0, 4 * MiB)
    box.discard("vda", 5 * MiB, MiB)

    listed = result(box, "snapshot list")
    assert [snapshot["name"] for snapshot in listed["snapshots"]] == ["one", "two"]
    served = result(box, "export start", "--snapshot", "one")["exports"]
    assert [export["name"] for export in served] == ["vda-one", "vdb-one"]
    told = result(box, "export start", "--snapshot", "two", "--disk", "vda", "--as", "new", "--checkpoint", "c1")
    [export] = told["exports"]
    assert export["contexts"] == [{"context": "qemu:dirty-bitmap:c1", "since": "c1"}]
    assert {item["target"]: content(item["uri"]) for item in served} == at_first
    assert content(export["uri"]) == at_second["vda"]
    assert changed(export["uri"], "qemu:dirty-bitmap:c1") == [(CLUSTER, CLUSTER)]
    # A checkpoint is of the disks in its snapshot, and sound.
    tree = result(box, "checkpoint list")
    assert [(item["name"], item["problem"]) for item in tree["checkpoints"]] == [("c1", None), ("c2", None)]
    assert [disk["target"] for disk in tree["checkpoints"][1]["disks"]] == ["vda"]


def test_a_snapshot_is_looked_at_and_deleted_with_its_exports(box: Box) -> None:
    result(box, "snapshot create", "--as", "one", "--checkpoint", "c1")
    served = result(box, "export start", "--snapshot", "one")["exports"]
    info = result(box, "snapshot info", "one")
    assert info["exports"] == served
    xml = box.cli("snapshot", "info", f"qmp:{box.qmp}", "one", "--xml").stdout
    assert snapshot_xml.parse(xml).disks[0].fleece == info["snapshot"]["disks"][0]["scratch"]
    assert result(box, "export stop", "vda-one")["stopped"] == ["vda-one"]
    assert refused(served[0]["uri"])
    assert [item["name"] for item in result(box, "export list")["exports"]] == ["vdb-one"]
    gone = result(box, "snapshot delete", "one")
    assert (gone["deleted"], gone["checkpoint"]) == ("one", "c1")
    assert box.leftovers() == []
    assert result(box, "export list")["exports"] == []


def test_a_snapshot_goes_with_the_process_that_owns_it(box: Box) -> None:
    with subprocess.Popen(["sleep", "30"]) as owner:
        try:
            made = result(box, "snapshot create", "--owner", owner.pid, "--disk", "vda")
            assert made["snapshot"]["owner"] == owner.pid
            assert len(result(box, "snapshot list")["snapshots"]) == 1
        finally:
            owner.kill()
    deadline = time.monotonic() + 3
    while box.leftovers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert box.leftovers() == []
    assert result(box, "snapshot create", "--owner", owner.pid, code=2)["code"] == "usage"


def test_wait_stays_without_the_lock_and_ends_what_it_made(box: Box) -> None:
    with staying(box, "snapshot", "create", f"qmp:{box.qmp}", "--as", "brief", "--wait") as command:
        assert command.line("result")["snapshot"]["owner"] == command.process.pid
        [served] = result(box, "export start", "--snapshot", "brief", "--disk", "vdb")["exports"]
        assert content(served["uri"]) == box.image()["vdb"]
        assert command.end(signal.SIGINT) == 0
    assert box.leftovers() == []
    with staying(box, "snapshot", "create", f"qmp:{box.qmp}", "--as", "brief", "--wait") as command:
        command.line("result")
        result(box, "snapshot delete", "brief")
        assert command.process.wait(20) == 1
        assert command.line("note")["message"].startswith("it is over")


# -- who may connect -------------------------------------------------------------------------


def certificates(directory: Path) -> None:
    """An authority, a server's and a client's certificate in one directory."""
    directory.mkdir()

    def openssl(*words: str) -> None:
        line = ["openssl", *words]
        subprocess.run(line, cwd=directory, capture_output=True, timeout=30, check=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *curve, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=authority")
    for who in ("server", "client"):
        usage = f"extendedKeyUsage={who}Auth"
        (directory / "ext").write_text(f"basicConstraints=CA:FALSE\n{usage}\nsubjectAltName=DNS:localhost,IP:127.0.0.1")
        openssl("req", "-new", *curve[:-2], "-keyout", f"{who}-key.pem", "-out", "request", "-subj", f"/CN={who}")
        openssl("x509", "-req", "-in", "request", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial",
                "-days", "2", "-extfile", "ext", "-out", f"{who}-cert.pem")  # fmt: skip


def test_tcp_with_certificates_lets_in_who_has_one(box: Box) -> None:
    box.write("vda", 0x44, 0, MiB)
    tls, stranger = box.directory / "tls", box.directory / "stranger"
    certificates(tls)
    stranger.mkdir()
    (stranger / "ca-cert.pem").write_bytes((tls / "ca-cert.pem").read_bytes())
    words = ["--disk", "vda", "--listen", "localhost", "--tls-x509", tls]
    [served] = result(box, "export start", *words)["exports"]
    assert served["tls"] == "x509"
    assert served["uri"].startswith("nbds://localhost:")
    assert content(f"{served['uri']}?tls-certificates={tls}") == box.image()["vda"]
    assert refused(f"{served['uri']}?tls-certificates={stranger}")
    assert refused(served["uri"].replace("nbds:", "nbd:"))
    result(box, "export stop")
    assert box.leftovers() == []


def test_tcp_with_shared_keys_on_a_chosen_port(box: Box) -> None:
    tls = box.directory / "psk"
    tls.mkdir()
    (tls / "keys.psk").write_text(f"alice:{secrets.token_hex(32)}\n")
    wrong = written(box, "wrong.psk", f"alice:{secrets.token_hex(32)}\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    document = {"address": {"host": "127.0.0.1", "port": port}, "disks": [{"name": "vdb", "exportname": "keyed"}]}
    words = ["-", "--tls-psk", tls]
    [served] = result(box, "export start", *words, stdin=json.dumps(document))["exports"]
    assert served["uri"] == f"nbds://127.0.0.1:{port}/keyed"
    with_user = served["uri"].replace("//", "//alice@")
    assert content(f"{with_user}?tls-psk-file={tls / 'keys.psk'}") == box.image()["vdb"]
    assert refused(f"{with_user}?tls-psk-file={wrong}")
    # One server: what does not fit it is refused, and what does shares it.
    assert result(box, "export start", "--disk", "vda", "--listen", "localhost", "--insecure", code=11)
    assert result(box, "export start", "--disk", "vda", "--listen", f"127.0.0.1:{port}", "--tls-psk", tls)["exports"]


def test_tcp_without_tls_must_be_meant_and_connections_can_be_few(box: Box) -> None:
    words = ["--disk", "vda", "--listen", "127.0.0.1"]
    assert result(box, "export start", *words, code=2)["code"] == "insecure-export"
    [served] = result(box, "export start", *words, "--insecure", "--max-connections", 1)["exports"]
    port = int(served["uri"].partition("127.0.0.1:")[2].partition("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as first:
        assert first.recv(8) == b"NBDMAGIC"
        with socket.create_connection(("127.0.0.1", port), timeout=5) as second:
            second.settimeout(0.5)
            with pytest.raises(TimeoutError):
                second.recv(8)
    result(box, "export stop")


def test_a_socket_of_the_users_choice(box: Box) -> None:
    place = box.directory / "mine.sock"
    served = result(box, "export start", "--disk", "vda", "--disk", "vdb", "--socket", place)["exports"]
    assert [item["uri"] for item in served] == [f"nbd+unix:///{name}?socket={place}" for name in ("vda", "vdb")]
    assert place.stat().st_mode & 0o777 == 0o600
    assert result(box, "export start", "--disk", "vda", "--socket", place, code=2)["code"] == "export-exists"
    human = box.cli("export", "list", f"qmp:{box.qmp}").stdout.splitlines()
    assert human[0].split() == ["vda", f"nbd+unix:///vda?socket={place}"]
    result(box, "export stop")
    assert not place.exists()


# -- jobs ------------------------------------------------------------------------------------

PULL = "<domainbackup mode='pull'>{since}<disks><disk name='vda'/></disks></domainbackup>"
CHECKPOINT = "<domaincheckpoint><name>{name}</name></domaincheckpoint>"


def test_a_pull_as_virsh_begins_it(box: Box) -> None:
    box.write("vda", 0x11, 0, 2 * MiB)
    full = written(box, "full.xml", PULL.format(since=""))
    begun = result(box, "job begin", full, written(box, "mon.xml", CHECKPOINT.format(name="monday")))
    assert (begun["mode"], begun["checkpoint"]) == ("pull", "monday")
    at_monday = box.image()["vda"]
    box.write("vda", 0x22, 4 * CLUSTER, 1000)
    [served] = begun["exports"]
    assert content(served["uri"]) == at_monday
    assert result(box, "job begin", full, code=11)["code"] == "busy"
    found = result(box, "job stats")
    assert [(disk["target"], disk["status"]) for disk in found["disks"]] == [("vda", "serving")]
    assert found["disks"][0]["done"] >= CLUSTER
    xml = backup_xml.parse(box.cli("job", "info", f"qmp:{box.qmp}", "--xml").stdout)
    assert xml.server is not None
    assert xml.server.socket in served["uri"]
    assert result(box, "job wait")["finished"] is False
    assert result(box, "job speed", "10M", code=2)["code"] == "usage"
    ended = result(box, "job end")
    assert (ended["success"], ended["checkpoint"]) == (True, "monday")
    assert result(box, "job stats", "--completed", variant=1)["job"] == begun["job"]
    assert result(box, "job info", code=2)["code"] == "no-job"
    assert box.leftovers() == []


def test_an_aborted_increment_gives_back_what_its_checkpoint_recorded(box: Box) -> None:
    box.write("vda", 0x11, 0, 2 * MiB)
    since = "<incremental>monday</incremental>"
    increment = written(box, "inc.xml", PULL.format(since=since))
    result(box, "checkpoint create", "--as", "monday")
    box.write("vda", 0x22, 4 * CLUSTER, 1000)
    begun = result(box, "job begin", increment, written(box, "t.xml", CHECKPOINT.format(name="tuesday")))
    box.write("vda", 0x33, 9 * CLUSTER, 1000)
    [served] = begun["exports"]
    [context] = served["contexts"]
    assert context == {"context": "qemu:dirty-bitmap:backup-vda", "since": "monday"}
    assert changed(served["uri"], context["context"]) == [(4 * CLUSTER, CLUSTER)]
    assert result(box, "job abort")["error"] == "it was aborted"
    assert [item["name"] for item in result(box, "checkpoint list")["checkpoints"]] == ["monday"]
    [served] = result(box, "job begin", increment)["exports"]
    wanted = [(4 * CLUSTER, CLUSTER), (9 * CLUSTER, CLUSTER)]
    assert changed(served["uri"], "qemu:dirty-bitmap:backup-vda") == wanted
    assert content(served["uri"]) == box.image()["vda"]
    result(box, "job end")
    assert box.leftovers() == []


def test_a_push_is_limited_rests_goes_on_and_is_waited_for(box: Box) -> None:
    box.write("vda", 0x11, 0, 8 * MiB)
    target = box.directory / "pushed.qcow2"
    document = {"disks": [{"name": "vda", "type": "file", "target": {"file": str(target)}}]}
    begun = result(box, "job begin", "-", "--speed", "64K", stdin=json.dumps(document))
    assert (begun["mode"], begun["exports"]) == ("push", [])
    assert result(box, "job stats")["disks"][0]["bytes_per_second"] == 64 * KiB
    assert result(box, "job end", code=11)["code"] == "busy"
    assert result(box, "job wait", "--timeout", 0, code=11)["code"] == "busy"
    assert result(box, "job pause") == {"type": "result", "command": "job pause", "machine": "web01", "paused": True}
    assert result(box, "job stats")["disks"][0]["status"] == "paused"
    with staying(box, "job", "stats", f"qmp:{box.qmp}", "--follow", "--interval", "0.2") as following:
        assert following.line("progress")["disk"] == "vda"
        assert result(box, "job resume")["paused"] is False
        assert result(box, "job speed", "0")["bytes_per_second"] is None
        assert box.cli("job", "wait", f"qmp:{box.qmp}", begun["job"]).returncode == 0
        assert result(box, "job end", begun["job"])["success"] is True
        ended = following.line("result")
        described(ended, "job stats", 1)
        assert (ended["success"], ended["job"]) == (True, begun["job"])
    assert box.leftovers() == []
    raw = box.directory / "pushed.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", target, raw], check=True, timeout=30)
    assert raw.read_bytes() == box.image()["vda"]


# -- machines that are off -------------------------------------------------------------------


def test_a_pull_of_images_is_served_until_sigterm_which_ends_it_well(make_box: MakeBox) -> None:
    box = make_box(start=False)
    qemu_img_io(box, "vda", 0x55, MiB)
    full = written(box, "pull.json", '{"mode": "pull"}')
    monday = written(box, "monday.json", '{"name": "monday"}')
    with staying(box, "job", "begin", images(box)[0], full, monday, *images(box)[1:]) as command:
        begun = command.line("result")
        described(begun, "job begin", 0)
        assert {item["target"]: content(item["uri"]) for item in begun["exports"]} == box.image()
        assert command.end() == 0
    listed = json.loads(box.cli("checkpoint", "list", *images(box), "--json").stdout)
    assert [(item["name"], item["problem"]) for item in listed["checkpoints"]] == [("monday", None)]
    assert list((box.directory / "state" / "run").iterdir()) == []


def test_images_are_restored_into_by_an_export_for_writing(make_box: MakeBox) -> None:
    box = make_box(start=False)
    new = written(box, "new.raw", "x" * kit.SIZE)
    with staying(box, "export", "start", *images(box), "--disk", "vda", "--writable") as command:
        [served] = command.line("result")["exports"]
        assert served["writable"] is True
        subprocess.run(["nbdcopy", str(new), served["uri"]], check=True, timeout=30)
        busy = box.cli("checkpoint", "list", *images(box))
        assert busy.returncode == 11
        assert command.end(signal.SIGINT) == 0
    out = box.directory / "out.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", box.disks[0].path, out], check=True, timeout=30)
    assert out.read_bytes() == new.read_bytes()


def test_a_push_of_images_ends_by_itself_or_is_undone_by_sigterm(make_box: MakeBox) -> None:
    box = make_box(start=False)
    qemu_img_io(box, "vda", 0x55, 8 * MiB)
    target = box.directory / "pushed.raw"
    disk = {"name": "vda", "type": "file", "driver": "raw", "target": {"file": str(target)}}
    push = written(box, "push.json", json.dumps({"disks": [disk]}))
    monday = written(box, "monday.json", '{"name": "monday"}')
    words = ["job", "begin", images(box)[0], push, monday, *images(box)[1:]]
    with staying(box, *words, "--speed", "1M") as command:
        assert command.line("result")["mode"] == "push"
        assert command.end() == 143
    assert not target.exists()
    assert "no checkpoints" in box.cli("checkpoint", "list", *images(box)).stdout
    with staying(box, *words) as command:
        assert command.process.wait(20) == 0
    assert target.read_bytes() == box.image()["vda"]
    assert "monday" in box.cli("checkpoint", "list", *images(box)).stdout


def qemu_img_io(box: Box, disk: str, value: int, length: int) -> None:
    """Write to an image that nobody has open."""
    path = next(item.path for item in box.disks if item.id == disk)
    line = ["qemu-io", "-f", "qcow2", "-c", f"write -q -P {value} 0 {length}", str(path)]
    subprocess.run(line, check=True, timeout=30, capture_output=True)
    box.model[disk][:length] = bytes([value]) * length


# -- events ----------------------------------------------------------------------------------


def test_events_tell_what_other_commands_do_and_the_end_of_the_machine(box: Box) -> None:
    result(box, "checkpoint create", "--as", "monday")
    seen = result(box, "events")
    assert [(event["kind"], event["subject"]) for event in seen["events"]] == [("checkpoint-created", "monday")]
    with staying(box, "events", f"qmp:{box.qmp}", "--follow", "--interval", "0.2") as following:
        assert following.line("event")["subject"] == "monday"
        begun = result(box, "job begin", "-", stdin='{"mode": "pull"}')
        found = [following.line("event")]
        while found[-1]["kind"] != "export-started":
            found.append(following.line("event"))
        started = next(event for event in found if event["kind"] != "busy")
        assert (started["kind"], started["subject"]) == ("job-started", begun["job"])
        result(box, "job end")
        while found[-1]["kind"] != "job-completed":
            found.append(following.line("event"))
        for event in found:
            described(event, "events", 0)
        box.quit()
        assert following.line("result")["gone"] is True
        assert following.process.wait(20) == 0


def test_events_end_by_ctrl_c(box: Box) -> None:
    result(box, "snapshot create", "--as", "one", "--disk", "vda")
    with staying(box, "events", f"qmp:{box.qmp}", "--follow") as following:
        assert following.line("event")["kind"] == "snapshot-created"
        # Between two looks the machine is anybody's, and during one it is waited for.
        for _ in range(3):
            result(box, "snapshot list")
        assert following.end(signal.SIGINT) == 130
    result(box, "snapshot delete", "one")
    assert box.leftovers() == []


# -- what is wrong is told -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["export", "start", "M"], 2, "Say what is to be served"),
        (["export", "start", "M", "--disk", "vda", "--listen", "a b"], 2, "does not name a place to listen"),
        (["export", "start", "M", "--disk", "vda", "--listen", "x", "--socket", "/x"], 2, "exclude each other"),
        (["export", "start", "M", "--disk", "vda", "--tls-x509", "/x", "--tls-psk", "/x"], 2, "exclude each other"),
        (["export", "start", "M", "--disk", "vda", "--tls-x509", "/x"], 2, "TLS goes with a host and port"),
        (["export", "start", "M", "--disk", "vda", "--checkpoint", "c"], 2, "checkpoints are served with one only"),
        (["export", "start", "M", "--disk", "vda", "--disk", "vdb", "--as", "x"], 2, "--as names the export of one"),
        (["export", "start", "M", "--disk", "vda", "--writable"], 11, "share-rw is off"),
        (["export", "start", "M", "--disk", "vda", "--listen", "localhost", "--tls-psk", "/x"], 2, "has no keys.psk"),
        (["export", "start", "M", "--disk", "vda", "--max-connections", "0"], 2, "--max-connections"),
        (["export", "start", "M", "--snapshot", "none"], 2, "has no snapshot 'none'"),
        (["export", "stop", "M", "none"], 2, "has no export 'none'"),
        (["snapshot", "create", "M", "--as", "../x"], 2, "'../x'"),
        (["snapshot", "create", "M", "--disk", "vdz"], 2, "is no disk of the machine"),
        (["snapshot", "create", "M", "--owner", "4194304"], 2, "There is no process 4194304"),
        (["snapshot", "delete", "M", "none"], 2, "has no snapshot 'none'"),
        (["job", "begin", "M", "/dev/null"], 2, "domainbackup: the document is neither XML nor JSON"),
        (["job", "begin", "M", "-", "-"], 2, "Standard input can be only one"),
        (["job", "begin", "M", "PULL", "--speed", "fast"], 2, "'fast' is no size"),
        (["job", "begin", "M", "PULL", "--speed", "1M"], 2, "the client decides how fast it reads"),
        (["job", "begin", "M", "PULL", "--sped", "1M"], 2, "No such option"),
        (["job", "end", "M"], 2, "No backup job runs on web01"),
        (["job", "stats", "M", "--follow"], 2, "No backup job runs on web01"),
        (["job", "stats", "M", "--completed"], 2, "No job of web01 has ended yet"),
        (["job", "wait", "M"], 2, "No backup job runs on web01"),
        (["job", "wait", "images:vda=/x", "--name", "x"], 2, "is followed by the command that began it"),
        (["events", "images:vda=/x", "--follow"], 2, "has no events"),
        (["events", "qmp:/nowhere", "--follow"], 1, "Cannot connect to /nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_told_and_nothing_is_done(wrong: Box, words: list[str], code: int, told: str) -> None:
    places = {"M": f"qmp:{wrong.qmp}", "PULL": str(written(wrong, "pull.json", '{"mode": "pull"}'))}
    done = in_this_process(wrong, [places.get(word, word) for word in words])
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    assert told in " ".join(done.stderr.replace("│", "").split())


def in_this_process(box: Box, words: list[str]) -> Result:
    """A command without the half second that starting Python takes."""
    runner = CliRunner(env={"PULLBACK_STATE_DIR": str(box.directory / "state")})
    return runner.invoke(main.app, words, prog_name="pullback")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A machine that nothing is ever done to."""
    with kit.boxes(Path(tmp_path_factory.mktemp("pb", numbered=True))) as make:
        box = make(qemu.Disk(id="vda", path=Path("a.qcow2")), qemu.Disk(id="vdb", path=Path("b.qcow2")))
        yield box
        assert box.leftovers() == []
