"""Entering a monitor whose QEMU says something in between: a race that a real one loses once in thousands of times."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from pullback import errors
from pullback.engine import monitor

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": ["oob"]}}
EVENT = {"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 1}}


def lines(*messages: object) -> bytes:
    """As QEMU sends them."""
    return b"".join(json.dumps(message).encode() + b"\r\n" for message in messages)


async def replayed(socket: Path, answer: dict[str, object]) -> object:
    """Ask for the state, where each command is answered after an event."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(lines(GREETING))
        while command := await reader.read(65536):
            writer.write(lines(EVENT, {**answer, "id": json.loads(command)["id"]}))
        writer.close()

    async with await asyncio.start_unix_server(serve, socket), monitor.connect(socket) as connection:
        return await connection.execute("query-status")


def test_an_event_may_come_before_the_answer_to_the_first_command(short_dir: Path) -> None:
    """QEMU enters command mode before it has answered, and another thread of it may have an event to tell."""
    told = asyncio.run(replayed(short_dir / "qmp.sock", {"return": {"status": "running"}}))
    assert told == {"status": "running"}


def test_who_greets_as_qemu_does_and_refuses_command_mode_is_no_monitor(short_dir: Path) -> None:
    refusal: dict[str, object] = {"error": {"class": "CommandNotFound", "desc": "no"}}
    with pytest.raises(errors.NotQmp, match="takes no command"):
        asyncio.run(replayed(short_dir / "qmp.sock", refusal))


def test_who_hangs_up_right_after_the_greeting_is_gone(short_dir: Path) -> None:
    """As a QEMU that does not start. Whether it is seen before or after the first command is chance."""
    socket = short_dir / "qmp.sock"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(lines(GREETING))
        writer.close()

    async def come() -> None:
        async with await asyncio.start_unix_server(serve, socket):
            for _ in range(50):
                with pytest.raises(errors.UnreachableError):
                    async with monitor.connect(socket):
                        pass

    asyncio.run(come())
