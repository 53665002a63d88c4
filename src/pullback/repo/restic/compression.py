"""zstd, through the interface of Python 3.14's standard library ("Pack Format", "Unpacked Data Format").

What is decompressed is bounded before any of it is believed: by the length that the index or the
pack's header tells, or by a limit. Chunks go through the system's library where it is (`libzstd`).
"""

from __future__ import annotations

import sys

from pullback import errors
from pullback.repo.restic import libzstd
from pullback.repo.restic.types import Buffer
from pullback.units import KiB

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: zstd's level for disks' data (programs, in pieces of 1 MiB, libzstd 1.5.4: 2.29 ms and 36.5 % of the length).
#: Level 3 takes 1.9 times as long and gives 34.1 %; -1 takes an eighth less and gives 40.0 %. Larger or smaller
#: tables, and other lengths of the shortest match, gain nothing on both sides.
LEVEL = 1

_SAMPLES = 16
_SAMPLE = KiB
_INCOMPRESSIBLE = 0.985
#: A decoder's window: what zstd uses at its higher levels, whatever the content's length.
_MIN_WINDOW_LOG = 25
_MAX_WINDOW_LOG = 29


def compress(data: Buffer, level: int = LEVEL) -> bytes:
    """One zstd frame that tells its content's length."""
    return zstd.compress(data, level)


def compress_briefly(data: Buffer, level: int = LEVEL) -> Buffer | None:
    """The same if it is shorter than `data`, else None; it is valid until this thread calls it again."""
    packed = libzstd.compress(data, level) or compress(data, level)
    return packed if len(packed) < len(data) else None


def worth_compressing(data: Buffer) -> bool:
    """Would compressing `data` save a percent or two? Answered from 16 samples of 1 KiB.

    Measured with level 1 on pieces of 1 MiB: it costs 25 µs where there is nothing to gain, against
    240 to 290 µs for trying (and 650 µs for SHA-256), and 55 µs of 2900 µs where there is. Bytes lost
    by a wrong no: none with programs, text, base64 and half random data; 0.4 % with deflate streams,
    1.7 % with PNG files.
    """
    if len(data) < 4 * _SAMPLES * _SAMPLE:
        return len(data) > 0
    step = (len(data) - _SAMPLE) // (_SAMPLES - 1)
    view = memoryview(data)
    samples = b"".join([view[start : start + _SAMPLE] for start in range(0, step * _SAMPLES, step)])
    packed = libzstd.compress(samples, LEVEL) or compress(samples)
    return len(packed) < _INCOMPRESSIBLE * len(samples)


def decompress(data: Buffer, size: int, where: str) -> bytes:
    """The content of one frame, which must have `size` bytes; never allocates much more.

    Raises `RepositoryDamaged` for anything else.
    """
    plain = _bounded(data, size, where)
    if len(plain) != size:
        raise _damaged(where, f"it holds {len(plain)} bytes instead of {size}")
    return plain


def decompress_into(data: Buffer, buffer: bytearray, where: str) -> None:
    """Fill the whole `buffer` with the content of one frame, which must be just as long.

    Raises `RepositoryDamaged` for anything else, and means nothing by what is in the buffer then.
    """
    if not libzstd.decompress_into(data, buffer):
        buffer[:] = decompress(data, len(buffer), where)


def decompress_document(data: Buffer, limit: int, where: str) -> bytes:
    """The content of one frame, of `limit` bytes at most. Raises `RepositoryDamaged` otherwise."""
    return _bounded(data, limit, where)


def _bounded(data: Buffer, limit: int, where: str) -> bytes:
    window = min(max(limit.bit_length(), _MIN_WINDOW_LOG), _MAX_WINDOW_LOG)
    decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window})
    try:
        told = zstd.get_frame_info(data).decompressed_size
        if told is not None and told > limit:
            raise _damaged(where, f"it would hold {told} bytes, more than {limit}")
        plain = decoder.decompress(data, max_length=limit)
        if not decoder.eof:
            # Exactly `limit` bytes are out: only the end of the frame may be missing.
            plain += decoder.decompress(b"", max_length=1)
    except (zstd.ZstdError, EOFError) as error:
        raise _damaged(where, "it cannot be decompressed") from error
    if not decoder.eof or len(plain) > limit:
        raise _damaged(where, f"it is cut off, or holds more than {limit} bytes")
    if decoder.unused_data:
        raise _damaged(where, "something follows its end")
    return plain


def _damaged(where: str, problem: str) -> errors.RepositoryDamaged:
    return errors.RepositoryDamaged(file=where, problem=problem)
