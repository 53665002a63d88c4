"""QEMU's command line as options and values, nothing of it understood yet. Pure.

    ["qemu-system-x86_64", "-m", "4G", "-device", "e1000,mac=52:54:00:12:34:56", "disk.img"]
    → Option("m", "4G"), Option("device", "e1000,mac=…"), Option("hda", "disk.img")

Sources: QEMU's qemu-options.hx (which options take a value), util/keyval.c and util/qemu-option.c (a
comma in a value is doubled; `key` alone means `key=on`). Whatever is not well formed becomes something
that nobody has a use for; nothing here raises.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


def words(text: str) -> tuple[str, ...]:
    """The words of a text, for lists that are easier to read so."""
    return tuple(text.split())


#: Options without a value, in QEMU 2.x to 10.x.
FLAGS = frozenset(
    words(
        """
    h help version S s snapshot nographic no-reboot no-shutdown no-acpi no-hpet enable-kvm no-kvm no-kvm-irqchip
    no-kvm-pit no-kvm-pit-reinjection usb daemonize no-user-config nodefconfig nodefaults no-fd-bootchk win2k-hack
    rtc-td-hack full-screen alt-grab ctrl-grab no-quit no-frame portrait curses sdl show-cursor old-param semihosting
    singlestep one-insn-per-tb preconfig mem-prealloc xen-attach xen-domid-restrict tdf enable-sync-profile localtime
        """
    )
)
#: Members of a JSON object that are looked at; QEMU's own have some 30.
_MAX_MEMBERS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option of the command line."""

    #: Without its dashes.
    name: str
    #: The word behind it; None if it has none.
    value: str | None = None

    def __str__(self) -> str:
        return f"-{self.name}" if self.value is None else f"-{self.name} {self.value}"


def options(words: Sequence[str]) -> Iterator[Option]:
    """The options in a process's words, the first of which is its name.

    A word that is no option is the first disk's image. An option that we do not know takes the word
    behind it, unless that looks like an option.
    """
    waiting = list(reversed(words[1:]))
    while waiting:
        word = waiting.pop()
        if not word.startswith("-") or word == "-":
            yield Option(name="hda", value=word)
            continue
        name = word.removeprefix("-").removeprefix("-")
        if name in FLAGS or not waiting or _is_next(name, waiting[-1]):
            yield Option(name=name)
        else:
            yield Option(name=name, value=waiting.pop())


def _is_next(name: str, word: str) -> bool:
    """Is the word an option of its own, and not this one's value? (`-append -x` is the exception.)"""
    return word.startswith("-") and len(word) > 1 and name not in ("append", "kernel", "smbios")


def pairs(value: str, first: str | None = None) -> dict[str, str]:
    """`a=b,c=d` as a mapping; `first` is the key of a first value without one, for others that is `on`."""
    found: dict[str, str] = {}
    for number, part in enumerate(_split(value)):
        key, equals, text = part.partition("=")
        if equals:
            found[key] = text
        elif number == 0 and first is not None:
            found[first] = key
        elif key.startswith("no") and len(key) > 2:  # `nowait`: older than QEMU 6
            found[key] = "on"
            found[key[2:]] = "off"
        else:
            found[key] = "on"
    return found


def _split(value: str) -> Iterator[str]:
    """Parts between single commas; a doubled comma stands for one."""
    part, rest = "", value
    while rest:
        head, comma, rest = rest.partition(",")
        part += head
        if comma and rest.startswith(","):
            part += ","
            rest = rest[1:]
            continue
        yield part
        part = ""
    if part:
        yield part


def properties(value: str, first: str | None = None) -> dict[str, object]:
    """The value of an option that takes JSON too: its members, those that are objects still inside.

    Numbers and switches of the short form stay texts. Nothing of what is no object.
    """
    if not value.lstrip().startswith("{"):
        return dict(pairs(value, first))
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, Mapping) or len(found) > _MAX_MEMBERS:
        return {}
    return dict(found)


def scalar(value: object) -> str | None:
    """A member as the short form has it: `on`, `4`, a text; None for what has parts."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return str(value)
    return value if isinstance(value, str) else None


def joined(values: Mapping[str, str]) -> str:
    """The short form: what `pairs` takes apart."""
    return ",".join(f"{key}={text.replace(',', ',,')}" for key, text in values.items())
