"""Exports: where a frozen disk, or a disk, can be read over NBD."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdAddress:
    """An export of an NBD server on a unix socket."""

    socket: Path
    #: The export's name, at most 4096 bytes (NBD protocol, "Naming").
    export: str = ""

    @property
    def uri(self) -> str:
        """The URI that `nbdinfo` and other clients accept (NBD URI specification)."""
        name = urllib.parse.quote(self.export, safe="")
        return f"nbd+unix:///{name}?socket={urllib.parse.quote(str(self.socket), safe='/')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Where the frozen content of a disk can be read.

    What reads as zeroes is not asked of the snapshot but of the live disk, corrected by scratch: a
    range that the disk now shows as a hole, and of which scratch holds no data, was a hole at that
    instant; and a hole made since then was copied to scratch before it was made. So the answer is
    right on builds whose snapshot-access answers wrongly too.
    """

    #: Bytes of the disk.
    size: int
    #: The data: an NBD export, or the path of a file (a FUSE export, for disks in an iothread of a
    #: QEMU that dies of NBD clients there).
    data: NbdAddress | Path
    #: No read may cross a multiple of this many bytes (a defect of certain builds); None: no limit.
    request_limit: int | None = None
    #: Where holes are told; None: nowhere, everything must be read.
    allocation: NbdAddress | Path | None = None
    #: The scratch image that corrects it (a raw local file), or None if it needs no correction.
    scratch: Path | None = None
    #: Where the changed blocks are told, if they are.
    changes: NbdAddress | None = None
    #: The metadata context there: `qemu:dirty-bitmap:NAME`.
    changes_context: str | None = None
    #: Ranges that were read may be discarded in multiples of this, to free scratch; None: never.
    trim_unit: int | None = None
