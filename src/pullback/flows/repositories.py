"""Opening repositories: the one place that chooses by URL between qcow2 images and restic's format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pullback import errors, repo, state
from pullback.flows.threads import entered
from pullback.model import urls
from pullback.model.points import Point
from pullback.progress import Cancel


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
    # Looked for before a password is asked for, which is typed twice.
    with contextlib.suppress(errors.NoRepository):
        repo.open_store(place.location, environ=access.environ, notice=access.notice).close()
        raise errors.RepositoryExists(path=place.url)
    password = usable(access.password(place.url))
    with (
        repo.create_store(place.location, environ=access.environ, notice=access.notice) as store,
        repo.create_repository(store, password, caches=access.caches) as repository,
    ):
        return repository.id


def usable(password: str) -> str:
    """A new password, if it is one that restic can be given too; else `UsageError`."""
    if not password or password != password.strip() or "\n" in password or "\0" in password:
        problem = "A password must not be empty, nor begin or end with white space (restic could not be given it)"
        raise errors.UsageError(problem=problem)
    return password


def new_password(file: Path | None, ask: Callable[[], str] | None) -> str:
    """A new password, from a file or a person. Raises `UsageError` without either, `PasswordUnavailable`."""
    if file is not None:
        return usable(repo.password_from_file(file, source=f"The file {file}"))
    if ask is None:
        raise errors.UsageError(problem="No new password is given: name a file that holds it with --new-password-file")
    return usable(ask())


def require_restic(place: urls.Repository, command: str, reason: str, way_out: str) -> urls.ResticRepository:
    """The place, if it is one for restic's format; else `Unsupported` with why the command is not for `dir:`."""
    if isinstance(place, urls.ResticRepository):
        return place
    raise errors.Unsupported(what=f"`pullback {command}` of {place.url}", reason=reason, way_out=way_out)


@asynccontextmanager
async def open_for(place: urls.Repository, access: Access, *, writing: bool = False) -> AsyncIterator[repo.Repository]:
    """`opened` (or `opened_or_made`, for writing) for those who must not block."""
    async with entered(opened_or_made(place, access) if writing else opened(place, access)) as repository:
        yield repository


def cancel_for(repository: repo.Repository) -> Cancel:
    """A token for work on the repository: who cancels it need not wait for the repository's server either."""
    cancel = Cancel()
    if isinstance(repository, repo.ResticRepository):
        cancel.tell(lambda reason: repository.store.hurry())
    return cancel


@asynccontextmanager
async def reading(repository: repo.Repository, *points: Point) -> AsyncIterator[None]:
    """Keep points from being removed while the block runs."""
    async with AsyncExitStack() as stack:
        for point in points:
            await stack.enter_async_context(entered(repository.reading(point)))
        yield
