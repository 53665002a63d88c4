"""The man pages, made from the same words as docs/commands.md.

python -m pullback.cli.manpages DIRECTORY     write pullback.1 and pullback-COMMAND.1, remove those of no command
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pullback.cli import reference, roff, signatures
from pullback.cli.main import app
from pullback.errors import Exit
from pullback.version import __version__

#: Variables of the environment that no option names.
_ENVIRONMENT = {
    "PULLBACK_CONFIG": "The configuration file, instead of the default one.",
    "PULLBACK_PASSWORD_FILE": "A file whose first line is the repository's password.",
    "PULLBACK_PASSWORD_COMMAND": "A program that prints it.",
    "RESTIC_REPOSITORY, RESTIC_PASSWORD_FILE, RESTIC_PASSWORD_COMMAND, RESTIC_PASSWORD": (
        "The same, as restic has them, where ours are not set."
    ),
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_DEFAULT_REGION": "The keys of an S3 store.",
}
_FILES = {
    "/etc/pullback/config.toml": "Machines, repositories, and what is the same at every run.",
    "$XDG_CONFIG_HOME/pullback/config.toml": "The same of a user who is not root.",
    "/var/lib/pullback": "Records of jobs, locks, and scratch.",
    "/var/cache/pullback": "What can be found out again.",
}


def name_of(command: str) -> str:
    """The name of a command's page: `checkpoint create` is in pullback-checkpoint-create."""
    return "-".join(["pullback", *command.split()])


def pages() -> dict[str, str]:
    """Every page, by its file's name."""
    found = {"pullback.1": _text(_whole())}
    for command, callback in reference.commands().items():
        found[f"{name_of(command)}.1"] = _text(_command(command, callback))
    return found


def _text(lines: Iterator[str]) -> str:
    return "\n".join(lines) + "\n"


def _head(name: str, summary: str) -> Iterator[str]:
    yield '.\\" Written by `make docs` from the command line. Do not edit it here.'
    # No date: the same source gives the same page.
    yield f'.TH {roff.escaped(name.upper())} 1 "" "Pullback {__version__}" "Pullback"'
    yield roff.section("name")
    yield rf"{roff.escaped(name)} \- {roff.line(summary.rstrip('.'))}"


def _whole() -> Iterator[str]:
    callback = app.registered_callback.callback if app.registered_callback else None
    first, _, _ = (inspect.getdoc(callback) or "").partition("\n")
    yield from _head("pullback", first)
    yield from (roff.section("synopsis"), roff.line("**pullback** COMMAND [OPTIONS] …"))
    yield roff.section("description")
    # Its title, and the line that is the synopsis.
    yield from roff.blocks(reference.TOP.partition("[OPTIONS] …\n")[2])
    yield roff.section("commands")
    for command, callback in reference.commands().items():
        yield from roff.entry(f"**{name_of(command)}**(1)", signatures.summary(callback))
    yield roff.section("exit status")
    for code in Exit:
        yield from roff.entry(f"**{int(code)}**", f"{code.meaning[:1].upper()}{code.meaning[1:]}.")
    yield roff.section("environment")
    for name, meaning in (_variables() | _ENVIRONMENT).items():
        yield from roff.entry(f"**{name}**", meaning)
    yield roff.section("files")
    for name, meaning in _FILES.items():
        yield from roff.entry(f"**{name}**", meaning)
    yield from (roff.section("see also"), roff.line("**restic**(1), **qemu-img**(1), **qemu-nbd**(8)"))


def _variables() -> dict[str, str]:
    """What the environment can say in place of options."""
    found: dict[str, str] = {}
    for callback in reference.commands().values():
        for parameter in reference.parameters(callback):
            variables = parameter.info.envvar or []
            for name in [variables] if isinstance(variables, str) else variables:
                found.setdefault(name, f"In place of `{parameter.names[-1]}`. {parameter.info.help}")
    return dict(sorted(found.items()))


def _command(command: str, callback: Callable[..., Any]) -> Iterator[str]:
    known = reference.parameters(callback)
    yield from _head(name_of(command), signatures.summary(callback))
    yield from (roff.section("synopsis"), roff.line(reference.usage(command, known)))
    yield roff.section("description")
    yield from roff.blocks(inspect.getdoc(callback) or "")
    yield from roff.blocks(reference.NOTES[command])
    for title, wanted in (("arguments", True), ("options", False)):
        chosen = [parameter for parameter in known if parameter.is_argument is wanted]
        if chosen:
            yield roff.section(title)
        for parameter in chosen:
            yield from roff.entry(*reference.row(parameter))
    yield from (roff.section("see also"), roff.line("**pullback**(1)"))


def write(directory: Path) -> None:
    """Write all pages, and remove those of commands that are gone."""
    directory.mkdir(exist_ok=True)
    wanted = pages()
    for path in directory.glob("pullback*.1"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (directory / name).write_text(text, encoding="ascii")


def main() -> None:
    """Write the pages to the directory that the command line names."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m pullback.cli.manpages DIRECTORY")
    write(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
