"""The user's programs around a backup.

    pre ─▶ the backup ─▶ post            pre ─▶ the backup fails ─▶ error            pre fails ─▶ error

`pre` may stop the backup; nothing that runs afterwards can: a restore point that is there is not lost because
a mail could not be sent. A hook gets what there is to know as environment variables (`PULLBACK_HOOK` …; all of
them are in docs/configuration.md), none of which is a secret, and speaks on our standard error. Each has a
deadline and a process group of its own: with a hook that is killed, because it is late or because we are to
end, its children go too. If we are killed, it gets SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from pullback import errors
from pullback.model.hooks import Hooks
from pullback.programs import process
from pullback.progress import INTERRUPTION

#: What a hook may still take after we were interrupted: whoever sent SIGTERM waits.
INTERRUPTED_SECONDS = 10.0
#: Between SIGTERM and SIGKILL.
GRACE_SECONDS = 3.0
#: Characters of a variable: the kernel takes 128 KiB, and a text that long is for nobody.
_MAX_VALUE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is backed up where."""

    machine: str
    #: The repository's URL, without any password.
    repository: str


@dataclass(slots=True)
class Told:
    """How the backup went, as it tells itself; made by `around`."""

    #: Sentences about hooks that failed when it was too late to stop anything.
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def succeeded(self, *, point: str, read: int, stored: int, warned: bool = False) -> None:
        """There is a restore point. `read`, `stored`: bytes; `warned`: the exit code will be 3."""
        code = errors.Exit.WARNED if warned else errors.Exit.DONE
        self.facts |= {
            "POINT": point,
            "STATUS": "warned" if warned else "done",
            "EXIT_CODE": str(int(code)),
            "READ": str(read),
            "STORED": str(stored),
        }


@asynccontextmanager
async def around(hooks: Hooks, subject: Subject) -> AsyncIterator[Told]:
    """Run `pre`, then the block, then `post` or `error`.

    Raises `HookFailed` if `pre` fails: the block is not entered. What fails later is in `warnings`.
    """
    told = Told()
    running = _Running(hooks, subject, time.monotonic())
    try:
        await running.pre()
        yield told
    except BaseException as error:
        await running.error(error)
        raise
    await running.post(told)


class _Running:
    """The hooks of one backup."""

    def __init__(self, hooks: Hooks, subject: Subject, begun: float) -> None:
        self._hooks = hooks
        self._subject = subject
        self._begun = begun

    async def pre(self) -> None:
        problem = await self._run("pre", self._hooks.pre, {}, self._hooks.timeout)
        if problem is not None:
            raise errors.HookFailed(hook="pre", machine=self._subject.machine, problem=problem)

    async def post(self, told: Told) -> None:
        facts = {"STATUS": "done", "EXIT_CODE": "0"} | told.facts
        problem = await self._run("post", self._hooks.post, facts, self._hooks.timeout)
        if problem is not None:
            told.warnings.append(_sentence("post", self._subject, problem))

    async def error(self, error: BaseException) -> None:
        """It never hides the error that it is about; its own failure is a note on that."""
        interrupted = not isinstance(error, Exception)
        timeout = min(self._hooks.timeout, INTERRUPTED_SECONDS) if interrupted else self._hooks.timeout
        problem = await self._run("error", self._hooks.error, _facts_of(error), timeout)
        if problem is not None:
            error.add_note(_sentence("error", self._subject, problem))

    async def _run(self, hook: str, words: tuple[str, ...], facts: Mapping[str, str], timeout: float) -> str | None:
        if not words:
            return None
        known = {
            "HOOK": hook,
            "MACHINE": self._subject.machine,
            "REPOSITORY": self._subject.repository,
            "SECONDS": f"{time.monotonic() - self._begun:.3f}",
            **facts,
        }
        return await run(words, {f"PULLBACK_{name}": value for name, value in known.items()}, timeout)


def _sentence(hook: str, subject: Subject, problem: str) -> str:
    return f"the {hook} hook of {subject.machine} failed: {problem}"


def _facts_of(error: BaseException) -> dict[str, str]:
    if isinstance(error, errors.PullbackError):
        status, code, name = "failed", error.exit_code, error.code
    elif isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
        cause = _interruption(error)
        status, code, name = "interrupted", cause.exit_code, cause.code
    else:
        status, code, name = "failed", errors.Exit.FAILED, errors.PullbackError.code
    text = str(error) or type(error).__name__
    return {"STATUS": status, "EXIT_CODE": str(int(code)), "ERROR_CODE": name, "ERROR": text}


def _interruption(error: BaseException) -> errors.PullbackError:
    """The signal's error, if somebody told us; else that of a plain cancel."""
    told = INTERRUPTION.get()
    if told and isinstance(told[0], errors.PullbackError):
        return told[0]
    return errors.Interrupted() if isinstance(error, KeyboardInterrupt) else errors.Terminated()


# -- one program -----------------------------------------------------------------------------


async def run(words: tuple[str, ...], variables: Mapping[str, str], timeout: float) -> str | None:
    """Run a program with more variables; gives what went wrong, in words, or None.

    When it is late, or we are cancelled, it is ended together with all that is in its process group.
    """
    program = shutil.which(words[0])
    if program is None:
        return f"there is no program {words[0]}"
    try:
        child = await asyncio.create_subprocess_exec(
            # If we are killed, nobody is left who would end it.
            *(process.find("setpriv"), "--pdeathsig", "TERM", program, *words[1:]),
            stdin=asyncio.subprocess.DEVNULL,
            # Its words are for people, and our standard output may be read by a program.
            stdout=_standard_error(),
            stderr=_standard_error(),
            env=_environment(variables),
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return f"{words[0]} cannot be started ({error})"
    try:
        async with asyncio.timeout(timeout):
            status = await child.wait()
    except TimeoutError:
        await _end(child)
        return f"{words[0]} did not end within {timeout:g} s, and was killed"
    except BaseException:
        await _end(child)
        raise
    return None if status == 0 else f"{words[0]} ended with {_status(status)}"


def _standard_error() -> int:
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # a program that uses us as a library may have none
        return asyncio.subprocess.DEVNULL


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Ours without passwords, with the user's own locale, and `variables`."""
    base = process.environment(None)
    del base["LC_ALL"]
    if "LC_ALL" in os.environ:
        base["LC_ALL"] = os.environ["LC_ALL"]
    # Of an earlier hook, or of a pullback that runs us in one.
    base = {name: value for name, value in base.items() if name not in _VARIABLES}
    return base | {name: value.replace("\0", "")[:_MAX_VALUE] for name, value in variables.items()}


_VARIABLES = {
    f"PULLBACK_{name}"
    for name in ("HOOK", "MACHINE", "POINT", "STATUS", "EXIT_CODE", "ERROR_CODE", "ERROR", "SECONDS", "READ", "STORED")
}


async def _end(child: asyncio.subprocess.Process) -> None:
    """SIGTERM to all of its group, and SIGKILL to what is left of it when the grace is over."""
    _signal(child, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE_SECONDS):
            await child.wait()
    _signal(child, signal.SIGKILL)  # also when it has ended: its children may not have
    await child.wait()


def _signal(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    # The group's number stays taken as long as any of it lives, also when our own child has ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
