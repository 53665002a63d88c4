"""Sizes: constants, reading them from people, writing them for people. Bytes everywhere else."""

from __future__ import annotations

import re

from pullback import errors

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

_SUFFIXES = {"": 1, "k": KiB, "m": MiB, "g": GiB, "t": TiB, "p": 1024 * TiB}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kmgtp]?)(?:i?b)?\s*", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes meant by "10M", "1.5 GiB" or "4096"; suffixes are powers of 1024.

    Raises `UsageError` if it is no size.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise errors.UsageError(problem=f"{text!r} is no size; write it like 512M or 1.5G")
    number, unit = match[1], _SUFFIXES[match[2].lower()]
    return int(float(number) * unit) if "." in number else int(number) * unit


def format_size(size: int) -> str:
    """Three significant digits and a unit: 0 B, 64.0 KiB, 1.25 GiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024 or unit == "PiB":
            break
        value /= 1024
    if unit == "B":
        return f"{size} B"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {unit}"


def format_duration(seconds: float) -> str:
    """4.9 ms, 1.25 s, 3 min 20 s."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def round_down(value: int, unit: int) -> int:
    """The largest multiple of `unit` that is not above `value`."""
    return value // unit * unit
