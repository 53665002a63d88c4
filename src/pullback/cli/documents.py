"""What `--json` prints: one description per document, for docs/commands.md and for the tests."""

from __future__ import annotations

from pullback.cli import bootingdocuments, lookingdocuments, repositorydocuments, rollbackdocuments, servingdocuments
from pullback.cli.schema import MACHINE as _MACHINE
from pullback.cli.schema import MODES as _MODES
from pullback.cli.schema import NOTES as _NOTES
from pullback.cli.schema import TARGET as _TARGET
from pullback.cli.schema import Document as Document
from pullback.cli.schema import F, I, N, T
from pullback.cli.schema import Field as Field
from pullback.cli.schema import Kind as Kind
from pullback.cli.schema import result as _result

_EVENT = (
    Field(
        "kind",
        T,
        "what happened: job-started, job-progress, job-threshold, job-completed, job-failed, snapshot-created, "
        "snapshot-deleted, export-started, export-stopped, checkpoint-created, checkpoint-deleted, busy, machine-gone; "
        "of a restore point that is read by others: point-damaged, point-away, point-back, point-notice; of a machine "
        "that is booted from one: machine-started, machine-ready",
    ),
    Field("at", T, "when it was seen, UTC, ISO 8601"),
    Field("subject", T, "id of a job, name of a snapshot, export or checkpoint, target of a disk, or `machine`"),
    Field("facts", Kind.MAP, "more of it"),
)

#: Lines that any command may print before its result, and the one that stands in place of a result.
COMMON = {
    "note": Document(
        "A sentence that the user should read",
        (Field("type", T, "`note`", words=("note",)), Field("message", T, "the sentence")),
    ),
    "progress": Document(
        "How far a disk is (at most two a second and disk)",
        (
            Field("type", T, "`progress`", words=("progress",)),
            Field("disk", T, "its target"),
            Field("done", I, "bytes read"),
            Field("expected", I, "bytes to read at most; 0 if that is not known"),
            Field("finished", F, "the disk is through"),
        ),
    ),
    "event": Document(
        "Something that happened (`events --follow`, `serve`, `mount`, `boot`)",
        (Field("type", T, "`event`", words=("event",)), *_EVENT),
    ),
    "error": Document(
        "What went wrong, in place of a result",
        (
            Field("type", T, "`error`", words=("error",)),
            Field("code", T, "the stable code, see [exit codes](exit-codes.md)"),
            Field("message", T, "the sentence"),
            Field("hint", T, "a remedy", optional=True),
            Field("facts", Kind.MAP, "the facts in the sentence"),
            Field("notes", Kind.TEXTS, "what went wrong besides, while cleaning up"),
            Field("exit_code", I, "the exit code"),
        ),
    ),
}

_RANGES = (
    Field(
        "ranges",
        Kind.OBJECTS,
        "where, in order",
        (Field("start", I, "offset of the first byte"), Field("length", I, "bytes")),
    ),
    Field("more_ranges", I, "ranges that are not listed, because there are so many"),
)
_MARK = (
    Field("name", T, "the checkpoint's name"),
    Field("nonce", T, "16 hex digits, unique"),
    Field("first", I, "first step that its bitmap covers"),
    Field("last", I, "last step"),
)
_POINT_DISK = (
    _TARGET,
    Field("qdev", T, "the device's id or path in QEMU", optional=True),
    Field("serial", T, "its serial number", optional=True),
    Field("source", T, "its image file", optional=True),
    Field("source_format", T, "the format of that file", optional=True),
    Field("size", I, "bytes that the guest sees"),
    Field("mode", T, "how it was read", words=_MODES),
    Field("reason", T, "why it was read whole", optional=True),
    Field(
        "parent",
        Kind.OBJECT,
        "the disk of the restore point that it was an increment of",
        (Field("point", T, "the point's id"), _TARGET),
        optional=True,
    ),
    Field("mark", Kind.OBJECT, "the checkpoint made in the same instant", _MARK, optional=True),
    Field("image", T, "file name of the image (`dir:` only)", optional=True),
    Field("hashes", T, "file name of its block hashes (`dir:` only)", optional=True),
    Field("block_size", I, "bytes of a hashed block"),
    Field("digest", T, "SHA-256 over the SHA-256s of the blocks, hex"),
    Field("structure", T, "SHA-256 of all in the image that is not data of the disk, hex (`dir:` only)", optional=True),
    Field("stored", I, "bytes that it added to the repository"),
    Field("read", I, "bytes that were read from the machine"),
)
_DESCRIPTION = (
    Field("kind", T, "a QEMU process, or images of a machine that was off", words=("qemu", "images")),
    Field("program", T, "the file of QEMU's program", optional=True),
    Field("argv", Kind.TEXTS, "its command line, secrets masked"),
    Field("version", T, "of QEMU, or of the storage daemon"),
    Field("machine_type", T, "with its version", optional=True),
    Field("uuid", T, "of the machine", optional=True),
    Field(
        "images",
        Kind.OBJECTS,
        "of a machine that was off",
        (_TARGET, Field("path", T, "its file"), Field("format", T, "its format")),
    ),
    Field("xml", Kind.TEXTS, "the lines of libvirt's XML, of a machine that libvirt manages"),
)
_FIRMWARE = (
    Field("name", T, "its target: pflash0, pflash1"),
    Field("writable", F, "the machine keeps variables in it"),
    Field("size", I, "bytes"),
    Field("sha256", T, "of its bytes, hex"),
)
_TPM = (
    Field("version", T, "of the TPM", words=("1.2", "2.0")),
    Field("backend", T, "how swtpm keeps it", words=("dir", "file")),
    Field("encrypted", F, "swtpm encrypts it with a key of its own"),
    Field(
        "files",
        Kind.OBJECTS,
        "swtpm's files",
        (Field("name", T, "its name"), Field("size", I, "bytes"), Field("sha256", T, "of its bytes, hex")),
    ),
)
_POINT = (
    Field("id", T, "the restore point's id"),
    _MACHINE,
    Field("created", T, "the instant, UTC, ISO 8601"),
    Field("level", T, "what was asked for", words=("auto", "full")),
    Field("pullback", T, "version of Pullback"),
    Field("qemu", T, "version of QEMU"),
    Field("engine", T, "the fleecing engine, or engines; offline for images"),
    Field("pause_us", I, "microseconds that the machine stood still"),
    Field("checkpoint", T, "name of the checkpoint made with it", optional=True),
    Field("disks", Kind.OBJECTS, "its disks", _POINT_DISK),
    Field("notes", Kind.TEXTS, "sentences for people"),
    Field("host", T, "the host that made it", optional=True),
    Field("milliseconds", I, "how long the backup took", optional=True),
    Field("tags", Kind.TEXTS, "the user's words for it"),
    Field("description", Kind.OBJECT, "how the machine was started", _DESCRIPTION, optional=True),
    Field("firmware", Kind.OBJECTS, "its firmware devices", _FIRMWARE),
    Field("tpm", Kind.OBJECT, "the state of its TPM", _TPM, optional=True),
)
_BITMAP = (
    Field("name", T, "its name"),
    Field("granularity", I, "bytes that one bit stands for"),
    Field("count", I, "bytes marked"),
    Field("recording", F, "it notices new writes"),
    Field("busy", F, "a job or an export uses it"),
    Field("persistent", F, "it is stored in the image"),
    Field("inconsistent", F, "it was in use when the machine died, and is worthless"),
)
_INFO_DISK = (
    _TARGET,
    Field("bus", T, "virtio, scsi, sata, ide, usb, nvme, floppy, sd, firmware or other"),
    Field("qdev", T, "the device's id or path in QEMU"),
    Field("serial", T, "its serial number, or empty"),
    Field("root", T, "the node directly under the device", optional=True),
    Field("node", T, "the node that holds the bitmaps", optional=True),
    Field("format", T, "driver of that node"),
    Field("image", T, "file name of the image"),
    Field("size", I, "bytes"),
    Field("cluster", I, "bytes of a cluster of the image, in which holes are made"),
    Field("read_only", F, "the guest may only read"),
    Field("removable", F, "a drive with removable media"),
    Field("iothread", T, "the iothread it lives in", optional=True),
    Field("bitmaps", Kind.OBJECTS, "all named bitmaps on it", _BITMAP),
    Field("buried", Kind.TEXTS, "our bitmaps in backing images, where they are of no use"),
    Field("untrackable", T, "why its changes cannot be tracked", optional=True),
    Field("transient", F, "its changes are tracked only while this QEMU runs"),
    Field("hole_file", T, "the file whose holes are the disk's, where QEMU does not tell all of them", optional=True),
    Field("left_out", T, "why it is left out unless named", optional=True),
    Field(
        "checkpoints",
        Kind.OBJECTS,
        "checkpoints on it, oldest first",
        (*_MARK, Field("dirty", I, "bytes changed in its steps")),
    ),
    Field("chain_problem", T, "why its checkpoints are worthless", optional=True),
)
_CAPABILITIES = (
    Field("filter", F, "copy-before-write with break-snapshot"),
    Field("classic", F, "blockdev-backup in transactions"),
    Field("classic_breaks_snapshot", F, "the classic engine protects the guest too"),
    Field("exports", F, "block exports"),
    Field("fuse", F, "FUSE exports"),
    Field("graph", F, "the block graph can be asked for"),
    Field("push", F, "what a push job needs: chunks with a limit, reopening, yank"),
    Field(
        "defects",
        Kind.OBJECT,
        "what this build does wrong",
        (
            Field("iothread_nbd_aborts", F, "an NBD client of a disk in an iothread kills it"),
            Field("snapshot_reads_cross", F, "reads of a snapshot must not cross 64 KiB"),
            Field("probed", F, "it was tried; if false, the worst is assumed"),
        ),
    ),
)

_CHECKPOINT = (
    Field("name", T, "its name"),
    Field("created", T, "the instant, UTC, ISO 8601; null if nobody knows", optional=True),
    Field("description", T, "what it is for", optional=True),
    Field("parent", T, "the checkpoint before it", optional=True),
    Field("repository", T, "id of the repository whose backup made it", optional=True),
    Field("documented", F, "there is a document about it"),
    Field("problem", T, "why it cannot be relied on", optional=True),
    Field(
        "disks",
        Kind.OBJECTS,
        "each disk that has its bitmap",
        (
            _TARGET,
            *_MARK[1:],
            Field("granularity", I, "bytes that one bit stands for"),
            Field("recorded", I, "bytes changed since it, up to the next one"),
            Field("recording", F, "it is the newest, and notices new writes"),
            Field("busy", F, "a job or an export uses its bitmap"),
            Field("memory", I, "bytes of QEMU's memory that the bitmap takes at most"),
            Field("stored", I, "bytes that it takes in the image at most"),
            Field("problem", T, "why it is of no use on this disk", optional=True),
            Field("dirty", I, "bytes changed since it; null unless asked for", optional=True),
        ),
    ),
)
_CHECKPOINT_INFO = (
    _MACHINE,
    Field("checkpoint", Kind.OBJECT, "the checkpoint", _CHECKPOINT),
    Field("document", Kind.MAP, "its `domaincheckpoint` in JSON, which `checkpoint redefine` takes back"),
    Field("kept", Kind.MAP, "the machine at that moment: name, qemu, disks; empty if that is not known"),
)
_ONE_CHECKPOINT = (_MACHINE, Field("checkpoint", Kind.OBJECT, "the checkpoint", _CHECKPOINT))

_EXPORT = (
    Field("name", T, "the NBD name"),
    _TARGET,
    Field("uri", T, "what an NBD client takes (credentials of TLS aside)"),
    Field("snapshot", T, "the snapshot that is served; null: the disk itself", optional=True),
    Field("writable", F, "it can be written"),
    Field("tls", T, "how both ends prove who they are: x509 or psk; null without TLS", optional=True),
    Field(
        "contexts",
        Kind.OBJECTS,
        "metadata contexts that tell what changed",
        (Field("context", T, "its name"), Field("since", T, "the checkpoint since which")),
    ),
    Field("job", T, "id of what it ends with"),
)
_SNAPSHOT = (
    Field("name", T, "its name"),
    Field("job", T, "8 hex digits, part of every name of it in QEMU"),
    Field("created", T, "the instant, UTC, ISO 8601"),
    Field("checkpoint", T, "the checkpoint made with it", optional=True),
    Field("owner", I, "the process that it ends with", optional=True),
    Field("pause_seconds", N, "how long the machine stood still"),
    Field("frozen_file_systems", I, "file systems that the guest agent froze for the instant"),
    Field("frozen_seconds", N, "how long they were frozen"),
    Field(
        "disks",
        Kind.OBJECTS,
        "the disks in it",
        (
            _TARGET,
            Field("size", I, "bytes"),
            Field("engine", T, "filter or classic; null: nobody writes to the disk", optional=True),
            Field("reason", T, "why this engine"),
            Field("scratch", T, "the image that takes old blocks", optional=True),
            Field("checkpoint", T, "the checkpoint made on it", optional=True),
        ),
    ),
)
_JOB = (
    _MACHINE,
    Field("job", T, "8 hex digits, part of every name of it in QEMU"),
    Field("mode", T, "who moves the data", words=("pull", "push")),
    Field("created", T, "the instant, UTC, ISO 8601"),
    Field("pause_seconds", N, "how long the machine stood still"),
    Field("frozen_seconds", N, "how long file systems of the guest were frozen"),
    Field("checkpoint", T, "the checkpoint made with it", optional=True),
    Field("exports", Kind.OBJECTS, "of a pull: where to read it", _EXPORT),
    Field("engines", Kind.MAP, "how each disk is frozen, and why: target to words"),
    Field("document", Kind.MAP, "the `domainbackup` in force, in JSON"),
)
_STATS = (
    _MACHINE,
    Field("job", T, "its id"),
    Field("mode", T, "who moves the data", words=("pull", "push")),
    Field("seconds", N, "since its instant"),
    Field("finished", F, "a push has nothing left to do, well or badly"),
    Field(
        "disks",
        Kind.OBJECTS,
        "each disk",
        (
            _TARGET,
            Field("status", T, "running, paused, pending, concluded or failed; of a pull serving"),
            Field("done", I, "push: bytes copied; pull: bytes that scratch takes"),
            Field("total", I, "push: bytes to be copied; pull: the disk's size"),
            Field("bytes_per_second", I, "push: the limit; null: none", optional=True),
            Field("error", T, "what went wrong", optional=True),
        ),
    ),
)
_ENDED = (
    _MACHINE,
    Field("job", T, "its id"),
    Field("mode", T, "who moved the data", words=("pull", "push")),
    Field("success", F, "it ended well"),
    Field("error", T, "why it came to nothing", optional=True),
    Field("began", T, "its instant, UTC, ISO 8601"),
    Field("ended", T, "its end, UTC, ISO 8601"),
    Field("checkpoint", T, "the checkpoint that was made with it and stays", optional=True),
    Field("disks", Kind.MAP, "target to `done` and `total`, as in `job stats`"),
    Field("document", Kind.MAP, "the `domainbackup` that was in force, in JSON"),
)
_PAUSED = (_MACHINE, Field("paused", F, "it rests"))

_OVERLAY_CHECKPOINTS = Field("checkpoints", Kind.TEXTS, "the checkpoints that go on in it, oldest first")

#: Command -> what it prints at the end if it did not fail.
RESULTS: dict[str, tuple[Document, ...]] = {
    "backup": (
        _result(
            "backup",
            "A restore point was made",
            Field("point", Kind.OBJECT, "the restore point", _POINT),
            Field("pause_seconds", N, "how long the machine stood still"),
            Field("was_paused", F, "it was paused already, and was left so"),
            Field("frozen_file_systems", N, "file systems that the guest agent froze for the instant"),
            Field("frozen_seconds", N, "how long they were frozen"),
            Field("seconds", N, "time in all"),
            Field("notes", Kind.TEXTS, "sentences for people"),
            Field("broken", Kind.TEXTS, "disks whose chain should have continued and did not"),
        ),
        _result(
            "backup",
            "With `--dry-run`",
            Field("dry_run", F, "true"),
            _MACHINE,
            Field(
                "disks",
                Kind.OBJECTS,
                "what would be read",
                (
                    _TARGET,
                    Field("mode", T, "how", words=_MODES),
                    Field("reason", T, "why", optional=True),
                    Field("parent", T, "id of the restore point it would build on", optional=True),
                    Field("read_at_most", I, "upper bound of the bytes to read"),
                    Field("size", I, "bytes of the disk"),
                    Field("broken", F, "its chain should have continued, and would not"),
                ),
            ),
            Field("left_out", Kind.MAP, "disks left out: target to reason"),
        ),
    ),
    "list": (
        _result(
            "list",
            "What a repository holds",
            Field(
                "machines",
                Kind.OBJECTS,
                "each machine",
                (
                    _MACHINE,
                    Field(
                        "points",
                        Kind.OBJECTS,
                        "restore points, oldest first",
                        (
                            Field("id", T, "its id"),
                            Field("created", T, "the instant, UTC, ISO 8601"),
                            Field("level", T, "what was asked for", words=("auto", "full")),
                            Field("stored", I, "bytes that it added to the repository"),
                            Field("tags", Kind.TEXTS, "the user's words for it"),
                            Field(
                                "disks",
                                Kind.OBJECTS,
                                "its disks",
                                (
                                    _TARGET,
                                    Field("size", I, "bytes"),
                                    Field("mode", T, "how it was read", words=_MODES),
                                    Field("stored", I, "bytes that the image takes"),
                                ),
                            ),
                        ),
                    ),
                    Field(
                        "damaged",
                        Kind.OBJECTS,
                        "restore points that cannot be used",
                        (Field("id", T, "its id"), Field("problem", T, "what is wrong")),
                    ),
                ),
            ),
        ),
    ),
    "show": (
        _result(
            "show",
            "A restore point",
            Field("point", Kind.OBJECT, "the restore point", _POINT),
            Field("freed_if_forgotten", I, "bytes that removing this point alone would free"),
            Field("dependents", Kind.TEXTS, "ids of the points whose images build upon it (`dir:` only)"),
            Field(
                "chunks",
                Kind.OBJECT,
                "its chunks (restic's format only)",
                (
                    Field("total", I, "of all disks"),
                    Field("zero", I, "that are all zero"),
                    Field("distinct", I, "different ones"),
                    Field("alone", I, "different ones that no other point of the repository has"),
                    Field("stored", I, "bytes that the different ones take in the repository"),
                ),
                optional=True,
            ),
        ),
    ),
    "restore": (
        _result(
            "restore",
            "Disks were written",
            Field("point", T, "the restore point's id"),
            _MACHINE,
            Field("created", T, "its instant, UTC, ISO 8601"),
            Field("seconds", N, "time in all"),
            Field(
                "disks",
                Kind.OBJECTS,
                "each disk",
                (
                    _TARGET,
                    Field("path", T, "the file or block device, the server's URI, or the machine's disk"),
                    Field("format", T, "raw or qcow2"),
                    Field("size", I, "bytes"),
                    Field("read", I, "bytes read from the repository"),
                    Field("digest", T, "the digest that was proven"),
                    Field("checked", F, "was it read back and compared?"),
                ),
            ),
            Field("files", Kind.TEXTS, "files of what the machine was besides its disks"),
            Field(
                "copy",
                Kind.OBJECT,
                "who a copy is (`--as`)",
                (Field("name", T, "its name"), Field("uuid", T, "its uuid")),
                optional=True,
            ),
            Field(
                "macs",
                Kind.OBJECTS,
                "addresses of a copy's network cards",
                (Field("old", T, "the original's; null: QEMU's own", optional=True), Field("new", T, "the copy's")),
            ),
            Field("notes", Kind.TEXTS, "sentences for people"),
        ),
    ),
    "verify": (
        _result(
            "verify",
            "What was found (also with damage; the exit code is 13 then)",
            Field("seconds", N, "time in all"),
            Field("damaged", I, "how many are damaged"),
            Field(
                "disks",
                Kind.OBJECTS,
                "each disk of each point",
                (
                    _MACHINE,
                    Field("point", T, "the restore point's id"),
                    Field("target", T, "the disk; empty if the point as a whole is damaged"),
                    Field("read", I, "bytes read; in restic's format, bytes of the disk that were proven"),
                    Field("problem", T, "what is wrong; null if nothing was found", optional=True),
                    *_RANGES,
                ),
            ),
            Field(
                "files",
                Kind.OBJECTS,
                "files of the repository that are not what was written (restic's format)",
                (
                    Field("file", T, "its place in the repository"),
                    Field("problem", T, "what is wrong"),
                    Field("lost", I, "blobs in it of which there is no good copy"),
                    Field("spared", I, "bad blobs of which there is another copy"),
                ),
            ),
            Field("notes", Kind.TEXTS, "sentences for people"),
            Field("packs_read", I, "pack files that were read"),
            Field("bytes_read", I, "their bytes"),
        ),
        _result(
            "verify",
            "With `--against` (the exit code is 13 if anything changed without a trace)",
            Field("against", T, "the machine's name"),
            Field("seconds", N, "time in all"),
            Field(
                "disks",
                Kind.OBJECTS,
                "each disk",
                (
                    _TARGET,
                    Field("point", T, "id of the restore point that it was compared with", optional=True),
                    Field("reason", T, "why it was not compared", optional=True),
                    Field("size", I, "bytes of the disk"),
                    Field("changed", I, "bytes in blocks that tracking says have changed"),
                    Field("compared", I, "bytes in blocks that were compared"),
                    Field("differing", I, "bytes in blocks that differ, although tracking says they did not change"),
                    Field("noticed", I, "bytes in blocks where only holes were made, which a backup looks for itself"),
                    *_RANGES,
                ),
            ),
        ),
    ),
    "diff": (
        _result(
            "diff",
            "What differs",
            _MACHINE,
            Field("old", T, "id of the first point"),
            Field("new", T, "id of the second point"),
            Field("grain", I, "bytes that ranges are multiples of"),
            Field("seconds", N, "time in all"),
            Field(
                "disks",
                Kind.OBJECTS,
                "each disk of either point",
                (
                    _TARGET,
                    Field("old_size", I, "bytes; null: it was added", optional=True),
                    Field("new_size", I, "bytes; null: it was removed", optional=True),
                    Field("changed", I, "bytes that differ, of the part that both have"),
                    *_RANGES,
                ),
            ),
        ),
    ),
    "info": (
        _result(
            "info",
            "A machine",
            _MACHINE,
            Field("socket", T, "its QMP socket; null if it is off", optional=True),
            Field("status", T, "QEMU's run state: running, paused …; off for images"),
            Field("qemu", T, "QEMU's version"),
            Field("capabilities", Kind.OBJECT, "what its QEMU can do; null if it is off", _CAPABILITIES, optional=True),
            Field("jobs", Kind.MAP, "block jobs that run: id to type"),
            Field(
                "exports",
                Kind.OBJECTS,
                "block exports that are there",
                (
                    Field("id", T, "its id"),
                    Field("type", T, "nbd, fuse …"),
                    Field("node-name", T, "the node that it shows"),
                ),
            ),
            Field("cleared", Kind.TEXTS, "ids of dead jobs whose leftovers were removed now"),
            Field("disks", Kind.OBJECTS, "all block devices", _INFO_DISK),
        ),
    ),
    "recover": (
        _result(
            "recover",
            "What earlier commands had left",
            _MACHINE,
            Field("running", F, "it runs; false: nothing answers at its socket, and files were all that was left"),
            Field("cleared", Kind.TEXTS, "ids of dead jobs whose leftovers were removed"),
            Field(
                "adopted",
                Kind.OBJECTS,
                "what lasts",
                (
                    Field("job", T, "its id"),
                    Field("kind", T, "what it is", words=("snapshot", "pull", "push", "export")),
                    Field("name", T, "its name"),
                ),
            ),
            Field("exports", Kind.TEXTS, "names of exports"),
            Field("ended", F, "what lasted was ended (--end)"),
        ),
    ),
    "untrack": (
        _result(
            "untrack",
            "What was removed",
            _MACHINE,
            Field("bitmaps", Kind.MAP, "bitmaps removed: target to names"),
            Field("checkpoints", Kind.TEXTS, "checkpoints whose documents were removed"),
            Field("jobs", Kind.TEXTS, "ids of dead jobs whose leftovers were removed"),
        ),
    ),
    # Its words are for shells.
    "completion": (),
    "checkpoint create": (
        _result(
            "checkpoint create",
            "A checkpoint was made",
            *_CHECKPOINT_INFO,
            Field("frozen_file_systems", N, "file systems that the guest agent froze for the instant"),
            Field("frozen_seconds", N, "how long they were frozen"),
            _NOTES,
        ),
    ),
    "checkpoint list": (
        _result(
            "checkpoint list",
            "Checkpoints of a machine",
            _MACHINE,
            Field("current", T, "the newest, whose bitmaps record", optional=True),
            Field("checkpoints", Kind.OBJECTS, "those that were asked for", _CHECKPOINT),
            _NOTES,
        ),
    ),
    "checkpoint info": (_result("checkpoint info", "A checkpoint", *_CHECKPOINT_INFO, _NOTES),),
    "checkpoint current": (_result("checkpoint current", "The newest checkpoint", *_ONE_CHECKPOINT),),
    "checkpoint parent": (_result("checkpoint parent", "The checkpoint before", *_ONE_CHECKPOINT),),
    "checkpoint delete": (
        _result(
            "checkpoint delete",
            "Checkpoints were deleted",
            _MACHINE,
            Field("deleted", Kind.TEXTS, "their names, in the order in which they went"),
            Field("metadata_only", F, "their bitmaps stay"),
            _NOTES,
        ),
    ),
    "checkpoint redefine": (_result("checkpoint redefine", "A document was put back", *_CHECKPOINT_INFO, _NOTES),),
    "checkpoint changes": (
        _result(
            "checkpoint changes",
            "What changed on a disk",
            _MACHINE,
            _TARGET,
            Field("since", T, "the checkpoint where it begins"),
            Field("until", T, "the one where it ends; null: now", optional=True),
            Field("size", I, "bytes of the disk"),
            Field("granularity", I, "bytes that a range is a multiple of"),
            Field("changed", I, "bytes in all"),
            Field(
                "extents",
                Kind.OBJECTS,
                "the ranges, in order",
                (Field("offset", I, "first byte"), Field("length", I, "bytes")),
            ),
        ),
    ),
    "overlay create": (
        _result(
            "overlay create",
            "Overlays were put on disks",
            _MACHINE,
            Field(
                "overlays",
                Kind.OBJECTS,
                "each overlay",
                (
                    _TARGET,
                    Field("path", T, "its file"),
                    Field("backing", T, "the image below"),
                    _OVERLAY_CHECKPOINTS,
                ),
            ),
            _NOTES,
        ),
    ),
    "overlay commit": (
        _result(
            "overlay commit",
            "An overlay was committed",
            _TARGET,
            Field("overlay", T, "the overlay's file"),
            Field("image", T, "the image below, which is the disk's image again"),
            _OVERLAY_CHECKPOINTS,
            Field("removed", F, "the overlay's file was removed"),
            _NOTES,
        ),
    ),
    "events": (
        _result(
            "events",
            "What is there; with `--follow`, the end",
            Field("events", Kind.OBJECTS, "what is there, as if it began now; empty with `--follow`", _EVENT),
            Field("gone", F, "the machine does not answer any more"),
        ),
    ),
    "snapshot create": (
        _result(
            "snapshot create",
            "A snapshot was made",
            _MACHINE,
            Field("snapshot", Kind.OBJECT, "the snapshot", _SNAPSHOT),
            _NOTES,
        ),
    ),
    "snapshot list": (
        _result(
            "snapshot list",
            "Snapshots of a machine",
            _MACHINE,
            Field("snapshots", Kind.OBJECTS, "oldest first", _SNAPSHOT),
        ),
    ),
    "snapshot info": (
        _result(
            "snapshot info",
            "A snapshot",
            _MACHINE,
            Field("snapshot", Kind.OBJECT, "the snapshot", _SNAPSHOT),
            Field("exports", Kind.OBJECTS, "where it is served", _EXPORT),
            Field("document", Kind.MAP, "its `domainblocksnapshot` in JSON"),
        ),
    ),
    "snapshot delete": (
        _result(
            "snapshot delete",
            "A snapshot was deleted",
            _MACHINE,
            Field("deleted", T, "its name"),
            Field("checkpoint", T, "the checkpoint made with it, which stays", optional=True),
        ),
    ),
    "export start": (
        _result("export start", "Exports were started", _MACHINE, Field("exports", Kind.OBJECTS, "each", _EXPORT)),
    ),
    "export list": (
        _result("export list", "What is served", _MACHINE, Field("exports", Kind.OBJECTS, "each", _EXPORT)),
    ),
    "export stop": (
        _result("export stop", "Exports were stopped", _MACHINE, Field("stopped", Kind.TEXTS, "their names")),
    ),
    "job begin": (_result("job begin", "A job was begun", *_JOB),),
    "job info": (_result("job info", "The job that is under way", *_JOB),),
    "job stats": (
        _result("job stats", "How far it is", *_STATS),
        _result("job stats", "With `--completed`, and at the end of `--follow`", *_ENDED),
    ),
    "job wait": (
        _result("job wait", "Nothing is left to do, or it is a pull", *_STATS),
        _result("job wait", "It was ended meanwhile", *_ENDED),
    ),
    "job end": (_result("job end", "It was ended well", *_ENDED),),
    "job abort": (_result("job abort", "It was taken back", *_ENDED),),
    "job speed": (
        _result(
            "job speed",
            "The speed was limited",
            _MACHINE,
            Field("bytes_per_second", I, "for each disk; null: no limit", optional=True),
        ),
    ),
    "job pause": (_result("job pause", "It rests", *_PAUSED),),
    "job resume": (_result("job resume", "It goes on", *_PAUSED),),
    **bootingdocuments.RESULTS,
    **repositorydocuments.RESULTS,
    **lookingdocuments.RESULTS,
    **rollbackdocuments.RESULTS,
    **servingdocuments.RESULTS,
}
