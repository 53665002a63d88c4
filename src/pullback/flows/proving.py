"""Proving restore points: each is booted without a network, on disks that are thrown away, and looked at."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pullback import errors, state
from pullback.flows import files, provingmachine, serving
from pullback.flows.bootmachine import Wishes as Wishes
from pullback.flows.listening import own_directory
from pullback.flows.provingmachine import Limits as Limits
from pullback.flows.provingmachine import Machine, Setup
from pullback.flows.provingsigns import Watch
from pullback.flows.repositories import Access, open_for, opened
from pullback.flows.threads import blocking
from pullback.guest import reader, volumes, wire
from pullback.model import proofpage, proofs, urls
from pullback.model.consoletext import plain
from pullback.model.description import Firmware
from pullback.model.devices import Role
from pullback.model.hardware import Hardware
from pullback.model.points import Point
from pullback.model.proofs import Figures, Proof, Seen, Signs
from pullback.model.proofs import Kind as Kind
from pullback.model.proofs import Sign as Sign
from pullback.model.proofs import document as document
from pullback.programs.launching import Kernel as Kernel
from pullback.progress import Cancel, Silent
from pullback.progress import Progress as Progress

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
#: Files of a report.
DOCUMENT, PAGE, PICTURE, CONSOLE = "report.json", "report.html", "screen.png", "console.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for."""

    repository: urls.Repository
    access: Access = field(default_factory=Access)
    #: An id, the start of one, `latest`, or a date.
    point: str = "latest"
    machine: str | None = None
    #: Targets; empty: all disks of the point.
    only: tuple[str, ...] = ()
    #: What must be seen; without any sign of a running machine, what fits it (`proofs.usual`).
    signs: tuple[Sign, ...] = ()
    limits: Limits = field(default_factory=Limits)
    wishes: Wishes = field(default_factory=Wishes)
    #: The directory of reports; None: below the state directory.
    reports: Path | None = None
    #: The directory of the overlays; None: the usual one of scratch.
    scratch: Path | None = None
    directories: state.Directories | None = None
    #: Where small guests are kept; None: the usual place.
    guests: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A proof, and where it is written."""

    proof: Proof
    directory: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A restore point that could not even be tried."""

    machine: str
    point: str
    error: errors.PullbackError


# -- several ---------------------------------------------------------------------------------


async def candidates(request: Request, *, newest: bool) -> tuple[Point, ...]:
    """The points of every machine of the repository (or of `request.machine`), or only the newest of each.

    Raises `NoPoints`.
    """
    async with open_for(request.repository, request.access) as repository:
        names = [request.machine] if request.machine is not None else await asyncio.to_thread(repository.machines)
        found: list[Point] = []
        for name in names:
            points = (await asyncio.to_thread(partial(repository.listing, name))).points
            found += points[-1:] if newest else points
    if not found:
        of = f" of {request.machine}" if request.machine is not None else ""
        raise errors.NoPoints(path=request.repository.url, of_machine=of)
    return tuple(found)


async def prove_all(
    request: Request,
    points: Sequence[Point],
    progress: Progress | None = None,
    *,
    told: Callable[[Report | Failure], None],
) -> tuple[Report | Failure, ...]:
    """Prove several points, one after the other; one that cannot be tried does not keep the others from it."""
    done: list[Report | Failure] = []
    for point in points:
        one = replace(request, point=point.id, machine=point.machine)
        outcome: Report | Failure
        try:
            outcome = await prove(one, progress)
        except errors.PullbackError as error:
            outcome = Failure(machine=point.machine, point=point.id, error=error)
        told(outcome)
        done.append(outcome)
    return tuple(done)


# -- one -------------------------------------------------------------------------------------


async def prove(request: Request, progress: Progress | None = None) -> Report:
    """Boot a restore point and look whether it comes up. That it does not is no error, but in the report.

    Raises as `serving.serving`; `ProgramFailed` when QEMU does not start, `ProgramMissing`, `ScratchSpace`,
    `UsageError` for signs that this machine cannot give, `CannotWrite` (reports).
    """
    progress = progress or Silent()
    directories = request.directories or state.directories()
    troubles: list[str] = []
    served = serving.Request(
        repository=request.repository,
        access=request.access,
        point=request.point,
        machine=request.machine,
        only=request.only,
        directories=directories,
    )
    async with serving.serving(served, progress, told=lambda trouble: troubles.append(trouble.message)) as disks:
        work = _Work(request, directories, disks, progress, troubles)
        proving = asyncio.ensure_future(work.prove())
        ended = asyncio.ensure_future(disks.ended())
        try:
            await asyncio.wait({proving, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not proving.done():
                ended.result()
            return await proving
        finally:
            for task in (proving, ended):
                task.cancel()
            await asyncio.gather(proving, ended, return_exceptions=True)


class _Work:
    """One proof."""

    def __init__(
        self,
        request: Request,
        directories: state.Directories,
        served: serving.Served,
        progress: Progress,
        troubles: list[str],
    ) -> None:
        self._request = request
        self._directories = directories
        self._served = served
        self._progress = progress
        self._troubles = troubles
        self._point = served.point

    async def prove(self) -> Report:
        """All of it."""
        begun, at = time.monotonic(), datetime.now(UTC)
        known = [self._point.disk(disk.target) for disk in self._served.disks]
        hardware, notes = provingmachine.fitting(self._point, known, self._request.wishes)
        description = self._point.description
        saved = description is not None and description.kind is description.kind.QEMU
        signs = _signs(self._request.signs, hardware, known=saved)
        draft = _Draft(point=self._point, at=at, signs=signs, hardware=hardware)
        draft.notes += notes
        before = _read_by(self._served.pids)
        await self._boot(draft)
        if any(sign.kind is Kind.FSCK for sign in signs.signs):
            self._progress.note(f"{self._point.machine}: its file systems are checked")
            draft.seen = (*draft.seen, await self._checked())
        if _is_local(self._request.repository) and before is not None:
            draft.fetched = (_read_by(self._served.pids) or before) - before
        draft.notes += list(dict.fromkeys(self._troubles))[:20]
        proof = draft.proof(time.monotonic() - begun, str(self._request.wishes.network))
        base = self._request.reports or self._directories.state / "reports"
        directory = await asyncio.to_thread(partial(_store, base, proof, draft.console, draft.picture))
        return Report(proof=proof, directory=directory)

    async def _boot(self, draft: _Draft) -> None:
        firmware = await asyncio.to_thread(_firmware, self._request.repository, self._request.access, self._point)
        setup = Setup(
            hardware=draft.hardware,
            wishes=self._request.wishes,
            disks=self._served.disks,
            firmware=firmware,
            directories=self._directories,
            scratch=self._request.scratch or self._directories.scratch,
        )
        async with provingmachine.started(setup) as (machine, left_out, accel):
            self._progress.note(f"{self._point.machine}: {self._point.id} boots; waiting until {_wanted(draft)}")
            draft.left_out, draft.accel = left_out, accel
            watch = Watch(machine, draft.signs)
            draft.problem = await watch.wait(self._request.limits)
            draft.seen, draft.system = watch.outcome(), watch.system
            draft.up = None if draft.problem else machine.seconds
            await _figures(machine, draft)
            await _look(machine, draft)

    async def _checked(self) -> Seen:
        """File systems, judged by their own programs in the reader, on overlays of its own."""
        begun = time.monotonic()
        small = await files.made_reader(self._request.guests, self._directories, self._progress)
        cancel = Cancel()
        drives = files.drives(self._served.disks)

        def work() -> list[tuple[bool, str]]:
            with (
                own_directory(self._directories, None) as directory,
                reader.start(small, drives, directory, cancel, memory=reader.CHECK_MEMORY) as machine,
            ):
                known = machine.scan()
                return [_check(machine, one, known) for one in known if one.content in volumes.CHECKS and one.key]

        found = await blocking(work, cancel=cancel)
        said = "\n".join(text for _, text in found) or "there is no file system that can be checked"
        good = bool(found) and all(fine for fine, _ in found)
        return Seen(sign=Sign(kind=Kind.FSCK), good=good, seconds=time.monotonic() - begun, said=said)


def _firmware(place: urls.Repository, access: Access, point: Point) -> tuple[Firmware, ...]:
    """The content of the point's flash devices, proven."""
    if not point.firmware:
        return ()
    with opened(place, access) as repository:
        return repository.firmware(point)


def _is_local(place: urls.Repository) -> bool:
    return isinstance(place, urls.DirectoryRepository) or isinstance(place.location, urls.LocalPlace)


def _read_by(pids: Sequence[int]) -> int | None:
    """Bytes that processes read from files so far (proc(5), /proc/PID/io, rchar): a server's are the repository's."""
    try:
        lines = [line for pid in pids for line in Path(f"/proc/{pid}/io").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("rchar:"))
    except (OSError, ValueError, IndexError):
        return None


def _wanted(draft: _Draft) -> str:
    return (", or " if draft.signs.any else ", ").join(str(sign) for sign in draft.signs.living)


def _signs(asked: tuple[Sign, ...], hardware: Hardware, *, known: bool) -> Signs:
    """What is asked for; raises `UsageError` for what this machine cannot show."""
    needs_agent = [sign for sign in asked if sign.kind in (Kind.AGENT, Kind.RUN)]
    if needs_agent and not hardware.has_agent:
        raise errors.UsageError(
            problem=f"{hardware.name} had no channel for a guest agent, so none can answer in it; "
            "--console-text or --still-running can be waited for"
        )
    if any(sign.kind is not Kind.FSCK for sign in asked):
        return Signs(signs=asked)
    usual = proofs.usual(hardware, console=bool(hardware.of(Role.SERIAL)), known=known)
    return replace(usual, signs=(*usual.signs, *asked))


async def _figures(machine: Machine, draft: _Draft) -> None:
    draft.cpu, draft.written = machine.cpu(), machine.written()
    if machine.running:
        try:
            draft.read = await machine.read()
        except errors.PullbackError as error:
            draft.notes.append(f"how much it read is not known: {error}")


async def _look(machine: Machine, draft: _Draft) -> None:
    """The console, and the picture if there is a screen."""
    draft.console, draft.heard = machine.console.data(), machine.console.heard
    if not provingmachine.has_screen(draft.hardware):
        draft.no_picture = "the machine has no screen"
        return
    if not machine.running:
        draft.no_picture = "the machine was gone before there was a picture"
        return
    try:
        draft.picture = await machine.picture()
    except (errors.PullbackError, OSError, ValueError) as error:
        draft.no_picture = f"QEMU gave no picture: {error}"


def _check(machine: reader.Reader, volume: volumes.Volume, known: Sequence[volumes.Volume]) -> tuple[bool, str]:
    """One file system: is it good, and a line about it."""
    try:
        mounted = machine.mount(volume, known)
        machine.unmount(mounted)
        checked = machine.check(volume)
    except errors.VolumeUnreadable as error:
        return False, str(error)
    except wire.Refused as refused:
        return True, f"{volume.name} ({volume.content}): not checked, {refused.text}"
    if mounted.note is not None:
        return False, f"{volume.name} ({volume.content}): {mounted.note}"
    said = " ".join(plain(checked.said).split())[-300:]
    return checked.good, f"{volume.name} ({volume.content}): {'sound' if checked.good else said}"


# -- the report ------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Draft:
    """What is known so far."""

    point: Point
    at: datetime
    signs: Signs
    hardware: Hardware
    problem: str | None = None
    seen: tuple[Seen, ...] = ()
    system: dict[str, str] = field(default_factory=dict)
    up: float | None = None
    cpu: float = 0.0
    read: int = 0
    written: int = 0
    fetched: int | None = None
    accel: str = ""
    left_out: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    console: bytes = b""
    heard: int = 0
    picture: bytes | None = None
    no_picture: str | None = None

    def proof(self, seconds: float, network: str) -> Proof:
        """The whole."""
        bad = [seen for seen in self.seen if not seen.good and seen.sign.kind is Kind.FSCK]
        problems = [self._missing()] if self.problem is not None else []
        problems += ["a file system is not whole" for _ in bad]
        return Proof(
            point=self.point.id,
            machine=self.point.machine,
            created=self.point.created,
            at=self.at,
            proven=not problems,
            problem="; ".join(problems) or None,
            signs=self.signs,
            seen=self.seen,
            figures=Figures(
                up=self.up,
                seconds=seconds,
                cpu=self.cpu,
                read=self.read,
                written=self.written,
                fetched=self.fetched,
            ),
            accel=self.accel,
            cpus=self.hardware.cpus,
            memory=self.hardware.memory,
            network=network,
            left_out=self.left_out,
            system=self.system,
            no_picture=self.no_picture,
            console=self.heard,
            notes=tuple(self.notes),
        )

    def _missing(self) -> str:
        missing = [str(seen.sign) for seen in self.seen if not seen.good and seen.sign.kind is not Kind.FSCK]
        word = " nor " if self.signs.any else ", "
        start = "neither " if self.signs.any and len(missing) > 1 else "not seen: "
        return f"{start}{word.join(missing)} ({self.problem})"


# -- the report ------------------------------------------------------------------------------


def _store(base: Path, proof: Proof, console: bytes, picture: bytes | None) -> Path:
    """Write the report; it is there when it is whole. Raises `CannotWrite`."""
    above = base / (_UNSAFE.sub("_", proof.machine)[:100] or "machine")
    name = f"{proof.point[:25]}-{proof.at:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    state.private(above)
    beside = above / f".{name}.partial"
    try:
        beside.mkdir(mode=0o700)
        parts = {
            DOCUMENT: json.dumps(proofs.document(proof), indent=1, ensure_ascii=False).encode() + b"\n",
            PAGE: proofpage.page(proof, console.decode("utf-8", "replace"), picture).encode("utf-8", "replace"),
            CONSOLE: console,
            **({PICTURE: picture} if picture is not None else {}),
        }
        for file, data in parts.items():
            (beside / file).write_bytes(data)
        beside.rename(above / name)
    except OSError as error:
        raise errors.CannotWrite(path=str(above), reason=error.strerror or str(error)) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return above / name
