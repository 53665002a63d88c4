"""docs/exit-codes.md, made from `pullback.errors`.

    python -m pullback.cli.exitcodes          print it
    python -m pullback.cli.exitcodes FILE     write it

What goes wrong is listed by hand (`MISHAPS`); its sentence, hint and exit code come from the error
class. tests/story/test_errors_table.py makes each of them happen, and compares.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pullback import errors
from pullback.cli import pages
from pullback.errors import Exit, PullbackError

_TOP = """\
# Exit codes and errors

<!-- Written by `make docs` from src/pullback/errors/. Do not edit it here. -->

A command that fails prints one sentence on standard error, and below it a hint where there is a remedy:

    pullback: There is no repository at /srv/backup.
      hint: Check -r; `pullback backup` creates a dir: repository at its first run.

With `--json` the last line on standard output is the same as an object, with a stable `code` and the facts:

    {"type": "error", "code": "no-repository", "message": "There is no repository at /srv/backup.",
     "hint": "Check -r; …", "facts": {"path": "/srv/backup"}, "notes": [], "exit_code": 10}

Exit codes and the codes of errors do not change within a major version. Sentences may.
"""
_MISHAPS = """\
## What goes wrong

Words in capitals stand for what you named. Each line is tried by a test.
"""
_CLASSES = """\
## All errors

Names in braces are the facts, which `--json` gives under `facts`. A wrong option or a missing argument is told by
a usage text, and ends with 2 as well.
"""


@dataclass(frozen=True, slots=True)
class Mishap:
    """Something that goes wrong for users: in words, and the error that they see."""

    what: str
    error: PullbackError


def _monitor() -> Iterator[Mishap]:
    yield Mishap("No socket at that path", errors.UnreachableError(socket="SOCKET", reason="No such file or directory"))
    yield Mishap(
        "Nothing listens at the socket (the machine is off)",
        errors.UnreachableError(socket="SOCKET", reason="Connection refused"),
    )
    yield Mishap(
        "The socket of another program",
        errors.NotQmp(socket="SOCKET", reason="what answers there greets otherwise"),
    )
    yield Mishap(
        "A socket whose program hangs up at once",
        errors.NotQmp(socket="SOCKET", reason="it closed the connection without a greeting"),
    )
    yield Mishap(
        "The socket of `-monitor`, for people",
        errors.NotQmp(socket="SOCKET", reason="what answers there greets otherwise"),
    )
    yield Mishap("A monitor that another client holds", errors.MonitorBusy(socket="SOCKET", seconds=3))
    yield Mishap("A monitor of another user", errors.PermissionDenied(path="SOCKET"))
    yield Mishap("A machine that libvirt manages", errors.ForeignManager(socket="SOCKET", manager="libvirt"))
    yield Mishap("QEMU without `-name` and `-uuid`", errors.MachineUnnamed(socket="SOCKET"))
    yield Mishap(
        "A second pullback on the same machine",
        errors.BusyError(what="the machine at SOCKET", holder="COMMAND, process NUMBER, since TIME"),
    )


def _configuration() -> Iterator[Mishap]:
    yield Mishap(
        "A bare word for a machine, and no configuration",
        errors.NotConfigured(kind="machine", name="web01", path="CONFIG", known="There is no such file."),
    )
    yield Mishap(
        "A machine that is not configured",
        errors.NotConfigured(kind="machine", name="web1", path="CONFIG", known="There are: db01, web01."),
    )
    yield Mishap(
        "A repository that is not configured",
        errors.NotConfigured(kind="repository", name="mian", path="CONFIG", known="There are: main."),
    )
    yield Mishap(
        "A key that is not known",
        errors.BadConfig(
            path="CONFIG",
            key="machines.web01.scrach",
            problem="is no key that is known here",
            way_out="Did you mean scratch?",
        ),
    )
    yield Mishap(
        "A configuration that every user can change",
        errors.BadConfig(
            path="CONFIG", key="the file", problem="can be changed by every user", way_out="chmod o-w CONFIG"
        ),
    )
    yield Mishap(
        "A hook that fails before a backup",
        errors.HookFailed(hook="pre", machine="web01", problem="false ended with exit status 1"),
    )


def _machine() -> Iterator[Mishap]:
    yield Mishap(
        "A disk that the machine does not have", errors.UnknownDisk(target="vdz", where="web01", known="DISKS")
    )
    yield Mishap("Every disk excluded", errors.NoDisks(machine="web01"))
    yield Mishap("Another program uses QEMU's NBD server", errors.NbdServerBusy(detail="it runs without exports"))
    yield Mishap("Another job runs on a disk", errors.DiskBusy(target="vda", holder="the mirror job JOB"))
    yield Mishap(
        "Scratch on a file system that is not local",
        errors.ScratchUnsuitable(path="DIR", reason="its file system 'proc' is not a local one"),
    )
    yield Mishap("Scratch with too little room", errors.ScratchSpace(path="DIR", free="FREE", needed="1.00 GiB"))


def _images() -> Iterator[Mishap]:
    yield Mishap("Images without `--name`", errors.ImagesUnnamed())
    yield Mishap("An image that is not there", errors.ImageUnusable(path="IMAGE", reason="No such file or directory"))
    yield Mishap(
        "An image that a running machine, or another program, has open",
        errors.BusyError(what="IMAGE", holder="it is in use by another process"),
    )
    yield Mishap(
        "An image over a backing file, and its format is not given",
        errors.ImageUnusable(
            path="IMAGE",
            reason="it looks like a qcow2 image over another file, which the guest of a raw disk could feign",
            way_out="If it really is one, say so: vda=qcow2:IMAGE",
        ),
    )


def _checkpoints() -> Iterator[Mishap]:
    yield Mishap("A checkpoint that is not there", errors.NoCheckpoint(checkpoint="monday", machine="web01"))
    yield Mishap(
        "A new checkpoint with the name of another", errors.CheckpointExists(checkpoint="monday", machine="web01")
    )
    yield Mishap(
        "A saved checkpoint whose bitmap is not on the disk",
        errors.CheckpointInconsistent(checkpoint="tuesday", target="vda", problem="it has no bitmap"),
    )
    yield Mishap(
        "A disk that cannot be tracked",
        errors.Unsupported(what="a checkpoint of disk vdb", reason="its format raw cannot hold bitmaps"),
    )


def _repository() -> Iterator[Mishap]:
    yield Mishap(
        "A directory with something else in it",
        errors.NotARepository(path="DIR", problem="there is no pullback.json"),
    )
    yield Mishap(
        "The directory above is not there",
        errors.CannotWrite(path="DIR/repo", reason="there is no directory DIR (is its file system mounted?)"),
    )
    yield Mishap("No repository at that place", errors.NoRepository(path="DIR"))
    yield Mishap("A repository of a later Pullback", errors.RepositoryTooNew(path="DIR", found=99, known=1))
    yield Mishap("A repository of another user", errors.PermissionDenied(path="DIR"))
    yield Mishap("A wrong password", errors.WrongPassword(path="REPO"))
    yield Mishap("A damaged file in a repository", errors.RepositoryDamaged(file="FILE", problem="PROBLEM"))
    yield Mishap(
        "A file of a repository that is a symbolic link",
        errors.ObjectDamaged(store="REPO", name="config", problem="it is a symbolic link"),
    )
    yield Mishap("`init` where a repository is", errors.RepositoryExists(path="REPO"))
    yield Mishap(
        "`forget` of a `dir:` repository",
        errors.Unsupported(
            what="`pullback forget` of dir:DIR",
            reason="it keeps chains of images, each of which builds on the one before",
            way_out="`pullback backup --level full` begins a new chain; a repository made by `pullback init` has none.",
        ),
    )
    yield Mishap(
        "`forget` without a rule, and nothing is configured",
        errors.UsageError(
            problem="Nothing says what to keep: --keep-last N and the like, `keep` in the configuration, or name points"
        ),
    )
    yield Mishap(
        "A backup that runs while `forget` should",
        errors.BusyError(what="the repository REPO", holder="HOLDER"),
    )
    yield Mishap("A repository without restore points", errors.NoPoints(path="DIR"))
    yield Mishap("A machine without restore points", errors.NoPoints(path="DIR", of_machine=" of db01"))
    yield Mishap("The repository's file system is full", errors.DestinationFull(path="FILE"))


_NO_KEYS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile of ~/.aws/credentials."


def _stores() -> Iterator[Mishap]:
    yield Mishap("No password for the repository", errors.NoPassword(repository="DIR"))
    yield Mishap(
        "A file with the password that is not there",
        errors.PasswordUnavailable(source="The file FILE (PULLBACK_PASSWORD_FILE)", reason="No such file or directory"),
    )
    yield Mishap(
        "A command for the password that fails",
        errors.PasswordUnavailable(source="PULLBACK_PASSWORD_COMMAND", reason="it ended with status 1"),
    )
    yield Mishap(
        "No keys for a bucket",
        errors.StoreRefused(store="REPO", what="access", reason="there are no credentials", way_out=_NO_KEYS),
    )
    yield Mishap(
        "Keys that the bucket's server does not accept",
        errors.StoreRefused(store="REPO", what="reading config", reason="REASON (InvalidAccessKeyId)"),
    )
    yield Mishap(
        "A bucket's server that answers with an error",
        errors.StoreFailed(store="REPO", what="reading config", reason="REASON"),
    )
    yield Mishap("A bucket that is not there", errors.NoRepository(path="REPO (there is no bucket BUCKET)"))
    yield Mishap(
        "A bucket in another region",
        errors.StoreRefused(
            store="REPO",
            what="reading config",
            reason="it redirects, which tells of a wrongly configured region",
            way_out="Set AWS_DEFAULT_REGION to the region of the bucket.",
        ),
    )
    yield Mishap(
        "A server without TLS at an address with https",
        errors.StoreUnreachable(store="REPO", reason="it does not speak TLS (http:// instead of https://?)"),
    )


def _points() -> Iterator[Mishap]:
    yield Mishap("An id or date that fits no point", errors.UnknownPoint(point="1999-12-31", repository="DIR"))
    yield Mishap("The start of several ids", errors.AmbiguousPoint(point="2", candidates="IDS"))
    yield Mishap(
        "`latest`, with several machines in the repository",
        errors.AmbiguousPoint(point="latest", candidates="one of db01, one of web01"),
    )
    yield Mishap(
        "A disk that the restore point does not have",
        errors.UnknownDisk(target="vdz", where="restore point ID", known="vda, vdb"),
    )
    yield Mishap(
        "A format that cannot be written",
        errors.UsageError(problem="'vmdk' is no format that a disk can be written as; there are raw and qcow2"),
    )
    yield Mishap("A file where the disk would be restored to", errors.DestinationExists(path="FILE"))
    yield Mishap("`--to` below a file", errors.CannotWrite(path="DIR", reason="a file is in its place or above it"))
    yield Mishap(
        "A block device as the place of a disk, without `--force`",
        errors.DestinationUnusable(
            place="DEVICE",
            target="vda",
            reason="all that is on this block device would be lost",
            way_out="If that is meant, say --force.",
        ),
    )
    yield Mishap(
        "An NBD server that is too small for the disk",
        errors.DestinationUnusable(place="URI", target="vda", reason="it has 4194304 bytes, and the disk 8388608"),
    )
    yield Mishap(
        "A server that forgets what it was given (`--check`)",
        errors.DestinationDiffers(place="URI", problem="PROBLEM"),
    )
    yield Mishap("No room for the restored disk", errors.DestinationFull(path="FILE"))
    yield Mishap("A restore point that is damaged", errors.VerificationFailed(point="ID", problem="PROBLEM"))


def _looking() -> Iterator[Mishap]:
    yield Mishap(
        "`files get` without a path",
        errors.UsageError(problem="Say which file or directory: vda1:/etc/hosts, or /etc/hosts"),
    )
    yield Mishap(
        "A partition that the restore point does not have",
        errors.UnknownVolume(volume="vda9", point="ID", known="vda, vdb"),
    )
    yield Mishap(
        "A disk without a file system",
        errors.VolumeUnreadable(volume="vdb", reason="nothing that is known"),
    )
    yield Mishap(
        "A path without a volume, where no file system tells its place",
        errors.NoRoot(path="/etc/hosts", point="ID", reason="no file system has an /etc/fstab"),
    )
    yield Mishap(
        "`prove --newest` without `--all`",
        errors.UsageError(problem="--newest goes with --all; without both, the newest point is `latest`"),
    )


def _booting() -> Iterator[Mishap]:
    yield Mishap(
        "A file where the disk of a machine that is booted would be",
        errors.DestinationUnusable(
            place="FILE", target="vda", reason="it exists already", way_out="Name another directory with --to."
        ),
    )
    yield Mishap(
        "A machine that had more memory than this host has",
        errors.NotEnoughMemory(machine="web01", wanted="60.0 TiB", free="FREE"),
    )
    yield Mishap(
        "A network that does not exist",
        errors.UsageError(problem="'lan' is no network; there are none, isolated, user and bridge=NAME"),
    )
    yield Mishap(
        "A machine that is booted already, by a command that is at it",
        errors.BusyError(what="DIR", holder="boot, process PID, since TIME"),
    )


def _rolling_back() -> Iterator[Mishap]:
    yield Mishap(
        "A disk that has another size than the restore point's",
        errors.DisksDiffer(machine="web01", point="ID", problem="vda has 9437184 bytes, and had 8388608 then"),
    )
    yield Mishap(
        "A machine that has a disk which the restore point does not have",
        errors.DisksDiffer(
            machine="web01",
            point="ID",
            problem="the restore point does not have its disk vdb",
            way_out="Name the disks that are to be rolled back with --disk; the others are left as they are.",
        ),
    )
    yield Mishap(
        "A QEMU that ends when it is reset",
        errors.Unsupported(
            what="rolling back",
            reason="the machine must be reset for it, and this QEMU ends at a reset (-no-reboot)",
            way_out="With --after quit it is rolled back, and then ended.",
        ),
    )
    yield Mishap(
        "Too little room for what is to be written",
        errors.StagingSpace(path="DIR", free="4.00 MiB", needed="NEEDED"),
    )
    yield Mishap(
        "An image that cannot be written while it is rolled back",
        errors.RollbackUnfinished(
            machine="web01", point="ID", reason="There is no room left for disk vda", command="COMMAND"
        ),
    )
    yield Mishap(
        "Any command on disks that are half rolled back",
        errors.RollbackPending(machine="web01", point="ID", command="COMMAND"),
    )
    yield Mishap(
        "A journal of a rollback that was damaged",
        errors.JournalDamaged(path="FILE", problem="PROBLEM"),
    )


#: Where things go wrong -> what, in the order of the page.
MISHAPS: dict[str, tuple[Mishap, ...]] = {
    "Reaching the machine": tuple(_monitor()),
    "The configuration and hooks": tuple(_configuration()),
    "The machine, its disks, and scratch": tuple(_machine()),
    "Machines that are off": tuple(_images()),
    "Checkpoints": tuple(_checkpoints()),
    "The repository": tuple(_repository()),
    "Passwords and buckets": tuple(_stores()),
    "Restore points, and where they go": tuple(_points()),
    "Files of restore points, and proofs": tuple(_looking()),
    "Rolling back": tuple(_rolling_back()),
    "Machines that are booted": tuple(_booting()),
}


def page() -> str:
    """The whole page."""
    parts = [
        _TOP,
        "## Exit codes\n",
        pages.table(("code", "meaning"), ((str(int(code)), code.meaning) for code in Exit)),
    ]
    parts.append(_MISHAPS)
    for place, mishaps in MISHAPS.items():
        header = ("what goes wrong", "what Pullback says", "hint", "exit")
        parts += [f"### {place}\n", pages.table(header, map(_mishap_row, mishaps))]
    parts += [
        _CLASSES,
        pages.table(("code", "exit", "sentence", "hint", "meaning"), map(_class_row, errors.catalogue())),
    ]
    return "\n".join(parts)


def _mishap_row(mishap: Mishap) -> Sequence[str]:
    error = mishap.error
    return mishap.what, str(error), error.hint or "", str(int(error.exit_code))


def _class_row(kind: type[PullbackError]) -> Sequence[str]:
    meaning = (inspect.getdoc(kind) or "").splitlines()[0]
    return f"`{kind.code}`", str(int(kind.exit_code)), _template(kind.sentence), _template(kind.remedy or ""), meaning


def _template(text: str) -> str:
    """A template without the marks of Python's formatting: {url!r} is {url}."""
    return re.sub(r"\{(\w+)[^}]*\}", r"{\1}", text)


def main() -> None:
    """Print the page, or write it to the file that is named."""
    pages.give(page())


if __name__ == "__main__":
    main()
