"""Rollbacks of a `kit.Box`: asked for in this process, or as a program."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

from kit import Box
from pullback.flows import rollback as flow
from pullback.model import urls
from pullback.progress import Progress


def request(box: Box, point: str = "latest", **changes: Any) -> flow.Request:
    """A rollback of this machine, without a safety point unless that is asked for."""
    values: dict[str, Any] = {
        "machine": urls.QmpMachine(socket=box.qmp),
        "repository": box.place,
        "access": box.access,
        "point": point,
        "safety": False,
        "directories": box.directories,
    }
    return flow.Request(**(values | changes))


def roll(box: Box, point: str = "latest", *, progress: Progress | None = None, **changes: Any) -> flow.Report:
    """Roll back in this process."""
    return asyncio.run(flow.rollback(request(box, point, **changes), progress))


def images(box: Box) -> urls.ImagesMachine:
    """The machine when it is off."""
    return urls.ImagesMachine(
        images=tuple(urls.Image(target=disk.id, path=disk.path, format=disk.format) for disk in box.disks)
    )


def off(box: Box) -> dict[str, Any]:
    """What a rollback of the machine needs when it is off."""
    return {"machine": images(box), "name": box.name}


def content(box: Box, disk: str) -> bytes:
    """What a disk holds. A running machine is stopped for the look, which flushes what its QEMU has not written."""
    found = next(one for one in box.disks if one.id == disk)
    to = box.directory / f"content-{disk}"
    alive = box.process is not None and box.process.returncode is None
    running = alive and box.command("query-status")["status"] == "running"
    if running:
        box.command("stop")
    words: list[str | Path] = ["qemu-img", "convert", "-U", "-f", found.format, "-O", "raw", found.path, to]
    subprocess.run(words, check=True, capture_output=True)
    if running:
        box.command("cont")
    return to.read_bytes()


def checked(box: Box) -> None:
    """The images are sound, by qemu-img."""
    for disk in box.disks:
        if disk.format == "qcow2":
            subprocess.run(["qemu-img", "check", "-q", "-U", disk.path], check=True, capture_output=True)
