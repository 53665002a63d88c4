"""The small part of Markdown that our texts use, as the source of a man page (groff_man(7), mandoc's man(7)).

Paragraphs, lists with `-`, blocks of code (fenced, or indented by four), `code`, **bold** and [links](to).
The output is ASCII, whatever goes in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

_INLINE = re.compile(r"`(?P<code>[^`]+)`|\*\*(?P<bold>[^*]+)\*\*|\[(?P<link>[^\]]+)\]\((?P<to>[^)\s]*)\)")
#: What groff would turn into typographic characters, or take as a command.
_CHARACTERS = {"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"}
_FENCE = "```"


def escaped(text: str) -> str:
    """A text that stands for itself, anywhere but in the argument of a macro."""
    plain = "".join(_CHARACTERS.get(letter, letter) for letter in text)
    plain = "".join(letter if letter < "\x7f" else f"\\[u{ord(letter):04X}]" for letter in plain)
    return f"\\&{plain}" if plain.startswith(".") else plain


def line(text: str) -> str:
    """One line of running text, with its `code` and **bold** set bold."""
    parts: list[str] = []
    end = 0
    for match in _INLINE.finditer(text):
        parts.append(escaped(text[end : match.start()]))
        strong = match["code"] or match["bold"]
        parts.append(rf"\fB{escaped(strong)}\fR" if strong else _link(match["link"], match["to"]))
        end = match.end()
    return "".join([*parts, escaped(text[end:])])


def _link(text: str, to: str) -> str:
    """A page of ours is named; where else a link leads is not said."""
    page = to.partition("#")[0]
    return line(text) + (escaped(f" (docs/{page})") if page.endswith(".md") and "/" not in page else "")


def section(title: str) -> str:
    """`.SH`."""
    return f".SH {title.upper()}"


def entry(tag: str, text: str) -> Iterator[str]:
    """A paragraph with a tag that hangs out."""
    yield from (".TP", line(tag), *(line(part) for part in text.splitlines()))


def code(lines: Iterable[str]) -> Iterator[str]:
    """Lines that stay as they are."""
    yield from (".PP", ".RS 4", ".nf", *(escaped(text) for text in lines), ".fi", ".RE")


def blocks(markdown: str) -> Iterator[str]:
    """A text, block by block. Headings and comments are left out."""
    waiting = markdown.splitlines()
    while waiting:
        first = waiting[0]
        if not first.strip() or first.startswith(("#", "<!--")):
            waiting.pop(0)
        elif first.startswith(_FENCE):
            end = next(number for number, text in enumerate(waiting) if number and text.startswith(_FENCE))
            yield from code(waiting[1:end])
            del waiting[: end + 1]
        elif first.startswith("    "):
            yield from code(text[4:] for text in _taken(waiting, lambda text: text.startswith("    ")))
        elif first.startswith("- "):
            yield from (r".IP \(bu 2", line(waiting.pop(0)[2:]))
            yield from (line(text.strip()) for text in _taken(waiting, lambda text: text.startswith("  ")))
        else:
            yield ".PP"
            yield from map(line, _taken(waiting, _is_running))


def _is_running(text: str) -> bool:
    return bool(text.strip()) and not text.startswith((_FENCE, "- ", "#", "<!--"))


def _taken(waiting: list[str], fits: Callable[[str], bool]) -> list[str]:
    """The lines at the beginning that fit, taken off."""
    count = next((number for number, text in enumerate(waiting) if not fits(text)), len(waiting))
    found = waiting[:count]
    del waiting[:count]
    return found
