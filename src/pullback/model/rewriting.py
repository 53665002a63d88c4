"""The value of an option of QEMU, so that one key of it can be changed and no other.

    -drive file=/srv/a,,b.qcow2,if=virtio        key=value, a comma in a value is doubled (QEMU, util/keyval.c)
    -blockdev {"driver": "file", …}              the same as JSON
    -device virtio-blk-pci,drive=disk            the first key may be left out: `driver`

Keys may come several times (`hostfwd`), so this is no mapping. Nothing here raises.
"""

from __future__ import annotations

import json
from collections.abc import Collection

#: The key of a first value that has none, by option.
_IMPLIED = {
    "blockdev": "driver",
    "chardev": "backend",
    "device": "driver",
    "machine": "type",
    "M": "type",
    "name": "guest",
    "net": "type",
    "netdev": "type",
    "nic": "type",
    "object": "qom-type",
    "tpmdev": "type",
}


class Properties:
    """Keys with values: `file.filename` is one inside of `file`."""

    def __init__(self, option: str, text: str) -> None:
        implied = _IMPLIED.get(option)
        self._json = _object(text)
        self._pairs = [] if self._json is not None else _pairs(text, implied)
        #: The first key, if it is not said.
        self._unsaid = None if text.startswith(f"{implied}=") else implied

    def get(self, key: str) -> str | None:
        """Its value as a text; None if there is none, or it is none."""
        value = dict(self._pairs).get(key) if self._json is None else self._inside(key)
        return value if isinstance(value, str) else None

    def _inside(self, key: str) -> object:
        value: object = self._json
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def is_on(self, key: str) -> bool:
        """Is it a switch that is on? (`server` alone is `server=on`.)"""
        value = dict(self._pairs).get(key, "off") if self._json is None else self._inside(key)
        return value in (None, True, "on", "yes", "true") and not (self._json is not None and value is None)

    def put(self, key: str, value: str) -> None:
        """Set a key, in its place if it is there. Of a key inside of another, that one must be there."""
        if self._json is not None:
            *above, last = key.split(".")
            holder = self._inside(".".join(above)) if above else self._json
            if isinstance(holder, dict):
                holder[last] = value
        elif key in (name for name, _ in self._pairs):
            self._pairs = [(name, value if name == key else old) for name, old in self._pairs]
        else:
            self._pairs.append((key, value))

    def keep(self, keys: Collection[str]) -> None:
        """Drop all others; `file.filename` is kept with `file`."""
        if self._json is not None:
            self._json = {key: value for key, value in self._json.items() if key in keys}
        self._pairs = [(key, value) for key, value in self._pairs if key.split(".")[0] in keys]

    def __str__(self) -> str:
        if self._json is not None:
            return json.dumps(self._json, ensure_ascii=False)
        return ",".join(self._part(number, *pair) for number, pair in enumerate(self._pairs))

    def _part(self, number: int, key: str, value: str | None) -> str:
        if value is None:
            return key.replace(",", ",,")
        doubled = value.replace(",", ",,")
        return doubled if number == 0 and key == self._unsaid else f"{key}={doubled}"


def _object(text: str) -> dict[str, object] | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _pairs(text: str, implied: str | None) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for number, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.partition("=")
        if equals:
            found.append((key, value.replace("\0", ",")))
        elif number == 0 and implied is not None:
            found.append((implied, key.replace("\0", ",")))
        else:  # a switch: `server`, `nowait`
            found.append((key.replace("\0", ","), None))
    return found
