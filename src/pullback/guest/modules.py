"""Kernel modules of a package: which are needed, in which order to load them, and their bytes.

A package holds no modules.dep (depmod runs when it is installed), so dependencies are read from
the modules themselves: strings "depends=a,b" and "softdep=pre: c" in the section .modinfo, which
ends each string with a zero byte (kernel: include/linux/module.h, MODULE_INFO).
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_SOFTDEP = re.compile(rb"\0softdep=pre:([^\0]*)\0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module, ready for insmod."""

    #: Name with underscores, as in /proc/modules.
    name: str
    #: The ELF object, not compressed.
    data: bytes


def ordered(names: Iterable[str], read: Callable[[str], bytes | None]) -> list[Module]:
    """`names` and all they depend on, dependencies first.

    `read(name)` gives a module's object, or None when there is none of that name: it is built into
    the kernel or not in this distribution's kernel at all.
    """
    search = _Search(read)
    for name in names:
        search.visit(_plain(name))
    return search.found


@dataclass(slots=True)
class _Search:
    read: Callable[[str], bytes | None]
    found: list[Module] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def visit(self, name: str) -> None:
        if name in self.seen:
            return
        self.seen.add(name)
        data = self.read(name)
        if data is None:
            return
        for needed in dependencies(data):
            self.visit(needed)
        self.found.append(Module(name=name, data=data))


def dependencies(data: bytes) -> list[str]:
    """The modules that the object `data` wants loaded before it."""
    names: list[bytes] = []
    for match in _DEPENDS.finditer(data):
        names += match[1].split(b",")
    for match in _SOFTDEP.finditer(data):
        names += match[1].split()
    return [_plain(name.decode("ascii", "replace")) for name in names if name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The modules under lib/modules/VERSION of an unpacked package."""

    #: File of each module, by its name with underscores.
    files: dict[str, Path]
    #: Names of modules built into the kernel.
    builtin: frozenset[str]
    #: Decompresses a .zst (Python has no zstd before 3.14).
    unzstd: Callable[[Path], bytes]

    def read(self, name: str) -> bytes | None:
        """The object of module `name`, or None if it is no file here."""
        path = self.files.get(name)
        if path is None:
            return None
        if path.suffix == ".xz":  # Debian 13
            return lzma.decompress(path.read_bytes())
        if path.suffix == ".zst":  # Ubuntu 24.04
            return self.unzstd(path)
        return path.read_bytes()  # Debian 12

    def has(self, name: str) -> bool:
        """Can the kernel drive what module `name` drives?"""
        return name in self.files or name in self.builtin


def tree(root: Path, unzstd: Callable[[Path], bytes]) -> Tree:
    """The modules below `root` (…/lib/modules/VERSION)."""
    files = {_plain(path.name.partition(".ko")[0]): path for path in root.rglob("*.ko*")}
    listing = root / "modules.builtin"
    lines = listing.read_text().split() if listing.exists() else []
    builtin = frozenset(_plain(Path(line).stem) for line in lines)
    return Tree(files=files, builtin=builtin, unzstd=unzstd)


def _plain(name: str) -> str:
    return name.replace("-", "_")
