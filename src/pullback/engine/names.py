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

    @property
    def copied(self) -> str:
        """The bitmap of scratch: what was copied there."""
        return self._name("copied")

    @property
    def push(self) -> str:
        """The job that copies to a destination."""
        return self._name("push")

    @property
    def source(self) -> str:
        """What a push reads where the classic engine freezes: a node over scratch."""
        return self._name("src")

    @property
    def destination(self) -> str:
        """The node of a destination, and the beginning of its file's name while it is written."""
        return self._name("dst")

    @property
    def protocol(self) -> str:
        """The node below it."""
        return self._name("dstp")

    @property
    def data(self) -> str:
        """The node of a raw destination's data, below an image without data."""
        return self._name("dstd")

    @property
    def meta(self) -> str:
        """The image without data that keeps a raw destination sparse."""
        return self._name("meta")

    @property
    def hold(self) -> str:
        """What a disk that is rolled back has in its place."""
        return self._name("hold")

    @property
    def reference(self) -> str:
        """A node over the root of such a disk: keeps it from vanishing, and tells which it is."""
        return self._name("ref")

    def export(self, what: str) -> str:
        """Id of an export."""
        return self._name(what)


#: Roles of nodes, in the order in which they can be removed.
REMOVAL = ("dst", "src", "snap", "cbw", "scr", "map", "hold", "ref")


def role(name: str, job: str) -> str:
    """cbw, snap, scr … of one of the job's names."""
    return name.removeprefix(prefix(job)).rstrip("0123456789")
