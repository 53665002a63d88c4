"""What `serve` and `mount` print with `--json`."""

from __future__ import annotations

from pullback.cli.schema import MACHINE, TARGET, Document, F, Field, I, Kind, T, result

_POINT = (
    Field("point", T, "the restore point's id"),
    MACHINE,
    Field("created", T, "its instant, UTC, ISO 8601"),
)

#: Command -> what it prints when it is ready. It stays after that.
RESULTS: dict[str, tuple[Document, ...]] = {
    "serve": (
        result(
            "serve",
            "A restore point is served",
            *_POINT,
            Field("tls", T, "how the ends of a connection prove who they are", optional=True, words=("x509", "psk")),
            Field(
                "disks",
                Kind.OBJECTS,
                "each export",
                (
                    TARGET,
                    Field("name", T, "the export's name"),
                    Field("uri", T, "what an NBD client takes"),
                    Field("size", I, "bytes"),
                    Field("writable", F, "what is written is kept apart from the restore point"),
                ),
            ),
        ),
    ),
    "mount": (
        result(
            "mount",
            "A restore point is shown as files",
            *_POINT,
            Field("directory", T, "where"),
            Field(
                "files",
                Kind.OBJECTS,
                "each file",
                (
                    Field("path", T, "where it is"),
                    Field("size", I, "bytes"),
                    Field("target", T, "the disk; null for firmware and `point.json`", optional=True),
                ),
            ),
        ),
    ),
}
