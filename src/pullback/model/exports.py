"""Exports: where a frozen disk, or a disk, can be read over NBD."""

from __future__ import annotations

import enum
import socket as sockets
import urllib.parse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdAddress:
    """An export of an NBD server on a unix socket."""

    socket: Path
    #: The export's name, at most 4096 bytes (NBD protocol, "Naming").
    export: str = ""

    @property
    def uri(self) -> str:
        """The URI that `nbdinfo` and other clients accept (NBD URI specification)."""
        name = urllib.parse.quote(self.export, safe="")
        return f"nbd+unix:///{name}?socket={urllib.parse.quote(str(self.socket), safe='/')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdUri:
    """An export anywhere, as a user names it (NBD URI specification): `nbd://HOST/EXPORT`, `nbds://…`, `nbd+unix:///…`.

    With TLS, `tls-certificates=DIR` and `tls-psk-file=FILE` in it say what proves the two ends.
    """

    uri: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Where the frozen content of a disk can be read.

    What reads as zeroes is not asked of the snapshot but of the live disk, corrected by scratch: a
    range that the disk now shows as a hole, and of which scratch holds no data, was a hole at that
    instant; and a hole made since then was copied to scratch before it was made. So the answer is
    right on builds whose snapshot-access answers wrongly too.
    """

    #: Bytes of the disk.
    size: int
    #: The data: an NBD export, or the path of a file (a FUSE export, for disks in an iothread of a
    #: QEMU that dies of NBD clients there).
    data: NbdAddress | Path
    #: No read may cross a multiple of this many bytes (a defect of certain builds); None: no limit.
    request_limit: int | None = None
    #: The metadata context of `data` that tells (by 64 KiB) where a read that did cross one may have been
    #: answered wrongly, asked after the read; None: it is not told.
    copied_context: str | None = None
    #: Where holes are told; None: nowhere, everything must be read.
    allocation: NbdAddress | Path | None = None
    #: The scratch image that corrects it (a raw local file), or None if it needs no correction.
    scratch: Path | None = None
    #: Where the changed blocks are told, if they are.
    changes: NbdAddress | None = None
    #: The metadata context there: `qemu:dirty-bitmap:NAME`.
    changes_context: str | None = None
    #: Ranges that were read may be discarded in multiples of this, to free scratch; None: never.
    trim_unit: int | None = None


# -- for others ------------------------------------------------------------------------------


class TlsKind(enum.StrEnum):
    """How the two ends of a TLS connection prove who they are."""

    #: Certificates, the client's too (QEMU tls-creds-x509, verify-peer).
    X509 = "x509"
    #: Keys that both know (QEMU tls-creds-psk).
    PSK = "psk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """What an NBD server uses for TLS."""

    kind: TlsKind
    #: x509: ca-cert.pem, server-cert.pem, server-key.pem; psk: keys.psk. As QEMU sees it.
    directory: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Where an NBD server is wanted: a unix socket, or a host with TLS."""

    #: None and no host: our own private socket.
    socket: Path | None = None
    host: str | None = None
    #: None: a free one.
    port: int | None = None
    tls: Tls | None = None
    #: TCP without TLS shows the disks to whoever can connect.
    insecure: bool = False
    #: So many clients at a time; None: as QEMU has it.
    max_connections: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAddress:
    """Where an NBD server listens: `socket`, or `host` and `port`."""

    socket: str | None = None
    host: str | None = None
    port: int | None = None
    tls: TlsKind | None = None

    def uri(self, export: str) -> str:
        """The URI of an export there, as `nbdinfo` takes it (NBD URI specification)."""
        name = urllib.parse.quote(export, safe="")
        if self.socket is not None:
            return f"nbd+unix:///{name}?socket={urllib.parse.quote(self.socket, safe='/')}"
        scheme = "nbd" if self.tls is None else "nbds"
        host = sockets.gethostname() if self.host in ("0.0.0.0", "::") else str(self.host)
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}/{name}"

    def __str__(self) -> str:
        if self.socket is not None:
            return f"unix:{self.socket}"
        return f"{self.host}:{self.port}" + (f" (TLS, {self.tls})" if self.tls else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """An export for others: a disk, or a disk in a snapshot."""

    #: QEMU's id of it.
    id: str
    #: The job (a snapshot's, or the export's own) that it ends with.
    job: str
    #: The NBD name.
    name: str
    target: str
    #: Name of the snapshot; None: the disk itself, as it is being written.
    snapshot: str | None = None
    writable: bool = False
    #: The metadata contexts that tell changes: context -> the checkpoint since which.
    contexts: tuple[tuple[str, str], ...] = ()
    address: ServerAddress

    @property
    def uri(self) -> str:
        """What an NBD client takes."""
        return self.address.uri(self.name)
