"""swtpm: the emulator of a TPM beside QEMU. Facts from swtpm(8), version 0.7."""

from __future__ import annotations

import os
from pathlib import Path

from pullback import errors
from pullback.model.tpm import Backend, TpmState, Version
from pullback.programs import process

PROGRAM = "swtpm"


def installed() -> bool:
    """Is it there?"""
    try:
        process.find(PROGRAM)
    except errors.ProgramMissing:
        return False
    return True


def put(directory: Path, state: TpmState) -> None:
    """Write the state into a private directory that is there; what is there already (changed since) stays."""
    for file in state.files:
        path = directory / file.name
        if path.exists():
            continue
        beside = path.with_name(f"{file.name}.new")
        with open(beside, "wb", opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, 0o600)) as new:
            new.write(file.data)
            new.flush()
            os.fsync(new.fileno())
        beside.rename(path)


def argv(directory: Path, state: TpmState, *, control: Path, log: Path) -> list[str]:
    """The words that start it on that state. It ends when QEMU leaves its control channel, the socket `control`."""
    place = (
        f"dir={directory}" if state.backend is Backend.DIR else f"backend-uri=file://{directory / state.files[0].name}"
    )
    words = [process.find(PROGRAM), "socket", "--terminate", "--tpmstate", place]
    words += ["--ctrl", f"type=unixio,path={control},mode=0600", "--log", f"file={log}"]
    return [*words, "--tpm2"] if state.version is Version.TPM_2_0 else words
