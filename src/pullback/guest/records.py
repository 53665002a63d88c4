"""The records that the small guest's writer appends, read on the host.

A record is a line of 40 bytes: "%010d %010d %08x %08x\\n": its number, counted from 1; the guest's
clock in seconds; a random mark; the CRC-32 of the 31 bytes before. The guest says a number only
when the record is durable, so a copy of its disk holds at least the records said before it.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

SIZE = 40
_COVERED = 31
_LINE = re.compile(rb"(\d{10}) \d{10} [0-9a-f]{8} ([0-9a-f]{8})\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What a file of records holds."""

    #: The last of the records that stand there, whole and without a gap, from 1.
    last: int
    #: What is wrong after it, or None. An incomplete record at the very end is not wrong.
    problem: str | None


def parse(content: bytes) -> Records:
    """The records of a file's `content`."""
    whole = len(content) // SIZE
    for index in range(whole):
        problem = _problem(content[index * SIZE : (index + 1) * SIZE], index + 1)
        if problem:
            return Records(last=index, problem=f"record {index + 1} {problem}")
    return Records(last=whole, problem=None)


def _problem(line: bytes, number: int) -> str | None:
    match = _LINE.fullmatch(line)
    if match is None:
        return "is no record"
    if int(match[2], 16) != zlib.crc32(line[:_COVERED]):
        return "has a wrong checksum"
    if int(match[1]) != number:
        return f"is numbered {int(match[1])}"
    return None
