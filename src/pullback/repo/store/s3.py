"""A repository in an S3 bucket, through obstore (the only module that imports it).

Each object is put with one request, which is atomic; a checksum goes with it, because buckets with
object lock refuse others (Amazon S3 user guide, "Object Lock considerations"). We retry ourselves,
so that there is one deadline for all, a way to end the wait, and a word to the user.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store as Bucket

from pullback import errors
from pullback.model.urls import S3Place
from pullback.repo.store import MAX_WHOLE, Kind, Stored, answers, aws, is_name, path_of
from pullback.repo.store.answers import Answer
from pullback.units import MiB

_T = TypeVar("_T")
_CONNECTIONS = 8
_PAGE = 1000
#: Bytes: what is larger has the time of a transfer.
_SMALL = MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for a server, all in seconds."""

    connect: float = 10
    #: A small request, with its answer.
    request: float = 60
    #: A request with a pack (16 MiB): 55 KiB/s.
    transfer: float = 300
    #: Failures that may pass are tried again for so long (restic: 15 minutes too) …
    total: float = 900
    #: … but not when the server has never answered yet: its name may be wrong.
    first: float = 20
    #: Between two tries, at first; then twice as long each time, up to `longest`.
    pause: float = 0.25
    longest: float = 15


class S3Store:
    """A bucket, or what is below a prefix in one, as a `Store`."""

    def __init__(
        self,
        place: S3Place,
        environ: Mapping[str, str],
        *,
        patience: Patience | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        """`environ` has credentials; `notice` is told (in any thread) when the server makes us wait.

        Nothing is asked of the server yet, except for Amazon's buckets their region.
        """
        self.url = place.url
        self.connections = _CONNECTIONS
        self._place = place
        self._patience = patience or Patience()
        self._notice = notice
        self._settings = _settings(place, environ)
        self._keys = aws.keys(place, environ)
        self._authorities = _read_authorities(aws.ca_file(environ))
        self._closing = threading.Event()
        self._hurried = threading.Event()
        self._met = False
        self._build(checksum=True)

    def _build(self, *, checksum: bool) -> None:
        settings = self._settings | ({"checksum_algorithm": "SHA256"} if checksum else {})
        self._checksum = checksum
        self._quick = self._bucket(settings, self._patience.request)
        self._slow = self._bucket(settings, self._patience.transfer)

    def _bucket(self, settings: Mapping[str, Any], seconds: float) -> Bucket:
        client: dict[str, Any] = {
            "allow_http": not self._place.secure,
            "connect_timeout": timedelta(seconds=self._patience.connect),
            "timeout": timedelta(seconds=seconds),
        }
        if self._authorities is not None:
            client["root_certificate"] = self._authorities
        return Bucket(
            self._place.bucket,
            prefix=self._place.prefix or None,
            config=settings,  # type: ignore[arg-type]  # a TypedDict there
            client_options=client,  # type: ignore[arg-type]
            retry_config={"max_retries": 0},
            credential_provider=self._credentials if self._keys else None,
        )

    def _credentials(self) -> Any:
        """The keys, for ever. As settings they would be mixed with what stands in the process's own variables."""
        assert self._keys is not None
        return {
            "access_key_id": self._keys.access,
            "secret_access_key": self._keys.secret,
            "token": self._keys.token,
            "expires_at": None,
        }

    # -- reading -----------------------------------------------------------------------------

    def list(self, kind: Kind) -> Iterator[Stored]:
        """See `Store`. A listing that breaks off goes on behind the last name seen."""
        if kind is Kind.CONFIG:
            yield from self._config()
            return
        count, last = 0, ""
        for found in self._listed(kind):
            yield found
            count, last = count + 1, path_of(kind, found.name)
            if kind is Kind.DATA and count == _PAGE:
                break
        else:
            return
        yield from self._rest(kind, last)

    def _rest(self, kind: Kind, last: str) -> Iterator[Stored]:
        """What is listed behind `last`: in several places at once, because one page tells where the next begins."""
        bounds = [f"{kind.value}/{digit:x}" for digit in range(1, 16)]
        starts = [last, *(bound for bound in bounds if bound > last)]
        ends = [*starts[1:], None]
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="listing") as pool:
            parts = pool.map(lambda start, end: list(self._listed(kind, start, end)), starts, ends)
            for part in parts:
                yield from part

    def _listed(self, kind: Kind, start: str | None = None, end: str | None = None) -> Iterator[Stored]:
        """What lies behind the path `start` and before `end`, by name."""
        directory, last = f"{kind.value}/", start
        pages: Any = None

        def page() -> Any:
            nonlocal pages
            if pages is None:
                pages = iter(obstore.list(self._quick, directory, offset=last, chunk_size=_PAGE))
            try:
                return next(pages, None)
            except BaseException:
                pages = None
                raise

        while (found := self._ask(f"listing {kind.value}", page)) is not None:
            for entry in found:
                last = entry["path"]
                if end is not None and last >= end:
                    return
                name = last.rpartition("/")[2]
                if is_name(name) and last == path_of(kind, name):
                    yield Stored(name=name, size=entry["size"], modified=entry["last_modified"])

    def _config(self) -> Iterator[Stored]:
        try:
            meta = self._ask("looking for config", lambda: obstore.head(self._quick, "config"), path="config")
        except errors.ObjectMissing:
            return
        yield Stored(name="", size=meta["size"], modified=meta["last_modified"])

    def read(self, kind: Kind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Store`."""
        path = path_of(kind, name)
        if length is None:
            return self._ask(f"reading {path}", lambda: self._read_on(path, offset), path=path)
        if length == 0 or offset < 0 or length < 0:
            size = self.size(kind, name)
            if offset < 0 or length < 0 or offset > size:
                raise self._damaged(path, f"it has {size} bytes")
            return b""
        bucket = self._quick if length <= _SMALL else self._slow
        data = self._ask(
            f"reading {path}", lambda: obstore.get_range(bucket, path, start=offset, length=length), path=path
        )
        if len(data) != length:
            raise self._damaged(path, f"it has {offset + len(data)} bytes")
        return bytes(data)

    def _read_on(self, path: str, offset: int) -> bytes:
        """All from an offset on."""
        result = obstore.get(self._slow, path, options={"range": {"offset": offset}} if offset else None)
        size = result.meta["size"]
        if size - offset > MAX_WHOLE:
            raise self._damaged(path, f"it has {size} bytes")
        return bytes(result.bytes())

    def size(self, kind: Kind, name: str) -> int:
        """See `Store`."""
        path = path_of(kind, name)
        return int(self._ask(f"looking at {path}", lambda: obstore.head(self._quick, path), path=path)["size"])

    # -- writing -----------------------------------------------------------------------------

    def write(self, kind: Kind, name: str, data: bytes | bytearray | memoryview, *, new: bool = False) -> None:
        """See `Store`."""
        path = path_of(kind, name)
        small = len(data) <= _SMALL

        def put() -> None:
            # use_multipart: obstore would begin one above 5 MiB, which is three requests.
            bucket = self._quick if small else self._slow
            obstore.put(bucket, path, data, use_multipart=False, mode="create" if new else "overwrite")

        try:
            self._ask(f"writing {path}", put, path=path, writing=True)
        except errors.AlreadyStored:
            # An answer may have been lost, and the retry met what the first try had written.
            if self.read(kind, name) != bytes(data):
                raise

    def delete(self, kind: Kind, name: str) -> None:
        """See `Store`. In a bucket with versions it is hidden, not gone."""
        path = path_of(kind, name)
        try:
            self._ask(f"deleting {path}", lambda: obstore.delete(self._quick, path), path=path)
        except errors.ObjectMissing:
            return

    def tidy(self) -> None:
        """See `Store`: a request that was cut leaves nothing."""

    def hurry(self) -> None:
        """See `Store`. Requests under way end with their time."""
        self._hurried.set()

    def close(self) -> None:
        """See `Store`. Requests under way end with their time."""
        self._closing.set()
        self._hurried.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- asking, and asking again ------------------------------------------------------------

    def _ask(self, what: str, act: Callable[[], _T], *, path: str = "", writing: bool = False) -> _T:
        """The result of `act`, tried again while what fails may pass."""
        begin, pause = time.monotonic(), self._patience.pause
        while True:
            if self._closing.is_set():
                raise errors.StoreUnreachable(store=self.url, reason="it is closed")
            try:
                result = act()
            except (BaseError, OSError) as error:
                answer = answers.understand(str(error))
                if writing and answer.checksum and answer.status in (400, 501) and self._checksum:
                    self._build(checksum=False)  # a server that does not know the header
                    continue
                if not answer.passing or not self._may_wait(begin, pause):
                    self._give_up(what, answer, path, writing, error)
                if self._notice is not None:
                    self._notice(f"{self.url} makes us wait ({what}: {answer.reason})")
            else:
                self._met = True
                return result
            self._hurried.wait(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, self._patience.longest)

    def _may_wait(self, begin: float, pause: float) -> bool:
        if self._hurried.is_set():
            return False
        allowed = self._patience.total if self._met else self._patience.first
        return time.monotonic() + pause - begin < allowed

    def _give_up(self, what: str, answer: Answer, path: str, writing: bool, cause: Exception) -> NoReturn:
        raise self._error(what, answer, path, writing) from cause

    def _error(self, what: str, answer: Answer, path: str, writing: bool) -> errors.PullbackError:
        if answer.no_bucket:
            return errors.NoRepository(path=f"{self.url} (there is no bucket {self._place.bucket})")
        if answer.missing and path:
            return errors.ObjectMissing(store=self.url, name=path)
        if answer.beyond and path:
            return self._damaged(path, "it is shorter")
        if writing and answer.exists:
            return errors.AlreadyStored(store=self.url, name=path)
        if answer.full:
            return errors.DestinationFull(path=f"{self.url} ({what}: {answer.reason})")
        if answer.denied or answer.other_region:
            return _refused(self.url, what, answer)
        if answer.status is None or answer.passing:
            return errors.StoreUnreachable(store=self.url, reason=answer.reason)
        return errors.StoreFailed(store=self.url, what=what, reason=answer.reason)

    def _damaged(self, path: str, problem: str) -> errors.ObjectDamaged:
        return errors.ObjectDamaged(store=self.url, name=path, problem=problem)


def _refused(url: str, what: str, answer: Answer) -> errors.StoreRefused:
    if answer.other_region:
        way_out = "Set AWS_DEFAULT_REGION to the region of the bucket."
        return errors.StoreRefused(store=url, what=what, reason=answer.reason, way_out=way_out)
    if answer.code == "RequestTimeTooSkewed":
        way_out = "Set the clock of this machine right."
        return errors.StoreRefused(store=url, what=what, reason=answer.reason, way_out=way_out)
    return errors.StoreRefused(store=url, what=what, reason=answer.reason)


def _settings(place: S3Place, environ: Mapping[str, str]) -> dict[str, Any]:
    """obstore's settings. Whatever it would take from variables of its own is set here."""
    region = aws.region(place, environ)
    endpoint = place.server
    if aws.is_amazon(place) and place.endpoint == "s3.amazonaws.com":
        # The common host only redirects to that of the region.
        endpoint = f"https://s3.{region}.amazonaws.com"
    settings: dict[str, Any] = {
        "endpoint": endpoint,
        "aws_endpoint_url_s3": endpoint,
        "region": region,
        "virtual_hosted_style_request": False,
        "skip_signature": False,
        "s3_express": False,
        # Single requests: not every server knows the bulk one.
        "disable_bulk_delete": True,
    }
    return settings


def _read_authorities(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise errors.UsageError(problem=f"certificates cannot be read from {path}: {error.strerror}") from error
