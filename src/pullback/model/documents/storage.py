"""Where blocks go: the target of a push, the scratch of a pull, with labels and encryption.

JSON form of a place (`target`, `scratch`):

    {"file": "/srv/vda.qcow2"  or  "dev": "/dev/vg/lv"  or  "uri": "nbd://host/export",
     "seclabels": [{"model": "selinux", "relabel": false, "labelskip": true, "labels": ["…"]}],
     "encryption": {"format": "luks", "engine": "qemu",
                    "secret": {"type": "passphrase", "uuid": "…"  or  "usage": "…"},
                    "cipher": {"name": "aes", "size": 256, "mode": "cbc", "hash": "sha256"},
                    "ivgen": {"name": "plain64", "hash": "sha256"}}}
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pullback.model.documents import rules
from pullback.model.documents.fields import Fields

_MAX_KEY = (1 << 32) - 1


class StoreType(StrEnum):
    """What takes the blocks."""

    #: A file, made by us.
    FILE = "file"
    #: A block device, which must be there already.
    BLOCK = "block"
    #: An NBD server (ours alone: libvirt has only the other two). Only the target of a push.
    NETWORK = "network"


class Format(StrEnum):
    """Image formats that a push may name (libvirt, storagecommon.rng "storageFormat"). Most cannot be written."""

    RAW = "raw"
    QCOW2 = "qcow2"
    QCOW = "qcow"
    QED = "qed"
    VMDK = "vmdk"
    VDI = "vdi"
    VHD = "vhd"
    VPC = "vpc"
    LUKS = "luks"
    PLOOP = "ploop"
    COW = "cow"
    DMG = "dmg"
    ISO = "iso"
    BOCHS = "bochs"
    CLOOP = "cloop"
    DIR = "dir"
    FAT = "fat"


@dataclass(frozen=True, slots=True, kw_only=True)
class SecLabel:
    """A security label of an image. Exactly one of: relabel no; labelskip yes; one or more labels."""

    #: The security driver: selinux, dac; None: the first that there is.
    model: str | None = None
    relabel: bool | None = None
    labelskip: bool | None = None
    #: Several are allowed by the schema; libvirt uses the first.
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """The passphrase of an encrypted image, by its secret's UUID or usage, never itself."""

    type: str = "passphrase"
    uuid: str | None = None
    usage: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cipher:
    """The cipher of an encrypted image; mode and hash come together or not at all."""

    name: str
    #: Bits of the key.
    size: int
    mode: str | None = None
    hash: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ivgen:
    """How the initialisation vectors of an encrypted image are made."""

    name: str
    hash: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Encryption:
    """LUKS in an image that we make. Cipher and ivgen come together or not at all."""

    secret: Secret
    format: str = "luks"
    #: `qemu`, the only engine there is for it.
    engine: str | None = None
    cipher: Cipher | None = None
    ivgen: Ivgen | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Where blocks go: a file, a block device or an NBD server."""

    #: Absolute path of a file.
    file: str | None = None
    #: Absolute path of a block device.
    dev: str | None = None
    #: NBD URI.
    uri: str | None = None
    seclabels: tuple[SecLabel, ...] = ()
    encryption: Encryption | None = None

    @property
    def path(self) -> str | None:
        """Absolute path of whichever it is."""
        return self.file or self.dev


def store(fields: Fields, kind: StoreType) -> Store:
    """The place that `fields` describe, which must be of that kind."""
    wanted = {StoreType.FILE: "file", StoreType.BLOCK: "dev", StoreType.NETWORK: "uri"}[kind]
    for other in {"file", "dev", "uri"} - {wanted}:
        if fields.has(other):
            raise fields.bad(other, f"does not fit type {kind}")
    rule = rules.nbd_uri if kind is StoreType.NETWORK else rules.path
    given = fields.need(wanted, fields.text(wanted, rule))
    inner = fields.inner("encryption")
    found = Store(
        file=given if kind is StoreType.FILE else None,
        dev=given if kind is StoreType.BLOCK else None,
        uri=given if kind is StoreType.NETWORK else None,
        seclabels=_seclabels(fields),
        encryption=_encryption(inner) if inner else None,
    )
    fields.end()
    return found


def _seclabels(fields: Fields) -> tuple[SecLabel, ...]:
    """The labels; libvirt refuses two of one model."""
    found: list[SecLabel] = []
    for item in fields.items("seclabels"):
        label = _seclabel(item)
        if label.model is not None and label.model in {other.model for other in found}:
            raise item.bad("model", "stands twice")
        found.append(label)
    return tuple(found)


def _seclabel(fields: Fields) -> SecLabel:
    label = SecLabel(
        model=fields.text("model", rules.short),
        relabel=fields.flag("relabel"),
        labelskip=fields.flag("labelskip"),
        labels=fields.texts("labels", rules.words),
    )
    fields.end()
    # libvirt, domaincommon.rng "devSeclabel": three forms, and none of them says labelskip='no'.
    plain = label.relabel is not False and label.labelskip is None and bool(label.labels)
    off = label.relabel is False and label.labelskip is None and not label.labels
    skipped = label.relabel is None and label.labelskip is True and not label.labels
    if not (plain or off or skipped):
        raise fields.place.bad("needs exactly one of: labels, relabel=no, labelskip=yes")
    return label


def _encryption(fields: Fields) -> Encryption:
    fields.need("format", fields.text("format", rules.short))
    fields.word("format", "luks")
    fields.word("engine", "qemu")
    engine = "qemu" if fields.has("engine") else None
    secret = _secret(fields.need("secret", fields.inner("secret")))
    cipher, ivgen = fields.inner("cipher"), fields.inner("ivgen")
    if (cipher is None) != (ivgen is None):
        raise fields.bad("cipher" if cipher is None else "ivgen", "is missing: cipher and ivgen come together")
    found = Encryption(
        secret=secret,
        engine=engine,
        cipher=_cipher(cipher) if cipher else None,
        ivgen=_ivgen(ivgen) if ivgen else None,
    )
    fields.end()
    return found


def _secret(fields: Fields) -> Secret:
    fields.need("type", fields.text("type", rules.short))
    fields.word("type", "passphrase")
    secret = Secret(uuid=fields.text("uuid", rules.uuid), usage=fields.text("usage", rules.long))
    fields.end()
    if (secret.uuid is None) == (secret.usage is None):
        raise fields.place.bad("needs exactly one of uuid and usage")
    return secret


def _cipher(fields: Fields) -> Cipher:
    cipher = Cipher(
        name=fields.need("name", fields.text("name", rules.short)),
        size=fields.need("size", fields.integer("size", _MAX_KEY)),
        mode=fields.text("mode", rules.short),
        hash=fields.text("hash", rules.short),
    )
    fields.end()
    if (cipher.mode is None) != (cipher.hash is None):
        raise fields.place.bad("needs both of mode and hash, or none")
    return cipher


def _ivgen(fields: Fields) -> Ivgen:
    name = fields.need("name", fields.text("name", rules.short))
    ivgen = Ivgen(name=name, hash=fields.text("hash", rules.short))
    fields.end()
    return ivgen
