"""Hostile XML: nothing is fetched or expanded, everything is bounded, only `BadDocument` comes out."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pullback import errors
from pullback.model.documents.backup import BackupDocument
from pullback.model.documents.checkpoint import CheckpointDocument
from pullback.model.xml import backup, checkpoint, source

_BOMB = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
_DEEP = "<a>" * 200 + "</a>" * 200
_INCREMENT = "<domainbackup><incremental>{}</incremental></domainbackup>"


def refusal(text: bytes | str) -> str:
    """Why a backup document is refused."""
    with pytest.raises(errors.BadDocument) as caught:
        backup.parse(text)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f'<!DOCTYPE d [<!ENTITY l0 "ha">{_BOMB}]>' + _INCREMENT.format("&l9;"),
        f'<!DOCTYPE d [<!ENTITY l0 "ha">{_BOMB}]><domainbackup mode="&l9;"/>',
        '<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + _INCREMENT.format("&x;"),
        '<!DOCTYPE domainbackup SYSTEM "http://127.0.0.1:1/x.dtd"><domainbackup/>',
        '<!DOCTYPE d [<!ENTITY % p SYSTEM "http://127.0.0.1:1/x"> %p;]><domainbackup/>',
        '<!DOCTYPE d [<!ATTLIST domainbackup mode CDATA "pull">]><domainbackup/>',
        "<?xml version='1.0'?><!-- a --><?b c?>\n<!DOCTYPE d><domainbackup/>",
        "<!-- <x> --><!doctype d><domainbackup/>",
        '\ufeff<!DOCTYPE d [<!ENTITY x "y">]><domainbackup/>',
    ],
)
def test_a_document_type_is_refused_in_every_encoding(text: str) -> None:
    for hostile in (text, text.encode(), text.encode("utf-16"), text.encode("utf-16-le"), text.encode("utf-8-sig")):
        assert "DOCTYPE" in refusal(hostile) or "well-formed" in refusal(hostile)


def test_the_word_doctype_in_a_comment_or_text_is_harmless() -> None:
    inner = "<description><![CDATA[<!DOCTYPE]]></description>"
    text = f"<!-- <!DOCTYPE d> --><?x <!DOCTYPE?><domaincheckpoint>{inner}</domaincheckpoint>"
    assert checkpoint.parse(text).description == "<!DOCTYPE"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "well-formed"),
        (b"", "well-formed"),
        (b"\x00", "well-formed"),
        ("<domainbackup>", "well-formed"),
        ("<domainbackup/><domainbackup/>", "well-formed"),
        ("<domainbackup mode='push' mode='pull'/>", "well-formed"),
        (_INCREMENT.format("&x;"), "well-formed"),
        (_INCREMENT.format("&#0;"), "well-formed"),
        (_INCREMENT.format("&#8;"), "well-formed"),
        (_INCREMENT.format("\x00"), "well-formed"),
        (_INCREMENT.format("\ud800"), "well-formed"),
        (b"<domainbackup>\xff</domainbackup>", "encoding"),
        (b"\xff\xfe<\x00d", "encoding"),
        ("<domainbackup " + " ".join(f"a{n}=''" for n in range(257)) + "/>", "more than 256 attributes"),
        (b"<?xml version='1.0' encoding='utf-7'?><domainbackup/>", "not read"),
        (b"<?xml version='1.0' encoding='rot13'?><domainbackup/>", "not read"),
        (b"<?xml version='1.0' encoding='no-such'?><domainbackup/>", "not read"),
        (f"<domainbackup>{_DEEP}</domainbackup>", "elements within each other"),
        ("<a>" * 100_000 + "</a>" * 100_000, "well-formed"),
        ("<domainbackup>" + " " * source.MAX_SIZE, "longer than"),
        (b"x" * (source.MAX_SIZE + 1), "longer than"),
        ("<x:domainbackup xmlns:x='http://example.org/'/>", "begins with"),
        (f"<{'d' * 40_000}/>", "begins with"),
        (f"<{'d' * 100_000}/>", "a tag of more than 65536 characters"),
        ("<domainbackup><!-- a -- b --></domainbackup>", "there is no -->"),
    ],
)
def test_what_is_malformed_or_too_big_is_refused_shortly(text: bytes | str, words: str) -> None:
    message = refusal(text)
    assert words in message
    assert len(message) < 500
    assert message.isprintable()


def test_a_message_never_carries_what_upsets_a_terminal() -> None:
    assert refusal("<domainbackup><disks><disk name='\x9b1m\u202e'/></disks></domainbackup>").isprintable()
    assert refusal(_INCREMENT.format("\u202e\x85")).isprintable()


def test_many_elements_and_attributes_cost_little_time() -> None:
    disks = "".join(f"<disk name='vd{n}' backup='no'/>" for n in range(50_000))
    begun = time.process_time()
    backup.parse(f"<domainbackup><disks>{disks}</disks></domainbackup>")
    refusal("<domainbackup " + " ".join(f"a{n}=''" for n in range(50_000)) + "/>")
    refusal("<?a?>" * 300_000 + "<!DOCTYPE d><domainbackup/>")
    refusal("<!--" * 300_000)
    refusal("<a x='" * 300_000)
    refusal("<domainbackup>" + "<a xml:id='1'/>" * 200_000 + "</domainbackup>")
    assert time.process_time() - begun < 30


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_utf_8_and_utf_16_are_read(encoding: str) -> None:
    text = "<domaincheckpoint><description>Größe \U0001f600</description></domaincheckpoint>"
    assert checkpoint.parse(text.encode(encoding)) == CheckpointDocument(description="Größe \U0001f600")


@pytest.mark.parametrize(("name", "encoding"), [("UTF-8", "utf-8"), ("ISO-8859-1", "latin-1"), ("UTF-16", "utf-16")])
def test_a_declared_encoding_is_read(name: str, encoding: str) -> None:
    text = f"<?xml version='1.0' encoding='{name}'?><domaincheckpoint><description>ä</description></domaincheckpoint>"
    assert checkpoint.parse(text.encode(encoding)) == CheckpointDocument(description="ä")
    assert checkpoint.parse(text) == CheckpointDocument(description="ä")


def test_comments_and_instructions_are_passed_over_everywhere() -> None:
    text = (
        "<?a b?><!-- c --><domainbackup><!-- d --><incremental>mon<!-- e -->d<?f?>ay</incremental>"
        "<?g?><disks><!-- h --><disk name='vda' backup='no'><!-- i --></disk></disks></domainbackup><!-- j -->"
    )
    found = backup.parse(text)
    assert found.incremental == "monday"
    assert [disk.name for disk in found.disks] == ["vda"]


def test_an_empty_increment_is_no_increment_as_libvirt_reads_it() -> None:
    assert backup.parse("<domainbackup><incremental/></domainbackup>") == BackupDocument()


def test_nothing_is_read_from_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("<incremental>monday</incremental>")
    include = f"<x:include xmlns:x='http://www.w3.org/2001/XInclude' href='{secret}'/>"
    assert "unknown" in refusal(f"<domainbackup>{include}</domainbackup>")
