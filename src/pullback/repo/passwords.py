"""The password of a repository: from a file, a command, a variable, or a prompt.

Ours come first: PULLBACK_PASSWORD_FILE, PULLBACK_PASSWORD_COMMAND. Then restic's, in restic's order:
RESTIC_PASSWORD_COMMAND or RESTIC_PASSWORD_FILE, and RESTIC_PASSWORD if neither is set. As restic
does, white space around what a file or a command gives is taken away (source: restic's manual,
"Preparing a new repository"; tried with 0.14).
"""

from __future__ import annotations

import codecs
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from pullback import errors

#: How long a command may take: it may ask a person for a key card.
COMMAND_SECONDS = 120.0
#: Bytes: more is no password.
_LIMIT = 64 * 1024
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def find(
    environ: Mapping[str, str],
    *,
    repository: str,
    prompt: Callable[[], str] | None = None,
    timeout: float = COMMAND_SECONDS,
) -> str:
    """The password, as the variables say; `prompt` is asked if they say nothing.

    Raises `NoPassword` if there is none, and `PasswordUnavailable` if what should give it fails.
    """
    for whose in ("PULLBACK", "RESTIC"):
        file, command = f"{whose}_PASSWORD_FILE", f"{whose}_PASSWORD_COMMAND"
        if environ.get(file) and environ.get(command):
            raise errors.UsageError(problem=f"{file} and {command} are both set")
        if environ.get(file):
            return from_file(Path(environ[file]), source=f"The file {environ[file]} ({file})")
        if environ.get(command):
            return from_command(environ[command], environ, source=command, timeout=timeout)
    if environ.get("RESTIC_PASSWORD"):
        return environ["RESTIC_PASSWORD"]
    answer = prompt() if prompt is not None else ""
    if not answer:
        raise errors.NoPassword(repository=repository)
    return answer


def from_file(path: Path, *, source: str) -> str:
    """The text in a file, without white space around it; `source` is what messages call it."""
    try:
        with path.open("rb") as file:
            return _password(file.read(_LIMIT + 1), source)
    except OSError as error:
        raise errors.PasswordUnavailable(source=source, reason=error.strerror or str(error)) from error


def from_command(command: str, environ: Mapping[str, str], *, source: str, timeout: float) -> str:
    """What a command prints. It is split as a shell would, and run without one; it may speak on standard error."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise errors.PasswordUnavailable(source=source, reason=f"it cannot be read: {error}") from error
    if not words:
        raise errors.PasswordUnavailable(source=source, reason="it is empty")
    try:
        # In our process group: it may ask at the terminal.
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=dict(environ))
    except OSError as error:
        reason = f"{words[0]} cannot be run ({error.strerror})"
        raise errors.PasswordUnavailable(source=source, reason=reason) from error
    with process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            reason = f"no end within {timeout:g} s"
            raise errors.PasswordUnavailable(source=source, reason=reason) from error
        finally:
            process.kill()
    if process.returncode != 0:
        raise errors.PasswordUnavailable(source=source, reason=f"it ended with status {process.returncode}")
    return _password(output, source)


def _password(content: bytes, source: str) -> str:
    if len(content) > _LIMIT:
        raise errors.PasswordUnavailable(source=source, reason="it is too long for a password")
    encoding = next((name for mark, name in _BOMS if content.startswith(mark)), "utf-8")
    try:
        password = content.decode(encoding).strip()
    except UnicodeDecodeError as error:
        raise errors.PasswordUnavailable(source=source, reason="it is no text in UTF-8") from error
    if not password:
        raise errors.PasswordUnavailable(source=source, reason="it is empty")
    return password
