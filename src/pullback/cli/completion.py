"""pullback completion: scripts for shells, and the answer to them.

The scripts are short and never change: at each Tab they ask us how the words can go on (0.25 s). So the
knowledge is here once, from the signatures of the commands, and not in three languages of shells.

An answer is a candidate a line, `WORD<Tab>what it is`, or one of two lines that leave it to the shell:
`<Tab>files` and `<Tab>directories`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from pullback.cli import signatures
from pullback.cli.signatures import Parameter

FILES, DIRECTORIES = "\tfiles", "\tdirectories"
_BASH = """\
# Completion of pullback for bash. In ~/.bashrc:  source <(pullback completion bash)
# For all users:  pullback completion bash >/usr/share/bash-completion/completions/pullback
_pullback() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        case $line in
            $'\\tfiles') compopt -o default ;;
            $'\\tdirectories') compopt -o dirnames ;;
            *) COMPREPLY+=("${line%%$'\\t'*}") ;;
        esac
    done < <("${COMP_WORDS[0]}" completion bash -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _pullback pullback
"""
_ZSH = """\
#compdef pullback
# Completion of pullback for zsh. In a directory of $fpath:  pullback completion zsh >_pullback
_pullback() {
    local line
    local -a found
    for line in "${(@f)$("${words[1]}" completion zsh -- "${(@Q)words[2,CURRENT]}" 2>/dev/null)}"; do
        case $line in
            ('') ;;
            ($'\\tfiles') _files; return ;;
            ($'\\tdirectories') _files -/; return ;;
            (*) found+=("${${line%%$'\\t'*}//:/\\\\:}:${line#*$'\\t'}") ;;
        esac
    done
    _describe -t arguments pullback found
}
if [[ ${funcstack[1]} == _pullback ]]; then _pullback "$@"; else compdef _pullback pullback; fi
"""
_FISH = """\
# Completion of pullback for fish:  pullback completion fish >~/.config/fish/completions/pullback.fish
function __pullback_complete
    set -l typed (commandline -opc)
    set -l current (commandline -ct)
    for line in ($typed[1] completion fish -- $typed[2..-1] "$current" 2>/dev/null)
        switch $line
            case \\tfiles
                __fish_complete_path "$current"
            case \\tdirectories
                __fish_complete_directories "$current"
            case '*'
                printf '%s\\n' $line
        end
    end
end
complete -c pullback -f -a '(__pullback_complete)'
"""


class Shell(enum.StrEnum):
    """A shell that we have a script for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


SCRIPTS = {Shell.BASH: _BASH, Shell.ZSH: _ZSH, Shell.FISH: _FISH}
#: Metavars of values that are files. (BACKUP is a document of a backup job.)
_FILE_WORDS = {"FILE", "PATH", "SOCKET", "BACKUP", "IMAGE"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A word that could come next; or, without a meaning, a line for the shell."""

    word: str
    meaning: str = ""

    def __str__(self) -> str:
        return self.word if self.word in (FILES, DIRECTORIES) else f"{self.word}\t{self.meaning}"


#: What stands for values of a kind: the metavar of a parameter, to words with their meanings.
Names = Callable[[str], Iterable[tuple[str, str]]]


def command_of(app: typer.Typer) -> Callable[..., None]:
    """The command `completion` for an application (which cannot be imported here: it has this command)."""

    def completion(
        shell: Annotated[Shell, typer.Argument(metavar="bash|zsh|fish", help="The shell.")],
        words: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="WORD…", help="Behind `--`: what was typed so far. Prints how it can go on; the scripts ask so."
            ),
        ] = None,
    ) -> None:
        """Print a script with which a shell completes commands, options, and what is configured."""
        if words is None:
            print(SCRIPTS[shell], end="")
            return
        for candidate in answers(app, words, shell=shell, names=_configured):
            print(candidate)

    return completion


def _configured(metavar: str) -> Iterator[tuple[str, str]]:
    """Names in the configuration; none if it cannot be used: nothing may be said in the middle of a line."""
    from pullback import config, errors

    try:
        found = config.load()
    except errors.PullbackError:
        return
    if metavar == "MACHINE":
        yield from ((machine.name, machine.url) for machine in found.machines.values())
    elif metavar == "REPO":
        yield from ((repository.name, repository.url) for repository in found.repositories.values())


# -- how words can go on ---------------------------------------------------------------------


def answers(app: typer.Typer, words: Sequence[str], *, shell: Shell, names: Names) -> list[Candidate]:
    """How the last of `words` (it may be empty) can go on. Never raises for words that make no sense."""
    cut = ""
    if shell is Shell.BASH:
        words, cut = _joined(words)
    *before, current = words
    found = _Line(app, names).candidates(before, current)
    fitting = [item for item in found if item.word in (FILES, DIRECTORIES) or item.word.startswith(current)]
    return [Candidate(item.word.removeprefix(cut), item.meaning) for item in fitting]


def _joined(words: Sequence[str]) -> tuple[list[str], str]:
    """Bash cuts words at `=` and `:` and completes the last piece only: the whole words, and what is before it."""
    joined: list[str] = []
    glue = False
    for word in words:
        if joined and (glue or word in ("=", ":")):
            joined[-1] += word
        else:
            joined.append(word)
        glue = word in ("=", ":")
    last = words[-1] if words[-1] not in ("=", ":") else ""
    return joined, joined[-1].removesuffix(last)


class _Line:
    """A command line on its way."""

    def __init__(self, app: typer.Typer, names: Names) -> None:
        self._commands = signatures.commands(app)
        self._groups = signatures.groups(app)
        self._names = names

    def candidates(self, before: list[str], current: str) -> Iterator[Candidate]:
        if not before:
            yield from self._first(current)
        elif before[0] in self._groups and len(before) == 1:
            for name, callback in self._commands.items():
                if name.startswith(f"{before[0]} "):
                    yield Candidate(name.partition(" ")[2], signatures.summary(callback))
        else:
            length = 2 if before[0] in self._groups else 1
            callback_of = self._commands.get(" ".join(before[:length]))
            if callback_of is not None:
                yield from self._behind(signatures.parameters(callback_of), before[length:], current)

    def _first(self, current: str) -> Iterator[Candidate]:
        if current.startswith("-"):
            yield from (Candidate("--help", "Show a help text."), Candidate("--version", "Show the version."))
            return
        for name, callback in self._commands.items():
            if " " not in name:
                yield Candidate(name, signatures.summary(callback))
        for name, sentence in self._groups.items():
            yield Candidate(name, sentence)

    def _behind(self, known: Sequence[Parameter], before: list[str], current: str) -> Iterator[Candidate]:
        """Behind a command and some of its words."""
        options = {name: one for one in known if not one.is_argument for name in one.names}
        given, waiting = _read(options, before)
        name, equals, value = current.partition("=")
        if waiting is not None:
            yield from self._value(waiting, current)
        elif equals and name in options and "--" not in before:
            for item in self._value(options[name], value):
                shell_does = item.word in (FILES, DIRECTORIES)
                yield item if shell_does else Candidate(f"{name}={item.word}", item.meaning)
        elif current.startswith("-") and "--" not in before:
            yield from _option_names(options, before)
        else:
            arguments = [one for one in known if one.is_argument]
            if given < len(arguments):
                yield from self._value(arguments[given], current)
            elif arguments and arguments[-1].several:
                yield from self._value(arguments[-1], current)
            elif not current:
                yield from _option_names(options, before)

    def _value(self, parameter: Parameter, current: str) -> Iterator[Candidate]:
        """What an argument, or the value of an option, can be."""
        metavar = parameter.value
        if "|" in metavar:
            yield from (Candidate(word, str(parameter.info.help)) for word in metavar.split("|"))
            return
        kind = (re.match(r"[A-Z]+", metavar) or [""])[0]
        if kind in ("MACHINE", "REPO"):
            # What has a slash or a colon is a name of a place, whose last part is a path.
            named = [] if "/" in current or ":" in current else list(self._names(kind))
            yield from (Candidate(word, meaning) for word, meaning in named)
            if not any(word.startswith(current) for word, _ in named):
                yield Candidate(FILES)
        elif kind == "DIR":
            yield Candidate(DIRECTORIES)
        elif kind in _FILE_WORDS or metavar.startswith("unix:"):
            yield Candidate(FILES)


def _read(options: dict[str, Parameter], before: Iterable[str]) -> tuple[int, Parameter | None]:
    """How many arguments the words have, and the option that waits for its value."""
    count, waiting, only_arguments = 0, None, False
    for word in before:
        if waiting is not None:
            waiting = None
        elif only_arguments or not word.startswith("-") or word == "-":
            count += 1
        elif word == "--":
            only_arguments = True
        elif word in options and options[word].value:
            waiting = options[word]
    return count, waiting


def _option_names(options: dict[str, Parameter], before: Sequence[str]) -> Iterator[Candidate]:
    """Long names of options that can still be given."""
    for name, parameter in options.items():
        given = any(word.partition("=")[0] in parameter.names for word in before)
        if name.startswith("--") and (parameter.several or not given):
            yield Candidate(name, str(parameter.info.help))
    yield Candidate("--help", "Show a help text.")
