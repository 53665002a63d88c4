"""A repository in restic's format, and the program restic for it, opened with one password."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pullback import repo
from pullback.flows.repositories import Access
from pullback.model import urls
from pullback.programs import restic
from pullback.progress import Cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class Managed:
    """Both, open."""

    repository: repo.ResticRepository
    #: What the program is given.
    entry: restic.Access
    program: restic.Restic


@contextmanager
def managed(place: urls.ResticRepository, access: Access, cancel: Cancel) -> Iterator[Managed]:
    """The repository while the block runs, and the program, which `cancel` ends. Blocking.

    Errors: those of `repositories.opened`; the program may still be missing.
    """
    known: list[str] = []

    def password() -> str:
        known.append(access.password(place.url))
        return known[-1]

    with (
        repo.open_store(place.location, environ=access.environ, notice=access.notice) as store,
        repo.open_repository(store, password, caches=access.caches) as repository,
    ):
        entry = restic.Access(url=place.url, password=known[-1])
        yield Managed(repository=repository, entry=entry, program=program(entry, access, cancel))


def program(entry: restic.Access, access: Access, cancel: Cancel) -> restic.Restic:
    """The program, with its cache beside ours unless the user named one for it."""
    cache = None if access.environ.get("RESTIC_CACHE_DIR") else access.caches / "restic"
    return restic.Restic(entry, access.environ, cache=cache, cancelled=cancel.event)
