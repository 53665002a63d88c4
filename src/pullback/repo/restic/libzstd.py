"""The system's libzstd, with contexts and memory that are kept; where it is missing, we do without.

Python's own module makes a context for each call, and grows its output in steps and joins them. For a
chunk of 1 MiB (programs, level 1; processor time, libzstd 1.5.4) it took 0.95 to 2.3 ms to decompress, and
the one call here 0.46 ms, which is a fifth of a restore; to compress 2.99 ms against 2.29 ms, which is a
tenth of a backup. The functions are of zstd's stable interface (zstd.h, "Simple API", "Explicit context",
"Helper functions").
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
        pointer, length = ctypes.c_void_p, ctypes.c_size_t
        self.create_decoder = library.ZSTD_createDCtx
        self.create_encoder = library.ZSTD_createCCtx
        for create in (self.create_decoder, self.create_encoder):
            create.argtypes, create.restype = [], pointer
        self.free_decoder = library.ZSTD_freeDCtx
        self.free_encoder = library.ZSTD_freeCCtx
        for free in (self.free_decoder, self.free_encoder):
            free.argtypes, free.restype = [pointer], length
        self.decompress = library.ZSTD_decompressDCtx
        self.decompress.argtypes, self.decompress.restype = [pointer, pointer, length, pointer, length], length
        self.compress = library.ZSTD_compressCCtx
        self.compress.argtypes = [pointer, pointer, length, pointer, length, ctypes.c_int]
        self.compress.restype = length
        self.bound = library.ZSTD_compressBound
        self.bound.argtypes, self.bound.restype = [length], length
        self.failed = library.ZSTD_isError
        self.failed.argtypes, self.failed.restype = [length], ctypes.c_uint
        self.frame = library.ZSTD_findFrameCompressedSize
        self.frame.argtypes, self.frame.restype = [pointer, length], length


def _load() -> _Library | None:
    try:
        return _Library()
    except (OSError, AttributeError):
        return None


_LIBRARY = _load()


class _Context:
    """A thread's contexts (160 KiB to decompress, 1 MiB to compress), freed with it, and what it compressed last."""

    def __init__(self, library: _Library) -> None:
        self._library = library
        self.decoder: int | None = None
        self.encoder: int | None = None
        self._room = bytearray()

    def decoding(self) -> int | None:
        """The context for decompressing; None without memory."""
        self.decoder = self.decoder or self._library.create_decoder()
        return self.decoder

    def encoding(self) -> int | None:
        """The context for compressing; None without memory."""
        self.encoder = self.encoder or self._library.create_encoder()
        return self.encoder

    def room(self, size: int) -> bytearray:
        """Memory for a result of at most so many bytes; what was in it is gone."""
        if len(self._room) < size:
            self._room = bytearray(size)
        return self._room

    def __del__(self) -> None:
        self._library.free_decoder(self.decoder)  # of none is fine
        self._library.free_encoder(self.encoder)


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
    if _LIBRARY is None or context is None or not data or not buffer or not context.decoding():
        return False
    # Both are held by these objects while the library uses them.
    source = data if isinstance(data, bytes) else _at(data)
    target = _at(buffer)
    if _LIBRARY.frame(source, len(source)) != len(source):
        return False
    return bool(_LIBRARY.decompress(context.decoder, target, len(buffer), source, len(source)) == len(buffer))


def compress(data: Buffer, level: int) -> memoryview | None:
    """One frame that tells its content's length, valid until this thread's next call; None: that is not possible."""
    context = _CONTEXTS.context
    if _LIBRARY is None or context is None or not data or not context.encoding():
        return None
    room = context.room(_LIBRARY.bound(len(data)))
    # Held while the library uses it.
    source = data if isinstance(data, bytes) else _at(data)
    length = _LIBRARY.compress(context.encoder, _at(room), len(room), source, len(data), level)
    return None if _LIBRARY.failed(length) else memoryview(room)[:length].toreadonly()


def _at(memory: bytearray | memoryview) -> ctypes.Array[ctypes.c_char] | bytes:
    """Memory as the library takes it: the very bytes if they may be written to, else a copy."""
    if isinstance(memory, memoryview) and memory.readonly:
        return bytes(memory)
    return (ctypes.c_char * len(memory)).from_buffer(memory)
