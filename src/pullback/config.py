"""The configuration file: machines and repositories by names, and what is the same at every run.

    /etc/pullback/config.toml                      root
    $XDG_CONFIG_HOME/pullback/config.toml          other users (without the variable: ~/.config)
    PULLBACK_CONFIG, --config                      another one

It is outside input: bounded, and checked whole before anything of it is believed. A key that is not known is
an error, because one that is silently ignored (`exlude`) makes another backup than the one that was meant.
Checking is by hand: a library would check types as well, but not say which table, which key and what to do.
The file holds no secret, so it may be readable by all; it names programs that are run, so it may not be
writable by all. docs/configuration.md describes every key.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from pullback import errors, units
from pullback.model import disks, urls
from pullback.model.backups import Fleecing, Quiesce
from pullback.model.hooks import Hooks
from pullback.model.retention import Keep
from pullback.model.texts import is_showable

SYSTEM_PATH = Path("/etc/pullback/config.toml")
#: Names the file instead of the default place.
VARIABLE = "PULLBACK_CONFIG"
#: Bytes of the file; a thousand machines with hooks of their own have half of it.
MAX_FILE = 1 * units.MiB
#: Bytes of a file with environment variables.
MAX_ENVIRONMENT = 64 * units.KiB
_MAX_WORDS = 256
_MAX_KEEP = 1_000_000
_MAX_TIMEOUT = 86_400.0
_MAX_TEXT = 4096
#: Neither a URL nor a path, and good as the instance of a systemd unit.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
_SECRET_KEY = re.compile(r"password|passwd|passphrase|secret|token|(access|private)_?key|credential", re.IGNORECASE)
_URL_SECRET = re.compile(r"//[^/@\s]*:[^/@\s]+@")
_IMAGE_START = re.compile(r"(?:^images:|(?<!,),(?!,))[^=,]+=(?:(?:qcow2|raw):)?(.)")
#: What says a repository's password in the environment; the configuration's own wins over all of them.
_PASSWORDS = tuple(
    f"{program}_PASSWORD{source}" for program in ("PULLBACK", "RESTIC") for source in ("", "_FILE", "_COMMAND")
)
_T = TypeVar("_T")
_E = TypeVar("_E", bound=StrEnum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A repository that is configured."""

    name: str
    #: As it is written; `model.urls.repository` accepts it.
    url: str
    keep: Keep = field(default_factory=Keep)
    #: Bytes a second that are written at most; None: no limit.
    limit_rate: int | None = None
    #: The file that holds the password.
    password_file: Path | None = None
    #: The words of a program that prints it.
    password_command: tuple[str, ...] = ()
    #: A file of NAME=VALUE lines, such as AWS_ACCESS_KEY_ID.
    environment_file: Path | None = None

    def environ(self, base: Mapping[str, str]) -> dict[str, str]:
        """The environment as if the user had set what is configured: `base`, and over it this repository's own.

        Raises `BadConfig` if the environment file cannot be used.
        """
        found = dict(base)
        if self.environment_file is not None:
            found |= read_environment(self.environment_file)
        if self.password_file is None and not self.password_command:
            return found
        found = {name: value for name, value in found.items() if name not in _PASSWORDS}
        if self.password_file is not None:
            found["PULLBACK_PASSWORD_FILE"] = str(self.password_file)
        else:
            found["PULLBACK_PASSWORD_COMMAND"] = shlex.join(self.password_command)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine that is configured. What the defaults said is in it."""

    name: str
    #: As it is written.
    url: str
    place: urls.Machine
    #: What it is called in repositories; None: as its QEMU calls itself.
    identity: str | None = None
    #: Targets to take; none: all that take part by default.
    disks: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scratch: Path | None = None
    engine: Fleecing | None = None
    quiesce: Quiesce | None = None
    #: The guest agent's socket.
    agent: Path | None = None
    mount_points: tuple[str, ...] = ()
    #: Names of the repositories that it is backed up to.
    repositories: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    hooks: Hooks = field(default_factory=Hooks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All that is configured."""

    #: Where it was looked for.
    path: Path
    #: False: there is no such file.
    exists: bool = True
    machines: Mapping[str, Machine] = field(default_factory=dict)
    repositories: Mapping[str, Repository] = field(default_factory=dict)

    def machine(self, name: str) -> Machine:
        """The machine of that name. Raises `NotConfigured`."""
        return self._named("machine", self.machines, name)

    def repository(self, name: str) -> Repository:
        """The repository of that name. Raises `NotConfigured`."""
        return self._named("repository", self.repositories, name)

    def repositories_of(self, machine: Machine) -> tuple[Repository, ...]:
        """Where a machine is backed up to, in the order in which it is written."""
        return tuple(self.repositories[name] for name in machine.repositories)

    def _named(self, kind: str, there: Mapping[str, _T], name: str) -> _T:
        if name in there:
            return there[name]
        known = f"There are: {', '.join(sorted(there))}." if there else f"The file names no {kind}."
        raise errors.NotConfigured(
            kind=kind, name=name, path=str(self.path), known=known if self.exists else "There is no such file."
        )


def is_name(text: str) -> bool:
    """Can a machine or repository be called so? (Then it is no URL, and no path that begins at the root.)"""
    return bool(_NAME.fullmatch(text))


def default_path(environ: Mapping[str, str] | None = None) -> Path:
    """Where the file is, if nobody says otherwise."""
    if os.geteuid() == 0:
        return SYSTEM_PATH
    base = (os.environ if environ is None else environ).get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "pullback" / "config.toml"


def load(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Read the file at `path`, else at `PULLBACK_CONFIG`, else at the default place, where it may be missing.

    Raises `BadConfig` with the table and the key for whatever is wrong, and `PermissionDenied`.
    """
    variables = os.environ if environ is None else environ
    given = path or (Path(text) if (text := variables.get(VARIABLE)) else None)
    place = (given or default_path(variables)).absolute()
    try:
        data = _read(place, MAX_FILE)
    except FileNotFoundError as error:
        if given is not None:
            raise _bad(place, "the file", "is not there") from error
        return Config(path=place, exists=False)
    return parse(data, place)


def parse(data: bytes, path: Path) -> Config:
    """The configuration that the file's content says; `path` is what messages call it. Raises `BadConfig`."""
    try:
        values = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _bad(path, "the text", f"is no TOML ({str(error).rstrip('.')[:200]})") from error
    top = _Table(path, (), values)
    defaults = _defaults(top.table("defaults"))
    hooks = _hooks(top.table("hooks"), Hooks())
    repositories = {name: _repository(table, name, defaults) for name, table in top.named_tables("repositories")}
    machines = {name: _machine(table, name, defaults, hooks) for name, table in top.named_tables("machines")}
    top.end()
    found = Config(path=path, machines=machines, repositories=repositories)
    _require_repositories(found, defaults)
    return found


# -- files -----------------------------------------------------------------------------------


def _bad(path: Path, key: str, problem: str, way_out: str = "docs/configuration.md has every key.") -> errors.BadConfig:
    return errors.BadConfig(path=str(path), key=key, problem=problem, way_out=way_out)


def _read(path: Path, limit: int) -> bytes:
    """A file that tells programs what to do: it must be one that no stranger can change."""
    try:
        # Not blocking, in case it is a pipe; that is refused then.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
            _require_ours(path, os.fstat(file.fileno()))
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(path)) from error
    except OSError as error:
        raise _bad(path, "the file", f"cannot be read ({error.strerror})") from error
    if len(data) > limit:
        raise _bad(path, "the file", f"is longer than {units.format_size(limit)}")
    return data


def _require_ours(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _bad(path, "the file", "is no regular file")
    if status.st_uid not in (0, os.geteuid()):
        way_out = f"It decides which programs are run as you: chown it, or name another with {VARIABLE}."
        raise _bad(path, "the file", "belongs to another user", way_out)
    if status.st_mode & stat.S_IWOTH:
        raise _bad(path, "the file", "can be changed by every user", f"chmod o-w {shlex.quote(str(path))}")


def read_environment(path: Path) -> dict[str, str]:
    """The variables of a file with NAME=VALUE lines; `#` begins a comment, and quotes around a value are taken off.

    Raises `BadConfig`, also if others can read it: it is there for secrets.
    """
    try:
        data = _read(path, MAX_ENVIRONMENT)
    except FileNotFoundError as error:
        raise _bad(path, "the file", "is not there") from error
    if path.stat().st_mode & stat.S_IRWXO:
        raise _bad(path, "the file", "can be read by every user", f"chmod 600 {shlex.quote(str(path))}")
    try:
        lines = data.decode("utf-8").splitlines()
    except ValueError as error:
        raise _bad(path, "the text", "is not UTF-8") from error
    return dict(_variables(path, lines))


def _variables(path: Path, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("export ")
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.partition("=")
        if not equals or not _VARIABLE_NAME.fullmatch(name) or "\0" in value:
            # Not what it says: it may be half a secret.
            raise _bad(path, f"line {number}", "is not NAME=VALUE")
        quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "'\""
        yield name, value[1:-1] if quoted else value


# -- tables ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Defaults:
    """What holds where a machine or repository says nothing."""

    repositories: tuple[str, ...]
    exclude: tuple[str, ...]
    scratch: Path | None
    engine: Fleecing | None
    quiesce: Quiesce | None
    tags: tuple[str, ...]
    keep: Keep
    limit_rate: int | None


def _defaults(table: _Table) -> _Defaults:
    found = _Defaults(
        repositories=table.names("repository") or (),
        exclude=table.targets("exclude") or (),
        scratch=table.path("scratch"),
        engine=table.choice("engine", Fleecing),
        quiesce=table.choice("quiesce", Quiesce),
        tags=table.tags("tags") or (),
        keep=_keep(table.optional_table("keep")) or Keep(),
        limit_rate=table.rate("limit_rate"),
    )
    table.end()
    return found


def _repository(table: _Table, name: str, defaults: _Defaults) -> Repository:
    keep = _keep(table.optional_table("keep"))
    found = Repository(
        name=name,
        url=table.repository_url("url"),
        keep=defaults.keep if keep is None else keep,
        limit_rate=_either(table.rate("limit_rate"), defaults.limit_rate),
        password_file=table.path("password_file"),
        password_command=table.command("password_command") or (),
        environment_file=table.path("environment_file"),
    )
    if found.password_file is not None and found.password_command:
        raise table.bad("password_command", "and password_file are two ways to say the same; one must go")
    table.end()
    return found


def _machine(table: _Table, name: str, defaults: _Defaults, hooks: Hooks) -> Machine:
    url = table.text("url")
    place = table.machine_place("url", url)
    own = table.machine_name("name")
    found = Machine(
        name=name,
        url=url,
        place=place,
        # Images do not say what their machine is called.
        identity=own or (name if isinstance(place, urls.ImagesMachine) else None),
        disks=table.targets("disks") or (),
        exclude=_either(table.targets("exclude"), defaults.exclude),
        scratch=_either(table.path("scratch"), defaults.scratch),
        engine=_either(table.choice("engine", Fleecing), defaults.engine),
        quiesce=_either(table.choice("quiesce", Quiesce), defaults.quiesce),
        agent=table.path("agent"),
        mount_points=table.words("mount_points") or (),
        repositories=_either(table.names("repository"), defaults.repositories),
        tags=_either(table.tags("tags"), defaults.tags),
        hooks=_hooks(table.table("hooks"), hooks),
    )
    table.end()
    return found


def _either(own: _T | None, default: _T) -> _T:
    return default if own is None else own


def _hooks(table: _Table, default: Hooks) -> Hooks:
    """Each key alone takes the place of the default's; an empty list is none."""
    found = Hooks(
        pre=_either(table.command("pre", empty=True), default.pre),
        post=_either(table.command("post", empty=True), default.post),
        error=_either(table.command("error", empty=True), default.error),
        timeout=_either(table.number("timeout", _MAX_TIMEOUT), default.timeout),
    )
    table.end()
    return found


def _keep(table: _Table | None) -> Keep | None:
    if table is None:
        return None
    found = Keep(**{kind.name: table.count(kind.name, _MAX_KEEP) for kind in fields(Keep)})
    table.end()
    if not found:
        raise table.bad("", "keeps nothing at all")
    return found


def _require_repositories(config: Config, defaults: _Defaults) -> None:
    """Whoever names a repository names one that is there."""
    places = [("defaults.repository", defaults.repositories)]
    places += [(f"machines.{machine.name}.repository", machine.repositories) for machine in config.machines.values()]
    for key, names in places:
        for name in names:
            if name not in config.repositories:
                problem = f"names {name!r}, and there is no table [repositories.{name}]"
                raise _bad(config.path, key, problem, _nearest(name, config.repositories))


def _nearest(name: str, known: Mapping[str, object] | Sequence[str]) -> str:
    """A remedy for a word that is not known."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if near:
        return f"Did you mean {near[0]}?"
    return f"There are: {', '.join(sorted(known))}." if known else "There is none yet."


class _Table:
    """A table of the file: each key is taken once and checked; `end` refuses what is left over."""

    def __init__(self, path: Path, place: tuple[str, ...], values: Mapping[str, object]) -> None:
        self._path = path
        self._place = place
        self._values = values
        self._asked: set[str] = set()

    def bad(self, key: str, problem: str, way_out: str | None = None) -> errors.BadConfig:
        """What is wrong with a key; "" is the table itself."""
        where = ".".join((*self._place, key) if key else self._place) or "the file"
        return _bad(self._path, where, problem, *([way_out] if way_out else []))

    def end(self) -> None:
        """Nothing may be left."""
        for key in self._values:
            if key in self._asked:
                continue
            if _SECRET_KEY.search(key):
                way_out = (
                    "Put it into a file that only its user can read, and name that: "
                    "password_file, or environment_file for keys of S3. This file may be readable by others."
                )
                raise self.bad(key, "would be a secret in this file", way_out)
            raise self.bad(key, "is no key that is known here", _nearest(key, sorted(self._asked)))

    def _take(self, key: str) -> object:
        self._asked.add(key)
        return self._values.get(key)

    def _checked(self, key: str, check: Callable[[object], _T]) -> _T | None:
        """What `check` makes of a value; its `ValueError` says what is wrong with it."""
        value = self._take(key)
        if value is None:
            return None
        try:
            return check(value)
        except ValueError as error:
            raise self.bad(key, str(error)) from error

    # -- tables ------------------------------------------------------------------------------

    def optional_table(self, key: str) -> _Table | None:
        """A table inside, or None."""
        value = self._checked(key, _as_table)
        return None if value is None else _Table(self._path, (*self._place, key), value)

    def table(self, key: str) -> _Table:
        """A table inside; one that is not there is empty."""
        return self.optional_table(key) or _Table(self._path, (*self._place, key), {})

    def named_tables(self, key: str) -> Iterator[tuple[str, _Table]]:
        """The tables [key.NAME]."""
        above = self.table(key)
        for name in above._values:
            if not is_name(name):
                problem = "is a name with other characters than letters, digits, '.', '_' and '-'"
                raise above.bad(name if is_showable(name) else repr(name), problem)
            yield name, above.table(name)

    # -- values ------------------------------------------------------------------------------

    def text(self, key: str) -> str:
        """A text that must be there."""
        found = self._checked(key, _as_text)
        if found is None:
            raise self.bad(key, "is missing")
        return found

    def path(self, key: str) -> Path | None:
        """An absolute path: a timer runs in another directory than you."""
        return self._checked(key, _as_path)

    def choice(self, key: str, kind: type[_E]) -> _E | None:
        """One of some words."""
        return self._checked(key, lambda value: _as_choice(value, kind))

    def words(self, key: str) -> tuple[str, ...] | None:
        """A list of texts; a single one may stand without brackets."""
        return self._checked(key, lambda value: _as_words([value] if isinstance(value, str) else value))

    def targets(self, key: str) -> tuple[str, ...] | None:
        """Disks."""
        return self._checked(key, lambda value: tuple(map(_as_target, _as_words(value))))

    def names(self, key: str) -> tuple[str, ...] | None:
        """One name, or several."""
        found = self.words(key)
        if found is not None and len(set(found)) != len(found):
            raise self.bad(key, "says a name twice")
        return found

    def tags(self, key: str) -> tuple[str, ...] | None:
        """Tags of restore points."""
        found = self.words(key)
        if any("," in tag for tag in found or ()):
            raise self.bad(key, "has a tag with a comma, which separates tags")
        return found

    def command(self, key: str, *, empty: bool = False) -> tuple[str, ...] | None:
        """The words of a program."""
        return self._checked(key, lambda value: _as_command(value, empty=empty))

    def number(self, key: str, most: float) -> float | None:
        """A number of seconds."""
        return self._checked(key, lambda value: _as_number(value, most))

    def count(self, key: str, most: int) -> int:
        """How many; 0 if nothing is said."""
        return self._checked(key, lambda value: _as_count(value, most)) or 0

    def rate(self, key: str) -> int | None:
        """Bytes a second: 20000000, "20M"."""
        return self._checked(key, _as_rate)

    def machine_name(self, key: str) -> str | None:
        """What a machine is called in repositories."""
        return self._checked(key, _as_text)

    def machine_place(self, key: str, url: str) -> urls.Machine:
        """Where a machine is."""
        try:
            _require_no_secret(url)
            place = urls.machine(url)
            starts = [url.removeprefix("qmp:")[:1]] if url.startswith("qmp:") else _IMAGE_START.findall(url)
            if any(start != "/" for start in starts):
                raise ValueError("has a path that does not begin with '/'")
        except ValueError as error:
            raise self.bad(key, str(error)) from error
        except errors.BadUrl as error:
            raise self.bad(key, f"does not name a machine: {error.problem}", error.hint) from error
        return place

    def repository_url(self, key: str) -> str:
        """Where a repository is."""
        url = self.text(key)
        try:
            _require_no_secret(url)
            urls.repository(url)
            if not re.match(r"(?:(?:dir|local):)?/|(?!dir:|local:)\w+:", url):
                raise ValueError("has a path that does not begin with '/'")
        except ValueError as error:
            raise self.bad(key, str(error)) from error
        except errors.BadUrl as error:
            raise self.bad(key, f"does not name a repository: {error.problem}", error.hint) from error
        return url


# -- values: each check gives the value, or a `ValueError` that goes on "KEY …" ---------------


def _as_table(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError("is no table")
    return value


def _as_text(value: object) -> str:
    if not isinstance(value, str) or not value or not is_showable(value) or len(value) > _MAX_TEXT:
        raise ValueError("is no text, or one with characters that no name has")
    return value


def _as_path(value: object) -> Path:
    text = _as_text(value)
    if not text.startswith("/"):
        raise ValueError("is no absolute path: it must begin with '/'")
    return Path(text)


def _as_choice(value: object, kind: type[_E]) -> _E:
    words = [str(member) for member in kind]
    if value not in words:
        raise ValueError(f"is none of {', '.join(words)}")
    return kind(str(value))


def _as_words(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > _MAX_WORDS or not all(isinstance(word, str) for word in value):
        raise ValueError("is no list of texts")
    return tuple(map(_as_text, value))


def _as_target(text: str) -> str:
    if disks.bus_of(text) is None:
        raise ValueError(f"names {text!r}, which is no disk (vda, sda, nvme0n1 …)")
    return text


def _as_command(value: object, *, empty: bool) -> tuple[str, ...]:
    if isinstance(value, str):
        example = ", ".join(f'"{word}"' for word in value.split()[:3])
        raise ValueError(
            f"is a text; it must be a list of words, [{example}, …], because no shell takes part "
            '(to have one: ["sh", "-c", "…"])'
        )
    words = _as_words(value)
    if not words and not empty:
        raise ValueError("has no words")
    if words and not words[0].startswith("/") and "/" in words[0]:
        raise ValueError("begins with a relative path; the program must be a name, or an absolute path")
    return words


def _as_number(value: object, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise ValueError(f"is no number of seconds above 0, up to {most:g}")
    return float(value)


def _as_count(value: object, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"is no whole number from 0 to {most}")
    return value


def _as_rate(value: object) -> int:
    try:
        rate = units.parse_size(value.removesuffix("/s")) if isinstance(value, str) else _as_count(value, 1 << 60)
    except (ValueError, errors.UsageError) as error:
        raise ValueError("is no rate; write it like 20M, for 20 MiB a second") from error
    if rate <= 0:
        raise ValueError("is no rate above 0; without the key there is no limit")
    return rate


def _require_no_secret(url: str) -> None:
    if _URL_SECRET.search(url):
        raise ValueError("has a password in it, and this file may be readable by others")
