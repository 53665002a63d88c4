"""What the command line takes, read from the signatures of its commands.

For the pages that are made from it, and for completion in shells. Typer's own classes change.
"""

from __future__ import annotations

import enum
import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from typer import Typer
from typer.models import ArgumentInfo, OptionInfo


@dataclass(frozen=True, slots=True)
class Parameter:
    """An argument or option of a command."""

    name: str
    kind: Any
    info: OptionInfo | ArgumentInfo
    default: Any

    @property
    def is_argument(self) -> bool:
        """Is it given by its place?"""
        return isinstance(self.info, ArgumentInfo)

    @property
    def required(self) -> bool:
        """Must it be given?"""
        return self.default is inspect.Parameter.empty

    @property
    def names(self) -> list[str]:
        """`-r`, `--repository`."""
        # In an annotation, the first name stands where a default would.
        given = [name for name in (self.info.default, *(self.info.param_decls or ())) if isinstance(name, str)]
        return sorted(given, key=len) or [f"--{self.name.replace('_', '-')}"]

    @property
    def words(self) -> list[str]:
        """What can stand behind the name, if that is one of some words."""
        return [member.value for kind in (self.kind, *typing.get_args(self.kind)) for member in _members_of(kind)]

    @property
    def value(self) -> str:
        """What stands behind the name, as a placeholder; "" for a flag."""
        return "" if self.kind is bool else self.info.metavar or "|".join(self.words)

    @property
    def several(self) -> bool:
        """May it be given more than once?"""
        return any(typing.get_origin(kind) is list for kind in (self.kind, *typing.get_args(self.kind)))


def _members_of(kind: Any) -> list[Any]:
    return list(kind) if isinstance(kind, enum.EnumMeta) else []


def parameters(callback: Callable[..., Any]) -> list[Parameter]:
    """The parameters of a command, in the order of its signature."""
    hints = typing.get_type_hints(callback, include_extras=True)
    found = []
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, info = typing.get_args(hints[name])
        found.append(Parameter(name, kind, info, parameter.default))
    return found


def commands(app: Typer) -> dict[str, Callable[..., Any]]:
    """Every command with its function; those of groups by both words."""
    found = dict(_commands(app))
    for name, group in _groups(app):
        found |= {f"{name} {command}": callback for command, callback in _commands(group)}
    return found


def groups(app: Typer) -> dict[str, str]:
    """Every group of commands with its sentence."""
    return {name: str(group.info.help or "") for name, group in _groups(app)}


def _groups(app: Typer) -> Iterator[tuple[str, Typer]]:
    for group in app.registered_groups:
        if group.name and group.typer_instance:
            yield group.name, group.typer_instance


def _commands(of: Typer) -> Iterator[tuple[str, Callable[..., Any]]]:
    for info in of.registered_commands:
        if info.name and info.callback:
            yield info.name, info.callback


def summary(callback: Callable[..., Any]) -> str:
    """The first sentence of a command's help."""
    return (inspect.getdoc(callback) or "").splitlines()[0]
