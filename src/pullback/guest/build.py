"""Small guests: a kernel and an initramfs made from the distribution's packages, kept in a cache.

    CACHE/packages-VERSION/       packages, unpacked: fetched once, so later builds need no network
    CACHE/guest-VERSION-HASH/     kernel, initrd, guest.json; HASH is over all that we put in
    CACHE/reader-VERSION-HASH/    the same of the reader

There are two, by their recipes: the *guest*, which tests and the demo back up, and the *reader*, which
reads file systems of restore points. All is built beside and renamed, under a lock, so two processes
may build at once.
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pullback import errors
from pullback.guest import cpio, modules, packages, vmlinux
from pullback.programs import process

#: Where the guest is kept when the caller names no place.
CACHE = Path("/var/cache/pullback/guest")
#: Another number for another layout (what goes where); our own programs are hashed by content.
_LAYOUT = 1
#: A build takes 5 to 10 s once packages are there; the rest is for a slow mirror.
_LOCK_SECONDS = 900.0
_UNPACK_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What goes into a small guest."""

    #: Begins the name of its directory in the cache.
    name: str
    #: Our own programs: the folder beside this module, and where those of them go that have a place of their own.
    folder: str
    places: Mapping[str, str]
    #: Drivers, loaded in this order (their dependencies before them).
    modules: tuple[str, ...]
    #: Drivers that our programs load when they are needed, from later/ (see `_later`).
    later: tuple[str, ...] = ()
    #: Links to busybox; without any, there is no busybox.
    applets: tuple[str, ...] = ()
    #: Foreign programs, and their paths.
    programs: Mapping[str, str] = field(default_factory=dict)
    #: Those without which it does less.
    more_programs: Mapping[str, str] = field(default_factory=dict)


GUEST = Recipe(
    name="guest",
    folder="inside",
    places={"init": "init", "agent": "sbin/agent", "shutdown": "sbin/shutdown"},
    # Debian's cloud kernel has no ahci; ata_piix drives the IDE of QEMU's `pc` machine there.
    modules=(
        "virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console", "ahci", "ata_piix", "nvme",
        "ext4", "evdev", "button",
    ),
    applets=(
        "cat", "echo", "insmod", "kill", "ln", "mkdir", "mount", "poweroff", "sh", "sleep", "sync", "umount", "usleep",
    ),
    programs={"perl": "bin/perl", "e2fsck": "sbin/e2fsck", "qemu-ga": "usr/sbin/qemu-ga"},
)  # fmt: skip
READER = Recipe(
    name="reader",
    folder="reader",
    places={"init": "init"},
    modules=("virtio_pci", "virtio_blk", "virtio_console", "ext4"),
    later=(
        "ext4", "xfs", "btrfs", "vfat", "exfat", "isofs", "udf", "squashfs", "erofs", "fuse", "ntfs3", "f2fs",
        "hfsplus", "nls_ascii", "nls_cp437", "nls_utf8",
        "dm_mod", "dm_mirror", "dm_snapshot", "dm_thin_pool", "dm_cache", "dm_cache_smq", "dm_writecache", "dm_raid",
        "raid0", "raid1", "raid10", "raid456",
    ),
    programs={"perl": "bin/perl", "blkid": "bin/blkid", "e2fsck": "bin/e2fsck"},
    more_programs={
        "lvm": "bin/lvm", "xfs_repair": "bin/xfs_repair", "btrfs": "bin/btrfs", "fsck.fat": "bin/fsck.fat",
        "ntfs-3g": "bin/ntfs-3g",
    },
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallGuest:
    """What QEMU needs to boot one."""

    #: The kernel: an ELF with PVH entry where that could be extracted, else the bzImage.
    kernel: Path
    #: The initramfs.
    initrd: Path
    #: The kernel's version.
    version: str
    #: Which of the drivers we wanted this kernel has.
    drivers: frozenset[str]
    #: Which of the programs it has that it can do without.
    programs: frozenset[str] = frozenset()


def guest(cache: Path = CACHE, *, recipe: Recipe = GUEST, refresh: bool = False) -> SmallGuest:
    """The guest from `cache`, built first if it is not there (offline once packages are there).

    `refresh` asks the distribution for newer packages. Raises `Unsupported` (neither Debian nor
    Ubuntu, not x86_64), `ProgramFailed` (no network), `BusyError`, `CannotWrite`.
    """
    key = _key(recipe)
    if not refresh and (found := _newest(cache, f"{recipe.name}-*-{key}")):
        return _load(found)
    with _lock(cache):
        root = None if refresh else _usable(cache, recipe)
        if root is None:
            root = packages.Root(path=_fetch(cache))
        return _load(_build(cache, root, recipe))


def ready(cache: Path, *, recipe: Recipe = GUEST) -> SmallGuest | None:
    """The guest from a cache that somebody else may have made, if it is there; only if no stranger can change it."""
    try:
        found = _newest(cache, f"{recipe.name}-*-{_key(recipe)}")
        trusted = found is not None and all(_is_safe(path) for path in (cache, found, *found.iterdir()))
        return _load(found) if found is not None and trusted else None
    except OSError:
        return None


def _is_safe(path: Path) -> bool:
    """Root's, or ours, and nobody else may write there."""
    facts = path.lstat()
    return facts.st_uid in (0, os.geteuid()) and not facts.st_mode & 0o022


def _key(recipe: Recipe) -> str:
    """A hash over everything of ours that goes into the initramfs."""
    inputs = repr((_LAYOUT, recipe, sorted(own_programs(recipe).items())))
    return hashlib.sha256(inputs.encode()).hexdigest()[:16]


def own_programs(recipe: Recipe) -> dict[str, bytes]:
    """Our own programs in a guest, by name."""
    folder = importlib.resources.files("pullback.guest") / recipe.folder
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.is_file()}


def _newest(cache: Path, pattern: str) -> Path | None:
    return max(cache.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def _usable(cache: Path, recipe: Recipe) -> packages.Root | None:
    """Packages that were fetched, unless an older version of ours left out what this recipe needs."""
    found = _newest(cache, "packages-*")
    root = packages.Root(path=found) if found else None
    return None if root is None or root.lacks(recipe.programs) else root


def _load(directory: Path) -> SmallGuest:
    facts = json.loads((directory / "guest.json").read_text())
    return SmallGuest(
        kernel=directory / "kernel",
        initrd=directory / "initrd",
        version=facts["version"],
        drivers=frozenset(facts["drivers"]),
        programs=frozenset(facts.get("programs", ())),
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


def _build(cache: Path, root: packages.Root, recipe: Recipe) -> Path:
    version = root.kernel_version()
    if (final := cache / f"{recipe.name}-{version}-{_key(recipe)}").exists():
        return final  # the one who held the lock before us has built it
    with _beside(cache) as directory:
        tree = modules.tree(root.module_directory(), partial(_unzstd, root))
        (directory / "kernel").write_bytes(_kernel(root))
        (directory / "initrd").write_bytes(cpio.archive(_contents(root, tree, recipe)))
        facts = {
            "version": version,
            "drivers": [name for name in (*recipe.modules, *recipe.later) if tree.has(name)],
            "programs": sorted(set(recipe.more_programs).difference(root.lacks(recipe.more_programs))),
        }
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


def _contents(root: packages.Root, tree: modules.Tree, recipe: Recipe) -> Iterator[cpio.Entry]:
    for path in ("dev", "mnt", "proc", "run", "sys", "tmp"):
        yield cpio.directory(path)
    # The kernel opens the console for /init before devtmpfs is mounted.
    yield cpio.character_device("dev/console", 5, 1)
    for name, data in own_programs(recipe).items():
        yield cpio.file(recipe.places.get(name, f"programs/{name}"), data, executable=True)
    yield from _foreign_programs(root, recipe)
    for number, module in enumerate(modules.ordered(recipe.modules, tree.read)):
        yield cpio.file(f"modules/{number:02d}-{module.name}.ko", module.data)
    if recipe.later:
        yield from _later(tree, recipe)


def _later(tree: modules.Tree, recipe: Recipe) -> Iterator[cpio.Entry]:
    """Modules for later: later/NAME.ko, and an index with a line "NAME MODULE…" for each, in the order of loading."""
    lines = []
    for name in recipe.later:
        chain = modules.ordered([name], tree.read)
        lines += [" ".join([name, *(module.name for module in chain)])] if tree.has(name) else []
        for module in chain:
            yield cpio.file(f"later/{module.name}.ko", module.data)
    yield cpio.file("later/index", "".join(f"{line}\n" for line in lines).encode())


def _foreign_programs(root: packages.Root, recipe: Recipe) -> Iterator[cpio.Entry]:
    if recipe.applets:
        yield cpio.file("bin/busybox", root.program("busybox").read_bytes(), executable=True)
    for applet in recipe.applets:
        yield cpio.link(f"bin/{applet}", "busybox")
    programs = {**recipe.programs, **recipe.more_programs}
    for name in root.lacks(recipe.more_programs):
        del programs[name]
    yield from foreign_programs(root, programs)


def foreign_programs(root: packages.Root, programs: Mapping[str, str]) -> Iterator[cpio.Entry]:
    """Programs of the packages (name to path in the guest), and every library that they load."""
    for name, place in programs.items():
        program = root.program(name)
        yield cpio.file(place, program.read_bytes(), executable=True)
        for path, library in root.libraries(program).items():
            yield cpio.file(path.lstrip("/"), library.read_bytes(), executable=True)
