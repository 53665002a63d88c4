"""The documents: what is refused and with which field's name, and the defaults that are filled in."""

from __future__ import annotations

import json
from types import ModuleType

import pytest

from pullback import errors
from pullback.model.documents import backup, checkpoint, export, snapshot
from pullback.model.documents.backup import BackupDisk, BackupDocument, DiskMode, Mode, Server, Transport
from pullback.model.documents.checkpoint import CheckpointDisk, CheckpointDocument, Tracking
from pullback.model.documents.export import Address, ExportDisk, ExportDocument
from pullback.model.documents.machine import MachineDisk, Moment
from pullback.model.documents.snapshot import SnapshotDisk, SnapshotDocument
from pullback.model.documents.storage import Format, Store, StoreType
from pullback.model.xml import backup as backup_xml
from pullback.model.xml import checkpoint as checkpoint_xml
from pullback.model.xml import export as export_xml
from pullback.model.xml import snapshot as snapshot_xml

DISKS = (
    MachineDisk(target="vda", source="/srv/a.qcow2"),
    MachineDisk(target="vdb", source="/dev/vg/b", is_file=False),
    MachineDisk(target="vdc", source="/srv/c.iso", read_only=True),
    MachineDisk(target="sda", empty=True),
)
FILES = (DISKS[0], MachineDisk(target="nvme0n1", source="/srv/n.qcow2"), *DISKS[2:])
NOW = Moment(seconds=1525889631)
UNIX = Server(transport=Transport.UNIX, socket="/run/x.sock")


def pull(*disks: BackupDisk, **changes: object) -> BackupDocument:
    return BackupDocument(mode=Mode.PULL, server=UNIX, disks=disks, **changes)  # type: ignore[arg-type]


# -- a refusal names its field ---------------------------------------------------------------

_PULL = "<domainbackup mode='pull'><server transport='unix' socket='/run/x'/><disks>{}</disks></domainbackup>"
_PUSH = "<domainbackup><disks>{}</disks></domainbackup>"
_SERVER = "<domainbackup mode='pull'><server {}/></domainbackup>"


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ("<domainbackup mode='sideways'/>", "mode", "is none of push, pull"),
        ("<domainbackup mode=' pull'/>", "mode", "is none of"),
        ("<domainbackup><server name='a' port='1'/></domainbackup>", "server", "needs mode pull"),
        ("<domainbackup><incremental>../x</incremental></domainbackup>", "incremental", "no checkpoint's name"),
        ("<domainbackup><incremental>a</incremental><incremental/></domainbackup>", "incremental", "stands twice"),
        ("<domainbackup><incremental><b/></incremental></domainbackup>", "incremental", "more than text"),
        ("<domainbackup><disks/></domainbackup>", "disks", "is empty"),
        ("<domainbackup>hello</domainbackup>", "the document", "text where none belongs"),
        ("<domainbackup><tagret/></domainbackup>", "the document", "unknown there: 'tagret'"),
        ("<domainbackup xmlns='http://example.org/'/>", "the document", "begins with"),
        ("<domaincheckpoint/>", "the document", "begins with 'domaincheckpoint'"),
        (_SERVER.format(""), "server.name", "is missing"),
        (_SERVER.format("transport='rdma' name='a'"), "server.transport", "is none of tcp, unix, fd"),
        (_SERVER.format("name='a b'"), "server.name", "neither a host's name"),
        (_SERVER.format("name='a' port='65536'"), "server.port", "0 to 65535"),
        (_SERVER.format("name='a' port='-1'"), "server.port", "no whole number"),
        (_SERVER.format("name='a' tls='true'"), "server.tls", "neither yes nor no"),
        (_SERVER.format("name='a' socket='/x'"), "server.socket", "does not fit transport tcp"),
        (_SERVER.format("transport='unix'"), "server.socket", "is missing"),
        (_SERVER.format("transport='unix' socket='x'"), "server.socket", "no absolute path"),
        (_SERVER.format("transport='unix' socket='/x' port='1'"), "server.port", "does not fit transport unix"),
        (_SERVER.format(f"transport='unix' socket='/{'x' * 107}'"), "server.socket", "107 bytes"),
        (_SERVER.format("transport='fd'"), "server.fdgroup", "is missing"),
        (_PUSH.format("<disk/>"), "disks[0].name", "is missing"),
        (_PUSH.format("<disk name='vda'/>"), "disks[vda].type", "is missing"),
        (_PUSH.format("<disk name='vda' type='tape'/>"), "disks[vda].type", "none of file, block, network"),
        (
            _PUSH.format("<disk name='vda' type='network'><target file='/x'/></disk>"),
            "disks[vda].target.file",
            "does not fit type network",
        ),
        (
            _PUSH.format("<disk name='vda' type='network'><target uri='http://x/'/></disk>"),
            "disks[vda].target.uri",
            "is no NBD URI",
        ),
        (_PULL.format("<disk name='vda' type='network'/>"), "disks[vda].type", "must be file or block"),
        (_PUSH.format("<disk name='../a' type='file'/>"), "disks[0].name", "no disk's target"),
        (_PUSH.format("<disk name='vda' type='file' exportname='a'/>"), "disks[vda].exportname", "mode push"),
        (_PUSH.format("<disk name='vda' type='file'><scratch file='/a'/></disk>"), "disks[vda].scratch", "mode push"),
        (_PUSH.format("<disk name='vda' type='file'><target/></disk>"), "disks[vda].target.file", "is missing"),
        (_PUSH.format("<disk name='vda' type='file'><target file='a'/></disk>"), "disks[vda].target.file", "absolute"),
        (_PUSH.format("<disk name='vda' type='file'><target dev='/a'/></disk>"), "disks[vda].target.dev", "type file"),
        (_PUSH.format("<disk name='vda' type='file'><driver/></disk>"), "disks[vda].driver", "is incomplete"),
        (_PUSH.format("<disk name='vda' type='file'><driver type='x'/></disk>"), "disks[vda].driver", "none of raw"),
        (_PUSH.format("<disk name='vda' backup='no' type='file'/>"), "disks[vda].type", "backup=no"),
        (_PUSH.format("<disk name='vda' backup='maybe'/>"), "disks[vda].backup", "neither yes nor no"),
        (_PUSH.format("<cdrom name='vda'/>"), "disks", "unknown there: 'cdrom'"),
        (_PUSH.format("<disk name='vda' type='file' x:a='1' xmlns:x='u'/>"), "disks[vda]", "attribute that is unknown"),
        (_PUSH.format("<disk name='vda' type='file' lang='1'/>"), "disks[vda]", "unknown there: 'lang'"),
        (_PULL.format("<disk name='vda'><target file='/a'/></disk>"), "disks[vda].target", "mode pull"),
        (_PULL.format("<disk name='vda'><driver type='qcow2'/></disk>"), "disks[vda].scratch", "is missing"),
        (_PULL.format("<disk name='vda' type='block'/>"), "disks[vda].scratch", "is missing"),
        (_PULL.format("<disk name='vda' exportbitmap=''/>"), "disks[vda].exportbitmap", "is empty"),
        (_PULL.format("<disk name='vda' incremental=''/>"), "disks[vda].incremental", "no checkpoint's name"),
        (_PULL.format("<disk name='vda' exportname='a&#10;b'/>"), "disks[vda].exportname", "not allowed"),
        (_PULL.format(f"<disk name='{'v' * 65}'/>"), "disks[0].name", "no disk's target"),
        (
            _PULL.format("<disk name='vda' backupmode='full' incremental='a'/>"),
            "disks[vda].incremental",
            "does not fit backupmode full",
        ),
        (
            _PULL.format("<disk name='vda'><scratch file='/a'/><driver type='raw'/></disk>"),
            "disks[vda].driver",
            "must be qcow2",
        ),
        (
            _PULL.format("<disk name='vda'><scratch file='/a'/><scratch file='/b'/></disk>"),
            "disks[vda].scratch",
            "stands twice",
        ),
        (_PULL.format("<disk name='vda'><scratch file='/a&#10;b'/></disk>"), "disks[vda].scratch.file", "not allowed"),
        (_PULL.format(f"<disk name='vda'><scratch file='/{'a' * 4095}'/></disk>"), "disks[vda].scratch.file", "longer"),
    ],
)
def test_a_backup_that_breaks_a_rule_is_refused_with_the_fields_name(text: str, field: str, problem: str) -> None:
    _refused(backup_xml, text, "domainbackup", field, problem)


def _refused(room: ModuleType, text: str, document: str, field: str, problem: str) -> None:
    with pytest.raises(errors.BadDocument) as caught:
        room.parse(text)
    assert (caught.value.document, caught.value.field) == (document, field)
    assert problem in caught.value.problem
    assert caught.value.exit_code == 2
    assert caught.value.code == "bad-document"


_PLACE = _PULL.format("<disk name='vda'><scratch file='/a'>{}</scratch></disk>")
_SECRET = "<secret type='passphrase' usage='x'/>"


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ("<seclabel/>", "seclabels[0]", "exactly one of"),
        ("<seclabel relabel='no'><label>a</label></seclabel>", "seclabels[0]", "exactly one of"),
        ("<seclabel labelskip='no'/>", "seclabels[0]", "exactly one of"),
        ("<seclabel model='dac' relabel='no'/>" * 2, "seclabels[1].model", "stands twice"),
        ("<seclabel><label a='1'/></seclabel>", "seclabels[0].labels", "more than text"),
        ("<encryption format='qcow'/>", "encryption.format", "is not luks"),
        ("<encryption format='luks' engine='librbd'/>", "encryption.engine", "is not qemu"),
        ("<encryption format='luks'/>", "encryption.secret", "is missing"),
        ("<encryption format='luks'><secret usage='x'/></encryption>", "encryption.secret.type", "is missing"),
        ("<encryption format='luks'><secret type='passphrase'/></encryption>", "encryption.secret", "exactly one of"),
        (
            "<encryption format='luks'><secret type='passphrase' uuid='1'/></encryption>",
            "encryption.secret.uuid",
            "no UUID",
        ),
        (
            f"<encryption format='luks'>{_SECRET}<ivgen name='plain'/></encryption>",
            "encryption.cipher",
            "come together",
        ),
        (
            f"<encryption format='luks'>{_SECRET}<cipher name='a' size='x'/><ivgen name='b'/></encryption>",
            "encryption.cipher.size",
            "no whole number",
        ),
        (
            f"<encryption format='luks'>{_SECRET}<cipher name='a' size='1' mode='b'/><ivgen name='b'/></encryption>",
            "encryption.cipher",
            "both of mode and hash",
        ),
    ],
)
def test_labels_and_encryption_that_break_a_rule_are_refused(text: str, field: str, problem: str) -> None:
    _refused(backup_xml, _PLACE.format(text), "domainbackup", f"disks[vda].scratch.{field}", problem)


_CHECKPOINT = "<domaincheckpoint>{}</domaincheckpoint>"


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ("<name/>", "name", "no checkpoint's name"),
        ("<name>.hidden</name>", "name", "no checkpoint's name"),
        ("<name>a/b</name>", "name", "no checkpoint's name"),
        ("<name> a </name>", "name", "no checkpoint's name"),
        (f"<name>{'a' * 252}</name>", "name", "more than 251"),
        ("<name>a</name><name>b</name>", "name", "stands twice"),
        ("<parent/>", "parent", "is incomplete"),
        ("<parent><name>a</name><name>b</name></parent>", "parent.name", "stands twice"),
        ("<creationTime>soon</creationTime>", "creation_time", "no whole number"),
        ("<creationTime>9223372036854775808</creationTime>", "creation_time", "no whole number from 0"),
        (f"<description>{'a' * 65537}</description>", "description", "more than 65536"),
        ("<disks><disk name='vda' checkpoint='external'/></disks>", "disks[vda].checkpoint", "none of bitmap, no"),
        ("<disks><disk name='vda' checkpoint='no' bitmap='a'/></disks>", "disks[vda].bitmap", "checkpoint=no"),
        ("<disks><disk name='b.qcow2/../c'/></disks>", "disks[0].name", "no disk's target"),
        ("<domain/><domain/>", "domain", "stands twice"),
        ("<domainsnapshot/>", "the document", "unknown there"),
    ],
)
def test_a_checkpoint_that_breaks_a_rule_is_refused_with_the_fields_name(text: str, field: str, problem: str) -> None:
    _refused(checkpoint_xml, _CHECKPOINT.format(text), "domaincheckpoint", field, problem)


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ("", "disks", "is missing"),
        ("<name>.a</name><disk name='vda'/>", "name", "no checkpoint's name"),
        ("<disk name='vda' type='block'/>", "disks[vda].type", "is not file"),
        ("<disk name='vda'><fleece/></disk>", "disks[vda].fleece", "is incomplete"),
        ("<disk name='vda'><fleece file='x'/></disk>", "disks[vda].fleece", "no absolute path"),
        ("<disks><disk name='vda'/></disks>", "the document", "unknown there: 'disks'"),
    ],
)
def test_a_snapshot_that_breaks_a_rule_is_refused_with_the_fields_name(text: str, field: str, problem: str) -> None:
    whole = f"<domainblocksnapshot>{text}</domainblocksnapshot>"
    _refused(snapshot_xml, whole, "domainblocksnapshot", field, problem)


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ("<address type='ip' host='a'/>", "disks", "is missing"),
        ("<address type='ip'/><disk name='vda'/>", "address.host", "is missing"),
        ("<address type='unix' host='a'/><disk name='vda'/>", "address.host", "does not fit type unix"),
        ("<address host='a' port='1' autoport='yes'/><disk name='vda'/>", "address.port", "autoport=yes"),
        ("<disk name='vda' checkpoint='a'/>", "disks[vda].snapshot", "is missing"),
        (
            "<disk name='vda' snapshot='s' checkpoint='a' allcheckpoints='yes'/>",
            "disks[vda].checkpoint",
            "does not fit",
        ),
        ("<disk name='vda' snapshot='s' readonly='no'/>", "disks[vda].readonly", "must be yes"),
    ],
)
def test_exports_that_break_a_rule_are_refused_with_the_fields_name(text: str, field: str, problem: str) -> None:
    _refused(export_xml, f"<domainblockexport>{text}</domainblockexport>", "domainblockexport", field, problem)


@pytest.mark.parametrize(
    ("room", "values", "field", "problem"),
    [
        (backup, [], "the document", "is no object"),
        (backup, {"mode": 3}, "mode", "is none of"),
        (backup, {"Mode": "pull"}, "Mode", "is unknown there"),
        (backup, {"disks": {}}, "disks", "is no list"),
        (backup, {"disks": ["vda"]}, "disks[0]", "is no object"),
        (backup, {"disks": [{"name": 1}]}, "disks[0].name", "is no text"),
        (backup, {"disks": [{"name": "vda", "backup": "no"}]}, "disks[vda].backup", "neither true nor false"),
        (backup, {"mode": "pull", "server": {"name": "a", "port": True}}, "server.port", "no whole number"),
        (backup, {"mode": "pull", "server": {"name": "a", "port": 1.0}}, "server.port", "no whole number"),
        (checkpoint, {"name": "a\x00"}, "name", "no checkpoint's name"),
        (checkpoint, {"description": "a\x00"}, "description", "not allowed"),
        (checkpoint, {"description": "\ud800"}, "description", "not allowed"),
        (checkpoint, {"creation_time": -1}, "creation_time", "no whole number"),
        (checkpoint, {"domain": "x" * (4 << 20) + "x"}, "domain", "is too long"),
        (snapshot, {"disks": [{"name": "vda", "fleece": "/a\x00"}]}, "disks[vda].fleece", "not allowed"),
        (export, {"type": "iscsi"}, "type", "is not nbd"),
    ],
)
def test_json_is_judged_by_the_same_rules(room: ModuleType, values: object, field: str, problem: str) -> None:
    with pytest.raises(errors.BadDocument) as caught:
        room.from_dict(values)
    assert caught.value.field == field
    assert problem in caught.value.problem


@pytest.mark.parametrize("domain", ["", "hello", "<domains/>", "<!DOCTYPE domain><domain/>", "<domain>&x;</domain>"])
def test_a_description_of_the_machine_must_be_a_domain_element(domain: str) -> None:
    with pytest.raises(errors.BadDocument) as caught:
        checkpoint_xml.serialise(CheckpointDocument(domain=domain))
    assert caught.value.field == "domain"


def test_a_value_that_breaks_a_rule_is_not_printed() -> None:
    with pytest.raises(errors.BadDocument, match=r"disks\[vda\]\.scratch"):
        backup_xml.serialise(BackupDocument(disks=(BackupDisk(name="vda", scratch=Store(file="/a")),)))


# -- defaults --------------------------------------------------------------------------------


def test_a_pull_without_disks_takes_all_that_are_writable_and_have_a_medium() -> None:
    found = backup.effective(pull(), FILES, NOW)
    assert [(disk.name, disk.backup) for disk in found.disks] == [
        ("vda", True),
        ("nvme0n1", True),
        ("vdc", False),
        ("sda", False),
    ]
    assert found.taking_part[0] == BackupDisk(
        name="vda",
        backupmode=DiskMode.FULL,
        exportname="vda",
        driver=Format.QCOW2,
        scratch=Store(file="/srv/a.qcow2.1525889631"),
    )


def test_a_push_names_its_files_after_the_checkpoint() -> None:
    found = backup.effective(BackupDocument(), FILES[:1], Moment(seconds=5, checkpoint="monday"))
    assert found.disks == (
        BackupDisk(
            name="vda",
            backupmode=DiskMode.FULL,
            driver=Format.QCOW2,
            target=Store(file="/srv/a.qcow2.monday"),
        ),
    )


def test_the_mode_of_a_disk_follows_the_checkpoints() -> None:
    disks = [
        BackupDisk(name="vda"),
        BackupDisk(name="nvme0n1", incremental="sunday", exportbitmap="mine"),
        BackupDisk(name="vdc", backupmode=DiskMode.FULL),
    ]
    found = backup.effective(pull(*disks, incremental="monday"), FILES, NOW)
    told = [(disk.backupmode, disk.incremental, disk.context) for disk in found.taking_part]
    assert told == [
        ("incremental", "monday", "qemu:dirty-bitmap:backup-vda"),
        ("incremental", "sunday", "qemu:dirty-bitmap:mine"),
        ("full", None, None),
    ]


def test_files_are_made_in_a_directory_if_one_is_given() -> None:
    found = backup.effective(pull(BackupDisk(name="vdb")), DISKS, NOW, directory="/var/scratch/")
    assert found.disks[0].scratch == Store(file="/var/scratch/vdb.1525889631")


def test_what_is_said_is_kept() -> None:
    disk = BackupDisk(
        name="vdb",
        type=StoreType.BLOCK,
        backupmode=DiskMode.FULL,
        exportname="",
        exportbitmap="b",
        driver=Format.QCOW2,
        scratch=Store(dev="/dev/vg/s"),
    )
    assert backup.effective(pull(disk), DISKS, NOW).disks[0] == disk


@pytest.mark.parametrize(
    ("document", "field", "problem"),
    [
        (pull(BackupDisk(name="vdz")), "disks[vdz]", "is no disk"),
        (pull(BackupDisk(name="vda"), BackupDisk(name="vda")), "disks[vda]", "stands twice"),
        (pull(BackupDisk(name="vda", backup=False)), "disks", "none would take part"),
        (pull(BackupDisk(name="sda")), "disks[sda]", "has no medium"),
        (pull(BackupDisk(name="vda", backupmode=DiskMode.INCREMENTAL)), "disks[vda].incremental", "is missing"),
        (pull(BackupDisk(name="vdb")), "disks[vdb].scratch", "cannot be made up"),
        (pull(BackupDisk(name="vda", scratch=Store(file="/srv/c.iso"))), "disks[vda].scratch", "source of disk vdc"),
        (
            pull(
                BackupDisk(name="vda", scratch=Store(file="/s")),
                BackupDisk(name="vdc", scratch=Store(file="/s")),
            ),
            "disks[vdc].scratch",
            "taken by disk vda",
        ),
        (
            pull(BackupDisk(name="vda", exportname="vdc"), BackupDisk(name="vdc")),
            "disks[vdc].exportname",
            "that of another disk",
        ),
        (BackupDocument(mode=Mode.PULL), "server.port", "is missing"),
        (BackupDocument(mode=Mode.PULL, server=Server(name="localhost")), "server.port", "is missing"),
        (BackupDocument(server=UNIX), "server", "needs mode pull"),
        (BackupDocument(disks=(BackupDisk(name="vdb", type=StoreType.BLOCK),)), "disks[vdb].target", "is missing"),
    ],
)
def test_a_backup_that_does_not_fit_the_machine_is_refused(document: BackupDocument, field: str, problem: str) -> None:
    with pytest.raises(errors.BadDocument) as caught:
        backup.effective(document, DISKS, NOW)
    assert caught.value.field == field
    assert problem in caught.value.problem


def test_a_machine_without_disks_has_neither_backup_nor_checkpoint() -> None:
    with pytest.raises(errors.BadDocument, match="the machine has none"):
        backup.effective(pull(), (), NOW)
    with pytest.raises(errors.BadDocument, match="the machine has none"):
        checkpoint.effective(CheckpointDocument(), (), NOW)


def test_a_checkpoint_is_by_default_called_after_its_time_and_tracks_all_writable_disks() -> None:
    found = checkpoint.effective(CheckpointDocument(), DISKS, NOW, parent="sunday", domain="<domain/>")
    assert found == CheckpointDocument(
        name="1525889631",
        creation_time=1525889631,
        parent="sunday",
        domain="<domain/>",
        disks=(
            CheckpointDisk(name="vda", bitmap="1525889631"),
            CheckpointDisk(name="vdb", bitmap="1525889631"),
            CheckpointDisk(name="vdc", checkpoint=Tracking.NO),
            CheckpointDisk(name="sda", checkpoint=Tracking.NO),
        ),
    )


def test_a_checkpoint_with_a_list_tracks_only_what_is_listed_also_by_path() -> None:
    listed = (CheckpointDisk(name="/dev/vg/b"), CheckpointDisk(name="sda", checkpoint=Tracking.NO))
    found = checkpoint.effective(CheckpointDocument(name="monday", disks=listed), DISKS, NOW)
    assert [(disk.name, disk.bitmap) for disk in found.tracked] == [("vdb", "monday")]


@pytest.mark.parametrize(
    ("disks", "field", "problem"),
    [
        ((CheckpointDisk(name="vdz"),), "disks[vdz]", "is no disk"),
        ((CheckpointDisk(name="/x"),), "disks[/x]", "is no disk"),
        ((CheckpointDisk(name="vda"), CheckpointDisk(name="/srv/a.qcow2")), "disks[vda]", "stands twice"),
        ((CheckpointDisk(name="vdc"),), "disks[vdc]", "no medium or is read-only"),
        ((CheckpointDisk(name="vda", bitmap="other"),), "disks[vda].bitmap", "is not the checkpoint's name"),
        ((CheckpointDisk(name="vda", checkpoint=Tracking.NO),), "disks", "none would be tracked"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(disks: tuple[CheckpointDisk, ...], field: str, problem: str) -> None:
    with pytest.raises(errors.BadDocument) as caught:
        checkpoint.effective(CheckpointDocument(name="monday", disks=disks), DISKS, NOW)
    assert caught.value.field == field
    assert problem in caught.value.problem


def test_a_path_that_two_disks_share_names_neither() -> None:
    twins = (MachineDisk(target="vda", source="/srv/a"), MachineDisk(target="vdb", source="/srv/a"))
    with pytest.raises(errors.BadDocument, match="source of several disks"):
        checkpoint.effective(CheckpointDocument(disks=(CheckpointDisk(name="/srv/a"),)), twins, NOW)


def test_a_redefined_checkpoint_keeps_its_time_and_parent() -> None:
    saved = CheckpointDocument(name="b", creation_time=7, parent="a", domain="<domain/>")
    found = checkpoint.redefined(saved, DISKS[:1])
    assert found == CheckpointDocument(
        name="b", creation_time=7, parent="a", domain="<domain/>", disks=(CheckpointDisk(name="vda", bitmap="b"),)
    )


@pytest.mark.parametrize(
    ("document", "field"),
    [
        (CheckpointDocument(creation_time=7), "name"),
        (CheckpointDocument(name="b"), "creation_time"),
        (CheckpointDocument(name="b", creation_time=7, parent="b"), "parent"),
    ],
)
def test_redefining_needs_name_and_time_and_no_circle(document: CheckpointDocument, field: str) -> None:
    with pytest.raises(errors.BadDocument) as caught:
        checkpoint.redefined(document, DISKS)
    assert caught.value.field == field


def test_a_snapshot_gets_a_name_and_files() -> None:
    asked = SnapshotDocument(disks=(SnapshotDisk(name="/srv/a.qcow2"), SnapshotDisk(name="vdc", fleece="/x")))
    assert snapshot.effective(asked, DISKS, "s1") == SnapshotDocument(
        name="s1", disks=(SnapshotDisk(name="vda", fleece="/srv/a.qcow2.s1"), SnapshotDisk(name="vdc", fleece="/x"))
    )


def test_a_snapshot_never_overwrites_a_disk() -> None:
    asked = SnapshotDocument(disks=(SnapshotDisk(name="vda", fleece="/srv/c.iso"),))
    with pytest.raises(errors.BadDocument, match=r"disks\[vda\]\.fleece is the source of disk vdc"):
        snapshot.effective(asked, DISKS, "s1")


def test_exports_get_names_and_are_read_only_unless_asked() -> None:
    asked = ExportDocument(
        address=Address(host="localhost"),
        disks=(
            ExportDisk(name="vda"),
            ExportDisk(name="vda", snapshot="s1"),
            ExportDisk(name="vdb", readonly=False),
        ),
    )
    found = export.effective(asked, DISKS)
    assert [(disk.exportname, disk.readonly) for disk in found.disks] == [
        ("vda", True),
        ("vda-s1", True),
        ("vdb", False),
    ]
    assert found.address == Address(host="localhost", autoport=True, tls=False)


def test_two_exports_of_one_name_are_refused() -> None:
    asked = ExportDocument(disks=(ExportDisk(name="vda"), ExportDisk(name="vdb", exportname="vda")))
    with pytest.raises(errors.BadDocument, match=r"disks\[vdb\]\.exportname"):
        export.effective(asked, DISKS)


def test_what_is_effective_is_effective_again_and_survives_json() -> None:
    once = backup.effective(pull(incremental="monday"), FILES, NOW)
    assert backup.effective(once, FILES, NOW) == once
    assert backup.from_dict(json.loads(json.dumps(backup.to_dict(once)))) == once
