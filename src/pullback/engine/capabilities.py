"""What the QEMU at hand can do: asked of its schema and, for its defects, of a sacrificial process.

Never decided by version numbers. Source: QAPI `query-qmp-schema` (docs/devel/qapi-code-gen.rst,
"Client JSON Protocol introspection").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pullback.engine import probe, replies
from pullback.engine.build import Build
from pullback.engine.monitor import Monitor


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What this QEMU offers to a backup."""

    #: As QEMU says it, with the distribution's package version.
    version: str
    #: copy-before-write with on-cbw-error=break-snapshot and a timeout, and snapshot-access (QEMU ≥ 7.1).
    filter: bool
    #: blockdev-backup in transactions with bitmaps added, merged, disabled and removed (QEMU ≥ 4.2).
    classic: bool
    #: blockdev-backup has on-cbw-error of its own (QEMU ≥ 10.1).
    classic_breaks_snapshot: bool
    #: block-export-add (QEMU ≥ 5.2).
    exports: bool
    #: FUSE exports are compiled in (QEMU ≥ 6.0).
    fuse: bool
    #: x-debug-query-block-graph: children of nodes can be seen.
    graph: bool
    defects: probe.Defects
    #: Backups whose chunks can be limited, reopening, and yank (QEMU ≥ 6.1): what a push needs.
    push: bool = False


async def discover(monitor: Monitor, cache: Path) -> Capabilities:
    """Ask QEMU behind `monitor`; what its build offers, and does wrong, is kept under `cache`."""
    version = version_text(await monitor.execute("query-version"))
    build = Build(monitor.peer, cache)
    defects = await probe.defects(build)
    known = _remembered(build.load("schema"), version, defects)
    if known is None:
        known = capabilities(version, Schema(await monitor.execute("query-qmp-schema")), defects)
        build.save("schema", {name: value for name, value in asdict(known).items() if name != "defects"})
    return known


def _remembered(record: Mapping[str, object] | None, version: str, defects: probe.Defects) -> Capabilities | None:
    """What was kept, if it is of this version, and nothing is missing."""
    if record is None or record.get("version") != version:
        return None
    flags = {name: value for name, value in record.items() if name != "version"}
    wanted = {field.name for field in fields(Capabilities)} - {"version", "defects"}
    if set(flags) != wanted or not all(isinstance(value, bool) for value in flags.values()):
        return None
    return Capabilities(version=version, defects=defects, **flags)  # type: ignore[arg-type]


def capabilities(version: str, schema: Schema, defects: probe.Defects) -> Capabilities:
    """Read the schema. Pure."""
    cbw = schema.variant("blockdev-add", "copy-before-write")
    actions = schema.cases("transaction", "actions")
    return Capabilities(
        version=version,
        filter={"on-cbw-error", "cbw-timeout"} <= cbw and bool(schema.variant("blockdev-add", "snapshot-access")),
        classic={"blockdev-backup", "block-dirty-bitmap-merge", "block-dirty-bitmap-remove"} <= actions,
        classic_breaks_snapshot="on-cbw-error" in schema.members("blockdev-backup"),
        exports="block-export-add" in schema.commands,
        fuse="fuse" in schema.tags("block-export-add"),
        graph="x-debug-query-block-graph" in schema.commands,
        defects=defects,
        push="x-perf" in schema.members("blockdev-backup") and {"blockdev-reopen", "yank"} <= schema.commands,
    )


def version_text(reply: object) -> str:
    """The answer to `query-version` in words: number and package."""
    record = replies.mapping(reply, "query-version")
    qemu = replies.mapping(record.get("qemu"), "query-version.qemu")
    number = ".".join(str(replies.integer(qemu, part, "version")) for part in ("major", "minor", "micro"))
    package = replies.optional_text(record, "package").strip()
    return f"{number} ({package})" if package else number


class Schema:
    """`query-qmp-schema`, looked up by command."""

    def __init__(self, reply: object) -> None:
        entities = replies.objects(reply, "query-qmp-schema")
        self._by_name = {replies.text(entity, "name", "schema"): entity for entity in entities}
        self.commands = {name for name, entity in self._by_name.items() if entity.get("meta-type") == "command"}

    def _type(self, name: object) -> Mapping[str, object]:
        return self._by_name.get(name, {}) if isinstance(name, str) else {}

    def _argument(self, command: str) -> Mapping[str, object]:
        return self._type(self._type(command).get("arg-type"))

    def members(self, command: str) -> set[str]:
        """Names of a command's arguments."""
        return _names(self._argument(command), "members", "name")

    def tags(self, command: str) -> set[str]:
        """Values that a command's union tag may have (export types, drivers)."""
        return _names(self._argument(command), "variants", "case")

    def variant(self, command: str, case: str) -> set[str]:
        """Names of the members that a command's argument gets with that tag; empty if it has no such case."""
        for record in _records(self._argument(command), "variants"):
            if record.get("case") == case:
                return _names(self._type(record.get("type")), "members", "name")
        return set()

    def cases(self, command: str, member: str) -> set[str]:
        """Tags of the union (or list of unions) that an argument of a command is."""
        for record in _records(self._argument(command), "members"):
            if record.get("name") == member:
                kind = self._type(record.get("type"))
                kind = self._type(kind.get("element-type")) or kind
                return _names(kind, "variants", "case")
        return set()


def _records(entity: Mapping[str, object], key: str) -> list[Mapping[str, object]]:
    value = entity.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _names(entity: Mapping[str, object], key: str, name: str) -> set[str]:
    return {str(record.get(name)) for record in _records(entity, key)}
