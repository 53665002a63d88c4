"""Where restore points are kept. Threaded; knows nothing of machines.

Its front door: other rooms import from here only.
"""

from pullback.repo.digest import HashList, block_size_for, zero_hash
from pullback.repo.directory.chain import MAX_DEPTH, Link, complaints, graph, pseudo_filename
from pullback.repo.directory.pending import PendingPoint
from pullback.repo.directory.repository import Directory, create_or_open, open_directory
from pullback.repo.interface import Damaged, Listing, Repository, Sealed

#: A point being written, to either kind of repository.
Pending = PendingPoint

__all__ = [
    "MAX_DEPTH",
    "Damaged",
    "Directory",
    "HashList",
    "Link",
    "Listing",
    "Pending",
    "PendingPoint",
    "Repository",
    "Sealed",
    "block_size_for",
    "complaints",
    "create_or_open",
    "graph",
    "open_directory",
    "pseudo_filename",
    "zero_hash",
]
