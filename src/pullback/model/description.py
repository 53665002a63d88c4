"""What a machine was, beside its disks: values, and their JSON form in a restore point.

    {"kind": "qemu", "program": "/usr/bin/qemu-system-x86_64", "argv": ["qemu-system-x86_64", …],
     "version": "7.2.22", "machine_type": "pc-q35-7.2", "uuid": null, "images": [], "xml": []}

    {"name": "pflash1", "writable": true, "size": 540672, "sha256": "<hex>"}      the bytes stand elsewhere

It is for people, who build the machine again with it; no program of ours starts anything from it.
What is read is hostile until checked: whatever breaks a rule is a `ValueError` that says which.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from pullback.model.texts import MAX_TEXT, is_showable, is_target, showable
from pullback.units import MiB

#: Words of a command line; one with 256 disks has some 1500.
MAX_WORDS = 8192
#: Characters of all words together, so that a manifest stays small.
MAX_ARGV = 1 * MiB
#: Images of a machine that is off.
MAX_IMAGES = 256
#: Bytes of one firmware device. QEMU's own limit is far below (8 MiB on x86; 64 MiB each on Arm's virt).
MAX_FIRMWARE = 64 * MiB
#: Firmware devices of a machine; those that QEMU can make have one or two.
MAX_FIRMWARES = 16
#: What stands where something was too long.
CUT = "…"
#: What stands in place of a secret.
MASK = "***"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


class Kind(StrEnum):
    """What the machine was when the point was made."""

    #: A QEMU process.
    QEMU = "qemu"
    #: Images; it was off.
    IMAGES = "images"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageAt:
    """An image of a machine that was off."""

    target: str
    #: Its file or block device, as a text for people.
    path: str
    format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A machine as it was started. All texts are `showable`, and secrets in them are masked."""

    kind: Kind
    #: The file of QEMU's program; None if that could not be known.
    program: str | None = None
    #: Its command line; none if that could not be known.
    argv: tuple[str, ...] = ()
    #: QEMU's version, or that of the storage daemon that opened the images.
    version: str
    #: The machine type with its version, such as pc-q35-7.2.
    machine_type: str | None = None
    uuid: str | None = None
    images: tuple[ImageAt, ...] = ()
    #: Of a machine that libvirt manages, the lines of its XML; none in points before format 1.2.
    xml: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FirmwareHeader:
    """A firmware device without its bytes."""

    #: Its target: pflash0, pflash1.
    name: str
    #: The machine keeps variables in it (NVRAM); else it holds the firmware's code.
    writable: bool
    size: int
    #: Of its bytes, hex.
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Firmware:
    """A firmware device with its bytes, as the machine sees them."""

    name: str
    writable: bool
    data: bytes

    @property
    def header(self) -> FirmwareHeader:
        """What is written beside the bytes."""
        digest = hashlib.sha256(self.data).hexdigest()
        return FirmwareHeader(name=self.name, writable=self.writable, size=len(self.data), sha256=digest)


# -- a command line without secrets ----------------------------------------------------------

# The keys of options whose values are secrets. Not among them: `password-secret`, `key-secret` and other names that
# only say the id of a secret. `key` is that of rbd; `osk` is no secret.
_SECRET_KEYS = r"(?:[\w.-]*(?:password|passwd|passphrase)|pass|pw|token|cookie|api[-_]?key|key)"
_OPTION = re.compile(rf"((?:^|[,\s:?&;])(?:[\w.-]+\.)?{_SECRET_KEYS}=)((?:[^,\s]|,,)+)", re.IGNORECASE)
_DATA = re.compile(r"((?:^|,)data=)((?:[^,]|,,)+)")
_USER_INFO = re.compile(r"(\w://[^/\s:@,]*:)([^/\s@,]+)(?=@)")
_CREDENTIAL = re.compile(r"(io\.systemd\.credential[\w.]*[:/][^=,\s]*[=,](?:string=)?)(.+)")
_QUOTED = re.compile(rf'("(?:[\w.-]+\.)?{_SECRET_KEYS}"\s*:\s*")((?:[^"\\]|\\.)+)', re.IGNORECASE)
_SWITCHES = {"on", "off", "yes", "no", "true", "false"}
_JSON_KEYS = re.compile(rf"(?:[\w.-]+\.)?{_SECRET_KEYS}", re.IGNORECASE)


def masked(word: str) -> str:
    """A word of a command line with its secrets replaced: passwords, data of `secret` objects, credentials.

    Texts are searched for what QEMU's options call their secrets. A secret in a word of its own, behind an
    option that we do not know, cannot be seen.
    """
    if word.lstrip().startswith(("{", "json:{")):
        start = word.index("{")
        try:
            return word[:start] + json.dumps(_masked_json(json.loads(word[start:])), ensure_ascii=False)
        except (ValueError, RecursionError):
            pass  # no JSON after all
    word = _USER_INFO.sub(_hide, word)
    word = _QUOTED.sub(_hide, word)  # JSON inside of an option
    word = _CREDENTIAL.sub(_hide, word)
    if "secret" in word:
        word = _DATA.sub(_hide, word)
    return _OPTION.sub(_hide, word)


def _hide(match: re.Match[str]) -> str:
    return match[0] if match[2].lower() in _SWITCHES else match[1] + MASK


def _masked_json(value: object) -> object:
    if isinstance(value, dict):
        secret = "secret" in str(value.get("qom-type", ""))
        return {key: _masked_member(key, inner, secret=secret) for key, inner in value.items()}
    if isinstance(value, list):
        return [_masked_json(item) for item in value]
    return masked(value) if isinstance(value, str) else value


def _masked_member(key: str, value: object, *, secret: bool) -> object:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        hidden = (secret and key == "data") or (_JSON_KEYS.fullmatch(key) and str(value) not in _SWITCHES)
        return MASK if hidden else _masked_json(value)
    return _masked_json(value)


def command_line(words: list[str]) -> tuple[str, ...]:
    """The words of a process as they are kept: masked, showable, and not too many."""
    kept: list[str] = []
    total = 0
    for word in words:
        text = _shown_word(masked(word))
        total += len(text)
        if len(kept) >= MAX_WORDS - 1 or total > MAX_ARGV - len(CUT):
            return (*kept, CUT)
        kept.append(text)
    return tuple(kept)


def _shown_word(word: str) -> str:
    """`showable`, with a mark at the end of what was too long."""
    text = showable(word)
    return text[: MAX_TEXT - len(CUT)] + CUT if len(word) > MAX_TEXT else text


# -- writing ---------------------------------------------------------------------------------


def document(description: Description) -> dict[str, object]:
    """The description as plain JSON values."""
    return {
        "kind": str(description.kind),
        "program": _shown(description.program),
        "argv": [showable(word) for word in description.argv],
        "version": showable(description.version),
        "machine_type": _shown(description.machine_type),
        "uuid": _shown(description.uuid),
        "images": [
            {"target": image.target, "path": showable(image.path), "format": showable(image.format)}
            for image in description.images
        ],
        "xml": [showable(line) for line in description.xml],
    }


def _shown(text: str | None) -> str | None:
    return None if text is None else showable(text)


def firmware_document(firmware: Firmware | FirmwareHeader) -> dict[str, object]:
    """A firmware device as plain JSON values, without its bytes."""
    header = firmware.header if isinstance(firmware, Firmware) else firmware
    return {"name": header.name, "writable": header.writable, "size": header.size, "sha256": header.sha256}


# -- reading ---------------------------------------------------------------------------------


def parse(value: object, *, lenient: bool = False, with_xml: bool = True) -> Description:
    """The description that `document` wrote. `lenient`: keys that we do not know are ignored.

    `with_xml`: it was written in format 1.2 or later.
    """
    fields = Fields(value, "the machine's description", lenient=lenient)
    argv = _texts(fields, "argv", "a word of the command line")
    found = Description(
        kind=_kind(fields.text("kind")),
        program=fields.optional("program", fields.text),
        argv=argv,
        version=fields.text("version"),
        machine_type=fields.optional("machine_type", fields.text),
        uuid=fields.optional("uuid", fields.text),
        images=tuple(_image(item, lenient) for item in fields.items("images", MAX_IMAGES)),
        xml=_texts(fields, "xml", "a line of the XML") if with_xml else (),
    )
    fields.end()
    return found


def _texts(fields: Fields, key: str, what: str) -> tuple[str, ...]:
    found = tuple(_plain(text, what) for text in fields.items(key, MAX_WORDS))
    if sum(map(len, found)) > MAX_ARGV:
        raise ValueError(f"{key!r} has more than {MAX_ARGV} characters")
    return found


def _kind(text: str) -> Kind:
    if text not in {str(kind) for kind in Kind}:
        raise ValueError("the kind of machine is none of the known words")
    return Kind(text)


def _image(value: object, lenient: bool) -> ImageAt:
    fields = Fields(value, "an image", lenient=lenient)
    found = ImageAt(target=fields.target("target"), path=fields.text("path"), format=fields.text("format"))
    fields.end()
    return found


def parse_header(value: object, *, lenient: bool = False) -> FirmwareHeader:
    """What `firmware_document` wrote."""
    fields = Fields(value, "a firmware device", lenient=lenient)
    found = FirmwareHeader(
        name=fields.target("name"),
        writable=fields.flag("writable"),
        size=fields.size("size"),
        sha256=fields.text("sha256"),
    )
    fields.end()
    if not _SHA256.fullmatch(found.sha256):
        raise ValueError("the hash of a firmware device has a form that is not allowed")
    return found


def with_data(header: FirmwareHeader, data: bytes) -> Firmware:
    """The device with its bytes, which are checked."""
    found = Firmware(name=header.name, writable=header.writable, data=data)
    if found.header != header:
        raise ValueError(f"the content of {header.name} is not what was stored")
    return found


def _plain(value: object, what: str) -> str:
    if not isinstance(value, str) or not is_showable(value):
        raise ValueError(f"{what} is no plain text")
    return value


class Fields:
    """The keys of one object, each taken once; `end` refuses what is left over."""

    def __init__(self, value: object, where: str, *, lenient: bool) -> None:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is no object")
        self._values = value
        self._left = set(value)
        self._where = where
        self._lenient = lenient

    def end(self) -> None:
        """All were taken. Raises `ValueError` if some were not, unless `lenient`."""
        if self._left and not self._lenient:
            raise ValueError(f"unknown key {min(map(str, self._left))!r} in {self._where}")

    def _take(self, key: str) -> object:
        if key not in self._values:
            raise ValueError(f"{key!r} is missing in {self._where}")
        self._left.discard(key)
        return self._values[key]

    def text(self, key: str) -> str:
        """A text."""
        return _plain(self._take(key), f"{key!r} in {self._where}")

    def target(self, key: str) -> str:
        """A text that can be a disk's name."""
        value = self.text(key)
        if not is_target(value):
            raise ValueError(f"{key!r} in {self._where} is no disk's name")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self._take(key)
        if not isinstance(value, bool):
            raise ValueError(f"{key!r} in {self._where} is neither true nor false")
        return value

    def size(self, key: str, high: int = MAX_FIRMWARE) -> int:
        """A whole number from 1 to `high`."""
        value = self._take(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= high:
            raise ValueError(f"{key!r} in {self._where} is no size that is allowed")
        return value

    def items(self, key: str, high: int) -> list[object]:
        """A list of at most `high` things."""
        value = self._take(key)
        if not isinstance(value, list) or len(value) > high:
            raise ValueError(f"{key!r} in {self._where} is no list of at most {high} things")
        return value

    def optional(self, key: str, read: Callable[[str], _T]) -> _T | None:
        """What `read` gives; None for null."""
        return None if self._take(key) is None else read(key)
