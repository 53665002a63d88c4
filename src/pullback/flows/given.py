"""Documents as callers give them: values, JSON objects, or XML text."""

from __future__ import annotations

from collections.abc import Mapping

from pullback.model.documents import backup, checkpoint, export, snapshot
from pullback.model.documents.backup import BackupDocument
from pullback.model.documents.checkpoint import CheckpointDocument
from pullback.model.documents.export import ExportDocument
from pullback.model.documents.snapshot import SnapshotDocument
from pullback.model.xml import backup as backup_xml
from pullback.model.xml import checkpoint as checkpoint_xml
from pullback.model.xml import export as export_xml
from pullback.model.xml import snapshot as snapshot_xml

Json = Mapping[str, object]
Backup = BackupDocument | Json | str | bytes
Checkpoint = CheckpointDocument | Json | str | bytes
Snapshot = SnapshotDocument | Json | str | bytes
Export = ExportDocument | Json | str | bytes


def a_backup(given: Backup) -> BackupDocument:
    """A `domainbackup`. Raises `BadDocument`."""
    if isinstance(given, BackupDocument):
        return given
    return backup_xml.parse(given) if isinstance(given, str | bytes) else backup.from_dict(given)


def a_checkpoint(given: Checkpoint) -> CheckpointDocument:
    """A `domaincheckpoint`. Raises `BadDocument`."""
    if isinstance(given, CheckpointDocument):
        return given
    return checkpoint_xml.parse(given) if isinstance(given, str | bytes) else checkpoint.from_dict(given)


def a_snapshot(given: Snapshot) -> SnapshotDocument:
    """A `domainblocksnapshot`. Raises `BadDocument`."""
    if isinstance(given, SnapshotDocument):
        return given
    return snapshot_xml.parse(given) if isinstance(given, str | bytes) else snapshot.from_dict(given)


def an_export(given: Export) -> ExportDocument:
    """A `domainblockexport`. Raises `BadDocument`."""
    if isinstance(given, ExportDocument):
        return given
    return export_xml.parse(given) if isinstance(given, str | bytes) else export.from_dict(given)
