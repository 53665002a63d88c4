"""The description of a machine as a value: secrets stay out of it, and what is read back is checked."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.model import description
from pullback.model.description import Description, Firmware, ImageAt, Kind
from pullback.model.texts import MAX_TEXT, is_showable
from pullback.units import MiB

QEMU = Description(
    kind=Kind.QEMU,
    program="/usr/bin/qemu-system-x86_64",
    argv=("qemu-system-x86_64", "-name", "web01"),
    version="7.2.22",
    machine_type="pc-q35-7.2",
    uuid="6c1e7b0e-8b5c-4f2f-9d1f-0d6b7f9a3c11",
)
OFF = Description(
    kind=Kind.IMAGES, version="7.2.22", images=(ImageAt(target="vda", path="/srv/a.qcow2", format="qcow2"),)
)
FLASH = Firmware(name="pflash1", writable=True, data=bytes(range(256)) * 16)

# -- secrets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("secret,id=s,data=hunter2", "secret,id=s,data=***"),
        ("secret,data=hunter2,,x,id=s", "secret,data=***,id=s"),
        ("secret,id=s,format=raw,data=hunter2=,iv=x", "secret,id=s,format=raw,data=***,iv=x"),
        ("port=5930,password=hunter2,tls-port=1", "port=5930,password=***,tls-port=1"),
        ("if=virtio,file.driver=https,file.password=hunter2", "if=virtio,file.driver=https,file.password=***"),
        ("file.cookie=a=hunter2", "file.cookie=***"),
        ("iscsi://me:hunter2@host/iqn.x/0", "iscsi://me:***@host/iqn.x/0"),
        ("file=ssh://me:hunter2@host/a,if=virtio", "file=ssh://me:***@host/a,if=virtio"),
        ("file=rbd:pool/a:id=me:key=hunter2==", "file=rbd:pool/a:id=me:key=***"),
        ("type=11,value=io.systemd.credential:a.b=hunter2, too", "type=11,value=io.systemd.credential:a.b=***"),
        ('file=json:{"proxy-password": "hunt\\"er2",, "a": 1}', 'file=json:{"proxy-password": "***",, "a": 1}'),
        ("name=opt/io.systemd.credentials/x,string=hunter2", "name=opt/io.systemd.credentials/x,string=***"),
        ("root=/dev/vda PASSWORD=hunter2 quiet", "root=/dev/vda PASSWORD=*** quiet"),
        ('{"qom-type": "secret", "id": "s", "data": "hunter2"}', '{"qom-type": "secret", "id": "s", "data": "***"}'),
        ('{"a": [{"proxy-password": "hunter2"}]}', '{"a": [{"proxy-password": "***"}]}'),
        ('file=json:{"driver": "http", "url": "http://a:hunter2@h/"}', 'file=json:{"driver": "http", "url": "http://a:***@h/"}'),
    ],
)  # fmt: skip
def test_a_secret_in_a_word_is_masked_and_nothing_else(word: str, kept: str) -> None:
    assert description.masked(word) == kept


@pytest.mark.parametrize(
    "word",
    [
        "port=5900,password=on",
        "file.password-secret=sec0",
        "luks,key-secret=sec0",
        "socket,id=keyboard,path=/run/a.sock",
        "virtio-blk-pci,id=vda,drive=data",
        "driver=qcow2,data-file=/srv/data.raw",
        "nbd://host:10809/export",
        "user=me@host:22",
        '{"driver": "qcow2", "data-file": "a"}',
        "{no json",
        "usb-kbd,id=keys",
        "",
    ],
)
def test_what_is_no_secret_is_kept(word: str) -> None:
    assert description.masked(word) == word


@given(st.lists(st.text()))
def test_any_command_line_can_be_kept(words: list[str]) -> None:
    kept = description.command_line(words)
    assert len(kept) == len(words)
    assert all(map(is_showable, kept))


def test_a_command_line_that_is_too_long_is_cut_and_says_so() -> None:
    assert description.command_line(["x" * (MAX_TEXT + 1)]) == ("x" * (MAX_TEXT - 1) + "…",)
    many = description.command_line(["x"] * 100_000)
    assert len(many) == description.MAX_WORDS
    assert many[-1] == "…"
    big = description.command_line(["x" * MAX_TEXT] * 1000)
    assert big[-1] == "…"
    assert sum(map(len, big)) <= description.MAX_ARGV


# -- reading back ----------------------------------------------------------------------------


def through_json(value: object) -> Any:
    """As another program would read it."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("value", [QEMU, OFF])
def test_a_description_is_read_back_as_it_was(value: Description) -> None:
    assert description.parse(through_json(description.document(value))) == value


def test_a_firmware_device_is_read_back_with_its_bytes() -> None:
    header = description.parse_header(through_json(description.firmware_document(FLASH)))
    assert header == FLASH.header
    assert description.with_data(header, FLASH.data) == FLASH


def test_other_bytes_than_those_that_were_stored_are_refused() -> None:
    flipped = bytes([FLASH.data[0] ^ 1]) + FLASH.data[1:]
    for data in (flipped, FLASH.data[:-1], b""):
        with pytest.raises(ValueError, match="the content of pflash1 is not what was stored"):
            description.with_data(FLASH.header, data)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("kind", "vmware", "none of the known words"),
        ("kind", None, "no plain text"),
        ("argv", "qemu", "no list"),
        ("argv", ["\x1b[2J"], "no plain text"),
        ("argv", [1], "no plain text"),
        ("argv", ["x"] * 8193, "no list of at most"),
        ("argv", ["x" * 4096] * 257, "more than"),
        ("version", "x" * 4097, "no plain text"),
        ("uuid", 3, "no plain text"),
        ("images", [{"target": "../x", "path": "", "format": "raw"}], "no disk's name"),
        ("images", [{"target": "vda", "path": "/a"}], "'format' is missing"),
        ("images", [None], "no object"),
        ("more", 1, "unknown key 'more'"),
    ],
)
def test_a_description_that_breaks_a_rule_is_refused(key: str, value: object, complaint: str) -> None:
    changed = description.document(QEMU) | {key: value}
    with pytest.raises(ValueError, match=complaint):
        description.parse(changed)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("name", "a/b", "no disk's name"),
        ("writable", 1, "neither true nor false"),
        ("size", 0, "no size"),
        ("size", 64 * MiB + 1, "no size"),
        ("size", True, "no size"),
        ("sha256", "00", "form"),
    ],
)
def test_a_firmware_device_that_breaks_a_rule_is_refused(key: str, value: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        description.parse_header(description.firmware_document(FLASH) | {key: value})


@pytest.mark.parametrize("key", list(description.document(QEMU)))
def test_a_description_without_a_key_is_refused(key: str) -> None:
    changed = copy.copy(description.document(QEMU))
    del changed[key]
    with pytest.raises(ValueError, match="is missing"):
        description.parse(changed)


def test_what_a_later_version_adds_is_ignored_when_that_is_wanted() -> None:
    assert description.parse(description.document(QEMU) | {"more": 1}, lenient=True) == QEMU


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from([*description.document(QEMU), *description.firmware_document(FLASH)]), _JSON)
def test_whatever_stands_there_is_a_value_or_a_value_error(key: str, value: object) -> None:
    for read, good in (
        (description.parse, description.document(QEMU)),
        (description.parse_header, description.firmware_document(FLASH)),
    ):
        assert _refused_or_read(read, good | {key: value})
        assert _refused_or_read(read, value)


def _refused_or_read(read: Any, value: object) -> bool:
    try:
        return read(value) is not None
    except ValueError as error:
        return bool(str(error))
