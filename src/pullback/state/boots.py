"""A machine that was started from a restore point, as long as it needs that: the record of it.

    TO/boot.json           the record, written and synced before anything else is made
    TO/<target>.qcow2      the disks: overlays at first, whole at the end
    TO/firmware/           flash memory, kept as files from then on
    TO/tpm/                the state of its TPM, likewise
    TO/start.sh            the command that starts the machine, for people
    TO/qemu.log            what QEMU says
    TO/console.log         what its first serial port says
    RUNTIME/boot-<hash>/   sockets: of the restore point's server, the monitors, the agent, the screen

The record stands with the disks, so whoever has them has all that is needed to go on. The directory is
ours alone (0700): what is read here is believed, but checked for its form.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pullback import errors, state
from pullback.model.texts import is_showable, is_target

FORMAT = 1
_LIMIT = 1 << 20
_FILE = "boot.json"
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What must be known to go on."""

    #: The restore point's id.
    point: str
    #: Where it is, as a text without secrets.
    repository: str
    #: The disks.
    targets: tuple[str, ...]
    #: Name, uuid and addresses of network cards that the machine was given.
    name: str
    uuid: str | None
    macs: tuple[str, ...]
    #: The QEMU process, as `<pid>:<start time>`; "" before it was started.
    qemu: str = ""


class Berth:
    """The directory of a machine that is booted: where everything of it lies."""

    def __init__(self, directory: Path, runtime: Path) -> None:
        """`runtime`: the directory of runtime files as a whole."""
        self.directory = directory
        digest = hashlib.sha256(os.fsencode(directory)).hexdigest()
        #: Where its sockets are.
        self.runtime = runtime / f"boot-{digest[:8]}"

    def image(self, target: str) -> Path:
        """The disk."""
        return self.directory / f"{target}.qcow2"

    @property
    def firmware(self) -> Path:
        """Flash memory."""
        return self.directory / "firmware"

    @property
    def tpm(self) -> Path:
        """The TPM's state."""
        return self.directory / "tpm"

    @property
    def tpm_control(self) -> Path:
        """The socket of the TPM's emulator."""
        return self.runtime / "tpm.sock"

    @property
    def tpm_log(self) -> Path:
        """What the TPM's emulator says."""
        return self.directory / "tpm.log"

    @property
    def script(self) -> Path:
        """The command that starts the machine."""
        return self.directory / "start.sh"

    @property
    def log(self) -> Path:
        """What QEMU says."""
        return self.directory / "qemu.log"

    @property
    def console(self) -> Path:
        """What the first serial port says."""
        return self.directory / "console.log"

    @property
    def served(self) -> Path:
        """The directory of the restore point's server; it is at `nbd.sock` in there."""
        return self.runtime / "point"

    @property
    def monitor(self) -> Path:
        """The monitor for the user."""
        return self.runtime / "qmp.sock"

    @property
    def own_monitor(self) -> Path:
        """The monitor that we use."""
        return self.runtime / "own.sock"

    @property
    def agent(self) -> Path:
        """The guest agent."""
        return self.runtime / "agent.sock"

    @property
    def screen(self) -> Path:
        """A VNC server."""
        return self.runtime / "vnc.sock"

    @property
    def sockets(self) -> tuple[Path, ...]:
        """Those that QEMU makes."""
        return (self.monitor, self.own_monitor, self.agent, self.screen)

    # -- the record ----------------------------------------------------------------------

    @property
    def record(self) -> Path:
        """Where it is."""
        return self.directory / _FILE

    def load(self) -> Boot | None:
        """What was begun here; None if nothing was. Raises `CannotWrite` for a record that is none of ours."""
        try:
            status = self.record.lstat()
            content = self.record.read_bytes()[:_LIMIT]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as error:
            raise errors.PermissionDenied(path=str(self.record)) from error
        strange = not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022
        found = None if strange else _parsed(content)
        if found is None:
            raise errors.CannotWrite(path=str(self.record), reason="it is there, and is no record of ours")
        return found

    def save(self, boot: Boot) -> None:
        """Durable when it returns."""
        state.write_durably(self.record, {"format": FORMAT, **asdict(boot)})

    def forget(self) -> None:
        """The machine needs its restore point no more."""
        self.record.unlink(missing_ok=True)
        state.sync_directory(self.directory)


def _parsed(content: bytes) -> Boot | None:
    try:
        values = json.loads(content)
        if values.pop("format") != FORMAT or set(values) != {field.name for field in fields(Boot)}:
            return None
        for name in ("targets", "macs"):
            values[name] = tuple(values[name])
        found = Boot(**values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return found if _plausible(found) else None


def _plausible(boot: Boot) -> bool:
    texts = (boot.point, boot.repository, boot.name, boot.qemu)
    return (
        all(isinstance(text, str) and is_showable(text) for text in texts)
        and all(isinstance(target, str) and is_target(target) for target in boot.targets)
        and len(set(boot.targets)) == len(boot.targets) > 0
        and all(isinstance(mac, str) and _MAC.fullmatch(mac) for mac in boot.macs)
        and (boot.uuid is None or (isinstance(boot.uuid, str) and bool(_UUID.fullmatch(boot.uuid))))
    )
