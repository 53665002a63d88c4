"""What a user calls machines and repositories: URLs, or names from the configuration file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pullback import config, errors
from pullback.cli import asking
from pullback.config import Config
from pullback.model import urls

if TYPE_CHECKING:
    from pullback.flows.repositories import Access


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A repository that a user means, and what opens it."""

    place: urls.Repository
    access: Access
    #: What the configuration says of it, if it is configured.
    configured: config.Repository | None = None


def load(path: Path | None) -> Config:
    """The configuration: that of `path`, or the usual one."""
    return config.load(path)


def machine(name: str, known: Config) -> tuple[urls.Machine, config.Machine | None]:
    """The machine that `name`, a URL or a configured name, means."""
    if config.is_name(name):
        found = known.machine(name)
        return found.place, found
    return urls.machine(name), None


def repository(name: str | None, known: Config, *, state: Path | None = None) -> Chosen:
    """The repository that `name` means; None: PULLBACK_REPOSITORY, RESTIC_REPOSITORY, or the only one configured."""
    text = name or _from_environment()
    if text is None:
        return _configured(_only(known), state)
    if config.is_name(text):
        return _configured(known.repository(text), state)
    place = urls.repository(text)
    return Chosen(place=place, access=_access(dict(os.environ), state, place.url))


def repositories(
    names: Sequence[str], of: config.Machine | None, known: Config, *, state: Path | None = None
) -> list[Chosen]:
    """Where a machine is backed up to: the repositories named, else those that it is configured with."""
    if not names and _from_environment() is None and of is not None and of.repositories:
        return [_configured(one, state) for one in known.repositories_of(of)]
    if not names:
        return [repository(None, known, state=state)]
    return [repository(name, known, state=state) for name in names]


def with_password(chosen: Chosen, file: Path | None, command: str | None) -> Chosen:
    """The same repository, with its password from a file or a command that the user names."""
    if file is not None and command is not None:
        raise errors.UsageError(problem="A file and a command for one password: one must go")
    if file is None and command is None:
        return chosen
    words = {name: value for name, value in chosen.access.environ.items() if "_PASSWORD" not in name}
    given = {"PULLBACK_PASSWORD_FILE": str(file)} if file is not None else {"PULLBACK_PASSWORD_COMMAND": str(command)}
    return replace(chosen, access=replace(chosen.access, environ=words | given))


def new_password() -> Callable[[], str] | None:
    """Asks twice on the terminal, if there is one. Raises `UsageError` if the answers differ."""
    if not asking.possible():
        return None

    def ask() -> str:
        first = asking.password("New password: ")
        if asking.password("The same again: ") != first:
            raise errors.UsageError(problem="The two passwords differ; nothing was done")
        return first

    return ask


def _from_environment() -> str | None:
    from pullback.flows import repositories

    return repositories.named_by(os.environ)


def _only(known: Config) -> config.Repository:
    if len(known.repositories) == 1:
        return next(iter(known.repositories.values()))
    problem = "No repository is named: -r REPO, PULLBACK_REPOSITORY, or the configuration's"
    if known.repositories:
        problem += f" ({', '.join(sorted(known.repositories))})"
    raise errors.UsageError(problem=problem)


def _configured(found: config.Repository, state: Path | None) -> Chosen:
    access = _access(found.environ(os.environ), state, found.name)
    return Chosen(place=urls.repository(found.url), access=access, configured=found)


def _access(environ: dict[str, str], state: Path | None, name: str) -> Access:
    from pullback import state as states
    from pullback.flows.repositories import Access

    return Access(environ=environ, prompt=_prompt(name), notice=_say, cache=states.directories(state).cache)


def _prompt(name: str) -> Callable[[], str] | None:
    """Ask on the terminal, if there is one."""
    if not asking.possible():
        return None
    return lambda: asking.password(f"Password of the repository {name}: ")


def _say(sentence: str) -> None:
    print(f"pullback: {sentence}", file=sys.stderr)
