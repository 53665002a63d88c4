"""The state of a machine's TPM in a restore point: values, and their JSON form.

    {"version": "2.0", "backend": "dir", "encrypted": false,
     "files": [{"name": "tpm2-00.permall", "size": 1315, "sha256": "<hex>"}]}      the bytes stand elsewhere

The files are those of swtpm, which emulates the TPM beside QEMU: of its backend `dir` they have swtpm's own
names; the one file of its backend `file` is called `tpm.state`. What is read is hostile until checked:
whatever breaks a rule is a `ValueError` that says which.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from pullback.model.description import Fields
from pullback.units import MiB

#: What swtpm's files can be called in its directory (swtpm 0.10, swtpm_nvfile.c): of a TPM 2 or a TPM 1.2.
FILES = re.compile(r"tpm2?-00\.(?:permall|volatilestate|savestate)")
#: What the file of swtpm's backend `file` is called here.
SINGLE = "tpm.state"
#: Bytes of one file. What never goes away of a TPM 2 has some 10 KiB, 180 KiB at most (libtpms, NV_MEMORY_SIZE).
MAX_FILE = 8 * MiB
#: Files of a TPM: one of each kind.
MAX_FILES = 3

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Backend(StrEnum):
    """How swtpm keeps the state."""

    #: `--tpmstate dir=DIR`: several files.
    DIR = "dir"
    #: `--tpmstate backend-uri=file://FILE`: one file.
    FILE = "file"


class Version(StrEnum):
    """Of the TPM's specification."""

    TPM_1_2 = "1.2"
    TPM_2_0 = "2.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmFileHeader:
    """A file of the state without its bytes."""

    name: str
    size: int
    #: Of its bytes, hex.
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmHeader:
    """The state without its bytes."""

    version: Version
    backend: Backend
    #: swtpm encrypts it with a key that is not in the restore point.
    encrypted: bool
    #: At least one, each name once.
    files: tuple[TpmFileHeader, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmFile:
    """A file of the state with its bytes."""

    name: str
    data: bytes

    @property
    def header(self) -> TpmFileHeader:
        """What is written beside the bytes."""
        return TpmFileHeader(name=self.name, size=len(self.data), sha256=hashlib.sha256(self.data).hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmState:
    """The state with its bytes."""

    version: Version
    backend: Backend
    encrypted: bool
    files: tuple[TpmFile, ...]

    @property
    def header(self) -> TpmHeader:
        """What is written beside the bytes."""
        return TpmHeader(
            version=self.version,
            backend=self.backend,
            encrypted=self.encrypted,
            files=tuple(file.header for file in self.files),
        )


def document(header: TpmHeader) -> dict[str, object]:
    """The header as plain JSON values."""
    return {
        "version": str(header.version),
        "backend": str(header.backend),
        "encrypted": header.encrypted,
        "files": [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in header.files],
    }


def parse(value: object, *, lenient: bool = False) -> TpmHeader:
    """The header that `document` wrote. `lenient`: keys that we do not know are ignored."""
    fields = Fields(value, "the TPM's state", lenient=lenient)
    version, backend = fields.text("version"), fields.text("backend")
    if version not in {str(known) for known in Version} or backend not in {str(known) for known in Backend}:
        raise ValueError("the TPM's state has a version or a backend that is none of the known words")
    found = TpmHeader(
        version=Version(version),
        backend=Backend(backend),
        encrypted=fields.flag("encrypted"),
        files=tuple(_file(item, lenient) for item in fields.items("files", MAX_FILES)),
    )
    fields.end()
    _agree(found)
    return found


def _file(value: object, lenient: bool) -> TpmFileHeader:
    fields = Fields(value, "a file of the TPM's state", lenient=lenient)
    found = TpmFileHeader(name=fields.text("name"), size=fields.size("size", MAX_FILE), sha256=fields.text("sha256"))
    fields.end()
    if not _SHA256.fullmatch(found.sha256):
        raise ValueError("the hash of a file of the TPM's state has a form that is not allowed")
    return found


def _agree(header: TpmHeader) -> None:
    """Names are those that swtpm gives: they become names of files again."""
    names = [file.name for file in header.files]
    if not names or len(set(names)) != len(names):
        raise ValueError("the TPM's state has no file, or one twice")
    single = header.backend is Backend.FILE
    if names != [SINGLE] if single else not all(FILES.fullmatch(name) for name in names):
        raise ValueError("a file of the TPM's state has a name that swtpm does not give")


def with_data(header: TpmHeader, load: Callable[[TpmFileHeader], bytes]) -> TpmState:
    """The state with its bytes, as `load` gives them, which are checked."""
    found = TpmState(
        version=header.version,
        backend=header.backend,
        encrypted=header.encrypted,
        files=tuple(TpmFile(name=file.name, data=load(file)) for file in header.files),
    )
    if found.header != header:
        raise ValueError("it is not what was stored")
    return found


def as_files(files: Mapping[str, bytes]) -> tuple[TpmFile, ...]:
    """Files by name as values, in the order of their names."""
    return tuple(TpmFile(name=name, data=data) for name, data in sorted(files.items()))
