"""What `rollback` prints with `--json`."""

from __future__ import annotations

from pullback.cli.schema import MACHINE, NOTES, TARGET, Document, F, Field, I, Kind, N, T, result

_HOW = (
    Field("by_bitmaps", F, "what differs is known by hashes and bitmaps; false: by reading the whole disk"),
    Field("reason", T, "why it is read whole", optional=True),
)

#: Command -> what it prints at the end if it did not fail.
RESULTS: dict[str, tuple[Document, ...]] = {
    "rollback": (
        result(
            "rollback",
            "A machine was rolled back",
            Field("dry_run", F, "false"),
            MACHINE,
            Field("point", T, "the restore point's id"),
            Field("created", T, "its instant, UTC, ISO 8601; null if it was finished without asking", optional=True),
            Field("safety", T, "id of the restore point that was made first", optional=True),
            Field("finished", F, "it had been interrupted, and was finished now"),
            Field("after", T, "what became of the machine", words=("run", "held", "quit")),
            Field("down_seconds", N, "from the stop to the end"),
            Field("seconds", N, "time in all"),
            Field(
                "disks",
                Kind.OBJECTS,
                "each disk; none if all was written already",
                (
                    TARGET,
                    Field("size", I, "bytes"),
                    *_HOW,
                    Field("changed", I, "bytes in chunks that were written"),
                    Field("written", I, "bytes written as data"),
                    Field("zeroed", I, "bytes written as zeroes, by unmapping where possible"),
                ),
            ),
            NOTES,
        ),
        result(
            "rollback",
            "With `--dry-run`",
            Field("dry_run", F, "true"),
            MACHINE,
            Field("point", T, "the restore point's id"),
            Field(
                "disks",
                Kind.OBJECTS,
                "each disk",
                (
                    TARGET,
                    Field("size", I, "bytes"),
                    *_HOW,
                    Field("bytes", I, "in chunks that would be written, at most"),
                    Field("written_since", I, "of those: in chunks written since the newest restore point"),
                ),
            ),
        ),
        result(
            "rollback",
            "With `--abandon`",
            Field("dry_run", F, "false"),
            Field("abandoned", F, "true"),
            MACHINE,
            Field("point", T, "the restore point's id"),
            Field("targets", Kind.TEXTS, "the disks that are half rolled back"),
        ),
    ),
}
