"""What a restore into a directory writes beside the disks, so that the machine can be made again.

    DIR/firmware/pflash1.fd    flash memory, as the machine sees it
    DIR/tpm/tpm2-00.permall    the TPM's state, for a swtpm
    DIR/machine.xml            libvirt's XML, where the restore point has some
    DIR/command-line.txt       how QEMU was started, with the new paths
    DIR/machine.json           all of it for programs

All bytes are proven before the first disk is written, and the files are written after the last: a directory
with a machine.json is whole. They are for people; nothing here is run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pullback import errors, repo, state
from pullback.flows import destinations
from pullback.model import points, rebuilding
from pullback.model import tpm as tpms
from pullback.model.description import Firmware
from pullback.model.identity import Identity
from pullback.model.points import Point
from pullback.model.rebuilding import Moved, Places, Rebuilt
from pullback.model.texts import showable
from pullback.model.tpm import Backend, TpmState
from pullback.model.xml import domain

#: The format of machine.json.
FORMAT = 1
_FIRMWARE, _TPM = "firmware", "tpm"
_JSON, _TEXT, _XML = "machine.json", "command-line.txt", "machine.xml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a restore point has besides disks, proven."""

    firmware: tuple[Firmware, ...]
    tpm: TpmState | None


def load(repository: repo.Repository, point: Point) -> Kept:
    """Read and prove it. Raises `VerificationFailed`."""
    return Kept(firmware=repository.firmware(point), tpm=repository.tpm(point))


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Where a disk went."""

    target: str
    #: A path or an address, for people.
    place: str
    #: A file or block device; None: something else.
    path: Path | None
    format: str
    device: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be written into a directory."""

    #: Absolute.
    directory: Path
    point: Point
    kept: Kept
    #: That of a copy; None: it is the machine itself.
    identity: Identity | None
    #: Replace files that are there.
    force: bool

    def paths(self) -> tuple[Path, ...]:
        """All files that will be there."""
        return tuple(self.directory / name for name in self._names())

    def _names(self) -> Iterator[str]:
        yield from (f"{_FIRMWARE}/{_flash(one.name)}" for one in self.kept.firmware)
        if self.kept.tpm is not None:
            yield from (f"{_TPM}/{file.name}" for file in self.kept.tpm.files)
        if self.point.description is not None and self.point.description.xml:
            yield _XML
        if self.point.description is not None and self.point.description.argv:
            yield _TEXT
        yield _JSON

    def check(self) -> None:
        """Before anything is written. Raises `DestinationExists`, `CannotWrite`."""
        for path in self.paths():
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise errors.CannotWrite(path=str(path), reason="what is in its place is no file")
            if path.exists() and not self.force:
                raise errors.DestinationExists(path=str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written."""

    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    #: Network addresses of a copy: the old one (None: QEMU's own) and the new one.
    macs: tuple[tuple[str | None, str], ...] = ()


def write(plan: Plan, disks: Sequence[Disk]) -> Written:
    """Write all files, durably; machine.json is the last. Raises `CannotWrite`, `DestinationFull`."""
    places = _places(plan, disks)
    description = plan.point.description
    argv = description.argv if description is not None else ()
    rebuilt = rebuilding.rebuild(argv, places, plan.identity)
    notes = list(rebuilt.notes) if argv else []
    contents = dict(_binary(plan.kept))
    if description is not None and description.xml:
        contents[_XML] = _xml(description.xml, places, plan, notes).encode()
    if argv:
        contents[_TEXT] = _text(plan, rebuilt).encode()
    contents[_JSON] = _document(plan, disks, rebuilt)
    for name, data in contents.items():
        _put(plan, name, data)
    files = tuple(plan.directory / name for name in contents)
    return Written(files=files, notes=tuple(notes), macs=rebuilt.macs)


def _places(plan: Plan, disks: Sequence[Disk]) -> Places:
    sources = {disk.target: disk.source for disk in plan.point.disks}
    moved = [
        Moved(
            target=disk.target,
            source=sources.get(disk.target),
            path=str(disk.path) if disk.path is not None else None,
            format=disk.format,
            device=disk.device,
        )
        for disk in disks
    ]
    firmware = {one.name: str(plan.directory / _FIRMWARE / _flash(one.name)) for one in plan.kept.firmware}
    tpm = str(plan.directory / _TPM / "swtpm.sock") if plan.kept.tpm is not None else None
    return Places(disks=moved, firmware=firmware, tpm=tpm, directory=str(plan.directory))


def _flash(name: str) -> str:
    return f"{name}.fd"


def _binary(kept: Kept) -> Iterator[tuple[str, bytes]]:
    for firmware in kept.firmware:
        yield f"{_FIRMWARE}/{_flash(firmware.name)}", firmware.data
    if kept.tpm is not None:
        for file in kept.tpm.files:
            yield f"{_TPM}/{file.name}", file.data


def _xml(lines: Sequence[str], places: Places, plan: Plan, notes: list[str]) -> str:
    try:
        return domain.rebuild(lines, places, plan.identity)
    except (errors.BadDocument, ValueError) as error:
        notes.append(f"{_XML} is as it was stored, because it cannot be understood ({str(error).rstrip('.')}).")
        return "\n".join(lines) + "\n"


# -- texts -----------------------------------------------------------------------------------


def _text(plan: Plan, rebuilt: Rebuilt) -> str:
    point, identity = plan.point, plan.identity
    assert point.description is not None
    who = f"{identity.name} (a copy of {point.machine})" if identity is not None else point.machine
    lines = [
        f"How {who} is started: from restore point {point.id}, with the paths in this directory.",
        "It was stored with the backup. Read it before you use it; Pullback starts nothing from it.",
        *rebuilt.notes,
        *_advice(plan),
    ]
    start = "".join(f"# {showable(line)}\n" for line in lines)
    return start + "\n" + _swtpm(plan) + rebuilding.text(point.description.program, rebuilt.words)


def _advice(plan: Plan) -> Iterator[str]:
    state = plan.kept.tpm
    if state is not None:
        yield "The TPM's emulator has to run first."
        if state.encrypted:
            yield "Its state is encrypted: give swtpm the key that it had (--key)."
    if plan.identity is not None:
        yield "Disks keep their serial numbers, because guests find their file systems by them."


def _swtpm(plan: Plan) -> str:
    """The command for the TPM's emulator. The directory is the user's own, so it is only quoted."""
    state = plan.kept.tpm
    if state is None:
        return ""
    place = plan.directory / _TPM
    words = ["swtpm", "socket", "--daemon", "--terminate"]
    if state.version is tpms.Version.TPM_2_0:
        words.append("--tpm2")
    where = f"backend-uri=file://{place / tpms.SINGLE}" if state.backend is Backend.FILE else f"dir={place}"
    words += ["--tpmstate", where, "--ctrl", f"type=unixio,path={place / 'swtpm.sock'}"]
    return rebuilding.shell(words) + "\n\n"


def _document(plan: Plan, disks: Sequence[Disk], rebuilt: Rebuilt) -> bytes:
    """machine.json. Paths in it are relative to its directory where they are in it."""
    point, identity, kept = plan.point, plan.identity, plan.kept
    description = point.description
    values: dict[str, object] = {
        "format": FORMAT,
        "name": identity.name if identity is not None else point.machine,
        "uuid": identity.uuid if identity is not None else description and description.uuid,
        "copy_of": point.machine if identity is not None else None,
        "point": {key: points.document(point)[key] for key in ("id", "machine", "created", "host", "pullback")},
        "program": description and description.program,
        "qemu": point.qemu,
        "machine_type": description and description.machine_type,
        "command": list(rebuilt.words),
        "disks": [_disk(plan, disk) for disk in disks],
        "firmware": [
            {"name": one.name, "writable": one.writable, "path": f"{_FIRMWARE}/{_flash(one.name)}"}
            for one in kept.firmware
        ],
        "tpm": None if kept.tpm is None else _tpm(kept.tpm),
        "macs": [{"old": old, "new": new} for old, new in rebuilt.macs],
        "notes": list(rebuilt.notes),
    }
    return json.dumps(values, ensure_ascii=False, indent=1).encode() + b"\n"


def _disk(plan: Plan, disk: Disk) -> Mapping[str, object]:
    stored = plan.point.disk(disk.target)
    inside = disk.path is not None and disk.path.parent == plan.directory
    return {
        "target": disk.target,
        "place": disk.path.name if inside and disk.path is not None else disk.place,
        "format": disk.format,
        "size": stored.size,
        "serial": stored.serial,
        "digest": stored.digest,
    }


def _tpm(state: TpmState) -> Mapping[str, object]:
    return {
        "version": str(state.version),
        "backend": str(state.backend),
        "encrypted": state.encrypted,
        "paths": [f"{_TPM}/{file.name}" for file in state.files],
    }


# -- files -----------------------------------------------------------------------------------


def _put(plan: Plan, name: str, data: bytes) -> None:
    """A file of mode 0600, which has its name when it is durable."""
    path = plan.directory / name
    with destinations.writing(str(path)):
        if path.parent != plan.directory:
            path.parent.mkdir(mode=0o700, exist_ok=True)
        beside = path.with_name(f".{path.name}.partial")
        beside.unlink(missing_ok=True)
        try:
            _write_new(beside, data)
            destinations.appear(beside, path, name=str(path), force=plan.force)
            state.sync_directory(path.parent)
        finally:
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()


def _write_new(path: Path, data: bytes) -> None:
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
