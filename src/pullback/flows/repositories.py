"""Opening repositories: the one place that chooses by URL between qcow2 images and restic's format."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pullback import errors, repo, state
from pullback.model import urls


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What is needed to open a repository in restic's format; a `dir:` one needs nothing."""

    #: Where passwords and credentials stand: PULLBACK_PASSWORD_FILE, AWS_ACCESS_KEY_ID … (see docs/repositories.md).
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    #: Asks a person for the password, if `environ` names none.
    prompt: Callable[[], str] | None = None
    #: Hears sentences about a server that does not answer at once.
    notice: Callable[[str], None] | None = None
    #: Where what is known of repositories is kept, unless `environ` says so; None: in our own cache directory.
    cache: Path | None = None

    @property
    def caches(self) -> Path:
        """PULLBACK_CACHE_DIR, RESTIC_CACHE_DIR, else ours: repositories are known below it."""
        if text := self.environ.get("PULLBACK_CACHE_DIR"):
            return Path(text).absolute()
        if text := self.environ.get("RESTIC_CACHE_DIR"):
            return Path(text).absolute() / "pullback"
        return (self.cache or state.directories().cache) / "repositories"

    def password(self, url: str) -> str:
        """The password; raises as `repo.find_password` does."""
        return repo.find_password(self.environ, repository=url, prompt=self.prompt)


def named_by(environ: Mapping[str, str]) -> str | None:
    """The repository that the environment names, PULLBACK_REPOSITORY before restic's variables; or None."""
    return repo.repository_url(environ)


@contextmanager
def opened(place: urls.Repository, access: Access) -> Iterator[repo.Repository]:
    """An open repository while the block runs. Blocking. Errors: as `repo.open_directory`, `repo.open_repository`."""
    if isinstance(place, urls.DirectoryRepository):
        yield repo.open_directory(place.path)
        return
    with opened_restic(place, access) as repository:
        yield repository


@contextmanager
def opened_restic(place: urls.ResticRepository, access: Access) -> Iterator[repo.ResticRepository]:
    """The same for one that must be in restic's format."""
    with (
        repo.open_store(place.location, environ=access.environ, notice=access.notice) as store,
        repo.open_repository(store, lambda: access.password(place.url), caches=access.caches) as repository,
    ):
        yield repository


@contextmanager
def opened_or_made(place: urls.Repository, access: Access) -> Iterator[repo.Repository]:
    """The same for writing: a `dir:` repository is made if there is none, as a directory is by many tools.

    One in restic's format is made by `init` alone, because it has a password that must not be lost.
    """
    if isinstance(place, urls.DirectoryRepository):
        yield repo.create_or_open(place.path)
        return
    with opened(place, access) as repository:
        yield repository


def make(place: urls.Repository, access: Access) -> str:
    """Make a new repository; gives its id. Raises `RepositoryExists`."""
    if isinstance(place, urls.DirectoryRepository):
        try:
            repo.open_directory(place.path)
        except errors.NoRepository:
            return repo.create_or_open(place.path).id
        raise errors.RepositoryExists(path=str(place.path))
    password = access.password(place.url)
    with (
        repo.create_store(place.location, environ=access.environ, notice=access.notice) as store,
        repo.create_repository(store, password, caches=access.caches) as repository,
    ):
        return repository.id


@asynccontextmanager
async def open_for(place: urls.Repository, access: Access, *, writing: bool = False) -> AsyncIterator[repo.Repository]:
    """`opened` (or `opened_or_made`, for writing) for those who must not block."""
    context = opened_or_made(place, access) if writing else opened(place, access)
    repository = await asyncio.to_thread(context.__enter__)
    try:
        yield repository
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)
