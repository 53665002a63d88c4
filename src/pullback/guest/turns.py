"""The counters that mode `turns` leaves on a raw disk, read on the host.

Counter n is a block of 4096 bytes at (n % 256) * spacing, where spacing = size / 256 in whole
blocks; the block begins and ends with "PBTURN %016d".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SLOTS = 256
_BLOCK = 4096
_MARK_SIZE = 23
_MARK = re.compile(rb"PBTURN (\d{16})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What stands on one disk."""

    #: The newest counter; 0 on a disk that was never written.
    newest: int
    #: Problems: counters that should stand there and do not, blocks half written.
    problems: tuple[str, ...]


def read(image: Path) -> Turns:
    """Read a raw image. At one instant a disk holds the newest counter and the 255 before it, all."""
    with image.open("rb") as disk:
        spacing = disk.seek(0, 2) // SLOTS // _BLOCK * _BLOCK
        slots = [_slot(disk, slot * spacing) for slot in range(SLOTS)]
    newest = max(counter or 0 for counter in slots)
    problems = [f"slot {slot} is half written" for slot in range(SLOTS) if slots[slot] is None]
    for counter in range(max(1, newest - SLOTS + 1), newest + 1):
        if slots[counter % SLOTS] not in (counter, None):
            problems.append(f"counter {counter} is missing; {slots[counter % SLOTS]} stands there")
    return Turns(newest=newest, problems=tuple(problems))


def _slot(disk: BinaryIO, offset: int) -> int | None:
    """The counter at `offset`: 0 if nothing was written, None if begin and end differ."""
    disk.seek(offset)
    block = disk.read(_BLOCK)
    begin, end = block[:_MARK_SIZE], block[-_MARK_SIZE:]
    if begin != end:
        return None
    match = _MARK.fullmatch(begin)
    return int(match[1]) if match else 0
