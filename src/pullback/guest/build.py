"""The small guest: a kernel and an initramfs made from the distribution's packages, kept in a cache.

    CACHE/packages-VERSION/       packages, unpacked: fetched once, so later builds need no network
    CACHE/guest-VERSION-HASH/     kernel, initrd, guest.json; HASH is over all that we put in

Both are built beside and renamed, under a lock, so two processes may build at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.resources
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pullback import errors
from pullback.guest import cpio, modules, packages, vmlinux
from pullback.programs import process

#: Where the guest is kept when the caller names no place.
CACHE = Path("/var/cache/pullback/guest")
#: Another number for another recipe (what goes where); our own programs are hashed by content.
_RECIPE = 1
#: A build takes 5 to 10 s once packages are there; the rest is for a slow mirror.
_LOCK_SECONDS = 900.0
_UNPACK_TIMEOUT = 60.0
#: Drivers, loaded in this order (their dependencies before them). Debian's cloud kernel has no
#: ahci; ata_piix drives the IDE of QEMU's `pc` machine there.
_MODULES = (
    "virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console", "ahci", "ata_piix", "nvme",
    "ext4", "evdev", "button",
)  # fmt: skip
_APPLETS = (
    "cat", "echo", "insmod", "kill", "ln", "mkdir", "mount", "poweroff", "sh", "sleep", "sync", "umount", "usleep",
)  # fmt: skip
_PROGRAMS = {"perl": "bin/perl", "e2fsck": "sbin/e2fsck", "qemu-ga": "usr/sbin/qemu-ga"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallGuest:
    """What QEMU needs to boot it."""

    #: The kernel: an ELF with PVH entry where that could be extracted, else the bzImage.
    kernel: Path
    #: The initramfs.
    initrd: Path
    #: The kernel's version.
    version: str
    #: Which of the drivers we wanted this kernel has.
    drivers: frozenset[str]


def guest(cache: Path = CACHE, *, refresh: bool = False) -> SmallGuest:
    """The guest from `cache`, built first if it is not there (offline once packages are there).

    `refresh` asks the distribution for newer packages. Raises `Unsupported` (neither Debian nor
    Ubuntu, not x86_64), `ProgramFailed` (no network), `BusyError`, `CannotWrite`.
    """
    key = _key()
    if not refresh and (found := _newest(cache, f"guest-*-{key}")):
        return _load(found)
    with _lock(cache):
        root = None if refresh else _newest(cache, "packages-*")
        if root is None:
            root = _fetch(cache)
        return _load(_build(cache, packages.Root(path=root), key))


def _key() -> str:
    """A hash over everything of ours that goes into the initramfs."""
    inputs = repr((_RECIPE, _MODULES, _APPLETS, _PROGRAMS, sorted(_inside().items())))
    return hashlib.sha256(inputs.encode()).hexdigest()[:16]


def _inside() -> dict[str, bytes]:
    """Our own programs for the guest, by name."""
    folder = importlib.resources.files("pullback.guest") / "inside"
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.is_file()}


def _newest(cache: Path, pattern: str) -> Path | None:
    return max(cache.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def _load(directory: Path) -> SmallGuest:
    facts = json.loads((directory / "guest.json").read_text())
    return SmallGuest(
        kernel=directory / "kernel",
        initrd=directory / "initrd",
        version=facts["version"],
        drivers=frozenset(facts["drivers"]),
    )


@contextlib.contextmanager
def _lock(cache: Path) -> Iterator[None]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = os.open(cache / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise errors.CannotWrite(path=str(cache), reason=error.strerror or str(error)) from error
    try:
        _wait_for(lock, cache)
        yield
    finally:
        os.close(lock)


def _wait_for(lock: int, cache: Path) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise errors.BusyError(what=str(cache), holder="another process builds the small guest") from error
            time.sleep(0.1)


@contextlib.contextmanager
def _beside(cache: Path) -> Iterator[Path]:
    """A directory next to its final place, removed unless it was renamed."""
    directory = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _publish(made: Path, final: Path) -> Path:
    """Rename into place; an older one of that name (same content) is replaced."""
    made.chmod(0o755)
    if final.exists():
        shutil.rmtree(final)
    return made.rename(final)


def _fetch(cache: Path) -> Path:
    with _beside(cache) as directory:
        packages.fetch(directory)
        shutil.rmtree(directory / "usr/share", ignore_errors=True)
        version = packages.Root(path=directory).kernel_version()
        return _publish(directory, cache / f"packages-{version}")


def _build(cache: Path, root: packages.Root, key: str) -> Path:
    version = root.kernel_version()
    if (final := cache / f"guest-{version}-{key}").exists():
        return final  # the one who held the lock before us has built it
    with _beside(cache) as directory:
        tree = modules.tree(root.module_directory(), partial(_unzstd, root))
        (directory / "kernel").write_bytes(_kernel(root))
        (directory / "initrd").write_bytes(cpio.archive(_contents(root, tree)))
        facts = {"version": version, "drivers": [name for name in _MODULES if tree.has(name)]}
        (directory / "guest.json").write_text(json.dumps(facts))
        return _publish(directory, final)


def _kernel(root: packages.Root) -> bytes:
    image = root.kernel_image().read_bytes()
    return vmlinux.extract(image, partial(_unpack, root)) or image


def _unpack(root: packages.Root, format: str, stream: bytes) -> bytes:
    program = root.program(format)
    return process.run([*root.run_words(), program, "-d", "-c"], timeout=_UNPACK_TIMEOUT, input=stream)


def _unzstd(root: packages.Root, path: Path) -> bytes:
    return _unpack(root, "zstd", path.read_bytes())


def _contents(root: packages.Root, tree: modules.Tree) -> Iterator[cpio.Entry]:
    for path in ("dev", "mnt", "proc", "run", "sys", "tmp"):
        yield cpio.directory(path)
    # The kernel opens the console for /init before devtmpfs is mounted.
    yield cpio.character_device("dev/console", 5, 1)
    yield from _our_programs()
    yield from _foreign_programs(root)
    for number, module in enumerate(modules.ordered(_MODULES, tree.read)):
        yield cpio.file(f"modules/{number:02d}-{module.name}.ko", module.data)


def _our_programs() -> Iterator[cpio.Entry]:
    places = {"init": "init", "agent": "sbin/agent", "shutdown": "sbin/shutdown"}
    for name, data in _inside().items():
        yield cpio.file(places.get(name, f"programs/{name}"), data, executable=True)


def _foreign_programs(root: packages.Root) -> Iterator[cpio.Entry]:
    yield cpio.file("bin/busybox", root.program("busybox").read_bytes(), executable=True)
    for applet in _APPLETS:
        yield cpio.link(f"bin/{applet}", "busybox")
    for name, place in _PROGRAMS.items():
        program = root.program(name)
        yield cpio.file(place, program.read_bytes(), executable=True)
        for path, library in root.libraries(program).items():
            yield cpio.file(path.lstrip("/"), library.read_bytes(), executable=True)
