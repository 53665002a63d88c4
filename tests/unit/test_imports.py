"""The import table of docs/design.md: which room may import which, and which one module each library."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pullback

SOURCE = Path(pullback.__file__).parent
CORRIDOR = {"errors", "units", "extents", "progress", "endpoint", "version"}
#: The public face: the package itself, and the library without asyncio.
FACE = {"", "sync"}
_GROUND = {"corridor", "model", "machine", "programs"}
#: Room -> the rooms that it may import, besides itself.
TABLE = {
    "corridor": set[str](),
    "model": {"corridor"},
    "machine": {"corridor", "model"},
    "state": {"corridor", "model"},
    "programs": {"corridor", "model", "machine"},
    # The guard and the recovery read job records.
    "engine": {*_GROUND, "state"},
    "transfer": _GROUND,
    "repo": _GROUND,
    "guest": _GROUND,
    # Contract suites of our own interfaces.
    "testing": {*_GROUND, "repo"},
    # It reads restore points.
    "serve": {*_GROUND, "repo"},
    "flows": {*_GROUND, "serve", "state", "engine", "transfer", "repo", "guest"},
    "face": {"corridor", "model", "state", "config", "flows"},
    "config": {"corridor", "model"},
    "cli": {"corridor", "model", "state", "config", "flows", "face"},
}
#: Library -> the modules that may import it.
WINDOWS = {
    "qemu": {"pullback.engine.monitor"},
    "nbd": {"pullback.transfer.nbd"},
    "typer": {"pullback.cli"},
    "rich": {"pullback.cli"},
    "lxml": {"pullback.model.xml"},
    "obstore": {"pullback.repo.store.s3"},
    "cryptography": {"pullback.repo.restic.crypto"},
    "backports": {"pullback.repo.restic.compression"},
    "compression": {"pullback.repo.restic.compression"},
    "numpy": {"pullback.repo.restic.lookup"},
    "mfusepy": {"pullback.flows.mount_servant"},
}
#: Rooms that others enter through their `__init__` only.
FRONT_DOORS = {"repo"}
_NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}


@dataclass(frozen=True, slots=True)
class Import:
    """Somebody imports something."""

    importer: str
    imported: str
    star: bool = False

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}"


def room(module: str) -> str:
    """The room of a module of ours."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else ""
    return "corridor" if name in CORRIDOR else "face" if name in FACE else name


def modules(source: Path) -> dict[str, Path]:
    """All modules of the package in `source`, by dotted name."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = ["pullback", *path.relative_to(source).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: Path) -> Iterator[Import]:
    """Every import in the package, also those inside functions and for type checkers only."""
    known = modules(source)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (Import(name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from _from(name, node, known)


def _from(name: str, node: ast.ImportFrom, known: dict[str, Path]) -> Iterator[Import]:
    base = node.module or ""
    if node.level:  # relative: forbidden, so that the target can be seen in the line itself
        yield Import(name, "." * node.level + base)
        return
    for alias in node.names:
        below = f"{base}.{alias.name}"
        yield Import(name, below if below in known else base, star=alias.name == "*")


def violations(source: Path) -> list[str]:
    """What breaks the table."""
    found = list(imports(source))
    return [
        *(f"{entry} (*)" for entry in found if entry.star),
        *(str(entry) for entry in found if not _allowed(entry)),
        *(f"{name} has a name without a subject" for name in modules(source) if name.split(".")[-1] in _NAMELESS),
        *(f"{name} is in no room of the table" for name in modules(source) if room(name) not in TABLE),
        *(f"a cycle: {' -> '.join(cycle)}" for cycle in cycles(found)),
    ]


def _allowed(entry: Import) -> bool:
    top = entry.imported.split(".")[0]
    if top != "pullback":
        return top in sys.stdlib_module_names or any(_is_below(entry.importer, w) for w in WINDOWS.get(top, ()))
    here, there = room(entry.importer), room(entry.imported)
    if here == there:
        return True
    if there in FRONT_DOORS and entry.imported != f"pullback.{there}":
        return False
    return there in TABLE.get(here, set())


def _is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def cycles(found: list[Import]) -> list[list[str]]:
    """Modules that import one another in a circle (each circle once, or more often)."""
    below: dict[str, set[str]] = {}
    for entry in found:
        below.setdefault(entry.importer, set()).add(entry.imported)
    done: set[str] = set()
    circles: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            circles.append([*path[path.index(module) :], module])
            return
        if module in done:
            return
        for other in sorted(below.get(module, ())):
            visit(other, [*path, module])
        done.add(module)

    for module in sorted(below):
        visit(module, [])
    return circles


def test_the_package_keeps_to_the_table() -> None:
    assert violations(SOURCE) == []


def test_every_room_of_the_table_is_there() -> None:
    """A room that is gone must leave the table too."""
    assert {room(name) for name in modules(SOURCE)} == set(TABLE)


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("engine/fleece.py", "from pullback.repo import Directory", "pullback.engine.fleece imports pullback.repo"),
        ("engine/fleece.py", "import pullback.flows", "pullback.engine.fleece imports pullback.flows"),
        ("transfer/file.py", "from pullback import state", "pullback.transfer.file imports pullback.state"),
        ("units.py", "from pullback import model", "pullback.units imports pullback.model"),
        ("flows/backup.py", "from pullback.cli import main", "pullback.flows.backup imports pullback.cli"),
        ("flows/backup.py", "from pullback.repo.files import x", "pullback.flows.backup imports pullback.repo.files"),
        ("engine/jobs.py", "from qemu.qmp import QMPClient", "pullback.engine.jobs imports qemu.qmp"),
        ("engine/jobs.py", "import nbd", "pullback.engine.jobs imports nbd"),
        ("flows/backup.py", "import rich.progress", "pullback.flows.backup imports rich.progress"),
        ("model/disks.py", "def f():\n    from lxml import etree", "pullback.model.disks imports lxml"),
        ("model/disks.py", "import requests", "pullback.model.disks imports requests"),
        ("model/disks.py", "from os.path import *", "pullback.model.disks imports os.path (*)"),
        ("model/disks.py", "from . import backups", "pullback.model.disks imports ."),
        ("model/utils.py", "", "pullback.model.utils has a name without a subject"),
        ("attic/old.py", "", "pullback.attic.old is in no room of the table"),
    ],
)
def test_a_violation_is_seen(tmp_path: Path, module: str, line: str, complaint: str) -> None:
    for name in ("__init__.py", "repo/__init__.py", "repo/files.py", "flows/__init__.py", "model/__init__.py"):
        _write(tmp_path / name, "")
    for name in ("cli/main.py", "state.py"):
        _write(tmp_path / name, "")
    _write(tmp_path / module, line)
    [seen] = violations(tmp_path)
    assert seen.startswith(complaint)


def test_a_cycle_is_seen(tmp_path: Path) -> None:
    _write(tmp_path / "model/a.py", "from pullback.model import b")
    _write(tmp_path / "model/b.py", "def later():\n    from pullback.model.a import A")
    assert violations(tmp_path) == ["a cycle: pullback.model.a -> pullback.model.b -> pullback.model.a"]


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    _write(tmp_path / "engine/monitor.py", "import qemu.qmp\nfrom pullback import state")
    _write(tmp_path / "state.py", "from pullback import errors")
    _write(tmp_path / "errors.py", "import enum")
    _write(tmp_path / "model/xml/backup.py", "from lxml import etree")
    assert violations(tmp_path) == []


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
