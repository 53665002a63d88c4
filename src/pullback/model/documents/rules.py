"""What texts in a document may look like. Each rule gives what is wrong with a text, or None.

No text may hold what XML cannot carry (control characters but tab and line end, lone surrogates) or
what upsets a terminal; names and paths also no tab and no line end, so that a name shown is the
name used. Lengths are those that Linux, QEMU or NBD give, because libvirt accepts longer texts only
to fail later.
"""

from __future__ import annotations

import ipaddress
import re

from pullback.model.texts import is_showable
from pullback.units import KiB

#: Bytes of a path (PATH_MAX of Linux, without its final NUL).
MAX_PATH = 4095
#: Bytes of a unix socket's path (`sun_path` of Linux, without its final NUL).
MAX_SOCKET = 107
#: Bytes of an export's name (NBD protocol, "strings").
MAX_EXPORT = 4096
#: Bytes of a bitmap's name (QEMU, BDRV_BITMAP_MAX_NAME_SIZE).
MAX_BITMAP = 1023
#: Characters of a checkpoint's name: it is kept in a file `NAME.xml`, and Linux allows 255 bytes.
MAX_NAME = 251
#: Characters of a description.
MAX_DESCRIPTION = 64 * KiB

# libvirt's own pattern (domaincheckpoint.rng, "checkpointName"): a leading dash is allowed.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
# Wider than libvirt's "diskTargetDev" (fd, hd, sd, vd, xvd, ubd): our machines have nvme0n1 and others.
_TARGET = re.compile(r"(?:ioemu:)?[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9.-]{1,255}")
_UUID = re.compile(r"[A-Fa-f0-9]{32}|[A-Fa-f0-9]{8}-(?:[A-Fa-f0-9]{4}-){3}[A-Fa-f0-9]{12}")
# XML 1.0, production 2 "Char", without DEL and the C1 controls.
_NO_XML = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_UNCLEAN = re.compile("[\ufffe\uffff]")


def checkpoint_name(text: str) -> str | None:
    """A checkpoint's name: letters, digits, `_`, `-`, `.`, no dot first."""
    if len(text) > MAX_NAME:
        return f"has more than {MAX_NAME} characters"
    return None if _NAME.fullmatch(text) else "is no checkpoint's name (letters, digits, '_', '-', '.', no dot first)"


def target(text: str) -> str | None:
    """A disk by its target: vda."""
    return None if _TARGET.fullmatch(text) else "is no disk's target, such as vda"


def target_or_path(text: str) -> str | None:
    """A disk by its target or by its source's absolute path."""
    return path(text) if text.startswith("/") else target(text)


def path(text: str) -> str | None:
    """An absolute path."""
    if not text.startswith("/") or text == "/":
        return "is no absolute path of a file"
    return line(text, MAX_PATH)


def socket(text: str) -> str | None:
    """The path of a unix socket."""
    return path(text) or line(text, MAX_SOCKET)


def nbd_uri(text: str) -> str | None:
    """An NBD URI: nbd://host/export, nbd+unix:///export?socket=/path."""
    if not text.startswith(("nbd://", "nbd+unix://", "nbds://", "nbds+unix://")):
        return "is no NBD URI (nbd://host/export, nbd+unix:///export?socket=/path)"
    return line(text, MAX_PATH)


def export_name(text: str) -> str | None:
    """The name of an NBD export; may be empty."""
    return line(text, MAX_EXPORT) if text else None


def bitmap_name(text: str) -> str | None:
    """The name of a bitmap."""
    return line(text, MAX_BITMAP)


def host(text: str) -> str | None:
    """A host's name, or its IPv4 or IPv6 address without brackets."""
    return None if _HOST.fullmatch(text) or _is_ipv6(text) else "is neither a host's name nor an address"


def _is_ipv6(text: str) -> bool:
    # A scope (`%eth0`) is not in libvirt's schema.
    try:
        return "%" not in text and bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


def uuid(text: str) -> str | None:
    """A UUID, with or without dashes."""
    return None if _UUID.fullmatch(text) else "is no UUID"


def short(text: str) -> str | None:
    """A text in one line that is not empty, of 255 bytes at most."""
    return line(text, 255)


def long(text: str) -> str | None:
    """A text in one line that is not empty, of 4095 bytes at most."""
    return line(text, MAX_PATH)


def words(text: str) -> str | None:
    """A text in one line of 4095 bytes at most; may be empty."""
    return line(text, MAX_PATH) if text else None


def description(text: str) -> str | None:
    """Text in lines."""
    if len(text) > MAX_DESCRIPTION:
        return f"has more than {MAX_DESCRIPTION} characters"
    return "has a character that is not allowed" if _NO_XML.search(text) else None


def line(text: str, limit: int) -> str | None:
    """One line that is not empty, of `limit` bytes in UTF-8 at most."""
    if not text:
        return "is empty"
    if len(text) > limit or not is_showable(text) or _UNCLEAN.search(text):
        return f"is longer than {limit} bytes, or has a character that is not allowed"
    return f"is longer than {limit} bytes" if len(text.encode()) > limit else None
