"""The names of what a job makes in QEMU: recognisable, unique, at most 31 characters."""

from __future__ import annotations

from dataclasses import dataclass

from pullback.engine.graph import OURS


def prefix(job: str) -> str:
    """What every name of a job begins with."""
    return f"{OURS}{job}-"


@dataclass(frozen=True, slots=True)
class Names:
    """Names for one disk of a job."""

    job: str
    index: int

    def _name(self, role: str) -> str:
        return f"{prefix(self.job)}{role}{self.index}"

    @property
    def filter(self) -> str:
        """The copy-before-write node above the disk."""
        return self._name("cbw")

    @property
    def snapshot(self) -> str:
        """The snapshot-access node on the filter."""
        return self._name("snap")

    @property
    def scratch(self) -> str:
        """The scratch image's node, and its file's name."""
        return self._name("scr")

    @property
    def map(self) -> str:
        """A null node that carries the bitmap of a disk in an iothread."""
        return self._name("map")

    @property
    def backup(self) -> str:
        """The classic engine's job."""
        return self._name("job")

    @property
    def bitmap(self) -> str:
        """The temporary union of what changed."""
        return self._name("dirty")

    def export(self, what: str) -> str:
        """Id of an export."""
        return self._name(what)


#: Roles of nodes, in the order in which they can be removed.
REMOVAL = ("snap", "cbw", "scr", "map")


def role(name: str, job: str) -> str:
    """cbw, snap, scr … of one of the job's names."""
    return name.removeprefix(prefix(job)).rstrip("0123456789")
