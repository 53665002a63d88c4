"""Texts that end up in restore points: names of disks, and sentences for people."""

from __future__ import annotations

import re

#: Characters of a free text (PATH_MAX of Linux, because file names are among them).
MAX_TEXT = 4096
#: What a disk can be called.
TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# Control characters, line separators, writing-direction overrides and lone surrogates: a text with
# them could rewrite the terminal on which it is shown, or could not be encoded at all.
_UNSHOWABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def is_target(text: str) -> bool:
    """Can a disk be called so?"""
    return bool(TARGET.fullmatch(text))


def showable(text: str) -> str:
    """The text for people: what could upset a terminal is written `\\u001b`, and it ends at `MAX_TEXT`."""
    return _UNSHOWABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)[:MAX_TEXT]


def is_showable(text: str) -> bool:
    """Has the text nothing in it that `showable` would change?"""
    return len(text) <= MAX_TEXT and not _UNSHOWABLE.search(text)
