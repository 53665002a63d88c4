"""What a machine says on its console, as plain text. Pure."""

from __future__ import annotations

import re

# Escape sequences of terminals (ECMA-48): control sequences, strings up to their end, two-character ones.
_SEQUENCE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]{0,4096}(?:\x07|\x1b\\)|\x1b[ -/]{0,2}[0-~]", re.ASCII
)
_BACKSPACED = re.compile(r"[^\n\x08]\x08")
# As in `texts.showable`; line feeds and tabs stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """The text without colours, movements of the cursor, and anything else that a terminal obeys."""
    text = _SEQUENCE.sub("", text)
    text = _BACKSPACED.sub("", text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub("", text)
