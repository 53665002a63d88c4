"""Where restore points are kept. Threaded; knows nothing of machines.

Its front door: other rooms import from here only.
"""

from pullback.repo.defaults import repository_url
from pullback.repo.digest import HashList, block_size_for, zero_hash
from pullback.repo.directory.chain import MAX_DEPTH, Link, complaints, graph, pseudo_filename
from pullback.repo.directory.pending import PendingPoint
from pullback.repo.directory.repository import Directory, create_or_open, open_directory
from pullback.repo.interface import Damaged, Listing, Repository, Sealed
from pullback.repo.interface import PendingPoint as Pending
from pullback.repo.passwords import find as find_password
from pullback.repo.passwords import from_file as password_from_file
from pullback.repo.restic import keyring, lending, unlocking
from pullback.repo.restic.blobs import Scratch
from pullback.repo.restic.keyring import KeyEntry
from pullback.repo.restic.locking import Held
from pullback.repo.restic.pending import PendingPoint as PendingSnapshot
from pullback.repo.restic.reader import Batch, PointEndpoint
from pullback.repo.restic.repository import Repository as ResticRepository
from pullback.repo.restic.repository import create_repository, open_repository
from pullback.repo.restic.scrub import MAX_RANGES, BadFile, CheckedDisk, Findings, Sample, Scope, scrub
from pullback.repo.restic.snapshots import Snapshot
from pullback.repo.restic.usage import Usage, usage
from pullback.repo.store import MAX_WHOLE, Kind, Store, Stored, path_of
from pullback.repo.store.limit import Limiter
from pullback.repo.store.opening import create_store, open_store

__all__ = [
    "MAX_DEPTH",
    "MAX_RANGES",
    "MAX_WHOLE",
    "BadFile",
    "Batch",
    "CheckedDisk",
    "Damaged",
    "Directory",
    "Findings",
    "HashList",
    "Held",
    "KeyEntry",
    "Kind",
    "Limiter",
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
    "Scratch",
    "Sealed",
    "Snapshot",
    "Store",
    "Stored",
    "Usage",
    "block_size_for",
    "complaints",
    "create_or_open",
    "create_repository",
    "create_store",
    "find_password",
    "graph",
    "keyring",
    "lending",
    "open_directory",
    "open_repository",
    "open_store",
    "password_from_file",
    "path_of",
    "pseudo_filename",
    "repository_url",
    "scrub",
    "unlocking",
    "usage",
    "zero_hash",
]
