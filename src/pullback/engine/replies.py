"""Reading QMP replies, which are outside input: shapes are checked, never assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pullback import errors

#: No disk that QEMU can have is larger (BDRV_MAX_LENGTH is below 2^63).
_SIZE_LIMIT = 2**63


def mapping(value: object, what: str) -> Mapping[str, object]:
    """`value` as an object, or `BadReply`."""
    if not isinstance(value, Mapping):
        raise _bad(what, "an object", value)
    return value


def sequence(value: object, what: str) -> Sequence[object]:
    """`value` as a list, or `BadReply`."""
    if not isinstance(value, list):
        raise _bad(what, "a list", value)
    return value


def objects(value: object, what: str) -> list[Mapping[str, object]]:
    """`value` as a list of objects, or `BadReply`."""
    return [mapping(item, what) for item in sequence(value, what)]


def text(record: Mapping[str, object], key: str, what: str) -> str:
    """A member that must be a string."""
    value = record.get(key)
    if not isinstance(value, str):
        raise _bad(f"{what}.{key}", "a string", value)
    return value


def optional_text(record: Mapping[str, object], key: str) -> str:
    """A member that may be missing; "" then."""
    value = record.get(key)
    return value if isinstance(value, str) else ""


def integer(record: Mapping[str, object], key: str, what: str) -> int:
    """A member that must be a size or count: an integer, not negative."""
    value = record.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _SIZE_LIMIT:
        raise _bad(f"{what}.{key}", "a size", value)
    return value


def flag(record: Mapping[str, object], key: str) -> bool:
    """A member that is true, false or missing (false)."""
    return record.get(key) is True


def _bad(what: str, wanted: str, value: object) -> errors.BadReply:
    return errors.BadReply(who="QEMU", problem=f"{what} is not {wanted}: {str(value)[:80]!r}")
