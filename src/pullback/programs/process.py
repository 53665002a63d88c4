"""A foreign program: run to its end, or kept as a child for a while.

Each child dies with us (`setpriv --pdeathsig`, util-linux), because a leaked QEMU burns a core and
a leaked qemu-nbd holds an image's lock for ever. The death signal is bound to the *thread* that
started the child (prctl(2), PR_SET_PDEATHSIG): start children from the main thread, or from a
pool thread that outlives them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from pullback import errors

#: How long a child may take to end after SIGTERM before it is killed.
GRACE_SECONDS = 5.0
#: Programs we know, and the Debian and Ubuntu package each comes from.
PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "nbdcopy": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "fusermount3": "fuse3",
    "restic": "restic",
}
_MESSAGE_LIMIT = 2000


def find(program: str) -> str:
    """The absolute path of `program`; raises `ProgramMissing` with the package to install."""
    path = shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        raise errors.ProgramMissing(program=program, package=PACKAGES.get(program, program))
    return path


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    input: bytes | None = None,
) -> bytes:
    """Run `argv` to its end and give its standard output.

    Raises `ProgramFailed` with its standard error if it ends with a status other than 0, or does
    not end within `timeout` seconds (it is killed then); `ProgramMissing` if it is not installed.
    """
    words = _words(argv)
    try:
        done = subprocess.run(
            [find("setpriv"), "--pdeathsig", "KILL", *words],
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            timeout=timeout,
            env=environment(env),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise errors.ProgramFailed(
            program=_name(words), status=f"no end within {timeout:g} s", message=_tail(error.stderr)
        ) from error
    if done.returncode != 0:
        raise errors.ProgramFailed(program=_name(words), status=_status(done.returncode), message=_tail(done.stderr))
    return done.stdout


class Child:
    """A program that runs while the block runs; ended (SIGTERM, then SIGKILL) with it.

    Its standard error goes to a temporary file, so it can never block on a full pipe, and is read
    for the message when something fails.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        grace: float = GRACE_SECONDS,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
        death: str = "KILL",
    ) -> None:
        """`death` is the signal that it gets when we die."""
        words = _words(argv)
        self.name = _name(words)
        self._grace = grace
        self._log = tempfile.TemporaryFile(prefix="pullback-child-")  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [find("setpriv"), "--pdeathsig", death, *words],
            stdin=stdin,
            stdout=self._log if stdout is None else stdout,
            stderr=self._log,
            env=environment(env),
            pass_fds=pass_fds,
        )

    @property
    def pid(self) -> int:
        """Its process id (setpriv executes the program in place)."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._process.poll()

    def message(self) -> str:
        """The end of what it said on standard error."""
        self._log.seek(0)
        return _tail(self._log.read())

    def wait_until(self, ready: Callable[[], bool], *, what: str, timeout: float) -> None:
        """Wait until `ready()`; raises `ProgramFailed` if it ends before, or after `timeout` s."""
        deadline = time.monotonic() + timeout
        while not ready():
            if (code := self.returncode) is not None:
                raise errors.ProgramFailed(program=self.name, status=_status(code), message=self.message())
            if time.monotonic() > deadline:
                raise errors.ProgramFailed(
                    program=self.name, status=f"no {what} within {timeout:g} s", message=self.message()
                )
            time.sleep(0.005)

    def wait(self, timeout: float) -> int:
        """Wait for its end; gives its status. Raises `ProgramFailed` after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise errors.ProgramFailed(
                program=self.name, status=f"no end within {timeout:g} s", message=self.message()
            ) from error

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send it a signal (tests of death and silence do)."""
        if self._process.poll() is None:
            self._process.send_signal(signum)

    def close(self) -> None:
        """End it: SIGTERM, and SIGKILL when the grace is over. Twice is fine."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(self._grace)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _words(argv: Sequence[str | Path]) -> list[str]:
    words = [str(word) for word in argv]
    if "/" not in words[0]:
        words[0] = find(words[0])
    return words


def _name(words: Sequence[str]) -> str:
    return Path(words[0]).name


def environment(env: Mapping[str, str] | None) -> dict[str, str]:
    """Ours without secrets, in plain C locale so that messages can be recognised."""
    base = dict(os.environ) if env is None else dict(env)
    for name in [name for name in base if "PASSWORD" in name or name.startswith("AWS_")]:
        if env is None:
            del base[name]
    return base | {"LC_ALL": "C"}


def own_python() -> dict[str, str]:
    """The environment in which another interpreter of the same version finds what this one has found."""
    paths = [str(Path(__file__).parents[2]), *(path for path in sys.path if path)]
    return environment(None) | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _status(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"


def _tail(output: bytes | None) -> str:
    text = (output or b"").decode("utf-8", "replace").strip()
    return text[-_MESSAGE_LIMIT:] or "it said nothing"
