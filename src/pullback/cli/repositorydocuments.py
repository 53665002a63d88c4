"""What the commands that keep a repository in order print with `--json`."""

from __future__ import annotations

from pullback.cli.schema import MACHINE, NOTES, Document, F, Field, I, Kind, N, T, result

_JUDGED = (
    Field("id", T, "its id"),
    Field("created", T, "the instant, UTC, ISO 8601; null if it cannot be read", optional=True),
    Field("reasons", Kind.TEXTS, "why, in restic's words or ours"),
)
_KEY = (
    Field("id", T, "64 hex digits"),
    Field("current", F, "it opened the repository"),
    Field("user", T, "who made it, as it says itself"),
    Field("host", T, "where"),
    Field("created", T, "when, RFC 3339"),
    Field("damaged", F, "its file cannot be used"),
)

#: Command -> what it prints at the end if it did not fail.
RESULTS: dict[str, tuple[Document, ...]] = {
    "init": (
        result(
            "init",
            "A repository was made",
            Field("repository", T, "its URL"),
            Field("id", T, "16 hex digits that are its own"),
            Field("encrypted", F, "it has a password; false for `dir:`"),
        ),
    ),
    "forget": (
        result(
            "forget",
            "Restore points were forgotten",
            Field("dry_run", F, "nothing was done: so it would be"),
            Field(
                "machines",
                Kind.OBJECTS,
                "each machine with points that were judged",
                (
                    Field("machine", T, "its name; null for snapshots that cannot be read", optional=True),
                    Field("kept", Kind.OBJECTS, "points that stay, oldest first; none if points were named", _JUDGED),
                    Field("removed", Kind.OBJECTS, "points that are gone", _JUDGED),
                ),
            ),
            Field("pruned", F, "data that nothing needs was removed"),
            Field("freed", I, "bytes that are free again (`--dry-run --prune`: what restic expects)", optional=True),
            NOTES,
        ),
    ),
    "copy": (
        result(
            "copy",
            "Restore points are in the other repository",
            Field(
                "points",
                Kind.OBJECTS,
                "each, oldest first",
                (
                    Field("id", T, "its id"),
                    Field("copy", T, "its id there"),
                    MACHINE,
                    Field("created", T, "the instant, UTC, ISO 8601"),
                    Field("already", F, "it was there before"),
                ),
            ),
            Field("stored", I, "bytes that the other repository has more"),
            Field("seconds", N, "time in all"),
        ),
    ),
    "unlock": (
        result(
            "unlock",
            "Locks that were there",
            Field(
                "locks",
                Kind.OBJECTS,
                "oldest first",
                (
                    Field("id", T, "64 hex digits"),
                    Field("exclusive", F, "nobody else may work beside it"),
                    Field("host", T, "where its holder is, or was"),
                    Field("user", T, "who"),
                    Field("pid", I, "the process; null: the lock cannot be read", optional=True),
                    Field("since", T, "when it was made or refreshed, UTC, ISO 8601"),
                    Field("stale", F, "its holder is gone"),
                    Field("removed", F, "it is removed"),
                ),
            ),
        ),
    ),
    "doctor": (
        result(
            "doctor",
            "What was found",
            Field("worst", T, "of all", words=("ok", "warning", "problem")),
            Field(
                "checks",
                Kind.OBJECTS,
                "each thing that was looked at",
                (
                    Field("area", T, "programs, configuration, directories, machine or repository"),
                    Field("subject", T, "which"),
                    Field("name", T, "what was looked at, in one word"),
                    Field("status", T, "how it is", words=("ok", "warning", "problem")),
                    Field("finding", T, "what was found"),
                    Field("remedy", T, "what to do about it", optional=True),
                ),
            ),
        ),
    ),
    "key list": (result("key list", "Keys of a repository", Field("keys", Kind.OBJECTS, "oldest first", _KEY)),),
    "key add": (result("key add", "A password was added", Field("key", Kind.OBJECT, "its key", _KEY)),),
    "key remove": (result("key remove", "A password was removed", Field("key", Kind.OBJECT, "its key", _KEY)),),
    "key passwd": (result("key passwd", "The password was changed", Field("key", Kind.OBJECT, "the new key", _KEY)),),
}
