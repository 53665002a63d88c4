"""Proofs as values: which signs, the page, pictures, and the text of a console."""

from __future__ import annotations

import html.parser
import json
import re
import struct
import zlib
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from pullback.model import consoletext, hardware, pictures, proofpage, proofs
from pullback.model.proofs import Figures, Kind, Proof, Seen, Sign, Signs

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31mred\x1b[0m\x07\x00\u202e"
AGENT, TEXT = Sign(kind=Kind.AGENT), Sign(kind=Kind.CONSOLE, text="login:")


def proof(**changes: object) -> Proof:
    base = Proof(
        point="20261124T060018Z-1f2e3d4c",
        machine="web01",
        created=datetime(2026, 11, 24, 6, tzinfo=UTC),
        at=datetime(2026, 11, 24, 7, tzinfo=UTC),
        proven=True,
        problem=None,
        signs=Signs(signs=(AGENT,), any=True, why="it had a channel"),
        seen=(Seen(sign=AGENT, good=True, seconds=12.345, said="Debian"),),
        figures=Figures(up=12.345, seconds=15, cpu=9.5, read=1 << 20, written=1 << 16),
        accel="kvm",
        cpus=2,
        memory=1 << 30,
        network="none",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


# -- signs -----------------------------------------------------------------------------------


def test_one_of_several_is_enough_or_all_are_wanted() -> None:
    both = (AGENT, TEXT)
    assert Signs(signs=both, any=True).enough([TEXT])
    assert not Signs(signs=both, any=True).enough([])
    assert not Signs(signs=both).enough([TEXT])
    assert Signs(signs=both).enough([TEXT, AGENT])
    fsck = Sign(kind=Kind.FSCK)
    assert Signs(signs=(AGENT, fsck)).enough([AGENT])
    assert Signs(signs=(AGENT, fsck)).living == (AGENT,)


def test_signs_are_chosen_by_what_the_machine_had() -> None:
    full = hardware.standard("web01", ["vda"], architecture="x86_64")
    found = proofs.usual(full, console=True)
    assert [sign.kind for sign in found.signs] == [Kind.AGENT, Kind.CONSOLE]
    assert found.any
    unknown = proofs.usual(full, console=True, known=False)
    assert (unknown.signs, unknown.any) == (found.signs, True)
    assert unknown.why is not None
    assert "nothing is known" in unknown.why
    without = replace(full, devices=())
    assert [sign.kind for sign in proofs.usual(without, console=True).signs] == [Kind.CONSOLE]
    last = proofs.usual(without, console=False)
    assert [sign.kind for sign in last.signs] == [Kind.STEADY, Kind.CONSOLE]
    assert last.why is not None
    assert "weak" in last.why


@pytest.mark.parametrize(
    "text", ["web01 login:", "Debian GNU/Linux 12 web01 ttyS0\n\nweb01 login: ", "Reached target Multi-User System."]
)
def test_a_linux_that_came_up_says_so(text: str) -> None:
    assert re.search(proofs.LOGIN, text, re.MULTILINE)
    assert not re.search(proofs.LOGIN, "[    1.2] systemd-logind: started\nlogin: failed for x", re.MULTILINE)


# -- texts -----------------------------------------------------------------------------------


def test_a_console_is_plain_text() -> None:
    text = "\x1b[2J\x1b[1;1H\x1b[32m[  OK  ]\x1b[0m Started\r\n\x1b]0;title\x07a\x08bc\x1bc\tx\x1b(B\x00\u202e\n"
    assert consoletext.plain(text) == "[  OK  ] Started\nbc\tx\n"
    for broken in ("\x1b", "\x1b[", "\x1b]0;no end", "\x1b[" + "9" * 10000):
        assert "\x1b" not in consoletext.plain(broken)


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def test_the_page_shows_what_a_guest_says_and_does_nothing_of_it() -> None:
    seen = (Seen(sign=replace(TEXT, text=HOSTILE), good=False, said=HOSTILE),)
    found = proof(
        machine=HOSTILE,
        problem=HOSTILE,
        proven=False,
        seen=seen,
        system={"system": HOSTILE},
        notes=(HOSTILE,),
        left_out=(HOSTILE,),
        no_picture=HOSTILE,
        signs=Signs(signs=(TEXT,), why=HOSTILE),
    )
    page = proofpage.page(found, HOSTILE, None)
    parser = _Tags()
    parser.feed(page)
    assert "script" not in parser.tags
    assert "&lt;script&gt;" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert "default-src 'none'" in page


def test_the_page_has_the_picture_inside_and_the_end_of_the_console() -> None:
    page = proofpage.page(proof(), "".join(f"line {number}\n" for number in range(1000)), b"\x89PNG\r\n\x1a\nxx")
    assert 'src="data:image/png;base64,iVBORw0KGgp4eA=="' in page
    assert "line 999" in page
    assert "line 5\n" not in page
    assert "came up in 12.3" in page or "came up in 12.35 s" in page


def test_the_document_is_json_with_texts_that_do_nothing() -> None:
    seen = (Seen(sign=AGENT, good=True, seconds=1.234, said=f"one\n{HOSTILE}" + "x" * 10000),)
    values = json.loads(json.dumps(proofs.document(proof(seen=seen, system={"system": HOSTILE}))))
    [sign] = values["signs"]
    assert sign["said"].startswith("one\n<script>")
    assert "\x1b" not in sign["said"] + values["system"][0]["value"]
    assert len(sign["said"]) < 2 * proofs.MAX_SAID
    assert (sign["seconds"], values["up_seconds"]) == (1.23, 12.35) or values["up_seconds"] == 12.34


# -- pictures --------------------------------------------------------------------------------


def test_a_picture_becomes_png() -> None:
    pixels = bytes(range(2 * 3 * 3))
    made = pictures.png(b"P6\n3 2\n255\n" + pixels)
    assert pictures.is_png(made)
    size = struct.unpack_from(">I", made, 8 + 8 + 13 + 4)[0]
    lines = zlib.decompress(made[8 + 8 + 13 + 4 + 8 : 8 + 8 + 13 + 4 + 8 + size])
    assert lines == b"\0" + pixels[:9] + b"\0" + pixels[9:]


@pytest.mark.parametrize(
    "data", [b"", b"P6\n3 2\n255\nxx", b"P6\n99999 2\n255\n", b"P5\n1 1\n255\nx", b"P6\n0 0\n255\n"]
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        pictures.png(data)
