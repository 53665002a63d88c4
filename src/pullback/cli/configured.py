"""What a user calls machines and repositories: URLs, or names from the configuration file."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pullback import config, errors
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
    return Chosen(place=urls.repository(text), access=_access(dict(os.environ), state))


def repositories(
    names: Sequence[str], of: config.Machine | None, known: Config, *, state: Path | None = None
) -> list[Chosen]:
    """Where a machine is backed up to: the repositories named, else those that it is configured with."""
    if not names and _from_environment() is None and of is not None and of.repositories:
        return [_configured(one, state) for one in known.repositories_of(of)]
    if not names:
        return [repository(None, known, state=state)]
    return [repository(name, known, state=state) for name in names]


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
    access = _access(found.environ(os.environ), state)
    return Chosen(place=urls.repository(found.url), access=access, configured=found)


def _access(environ: dict[str, str], state: Path | None) -> Access:
    from pullback import state as states
    from pullback.flows.repositories import Access

    return Access(environ=environ, prompt=_prompt(), notice=_say, cache=states.directories(state).cache)


def _prompt() -> Callable[[], str] | None:
    """Ask on the terminal, if there is one."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    return lambda: getpass.getpass("Password of the repository: ", stream=sys.stderr)


def _say(sentence: str) -> None:
    print(f"pullback: {sentence}", file=sys.stderr)
