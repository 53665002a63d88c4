"""Pictures of a screen: PNG, made of what a QEMU before 7.1 gives (binary PPM). Pure."""

from __future__ import annotations

import re
import struct
import zlib

PNG = b"\x89PNG\r\n\x1a\n"
#: Bytes of a picture: 7680 by 4320 in three colours.
MAX_BYTES = 100_000_000
_MAX_SIDE = 16384
_PPM = re.compile(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s")


def is_png(data: bytes) -> bool:
    """Does it begin as one?"""
    return data.startswith(PNG)


def png(ppm: bytes) -> bytes:
    """The picture as PNG. Raises `ValueError` for what is no whole picture."""
    match = _PPM.match(ppm)
    if match is None:
        raise ValueError("no picture of the kind P6")
    width, height = int(match[1]), int(match[2])
    row = width * 3
    pixels = memoryview(ppm)[match.end() :]
    if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE) or len(pixels) != row * height:
        raise ValueError("the picture is not whole")
    lines = b"".join(b"\0" + pixels[start : start + row] for start in range(0, row * height, row))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG + _piece(b"IHDR", head) + _piece(b"IDAT", zlib.compress(lines)) + _piece(b"IEND", b"")


def _piece(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
