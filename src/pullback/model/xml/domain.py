"""A machine's XML of libvirt for where it was restored to: new paths, and for a copy a new identity.

Source: libvirt's formatdomain.rst. What is changed is what is surely meant; everything else stays, also
what we do not know. The text comes from a manifest, which is hostile: it is read like any document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lxml import etree

from pullback.model.identity import Identity
from pullback.model.rebuilding import Moved, Places
from pullback.model.xml import source

#: What libvirt gives anew to a domain that is defined.
_ANEW = ("id",)


def rebuild(lines: Sequence[str], places: Places, identity: Identity | None) -> str:
    """The XML for `places`; for a copy with its `identity`. Raises `BadDocument`."""
    root = source.root("\n".join(lines), "domain")
    for name in _ANEW:
        root.attrib.pop(name, None)
    _disks(root, places.disks)
    _firmware(root, places)
    _generation(root, identity)
    if identity is not None:
        _identify(root, identity)
    return str(etree.tostring(root, encoding="unicode")) + "\n"


def _disks(root: etree._Element, disks: Sequence[Moved]) -> None:
    """`<disk type='file'><driver type='qcow2'/><source file='…'/><target dev='vda'/></disk>`"""
    moved = {disk.target: disk for disk in disks if disk.path is not None}
    for element in root.iterfind("devices/disk"):
        target = element.find("target")
        disk = moved.get(target.get("dev", "")) if target is not None else None
        if disk is None or disk.path is None:
            continue
        kind = "block" if disk.device else "file"
        element.set("type", kind)
        for old in _found(element, "source", "backingStore", "mirror"):
            element.remove(old)
        driver = element.find("driver")
        if driver is None:
            driver = etree.SubElement(element, "driver", name="qemu")
        driver.set("type", disk.format)
        etree.SubElement(element, "source", {"dev" if disk.device else "file": disk.path})


def _found(element: etree._Element, *tags: str) -> Iterator[etree._Element]:
    for tag in tags:
        yield from list(element.iterfind(tag))


def _firmware(root: etree._Element, places: Places) -> None:
    """`<os><loader type='pflash'>CODE</loader><nvram template='…'>VARS</nvram></os>`: pflash0 and pflash1."""
    for tag, name in (("os/loader", "pflash0"), ("os/nvram", "pflash1")):
        element, path = root.find(tag), places.firmware.get(name)
        if element is None or path is None or (tag == "os/loader" and element.get("type") != "pflash"):
            continue
        for child in list(element):
            element.remove(child)
        for attribute in ("format", "type") if tag == "os/nvram" else ("format",):
            element.attrib.pop(attribute, None)
        element.text = path


def _generation(root: etree._Element, identity: Identity | None) -> None:
    """`<genid/>` without a text is a new one each time that the domain is started anew."""
    element = root.find("genid")
    if element is not None:
        element.text = identity.generation if identity is not None else None


def _identify(root: etree._Element, identity: Identity) -> None:
    for tag, text in (("name", identity.name), ("uuid", identity.uuid)):
        element = root.find(tag)
        if element is None:
            element = etree.Element(tag)
            root.insert(0, element)
        element.text = text
    for entry in root.iterfind("sysinfo/system/entry[@name='uuid']"):
        entry.text = identity.uuid
    for card in root.iterfind("devices/interface"):
        address = card.find("mac")
        if address is None:
            address = etree.SubElement(card, "mac")
        address.set("address", identity.mac())
    # libvirt chooses those of its own again.
    for channel in _listening(root):
        channel.attrib.pop("path", None)


def _listening(root: etree._Element) -> Iterator[etree._Element]:
    """Sockets where the original listens."""
    for tag in ("channel", "serial", "console", "parallel"):
        for element in root.iterfind(f"devices/{tag}/source"):
            if element.get("mode") == "bind" and element.get("path"):
                yield element
