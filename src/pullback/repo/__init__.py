"""Where restore points are kept. Threaded; knows nothing of machines.

Its front door: other rooms import from here only.
"""

from pullback.repo.chain import MAX_DEPTH, Link, complaints, graph, pseudo_filename
from pullback.repo.digest import HashList, block_size_for, zero_hash
from pullback.repo.directory import Damaged, Directory, Listing, create_or_open, open_directory
from pullback.repo.pending import PendingPoint, Sealed, Writer

__all__ = [
    "MAX_DEPTH",
    "Damaged",
    "Directory",
    "HashList",
    "Link",
    "Listing",
    "PendingPoint",
    "Sealed",
    "Writer",
    "block_size_for",
    "complaints",
    "create_or_open",
    "graph",
    "open_directory",
    "pseudo_filename",
    "zero_hash",
]
