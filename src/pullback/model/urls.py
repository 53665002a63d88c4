"""The names by which users call machines and repositories.

A machine that is off is named by its images:

    images:vda=/srv/web01/a.qcow2,vdb=raw:/srv/web01/b.raw

A comma in a path is doubled. `qcow2:` or `raw:` before a path says its format; without it, the
format is found out. (A relative path that begins so is written `./raw:…`.)

A repository in restic's format is named as restic names it: a directory by its path, a bucket by
`s3:https://HOST/BUCKET/PREFIX` or `s3:HOST/BUCKET/PREFIX`. A plain directory of images is
`dir:/path`.
"""

from __future__ import annotations

import posixpath
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from pullback import errors
from pullback.model import disks
from pullback.model.documents import rules

_MACHINE_EXAMPLE = (
    "Name a QEMU process by its QMP socket, qmp:/run/web01.sock, or a machine that is off by its images, "
    "images:vda=/srv/a.qcow2,vdb=/srv/b.raw"
)
_REPOSITORY_EXAMPLE = (
    "Name a directory, /srv/backup, or a bucket, s3:https://s3.example.com/bucket/web; "
    "a plain directory of images is dir:/srv/backup"
)
#: What restic has besides, and we have not.
_OTHER_SCHEMES = frozenset({"sftp", "rest", "swift", "b2", "azure", "gs", "rclone"})
#: Source: Amazon S3 user guide, "Bucket naming rules"; underscores and capitals are in old buckets.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class QmpMachine:
    """A QEMU process, by its QMP socket."""

    socket: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A disk of a machine that is off."""

    target: str
    #: Absolute; a file or a block device.
    path: Path
    #: qcow2 or raw, as the user says; None: to be found out.
    format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesMachine:
    """A machine that is off, by its images: at least one, each target once."""

    images: tuple[Image, ...]


_ADDRESS = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<host>[^:\[\]]+))(?::(?P<port>[0-9]{1,6}))?", re.ASCII)
_MAX_PORT = 65535
Machine = QmpMachine | ImagesMachine
#: Formats that an image can have.
FORMATS = ("qcow2", "raw")


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryRepository:
    """A plain directory of qcow2 images."""

    path: Path

    @property
    def url(self) -> str:
        """Its name."""
        return f"dir:{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlace:
    """A directory that holds a repository in restic's format."""

    #: Absolute.
    path: Path

    @property
    def url(self) -> str:
        """As restic names it: a path that begins with a slash is never taken for anything else."""
        return str(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Place:
    """A bucket, or a part of one, that holds a repository in restic's format."""

    #: HOST or HOST:PORT.
    endpoint: str
    bucket: str
    #: What all names of objects begin with, without slashes at its ends; may be empty.
    prefix: str = ""
    #: TLS?
    secure: bool = True

    @property
    def server(self) -> str:
        """The server as a URL: `https://HOST`."""
        return f"{'https' if self.secure else 'http'}://{self.endpoint}"

    @property
    def url(self) -> str:
        """As restic names it (it takes the percent signs of such URLs away)."""
        return "/".join(filter(None, (f"s3:{self.server}", self.bucket, urllib.parse.quote(self.prefix))))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResticRepository:
    """A repository in restic's format."""

    location: LocalPlace | S3Place

    @property
    def url(self) -> str:
        """As restic names it."""
        return self.location.url


Repository = DirectoryRepository | ResticRepository


def machine(url: str) -> Machine:
    """`qmp:/path/to.sock` or `images:TARGET=PATH,…` to a value; `BadUrl` otherwise."""
    scheme, colon, rest = url.partition(":")
    if colon and scheme == "images":
        return ImagesMachine(images=_images(url, rest))
    if colon and scheme == "qmp" and rest:
        return QmpMachine(socket=Path(rest).absolute())
    named = colon and scheme == "qmp"
    raise _bad_machine(
        url, "the socket's path is missing" if named else "it begins neither with 'qmp:' nor with 'images:'"
    )


def _bad_machine(url: str, problem: str) -> errors.BadUrl:
    return errors.BadUrl(url=url, kind="machine", problem=problem, example=_MACHINE_EXAMPLE)


def _images(url: str, rest: str) -> tuple[Image, ...]:
    if "\0" in rest:
        raise _bad_machine(url, "no path holds a zero byte")
    # So a zero byte can stand for the doubled comma meanwhile.
    found = tuple(_image(url, part.replace("\0", ",")) for part in rest.replace(",,", "\0").split(","))
    targets = [image.target for image in found]
    for target in targets:
        if targets.count(target) > 1:
            raise _bad_machine(url, f"there are two disks {target}")
    return found


def _image(url: str, part: str) -> Image:
    target, equals, path = part.partition("=")
    if not equals:
        raise _bad_machine(url, f"{part!r} is not TARGET=PATH (a comma in a path is doubled)")
    if disks.bus_of(target) is None:
        raise _bad_machine(url, f"{target!r} is no disk's name (vda, sda, nvme0n1 …)")
    format, colon, after = path.partition(":")
    given = format if colon and format in FORMATS else None
    place = after if given else path
    if not place:
        raise _bad_machine(url, f"the path of {target} is missing")
    return Image(target=target, path=Path(place).absolute(), format=given)


def repository(url: str) -> Repository:
    """The name of a repository to a value; `BadUrl` otherwise. What has a slash, or begins with a dot, is a path."""
    scheme, colon, rest = url.partition(":")
    if "\0" in url:
        raise _bad_repository(url, "no name holds a zero byte")
    if colon and scheme == "dir":
        if not rest:
            raise _bad_repository(url, "the directory's path is missing")
        return DirectoryRepository(path=Path(rest).absolute())
    if colon and scheme == "s3":
        return ResticRepository(location=_bucket(url, rest))
    if colon and scheme == "local" and rest:
        return ResticRepository(location=LocalPlace(path=Path(rest).absolute()))
    if colon and scheme in _OTHER_SCHEMES:
        problem = f"Pullback cannot work on {scheme}: yet; restic can bring the repository over, with its command copy"
        raise _bad_repository(url, problem)
    if "/" in url or url.startswith("."):
        return ResticRepository(location=LocalPlace(path=Path(url).absolute()))
    if not url:
        raise _bad_repository(url, "it is empty")
    raise _bad_repository(url, f"a directory of that name would be ./{url}")


def _bad_repository(url: str, problem: str) -> errors.BadUrl:
    return errors.BadUrl(url=_without_secret(url), kind="repository", problem=problem, example=_REPOSITORY_EXAMPLE)


def _without_secret(url: str) -> str:
    """A name whose password, if somebody put one in, is not shown."""
    return re.sub(r"(//[^/@:]*):[^/@]*@", r"\1:***@", url)


def _bucket(url: str, rest: str) -> S3Place:
    """`https://host/bucket/prefix`, `http://…`, `//host/…` or `host/…`; restic reads them likewise."""
    match = re.match("(https?:|)//", rest)
    scheme = match[1] if match else ""
    host, _, path = rest[match.end() if match else 0 :].partition("/")
    if scheme:
        if set(path) & set("?#"):
            raise _bad_repository(url, "a ? or # in it is written %3F or %23")
        path = urllib.parse.unquote(path)
    bucket, _, prefix = path.partition("/")
    if "@" in host:
        raise _bad_repository(url, "credentials belong into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if not _is_endpoint(host):
        raise _bad_repository(url, f"{host!r} is no HOST or HOST:PORT" if host else "the host is missing")
    if not _BUCKET.fullmatch(bucket):
        raise _bad_repository(url, f"{bucket!r} is no bucket's name" if bucket else "the bucket is missing")
    # restic cleans the prefix the same way (Go's path.Clean); a leading slash would make another one of it.
    prefix = posixpath.normpath(prefix).strip("/") if prefix.strip("/") else ""
    if ".." in prefix.split("/"):
        raise _bad_repository(url, "its prefix leads out of the bucket")
    return S3Place(endpoint=host, bucket=bucket, prefix="" if prefix == "." else prefix, secure=scheme != "http:")


def _is_endpoint(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(f"//{text}")
        return (
            not text.endswith(":")
            and bool(parts.hostname)
            and parts.port != 0
            and rules.host(str(parts.hostname)) is None
        )
    except ValueError:
        return False


def unix_socket(url: str) -> Path:
    """`unix:/path` to a path; `BadUrl` otherwise."""
    scheme, _, rest = url.partition(":")
    if scheme == "unix" and rest:
        return Path(rest).absolute()
    raise errors.BadUrl(
        url=url,
        kind="server",
        problem="it is no unix socket",
        example="Name it by its socket: unix:/run/web01-nbd.sock",
    )


def address(text: str) -> tuple[str, int | None]:
    """`HOST`, `HOST:PORT`, `[IPv6]` or `[IPv6]:PORT` to listen on; no port, or 0, is None: a free one. `BadUrl`."""
    match = _ADDRESS.fullmatch(text)
    host = match and (match["bracketed"] or match["host"])
    port = int(match["port"] or 0) if match else 0
    wrong = rules.host(host) if host else "is neither HOST nor HOST:PORT"
    problem = f"it {wrong}" if wrong else None
    if problem is None and port > _MAX_PORT:
        problem = f"the highest port is {_MAX_PORT}"
    if problem is not None or not host:
        example = "Name it like 192.0.2.1:10809, [2001:db8::1]:10809, or localhost for a free port there"
        raise errors.BadUrl(url=text, kind="place to listen", problem=str(problem), example=example)
    return host, port or None
