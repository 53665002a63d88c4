"""The distribution's packages of which the small guest is made: found, fetched and unpacked.

Nothing is installed on the host. Libraries come from packages too, and are found by the unpacked
dynamic loader itself, so the host's own libraries are never mixed in.
"""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pullback import errors
from pullback.programs import process

_DOWNLOAD_TIMEOUT = 600.0
_UNPACK_TIMEOUT = 120.0
_APT = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root"]
#: Always needed. lz4 and zstd are only used while building, from where they were unpacked.
_PROGRAMS = ("busybox-static", "perl-base", "qemu-guest-agent", "e2fsprogs", "util-linux", "lz4", "zstd")
#: What reads and checks other file systems; who has no such package does without.
_MORE_PROGRAMS = ("lvm2", "xfsprogs", "btrfs-progs", "dosfstools", "ntfs-3g")
#: The package that depends on the current kernel for virtual machines, by distribution.
_KERNELS = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}
_PLACES = ("bin", "sbin", "usr/bin", "usr/sbin")
_KERNEL_PARTS = re.compile(r"linux-(image|modules)-\d.*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A directory in which packages were unpacked."""

    #: Where.
    path: Path

    def kernel_version(self) -> str:
        """The version in the name of its kernel image."""
        return self.kernel_image().name.removeprefix("vmlinuz-")

    def kernel_image(self) -> Path:
        """Its kernel (bzImage)."""
        return self._one("boot/vmlinuz-*")

    def module_directory(self) -> Path:
        """…/lib/modules/VERSION."""
        version = self.kernel_version()
        return self._one(f"lib/modules/{version}", f"usr/lib/modules/{version}")

    def program(self, name: str) -> Path:
        """The program `name`, wherever its package has it."""
        return self._one(*(f"{place}/{name}" for place in _PLACES))

    def lacks(self, names: Iterable[str]) -> list[str]:
        """Those of the programs `names` that are not in it."""
        return [name for name in names if not any((self.path / place / name).exists() for place in _PLACES)]

    def libraries(self, program: Path) -> dict[str, Path]:
        """Every library that `program` loads, the loader included: path in the guest to file here."""
        loader = self._loader()
        listing = process.run([*self.run_words(), "--list", program], timeout=_UNPACK_TIMEOUT).decode()
        found = {"/lib64/ld-linux-x86-64.so.2": loader}
        for match in re.finditer(r"^\s*([^/\s]+) => (/\S+)", listing, re.MULTILINE):
            found[f"/lib/{match[1]}"] = Path(match[2])
        return found

    def run_words(self) -> list[str | Path]:
        """What to put before a program of this root to run it here, with its own libraries."""
        places = [self.path / place / "x86_64-linux-gnu" for place in ("lib", "usr/lib")]
        return [self._loader(), "--inhibit-cache", "--library-path", ":".join(map(str, places))]

    def _loader(self) -> Path:
        return self._one("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")

    def _one(self, *patterns: str) -> Path:
        for pattern in patterns:
            for path in sorted(self.path.glob(pattern)):
                return path
        raise errors.BadReply(who="the distribution's packages", problem=f"no {patterns[0]} in them")


def distribution() -> str:
    """Either "debian" or "ubuntu", whichever this host is or is derived from; raises `Unsupported`."""
    if platform.machine() != "x86_64":
        raise _unsupported(f"it is made for x86_64, and this is {platform.machine()}")
    try:
        release = platform.freedesktop_os_release()
    except OSError as error:
        raise _unsupported("the distribution is not known") from error
    for name in (release["ID"], *release.get("ID_LIKE", "").split()):
        if name in _KERNELS:
            return name
    raise _unsupported(f"it is made from packages of Debian or Ubuntu, and this is {release['ID']}")


def _unsupported(reason: str) -> errors.Unsupported:
    return errors.Unsupported(
        what="Building the small guest", reason=reason, way_out="Build it on Debian 12+ or Ubuntu 24.04+, x86_64."
    )


def fetch(into: Path) -> None:
    """Download the packages and unpack them in the empty directory `into`. Nobody need be root.

    The lists of packages are brought up to date, in a place of our own, when a package cannot be had
    without. Raises `ProgramFailed` (no network), `Unsupported`.
    """
    kernel = _KERNELS[distribution()]
    try:
        _download(into, kernel, ())
    except (errors.ProgramFailed, errors.BadReply):
        with tempfile.TemporaryDirectory(prefix="lists-", dir=into.parent) as lists:
            own = _own_lists(Path(lists))
            process.run([*_APT, *own, "update"], timeout=_DOWNLOAD_TIMEOUT)
            _download(into, kernel, own)
    for archive in sorted(into.glob("*.deb")):
        process.run(["dpkg-deb", "-x", archive, into], timeout=_UNPACK_TIMEOUT)
        archive.unlink()


def _own_lists(place: Path) -> list[str]:
    """Options by which apt keeps its lists in `place`: the system's can be changed by root alone."""
    (place / "lists/partial").mkdir(parents=True)
    (place / "cache/archives/partial").mkdir(parents=True)
    return ["-o", f"Dir::State::lists={place}/lists", "-o", f"Dir::Cache={place}/cache"]


def _download(into: Path, kernel: str, lists: Sequence[str]) -> None:
    wanted = [kernel, *_PROGRAMS, *_MORE_PROGRAMS]
    words = ["apt-cache", *lists, "depends", "--recurse", "--important"]
    listing = process.run([*words, kernel, *_PROGRAMS], timeout=_UNPACK_TIMEOUT).decode()
    for name in _MORE_PROGRAMS:
        try:
            listing += process.run([*words, name], timeout=_UNPACK_TIMEOUT).decode()
        except errors.ProgramFailed:
            wanted.remove(name)
    names = closure(wanted, listing)
    if not any(_KERNEL_PARTS.fullmatch(name) for name in names):
        raise errors.BadReply(who="apt-cache", problem=f"{kernel} names no kernel")
    process.run(["env", "-C", into, *_APT, *lists, "download", *names], timeout=_DOWNLOAD_TIMEOUT)


def closure(wanted: Sequence[str], listing: str) -> list[str]:
    """The packages to fetch: `wanted`, and what they need of libraries and parts of a kernel.

    `listing` is the output of `apt-cache depends --recurse`. Everything else that a package may
    depend on (scripts that build an initramfs, …) is for an installed system, which this is not.
    """
    depends = _parse(listing)
    found: dict[str, None] = {}
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = None
            waiting += [other for other in depends.get(name, []) if _is_part(other)]
    return sorted(found)


def _is_part(name: str) -> bool:
    return ":" not in name and (name.startswith("lib") or bool(_KERNEL_PARTS.fullmatch(name)))


def _parse(listing: str) -> dict[str, list[str]]:
    """Lines "package", then "  Depends: other" or " |Depends: alternative"; "<virtual>" is no package."""
    depends: dict[str, list[str]] = {}
    current: list[str] = []
    alternative = False
    for line in listing.splitlines():
        if not line.startswith(" "):
            current = depends.setdefault(line.strip(), [])
            continue
        kind, _, name = line.strip().partition(": ")
        if kind.lstrip("|") in ("Depends", "PreDepends") and not alternative and not name.startswith("<"):
            current.append(name)
        alternative = kind.startswith("|")
    return depends
