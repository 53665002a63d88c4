"""From the name of a repository to its store."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pullback import errors
from pullback.model.urls import LocalPlace, S3Place
from pullback.repo.store import Kind, Store
from pullback.repo.store.local import LocalStore

#: Is told, in any thread, when a server makes us wait.
Notice = Callable[[str], None]


def open_store(place: LocalPlace | S3Place, environ: Mapping[str, str], notice: Notice | None = None) -> Store:
    """The store of a repository that is there; raises `NoRepository` if it has no config."""
    if isinstance(place, LocalPlace):
        return LocalStore.open(place.path)
    store = _bucket(place, environ, notice)
    try:
        # Read, not looked at: the answer to a HEAD request has no words that tell what is wrong.
        store.read(Kind.CONFIG, "")
    except errors.ObjectMissing as error:
        store.close()
        raise errors.NoRepository(path=place.url) from error
    except BaseException:
        store.close()
        raise
    return store


def create_store(place: LocalPlace | S3Place, environ: Mapping[str, str], notice: Notice | None = None) -> Store:
    """The store of a repository to be made: of two who make one, the second fails to write its config as `new`.

    Raises `RepositoryExists` if one is there, and `NotARepository` if a directory has something else
    in it. A bucket must be there.
    """
    if isinstance(place, LocalPlace):
        return LocalStore.create(place.path)
    store = _bucket(place, environ, notice)
    try:
        store.read(Kind.CONFIG, "")
    except errors.ObjectMissing:
        return store
    except BaseException:
        store.close()
        raise
    store.close()
    raise errors.RepositoryExists(path=place.url)


def _bucket(place: S3Place, environ: Mapping[str, str], notice: Notice | None) -> Store:
    # Here, because others should not pay for obstore.
    from pullback.repo.store.s3 import S3Store

    return S3Store(place, environ, notice=notice)
