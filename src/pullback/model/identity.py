"""A new identity for a copy of a machine: what must differ so that both can run beside each other."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from pullback import errors
from pullback.model import hardware
from pullback.model.texts import is_showable

#: QEMU has no limit of its own; libvirt names files so (NAME_MAX, with room for what it adds).
_LONGEST = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a copy is called. Its network cards get addresses by `mac`, each asked for once."""

    name: str
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    #: The VM generation id (QEMU vmgenid.rst).
    generation: str = field(default_factory=lambda: str(uuid.uuid4()))

    def mac(self) -> str:
        """A new address."""
        return hardware.new_mac()


def named(name: str) -> Identity:
    """A new identity with that name. Raises `UsageError`."""
    if not name or name != name.strip() or "/" in name or not is_showable(name) or len(name.encode()) > _LONGEST:
        raise errors.UsageError(problem=f"{name!r} cannot name a machine")
    return Identity(name=name)
