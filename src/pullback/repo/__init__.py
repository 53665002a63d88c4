"""Where restore points are kept. Threaded; knows nothing of machines.

Its front door: other rooms import from here only.
"""

from pullback.repo.digest import HashList, block_size_for, zero_hash
from pullback.repo.directory.chain import MAX_DEPTH, Link, complaints, graph, pseudo_filename
from pullback.repo.directory.pending import PendingPoint
from pullback.repo.directory.repository import Directory, create_or_open, open_directory
from pullback.repo.interface import Damaged, Listing, Repository, Sealed
from pullback.repo.interface import PendingPoint as Pending
from pullback.repo.store import MAX_WHOLE, Kind, Store, Stored, path_of
from pullback.repo.defaults import repository_url
from pullback.repo.passwords import find as find_password
from pullback.repo.restic.pending import PendingPoint as PendingSnapshot
from pullback.repo.restic.reader import Batch, PointEndpoint
from pullback.repo.restic.repository import Repository as ResticRepository
from pullback.repo.restic.repository import create_repository, open_repository
from pullback.repo.restic.scrub import BadFile, CheckedDisk, Findings, Sample, Scope, scrub
from pullback.repo.store.limit import Limiter
from pullback.repo.store.opening import create_store, open_store


__all__ = [
    "MAX_DEPTH",
    "MAX_WHOLE",
    "Batch",
    "BadFile",
    "CheckedDisk",
    "Damaged",
    "Directory",
    "Findings",
    "HashList",
    "Limiter",
    "Kind",
    "Link",
    "Listing",
    "Pending",
    "PendingPoint",
    "PendingSnapshot",
    "PointEndpoint",
    "Repository",
    "ResticRepository",
    "Sample",
    "Scope",
    "Sealed",
    "Store",
    "Stored",
    "block_size_for",
    "complaints",
    "create_or_open",
    "create_repository",
    "create_store",
    "find_password",
    "graph",
    "open_directory",
    "path_of",
    "open_repository",
    "open_store",
    "pseudo_filename",
    "scrub",
    "repository_url",
    "zero_hash",
]
