"""Proofs that a restore point boots: signs of life that are waited for, and what came of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from pullback.model.hardware import Hardware
from pullback.model.texts import showable

#: What a Linux says when its start is over, on a serial console that it was told to use.
LOGIN = r"login: *$|Reached target .*(Multi-User|Graphical)"
#: Seconds that a machine without any channel to the outside must run on without a reset.
STEADY_SECONDS = 60.0
#: Characters of what a guest said for one sign.
MAX_SAID = 4096


class Kind(StrEnum):
    """What is waited for."""

    #: The guest agent answers.
    AGENT = "agent"
    #: A text appears on the first serial port.
    CONSOLE = "console-text"
    #: A command in the guest, run by its agent, ends with status 0.
    RUN = "run"
    #: The machine runs for a time without reset, panic or end.
    STEADY = "still-running"
    #: File systems are whole, as their own programs judge (not in the guest).
    FSCK = "fsck"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """Something to wait for."""

    kind: Kind
    #: The regular expression, the command, the seconds; nothing for others.
    text: str = ""

    def __str__(self) -> str:
        match self.kind:
            case Kind.AGENT:
                return "the guest agent answers"
            case Kind.CONSOLE:
                return f"{self.text!r} on the console"
            case Kind.RUN:
                return f"{self.text!r} in the guest"
            case Kind.STEADY:
                return f"it runs on for {self.text} s"
        return "file systems are whole"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """What must be seen."""

    signs: tuple[Sign, ...]
    #: One of them is enough; file systems aside, which are checked in any case.
    any: bool = False
    #: Why these, if nobody said which.
    why: str | None = None

    def enough(self, seen: Sequence[Sign]) -> bool:
        """Is what was seen of the machine all that is wanted?"""
        wanted = self.living
        return any(sign in seen for sign in wanted) if self.any else all(sign in seen for sign in wanted)

    @property
    def living(self) -> tuple[Sign, ...]:
        """Those of the running machine."""
        return tuple(sign for sign in self.signs if sign.kind is not Kind.FSCK)


def usual(hardware: Hardware, *, console: bool, known: bool = True) -> Signs:
    """The signs for a machine of which nobody said what it shows.

    `console`: it had a serial port; not `known`: what it had is not known, the hardware is a usual one.
    """
    if not known:
        signs = (Sign(kind=Kind.AGENT), Sign(kind=Kind.CONSOLE, text=LOGIN))
        return Signs(signs=signs, any=True, why="nothing is known of the machine's devices; either is enough")
    if hardware.has_agent:
        signs = (Sign(kind=Kind.AGENT), Sign(kind=Kind.CONSOLE, text=LOGIN))
        return Signs(signs=signs, any=True, why="the machine had a channel for a guest agent; either is enough")
    if console:
        why = "the machine had a serial port, and no channel for a guest agent"
        return Signs(signs=(Sign(kind=Kind.CONSOLE, text=LOGIN),), why=why)
    steady = Sign(kind=Kind.STEADY, text=f"{STEADY_SECONDS:g}")
    why = "the machine had neither a channel for a guest agent nor a serial port: a weak sign, look at the picture"
    return Signs(signs=(steady, Sign(kind=Kind.CONSOLE, text=LOGIN)), any=True, why=why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What came of a sign."""

    sign: Sign
    good: bool
    #: Seconds from the start of the machine; None: it did not come.
    seconds: float | None = None
    #: What was seen, or why not: a guest's words, so hostile.
    said: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What it cost."""

    #: From the start of the machine to the last sign that was wanted; None: it did not come up.
    up: float | None
    #: The whole proof, in seconds.
    seconds: float
    #: Processor time of the machine, in seconds.
    cpu: float
    #: Bytes that the machine read from its disks, and that it wrote (onto its throw-away overlays).
    read: int
    written: int
    #: Bytes that were read from the repository, with what was read ahead; None: not known.
    fetched: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A restore point that was booted."""

    point: str
    machine: str
    created: datetime
    #: When it was booted, UTC.
    at: datetime
    proven: bool
    #: Why not.
    problem: str | None
    signs: Signs
    seen: tuple[Seen, ...]
    figures: Figures
    #: What ran the processors: kvm or tcg; how many; bytes of memory; what its network cards were connected to.
    accel: str
    cpus: int
    memory: int
    network: str
    #: What of the saved machine was not made anew.
    left_out: tuple[str, ...] = ()
    #: What the guest's agent told of its system; hostile.
    system: dict[str, str] = field(default_factory=dict)
    #: Why there is no picture; None: there is one.
    no_picture: str | None = None
    #: Bytes that came on the console.
    console: int = 0
    notes: tuple[str, ...] = ()


def document(proof: Proof) -> dict[str, object]:
    """The proof as plain JSON values; all texts of the guest are made `showable`."""
    figures = proof.figures
    return {
        "point": proof.point,
        "machine": proof.machine,
        "created": proof.created.isoformat(),
        "at": proof.at.astimezone(UTC).isoformat(timespec="seconds"),
        "proven": proof.proven,
        "problem": proof.problem,
        "signs": [
            {
                "kind": str(seen.sign.kind),
                "text": seen.sign.text,
                "good": seen.good,
                "seconds": None if seen.seconds is None else round(seen.seconds, 2),
                "said": "\n".join(showable(line) for line in seen.said[:MAX_SAID].splitlines()),
            }
            for seen in proof.seen
        ],
        "any": proof.signs.any,
        "why": proof.signs.why,
        "up_seconds": None if figures.up is None else round(figures.up, 2),
        "seconds": round(figures.seconds, 2),
        "cpu_seconds": round(figures.cpu, 2),
        "read": figures.read,
        "written": figures.written,
        "fetched": figures.fetched,
        "accel": proof.accel,
        "cpus": proof.cpus,
        "memory": proof.memory,
        "network": proof.network,
        "left_out": list(proof.left_out),
        "system": [{"name": name, "value": showable(value)} for name, value in proof.system.items()],
        "no_picture": proof.no_picture,
        "console": proof.console,
        "notes": list(proof.notes),
    }
