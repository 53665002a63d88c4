"""A real TPM for tests: swtpm, beside a machine, or alone to be spoken to (TPM 2.0 Library, part 3: Commands)."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pullback.programs import process

_SESSIONS, _NO_SESSIONS = 0x8002, 0x8001
_DEFINE, _WRITE, _READ, _SHUTDOWN = 0x12A, 0x137, 0x14E, 0x145
_OWNER, _INDEX = 0x4000_0001, 0x0150_0001
_SHA256 = 0x000B
#: Owner and password may write and read; not locked by wrong guesses.
_ATTRIBUTES = 0x0200_0000 | 0x0006_0000 | 0x6
#: One password session, with an empty password.
_PASSWORD = struct.pack(">I", 9) + struct.pack(">IHBH", 0x4000_0009, 0, 0, 0)


@contextmanager
def beside(directory: Path, *words: str, state: Sequence[str] = ()) -> Iterator[list[str]]:
    """A TPM for one machine, its state in `directory`; gives the words for QEMU."""
    control = directory / "tpm.sock"
    place = state or ("--tpmstate", f"dir={directory}")
    command = ["swtpm", "socket", "--tpm2", *place, "--ctrl", f"type=unixio,path={control}", *words]
    with process.Child(command) as child:
        child.wait_until(control.is_socket, what="socket", timeout=20)
        yield [
            "-chardev",
            f"socket,id=chrtpm,path={control}",
            "-tpmdev",
            "emulator,id=tpm0,chardev=chrtpm",
            "-device",
            "tpm-crb,tpmdev=tpm0",
        ]


class Tpm:
    """A TPM that is spoken to."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def _ask(self, tag: int, command: int, body: bytes) -> bytes:
        self._line.sendall(struct.pack(">HII", tag, 10 + len(body), command) + body)
        answer = self._line.recv(4096)
        code = struct.unpack_from(">HII", answer)[2]
        assert code == 0, f"the TPM answers {code:#x}"
        return answer[10:]

    def keep(self, secret: bytes) -> None:
        """Put a secret into its own memory."""
        public = struct.pack(">IHIHH", _INDEX, _SHA256, _ATTRIBUTES, 0, len(secret))
        define = struct.pack(">I", _OWNER) + _PASSWORD + struct.pack(">HH", 0, len(public)) + public
        self._ask(_SESSIONS, _DEFINE, define)
        handles = struct.pack(">II", _OWNER, _INDEX)
        self._ask(
            _SESSIONS, _WRITE, handles + _PASSWORD + struct.pack(">H", len(secret)) + secret + struct.pack(">H", 0)
        )

    def kept(self, length: int) -> bytes:
        """Read it."""
        handles = struct.pack(">II", _OWNER, _INDEX)
        answer = self._ask(_SESSIONS, _READ, handles + _PASSWORD + struct.pack(">HH", length, 0))
        return answer[6 : 6 + length]

    def shutdown(self) -> None:
        """As an operating system does in the end."""
        self._ask(_NO_SESSIONS, _SHUTDOWN, struct.pack(">H", 0))


@contextmanager
def alone(*state: str) -> Iterator[Tpm]:
    """A TPM on the state that is said in swtpm's words, which is spoken to."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            words = ["--fd", str(theirs.fileno()), "--flags", "not-need-init,startup-clear"]
            child = process.Child(["swtpm", "socket", "--tpm2", *state, *words], pass_fds=[theirs.fileno()])
        with child:
            ours.settimeout(20)
            yield Tpm(ours)
            ours.close()
            child.wait(20)
