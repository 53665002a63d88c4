"""qemu-nbd: serving an image, or a block graph named in full, on a private unix socket.

Facts from QEMU's docs/tools/qemu-nbd.rst and qapi/block-core.json (QEMU 7.2). Images are always
named by a `json:{…}` pseudo-filename, whose strings are taken as they stand: a path may contain
commas, colons, or look like `nbd:…` or `json:…`.
"""

from __future__ import annotations

import json
import os
import signal
import socket as sockets
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pullback import errors
from pullback.model.exports import NbdAddress
from pullback.programs import process

#: Connections at a time: four channels and one for asking, of each of two readers, in our copies.
SHARED = 16
#: Seconds until the socket must answer.
START_SECONDS = 30.0
#: Seconds that closing may take: the image's caches are written then.
CLOSE_SECONDS = 900.0
#: The same when the work failed: what the caches hold is not wanted any more, and SIGTERM must not wait.
_ABORT_SECONDS = 1.0
#: What a server sends first, and an answer (fixed newstyle, then NBD_OPT_ABORT) that lets it end the
#: connection without a complaint on standard error (NBD protocol, "Newstyle negotiation").
_GREETING = b"NBDMAGICIHAVEOPT"
_GOODBYE = struct.pack(">I8sII", 3, b"IHAVEOPT", 2, 0)
#: qemu-nbd ends with status 0 even when closing the image failed (block/qcow2.c, qcow2_inactivate):
#: these words on standard error are all that tells.
_CLOSING_FAILED = ("Failed to flush", "Lost persistent bitmaps", "Could not close")


@contextmanager
def serve(
    image: Path,
    format: str,
    *,
    socket: Path,
    writable: bool = False,
    export: str = "",
    bitmaps: Sequence[str] = (),
    shared: int = SHARED,
    cache: str = "writeback",
    options: Mapping[str, object] | None = None,
) -> Iterator[NbdAddress]:
    """Serve `image` while the block runs; its backing files are those that it names itself.

    `format` is never probed. `options` are more options of the image's block node
    (`{"force-share": True}` reads an image that is in use). `bitmaps` are offered as
    `qemu:dirty-bitmap:NAME`. Otherwise as `serve_graph`.
    """
    graph = {"driver": format, "file": {"driver": _protocol(image), "filename": str(image.absolute())}}
    with serve_graph(
        graph | dict(options or {}),
        socket=socket,
        writable=writable,
        export=export,
        bitmaps=bitmaps,
        shared=shared,
        cache=cache,
    ) as address:
        yield address


@contextmanager
def serve_graph(
    graph: Mapping[str, object],
    *,
    socket: Path,
    writable: bool = False,
    export: str = "",
    bitmaps: Sequence[str] = (),
    shared: int = SHARED,
    cache: str = "writeback",
    check: Callable[[], None] | None = None,
) -> Iterator[NbdAddress]:
    """Serve a block graph (`BlockdevOptions` of QAPI) while the block runs: nothing in it is probed.

    Name the `backing` of each layer (or None to leave it out), so that no header of an image
    decides what is opened. The socket's directory is made with mode 0700 if absent, and must
    not be open to other users. The server dies with the thread that entered.

    At the end the server is told to close the image and awaited. Raises `ProgramFailed` when it
    does not start, or does not close the image well (only where the block itself did not raise).
    Starting and closing call `check` often: what it raises ends the server at once.
    """
    _prepare(socket)
    argv = _argv(graph, socket, writable, export, bitmaps, shared, cache)
    with process.Child(argv, grace=_ABORT_SECONDS) as child:
        try:
            child.wait_until(lambda: _answers(socket, check), what="answer on its socket", timeout=START_SECONDS)
            socket.chmod(0o600)
            yield NbdAddress(socket=socket, export=export)
            _end(child, check)
        finally:
            child.close()
            socket.unlink(missing_ok=True)


def _argv(
    graph: Mapping[str, object],
    socket: Path,
    writable: bool,
    export: str,
    bitmaps: Sequence[str],
    shared: int,
    cache: str,
) -> list[str | Path]:
    argv: list[str | Path] = ["qemu-nbd", "--persistent", f"--socket={socket.absolute()}", f"--shared={shared}"]
    argv += [f"--cache={cache}", "--discard=unmap", "--detect-zeroes=off", f"--export-name={export}"]
    argv += [f"--bitmap={name}" for name in bitmaps]
    if not writable:
        argv.append("--read-only")
    return [*argv, "json:" + json.dumps(graph)]


def _protocol(image: Path) -> str:
    """The driver for a path: QEMU wants block devices to be named as such."""
    try:
        return "host_device" if stat.S_ISBLK(image.stat().st_mode) else "file"
    except FileNotFoundError as error:
        raise errors.EndpointFailed(
            operation="open", endpoint=str(image), offset=0, reason="no such file", errno=error.errno or 0
        ) from error


def _prepare(socket: Path) -> None:
    """A private directory, without a socket that a killed server left there."""
    directory = socket.absolute().parent
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = directory.stat().st_mode
        socket.unlink(missing_ok=True)
    except OSError as error:
        raise errors.CannotWrite(path=str(socket), reason=error.strerror or str(error)) from error
    if mode & 0o077:
        raise errors.CannotWrite(path=str(socket), reason="its directory is open to other users (wanted: mode 0700)")


def answers(socket: Path) -> bool:
    """Does an NBD server greet there? The connection is given up at once; `--persistent` allows that."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as client:
        client.settimeout(1.0)
        try:
            client.connect(os.fspath(socket))
            greeting = client.recv(len(_GREETING) + 2, sockets.MSG_WAITALL)
            client.sendall(_GOODBYE)
            client.recv(1024)
        except OSError:
            return False
    return greeting.startswith(_GREETING)


def _answers(socket: Path, check: Callable[[], None] | None) -> bool:
    if check is not None:
        check()
    return answers(socket)


def _end(child: process.Child, check: Callable[[], None] | None) -> None:
    """SIGTERM makes qemu-nbd finish its requests, flush and close the image."""
    child.kill(signal.SIGTERM)
    deadline = time.monotonic() + CLOSE_SECONDS
    while child.returncode is None and time.monotonic() < deadline:
        if check is not None:
            check()
        time.sleep(0.005)
    code = child.wait(0.1)
    message = child.message()
    if code != 0 or any(words in message for words in _CLOSING_FAILED):
        raise errors.ProgramFailed(program=child.name, status=f"status {code} at closing the image", message=message)
