"""qemu-storage-daemon serving qcow2 images over NBD exports of another server: copy on write.

    export ──► qcow2 image (what was written) ──► NBD export below (all else, read-only)

Facts from docs/tools/qemu-storage-daemon.rst and qapi/block-core.json. The images are closed in order on
SIGTERM, and so they are when we die.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pullback.model.exports import NbdAddress
from pullback.programs import process

#: Seconds until it must be ready.
START_SECONDS = 60.0
#: Seconds that closing may take: what clients wrote is flushed then.
CLOSE_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """A disk that can be written to."""

    #: The export's name.
    export: str
    below: NbdAddress
    #: The qcow2 image with what was written.
    image: Path


@contextmanager
def serve(overlays: Sequence[Overlay], socket: Path) -> Iterator[process.Child]:
    """Serve on a unix socket while the block runs. Its directory must be private.

    Raises `ProgramFailed` when it does not start, such as for an image that another process has open.
    """
    pidfile = socket.with_suffix(".pid")
    for path in (pidfile, socket):
        path.unlink(missing_ok=True)
    with process.Child(_argv(overlays, socket, pidfile), grace=CLOSE_SECONDS, death="TERM") as child:
        try:
            child.wait_until(pidfile.exists, what="server", timeout=START_SECONDS)
            yield child
        finally:
            child.close()
            for path in (pidfile, socket):
                path.unlink(missing_ok=True)


def _argv(overlays: Sequence[Overlay], socket: Path, pidfile: Path) -> list[str | Path]:
    argv: list[str | Path] = ["qemu-storage-daemon", "--pidfile", pidfile]
    for number, overlay in enumerate(overlays):
        for node in (_below(number, overlay), _image(number, overlay)):
            argv += ["--blockdev", json.dumps(node)]
    # Its clients are ours: two connections for each client of theirs.
    server = {"addr": {"type": "unix", "path": str(socket)}, "max-connections": 0}
    argv += ["--nbd-server", json.dumps(server)]
    for number, overlay in enumerate(overlays):
        export = {"type": "nbd", "id": f"export{number}", "node-name": f"image{number}", "name": overlay.export}
        argv += ["--export", json.dumps(export | {"writable": True})]
    return argv


def _below(number: int, overlay: Overlay) -> dict[str, object]:
    return {
        "driver": "nbd",
        "node-name": f"below{number}",
        "server": {"type": "unix", "path": str(overlay.below.socket)},
        "export": overlay.below.export,
        "read-only": True,
    }


def _image(number: int, overlay: Overlay) -> dict[str, object]:
    return {
        "driver": "qcow2",
        "node-name": f"image{number}",
        "file": {"driver": "file", "filename": str(overlay.image), "discard": "unmap"},
        "backing": f"below{number}",
        "discard": "unmap",
    }
