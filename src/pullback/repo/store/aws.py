"""Who we are to an S3 server: keys and region, from where other programs of this host find them.

Variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_DEFAULT_REGION or
AWS_REGION; AWS_PROFILE in AWS_SHARED_CREDENTIALS_FILE (~/.aws/credentials) and AWS_CONFIG_FILE
(~/.aws/config). Source: AWS SDKs and Tools Reference Guide, "Shared config and credentials files".
"""

from __future__ import annotations

import configparser
import http.client
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pullback import errors
from pullback.model.urls import S3Place

#: What servers that have no regions expect.
DEFAULT_REGION = "us-east-1"
_AMAZON = re.compile(
    r"(?:s3|s3-accelerate)(?:[.-](?:dualstack\.)?(?P<region>[a-z0-9-]+))?\.amazonaws\.com(?:\.cn)?", re.ASCII
)
_LIMIT = 256 * 1024
_LOOKUP_SECONDS = 5.0
#: With one of these, keys come from a service of the host; so they do on Amazon's own machines.
_SERVICES = (
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """An access key with its secret, which `repr` does not show."""

    access: str
    secret: str
    token: str | None = None

    def __repr__(self) -> str:
        return f"Keys({self.access!r})"


def keys(place: S3Place, environ: Mapping[str, str]) -> Keys | None:
    """The keys; None if a service of the host gives them. Raises `StoreRefused` if there are none."""
    access, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    if access and secret:
        return Keys(access=access, secret=secret, token=environ.get("AWS_SESSION_TOKEN") or None)
    if access or secret:
        missing = "AWS_SECRET_ACCESS_KEY" if access else "AWS_ACCESS_KEY_ID"
        raise _without_keys(place, f"{missing} is not set, and the other one is")
    found = _profile(place, environ, _file(environ, "AWS_SHARED_CREDENTIALS_FILE", "credentials"))
    access, secret = found.get("aws_access_key_id"), found.get("aws_secret_access_key")
    if access and secret:
        return Keys(access=access, secret=secret, token=found.get("aws_session_token"))
    if is_amazon(place) or any(environ.get(name) for name in _SERVICES):
        return None
    raise _without_keys(place, "there are no credentials")


def _without_keys(place: S3Place, reason: str) -> errors.StoreRefused:
    way_out = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile of ~/.aws/credentials."
    return errors.StoreRefused(store=place.url, what="access", reason=reason, way_out=way_out)


def is_amazon(place: S3Place) -> bool:
    """Is it Amazon's own service?"""
    return _AMAZON.fullmatch(place.endpoint) is not None


def region(place: S3Place, environ: Mapping[str, str]) -> str:
    """The bucket's region: as the variables, the host's name, the profile or Amazon say; or what others take."""
    match = _AMAZON.fullmatch(place.endpoint)
    for given in (environ.get("AWS_DEFAULT_REGION"), environ.get("AWS_REGION"), match and match["region"]):
        if given:
            return given
    profile = _profile(place, environ, _file(environ, "AWS_CONFIG_FILE", "config"), prefix="profile ").get("region")
    return profile or (looked_up(place, ca_file(environ)) if match else None) or DEFAULT_REGION


def looked_up(place: S3Place, authorities: Path | None = None) -> str | None:
    """The bucket's region as Amazon tells it to everybody, also with an answer that refuses."""
    # Source: Amazon S3 API reference, HeadBucket, header x-amz-bucket-region.
    if place.secure:
        context = ssl.create_default_context(cafile=str(authorities) if authorities else None)
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            place.endpoint, timeout=_LOOKUP_SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(place.endpoint, timeout=_LOOKUP_SECONDS)
    try:
        connection.request("HEAD", f"/{place.bucket}")
        found = connection.getresponse().getheader("x-amz-bucket-region")
    except (OSError, http.client.HTTPException):
        return None  # The first request proper will say what is wrong.
    finally:
        connection.close()
    return found if found and re.fullmatch("[a-z0-9-]{1,40}", found, re.ASCII) else None


def ca_file(environ: Mapping[str, str]) -> Path | None:
    """Certificates of authorities to trust besides those of the system: AWS_CA_BUNDLE, or restic's RESTIC_CACERT."""
    for name in ("AWS_CA_BUNDLE", "RESTIC_CACERT"):
        if environ.get(name):
            return Path(environ[name])
    return None


def _file(environ: Mapping[str, str], variable: str, name: str) -> Path | None:
    if environ.get(variable):
        return Path(environ[variable])
    home = environ.get("HOME")
    return Path(home, ".aws", name) if home else None


def _profile(place: S3Place, environ: Mapping[str, str], path: Path | None, prefix: str = "") -> Mapping[str, str]:
    """A section of one of Amazon's files; empty if there is none and none was asked for."""
    name = environ.get("AWS_PROFILE") or "default"
    if path is None:
        return {}
    parser = configparser.RawConfigParser(strict=False)
    try:
        with path.open(encoding="utf-8") as file:
            parser.read_string(file.read(_LIMIT))
    except FileNotFoundError:
        return {}
    except PermissionError as error:
        raise errors.PermissionDenied(path=str(path)) from error
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        reason = f"{path} cannot be read ({type(error).__name__})"
        raise _without_keys(place, reason) from error
    for section in (name, f"{prefix}{name}"):
        if parser.has_section(section):
            return dict(parser.items(section))
    return {}
