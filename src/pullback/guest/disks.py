"""Disks for the small guest: made with a file system and data in it, and checked without mounting."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pullback import errors
from pullback.guest import records
from pullback.programs import process, qemu_img
from pullback.units import MiB

_MKFS_TIMEOUT = 120.0
_CONVERT_TIMEOUT = 600.0
_FSCK_TIMEOUT = 600.0
#: Filler alternates between the host's programs, which compress, and random bytes, which do not.
_PROGRAMS = Path("/usr/bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a check of a disk found."""

    #: The last of the writer's records; all before it are there.
    last_record: int
    #: What is wrong, or None.
    problem: str | None


def make(path: Path, size: int, *, filler: int = 0, format: str = "qcow2") -> None:
    """Make an image of `size` bytes with an ext4 file system holding `filler` bytes of mixed files.

    Raises `ProgramFailed` (no room in the file system, qemu-img), `ProgramMissing`.
    """
    with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as name:
        work = Path(name)
        _fill(work / "tree" / "filler", filler)
        raw = work / "disk.raw"
        qemu_img.create(raw, size, format="raw")
        # root_owner: the tree's owner may be any user. No lazy work left to the guest's kernel,
        # which would write to the disk while nothing is going on.
        options = "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"
        process.run(["mkfs.ext4", "-q", "-F", "-E", options, "-d", work / "tree", raw], timeout=_MKFS_TIMEOUT)
        _convert(raw, path, source="raw", format=format)


def _fill(directory: Path, size: int) -> None:
    directory.mkdir(parents=True)
    left = size
    for number, data in enumerate(_mixed(size)):
        (directory / f"{number:05d}").write_bytes(data[:left])
        left -= len(data)
        if left <= 0:
            return


def _mixed(size: int) -> Iterator[bytes]:
    """Pieces of at most 1 MiB, without end, unless `size` is 0."""
    while size:
        for path in sorted(_PROGRAMS.iterdir()):
            if path.is_file() and os.access(path, os.R_OK):
                with path.open("rb") as program:
                    yield program.read(MiB)
                yield os.urandom(256 * 1024)


def _convert(source_path: Path, path: Path, *, source: str, format: str) -> None:
    process.run(["qemu-img", "convert", "-f", source, "-O", format, source_path, path], timeout=_CONVERT_TIMEOUT)


def check(image: Path, *, format: str = "raw", scratch: Path | None = None) -> Verdict:
    """Check the ext4 file system on `image` and the writer's records in it; `image` is only read.

    The check works on a sparse copy in `scratch` (the image's directory): a disk that was cut off
    has a journal to replay, which is done first and is no problem. After that nothing may be wrong.
    """
    with tempfile.TemporaryDirectory(prefix=".checking-", dir=scratch or image.parent) as name:
        copy = Path(name) / "disk.raw"
        _convert(image, copy, source=format, format="raw")
        problem = _replay(copy) or _complaint(["e2fsck", "-fn", copy])
        found = records.parse(_content(copy, "/records"))
    return Verdict(last_record=found.last, problem=problem or found.problem)


def _replay(raw: Path) -> str | None:
    """Replay the journal. A file system that its kernel had marked as damaged is told apart.

    e2fsck -p repairs what needs no question, so it would hide such damage: the mark is read first.
    """
    state = process.run(["dumpe2fs", "-h", raw], timeout=_FSCK_TIMEOUT)
    if b"with errors" in state:
        return "the file system is marked as having errors"
    return _complaint(["e2fsck", "-p", raw], tolerated="exit status 1")


def _complaint(words: list[str | Path], *, tolerated: str = "") -> str | None:
    """Run a check; gives what it says if its status is not 0 (e2fsck: 1 corrected, 4 left, 8 failed).

    e2fsck complains on standard output, but an error's message is standard error: so they are joined.
    """
    try:
        program = process.find(str(words[0]))
        process.run(["sh", "-c", 'exec "$@" >&2', "sh", program, *words[1:]], timeout=_FSCK_TIMEOUT)
    except errors.ProgramFailed as error:
        return None if error.status == tolerated else f"{words[0]}: {error.status}: {error.message}"
    return None


def _content(raw: Path, path: str) -> bytes:
    """A file's content; empty if there is no such file (debugfs says so on standard error only)."""
    return process.run(["debugfs", "-R", f"cat {path}", raw], timeout=_FSCK_TIMEOUT)
