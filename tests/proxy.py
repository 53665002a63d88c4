"""A proxy before an HTTP server, that can be told to answer errors, to wait, and to cut connections."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_SECONDS = 30


@dataclass(frozen=True)
class Request:
    """A request that came, the n-th (from 1)."""

    number: int
    method: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What to do with a request, in this order."""

    #: Wait.
    seconds: float = 0
    #: Wait until it is set.
    until: threading.Event | None = None
    #: Answer so, and do not ask the server.
    status: int = 0
    code: str = ""
    #: Cut the connection: before the server is asked, after it answered, or in the middle of the answer's body.
    cut: str = ""


Rule = Callable[[Request], Fault | None]


def first(count: int, fault: Fault, *methods: str) -> Rule:
    """The first so many requests (with these methods) meet a fault."""
    lock, left = threading.Lock(), count

    def rule(request: Request) -> Fault | None:
        nonlocal left
        with lock:
            if (methods and request.method not in methods) or left == 0:
                return None
            left -= 1
            return fault

    return rule


@dataclass
class Proxy:
    """A proxy that runs. `rule` may be changed at any time."""

    port: int
    server_port: int
    rule: Rule = lambda request: None
    #: Every request that came.
    seen: list[Request] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def meet(self, method: str, path: str) -> Fault:
        """Note a request, and decide on it."""
        with self._lock:
            request = Request(len(self.seen) + 1, method, path)
            self.seen.append(request)
        return self.rule(request) or Fault()


@contextlib.contextmanager
def before(server_port: int) -> Iterator[Proxy]:
    """A proxy before a server on this host, while the block runs."""

    class Handler(_Handler):
        proxy: Proxy

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        Handler.proxy = Proxy(port=server.server_address[1], server_port=server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield Handler.proxy
        finally:
            server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        fault = self.proxy.meet(self.command, self.path)
        time.sleep(fault.seconds)
        if fault.until is not None:
            fault.until.wait(_SECONDS)
        if fault.cut == "before":
            self.close_connection = True
        elif fault.status:
            error = f"<Error><Code>{fault.code}</Code><Message>Told to say {fault.code}.</Message></Error>".encode()
            self._answer(fault.status, [("content-length", str(len(error)))], error)
        else:
            self._forward(body, fault)

    def _forward(self, body: bytes, fault: Fault) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.server_port, timeout=_SECONDS)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if fault.cut == "after":
            self.close_connection = True
            return
        headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection")]
        if answer.getheader("transfer-encoding"):
            headers.append(("content-length", str(len(content))))
        self._answer(answer.status, headers, content[: len(content) // 2] if fault.cut == "body" else content)
        if fault.cut == "body":
            self.close_connection = True

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve
