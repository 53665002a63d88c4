"""The monitor: typed commands over QMP with deadlines. The only importer of `qemu.qmp`.

Three outcomes of a command, told apart by class: an answer; `RefusedError` (QEMU said no, nothing
was done); `OutcomeUnknown` (the connection was lost or the deadline passed: query before you
retry). Source: QEMU docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket as sockets
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError
from qemu.qmp.protocol import ConnectError
from qemu.qmp.qmp_client import GreetingError

from pullback import errors

#: A monitor that is free greets at once; one that is not never does.
GREETING_SECONDS = 3.0
#: Most commands answer within milliseconds; a command that drains I/O may wait for the host's disks.
COMMAND_SECONDS = 30.0
#: Replies of machines with hundreds of nodes are long (query-named-block-nodes); default is 10 MiB.
_REPLY_LIMIT = 64 * 1024 * 1024

Json = object


class Monitor:
    """A connection to a QMP socket. Made by `connect`; ended by leaving its block."""

    def __init__(self, client: QMPClient, socket: Path, peer: int | None) -> None:
        self._client = client
        self.socket = socket
        #: Process id of the QEMU behind the socket, if the kernel tells (SO_PEERCRED).
        self.peer = peer
        #: The same as `<pid>:<start time>`, "" if unknown: numbers of processes are used again.
        self.process = process_token(peer)

    def user(self) -> tuple[int, int] | None:
        """(uid, gid) that QEMU runs as, if the kernel tells."""
        try:
            status = os.stat(f"/proc/{self.peer}")
        except OSError:
            return None
        return status.st_uid, status.st_gid

    def process_lives(self) -> bool:
        """Is the QEMU that we connected to still a process? True if that cannot be known."""
        return not self.process or process_token(self.peer) == self.process

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_SECONDS
    ) -> Json:
        """Run a command and give its answer.

        A cancelled wait is an unknown outcome too; callers shield what must not be left so.
        """
        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise errors.RefusedError(
                command=command, reason=str(error).rstrip("."), error_class=error.error_class
            ) from error
        except TimeoutError as error:
            raise errors.OutcomeUnknown(command=command, reason=f"no answer within {timeout:g} s") from error
        except (ExecInterruptedError, QMPError, OSError, EOFError) as error:
            raise errors.OutcomeUnknown(command=command, reason=f"the connection was lost ({_first(error)})") from error

    async def transaction(self, actions: list[dict[str, object]]) -> None:
        """Run QMP's `transaction`: all of the actions at one instant, or none."""
        await self.execute("transaction", {"actions": actions})

    @asynccontextmanager
    async def listening(self, *names: str) -> AsyncIterator[EventListener]:
        """Hear the named events while the block runs (those from before it are not heard)."""
        with self._client.listener(names) as listener:
            yield listener

    async def poll(self, done: Callable[[], Awaitable[bool]], *, what: str, timeout: float) -> None:
        """Call the coroutine function `done` until it gives True; `OutcomeUnknown` after `timeout` s."""
        deadline = asyncio.get_running_loop().time() + timeout
        pause = 0.002
        while not await done():
            if asyncio.get_running_loop().time() > deadline:
                raise errors.OutcomeUnknown(command=what, reason=f"not done within {timeout:g} s")
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.1)

    def close_now(self) -> None:
        """Drop the connection without waiting (before a guard takes over)."""
        self._client._schedule_disconnect()


def process_token(pid: int | None) -> str:
    """`<pid>:<start time>` of a living process (proc(5), /proc/PID/stat, field 22), or ""."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if after_name[0] == "Z" else f"{pid}:{after_name[19]}"


def process_lives(token: str) -> bool:
    """Is that process, as `<pid>:<start time>`, still there?"""
    pid = token.partition(":")[0]
    return pid.isascii() and pid.isdecimal() and len(pid) < 20 and process_token(int(pid)) == token


def listener(socket: Path) -> int | None:
    """Pid of the process that listens on a unix socket; None if none does."""
    with sockets.socket(sockets.AF_UNIX) as connection:
        connection.settimeout(GREETING_SECONDS)
        try:
            connection.connect(str(socket))
        except OSError:
            return None
        return _peer(connection)


def event_data(message: Message) -> Mapping[str, object]:
    """The `data` of an event, {} if it has none."""
    data = message.get("data")
    return data if isinstance(data, dict) else {}


@asynccontextmanager
async def connect(socket: Path, *, timeout: float = GREETING_SECONDS) -> AsyncIterator[Monitor]:
    """Connect to the QMP socket; the block has the monitor to itself (a socket serves one client).

    Raises `UnreachableError`, `PermissionDenied`, `MonitorBusy` (no greeting within `timeout`
    seconds) or `NotQmp`.
    """
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # it logs what we raise
    client = QMPClient("pullback")
    client.readbuflen = _REPLY_LIMIT
    client.negotiate = False  # by the library it fails if an event comes before the answer
    connection = await _open(socket, timeout)
    peer = _peer(connection)
    try:
        async with asyncio.timeout(timeout):
            await client.connect(connection)
    except TimeoutError as error:
        raise errors.MonitorBusy(socket=str(socket), seconds=timeout) from error
    except ConnectError as error:
        raise _translate(socket, error.exc) from error
    except AssertionError as error:  # the library's own, when the other end hangs up right after its greeting
        await _disconnect(client)
        raise errors.UnreachableError(socket=str(socket), reason="it closed the connection") from error
    try:
        await _negotiate(client, socket, timeout)
        yield Monitor(client, socket, peer)
    finally:
        await _disconnect(client)


async def _negotiate(client: QMPClient, socket: Path, timeout: float) -> None:
    """Enter command mode. Events may come from then on, also before the answer (qmp-spec.rst, "Events")."""
    try:
        async with asyncio.timeout(timeout):
            await client.execute("qmp_capabilities")
    except TimeoutError as error:
        raise errors.MonitorBusy(socket=str(socket), seconds=timeout) from error
    except ExecuteError as error:
        raise errors.NotQmp(socket=str(socket), reason="what answers there greets, and takes no command") from error
    except QMPError as error:
        raise errors.UnreachableError(socket=str(socket), reason="it closed the connection") from error


async def _open(socket: Path, timeout: float) -> sockets.socket:
    connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().sock_connect(connection, str(socket))
    except PermissionError as error:
        connection.close()
        raise errors.PermissionDenied(path=str(socket)) from error
    except (TimeoutError, BlockingIOError) as error:  # the queue of a held socket is full
        connection.close()
        raise errors.MonitorBusy(socket=str(socket), seconds=timeout) from error
    except OSError as error:
        connection.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise errors.UnreachableError(socket=str(socket), reason=reason) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _peer(connection: sockets.socket) -> int | None:
    """Pid of the process that listens (unix(7), SO_PEERCRED)."""
    raw = connection.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", raw)[0]
    return pid or None


def _translate(socket: Path, error: BaseException) -> errors.PullbackError:
    if isinstance(error, GreetingError | QMPError | ValueError):
        return errors.NotQmp(socket=str(socket), reason="what answers there greets otherwise")
    if isinstance(error, EOFError):
        return errors.NotQmp(socket=str(socket), reason="it closed the connection without a greeting")
    return errors.UnreachableError(socket=str(socket), reason=_first(error))


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


async def _disconnect(client: QMPClient) -> None:
    """Closing always ends closed, and never hides the error of the body."""
    try:
        async with asyncio.timeout(2):
            await client.disconnect()
    except (QMPError, OSError, EOFError, TimeoutError):
        pass
