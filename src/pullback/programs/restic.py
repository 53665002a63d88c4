"""restic, for what it does better than we would: forget, prune, copy, keys, check.

Passwords go through descriptors of files in memory: never in the arguments, nor in the environment.
restic is ended by SIGINT, because 0.14 takes its locks away then, and on SIGTERM it does not (tried);
so it is when we are killed. Exit statuses 10, 11 and 12 are of restic 0.17 and later; older ones end
with 1 for everything, and are understood by what they say (restic's manual, "Scripting").
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pullback import errors
from pullback.programs import process
from pullback.units import MiB

#: How long restic may take to end after SIGINT: it deletes its lock first.
GRACE_SECONDS = 30.0
_LIMIT = 256 * MiB
_CHUNK = 64 * 1024
_TICK_SECONDS = 0.1
#: Ours to decide: where the repository is, and what opens it.
_DECIDED = re.compile("PASSWORD|^RESTIC_(FROM_)?REPOSITORY|^PULLBACK_")
_NO_CONFIG = re.compile(r"unable to open config file: (.*)")
_ABSENT = re.compile("no such file or directory|does not exist|is not a directory|file does not exist", re.IGNORECASE)
_DENIED = re.compile("permission denied", re.IGNORECASE)
_REFUSED = re.compile("access ?denied|forbidden|InvalidAccessKeyId|signature|credential", re.IGNORECASE)
_LOCKED = re.compile(r"already locked(?: exclusively)? by (PID \d+ on .+? by \S+)|already locked")
_FULL = re.compile("no space left on device|disk quota exceeded", re.IGNORECASE)
_NO_KEY = "wrong password or no key found"
_NO_REPOSITORY, _BUSY, _WRONG_PASSWORD = 10, 11, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A repository, as restic names it, and its password, which `repr` does not show."""

    url: str
    password: str

    def __repr__(self) -> str:
        return f"Access({self.url!r})"


class Restic:
    """The program, for one repository. Blocking; threads may share it."""

    def __init__(
        self,
        access: Access,
        environ: Mapping[str, str],
        *,
        cache: Path | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        """`environ` has credentials; `cache` is restic's cache directory; `cancelled`, once set, ends what runs."""
        self._access = access
        self._environ = _environment(environ, cache)
        self._cancelled = cancelled or threading.Event()

    def run(
        self,
        *words: str,
        on_line: Callable[[str], None] | None = None,
        timeout: float | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command; gives what it printed, or hands it over line by line.

        `secrets` are options that name a file with a password: `{"--new-password-file": password}`.
        Raises `NoRepository`, `WrongPassword`, `BusyError`, `StoreUnreachable`, `StoreRefused`,
        `DestinationFull`; `ProgramFailed` for what is none of them, or after `timeout` seconds;
        `ProgramMissing`; `Interrupted` when it was cancelled.
        """
        with contextlib.ExitStack() as held:
            given = {"--password-file": self._access.password, **(secrets or {})}
            descriptors = {option: held.enter_context(_in_memory(text)) for option, text in given.items()}
            options = [f"{option}=/dev/fd/{descriptor}" for option, descriptor in descriptors.items()]
            reading, writing = os.pipe()
            held.callback(os.close, reading)
            try:
                child = held.enter_context(self._start([*options, *words], [*descriptors.values()], writing))
            finally:
                os.close(writing)
            output, deadline = _Output(on_line), _Deadline(timeout, self._cancelled)
            try:
                self._follow(reading, output, deadline)
                status = self._wait(child, deadline)
            except BaseException:
                _interrupt(child)
                raise
            if status != 0:
                raise self._failure(status, child.message(), words)
            output.end()
            return output.text()

    def run_json(self, *words: str, timeout: float | None = None) -> Any:
        """Run a command with `--json`; gives its document. Raises `BadReply` if it prints something else."""
        text = self.run("--json", *words, timeout=timeout)
        try:
            return json.loads(text)
        except ValueError as error:
            problem = f"`restic {words[0]} --json` prints no JSON"
            raise errors.BadReply(who="restic", problem=problem) from error

    def copy_from(
        self, source: Access, snapshots: Sequence[str] = (), *, on_line: Callable[[str], None] | None = None
    ) -> str:
        """Copy snapshots (all, if none are named) from another repository into this one."""
        secrets = {"--from-password-file": source.password}
        try:
            return self.run("copy", f"--from-repo={source.url}", *snapshots, on_line=on_line, secrets=secrets)
        except errors.WrongPassword as error:
            # restic does not say which of the two. If ours opens, it was the other.
            self.run("cat", "config")
            raise errors.WrongPassword(path=source.url) from error

    def add_key(self, password: str, *words: str) -> None:
        """Add a password; `words` may be `--user`, `--host`."""
        self.run("key", "add", *words, secrets={"--new-password-file": password})

    def change_password(self, password: str) -> None:
        """Replace the password that was given by another."""
        self.run("key", "passwd", secrets={"--new-password-file": password})

    def _start(self, words: Sequence[str], descriptors: Sequence[int], stdout: int) -> process.Child:
        repository = f"--repo={self._access.url}"
        authorities = self._environ.get("AWS_CA_BUNDLE")
        if authorities and "RESTIC_CACERT" not in self._environ:
            words = [f"--cacert={authorities}", *words]
        return process.Child(
            ["restic", repository, *words], env=self._environ, pass_fds=descriptors, stdout=stdout, death="INT"
        )

    def _follow(self, reading: int, output: _Output, deadline: _Deadline) -> None:
        """Read until the other end is closed."""
        while True:
            deadline.check()
            ready, _, _ = select.select([reading], [], [], _TICK_SECONDS)
            if ready:
                chunk = os.read(reading, _CHUNK)
                if not chunk:
                    return
                output.add(chunk)

    def _wait(self, child: process.Child, deadline: _Deadline) -> int:
        while (status := child.returncode) is None:
            deadline.check()
            time.sleep(0.005)
        return status

    def _failure(self, status: int, message: str, words: Sequence[str]) -> errors.PullbackError:
        return failure(self._access.url, status, message) or errors.ProgramFailed(
            program=f"restic {words[0]}",
            status=f"killed by signal {-status}" if status < 0 else f"exit status {status}",
            message=message,
        )


def failure(url: str, status: int, message: str) -> errors.PullbackError | None:
    """The end of restic as an error of ours, by its status and the words on its standard error; None: unknown."""
    locked = _LOCKED.search(message)
    if status == _BUSY or locked:
        holder = locked[1] if locked and locked[1] else "another restic, or a backup"
        return errors.BusyError(what=f"the repository {url}", holder=holder)
    if status == _WRONG_PASSWORD or _NO_KEY in message:
        return errors.WrongPassword(path=url)
    if _FULL.search(message):
        return errors.DestinationFull(path=url)
    return _without_config(url, status, message)


def _without_config(url: str, status: int, message: str) -> errors.PullbackError | None:
    """restic could not read the config: because there is none, or for another reason."""
    config = _NO_CONFIG.search(message)
    if status == _NO_REPOSITORY or (config and _ABSENT.search(config[1])):
        return errors.NoRepository(path=url)
    if config is None:
        return None
    reason = config[1].strip().rstrip(".")
    if _DENIED.search(reason):
        return errors.PermissionDenied(path=url)
    if _REFUSED.search(reason):
        return errors.StoreRefused(store=url, what="access", reason=reason)
    return errors.StoreUnreachable(store=url, reason=reason)


class _Deadline:
    """The end of our patience: the time, or somebody who cancels."""

    def __init__(self, timeout: float | None, cancelled: threading.Event) -> None:
        self._timeout = timeout
        self._begin = time.monotonic()
        self._cancelled = cancelled

    def check(self) -> None:
        if self._cancelled.is_set():
            raise errors.Interrupted
        if self._timeout is not None and time.monotonic() - self._begin > self._timeout:
            status = f"no end within {self._timeout:g} s"
            raise errors.ProgramFailed(program="restic", status=status, message="it was interrupted")


class _Output:
    """What restic prints: kept, or handed over in lines."""

    def __init__(self, on_line: Callable[[str], None] | None) -> None:
        self._on_line = on_line
        self._held = bytearray()

    def add(self, chunk: bytes) -> None:
        self._held += chunk
        if len(self._held) > _LIMIT:
            raise errors.BadReply(who="restic", problem="it prints without end")
        if self._on_line is not None and b"\n" in chunk:
            *lines, rest = self._held.split(b"\n")
            self._held = bytearray(rest)
            for line in lines:
                self._on_line(line.decode("utf-8", "replace"))

    def end(self) -> None:
        """What came after the last line's end is a line too."""
        if self._on_line is not None and self._held:
            self._on_line(self._held.decode("utf-8", "replace"))
            self._held.clear()

    def text(self) -> str:
        return self._held.decode("utf-8", "replace")


def version() -> tuple[int, ...]:
    """restic's version: (0, 14, 0). Raises `ProgramMissing`."""
    said = process.run(["restic", "version"], timeout=20).decode("utf-8", "replace")
    found = re.match(r"restic (\d+(?:\.\d+)*)", said)
    if found is None:
        raise errors.BadReply(who="restic", problem=f"its version is {said[:100]!r}")
    return tuple(map(int, found[1].split(".")))


def _environment(environ: Mapping[str, str], cache: Path | None) -> dict[str, str]:
    kept = {name: value for name, value in environ.items() if not _DECIDED.search(name)}
    return kept | ({"RESTIC_CACHE_DIR": str(cache)} if cache is not None else {})


@contextlib.contextmanager
def _in_memory(password: str) -> Iterator[int]:
    """A descriptor of a file in memory that holds a password; restic opens it by its name in /dev/fd."""
    if password != password.strip() or not password:
        problem = "a password that begins or ends with white space cannot be handed to restic"
        raise errors.UsageError(problem=problem)
    descriptor = os.memfd_create("pullback-password", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, password.encode())
        yield descriptor
    finally:
        os.close(descriptor)


def _interrupt(child: process.Child) -> None:
    """End it by SIGINT, so that it takes its lock away; `close` ends what does not listen."""
    child.kill(signal.SIGINT)
    with contextlib.suppress(errors.ProgramFailed):
        child.wait(GRACE_SECONDS)
