"""Which restore point a user means: an id, the start of one, `latest`, or a date. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pullback import errors

#: The word for the newest point.
LATEST = "latest"

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TIME = re.compile(_DATE.pattern + r"[ T][0-9]{2}:[0-9]{2}(:[0-9]{2})?(Z|[+-][0-9]{2}:[0-9]{2})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A point that could be meant, damaged or not."""

    #: Its machine.
    machine: str
    #: Its id.
    id: str
    #: When it was made (UTC); of a damaged one, the second that its id names.
    created: datetime


def choose(candidates: Sequence[Candidate], text: str, *, machine: str | None, repository: str) -> Candidate:
    """The one that `text` means.

    A damaged point can be chosen, so that the caller fails loudly: to give the one before it in
    place of the latest would be to lie. With several machines among the candidates and none named,
    `latest` and dates are ambiguous.

    Raises `NoPoints` without candidates, `UnknownPoint`, `AmbiguousPoint`.
    """
    if not candidates:
        raise errors.NoPoints(path=repository, of_machine=f" of {machine}" if machine else "")
    moment = _moment(text, repository)
    if moment is None:
        return _by_prefix(candidates, text, repository)
    machines = sorted({candidate.machine for candidate in candidates})
    if len(machines) > 1:
        raise errors.AmbiguousPoint(point=text, candidates=_some([f"one of {name}" for name in machines]))
    return _last_before(candidates, moment, text, repository)


def is_prefix(text: str) -> bool:
    """Does it mean an id, rather than a time?"""
    return text != LATEST and not _DATE.fullmatch(text) and not _TIME.fullmatch(text)


def _by_prefix(candidates: Sequence[Candidate], text: str, repository: str) -> Candidate:
    found = [candidate for candidate in candidates if text and candidate.id.lower().startswith(text.lower())]
    if not found:
        raise errors.UnknownPoint(point=text, repository=repository)
    if len(found) > 1:
        raise errors.AmbiguousPoint(point=text, candidates=_some(sorted(candidate.id for candidate in found)))
    return found[0]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _last_before(candidates: Sequence[Candidate], moment: datetime, text: str, repository: str) -> Candidate:
    # People copy a time from a listing, which shows whole seconds: the point's own must fit.
    fitting = [candidate for candidate in candidates if candidate.created.replace(microsecond=0) <= moment]
    if not fitting:
        raise errors.UnknownPoint(point=text, repository=repository)
    return max(fitting, key=lambda candidate: (candidate.created, candidate.id))


def _moment(text: str, repository: str) -> datetime | None:
    """The instant that `text` names (`latest`: the end of time), or None if it is no date."""
    if text == LATEST:
        return datetime.max.replace(tzinfo=UTC)
    try:
        if _DATE.fullmatch(text):
            # The next midnight of the local clock, found before the zone: days of 23 hours exist.
            midnight = datetime.fromisoformat(text) + timedelta(days=1)
            return midnight.astimezone(UTC) - timedelta(microseconds=1)
        return datetime.fromisoformat(text).astimezone(UTC) if _TIME.fullmatch(text) else None
    except (ValueError, OverflowError) as error:
        raise errors.UnknownPoint(point=text, repository=repository) from error
