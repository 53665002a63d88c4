"""S3: a real server, and what lies between it and us: errors, delays, cut connections, TLS, credentials."""

from __future__ import annotations

import itertools
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

import proxy
from proxy import Fault
from pullback import errors
from pullback.model.urls import S3Place
from pullback.repo.store import Kind, answers, aws, opening, s3
from pullback.repo.store.s3 import Patience, S3Store
from pullback.repo.store.uploads import Uploads
from pullback.testing.stores import named
from pullback.units import MiB
from seaweed import Server

#: Everything is quick here, so what waits is quick too.
QUICK = Patience(connect=2, request=5, transfer=5, total=1.5, first=0.5, pause=0.01, longest=0.1)
_numbers = itertools.count()


@dataclass
class Bucket:
    """A bucket behind a proxy."""

    server: Server
    proxy: proxy.Proxy
    name: str
    notices: list[str] = field(default_factory=list)

    @property
    def place(self) -> S3Place:
        """As seen through the proxy."""
        return self.server.place(self.name, "web", port=self.proxy.port)

    def store(self, patience: Patience = QUICK, **environ: str) -> S3Store:
        """The bucket as a store."""
        return S3Store(self.place, self.server.environ | environ, patience=patience, notice=self.notices.append)


@pytest.fixture
def bucket(s3_server: Server) -> Iterator[Bucket]:
    with proxy.before(s3_server.port) as between:
        name = f"real-{next(_numbers)}"
        s3_server.make_bucket(name)
        yield Bucket(s3_server, between, name)


# -- what passes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500, code="InternalError"),
        Fault(status=503, code="SlowDown"),
        Fault(status=429, code="TooManyRequests"),
        Fault(status=400, code="RequestTimeout"),
        Fault(status=400, code="BadDigest"),
        Fault(cut="before"),
        Fault(cut="after"),
        Fault(cut="body"),
    ],
    ids=lambda fault: fault.code or fault.cut,
)
def test_what_may_pass_is_tried_again(bucket: Bucket, fault: Fault) -> None:
    content = b"pack" * 100_000
    with bucket.store() as store:
        for ask in (
            lambda: store.write(Kind.DATA, named(content), content),
            lambda: store.read(Kind.DATA, named(content)),
            lambda: store.read(Kind.DATA, named(content), 10, 100),
            lambda: store.size(Kind.DATA, named(content)),
            lambda: [each.name for each in store.list(Kind.DATA)],
            lambda: store.delete(Kind.DATA, named(content)),
        ):
            # The answer to HEAD has no body, so there is no code in it.
            bucket.proxy.rule = proxy.first(2, fault, *(("PUT", "GET", "DELETE") if fault.status == 400 else ()))
            assert ask() in (None, content, content[10:110], len(content), [named(content)])
        assert list(store.list(Kind.DATA)) == []
    assert all(notice.startswith(f"{bucket.place.url} makes us wait") for notice in bucket.notices)
    assert len(bucket.notices) >= (3 if fault.cut == "body" else 10)


def test_an_answer_that_was_lost_does_not_make_us_lose_the_race_for_the_config(bucket: Bucket) -> None:
    with bucket.store() as store:
        bucket.proxy.rule = proxy.first(1, Fault(cut="after"))
        store.write(Kind.CONFIG, "", b"ours", new=True)
        assert len([request for request in bucket.proxy.seen if request.method == "PUT"]) == 2
        with pytest.raises(errors.AlreadyStored):
            store.write(Kind.CONFIG, "", b"other", new=True)


def test_a_long_listing_goes_on_where_it_broke_off(bucket: Bucket) -> None:
    with bucket.store() as store, ThreadPoolExecutor(8) as pool:
        names = [named(str(number).encode()) for number in range(1100)]
        list(pool.map(lambda name: store.write(Kind.LOCKS, name, b""), names))
        broken: list[proxy.Request] = []

        def rule(request: proxy.Request) -> Fault | None:
            if "continuation-token" in request.path and not broken:
                broken.append(request)
                return Fault(cut="body")
            return None

        bucket.proxy.rule = rule
        assert sorted(each.name for each in store.list(Kind.LOCKS)) == sorted(names)
        assert len(broken) == 1


@pytest.mark.parametrize("page", [1, 50, 299, 300, 301])
def test_many_packs_are_listed_in_several_places_at_once(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(s3, "_PAGE", page)
    with bucket.store() as store, ThreadPoolExecutor(8) as pool:
        names = sorted(named(str(number).encode()) for number in range(300))
        list(pool.map(lambda name: store.write(Kind.DATA, name, b""), names))
        bucket.proxy.seen.clear()
        assert [each.name for each in store.list(Kind.DATA)] == names
    starts = [request.path for request in bucket.proxy.seen if "start-after" in request.path]
    # One for what is left below the digit of the last name seen, and one for each digit behind it.
    assert len(starts) == (16 - int(names[page - 1][0], 16) if page <= len(names) else 0)


def test_what_others_put_there_is_left_out_of_lists(bucket: Bucket) -> None:
    for path in ("web/data/ab/short", "web/data/" + "a" * 64, "web/data/bb/" + "a" * 64, "web/data/x y/ü", "data/aa/z"):
        bucket.server.request("PUT", f"/{bucket.name}/" + path.replace(" ", "%20").replace("ü", "%C3%BC"), body=b"x")
    with bucket.store() as store:
        store.write(Kind.DATA, "a" * 64, b"x")
        assert [each.name for each in store.list(Kind.DATA)] == ["a" * 64]


# -- what does not pass ----------------------------------------------------------------------


def timed(kind: type[errors.PullbackError], act: Callable[[], object], *, within: float) -> errors.PullbackError:
    """The error of an act, which must come soon."""
    begin = time.monotonic()
    with pytest.raises(kind) as caught:
        act()
    assert time.monotonic() - begin < within
    return caught.value


def test_a_server_that_never_answered_is_given_up_soon_and_one_that_did_later(bucket: Bucket) -> None:
    with bucket.store() as store:
        bucket.proxy.rule = lambda request: Fault(status=503, code="SlowDown")
        error = timed(errors.StoreUnreachable, lambda: store.read(Kind.CONFIG, ""), within=1)
        assert "Told to say SlowDown (SlowDown)" in str(error)
        bucket.proxy.rule = lambda request: None
        store.write(Kind.KEYS, named(b"k"), b"k")
        bucket.proxy.rule = lambda request: Fault(cut="before")
        begin = time.monotonic()
        error = timed(errors.StoreUnreachable, lambda: store.write(Kind.DATA, named(b"x"), b"x"), within=2.5)
        assert time.monotonic() - begin > 1
        assert "the connection was cut" in str(error)


def test_a_server_that_hangs_is_given_up(bucket: Bucket) -> None:
    released = threading.Event()
    patience = Patience(connect=0.2, request=0.1, transfer=0.2, first=0.25, pause=0.01)
    with bucket.store(patience) as store:
        bucket.proxy.rule = lambda request: Fault(until=released)
        for ask in (
            lambda: store.read(Kind.CONFIG, ""),
            lambda: store.write(Kind.DATA, named(b"x"), bytes(2 * MiB)),
            lambda: list(store.list(Kind.DATA)),
            lambda: store.delete(Kind.DATA, named(b"x")),
        ):
            assert "no answer in time" in str(timed(errors.StoreUnreachable, ask, within=2))
        released.set()


def test_closing_ends_a_wait(bucket: Bucket) -> None:
    store = bucket.store(Patience(first=60, pause=30))
    bucket.proxy.rule = lambda request: Fault(status=503)
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            store.read(Kind.CONFIG, "")
        except errors.StoreUnreachable as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not bucket.notices:
        time.sleep(0.01)
    store.close()
    thread.join(5)
    assert [str(error).endswith("it is closed.") for error in caught] == [True]


@pytest.mark.parametrize(
    ("status", "code", "kind", "hint"),
    [
        (403, "AccessDenied", errors.StoreRefused, "AWS_SECRET_ACCESS_KEY"),
        (403, "ExpiredToken", errors.StoreRefused, "AWS_SECRET_ACCESS_KEY"),
        (400, "ExpiredToken", errors.StoreRefused, "AWS_SECRET_ACCESS_KEY"),
        (401, "Unauthorized", errors.StoreRefused, "AWS_SECRET_ACCESS_KEY"),
        (403, "RequestTimeTooSkewed", errors.StoreRefused, "clock"),
        (301, "PermanentRedirect", errors.StoreRefused, "AWS_DEFAULT_REGION"),
        (400, "AuthorizationHeaderMalformed", errors.StoreRefused, "AWS_DEFAULT_REGION"),
        (507, "XMinioStorageFull", errors.DestinationFull, "Make room"),
        (403, "QuotaExceeded", errors.DestinationFull, "Make room"),
        (404, "NoSuchBucket", errors.NoRepository, ""),
        (400, "InvalidRequest", errors.StoreFailed, ""),
        (501, "NotImplemented", errors.StoreFailed, ""),
    ],
)
def test_a_refusal_is_told_at_once(
    bucket: Bucket, status: int, code: str, kind: type[errors.PullbackError], hint: str
) -> None:
    with bucket.store() as store:
        for ask in (lambda: store.write(Kind.DATA, named(b"x"), b"x"), lambda: store.read(Kind.DATA, named(b"x"))):
            bucket.proxy.rule = lambda request: Fault(status=status, code=code)
            count = len(bucket.proxy.seen)
            error = timed(kind, ask, within=0.5)
            assert len(bucket.proxy.seen) == count + 1
            assert hint in (error.hint or "")


def test_a_wrong_secret_is_told_at_once(bucket: Bucket) -> None:
    with bucket.store(AWS_SECRET_ACCESS_KEY="wrong") as store:
        for ask in (
            lambda: store.read(Kind.CONFIG, ""),
            lambda: store.write(Kind.DATA, named(b"x"), b"x"),
            lambda: list(store.list(Kind.DATA)),
            lambda: store.size(Kind.DATA, named(b"x")),
            lambda: store.delete(Kind.DATA, named(b"x")),
        ):
            error = timed(errors.StoreRefused, ask, within=0.5)
            assert "wrong" not in str(error)


def upload(store: S3Store, count: int) -> None:
    """Store so many small files, some at once."""
    with Uploads(store, workers=8) as uploads:
        for number in range(count):
            uploads.submit(Kind.DATA, named(str(number).encode()), str(number).encode())


def test_lost_credentials_end_uploads_at_once(bucket: Bucket) -> None:
    with bucket.store() as store:
        bucket.proxy.rule = lambda request: Fault(status=403, code="AccessDenied") if request.number > 5 else None
        with pytest.raises(errors.StoreRefused):
            upload(store, 1000)
        assert len(bucket.proxy.seen) < 100


def test_a_bucket_that_is_not_there_is_told(bucket: Bucket) -> None:
    place = bucket.server.place("no-such-bucket")
    for act in (opening.open_store, opening.create_store):
        with pytest.raises(errors.NoRepository, match="there is no bucket no-such-bucket"):
            act(place, bucket.server.environ)


def test_a_repository_is_opened_where_one_is_and_made_where_none_is(bucket: Bucket) -> None:
    environ = bucket.server.environ
    with pytest.raises(errors.NoRepository):
        opening.open_store(bucket.place, environ)
    with opening.create_store(bucket.place, environ) as store:
        store.write(Kind.CONFIG, "", b"config", new=True)
    with opening.open_store(bucket.place, environ) as store:
        assert store.read(Kind.CONFIG, "") == b"config"
    with pytest.raises(errors.RepositoryExists):
        opening.create_store(bucket.place, environ)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (S3Place(endpoint="127.0.0.1:1", bucket="b1", secure=False), "Connection refused"),
        (S3Place(endpoint="no-such-host.invalid", bucket="b1"), "lookup"),
    ],
)
def test_nobody_at_that_address_is_told(s3_server: Server, place: S3Place, reason: str) -> None:
    with S3Store(place, s3_server.environ, patience=QUICK) as store:
        assert reason in str(timed(errors.StoreUnreachable, lambda: store.read(Kind.CONFIG, ""), within=3))


# -- speed -----------------------------------------------------------------------------------


def test_threads_wait_side_by_side(bucket: Bucket) -> None:
    """16 requests of 0.1 s each, 8 at once."""
    with bucket.store() as store:
        store.write(Kind.KEYS, named(b"first"), b"the first write to a bucket takes a second")
        bucket.proxy.rule = lambda request: Fault(seconds=0.1)
        begin = time.monotonic()
        upload(store, 16)
        assert time.monotonic() - begin < 0.8


# -- headers and TLS -------------------------------------------------------------------------


class _Recorder(BaseHTTPRequestHandler):
    """Notes headers; refuses checksums if it is told to."""

    headers_seen: ClassVar[list[dict[str, str]]] = []
    refuses_checksums = False
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.headers_seen.append(headers)
        refused = self.refuses_checksums and any("checksum" in name for name in headers)
        message = (
            b"<Error><Code>InvalidArgument</Code><Message>Unsupported header 'x-amz-checksum-sha256'</Message></Error>"
        )
        body = message if refused else b""
        self.send_response(400 if refused else 200)
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", '"x"')
        self.send_header("x-amz-bucket-region", "eu-north-1")
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.send_header("x-amz-bucket-region", "eu-north-1")
        self.end_headers()


@contextmanager
def recorder(
    *, refuses_checksums: bool = False, tls: ssl.SSLContext | None = None
) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """A server that notes the headers of what is put; with its port."""
    seen: list[dict[str, str]] = []
    handler = type("Handler", (_Recorder,), {"headers_seen": seen, "refuses_checksums": refuses_checksums})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a handshake that fails is what we want
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server.server_address[1], seen
        finally:
            server.shutdown()


KEYS = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "geheim", "AWS_DEFAULT_REGION": "eu-west-9"}


def local_place(port: int, *, secure: bool = False) -> S3Place:
    return S3Place(endpoint=f"localhost:{port}", bucket="b1", secure=secure)


def test_a_pack_is_one_request_with_a_checksum_signed_for_the_region() -> None:
    content = bytes(17 * MiB)
    with recorder() as (port, seen), S3Store(local_place(port), KEYS | {"AWS_SESSION_TOKEN": "token"}) as store:
        store.write(Kind.DATA, named(content), content)
    [headers] = seen
    assert headers["content-length"] == str(len(content))
    assert "x-amz-checksum-sha256" in headers
    assert "Credential=AKIA/" in headers["authorization"]
    assert "/eu-west-9/s3/" in headers["authorization"]
    assert headers["x-amz-security-token"] == "token"


def test_a_server_that_refuses_checksums_gets_none() -> None:
    with recorder(refuses_checksums=True) as (port, seen), S3Store(local_place(port), KEYS) as store:
        store.write(Kind.DATA, named(b"x"), b"x")
        store.write(Kind.DATA, named(b"y"), b"y")
    assert ["x-amz-checksum-sha256" in headers for headers in seen] == [True, False, False]


def test_variables_of_the_library_do_not_lead_it_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_SESSION_TOKEN": "stray",
        "AWS_REGION": "elsewhere",
        "AWS_BUCKET": "other",
    }.items():
        monkeypatch.setenv(name, value)
    with recorder() as (port, seen), S3Store(local_place(port), KEYS) as store:
        store.write(Kind.DATA, named(b"x"), b"x")
    [headers] = seen
    assert "Credential=AKIA/" in headers["authorization"]
    assert "/eu-west-9/s3/" in headers["authorization"]
    assert "x-amz-security-token" not in headers


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost, and the authority that signed it (ca.pem)."""
    directory = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=directory)

    request = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl(*request, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Test", "-days", "2")
    openssl(*request, "-keyout", "key.pem", "-out", "csr.pem", "-subj", "/CN=localhost")
    (directory / "extensions").write_text("subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n")
    sign = ["x509", "-req", "-in", "csr.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"]
    openssl(*sign, "-extfile", "extensions", "-out", "cert.pem")
    return directory


@contextmanager
def tls_server(authority: Path) -> Iterator[S3Place]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "cert.pem", authority / "key.pem")
    with recorder(tls=context) as (port, _):
        yield local_place(port, secure=True)


def test_a_certificate_must_be_trusted(authority: Path) -> None:
    with tls_server(authority) as place, S3Store(place, KEYS) as store:
        error = timed(errors.StoreUnreachable, lambda: store.write(Kind.DATA, named(b"x"), b"x"), within=2)
        assert "AWS_CA_BUNDLE" in str(error)


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "RESTIC_CACERT"])
def test_an_authority_of_ones_own_is_trusted(authority: Path, variable: str) -> None:
    environ = KEYS | {variable: str(authority / "ca.pem")}
    with tls_server(authority) as place, S3Store(place, environ) as store:
        store.write(Kind.DATA, named(b"x"), b"x")


def test_a_server_without_tls_is_told() -> None:
    with recorder() as (port, _), S3Store(local_place(port, secure=True), KEYS) as store:
        error = timed(errors.StoreUnreachable, lambda: store.read(Kind.CONFIG, ""), within=2)
        assert "does not speak TLS" in str(error)


def test_authorities_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="certificates cannot be read"):
        S3Store(local_place(1), KEYS | {"AWS_CA_BUNDLE": str(tmp_path / "none")})


def test_a_bucket_tells_its_region_to_everybody() -> None:
    with recorder() as (port, _):
        assert aws.looked_up(local_place(port)) == "eu-north-1"
    assert aws.looked_up(local_place(1)) is None


def test_what_nobody_understands_is_told_as_it_is() -> None:
    assert answers.understand("Something odd\nDebug source").reason == "Something odd"
    assert answers.understand("").reason == "?"
