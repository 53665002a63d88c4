"""The guest agent: freezing the guest's file systems for an instant, and always thawing them.

Talks to `qemu-ga` over its channel's unix socket (QEMU docs/interop/qemu-ga.rst; commands:
qga/qapi-schema.json). What answers there is the guest, so it is the least trusted of all inputs:
every answer is bounded and checked, and no step waits longer than its deadline.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from pullback import errors
from pullback.engine import replies
from pullback.engine.monitor import Monitor

#: The channel's name, by which QEMU's device and every agent know it.
PORT = "org.qemu.guest_agent.0"
#: An agent that hangs or lies costs at most 10 s: these one after the other, and a last thaw at the end.
SYNC_SECONDS, FREEZE_SECONDS, THAW_SECONDS = 2.0, 4.0, 2.0
_ANSWER_LIMIT = 1024 * 1024
_DELIMITER = b"\xff"
_UNIX_SERVER = re.compile(r"(?:disconnected:)?unix:(?P<path>/[^,]*)(?:,server=on)?(?: <->.*)?")


class AgentFailed(Exception):
    """The agent did not do it, or we do not know; the reason is the message."""


class AgentRefused(AgentFailed):
    """The agent answered that it did not do it."""


class Agent:
    """A connection to an agent that answered. Made by `connect`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, seconds: float) -> object:
        """Run a command and give what it returned; `AgentFailed` if it did not, or not in time."""
        request = {"execute": command} | ({"arguments": dict(arguments)} if arguments else {})
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(json.dumps(request).encode() + b"\n")
                await self._writer.drain()
                return _returned(command, await self._reader.readline())
        except TimeoutError as error:
            raise AgentFailed(f"the guest agent did not answer {command} within {seconds:g} s") from error
        except (OSError, ValueError) as error:  # ValueError: a line beyond the limit
            raise AgentFailed(f"the guest agent's channel failed in {command} ({error})") from error

    async def synchronize(self) -> None:
        """Throw away what an earlier client did not read, and prove that somebody answers now."""
        number = secrets.randbits(31)
        request = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        try:
            async with asyncio.timeout(SYNC_SECONDS):
                self._writer.write(_DELIMITER + json.dumps(request).encode() + b"\n")
                await self._writer.drain()
                await self._skip_to(number)
        except TimeoutError as error:
            raise AgentFailed(f"no guest agent answered within {SYNC_SECONDS:g} s") from error
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise AgentFailed(f"what answers is no guest agent ({type(error).__name__})") from error

    async def _skip_to(self, number: int) -> None:
        """Answers to others' commands may come before ours."""
        while True:
            await self._reader.readuntil(_DELIMITER)
            line = await self._reader.readline()
            if not line:
                raise ConnectionResetError("closed")
            if _is_answer(line, number):
                return


def _is_answer(line: bytes, number: int) -> bool:
    try:
        answer = json.loads(line)
    except ValueError:
        return False
    return isinstance(answer, dict) and answer.get("return") == number


def _returned(command: str, line: bytes) -> object:
    if not line:
        raise AgentFailed(f"the guest agent left during {command}")
    try:
        answer = json.loads(line.lstrip(_DELIMITER))
    except ValueError as error:
        raise AgentFailed(f"the guest agent answered {command} with nonsense") from error
    if not isinstance(answer, dict) or "return" not in answer:
        told = answer.get("error") if isinstance(answer, dict) else None
        reason = replies.optional_text(told, "desc") if isinstance(told, dict) else ""
        raise AgentRefused(f"the guest agent refused {command} ({reason[:200] or 'without a reason'})")
    return answer["return"]


@asynccontextmanager
async def connect(socket: Path) -> AsyncIterator[Agent]:
    """Connect to the agent's socket and see that an agent answers; raises `AgentFailed`."""
    try:
        async with asyncio.timeout(SYNC_SECONDS):
            reader, writer = await asyncio.open_unix_connection(socket, limit=_ANSWER_LIMIT)
    except (TimeoutError, OSError) as error:
        raise AgentFailed(f"the guest agent's socket {socket} cannot be connected ({error})") from error
    try:
        agent = Agent(reader, writer)
        await agent.synchronize()
        yield agent
    finally:
        writer.close()


async def freeze(socket: Path, mount_points: Sequence[str] = ()) -> int:
    """Freeze all file systems, or those mounted at the given points; gives how many. Raises `AgentFailed`."""
    command = "guest-fsfreeze-freeze-list" if mount_points else "guest-fsfreeze-freeze"
    arguments = {"mountpoints": list(mount_points)} if mount_points else None
    async with connect(socket) as agent:
        count = await agent.execute(command, arguments, seconds=FREEZE_SECONDS)
    return _count(command, count)


async def thaw(socket: Path) -> int:
    """Thaw whatever is frozen, within `THAW_SECONDS` in all; gives how many. Raises `AgentFailed`."""
    try:
        async with asyncio.timeout(THAW_SECONDS), connect(socket) as agent:
            count = await agent.execute("guest-fsfreeze-thaw", seconds=THAW_SECONDS)
    except TimeoutError as error:
        raise AgentFailed(f"the guest agent did not thaw within {THAW_SECONDS:g} s") from error
    return _count("guest-fsfreeze-thaw", count)


def _count(command: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise AgentFailed(f"the guest agent answered {command} with something else than a number")
    return value


async def find(monitor: Monitor) -> Path | None:
    """The socket of the agent's channel, if QEMU has one and a program in the guest has opened it."""
    label = await _channel(monitor)
    if label is None:
        return None
    for record in replies.objects(await monitor.execute("query-chardev"), "query-chardev"):
        if record.get("label") == label and replies.flag(record, "frontend-open"):
            match = _UNIX_SERVER.fullmatch(replies.optional_text(record, "filename"))
            return Path(match["path"]) if match else None
    return None


async def _channel(monitor: Monitor) -> str | None:
    """The chardev behind the port that is named for the agent."""
    for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
        for child in replies.objects(await monitor.execute("qom-list", {"path": parent}), "qom-list"):
            if replies.optional_text(child, "type") == "child<virtserialport>":
                path = f"{parent}/{replies.text(child, 'name', 'qom-list')}"
                if await _property(monitor, path, "name") == PORT:
                    return await _property(monitor, path, "chardev")
    return None


async def _property(monitor: Monitor, path: str, name: str) -> str | None:
    try:
        value = await monitor.execute("qom-get", {"path": path, "property": name})
    except errors.RefusedError:
        return None
    return value if isinstance(value, str) else None
