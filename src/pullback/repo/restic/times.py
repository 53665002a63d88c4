"""Times as Go writes them: RFC 3339 with up to nine digits after the second, and a zone.

Texts are kept as they are, since Python's times end at microseconds.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?(?:Z|([+-])([0-9]{2}):([0-9]{2}))"
)


def write(moment: datetime) -> str:
    """A time with its zone, as Go writes it: no zeroes at the end of a fraction, Z for UTC.

    Raises `ValueError` if it has no zone.
    """
    if moment.tzinfo is None:
        raise ValueError("a time without a zone")
    fraction = f".{moment.microsecond:06}".rstrip("0").rstrip(".")
    zone = moment.isoformat()[-6:]
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}{'Z' if zone == '+00:00' else zone}"


def read(text: str) -> datetime:
    """The moment, in UTC, cut to microseconds. Raises `ValueError` if `text` is none."""
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no time")
    zone = UTC
    if match[3]:
        offset = timedelta(hours=int(match[4]), minutes=int(match[5]))
        zone = timezone(-offset if match[3] == "-" else offset)
    try:
        moment = datetime.strptime(match[1], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=zone)
        return (moment + timedelta(microseconds=int((match[2] or "").ljust(6, "0")[:6]))).astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"{text!r} is beyond all times") from error
