"""What the commands print with `--json` that look into restore points, and prove them."""

from __future__ import annotations

from pullback.cli.schema import MACHINE, NOTES, Document, F, Field, I, Kind, N, T, result

_POINT = (Field("point", T, "the restore point's id"), MACHINE, Field("created", T, "its instant, UTC, ISO 8601"))
_ENTRY = (
    Field("name", T, "its name; bytes that are no UTF-8 are written \\xNN"),
    Field("raw", T, "the bytes of such a name, base64", optional=True),
    Field(
        "kind",
        T,
        "what it is",
        words=("file", "directory", "link", "character device", "block device", "pipe", "socket", "unknown"),
    ),
    Field("mode", T, "its permissions, octal"),
    Field("uid", I, "its owner in the guest"),
    Field("gid", I, "its group in the guest"),
    Field("size", I, "bytes"),
    Field("changed", T, "when it was changed, UTC, ISO 8601; null if no calendar has that year", optional=True),
    Field("target", T, "where a link leads", optional=True),
)
_MISSED = (Field("path", T, "which"), Field("reason", T, "why"))
_SIGN = (
    Field("kind", T, "what was waited for", words=("agent", "console-text", "run", "still-running", "fsck")),
    Field("text", T, "the regular expression, the command, the seconds"),
    Field("good", F, "it was seen"),
    Field("seconds", N, "how long after the start of the machine (`fsck`: how long it took)", optional=True),
    Field("said", T, "what was seen, or why not, in the guest's words"),
)
_PROOF = (
    *_POINT,
    Field("at", T, "when it was booted, UTC, ISO 8601"),
    Field("proven", F, "it came up"),
    Field("problem", T, "why not", optional=True),
    Field("signs", Kind.OBJECTS, "what was waited for", _SIGN),
    Field("any", F, "one sign of the running machine is enough; else all are wanted"),
    Field("why", T, "why these signs were chosen; null: the user chose them", optional=True),
    Field("up_seconds", N, "until all that was wanted was seen", optional=True),
    Field("seconds", N, "the whole proof"),
    Field("cpu_seconds", N, "processor time of the machine"),
    Field("read", I, "bytes that the machine read from its disks"),
    Field("written", I, "bytes that it wrote, and that were thrown away"),
    Field("fetched", I, "bytes that were read from the repository; null: not known", optional=True),
    Field("accel", T, "what ran its processors: kvm or tcg"),
    Field("cpus", I, "its processors"),
    Field("memory", I, "its memory, in bytes"),
    Field("network", T, "what its network cards were connected to"),
    Field("left_out", Kind.TEXTS, "what of the saved machine was not made anew, and why"),
    Field(
        "system",
        Kind.OBJECTS,
        "what the guest's agent tells of its system",
        (Field("name", T, "system, kernel, architecture"), Field("value", T, "in the guest's words")),
    ),
    Field("no_picture", T, "why there is no picture; null: there is one, screen.png", optional=True),
    Field("console", I, "bytes that came on the serial port"),
    NOTES,
    Field("report", T, "the directory of the report"),
)

#: Command -> what it prints at the end if it did not fail.
RESULTS: dict[str, tuple[Document, ...]] = {
    "files": (
        result(
            "files",
            "What is on the disks (`ls` without a path)",
            *_POINT,
            Field(
                "volumes",
                Kind.OBJECTS,
                "disks, partitions, logical volumes",
                (
                    Field("name", T, "by which its files are named: vda1, group/volume"),
                    Field("kind", T, "what it is", words=("disk", "partition", "logical volume")),
                    Field("size", I, "bytes"),
                    Field("content", T, "the file system, or what else is on it, as blkid calls it", optional=True),
                    Field("label", T, "the file system's label", optional=True),
                    Field("uuid", T, "its UUID", optional=True),
                    Field("table", T, "the kind of its partition table", optional=True),
                    Field("part_label", T, "the partition's own label", optional=True),
                    Field("part_uuid", T, "the partition's own UUID", optional=True),
                    Field("closed", T, "why its files cannot be read; null: they can", optional=True),
                ),
            ),
        ),
        result(
            "files",
            "What is in a directory (`ls`)",
            *_POINT,
            Field("path", T, "what was asked for"),
            Field("entries", Kind.OBJECTS, "by name", _ENTRY),
            Field("unread", Kind.OBJECTS, "what could not be read", _MISSED),
            NOTES,
        ),
        result(
            "files",
            "Files were fetched (`get`)",
            *_POINT,
            Field("path", T, "what was asked for"),
            Field("to", T, "the file or directory that was made"),
            Field("archive", F, "it is a tar archive"),
            Field("files", I, "how many"),
            Field("directories", I, "how many"),
            Field("links", I, "symbolic links"),
            Field("size", I, "bytes of the files"),
            Field("left_out", Kind.OBJECTS, "what was left out, because it could do harm; the first 100", _MISSED),
            Field("left_out_count", I, "how many in all"),
            Field("seconds", N, "time in all"),
            NOTES,
        ),
    ),
    "prove": (
        result(
            "prove",
            "Restore points were booted",
            Field("proven", I, "how many came up"),
            Field("not_proven", I, "how many did not (exit code 13)"),
            Field("points", Kind.OBJECTS, "each that was booted; the file report.json holds the same", _PROOF),
            Field(
                "failed",
                Kind.OBJECTS,
                "each that could not even be tried (`--all`)",
                (
                    MACHINE,
                    Field("point", T, "the restore point's id"),
                    Field("code", T, "the error's stable code, see [exit codes](exit-codes.md)"),
                    Field("message", T, "its sentence"),
                ),
            ),
        ),
    ),
}
