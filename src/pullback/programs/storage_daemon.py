"""qemu-storage-daemon: QEMU's block layer without a machine. Facts from docs/tools/qemu-storage-daemon.rst."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pullback.programs import process

#: Seconds until it must be ready.
START_SECONDS = 30.0
#: Seconds that its end may take when asked by SIGTERM (it closes all images then), before it is killed.
GRACE_SECONDS = 5.0


class StorageDaemon:
    """A running daemon with a monitor (QMP) on a unix socket; see `start`."""

    def __init__(self, child: process.Child, qmp: Path) -> None:
        self._child = child
        #: The monitor's socket.
        self.qmp = qmp

    def wait_ready(self) -> None:
        """Wait until the monitor listens; raises `ProgramFailed` after 30 s, or if the daemon ends before."""
        pidfile = _pidfile(self.qmp)
        self._child.wait_until(pidfile.exists, what="monitor", timeout=START_SECONDS)
        self.qmp.chmod(0o600)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def wait(self, timeout: float) -> None:
        """Wait for its end (after QMP `quit`); raises `ProgramFailed` after `timeout` seconds."""
        self._child.wait(timeout)


@contextmanager
def start(qmp: Path) -> Iterator[StorageDaemon]:
    """A daemon without any image, whose monitor is at `qmp`, in a private directory of ours.

    It dies with the thread that enters (enter from the main thread). When the block is left and it
    still runs, it gets SIGTERM, on which it closes its images in order.
    """
    for path in (qmp, _pidfile(qmp)):
        path.unlink(missing_ok=True)
    socket = str(qmp).replace(",", ",,")
    argv: list[str | Path] = ["qemu-storage-daemon", "--chardev", f"socket,id=qmp,path={socket},server=on,wait=off"]
    argv += ["--monitor", "chardev=qmp"]
    # Written when all else is ready; the socket's name is there before it listens.
    argv += ["--pidfile", _pidfile(qmp)]
    with process.Child(argv, grace=GRACE_SECONDS) as child:
        try:
            yield StorageDaemon(child, qmp)
        finally:
            child.close()
            for path in (qmp, _pidfile(qmp)):
                path.unlink(missing_ok=True)


def _pidfile(qmp: Path) -> Path:
    return qmp.with_suffix(".pid")
