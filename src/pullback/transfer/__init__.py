"""The loading dock: disks' bytes over NBD or in files, and the copier between any two. Threads."""

from pullback.transfer.clearing import clear, discard
from pullback.transfer.copier import BLOCK_SIZE, Fetch, Piece, Result, Work, Zero, blocks, copy
from pullback.transfer.file import FileEndpoint
from pullback.transfer.nbd import NbdEndpoint

__all__ = [
    "BLOCK_SIZE",
    "Fetch",
    "FileEndpoint",
    "NbdEndpoint",
    "Piece",
    "Result",
    "Work",
    "Zero",
    "blocks",
    "clear",
    "copy",
    "discard",
]
