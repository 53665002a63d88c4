"""The system's libzstd, for decompressing into a buffer that is there already; where it is missing, we do without.

Python's own module grows its output in steps and joins them, through zstd's streaming interface. For a
chunk of 1 MiB (programs, level 1) it took 0.95 to 2.3 ms of processor time, and the one call here 0.46 ms
(libzstd 1.5.4), which is a fifth of a restore. The functions are of zstd's stable interface (zstd.h,
"Simple API", "Explicit context", "Helper functions").
"""

from __future__ import annotations

import ctypes
import threading

from pullback.repo.restic.types import Buffer

_NAME = "libzstd.so.1"


class _Library:
    """The functions that we call. Raises `OSError` or `AttributeError` at making if they are not there."""

    def __init__(self) -> None:
        library = ctypes.CDLL(_NAME)  # its calls run without Python's lock
        self.create = library.ZSTD_createDCtx
        self.create.argtypes, self.create.restype = [], ctypes.c_void_p
        self.free = library.ZSTD_freeDCtx
        self.free.argtypes, self.free.restype = [ctypes.c_void_p], ctypes.c_size_t
        self.decompress = library.ZSTD_decompressDCtx
        pointer, length = ctypes.c_void_p, ctypes.c_size_t
        self.decompress.argtypes, self.decompress.restype = [pointer, pointer, length, pointer, length], length
        self.frame = library.ZSTD_findFrameCompressedSize
        self.frame.argtypes, self.frame.restype = [pointer, length], length


def _load() -> _Library | None:
    try:
        return _Library()
    except (OSError, AttributeError):
        return None


_LIBRARY = _load()


class _Context:
    """A decompression context (160 KiB), freed with its thread."""

    def __init__(self, library: _Library) -> None:
        self._library = library
        self.pointer = library.create()

    def __del__(self) -> None:
        self._library.free(self.pointer)


class _Contexts(threading.local):
    """One for each thread."""

    def __init__(self) -> None:
        self.context = None if _LIBRARY is None else _Context(_LIBRARY)


_CONTEXTS = _Contexts()


def decompress_into(data: Buffer, buffer: bytearray) -> bool:
    """Fill the whole `buffer` with the content of `data`, one zstd frame.

    False: that is not possible, for whatever reason (the library is missing, the data is bad or of
    another length), and what is in the buffer means nothing.
    """
    context = _CONTEXTS.context
    if _LIBRARY is None or context is None or not context.pointer or not data or not buffer:
        return False
    # Both are held by these objects while the library uses them.
    source = data if isinstance(data, bytes) else bytes(data)
    target = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    if _LIBRARY.frame(source, len(source)) != len(source):
        return False
    return bool(_LIBRARY.decompress(context.pointer, target, len(buffer), source, len(source)) == len(buffer))
