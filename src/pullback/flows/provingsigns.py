"""Waiting for signs of life of a machine that was booted from a restore point."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from functools import partial

from pullback.engine import guestagent
from pullback.engine.guestagent import Agent, AgentFailed
from pullback.flows.provingmachine import Ended, Limits, Machine
from pullback.model.consoletext import plain
from pullback.model.proofs import MAX_SAID, Kind, Seen, Sign, Signs
from pullback.model.texts import showable

_ASK_SECONDS = 1.0
_LOOK_SECONDS = 0.2
#: Between two tries of a command that did not end well: a guest that is still starting says so.
_AGAIN_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
#: What is told of the guest's system (guest-get-osinfo), by the agent's names.
_SYSTEM = {"pretty-name": "system", "kernel-release": "kernel", "machine": "architecture"}
_WINDOWS = "mswindows"
_SYSTEM_TEXT = 200


class Watch:
    """The signs of one machine."""

    def __init__(self, machine: Machine, signs: Signs) -> None:
        self._machine = machine
        self._signs = signs
        #: Good ones, as they came.
        self.seen: dict[Sign, Seen] = {}
        #: What was said last where one did not come.
        self._doubts: dict[Sign, str] = {}
        #: What the agent tells of the guest's system.
        self.system: dict[str, str] = {}
        self._windows = False

    async def wait(self, limits: Limits) -> str | None:
        """Wait until all that is wanted was seen; gives why it was not, or None."""
        looking = asyncio.ensure_future(self._machine.watch(limits))
        waits = [asyncio.ensure_future(work) for work in self._waits()]
        try:
            while not self._signs.enough([*self.seen]):
                left = [wait for wait in waits if not wait.done()]
                if not left:
                    return "nothing more can come"
                await asyncio.wait({looking, *left}, return_when=asyncio.FIRST_COMPLETED)
                if looking.done():
                    looking.result()
                for wait in waits:
                    if wait.done():
                        wait.result()
        except Ended as ended:
            return str(ended)
        finally:
            for task in (looking, *waits):
                task.cancel()
            await asyncio.gather(looking, *waits, return_exceptions=True)
        return None

    def outcome(self) -> tuple[Seen, ...]:
        """Each sign that was waited for, in order."""
        missing = {sign: Seen(sign=sign, good=False, said=self._doubts.get(sign, "")) for sign in self._signs.living}
        return tuple((missing | self.seen).values())

    def _waits(self) -> list[Coroutine[None, None, None]]:
        """One for each sign, and one for all that the agent is asked: its channel has one client at a time."""
        asked = [sign for sign in self._signs.living if sign.kind in (Kind.AGENT, Kind.RUN)]
        waits: list[Coroutine[None, None, None]] = [self._agent(asked)] if asked else []
        for sign in self._signs.living:
            if sign.kind is Kind.CONSOLE:
                waits.append(self._console(sign))
            elif sign.kind is Kind.STEADY:
                waits.append(self._steady(sign))
        return waits

    def _good(self, sign: Sign, said: str) -> None:
        self.seen[sign] = Seen(sign=sign, good=True, seconds=self._machine.seconds, said=said[:MAX_SAID])

    async def _console(self, sign: Sign) -> None:
        expression = re.compile(sign.text, re.MULTILINE)
        heard = -1
        while True:
            if self._machine.console.heard != heard:
                heard = self._machine.console.heard
                text = plain(self._machine.console.text())
                if (match := await asyncio.to_thread(partial(expression.search, text))) is not None:
                    return self._good(sign, _line_of(text, match))
            await asyncio.sleep(_LOOK_SECONDS)

    async def _steady(self, sign: Sign) -> None:
        begun, resets = self._machine.seconds, self._machine.resets
        while self._machine.seconds - begun < float(sign.text):
            await asyncio.sleep(_LOOK_SECONDS)
            if self._machine.resets != resets:
                begun, resets = self._machine.seconds, self._machine.resets
        self._good(sign, "")

    # -- the agent -----------------------------------------------------------------------

    async def _agent(self, signs: list[Sign]) -> None:
        """Try until it answers, and until every command ended well."""
        left = list(signs)
        while left:
            pause = _ASK_SECONDS
            try:
                async with guestagent.connect(self._machine.agent) as agent:
                    await self._know(agent)
                    for sign in list(left):
                        if await self._asked(agent, sign):
                            left.remove(sign)
                pause = _AGAIN_SECONDS
            except AgentFailed as error:
                self._doubts |= {sign: str(error) for sign in left}
            if left:
                await asyncio.sleep(pause)

    async def _asked(self, agent: Agent, sign: Sign) -> bool:
        if sign.kind is Kind.AGENT:
            self._good(sign, ", ".join(self.system.values()))
            return True
        status, said = await run(agent, sign.text, windows=self._windows)
        if status == 0:
            self._good(sign, said)
            return True
        self._doubts[sign] = f"status {status}: {said}"[:MAX_SAID]
        return False

    async def _know(self, agent: Agent) -> None:
        """What its system is. Old agents do not tell."""
        if self.system:
            return
        with suppress(AgentFailed):
            answer = await agent.execute("guest-get-osinfo", seconds=_ANSWER_SECONDS)
            if isinstance(answer, Mapping):
                self._windows = answer.get("id") == _WINDOWS
                for key, name in _SYSTEM.items():
                    if isinstance(value := answer.get(key), str) and value:
                        self.system[name] = showable(value)[:_SYSTEM_TEXT]


def _line_of(text: str, match: re.Match[str]) -> str:
    start = text.rfind("\n", 0, match.start()) + 1
    end = text.find("\n", match.end())
    return text[start : end if end >= 0 else len(text)].strip()


async def run(agent: Agent, command: str, *, windows: bool) -> tuple[int, str]:
    """Run a command of the user's in the guest's shell; gives its status and what it said. Raises `AgentFailed`."""
    shell = ("cmd.exe", ["/c", command]) if windows else ("/bin/sh", ["-c", command])
    arguments = {"path": shell[0], "arg": shell[1], "capture-output": True}
    started = await agent.execute("guest-exec", arguments, seconds=_ANSWER_SECONDS)
    pid = started.get("pid") if isinstance(started, Mapping) else None
    if not isinstance(pid, int):
        raise AgentFailed("the guest agent started a command and does not say which")
    while True:
        answer = await agent.execute("guest-exec-status", {"pid": pid}, seconds=_ANSWER_SECONDS)
        if not isinstance(answer, Mapping):
            raise AgentFailed("the guest agent tells nothing of a command")
        if answer.get("exited") is True:
            break
        await asyncio.sleep(_LOOK_SECONDS)
    said = _decoded(answer.get("out-data")) + _decoded(answer.get("err-data"))
    status = answer.get("exitcode")
    if isinstance(status, int) and not isinstance(status, bool):
        return status, said
    signal = answer.get("signal")
    return (128 + signal if isinstance(signal, int) and 0 < signal < 128 else 255), said


def _decoded(value: object) -> str:
    if not isinstance(value, str):
        return ""
    with suppress(binascii.Error, ValueError):
        return base64.b64decode(value[: 4 * MAX_SAID]).decode("utf-8", "replace")[:MAX_SAID]
    return ""
